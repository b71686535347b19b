"""Incremental runs as jobs: real faces, S3, the command line, `diff`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow import ClusterConfig, run_clustering, run_nightly
from faceflow.cli.main import main
from faceflow.kernels.knn import incremental_search
from faceflow.stages.ingest import incremental as ingest_incremental
from faceflow.storage.object_store import Store
from faceflow.tools.evaluate import evaluate
from tests.benchmarks.nightly import labels_of, replay
from tests.conftest import S3, write_faces
from tests.integration.lake import Lake, nightly

pytestmark = pytest.mark.usefixtures("ray_session")


# Every cell probed finds every pair, so that incremental runs with cells must give exact tables too.
CELLS = {"index": "cells", "cells": 5, "probes": 5}


def test_lfw_in_ten_incremental_runs(face_data: Path, tmp_path: Path) -> None:
    table = pq.read_table(face_data / "lfw_mobilefacenet128.parquet")
    order = np.random.default_rng(0).permutation(len(table))
    (tmp_path / "in").mkdir()
    settings = {
        "min_similarity": "auto",
        "neighbors": 200,
        "edges": "auto",
        "index": "cells",
    }  # the threshold, too, is found again whenever the set has grown by half
    labels: dict[str, int] = {}
    for i, rows in enumerate(np.array_split(order, 10)):
        pq.write_table(table.take(np.sort(rows)), tmp_path / "in" / f"{i}.parquet")
        run_id = nightly(tmp_path / "in", tmp_path / "out", **settings).run_id
        labels = replay(tmp_path / "out", labels, run_id) if labels else labels_of(tmp_path / "out", run_id)
    assert labels == labels_of(tmp_path / "out", run_id)
    ours = evaluate(str(tmp_path / "out"), str(tmp_path / "in"))
    run_clustering(ClusterConfig(str(tmp_path / "in"), str(tmp_path / "full"), **settings), progress=False, report=False)
    theirs = evaluate(str(tmp_path / "full"), str(tmp_path / "in"))
    assert abs(ours.pairwise_f - theirs.pairwise_f) < 0.003
    assert abs(ours.bcubed_f - theirs.bcubed_f) < 0.003


def test_incremental_runs_on_s3(
    s3: S3, tmp_path: Path, blobs: Callable[..., tuple[np.ndarray, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr(ingest_incremental, "MOST_SMALL", 2)

    x, truth = blobs(identities=20, size=30)
    fs = s3fs.S3FileSystem(**s3.options, use_listings_cache=False)
    config = ClusterConfig("s3://faces/nights/in", "s3://faces/nights/out", storage_options=s3.options, index="cells", cells=8)
    # Faces come, and then five of the first file go.
    for i, rows in enumerate((range(500), range(500, 530), range(530, 560), range(560, 600), range(5, 500))):
        path = write_faces(tmp_path / f"{i}.parquet", x[rows], pa.array([f"{r}" for r in rows]))
        fs.put_file(str(path), f"faces/nights/in/{i % 4}.parquet")
        result = run_nightly(config, progress=False, report=False)
        assert result.faces == (rows.stop if i < 4 else 595)
    run = Store.at(f"s3://faces/nights/out/_runs/{result.run_id}", s3.options)
    assert (run.read_json("manifests/quantize.json") or {})["result"]["incremental"]
    assert len((run.read_json("manifests/ingest.json") or {})["result"]["starts"]) - 1 <= 3
    files = fs.glob(f"faces/nights/out/labels/run={result.run_id}/*.parquet")
    results = pa.concat_tables([pq.read_table(fs.open(f)) for f in sorted(files)])
    clusters = {(int(truth[int(i)]), c) for i, c in zip(results["id"].to_pylist(), results["cluster"].to_pylist(), strict=True)}
    assert len(clusters) == 20


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lake = Lake(tmp_path / "in", 8)
    lake.add("a.parquet", 100)
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--quiet", "--json"]
    assert main(["nightly", *arguments, "--full-every", "5"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    lake.add("b.parquet", 10)
    assert main(["nightly", *arguments, "--full-every", "5"]) == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert second["run_id"] != first["run_id"]
    assert second["faces"] == 110
    with pytest.raises(SystemExit):
        main(["cluster", *arguments, "--full-every", "5"])
    capsys.readouterr()
    shutil.rmtree(tmp_path / "out" / "_runs" / second["run_id"])
    lake.add("c.parquet", 10)
    assert main(["nightly", *arguments, "--full-every", "5"]) == 0
    third = json.loads(capsys.readouterr().out.splitlines()[-1])
    after = labels_of(tmp_path / "out", third["run_id"])
    before = labels_of(tmp_path / "out", second["run_id"])
    assert not set(after.values()) & set(before.values())  # without a past, no id is used twice


def test_diff_agrees_with_the_events_of_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lake = Lake(tmp_path / "in", 9)
    for i in range(3):
        lake.add(f"{i}.parquet", 100)
    first = nightly(tmp_path / "in", tmp_path / "out").run_id
    lake.add("3.parquet", 30)
    lake.files["1.parquet"] = dict(list(lake.files["1.parquet"].items())[40:])
    lake.write("1.parquet")
    second = nightly(tmp_path / "in", tmp_path / "out").run_id
    assert main(["diff", str(tmp_path / "out"), first, second, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert (results["faces"], results["new"], results["gone"]) == (260, 30, 40)
    theirs = tmp_path / "out" / "events" / f"run={second}" / "part-00000.parquet"
    assert pq.read_table(results["events_file"], partitioning=None).equals(pq.read_table(theirs, partitioning=None))
    moves = pq.read_table(results["moves_file"], partitioning=None).to_pylist()
    files = (tmp_path / "out" / "moves" / f"run={second}").glob("*")
    expected = [row for f in files for row in pq.read_table(f, partitioning=None).to_pylist()]
    assert sorted(moves, key=lambda row: row["id"]) == sorted(expected, key=lambda row: row["id"])
    assert main(["diff", str(tmp_path / "out"), first, first + "x"]) == 2
    assert "has no labels of a run" in capsys.readouterr().err
    assert main(["diff", str(tmp_path / "out"), second, second, "--to", str(tmp_path / "d")]) == 0
    assert "no cluster changed" in capsys.readouterr().out


def test_carried_tables_drop_what_is_gone() -> None:
    offsets, rows = np.array([0, 2, 4, 5, 5]), np.array([1, 2, 0, 3, 1], np.int32)
    values = np.array([0.9, 0.8, 0.9, 0.7, 0.6], np.float32)
    now = np.array([0, 1, -1, 2], np.int32)  # row 2 is gone
    results = incremental_search.carry_table(offsets, rows, values, np.array([0, 1, 3]), now, 2)
    assert results[0].tolist() == [0, 0, 2, 2]  # row 0 lost one of its two neighbors, which may hide a third
    assert results[1].tolist() == [0, 2]
    assert results[3].tolist() == [2, 0, 0]
    results = incremental_search.carry_table(offsets, rows, values, np.array([0, 1, 3]), now, 3)
    assert results[1].tolist() == [1, 0, 2]
    assert results[3].tolist() == [1, 0, 0]
