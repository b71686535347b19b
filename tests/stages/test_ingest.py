"""Ingest against every kind of column it accepts, and the exact message for what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow.errors import InputError
from faceflow.stages import checking, intake
from faceflow.stages import pieces as cutting
from faceflow.stages.pieces import Footer, plan_pieces
from faceflow.stages.reading import read_ids, read_vectors
from faceflow.storage.files import Store
from faceflow.storage.inputs import list_parquet
from tests.conftest import write_faces

X = np.array([[3, 4], [1, 0], [0, -2], [5, 12]], np.float32)


def ingest_all(folder: Path, run: Path) -> tuple[np.ndarray, pa.Array]:
    """The whole stage, task by task, without Ray."""
    store, files = list_parquet(str(folder), None)
    footers = cutting.read_footers(store, [f.path for f in files], "id", "embedding")
    cutting.check_types(footers)
    dim = next((f.dim for f in footers if f.dim), None) or cutting.first_dimension(store, [f.path for f in files], "embedding")
    pieces = plan_pieces(footers, cutting.part_faces(10**9, dim))
    out = Store.at(str(run))
    buckets = 3
    for i, piece in enumerate(pieces):
        intake.gather_ids(i, piece, store, out, "id", buckets)
    for bucket in range(buckets):
        intake.find_repeated(out, len(pieces), bucket)
    tally = checking.Tally()
    for piece in pieces:
        tally.include(
            intake.ingest_piece(piece, tuple(range(len(piece.spans))), store, out, ("id", "embedding", None), dim, buckets)[2]
        )
    if tally.total:
        raise InputError(tally.text())
    parts = range(sum(len(p.starts) - 1 for p in pieces))
    return np.concatenate([read_vectors(out, p, dim) for p in parts]), pa.concat_arrays([read_ids(out, p) for p in parts])


@pytest.mark.parametrize("value", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("kind", ["list", "large", "fixed"])
def test_every_embedding_type(tmp_path: Path, value: pa.DataType, kind: str) -> None:
    target = {"list": pa.list_(value), "large": pa.large_list(value), "fixed": pa.list_(value, 2)}[kind]
    write_faces(tmp_path / "in" / "a.parquet", pa.array(X.astype(value.to_pandas_dtype()).tolist(), target))
    vectors, _ = ingest_all(tmp_path / "in", tmp_path / "run")
    np.testing.assert_allclose(vectors, X / np.linalg.norm(X, axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.int8(), pa.uint16(), pa.int64(), pa.uint64()])
def test_ids_keep_their_type(tmp_path: Path, kind: pa.DataType) -> None:
    ids = pa.array([str(i) for i in (7, 1, 3, 2)]) if "string" in str(kind) else pa.array([7, 1, 3, 2])
    write_faces(tmp_path / "in" / "a.parquet", X, ids.cast(kind))
    _, found = ingest_all(tmp_path / "in", tmp_path / "run")
    assert found.type == kind
    assert found.to_pylist() == ids.cast(kind).to_pylist()


def test_rows_follow_sorted_path_then_row_whatever_the_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "PART_FACES", 100)
    monkeypatch.setattr(cutting, "READ_BATCH", 17)
    rng = np.random.default_rng(0)
    every, first = [], 0
    for name, rows, group in (("b/x", 330, 1000), ("a", 45, 10), ("c", 160, 70), ("b/y", 1, 1), ("d", 0, 1)):
        x = rng.standard_normal((rows, 3)).astype(np.float32)
        every.append((name, x, np.arange(first, first + rows)))
        first += rows
        write_faces(tmp_path / "in" / f"{name}.parquet", x, pa.array(every[-1][2], pa.int64()), row_group_size=max(1, group))
    vectors, ids = ingest_all(tmp_path / "in", tmp_path / "run")
    ordered = sorted(every, key=lambda e: f"{e[0]}.parquet")
    want = np.concatenate([e[1] for e in ordered])
    np.testing.assert_allclose(vectors, want / np.linalg.norm(want, axis=1, keepdims=True), atol=1e-6)
    assert ids.to_pylist() == np.concatenate([e[2] for e in ordered]).tolist()


def test_parts_are_of_about_equal_size_and_cover_all_rows() -> None:
    rng = np.random.default_rng(1)
    footers = [
        Footer(f"f{i}", tuple(int(n) for n in rng.choice([0, 1, 900, 70_000, 1_048_576], 4)), "int64", 2) for i in range(40)
    ]
    pieces = plan_pieces(footers, cutting.PART_FACES)
    starts = [0, *[s for p in pieces for s in p.starts[1:]]]
    assert starts[-1] == sum(sum(f.group_rows) for f in footers)
    sizes = np.diff(starts)
    assert sizes.max() <= 1.5 * cutting.PART_FACES
    assert sizes[:-1].min() >= cutting.PART_FACES // 2
    read = [(path, g) for p in pieces for path, groups, _ in p.spans for g in groups]
    assert read == [(f.path, g) for f in footers for g, n in enumerate(f.group_rows) if n]


def bad_list(rows: list[Any]) -> Callable[[Path], None]:
    return lambda path: write_faces(path, pa.array(rows, pa.list_(pa.float32()))) and None


def columns(**table: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(table), path)


# ruff: noqa: E501 - one line a case reads best
BAD = {
    "missing column": (columns(id=["a"], embeding=[[1.0]]), "has no column 'embedding'; did you mean 'embeding'? (set --embedding-column)"),
    "missing id": (columns(face=["a"], embedding=[[1.0]]), "has no column 'id'; known: embedding, face (set --id-column)"),
    "wrong id type": (columns(id=[1.5], embedding=[[1.0]]), "column 'id' is double; an id must be a string or an integer"),
    "wrong embedding type": (columns(id=["a"], embedding=["x"]), "column 'embedding' is string; an embedding must be a list of float16"),
    "list of integers": (columns(id=["a"], embedding=[[1, 2]]), "column 'embedding' is list<"),
    "dimension": (bad_list([[1, 2], [1, 2, 3]]), "row 1: the embedding has dimension 3, but the first one has 2"),
    "empty list": (bad_list([[1, 2], []]), "row 1: the embedding is empty"),
    "all empty": (bad_list([[], None]), "holds no embedding at all: every one is null or empty"),
    "null embedding": (bad_list([[1, 2], None]), "row 1: the embedding is null"),
    "null value": (bad_list([[1, 2], [None, 1]]), "row 1: the embedding contains a null"),
    "nan": (bad_list([[1, 2], [1, 2], [float("nan"), 1]]), "row 2: the embedding contains a NaN or an infinity"),
    "infinity": (bad_list([[1, 2], [float("inf"), 1]]), "row 1: the embedding contains a NaN or an infinity"),
    "zero": (bad_list([[0, 0], [1, 1]]), "row 0: the embedding contains only zeros: it has no direction"),
    "repeated id": (columns(id=["a", "b", "a"], embedding=[[1.0], [1.0], [1.0]]), "row 2: the id occurred before: ids must be unique"),
    "null id": (columns(id=["a", None], embedding=[[1.0], [1.0]]), "row 1: the id is null"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_file_the_row_and_the_cause(tmp_path: Path, case: str) -> None:
    write, message = BAD[case]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "bad.parquet")
    with pytest.raises(InputError) as caught:
        ingest_all(tmp_path / "in", tmp_path / "run")
    assert message in str(caught.value)
    if case != "all empty":
        assert "bad.parquet" in str(caught.value)


@pytest.mark.parametrize(("first", "second"), [((4, 2), (4, 3)), ((3, 8), (1, 2))])
def test_files_of_different_dimension_are_both_named(tmp_path: Path, first: tuple[int, int], second: tuple[int, int]) -> None:
    write_faces(tmp_path / "in" / "a.parquet", np.ones(first, np.float32))
    write_faces(tmp_path / "in" / "b.parquet", np.ones(second, np.float32))
    with pytest.raises(InputError, match=rf"dimension {first[1]} in .*a\.parquet but {second[1]} in .*b\.parquet"):
        ingest_all(tmp_path / "in", tmp_path / "run")


def test_files_with_different_id_types(tmp_path: Path) -> None:
    write_faces(tmp_path / "in" / "a.parquet", X)
    write_faces(tmp_path / "in" / "b.parquet", X, pa.array([1, 2, 3, 4]))
    with pytest.raises(InputError, match=r"ids are string in .*a\.parquet but int64 in .*b\.parquet"):
        ingest_all(tmp_path / "in", tmp_path / "run")


@pytest.mark.parametrize("damage", ["footer", "page", "empty"])
def test_damaged_parquet_is_named(tmp_path: Path, damage: str) -> None:
    path = write_faces(tmp_path / "in" / "a.parquet", np.ones((1000, 4), np.float32), compression="zstd")
    data = bytearray(path.read_bytes())
    if damage == "footer":
        data = data[:-30]
    elif damage == "page":
        data[200:1500] = bytes(1300)
    else:
        data = bytearray()
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet"):
        ingest_all(tmp_path / "in", tmp_path / "run")
