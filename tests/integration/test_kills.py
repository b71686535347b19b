"""Real kills on a seeded schedule: SIGKILL of Ray workers, raylets and drivers, in every stage.

    python -m pytest -m slow tests/integration/test_kills.py                       # the kills of the suite
    FACEFLOW_KILLS=100 python -m pytest -m slow -s tests/integration/test_kills.py # a soak

The job runs as users run it, as a process of its own: with its own Ray, and on a cluster of two raylets. A killed worker, or a
killed node of the cluster, costs its tasks, a killed raylet of its own Ray a new start of that Ray, and the command still
succeeds; a killed driver ends the command, and the same command again must continue. The labels must be those of an undisturbed
run. All the while a reader follows latest.json and must find whole labels, old or new.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow.runs.pipeline import STAGES
from faceflow.tools.datasets.synthesize import synthesize
from tests.conftest import ROOT
from tests.integration.clusters import TwoMachines, clean_environment

KILLS = int(os.environ.get("FACEFLOW_KILLS", "24"))
VICTIMS = ("worker", "node", "driver", "raylet")
RESUMED = ("driver", "raylet")
"""Victims whose death may end the command; it is given again. (A raylet's does only while Ray is starting.)"""


def command(source: Path, output: Path, seed: int, *more: str, job: str = "cluster") -> list[str]:
    flags = ["--index", "cells", "--cells", "60", "--neighbors", "20", "--workers", "2", "--seed", str(seed), "--quiet"]
    flags += ["--min-similarity", ("0.55", "0.75")[seed]]  # with the same threshold both seeds find the same people
    return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), str(source), str(output), *flags, *more]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(arguments, stderr=file, stdout=file, env=clean_environment(), start_new_session=True)


def victims(driver: psutil.Process, kind: str, machines: TwoMachines) -> list[psutil.Process]:
    if kind == "driver":
        return [driver]
    if kind == "node":
        return [machines.second()]
    results = []
    for process in driver.children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if (kind == "raylet" and "raylet/raylet" in line) or (
            kind == "worker" and line.startswith("ray::") and "Agent" not in line
        ):
            results.append(process)
    return results


def labels_of(output: Path) -> pa.Table:
    pointer = json.loads((output / "latest.json").read_text())
    files = sorted((output / pointer["labels"]).glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(f, partitioning=None) for f in files])


class Reader(threading.Thread):
    """Follows latest.json as a consumer would: what it finds must be one of the runs' labels, whole."""

    def __init__(self, output: Path, truth: list[pa.Table]) -> None:
        super().__init__(daemon=True)
        self.output, self.truth, self.reads, self.wrong, self._end = output, truth, 0, [], threading.Event()

    def run(self) -> None:
        while not self._end.wait(0.05):
            if not (self.output / "latest.json").exists():
                continue
            try:
                results = labels_of(self.output)
                if not any(results.equals(t) for t in self.truth):
                    self.wrong.append("labels of no run")
            except Exception as error:
                self.wrong.append(repr(error))
            self.reads += 1

    def stop(self) -> None:
        self._end.set()
        self.join()


@pytest.mark.slow
@pytest.mark.timeout(KILLS * 90 + 300)
def test_labels_survive_kills(tmp_path: Path, two_machines: TwoMachines) -> None:
    synthesize(str(tmp_path / "in"), 40_000, dim=64)
    truth = []
    for seed in (0, 1):  # two seeds by turns, so that the pointer really moves between different labels
        assert start(command(tmp_path / "in", tmp_path / f"calm-{seed}", seed), tmp_path / "log").wait(300) == 0
        truth.append(labels_of(tmp_path / f"calm-{seed}"))
    assert not truth[0].equals(truth[1])
    output, log = tmp_path / "out", tmp_path / "log"
    reader = Reader(output, truth)
    reader.start()
    rng = np.random.default_rng(20261122)
    killed: dict[str, int] = {}
    given_again: dict[str, int] = {}
    runs = 0
    for attempt in range(KILLS):
        stage, kind = STAGES[attempt % len(STAGES)].name, VICTIMS[(attempt // len(STAGES)) % len(VICTIMS)]
        arguments = command(
            tmp_path / "in", output, attempt % 2, *(("--address", two_machines.address) if kind == "node" else ())
        )
        before = set((output / "_runs").iterdir()) if (output / "_runs").exists() else set()
        process, runs = start(arguments, log), runs + 1
        if wait_for_stage(process, output, before, stage) and strike(process, kind, two_machines, rng):
            killed[f"{kind} in {stage}"] = killed.get(f"{kind} in {stage}", 0) + 1
        code = process.wait(300)
        what = f"attempt {attempt}: {kind} killed in {stage}: exit code {code}\n"
        assert code == 0 or (kind in RESUMED and code in (3, -signal.SIGKILL)), what + log.read_text()[-3000:]
        if code != 0:
            runs += 1
            given_again[kind] = given_again.get(kind, 0) + 1
            assert start(arguments, log).wait(300) == 0, what + log.read_text()[-3000:]
        assert labels_of(output).equals(truth[attempt % 2]), what
        two_machines.heal()
        print(f"{attempt + 1} attempts, {sum(killed.values())} kills, {runs} runs, {reader.reads} reads", flush=True)
        for run in set((output / "_runs").iterdir()):
            shutil.rmtree(run / "vectors", ignore_errors=True)  # the disk is not what is tested here
    reader.stop()
    print(f"\n{sum(killed.values())} kills in {runs} runs, {reader.reads} reads: {dict(sorted(killed.items()))}")
    print(f"commands given again: {given_again}")
    assert reader.wrong == []
    assert reader.reads > 10 * KILLS
    assert sum(killed.values()) >= 0.85 * KILLS  # the others came too late: the run had ended
    assert {kind.split()[0] for kind in killed} == set(VICTIMS[: -(-KILLS // len(STAGES))])


@pytest.mark.slow
@pytest.mark.timeout(KILLS * 90 + 300)
def test_incremental_runs_survive_kills(tmp_path: Path, two_machines: TwoMachines) -> None:
    synthesize(str(tmp_path / "made"), 40_500, dim=64)
    faces = pa.concat_tables([pq.read_table(f) for f in sorted((tmp_path / "made").glob("*.parquet"))])
    source, base, log = tmp_path / "in", tmp_path / "base", tmp_path / "log"
    source.mkdir()
    for i in range(4):
        pq.write_table(faces.slice(10_000 * i, 10_000), source / f"{i}.parquet")
    assert start(command(source, base, 0, job="nightly"), log).wait(300) == 0, log.read_text()[-3000:]
    pq.write_table(faces.slice(40_000), source / "4.parquet")
    pq.write_table(faces.slice(20_050, 9_950), source / "2.parquet")  # fifty go
    shutil.copytree(base, tmp_path / "calm", copy_function=os.link)
    assert start(command(source, tmp_path / "calm", 0, job="nightly"), log).wait(300) == 0, log.read_text()[-3000:]
    truth = [labels_of(base), labels_of(tmp_path / "calm")]
    assert not truth[0].equals(truth[1])
    rng = np.random.default_rng(20261124)
    killed: dict[str, int] = {}
    reads = 0
    for attempt in range(KILLS):
        stage, kind = STAGES[attempt % len(STAGES)].name, VICTIMS[(attempt // len(STAGES)) % len(VICTIMS)]
        output = tmp_path / "out"
        shutil.copytree(base, output, copy_function=os.link)
        reader = Reader(output, truth)
        reader.start()
        more = ("--address", two_machines.address) if kind == "node" else ()
        arguments = command(source, output, 0, *more, job="nightly")
        before = set((output / "_runs").iterdir())
        process = start(arguments, log)
        if wait_for_stage(process, output, before, stage) and strike(process, kind, two_machines, rng):
            killed[f"{kind} in {stage}"] = killed.get(f"{kind} in {stage}", 0) + 1
        code = process.wait(300)
        what = f"attempt {attempt}: {kind} killed in {stage}: exit code {code}\n"
        assert code == 0 or (kind in RESUMED and code in (3, -signal.SIGKILL)), what + log.read_text()[-3000:]
        if code != 0:
            assert start(arguments, log).wait(300) == 0, what + log.read_text()[-3000:]
        assert labels_of(output).equals(truth[1]), what
        counts = [json.loads(f.read_text())["result"] for f in output.glob("_runs/*/manifests/quantize.json")]
        assert sorted(results["incremental"] for results in counts) == [False, True], what
        reader.stop()
        assert reader.wrong == [], what
        reads += reader.reads
        two_machines.heal()
        shutil.rmtree(output)
        print(f"{attempt + 1} attempts, {sum(killed.values())} kills, {reads} reads", flush=True)
    print(f"\n{sum(killed.values())} kills, {reads} reads: {dict(sorted(killed.items()))}")
    assert sum(killed.values()) >= 0.75 * KILLS  # the others came too late: the run had ended


def strike(process: subprocess.Popen[bytes], kind: str, machines: TwoMachines, rng: np.random.Generator) -> bool:
    """Kill one victim a moment from now; whether there was one."""
    time.sleep(float(rng.uniform(0, 0.3)))
    deadline = time.monotonic() + 10  # at first the workers are not there yet
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if results := victims(psutil.Process(process.pid), kind, machines):
                results[int(rng.integers(len(results)))].send_signal(signal.SIGKILL)
                return True
        except psutil.NoSuchProcess:
            continue
    return False


def wait_for_stage(process: subprocess.Popen[bytes], output: Path, before: set[Path], stage: str) -> bool:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        new = set((output / "_runs").iterdir()) - before if (output / "_runs").exists() else set()
        if any((run / "manifests" / f"{stage}.begun.json").exists() for run in new):
            return True
        time.sleep(0.01)
    return False
