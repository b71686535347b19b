"""What a process may use: CPU quotas of containers, temporary folders, and no home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from faceflow.cluster import machine_limits
from faceflow.errors import SettingsError
from tests.conftest import ROOT, write_faces


def group(root: Path, line: str, **files: str) -> Path:
    """A file system with this line in /proc/self/cgroup, and these files below /sys/fs/cgroup (`__` for a slash)."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(f"{line}\n")
    for name, text in files.items():
        path = (
            root / "sys" / "fs" / "cgroup" / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cfs_", "cpu.cfs_")
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/", {"cpu_max": "400000 100000"}, 4),
        ("0::/", {"cpu_max": "max 100000"}, 64),
        ("0::/pods/a", {"cpu_max": "max 100000", "pods__cpu_max": "250000 100000", "pods__a__cpu_max": "800000 100000"}, 3),
        ("0::/of/the/host", {"cpu_max": "50000 100000"}, 1),  # a container that sees its own group as the root
        ("4:cpu,cpuacct:/docker/x", {"cpu__docker__x__cfs_quota_us": "600000", "cpu__docker__x__cfs_period_us": "100000"}, 6),
        ("4:cpu,cpuacct:/", {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}, 64),
        ("4:memory:/", {}, 64),
        ("0::/", {"cpu_max": "nonsense"}, 64),
    ],
)
def test_cpus_are_those_of_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert machine_limits.cpus(group(tmp_path, line, **files)) == expected
    assert machine_limits.cpus(tmp_path / "nothing") == 64


def test_a_temporary_folder_with_a_long_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/tmp")
    assert machine_limits.temporary_for_ray() is None
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/scratch/" + "x" * 60)
    assert machine_limits.temporary_for_ray() == "/tmp/ray"
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(SettingsError, match="set TMPDIR to a folder of at most 40 characters"):
        machine_limits.temporary_for_ray()


@pytest.mark.timeout(300)
def test_a_run_without_a_home_and_with_a_long_temporary_folder(tmp_path: Path) -> None:
    """Ray's token, matplotlib's fonts and the kernels would go to the home; Ray's sockets to the temporary folder. Nothing but
    the result is printed on stdout."""
    faces = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    write_faces(tmp_path / "in" / "a.parquet", faces)
    temporary = tmp_path / ("t" * 60)
    temporary.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "XDG_"))}
    env |= {"HOME": "/proc/no-home", "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT / "lib")}
    command = [sys.executable, str(ROOT / "jobs" / "cluster.py"), str(tmp_path / "in"), str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["faces"] == 300
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["plan", "--help"],
        ["cluster", "--help"],
        ["runs", "OUT"],
        ["status", "OUT"],
        ["clean", "OUT", "--keep", "1"],
    ],
    ids=" ".join,
)
def test_commands_that_compute_nothing_load_no_kernels(tmp_path: Path, arguments: list[str]) -> None:
    run = tmp_path / "_runs" / "r"
    run.mkdir(parents=True)
    record = {"state": "begun", "updated": "2026-01-01T00:00:00+00:00", "settings": {}, "output": str(tmp_path)}
    (run / "run.json").write_text(json.dumps(record))
    script = (
        "import sys; sys.modules['numba'] = sys.modules['ray'] = None\n"
        "from faceflow.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, *(str(tmp_path) if a == "OUT" else a for a in arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT / "lib")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_ray_prints_goes_to_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from faceflow import logs
    from faceflow.cli import main

    def command(arguments: object) -> None:
        print("\x1b[33m(raylet)\x1b[0m the memory runs short")
        logs.say("the result")

    monkeypatch.setitem(main.COMMANDS, "runs", command)
    assert main.main(["runs", "anywhere"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "the result\n"
    assert "(raylet)" in printed.err
