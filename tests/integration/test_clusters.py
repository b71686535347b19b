"""The same labels from a Ray cluster of two machines (two raylets of one CPU each), and through `ray job submit`."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT, free_port

TOKEN = secrets.token_hex(32)
FLAGS = ["--neighbors", "80", "--min-similarity", "0.5", "--index", "cells", "--run-id", "r"]


def clean_environment(**extra: str) -> dict[str, str]:
    # As on a machine where faceflow was never installed: the jobs find it beside themselves.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    # As with an activated virtual environment: the `python` of a job's entry point is this one.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    # Token authentication as the README describes it: one token, the same on every machine.
    return env | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN} | extra


def ray(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ray")), *arguments],
        env=clean_environment(**env), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "cluster.py"), *arguments],
        env=clean_environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def labels(output: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(f, partitioning=None) for f in sorted((output / "labels" / "run=r").iterdir())])


def stop_cluster(port: int) -> None:
    """Kill what belongs to the cluster at this port. `ray stop` would also end the Ray that other tests share."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if f":{port} " in f"{line} " or f"gcs_server_port={port}" in line:
                for child in [*process.children(recursive=True), process]:
                    child.kill()


@pytest.fixture(scope="module")
def two_machines() -> Iterator[tuple[str, str]]:
    """(address, dashboard address) of a head and a second raylet, one CPU each."""
    port, dashboard = free_port(), free_port()
    agent, agent2 = free_port(), free_port()
    ray(
        "start", "--head", f"--port={port}", "--num-cpus=1", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", "--object-store-memory=100000000",
    )  # fmt: skip
    try:
        ray(
            "start", f"--address=127.0.0.1:{port}", "--num-cpus=1", f"--dashboard-agent-listen-port={agent2}",
            "--object-store-memory=100000000",
        )  # fmt: skip
        yield f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
    finally:
        stop_cluster(port)


def test_same_labels_from_two_machines_and_from_a_submitted_job(
    face_data: Path, tmp_path: Path, two_machines: tuple[str, str]
) -> None:
    address, dashboard = two_machines
    source = str(face_data / "lfw_mobilefacenet128.parquet")
    local = job(source, str(tmp_path / "local"), *FLAGS, "--quiet", "--json")
    assert local.returncode == 0, local.stderr
    on_cluster = job(source, str(tmp_path / "cluster"), *FLAGS, "--address", address)
    assert on_cluster.returncode == 0, on_cluster.stderr
    assert labels(tmp_path / "cluster").equals(labels(tmp_path / "local"))

    # Only what a user would submit travels: the repository without its virtual environment.
    config = tmp_path / "job.toml"
    config.write_text(f'input = "{source}"\noutput = "{tmp_path / "submitted"}"\n')
    excludes = {"excludes": ["/.venv", "/.git", "/demo", "/tests"]}
    submitted = ray(
        "job", "submit", "--address", dashboard, "--working-dir", str(ROOT), "--runtime-env-json", json.dumps(excludes),
        "--", "python", "jobs/cluster.py", "--config", str(config), *FLAGS,
    )  # fmt: skip
    assert "succeeded" in submitted.stdout
    assert labels(tmp_path / "submitted").equals(labels(tmp_path / "local"))


def test_unreachable_cluster_is_a_clear_error(tmp_path: Path, face_data: Path) -> None:
    done = job(
        str(face_data / "lfw_mobilefacenet128.parquet"), str(tmp_path / "o"), "--address", f"127.0.0.1:{free_port()}", "--quiet"
    )
    assert done.returncode == 2, done.stderr
    assert "cannot use Ray at 127.0.0.1" in done.stderr
