"""Which run a command takes up: never one that another process has in hand."""

from __future__ import annotations

import datetime
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from faceflow.config import ClusterConfig
from faceflow.errors import RunError, SettingsError
from faceflow.runs import lease
from faceflow.runs.registry import choose_run
from faceflow.storage import layout


def speak(run: Path, seconds_ago: float = 0.0, **state: object) -> None:
    """The progress file of a run at work."""
    updated = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds_ago)
    said = {"run_id": run.name, "stage": "search", "stopped": "", "host": socket.gethostname(), "pid": os.getpid()}
    said["machine"] = lease.machine()
    path = run / "progress.json"
    path.with_suffix(".new").write_text(json.dumps(said | {"updated": updated.isoformat()} | state))
    path.with_suffix(".new").rename(path)


def choose(tmp_path: Path, **settings: object) -> str:
    config = ClusterConfig(str(tmp_path / "in"), str(tmp_path / "out"), **settings)  # type: ignore[arg-type]
    run_id, taken = choose_run(config, *layout.stores(config.output), None)
    taken.release()
    return run_id


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "out" / "_runs" / choose(tmp_path)


@pytest.fixture
def sleeper() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process.pid
        process.kill()


@pytest.mark.parametrize("settings", [{}, {"restart": True}, {"named": True}])
def test_a_run_in_hand_is_left_alone(tmp_path: Path, unfinished: Path, sleeper: int, settings: dict[str, object]) -> None:
    speak(unfinished, pid=sleeper)
    if settings.pop("named", False):
        settings["run_id"] = unfinished.name
    with pytest.raises(RunError, match=rf"{unfinished.name} is already running \(pid {sleeper} on .* another --run-id"):
        choose(tmp_path, **settings)
    assert (unfinished / "run.json").exists()
    assert choose(tmp_path, run_id="another") == "another"


@pytest.mark.parametrize("state", [{"stopped": "the disk is full"}, {"seconds_ago": 61.0}])
def test_a_run_that_stopped_is_continued(tmp_path: Path, unfinished: Path, sleeper: int, state: dict[str, object]) -> None:
    speak(unfinished, pid=sleeper, **state)  # type: ignore[arg-type]
    assert choose(tmp_path) == unfinished.name


def test_a_run_whose_process_died_is_continued_at_once(tmp_path: Path, unfinished: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet waited for
        speak(unfinished, pid=process.pid)
        assert choose(tmp_path) == unfinished.name
    assert choose(tmp_path) == unfinished.name


def test_a_process_elsewhere_is_waited_for(tmp_path: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SILENT_AFTER", 1.0)
    elsewhere = {"host": "elsewhere", "machine": "elsewhere", "pid": 1}
    speak(unfinished, **elsewhere)  # type: ignore[arg-type]
    begun = time.monotonic()
    assert choose(tmp_path) == unfinished.name
    assert time.monotonic() - begun > 0.8
    monkeypatch.setattr(lease, "SILENT_AFTER", 20.0)
    # Its clock is two minutes behind.
    speak(unfinished, 120.0, **elsewhere)  # type: ignore[arg-type]
    threading.Timer(0.5, speak, [unfinished, 120.0], elsewhere).start()
    with pytest.raises(RunError, match="pid 1 on elsewhere"):
        choose(tmp_path)
    speak(unfinished, 3_600.0, **elsewhere)  # type: ignore[arg-type]
    assert choose(tmp_path) == unfinished.name


def test_of_processes_that_take_a_run_at_once_one_gets_it(tmp_path: Path, unfinished: Path) -> None:
    (unfinished / "progress.json").unlink()
    script = (
        "import sys, time; from tests.runs.test_registry import choose; from pathlib import Path\n"
        "from faceflow.errors import RunError\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: print(choose(Path(sys.argv[1])), flush=True)\n"
        "except RunError as error: print(error, flush=True)\n"
        "sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]  # type: ignore[call-overload]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = sorted(process.stdout.readline().strip() for process in processes)
    for process in processes:
        process.communicate("\n", timeout=30)
    assert said.count(unfinished.name) == 1
    assert sum("is already running" in item for item in said) == 3


def test_a_run_is_begun_again_after_an_interrupted_removal(tmp_path: Path, unfinished: Path) -> None:
    """Whatever is left of it goes, and its record last, so that it shows up as a run until then."""
    for name in ("sample", "vectors"):
        (unfinished / name).mkdir()
        (unfinished / name / "part-00000.arrow").write_bytes(b"old")
    (unfinished / "run.json").unlink()
    assert choose(tmp_path, run_id=unfinished.name, restart=True) == unfinished.name
    assert sorted(path.name for path in unfinished.iterdir()) == [".progress.json.lock", "progress.json", "run.json"]


def test_a_run_that_was_published_meanwhile_is_not_begun_again(tmp_path: Path, unfinished: Path) -> None:
    labels = tmp_path / "out" / "labels" / f"run={unfinished.name}"
    labels.mkdir(parents=True)
    (tmp_path / "out" / "latest.json").write_text(json.dumps({"run_id": unfinished.name, "labels": "x"}))
    with pytest.raises(SettingsError, match="is published: it cannot be begun again"):
        choose(tmp_path, run_id=unfinished.name, restart=True)
    assert labels.exists()


@pytest.mark.parametrize("state", ["refused", "superseded", "begun"])
def test_a_run_that_goes_on_says_so(tmp_path: Path, unfinished: Path, state: str) -> None:
    record = json.loads((unfinished / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps(record | {"state": state}))
    choose(tmp_path, run_id=unfinished.name)
    assert json.loads((unfinished / "run.json").read_text())["state"] == "begun"
