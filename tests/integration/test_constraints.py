"""Constraints and faces of one photo, in full and incremental runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow.cli.main import main
from faceflow.errors import InputError
from tests.benchmarks.nightly import labels_of, replay
from tests.integration.lake import Lake, manifest, nightly

pytestmark = pytest.mark.usefixtures("ray_session")


def test_constraints_hold_in_every_incremental_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lake = Lake(tmp_path / "in", 10, people=6)
    lake.add("a.parquet", 200)
    free = labels_of(tmp_path / "free", nightly(tmp_path / "in", tmp_path / "free").run_id)
    by_cluster: dict[int, list[str]] = {}
    for face, cluster in free.items():
        by_cluster.setdefault(cluster, []).append(face)
    big = sorted(by_cluster.values(), key=len)[::-1]
    must, cannot = [(big[0][0], big[1][0]), (big[1][1], "face-of-tomorrow")], [(big[2][0], big[2][-1]), (big[0][1], big[3][0])]

    def write(path: Path) -> str:
        rows = [(a, b, "must-link") for a, b in must] + [(a, b, "cannot-link") for a, b in cannot]
        if path.suffix == ".csv":
            path.write_text("id_a,id_b,kind\n" + "".join(f"{a},{b},{kind}\n" for a, b, kind in rows))
        else:
            pq.write_table(pa.table(dict(zip(("id_a", "id_b", "kind"), map(list, zip(*rows, strict=True)), strict=True))), path)
        return str(path)

    def holds(labels: dict[str, int]) -> bool:
        return all(labels[a] == labels[b] for a, b in must if b in labels) and all(labels[a] != labels[b] for a, b in cannot)

    assert not holds(free)
    file = write(tmp_path / "c.csv")
    run = nightly(tmp_path / "in", tmp_path / "out", constraints=file)
    labels = labels_of(tmp_path / "out", run.run_id)
    assert holds(labels)
    assert manifest(tmp_path / "out", run.run_id, "detect")["absent_constraints"] == 1
    assert labels_of(tmp_path / "out", nightly(tmp_path / "in", tmp_path / "out", constraints=file).run_id) == labels
    lake.files["b.parquet"] = lake.faces(20) | {"face-of-tomorrow": lake.centers[5].astype(np.float32)}
    lake.write("b.parquet")
    run = nightly(tmp_path / "in", tmp_path / "out", constraints=file)
    labels = replay(tmp_path / "out", labels, run.run_id)
    assert holds(labels)
    assert labels["face-of-tomorrow"] == labels[big[0][0]]
    withdrawn = nightly(tmp_path / "in", tmp_path / "out")
    assert not holds(labels_of(tmp_path / "out", withdrawn.run_id))
    cannot.append((big[1][0], big[1][1]))  # a new decision, of the same files: a new run
    run = nightly(tmp_path / "in", tmp_path / "out", constraints=write(tmp_path / "c.parquet"))
    assert holds(labels_of(tmp_path / "out", run.run_id))
    cannot.append((big[0][0], big[1][0]))
    write(tmp_path / "c.csv")
    arguments = ["nightly", str(tmp_path / "in"), str(tmp_path / "out"), "--constraints", file, "--quiet"]
    assert main(arguments) == 2
    a, b = big[0][0], big[1][0]
    assert capsys.readouterr().err == (
        f"error: constraints contradict each other: {a!r} must be with {b!r}; but {a!r} cannot be with {b!r}\n"
    )
    (tmp_path / "c.csv").write_text("id_a,id_b,kind\nx,y,maybe\n")
    assert main(arguments) == 2
    assert "line 2: kind is 'maybe'; it must be 'must-link' or 'cannot-link'" in capsys.readouterr().err
    (tmp_path / "c.csv").write_text("id_a,id_c,kind\nx,y,must-link\n")
    assert main(arguments) == 2
    assert "no column 'id_b'; did you mean" in capsys.readouterr().err


def test_faces_of_one_photo_are_kept_apart_in_every_incremental_run(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "in", 12, people=4)

    def write(name: str, count: int) -> None:
        faces = lake.faces(count)
        photos = pa.array([i // 2 for i in range(count)])  # pairs of faces, of a few people: often of the same one
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.array(list(faces.values())).ravel()), 16)
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": list(faces), "embedding": vectors, "photo": photos}), tmp_path / "in" / name)

    def crowded(run_id: str) -> int:
        labels, results, clashes = labels_of(tmp_path / "out", run_id), set(), 0
        for path in sorted((tmp_path / "in").iterdir()):
            for row in pq.read_table(path, columns=["id", "photo"]).to_pylist():
                key = (row["photo"], labels[row["id"]])
                clashes += key in results
                results.add(key)
        return clashes

    write("a.parquet", 100)
    free = nightly(tmp_path / "in", tmp_path / "out")
    assert crowded(free.run_id) > 5
    run = nightly(tmp_path / "in", tmp_path / "out", exclusive_column="photo")
    assert crowded(run.run_id) == 0
    assert manifest(tmp_path / "out", run.run_id, "ingest")["changes"]["added"] == 0  # read again for the column, but known
    assert manifest(tmp_path / "out", run.run_id, "detect")["exclusive_moved"] > 5
    write("b.parquet", 20)
    run = nightly(tmp_path / "in", tmp_path / "out", exclusive_column="photo")
    assert manifest(tmp_path / "out", run.run_id, "quantize")["incremental"]
    assert crowded(run.run_id) == 0
    with pytest.raises(InputError, match=r"has no column 'foto'; did you mean 'photo'\? \(set --exclusive-column\)"):
        nightly(tmp_path / "in", tmp_path / "out", exclusive_column="foto")
