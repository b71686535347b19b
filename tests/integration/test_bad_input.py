"""Bad rows refused or set aside, runs listed, begun again and removed: through the command line, on a real Ray."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow import ClusterConfig, run_clustering
from faceflow.cli.main import main
from faceflow.errors import FingerprintError, InputError, PublishError
from faceflow.runs import housekeeping
from faceflow.stages.ingest import id_checks, reading
from faceflow.storage import layout
from faceflow.storage.object_store import Store
from faceflow.tools.evaluate import evaluate
from tests.conftest import write_faces

pytestmark = pytest.mark.usefixtures("ray_session")

Blobs = Callable[..., tuple[np.ndarray, np.ndarray]]


def dirty(path: Path, x: np.ndarray) -> dict[str, str]:
    """Good faces with bad rows among them; returns the reason for each bad row's id."""
    rows: list[tuple[Any, Any]] = [(f"face-{i}", v.tolist()) for i, v in enumerate(x)]
    bad: list[tuple[Any, Any, str]] = [
        ("null-1", None, "the embedding is null"),
        ("nan-1", [float("nan"), *x[0, 1:].tolist()], "the embedding contains a NaN or an infinity"),
        ("inf-1", [float("-inf"), *x[0, 1:].tolist()], "the embedding contains a NaN or an infinity"),
        ("zero-1", [0.0] * x.shape[1], "the embedding contains only zeros: it has no direction"),
        ("empty-1", [], "the embedding is empty"),
        ("short-1", [1.0, 2.0], f"the embedding has dimension 2, but the first one has {x.shape[1]}"),
        ("hole-1", [None, *x[0, 1:].tolist()], "the embedding contains a null"),
        (None, x[3].tolist(), "the id is null: every face needs one"),
        ("face-5", x[5].tolist(), "the id occurred before: ids must be unique"),
    ]
    for i, (face, embedding, _) in enumerate(bad):
        rows.insert(17 + 11 * i, (face, embedding))
    path.parent.mkdir(parents=True)
    half = len(rows) // 2
    for name, part in (("a", rows[:half]), ("b", rows[half:])):
        table = {"id": pa.array([r[0] for r in part], pa.string())}
        table["embedding"] = pa.array([r[1] for r in part], pa.list_(pa.float32()))
        pq.write_table(pa.table(table), path.parent / f"{name}.parquet", row_group_size=50)
    return {str(face): reason for face, _, reason in bad}


def read(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(f, partitioning=None) for f in sorted(folder.glob("part-*.parquet"))])


@pytest.mark.parametrize("buckets", [1, 4])
def test_bad_rows_are_set_aside_and_the_others_are_clustered_as_if_they_were_not_there(
    tmp_path: Path, blobs: Blobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], buckets: int
) -> None:

    monkeypatch.setattr(id_checks, "BUCKET_IDS", -(-209 // buckets))
    x, identities = blobs()
    reasons = dirty(tmp_path / "in" / "x", x)
    arguments = ["cluster", str(tmp_path / "in"), str(tmp_path / "out"), "--min-similarity", "0.5", "--quiet", "--json"]
    assert main([*arguments, "--bad-rows", "quarantine", "--max-bad-fraction", "0.1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    latest = json.loads((tmp_path / "out" / "latest.json").read_text())
    assert (result["faces"], result["quarantined"]) == (latest["faces"], latest["quarantined"]) == (200, 9)
    labels = read(tmp_path / "out" / latest["labels"])
    ids = [i for name in ("a", "b") for i in pq.read_table(tmp_path / "in" / f"{name}.parquet")["id"].to_pylist()]
    assert labels["id"].to_pylist() == ids  # every row, in input order
    lines = read(tmp_path / "out" / "quarantined" / f"run={latest['run_id']}").to_pylist()
    assert {str(line["id"]): line["reason"] for line in lines} == reasons
    for line in lines:
        source = pq.read_table(line["file"])["id"].to_pylist()
        assert source[line["row"]] == line["id"]
    again = ids.index("face-5", ids.index("face-5") + 1)
    aside = [i for i, c in enumerate(labels["cluster"].to_pylist()) if c is None]
    assert aside == sorted([*(i for i, face in enumerate(ids) if str(face) in reasons and face != "face-5"), again])

    truth = {"id": [*(f"face-{i}" for i in range(200)), *(i for i in reasons if i.endswith("-1"))]}
    truth["label"] = [*identities.tolist(), *range(1000, 1007)]
    pq.write_table(pa.table(truth), tmp_path / "truth.parquet")
    scores = evaluate(str(tmp_path / "out"), str(tmp_path / "truth.parquet"))
    assert (scores.faces, scores.singletons) == (207, 7)
    assert scores.pairwise_f > 0.9

    pq.write_table(pa.table({"id": [f"face-{i}" for i in range(200)], "embedding": x.tolist()}), tmp_path / "clean.parquet")
    assert main(["cluster", str(tmp_path / "clean.parquet"), str(tmp_path / "clean"), *arguments[3:]]) == 0
    clean = read(tmp_path / "clean" / json.loads((tmp_path / "clean" / "latest.json").read_text())["labels"])
    kept = labels.filter(pa.compute.is_valid(labels["cluster"]))
    assert kept.to_pydict() == clean.to_pydict()


def test_bad_rows_are_counted_and_shown(tmp_path: Path, blobs: Blobs, capsys: pytest.CaptureFixture[str]) -> None:
    dirty(tmp_path / "in" / "x", blobs()[0])
    arguments = ["cluster", str(tmp_path / "in"), str(tmp_path / "out"), "--min-similarity", "0.5", "--quiet"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 9 of 209 rows cannot be used:\n")
    assert "a.parquet, row 28: the embedding contains a NaN or an infinity; " in error
    assert "b.parquet, row 1: the id occurred before: ids must be unique" in error
    assert "--bad-rows quarantine; nothing was published" in error
    assert main([*arguments, "--bad-rows", "quarantine", "--max-bad-fraction", "0.04"]) == 2
    assert "That is 4.31%, more than --max-bad-fraction 4.00%; nothing was published" in capsys.readouterr().err
    assert not (tmp_path / "out" / "latest.json").exists()
    assert not (tmp_path / "out" / "labels").exists()


def test_no_good_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a", "b"], "embedding": [[0.0, 0.0], [float("nan"), 1.0]]}), tmp_path / "in.parquet")
    config = ClusterConfig(str(tmp_path / "in.parquet"), str(tmp_path / "out"), bad_rows="quarantine", max_bad_fraction=1.0)
    with pytest.raises(InputError, match="No usable row is left; nothing was published"):
        run_clustering(config, progress=False, report=False)


def test_a_part_without_any_good_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blobs: Blobs) -> None:

    monkeypatch.setattr(reading, "part_faces", lambda faces, dim: 50)
    x = blobs()[0]
    x[50:100] = 0
    pq.write_table(pa.table({"id": np.arange(200), "embedding": x.tolist()}), tmp_path / "in.parquet", row_group_size=50)
    for index in ("exact", "cells"):
        config = ClusterConfig(
            str(tmp_path / "in.parquet"), str(tmp_path / index), index=index, min_similarity=0.5, bad_rows="quarantine",
            max_bad_fraction=0.5,
        )  # fmt: skip
        result = run_clustering(config, progress=False, report=False)
        assert (result.faces, result.quarantined) == (150, 50)
        labels = read(Path(result.labels))
        assert labels["cluster"].null_count == 50


def test_mended_input_begins_a_new_run(tmp_path: Path, blobs: Blobs, capsys: pytest.CaptureFixture[str]) -> None:
    x = blobs()[0]
    x[3, 0] = np.nan
    arguments = ["cluster", str(tmp_path / "in.parquet"), str(tmp_path / "out"), "--min-similarity", "0.5", "--quiet"]
    for bad, code in ((True, 2), (False, 0)):
        x[3, 0] = np.nan if bad else 1.0
        pq.write_table(pa.table({"id": np.arange(200), "embedding": x.tolist()}), tmp_path / "in.parquet")
        assert main(arguments) == code
    runs = housekeeping.list_runs(str(tmp_path / "out"))
    assert [(run.state, run.stage, run.current) for run in runs] == [
        ("published", "publish", True),
        ("refused", "ingest", False),
    ]
    capsys.readouterr()
    assert main(["runs", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith(f"* {runs[0].run_id}  published  publish ")
    assert lines[2].startswith(f"  {runs[1].run_id}  refused    ingest ")


def test_clean_keeps_what_is_current_and_what_may_be_running(
    tmp_path: Path, blobs: Blobs, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"id": np.arange(200), "embedding": blobs()[0].tolist()}), tmp_path / "in.parquet")
    out = tmp_path / "out"
    for run_id in ("one", "two", "three", "four"):
        config = ClusterConfig(str(tmp_path / "in.parquet"), str(out), run_id=run_id, min_similarity=0.5)
        run_clustering(config, progress=False, report=False)
    pointer = json.loads((out / "latest.json").read_text())
    (out / "latest.json").write_text(
        json.dumps(pointer | {"run_id": "two", "labels": "labels/run=two"})
    )  # an older one in force
    for run_id, hours, spoke in (("working", 1, 1), ("forgotten", 48, 47), ("long", 30, 1)):
        begun, said = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=ago) for ago in (hours, spoke))
        record = {"state": "begun", "settings": {}, "updated": begun.isoformat()}
        Store.at(str(out)).write_json(f"_runs/{run_id}/{layout.RUN_RECORD}", record)
        Store.at(str(out)).write_json(f"_runs/{run_id}/{layout.PROGRESS}", {"updated": said.isoformat()})
    assert main(["clean", str(out), "--keep", "1", "--dry-run"]) == 0
    assert "would remove 3 run(s)" in capsys.readouterr().out
    assert main(["clean", str(out), "--keep", "1"]) == 0
    assert {p.name for p in (out / "_runs").iterdir()} == {"two", "four", "working", "long"}
    assert {p.name for p in (out / "labels").iterdir()} == {"run=two", "run=four"}
    assert main(["clean", str(out), "--keep", "0"]) == 0
    assert {run.run_id for run in housekeeping.list_runs(str(out))} == {"two", "working", "long"}
    assert main(["clean", str(tmp_path / "nothing"), "--keep", "0"]) == 2
    assert main(["clean", str(out), "--keep", "-1"]) == 2


def test_restart_throws_away_and_begins_again(tmp_path: Path, blobs: Blobs) -> None:
    x = blobs()[0]
    pq.write_table(pa.table({"id": np.arange(200), "embedding": x.tolist()}), tmp_path / "in.parquet")

    def again(**settings: Any) -> Any:
        config = ClusterConfig(
            str(tmp_path / "in.parquet"), str(tmp_path / "out"), run_id="night", min_similarity=0.5, **settings
        )
        return run_clustering(config, progress=False, report=False)

    pq.write_table(pa.table({"id": np.zeros(200, int), "embedding": x.tolist()}), tmp_path / "in.parquet")
    with pytest.raises(InputError):
        again()
    pq.write_table(pa.table({"id": np.arange(200), "embedding": x.tolist()}), tmp_path / "in.parquet")
    with pytest.raises(FingerprintError, match="--restart to begin it again"):
        again()
    assert again(restart=True).faces == 200
    with pytest.raises(Exception, match="run night is published: it cannot be begun again"):
        again(restart=True)


def test_the_loser_of_a_race_names_the_winner(tmp_path: Path, blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    from faceflow.runs import publication

    pq.write_table(pa.table({"id": np.arange(200), "embedding": blobs()[0].tolist()}), tmp_path / "in.parquet")
    real = publication.set_current

    def config(run_id: str) -> ClusterConfig:
        return ClusterConfig(str(tmp_path / "in.parquet"), str(tmp_path / "out"), run_id=run_id, min_similarity=0.5)

    def beaten(*arguments: Any) -> None:
        monkeypatch.setattr(publication, "set_current", real)
        run_clustering(config("winner"), progress=False, report=False)
        real(*arguments)

    monkeypatch.setattr(publication, "set_current", beaten)
    with pytest.raises(
        PublishError, match=r"run winner published to .*out while run loser was running: the labels of winner are current"
    ):
        run_clustering(config("loser"), progress=False, report=False)
    assert json.loads((tmp_path / "out" / "latest.json").read_text())["run_id"] == "winner"
    run_clustering(config("loser"), progress=False, report=False)  # the same command again
    latest = json.loads((tmp_path / "out" / "latest.json").read_text())
    assert (latest["run_id"], latest["parent_run_id"]) == ("loser", "winner")


def test_a_full_disk_stops_the_run_and_room_lets_it_continue(
    tmp_path: Path, blobs: Blobs, small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    x = blobs(identities=50, size=40)[0]
    pq.write_table(pa.table({"id": np.arange(2000), "embedding": x.tolist()}), tmp_path / "in.parquet")
    work = small_disk(300)  # the vectors fit, what follows does not
    arguments = [
        "cluster",
        str(tmp_path / "in.parquet"),
        str(tmp_path / "out"),
        "--work-dir",
        str(work),
        "--min-similarity",
        "0.5",
    ]
    assert main([*arguments, "--quiet"]) == 3
    error = capsys.readouterr().err
    assert f"the disk is full: {work}/" in error
    assert "the same command continues" in error
    assert not (tmp_path / "out" / "latest.json").exists()
    small_disk(30_000)
    assert main([*arguments, "--quiet"]) == 0
    assert len(list(work.iterdir())) == 1  # the same run, continued
    assert main(["cluster", *arguments[1:2], str(tmp_path / "other"), "--min-similarity", "0.5", "--quiet"]) == 0
    tables = [read(tmp_path / o / json.loads((tmp_path / o / "latest.json").read_text())["labels"]) for o in ("out", "other")]
    assert tables[0].equals(tables[1])


def test_restart_leaves_nothing_of_the_labels_before(tmp_path: Path, blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:

    x, _ = blobs()
    write_faces(tmp_path / "in" / "a.parquet", x)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "part_faces", lambda faces, dim: 50)
        run_clustering(ClusterConfig(str(tmp_path / "in"), str(tmp_path / "out"), run_id="x"), progress=False, report=False)
    run_clustering(ClusterConfig(str(tmp_path / "in"), str(tmp_path / "out"), run_id="y"), progress=False, report=False)
    write_faces(tmp_path / "in" / "a.parquet", x[:60])
    run_clustering(
        ClusterConfig(str(tmp_path / "in"), str(tmp_path / "out"), run_id="x", restart=True), progress=False, report=False
    )
    assert len(read(tmp_path / "out" / "labels" / "run=x")) == 60


def test_the_same_command_after_raised_probes_is_skipped(tmp_path: Path, blobs: Blobs) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 8)).astype(np.float32)
    write_faces(tmp_path / "in" / "a.parquet", x)
    config = ClusterConfig(
        str(tmp_path / "in"), str(tmp_path / "out"), run_id="x", index="cells", cells=40, probes=1, raise_probes=True,
        min_similarity=0.7, min_recall=0.99,
    )  # fmt: skip
    first = run_clustering(config, progress=False, report=False)
    assert json.loads((tmp_path / "out" / "_runs" / "x" / "run.json").read_text())["attempt"] > 0
    assert run_clustering(config, progress=False, report=False).recall == first.recall
