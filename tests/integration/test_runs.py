"""Whole runs on a real Ray: real faces from Parquet to Parquet, on a disk and on S3, resumed, refused and raced."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow import ClusterConfig, RunResult, run_clustering
from faceflow.cli.main import main
from faceflow.errors import FingerprintError, InputError, PublishError
from faceflow.runs.status import Watcher
from faceflow.stages.base import Context, Redo, Stage
from faceflow.stages.results import Results
from faceflow.storage.object_store import Store
from faceflow.tools.datasets.synthesize import synthesize
from faceflow.tools.evaluate import evaluate
from tests.conftest import S3, write_faces

pytestmark = pytest.mark.usefixtures("ray_session")


def run(source: Path | str, output: Path | str, **settings: object) -> RunResult:
    return run_clustering(ClusterConfig(str(source), str(output), **settings), progress=False, report=False)  # type: ignore[arg-type]


def labels(output: Path) -> pa.Table:
    pointer = json.loads((output / "latest.json").read_text())
    files = sorted((output / pointer["labels"]).glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(f, partitioning=None) for f in files])


def lfw(face_data: Path) -> Path:
    return face_data / "lfw_mobilefacenet128.parquet"


@pytest.fixture(scope="module")
def exact_lfw(face_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exact")
    run(lfw(face_data), output, index="exact", workers=2)
    return output


@pytest.mark.parametrize("index", ["exact", "cells"])
def test_plain_threshold_edges_at_a_given_threshold(face_data: Path, tmp_path: Path, index: str) -> None:
    """The scores that threshold Infomap is known to reach at this threshold."""
    run(lfw(face_data), tmp_path / "out", neighbors=80, min_similarity=0.5, edges="threshold", index=index)
    scores = evaluate(str(tmp_path / "out"), str(lfw(face_data)))
    assert scores.pairwise_f >= 0.994
    assert scores.bcubed_f >= 0.984


@pytest.mark.parametrize("index", ["exact", "cells"])
def test_lfw(face_data: Path, tmp_path: Path, exact_lfw: Path, index: str) -> None:
    """Scores of the defaults, which are not tuned to this set, and the same labels from one worker and from two."""
    result = run(lfw(face_data), tmp_path / "one", index=index, workers=1)
    scores = evaluate(str(tmp_path / "one"), str(lfw(face_data)))
    assert scores.pairwise_f >= 0.994
    assert scores.bcubed_f >= 0.984
    assert scores.clusters == result.clusters
    two = exact_lfw
    if index == "cells":
        two = tmp_path / "two"
        run(lfw(face_data), two, index=index, workers=2)
    assert labels(tmp_path / "one").equals(labels(two))


def test_lfw_on_s3_gives_the_same_bytes_of_labels(face_data: Path, exact_lfw: Path, s3: S3) -> None:
    store = Store.at("s3://faces/lfw", s3.options)
    store.write_bytes("in/lfw.parquet", lfw(face_data).read_bytes())
    for index in ("exact", "cells"):
        run(
            "s3://faces/lfw/in", f"s3://faces/lfw/out-{index}", index=index,
            storage_options=s3.options,
        )  # fmt: skip
        pointer = store.read_json(f"out-{index}/latest.json")
        assert pointer is not None
        assert s3.options["secret"] not in json.dumps(pointer)
        names = store.names(f"out-{index}/{pointer['labels']}")
        tables = [pq.read_table(pa.BufferReader(store.read_bytes(f"out-{index}/{pointer['labels']}/{n}"))) for n in names]
        if index == "exact":
            ours, theirs = pa.concat_tables(tables), labels(exact_lfw)
            for column in ("id", "cluster"):
                assert ours[column].combine_chunks().equals(theirs[column].combine_chunks())
        else:
            local = exact_lfw.parent / "cells-local"
            run(lfw(face_data), local, index=index)
            assert pa.concat_tables(tables).equals(labels(local))
    scores = evaluate("s3://faces/lfw/out-exact", "s3://faces/lfw/in", storage_options=s3.options)
    assert scores.pairwise_f >= 0.994


@pytest.mark.parametrize("recipe", ["auto", "threshold", "shared", "nep", "facemap", "tpdi"])
def test_every_edge_recipe_finds_separate_people(
    tmp_path: Path, blobs: Callable[..., tuple[np.ndarray, np.ndarray]], recipe: str
) -> None:
    x, truth = blobs(identities=20, size=30)
    write_faces(tmp_path / "in.parquet", x, pa.array(np.arange(len(x))))
    result = run(tmp_path / "in.parquet", tmp_path / "out", edges=recipe)
    assert result.clusters == 20
    table = labels(tmp_path / "out")
    pairs = {(int(truth[i]), c) for i, c in zip(table["id"].to_pylist(), table["cluster"].to_pylist(), strict=True)}
    assert len(pairs) == 20
    assert result.similarity_threshold is not None
    assert result.impostors_per_face is not None
    assert {band: count for band, count in result.quality.sizes.items() if count} == {"17-32": 20}
    assert result.quality.within > result.similarity_threshold
    doubts = pq.read_table(tmp_path / "out" / "quality" / f"run={result.run_id}" / "clusters.parquet", partitioning=None)
    assert doubts["faces"].to_pylist() == [30] * 20
    assert doubts["doubtful_share"].to_pylist() == [0] * 20


def test_the_threshold_hardly_depends_on_the_sample(tmp_path: Path) -> None:
    synthesize(str(tmp_path / "in"), 40_000, dim=64)
    results = [run(tmp_path / "in", tmp_path / f"out-{seed}", seed=seed) for seed in (0, 1)]
    thresholds = [result.similarity_threshold or 0.0 for result in results]
    assert thresholds[0] != thresholds[1]  # else the sample would be the same one
    assert abs(thresholds[0] - thresholds[1]) < 0.005


def test_publishes_what_the_readme_promises(tmp_path: Path, blobs: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
    x, truth = blobs()
    write_faces(tmp_path / "in" / "a.parquet", x[:120], pa.array(np.arange(120), pa.uint16()))
    write_faces(tmp_path / "in" / "b" / "b.parquet", x[120:], pa.array(np.arange(120, 200), pa.uint16()))
    result = run(tmp_path / "in", tmp_path / "out")
    table = labels(tmp_path / "out")
    assert table.schema == pa.schema([("id", pa.uint16()), ("cluster", pa.int64())])
    assert table["id"].to_pylist() == list(range(200))
    clusters = table["cluster"].to_numpy()
    assert [len(set(truth[clusters == c])) for c in range(20)] == [1] * 20
    sizes = np.bincount(clusters)
    assert (np.diff(sizes) <= 0).all()
    pointer = json.loads((tmp_path / "out" / "latest.json").read_text())
    assert set(pointer) == {
        "run_id", "labels", "faces", "quarantined", "clusters", "singletons", "edges", "parent_run_id", "next_id",
        "sequence", "settings",
        "similarity_threshold", "impostors_per_face", "seconds", "recall", "recall_interval", "quality", "created",
            "input_snapshot",
    }  # fmt: skip
    assert (pointer["faces"], pointer["clusters"], pointer["parent_run_id"]) == (200, 20, None)
    assert set(pointer["seconds"]) == {"ingest", "quantize", "search", "link", "detect", "publish", "total"}
    again = run(tmp_path / "in", tmp_path / "out")
    assert again.run_id != result.run_id
    assert json.loads((tmp_path / "out" / "latest.json").read_text())["parent_run_id"] == result.run_id
    leftovers = [p for p in (tmp_path / "out").rglob("*") if ".tmp-" in p.name]
    assert not leftovers


@pytest.mark.parametrize("stage", ["ingest", "search", "detect", "publish"])
def test_continues_after_an_interruption(
    tmp_path: Path, blobs: Callable[..., tuple[np.ndarray, np.ndarray]], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    from faceflow.runs import pipeline

    write_faces(tmp_path / "in" / "a.parquet", blobs()[0])
    whole = run(tmp_path / "in", tmp_path / "whole", index="cells", cells=8)

    class StopError(Exception):
        pass

    ran: list[str] = []

    def spy(stages: tuple[Stage[Any], ...], stop: str | None) -> tuple[Stage[Any], ...]:
        def wrap(original: Stage[Any]) -> Stage[Any]:
            def body(context: Context) -> Any:
                ran.append(original.name)
                outcome = original.run(context)
                if original.name == stop:
                    raise StopError  # every file is written, the manifest is not
                return outcome

            return dataclasses.replace(original, run=body)

        return tuple(wrap(s) for s in stages)

    real = pipeline.STAGES
    monkeypatch.setattr(pipeline, "STAGES", spy(real, stage))
    with pytest.raises(StopError):
        run(tmp_path / "in", tmp_path / "out", index="cells", cells=8)
    assert not (tmp_path / "out" / "latest.json").exists()
    before, ran[:] = list(ran), []
    monkeypatch.setattr(pipeline, "STAGES", spy(real, None))
    result = run(tmp_path / "in", tmp_path / "out", index="cells", cells=8)
    assert ran[0] == stage == before[-1]
    assert not set(before[:-1]) & set(ran)
    assert labels(tmp_path / "out").equals(labels(tmp_path / "whole"))
    assert result.clusters == whole.clusters


def test_refuses_a_run_made_from_something_else(tmp_path: Path, blobs: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
    path = write_faces(tmp_path / "in" / "a.parquet", blobs()[0])
    run(tmp_path / "in", tmp_path / "out", run_id="r")
    with pytest.raises(FingerprintError, match="neighbors: was 200, is 7"):
        run(tmp_path / "in", tmp_path / "out", run_id="r", neighbors=7)
    write_faces(path, blobs(seed=1)[0])
    with pytest.raises(FingerprintError, match=r"input_files: .*a\.parquet: was "):
        run(tmp_path / "in", tmp_path / "out", run_id="r")


def test_the_second_of_two_racing_runs_is_refused(
    tmp_path: Path, blobs: Callable[..., tuple[np.ndarray, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from faceflow.runs import pipeline

    write_faces(tmp_path / "in" / "a.parquet", blobs()[0])
    advance = pipeline.advance

    def meanwhile(stage: Stage[Any], context: Context, watcher: Watcher) -> Results | Redo:
        if stage.name == "publish" and context.stores.run_id == "slow":
            run(tmp_path / "in", tmp_path / "out", run_id="fast")
        return advance(stage, context, watcher)

    monkeypatch.setattr(pipeline, "advance", meanwhile)
    with pytest.raises(PublishError):
        run(tmp_path / "in", tmp_path / "out", run_id="slow")
    assert json.loads((tmp_path / "out" / "latest.json").read_text())["run_id"] == "fast"


def test_work_dir_keeps_runs_elsewhere(tmp_path: Path, blobs: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
    write_faces(tmp_path / "in" / "a.parquet", blobs()[0])
    run(tmp_path / "in", tmp_path / "out", work_dir=str(tmp_path / "work"), run_id="r")
    assert (tmp_path / "work" / "r" / "manifests" / "publish.json").exists()
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name[0] != ".") == ["labels", "latest.json", "quality"]


def test_labels_that_were_deleted_are_written_again(
    tmp_path: Path, blobs: Callable[..., tuple[np.ndarray, np.ndarray]]
) -> None:
    write_faces(tmp_path / "in" / "a.parquet", blobs()[0])
    settings = {"work_dir": str(tmp_path / "work"), "run_id": "r"}
    run(tmp_path / "in", tmp_path / "out", **settings)
    before = labels(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    run(tmp_path / "in", tmp_path / "out", **settings)
    assert labels(tmp_path / "out").equals(before)


@pytest.mark.parametrize("rows", [1, 2])
def test_tiny_sets(tmp_path: Path, rows: int) -> None:
    write_faces(tmp_path / "in" / "a.parquet", np.eye(4, dtype=np.float32)[:rows])
    for index in ("exact", "cells"):
        result = run(tmp_path / "in", tmp_path / index, index=index)
        assert (result.faces, result.clusters, result.singletons, result.edges) == (rows, rows, rows, 0)


def test_identical_faces_are_one_cluster(tmp_path: Path) -> None:
    write_faces(tmp_path / "in" / "a.parquet", np.ones((60, 4), np.float32))
    for index in ("exact", "cells"):
        assert run(tmp_path / "in", tmp_path / index, index=index, neighbors=10).faces == 60


def test_refusals_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_faces(tmp_path / "in" / "a.parquet", np.ones((2, 4), np.float32))
    with pytest.raises(InputError, match="lies inside INPUT"):
        run(tmp_path / "in", tmp_path / "in" / "out")
    write_faces(tmp_path / "empty" / "a.parquet", np.ones((0, 4), np.float32), pa.array([], pa.string()))
    assert main(["cluster", str(tmp_path / "empty"), str(tmp_path / "out"), "--quiet"]) == 2
    assert "has no rows in its 1 Parquet file(s)" in capsys.readouterr().err
    assert main(["cluster", str(tmp_path / "none"), str(tmp_path / "out2"), "--quiet"]) == 2
    assert not (tmp_path / "out2").exists()


def test_bad_row_reaches_the_user_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.ones((50, 4), np.float32)
    x[33, 2] = np.nan
    path = write_faces(tmp_path / "in" / "a.parquet", x)
    assert main(["cluster", str(path), str(tmp_path / "out"), "--quiet"]) == 2
    assert capsys.readouterr().err == (
        f"error: 1 of 50 rows cannot be used:\n  {path}, row 33: the embedding contains a NaN or an infinity\n"
        "Fix or remove them, or pass --bad-rows quarantine; nothing was published\n"
    )
    assert not (tmp_path / "out" / "latest.json").exists()


def test_missing_bucket_and_wrong_key(s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = json.dumps(s3.options)
    assert main(["cluster", "s3://no-such-bucket/x", str(tmp_path), "--storage-options", options, "--quiet"]) == 2
    assert "s3://no-such-bucket/x" in capsys.readouterr().err
    wrong = json.dumps(s3.options | {"secret": "not-the-secret"})
    assert main(["cluster", "s3://faces/lfw", str(tmp_path), "--storage-options", wrong, "--quiet"]) == 2
    err = capsys.readouterr().err
    assert "s3://faces/lfw" in err
    assert "not-the-secret" not in err


def test_json_and_synthesize_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synthesize", str(tmp_path / "in"), "--faces", "3000", "--dim", "32", "--mean-size", "20"]) == 0
    assert main(["synthesize", str(tmp_path / "in"), "--faces", "10"]) == 2
    capsys.readouterr()
    assert main(["cluster", str(tmp_path / "in"), str(tmp_path / "out"), "--json", "--quiet", "--min-similarity", "0.7"]) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {
        "run_id",
        "labels",
        "faces",
        "quarantined",
        "clusters",
        "singletons",
        "edges",
        "seconds",
        "peak_memory_bytes",
    } <= set(out)
    assert main(["evaluate", str(tmp_path / "out"), str(tmp_path / "in"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores) == [
        "pairwise_precision", "pairwise_recall", "pairwise_f", "bcubed_precision", "bcubed_recall", "bcubed_f", "nmi", "ari",
        "faces", "clusters", "singletons", "identities",
    ]  # fmt: skip
    assert scores["faces"] == out["faces"] == 3000
