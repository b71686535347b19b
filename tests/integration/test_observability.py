"""What can be seen of a run from outside: Prometheus metrics, JSON log lines, the state of a run at work."""

from __future__ import annotations

import datetime
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from faceflow.cli.main import main
from faceflow.cluster.step_records import Step
from faceflow.runs.lease import claim
from faceflow.runs.status import Watcher, status
from faceflow.storage import layout
from faceflow.storage.object_store import Store
from faceflow.tools.datasets.synthesize import synthesize
from tests.conftest import ROOT, write_faces
from tests.integration.clusters import clean_environment

STAGES = ["ingest", "quantize", "search", "link", "detect", "publish"]


def faces(folder: Path, count: int = 600) -> str:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 24))[np.arange(count) % 20] + 0.3 * rng.standard_normal((count, 24))
    return str(write_faces(folder / "f.parquet", x.astype(np.float32)))


METERED = """
import sys

import ray

from faceflow.cli.main import main

ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
code = main(sys.argv[1:])
print(code, ray.nodes()[0]["MetricsExportPort"], flush=True)
sys.stdin.read()  # Ray stays up until the test has read its metrics
"""


def test_metrics_reach_prometheus(tmp_path: Path) -> None:
    # In a Ray of its own: an agent keeps 2,000 series of a metric, which the runs of the other tests may have used up.
    metered = subprocess.Popen(
        [sys.executable, "-c", METERED, "cluster", faces(tmp_path), str(tmp_path / "out"), "--run-id", "metered", "--quiet"],
        env=clean_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert metered.stdout is not None
        code, port = next(line for line in metered.stdout if re.fullmatch(r"\d+ \d+\n", line)).split()
        assert code == "0"
        results = scraped(f"http://127.0.0.1:{port}/metrics")
    finally:
        metered.communicate(timeout=100)
    for name in ("busy_seconds_total", "read_bytes_total", "written_bytes_total"):
        assert results[name, "step", "publish"] > 0
    names = {name for name, _, _ in results}
    assert {"tasks_in_flight", "tasks_waiting", "rows_per_second", "stage"} <= names


def scraped(address: str) -> dict[tuple[str, str, str], float]:
    """The metrics of run `metered` once all that is wanted is there: by name, kind of label, label."""
    wanted = {
        ("rows_total", "step", "ingest"): 600.0, ("rows_total", "step", "publish"): 600.0,
        ("tasks_total", "step", "detect"): 1.0,
    }  # fmt: skip
    results: dict[tuple[str, str, str], float] = {}
    for _ in range(60):
        text = urllib.request.urlopen(address, timeout=5).read().decode()
        for name, labels, value in re.findall(r"^ray_faceflow_(\w+)\{(.*)\} ([-0-9.e+]+)$", text, re.M):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if tags.get("run") == "metered":
                kind = "step" if "step" in tags else "stage"
                results[name, kind, tags[kind]] = float(value)
        if wanted.items() <= results.items():
            break
        time.sleep(1)
    assert wanted.items() <= results.items(), results
    return results


def test_each_log_line_is_an_object(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "faceflow", "cluster", faces(tmp_path), str(tmp_path / "out"), "--run-id", "logged"]
    for again in (False, True):
        done = subprocess.run(
            [*command, "--log-format", "json", "--json"], env=clean_environment(), capture_output=True, text=True, timeout=200,
            check=True,
        )  # fmt: skip
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        assert all({"time", "level", "message"} <= set(line) for line in lines)
        assert all(line["run"] == "logged" for line in lines)
        by_event: dict[str, list[dict[str, object]]] = {}
        for line in lines:
            by_event.setdefault(str(line.get("event")), []).append(line)
        finished = "stage_skipped" if again else "stage_done"
        assert [line["stage"] for line in by_event[finished]] == STAGES
        result = json.loads(done.stdout.splitlines()[-1])
        (end,) = by_event["run_done"]
        assert end["clusters"] == result["clusters"] == 20
        assert end["labels"] == result["labels"]


def test_status_of_a_run_at_work_and_of_one_that_fell_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Store.at(str(tmp_path / "out"))
    run = out.child("_runs/r")
    now = datetime.datetime.now(datetime.UTC)
    run.write_json(layout.RUN_RECORD, {"state": "begun", "updated": now.isoformat(), "settings": {}})
    lease = claim(run, "r")
    watcher = Watcher(lease)
    watcher.stage("ingest")
    watcher.finished("ingest", 12.5)
    watcher.stage("search")
    step = Step("search", 8, 4_000, seconds=30.0, tasks_done=6, rows_done=3_000, in_flight=2)
    step.retries["its worker died"] = 1
    watcher._written = -1e9
    watcher.step(step)
    assert main(["status", out.root, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert (results["state"], results["stage"], results["left"]) == ("running", "search", 10.0)
    assert results["seconds"] == {"ingest": 12.5}
    assert main(["status", out.root]) == 0
    printed = capsys.readouterr().out
    for part in (
        "6 of 8 tasks",
        "3,000 of 4,000 rows, 100 rows/s",
        "2 in flight, 0 waiting",
        "1 x its worker died",
        "10 s left",
    ):
        assert part in printed, printed
    state = run.read_json(layout.PROGRESS)
    assert state is not None
    long_ago = (now - datetime.timedelta(minutes=5)).isoformat()
    run.write_json(layout.PROGRESS, state | {"updated": long_ago})
    run.write_json(layout.RUN_RECORD, {"state": "begun", "updated": long_ago, "settings": {}})
    assert main(["status", out.root]) == 0
    printed = capsys.readouterr().out
    assert "stopped" in printed
    assert "No heartbeat for 60 s; the same command continues it" in printed


@pytest.mark.timeout(180)
def test_a_terminated_command_says_so_and_continues(tmp_path: Path) -> None:
    synthesize(str(tmp_path / "in"), 40_000, dim=64)
    command = [
        sys.executable,
        str(ROOT / "jobs" / "cluster.py"),
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--log-format",
        "json",
    ]
    for number in (signal.SIGTERM, signal.SIGKILL):
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_environment()
        ) as process:
            said = []
            for line in process.stderr or ():
                said.append(json.loads(line))
                if said[-1].get("event") == "stage_begins" and said[-1]["stage"] == "quantize":
                    process.send_signal(number)
            code = process.wait(60)
        results = status(str(tmp_path / "out"))
        assert results.state == "stopped"  # at once, as its process is known to be gone
        if number == signal.SIGTERM:
            assert code == 3
            assert {key: said[-1][key] for key in ("level", "event", "exit_code")} == {
                "level": "error", "event": "failed", "exit_code": 3,
            }  # fmt: skip
            assert said[-1]["message"] == "interrupted; the same command continues"
            assert results.why == "interrupted"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment())
    assert done.returncode == 0, done.stderr
    assert "skipped: finished before" in done.stderr


def test_status_says_why_a_run_was_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_faces(tmp_path / "in" / "a.parquet", np.full((3, 2), np.nan, np.float32))
    assert main(["cluster", str(tmp_path / "in"), str(tmp_path / "out"), "--quiet"]) == 2
    capsys.readouterr()
    assert main(["status", str(tmp_path / "out")]) == 0
    assert "refused" in (shown := capsys.readouterr().out)
    assert "3 of 3 rows cannot be used" in shown
