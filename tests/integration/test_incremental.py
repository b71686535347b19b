"""Nights on a real Ray: what changed is found, tables equal those of a full run, ids stay, and a kill costs nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow import ClusterConfig, run_clustering
from faceflow.errors import InputError, SettingsError
from faceflow.stages.ingest import id_checks
from faceflow.stages.ingest import incremental as ingest_incremental
from faceflow.stages.quantize import incremental as quantize_incremental
from faceflow.stages.search import incremental as search_incremental
from tests.benchmarks.nightly import labels_of, replay
from tests.conftest import write_faces
from tests.integration.lake import SETTINGS, Lake, manifest, nightly, table_of

pytestmark = pytest.mark.usefixtures("ray_session")


# Every cell probed finds every pair, so that incremental runs with cells must give exact tables too.
CELLS = {"index": "cells", "cells": 5, "probes": 5}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("seed", "plan", "constants"),
    [
        (0, {"index": "exact"}, {(ingest_incremental, "MOST_SMALL"): 2}),
        (1, {"index": "exact"}, {(id_checks, "BUCKET_IDS"): 90}),
        (
            2,
            CELLS,
            {(ingest_incremental, "MOST_SMALL"): 100, (search_incremental, "FEWEST_TASKS"): 1, (id_checks, "BUCKET_IDS"): 90},
        ),
        (
            3,
            CELLS,
            {
                (search_incremental, "ACTIVE_FACES"): 20,
                (search_incremental, "MOST_PARTS"): 2,
                (search_incremental, "FEWEST_TASKS"): 1,
            },
        ),
    ],
)
def test_tables_after_any_sequence_of_incremental_runs_are_those_of_a_full_run(
    tmp_path: Path, seed: int, plan: dict[str, Any], constants: dict[Any, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for (module, name), value in constants.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(quantize_incremental, "MOST_ACTIVE", 1.0)
    monkeypatch.setattr(quantize_incremental, "MOST_MOVED_IN_CELLS", 1.0)
    lake = Lake(tmp_path / "in", seed)
    for i in range(4):
        lake.add(f"{i * 20:02d}.parquet", 80)
    labels = labels_of(tmp_path / "out", nightly(tmp_path / "in", tmp_path / "out", **plan).run_id)
    incremental_runs = 0
    seen = set()
    for step in range(7):
        kinds = [lake.change() for _ in range(1 + step % 2)]
        seen |= set(kinds)
        result = nightly(tmp_path / "in", tmp_path / "out", **plan)
        incremental_runs += manifest(tmp_path / "out", result.run_id, "quantize")["incremental"]
        shutil.rmtree(tmp_path / "full", ignore_errors=True)
        full = run_clustering(
            ClusterConfig(str(tmp_path / "in"), str(tmp_path / "full"), index="exact", **SETTINGS), progress=False
        )
        ours, theirs = table_of(tmp_path / "out", result.run_id), table_of(tmp_path / "full", full.run_id)
        assert ours.keys() == theirs.keys() == {k for faces in lake.files.values() for k in faces}
        for face, neighbors in theirs.items():
            mine = ours[face]
            assert len(mine) == len(neighbors), (step, kinds, face)
            np.testing.assert_allclose(sorted(mine.values()), sorted(neighbors.values()), atol=2e-6)
            last = min(neighbors.values(), default=0)  # ties with the last of a full table aside
            assert {n for n in neighbors if neighbors[n] > last + 2e-6} <= mine.keys()
        # Every face is sampled, and the truth is carried from run to run.
        recalls = [
            manifest(folder, run_id, "search")["recall"]
            for folder, run_id in ((tmp_path / "out", result.run_id), (tmp_path / "full", full.run_id))
        ]
        assert recalls[0]["estimate"] == recalls[1]["estimate"] == 1
        assert (recalls[0]["faces"], recalls[0]["edges"]) == (recalls[1]["faces"], recalls[1]["edges"])
        assert result.codelength <= full.codelength * 1.01
        if result.run_id and labels_of(tmp_path / "out", result.run_id) != labels:
            labels = replay(tmp_path / "out", labels, result.run_id)
        assert labels == labels_of(tmp_path / "out", result.run_id)
    assert len(seen) >= 4
    assert incremental_runs >= 4


def test_only_what_changed_is_read_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lake = Lake(tmp_path / "in", 3)
    for i in range(5):
        lake.add(f"{i}.parquet", 100)
    first = nightly(tmp_path / "in", tmp_path / "out")
    lake.add("5.parquet", 20)
    lake.files["1.parquet"] = dict(list(lake.files["1.parquet"].items())[10:]) | {"face-115": np.ones(16, np.float32)}
    lake.write("1.parquet")
    caplog.set_level("INFO", "faceflow")
    second = nightly(tmp_path / "in", tmp_path / "out")
    assert "files: 4 unchanged, 1 new, 1 read again, 0 gone" in caplog.text
    counts = manifest(tmp_path / "out", second.run_id, "ingest")
    assert counts["faces"] == 510
    assert [counts["changes"][key] for key in ("added", "changed", "removed")] == [20, 1, 10]
    assert manifest(tmp_path / "out", second.run_id, "quantize")["incremental"]
    pointer = json.loads((tmp_path / "out" / "latest.json").read_text())
    assert pointer["parent_run_id"] == first.run_id
    for part in ("vectors/part-00000.arrow",):  # one part only: rows left it, so it is not shared
        assert not os.path.samefile(
            tmp_path / "out" / "_runs" / first.run_id / part, tmp_path / "out" / "_runs" / second.run_id / part
        )
    caplog.clear()
    third = nightly(tmp_path / "in", tmp_path / "out")
    assert third.run_id == second.run_id
    assert "nothing has changed" in caplog.text
    os.utime(tmp_path / "in" / "3.parquet", (0, 0))  # another time, the same rows
    fourth = nightly(tmp_path / "in", tmp_path / "out")
    counts = manifest(tmp_path / "out", fourth.run_id, "ingest")
    assert [counts["changes"][key] for key in ("added", "changed", "removed")] == [0, 0, 0]
    assert os.path.samefile(
        tmp_path / "out" / "_runs" / second.run_id / "vectors" / "part-00000.arrow",
        tmp_path / "out" / "_runs" / fourth.run_id / "vectors" / "part-00000.arrow",
    )
    data = (tmp_path / "in" / "4.parquet").read_bytes()
    stat = (tmp_path / "in" / "4.parquet").stat()
    lake.files["4.parquet"] = {k: -v for k, v in lake.files["4.parquet"].items()}
    lake.write("4.parquet")
    assert len((tmp_path / "in" / "4.parquet").read_bytes()) == len(data)
    os.utime(tmp_path / "in" / "4.parquet", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # not to be seen from outside
    assert nightly(tmp_path / "in", tmp_path / "out").run_id == fourth.run_id
    verified = nightly(tmp_path / "in", tmp_path / "out", verify_content=True)
    assert manifest(tmp_path / "out", verified.run_id, "ingest")["changes"]["changed"] == 100
    # A file of the same size and time, but with fewer rows.
    path = tmp_path / "in" / "0.parquet"
    stat = path.stat()
    lake.files["0.parquet"] = dict(list(lake.files["0.parquet"].items())[1:])
    lake.write("0.parquet")
    shorter = path.read_bytes()
    footer = len(shorter) - 8 - int.from_bytes(shorter[-8:-4], "little")
    path.write_bytes(shorter[:footer] + bytes(stat.st_size - len(shorter)) + shorter[footer:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    fewer = nightly(tmp_path / "in", tmp_path / "out")
    counts = manifest(tmp_path / "out", fewer.run_id, "ingest")
    assert (counts["faces"], counts["changes"]["removed"], counts["changes"]["changed"]) == (509, 1, 0)


def test_incremental_runs_without_new_faces(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "in", 11)
    for i in range(5):
        lake.add(f"{i}.parquet", 100)
    labels = labels_of(tmp_path / "out", nightly(tmp_path / "in", tmp_path / "out").run_id)
    (tmp_path / "in" / "2.parquet").unlink()  # faces only go
    second = nightly(tmp_path / "in", tmp_path / "out")
    assert second.faces == 400
    labels = replay(tmp_path / "out", labels, second.run_id)
    write_faces(tmp_path / "in" / "9.parquet", np.ones((0, 16), np.float32), pa.array([], pa.string()))  # a file without a face
    third = nightly(tmp_path / "in", tmp_path / "out")
    assert third.run_id != second.run_id
    assert labels_of(tmp_path / "out", third.run_id) == labels == labels_of(tmp_path / "out", second.run_id)
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="holds no Parquet file"):
        nightly(tmp_path / "in", tmp_path / "out")
    write_faces(tmp_path / "in" / "9.parquet", np.ones((0, 16), np.float32), pa.array([], pa.string()))
    with pytest.raises(InputError, match=r"has no face left in its 1 Parquet file\(s\)"):
        nightly(tmp_path / "in", tmp_path / "out")


def test_ids_that_two_files_hold_are_refused_or_set_aside(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "in", 4)
    lake.add("a.parquet", 100)
    first = nightly(tmp_path / "in", tmp_path / "out")
    lake.files["b.parquet"] = lake.faces(20) | {"face-7": np.ones(16, np.float32)}
    lake.write("b.parquet")
    with pytest.raises(InputError, match=r"1 of 121 rows cannot be used:\n  .*b\.parquet, row 20: the id occurred before"):
        nightly(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "latest.json").read_text())["run_id"] == first.run_id
    aside = {"bad_rows": "quarantine", "max_bad_fraction": 0.5}
    second = nightly(tmp_path / "in", tmp_path / "out", **aside)
    assert (second.faces, second.quarantined) == (120, 1)
    lake.add("c.parquet", 5)
    third = nightly(tmp_path / "in", tmp_path / "out", **aside)
    assert (third.faces, third.quarantined) == (125, 1)
    lake.files["d.parquet"] = {"face-8": np.ones(16, np.float32)}  # nothing but a bad row: a small share of all the same
    lake.write("d.parquet")
    fourth = nightly(tmp_path / "in", tmp_path / "out", **aside | {"max_bad_fraction": 0.02})
    assert (fourth.faces, fourth.quarantined) == (125, 2)
    lines = pq.read_table(
        next((tmp_path / "out" / "quarantined" / f"run={third.run_id}").glob("*")), partitioning=None
    ).to_pylist()
    assert [(line["id"], line["row"]) for line in lines] == [("face-7", 20)]


def test_small_parts_of_many_runs_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_incremental, "MOST_SMALL", 4)
    lake = Lake(tmp_path / "in", 16, people=30)
    lake.add("00.parquet", 600)
    settings = {"index": "cells", "cells": 8, "bad_rows": "quarantine", "max_bad_fraction": 0.5}
    run = nightly(tmp_path / "in", tmp_path / "out", **settings)
    labels, parts, incremental_runs = labels_of(tmp_path / "out", run.run_id), [], 0
    for i in range(1, 8):
        lake.files[f"{i:02d}.parquet"] = lake.faces(6) | {f"bad-{i}": np.full(16, np.nan, np.float32)} | lake.faces(6)
        lake.write(f"{i:02d}.parquet")
        if i % 3 == 0:  # faces of an old part go, those of another are embedded again
            lake.files["00.parquet"].pop(f"face-{i}")
            lake.files["01.parquet"]["face-600"] = next(iter(lake.faces(1).values()))
            lake.write("00.parquet")
            lake.write("01.parquet")
        shutil.rmtree(tmp_path / "alone", ignore_errors=True)
        shutil.copytree(tmp_path / "out", tmp_path / "alone")
        run = nightly(tmp_path / "in", tmp_path / "out", **settings)
        parts.append(len(manifest(tmp_path / "out", run.run_id, "ingest")["starts"]) - 1)
        incremental_runs += manifest(tmp_path / "out", run.run_id, "quantize")["incremental"]
        labels = replay(tmp_path / "out", labels, run.run_id)
        every = labels_of(tmp_path / "out", run.run_id)
        assert labels == {face: cluster for face, cluster in every.items() if cluster is not None}
        assert every.keys() - labels.keys() == {f"bad-{j}" for j in range(1, i + 1)}
    assert parts[:4] == [2, 3, 4, 2]
    assert max(parts) <= 5
    assert incremental_runs == 7
    alone = nightly(tmp_path / "in", tmp_path / "alone", **settings, workers=1)
    assert labels_of(tmp_path / "alone", alone.run_id) == every
    full = run_clustering(
        ClusterConfig(str(tmp_path / "in"), str(tmp_path / "full"), **(SETTINGS | settings | {"index": "exact"})),
        progress=False,
    )
    ours, theirs = table_of(tmp_path / "out", run.run_id), table_of(tmp_path / "full", full.run_id)
    pairs = [{(face, other) for face, others in table.items() for other in others} for table in (ours, theirs)]
    assert len(pairs[0] & pairs[1]) >= 0.97 * len(pairs[1])
    lines = pq.read_table(tmp_path / "out" / "quarantined" / f"run={run.run_id}", partitioning=None).to_pylist()
    assert sorted((line["id"], line["row"]) for line in lines) == [(f"bad-{i}", 6) for i in range(1, 8)]


def test_ids_of_another_type_are_refused(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "in", 17)
    lake.add("a.parquet", 50)
    first = nightly(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "a.parquet").unlink()
    write_faces(tmp_path / "in" / "b.parquet", np.ones((3, 16), np.float32), pa.array([1, 2, 3]))
    with pytest.raises(InputError, match=r"ids are string in the current run but int64 in .*b\.parquet: make them one type"):
        nightly(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "latest.json").read_text())["run_id"] == first.run_id


def test_another_column_is_read_again(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "in", 13)
    lake.add("a.parquet", 100)
    table = pq.read_table(tmp_path / "in" / "a.parquet")
    other = pa.array((-np.array(table["embedding"].to_pylist())[::-1]).tolist(), pa.list_(pa.float32()))
    pq.write_table(table.append_column("other", other), tmp_path / "in" / "a.parquet")
    nightly(tmp_path / "in", tmp_path / "out")
    run = nightly(tmp_path / "in", tmp_path / "out", embedding_column="other")
    assert manifest(tmp_path / "out", run.run_id, "ingest")["changes"]["changed"] == 100
    config = ClusterConfig(str(tmp_path / "in"), str(tmp_path / "full"), embedding_column="other", **SETTINGS)
    full = run_clustering(config, progress=False, report=False)
    assert table_of(tmp_path / "out", run.run_id) == table_of(tmp_path / "full", full.run_id)


def test_other_settings_and_every_nth_run_are_full(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "in", 5)
    lake.add("a.parquet", 300)
    run = nightly(tmp_path / "in", tmp_path / "out", full_every=3)
    labels, full = labels_of(tmp_path / "out", run.run_id), []
    for i in range(5):
        lake.add(f"b{i}.parquet", 5)
        run = nightly(tmp_path / "in", tmp_path / "out", full_every=3)
        full.append(not manifest(tmp_path / "out", run.run_id, "quantize")["incremental"])
        labels = replay(tmp_path / "out", labels, run.run_id)
    assert full == [False, False, True, False, False]
    lake.add("c.parquet", 5)
    run = nightly(tmp_path / "in", tmp_path / "out", full_every=3, neighbors=7)
    assert manifest(tmp_path / "out", run.run_id, "quantize")["reason"] == "neighbors was 6, is 7"
    assert replay(tmp_path / "out", labels, run.run_id) == labels_of(tmp_path / "out", run.run_id)
    with pytest.raises(SettingsError, match="an incremental run needs another --run-id"):
        nightly(tmp_path / "in", tmp_path / "out", full_every=3, neighbors=7, run_id=run.run_id)
