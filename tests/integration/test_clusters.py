"""The same labels from a Ray cluster of two machines (two raylets of one CPU each), and through `ray job submit`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import ROOT, free_port
from tests.integration.clusters import TwoMachines, clean_environment, ray

FLAGS = ["--neighbors", "80", "--min-similarity", "0.5", "--index", "cells", "--run-id", "r"]


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "cluster.py"), *arguments],
        env=clean_environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def labels(output: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(f, partitioning=None) for f in sorted((output / "labels" / "run=r").iterdir())])


def test_same_labels_from_two_machines_and_from_a_submitted_job(
    face_data: Path, tmp_path: Path, two_machines: TwoMachines
) -> None:
    source = str(face_data / "lfw_mobilefacenet128.parquet")
    local = job(source, str(tmp_path / "local"), *FLAGS, "--quiet", "--json")
    assert local.returncode == 0, local.stderr
    on_cluster = job(source, str(tmp_path / "cluster"), *FLAGS, "--address", two_machines.address)
    assert on_cluster.returncode == 0, on_cluster.stderr
    assert labels(tmp_path / "cluster").equals(labels(tmp_path / "local"))

    # Only what a user would submit travels: the repository without its virtual environment.
    config = tmp_path / "job.toml"
    config.write_text(f'input = "{source}"\noutput = "{tmp_path / "submitted"}"\n')
    excludes = {"excludes": ["/.venv", "/.git", "/demo", "/tests"]}
    submitted = ray(
        "job", "submit", "--address", two_machines.dashboard, "--working-dir", str(ROOT),
        "--runtime-env-json", json.dumps(excludes), "--", "python", "jobs/cluster.py", "--config", str(config), *FLAGS,
    )  # fmt: skip
    assert "succeeded" in submitted.stdout
    assert labels(tmp_path / "submitted").equals(labels(tmp_path / "local"))


def test_unreachable_cluster_is_a_clear_error(tmp_path: Path, face_data: Path) -> None:
    done = job(
        str(face_data / "lfw_mobilefacenet128.parquet"), str(tmp_path / "o"), "--address", f"127.0.0.1:{free_port()}", "--quiet"
    )
    assert done.returncode == 2, done.stderr
    assert "cannot use Ray at 127.0.0.1" in done.stderr
