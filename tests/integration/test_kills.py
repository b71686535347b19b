"""Real kills on a seeded schedule: SIGKILL of Ray workers, of the raylet and of the driver, in every stage.

    make slow                                            # the kills of the suite
    FACEFLOW_KILLS=100 make slow                         # a soak

The job runs as users run it, as a process of its own with its own Ray. A killed worker must not be noticed in the labels; a
killed raylet or driver ends the command, and the same command again must continue and give the labels of an undisturbed run.
All the while a reader follows latest.json and must find whole labels, old or new.
"""

from __future__ import annotations

import json
import os
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

from faceflow.pipeline import STAGES
from faceflow.synthesis import synthesize
from tests.conftest import ROOT

KILLS = int(os.environ.get("FACEFLOW_KILLS", "24"))
VICTIMS = ("worker", "driver", "raylet")


def command(source: Path, output: Path, seed: int) -> list[str]:
    flags = ["--index", "cells", "--cells", "60", "--neighbors", "20", "--workers", "2", "--seed", str(seed), "--quiet"]
    return [sys.executable, str(ROOT / "jobs" / "cluster.py"), str(source), str(output), *flags]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with log.open("ab") as file:
        return subprocess.Popen(arguments, stderr=file, stdout=file, env=environment, start_new_session=True)


def victims(driver: psutil.Process, kind: str) -> list[psutil.Process]:
    if kind == "driver":
        return [driver]
    found = []
    for process in driver.children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if (kind == "raylet" and "raylet/raylet" in line) or (kind == "worker" and line.startswith("ray::")):
            found.append(process)
    return found


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
                found = labels_of(self.output)
                if not any(found.equals(t) for t in self.truth):
                    self.wrong.append("labels of no run")
            except Exception as error:
                self.wrong.append(repr(error))
            self.reads += 1

    def stop(self) -> None:
        self._end.set()
        self.join()


@pytest.mark.slow
@pytest.mark.timeout(KILLS * 90 + 300)
def test_labels_survive_kills(tmp_path: Path) -> None:
    synthesize(str(tmp_path / "in"), 40_000, dim=64)
    truth = []
    for seed in (0, 1):  # two seeds by turns, so that the pointer really moves between different labels
        assert start(command(tmp_path / "in", tmp_path / f"calm-{seed}", seed), tmp_path / "log").wait(300) == 0
        truth.append(labels_of(tmp_path / f"calm-{seed}"))
    output = tmp_path / "out"
    reader = Reader(output, truth)
    reader.start()
    rng = np.random.default_rng(20261122)
    killed: dict[tuple[str, str], int] = {}
    for attempt in range(KILLS):
        stage, kind = STAGES[attempt % len(STAGES)].name, VICTIMS[(attempt // len(STAGES)) % len(VICTIMS)]
        arguments = command(tmp_path / "in", output, attempt % 2)
        process = start(arguments, tmp_path / "log")
        runs_before = set((output / "_runs").iterdir()) if (output / "_runs").exists() else set()
        if wait_for_stage(process, output, runs_before, stage):
            time.sleep(float(rng.uniform(0, 0.4)))
            found: list[psutil.Process] = []
            deadline = time.monotonic() + 10  # at first the workers are not there yet
            while not found and process.poll() is None and time.monotonic() < deadline:
                found = victims(psutil.Process(process.pid), kind)
            if found:
                found[int(rng.integers(len(found)))].send_signal(signal.SIGKILL)
                killed[stage, kind] = killed.get((stage, kind), 0) + 1
        code = process.wait(300)
        if kind == "worker":
            assert code == 0, (
                f"attempt {attempt}, {stage}: a killed worker ended the run\n{(tmp_path / 'log').read_text()[-3000:]}"
            )
        if code != 0:
            assert code in (3, -signal.SIGKILL), f"attempt {attempt}, {stage}, {kind}: exit code {code}"
            assert start(arguments, tmp_path / "log").wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
        assert labels_of(output).equals(truth[attempt % 2]), f"attempt {attempt}: {kind} killed in {stage}"
    reader.stop()
    print(f"{sum(killed.values())} kills: {killed}; {reader.reads} reads")
    assert reader.wrong == []
    assert reader.reads > 10 * KILLS
    assert sum(killed.values()) >= 0.7 * KILLS  # the others came too late: the run had ended
    assert {kind for _, kind in killed} == set(VICTIMS[: -(-KILLS // len(STAGES))])


def wait_for_stage(process: subprocess.Popen[bytes], output: Path, before: set[Path], stage: str) -> bool:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        new = set((output / "_runs").iterdir()) - before if (output / "_runs").exists() else set()
        if any((run / "manifests" / f"{stage}.begun.json").exists() for run in new):
            return True
        time.sleep(0.01)
    return False
