"""What comes from outside is data: names and ids go through unharmed and reach nothing; secrets stay where they belong."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from faceflow.cli.main import main
from faceflow.storage.object_store import Store
from tests.conftest import ROOT, S3, write_faces

Blobs = Callable[..., tuple[np.ndarray, np.ndarray]]

HOSTILE = [
    "../../etc/passwd", "<script>alert(1)</script>", "line\nbreak", "tab\tand\x00nul", "'; DROP TABLE faces; --",
    "$(touch pwned)", "`touch pwned`", "%s%n{0}{x}", "ünïcödé\u202egnp", "", " ", "C:\\x", "/abs", "=cmd|'/c calc'!A0",
    "a" * 5000,
]  # fmt: skip


@pytest.mark.usefixtures("ray_session")
def test_ids_and_file_names_are_data(
    tmp_path: Path, blobs: Blobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    x, _ = blobs(identities=6, size=5)
    ids = [*HOSTILE, *(f"f{i}" for i in range(len(x) - len(HOSTILE)))]
    names = [
        "x..%2f..%2f.parquet",
        "<b>$(touch pwned).parquet",
        "line\nbreak.parquet",
        "* [a] {x}.parquet",
        "q='?&x=1.parquet",
    ]
    folder = tmp_path / "in" / "deep=<i>" / "new\nline"
    for i, name in enumerate(names):
        write_faces(folder / name, x[i::5], pa.array(ids[i::5]))
    write_faces(folder / "z.parquet", np.array([[np.nan] * 32, [0] * 32], np.float32), pa.array(["<script>", "../bad"]))
    before = {p for p in tmp_path.rglob("*") if "in" in p.parts}
    flags = ["--min-similarity", "0.5", "--bad-rows", "quarantine", "--max-bad-fraction", "0.5"]
    assert main(["cluster", str(tmp_path / "in"), str(tmp_path / "out"), *flags]) == 0
    latest = json.loads((tmp_path / "out" / "latest.json").read_text())
    results = pa.concat_tables(
        pq.read_table(p, partitioning=None) for p in sorted((tmp_path / "out" / latest["labels"]).glob("*.parquet"))
    )
    assert sorted(results["id"].to_pylist()) == sorted([*ids, "<script>", "../bad"])
    assert sum(c is None for c in results["cluster"].to_pylist()) == 2
    assert {p for p in tmp_path.rglob("*") if "in" in p.parts} == before
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}
    assert all(re.fullmatch(r"[A-Za-z0-9._=-]+", p.name) for p in (tmp_path / "out").rglob("*"))
    assert "/new\\nline/z.parquet, row 0: the embedding contains a NaN" in caplog.text  # one line, whatever the name


@pytest.mark.usefixtures("ray_session")
def test_credentials_stay_out_of_everything_that_is_written(
    s3: S3, tmp_path: Path, blobs: Blobs, capfd: pytest.CaptureFixture[str]
) -> None:
    x, _ = blobs(identities=6, size=5)
    fs = s3fs.S3FileSystem(**s3.options, use_listings_cache=False)
    fs.put_file(str(write_faces(tmp_path / "a.parquet", x)), "faces/secret/in/a.parquet")
    options = ["--storage-options", json.dumps(s3.options)]
    assert (
        main(["cluster", "s3://faces/secret/in", "s3://faces/secret/out", *options, "--min-similarity", "0.5", "--json"]) == 0
    )
    assert main(["evaluate", "s3://faces/secret/out", "s3://faces/nowhere", *options]) == 2
    said = capfd.readouterr()
    files = fs.find("faces/secret/out")
    assert len(files) > 8
    written = b"".join(fs.cat_file(f) for f in files) + said.out.encode() + said.err.encode()
    written += b"".join(str(f).encode() for f in files)
    for secret in (s3.options["secret"], json.dumps(s3.options["secret"])):
        assert secret.encode() not in written
    assert s3.options["key"].encode() + b'"' not in written


def test_half_written_files_are_private_and_whole_ones_are_not(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    with store.open_write("x/part") as file:
        file.write(b"half")
        file.flush()
        (temporary,) = (tmp_path / "x").iterdir()
        assert temporary.name.startswith(".tmp-")
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
    mask = os.umask(0)
    os.umask(mask)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["part"]
    assert stat.S_IMODE((tmp_path / "x" / "part").stat().st_mode) == 0o666 & ~mask


def test_nothing_runs_a_shell_or_opens_the_dashboard_to_the_network() -> None:
    for path in (ROOT / "lib").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"os\.system|os\.popen|shell=True|\beval\(|\bexec\(", text), path
        assert "include_dashboard=True" not in text, path
    for name in ("cluster.yaml", "README.md"):
        assert set(re.findall(r"dashboard-host=(\S+)", (ROOT / name).read_text())) <= {"127.0.0.1"}, name
