"""Ingest against every kind of column it accepts, and the exact message for what it refuses."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow.errors import InputError
from faceflow.stages.artifacts.faces import read_ids, read_vectors
from faceflow.stages.ingest import id_checks, reading, row_checks
from faceflow.stages.ingest import parquet_input as cutting
from faceflow.stages.ingest.parquet_input import Columns, FirstDimension, Footer, ReadFooters, plan_tasks
from faceflow.storage import column_types
from faceflow.storage.inputs import list_parquet
from faceflow.storage.object_store import Store
from tests.conftest import write_faces

X = np.array([[3, 4], [1, 0], [0, -2], [5, 12]], np.float32)


def ingest_all(folder: Path, run: Path) -> tuple[np.ndarray, pa.Array]:
    """The whole stage, task by task, without Ray."""
    store, files = list_parquet(str(folder), None)
    footers = cutting.read_footers(ReadFooters(store, tuple(f.path for f in files), Columns("id", "embedding", None)))
    types = cutting.common_id_types(footers, None)
    names = cutting.Columns("id", "embedding", None, types.stored)
    cutting.check_dimensions(footers)
    dim = next((f.dim for f in footers if f.dim), None) or cutting.first_dimension(
        FirstDimension(store, tuple(f.path for f in files), "embedding")
    )
    tasks = plan_tasks(footers, cutting.part_faces(10**9, dim))
    out = Store.at(str(run))
    buckets = 3
    for i, task in enumerate(tasks):
        id_checks.gather_ids(id_checks.GatherIds(i, task, store, out, names, buckets))
    for bucket in range(buckets):
        id_checks.find_repeated(id_checks.FindRepeated(out, len(tasks), bucket))
    tally = row_checks.Tally()
    for task in tasks:
        request = reading.IngestRows(task, tuple(range(len(task.spans))), store, out, names, dim, buckets)
        tally.include(reading.ingest_rows(request).quarantined)
    if tally.total:
        raise InputError(tally.text())
    parts = range(sum(len(p.starts) - 1 for p in tasks))
    return np.concatenate([read_vectors(out, p, dim) for p in parts]), pa.concat_arrays([read_ids(out, p) for p in parts])


@pytest.mark.parametrize("value", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("kind", ["list", "large", "fixed"])
def test_every_embedding_type(tmp_path: Path, value: pa.DataType, kind: str) -> None:
    target = {"list": pa.list_(value), "large": pa.large_list(value), "fixed": pa.list_(value, 2)}[kind]
    write_faces(tmp_path / "in" / "a.parquet", pa.array(X.astype(value.to_pandas_dtype()).tolist(), target))
    vectors, _ = ingest_all(tmp_path / "in", tmp_path / "run")
    np.testing.assert_allclose(vectors, X / np.linalg.norm(X, axis=1, keepdims=True), atol=1e-6)


KINDS = [
    pa.string(), pa.large_string(), pa.string_view(), pa.int8(), pa.uint16(), pa.int64(), pa.uint64(), pa.binary(16),
    pa.binary(), pa.uuid(),
]  # fmt: skip


def ids_of_type(kind: pa.DataType) -> pa.Array:
    numbers = (7, 1, 3, 2)
    if pa.types.is_integer(kind):
        return pa.array(numbers).cast(kind)
    if column_types.id_storage(kind) == column_types.TEXT:
        return pa.array([str(i) for i in numbers]).cast(kind)
    raw = pa.array([bytes([i]) * 16 for i in numbers], column_types.plain(kind))
    return pa.ExtensionArray.from_storage(kind, raw) if kind == pa.uuid() else raw


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_ids_keep_their_type(tmp_path: Path, kind: pa.DataType) -> None:
    ids = ids_of_type(kind)
    write_faces(tmp_path / "in" / "a.parquet", X, ids)
    store, files = list_parquet(str(tmp_path / "in"), None)
    footers = cutting.read_footers(ReadFooters(store, tuple(f.path for f in files), Columns("id", "embedding", None)))
    types = cutting.common_id_types(footers, None)
    assert types.published == kind == column_types.type_of(column_types.name_of(kind))
    _, results = ingest_all(tmp_path / "in", tmp_path / "run")
    assert results.type == types.stored
    published = column_types.as_published(results, kind)
    assert published.type == kind
    assert published.to_pylist() == ids.to_pylist()


TEXTS = [
    pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "stored"), [(TEXTS, column_types.TEXT), ([pa.int32(), pa.int64(), pa.uint8(), pa.uint64()], column_types.INTEGER)],
    ids=["text", "integers"],
)  # fmt: skip
def test_files_of_other_writers_hold_one_type(tmp_path: Path, kinds: list[pa.DataType], stored: pa.DataType) -> None:
    """Every order of types is one type, repeats are found across them, and a face keeps its id."""
    for i, kind in enumerate(kinds):
        ids = pa.array([4 * i + j for j in range(4)])
        ids = ids.cast(kind) if pa.types.is_integer(kind) else ids.cast(pa.string()).cast(kind)
        write_faces(tmp_path / "in" / f"{i}.parquet", X, ids)
    _, results = ingest_all(tmp_path / "in", tmp_path / "run")
    assert results.type == stored
    assert [int(item) for item in results.to_pylist()] == list(range(4 * len(kinds)))
    again = pa.array([5, 100, 101, 102])
    write_faces(tmp_path / "in" / "z.parquet", X, again if stored == column_types.INTEGER else again.cast(pa.string()))
    with pytest.raises(InputError, match=r"z\.parquet, row 0: the id occurred before"):
        ingest_all(tmp_path / "in", tmp_path / "again")


def test_an_id_that_does_not_fit_is_named(tmp_path: Path) -> None:
    write_faces(tmp_path / "in" / "a.parquet", X, pa.array([1, 2, 3, 4], pa.int32()))
    write_faces(tmp_path / "in" / "b.parquet", X, pa.array([5, 6, 2**63 + 1, 7], pa.uint64()))
    with pytest.raises(InputError, match=r"b\.parquet, row 2: id 9223372036854775809 does not fit into int64"):
        ingest_all(tmp_path / "in", tmp_path / "run")


@pytest.mark.parametrize(
    "kind",
    [pa.list_view(pa.float32()), pa.large_list_view(pa.float64()), pa.fixed_shape_tensor(pa.float32(), [2])], ids=str,
)  # fmt: skip
def test_embeddings_of_other_writers(tmp_path: Path, kind: pa.DataType) -> None:
    tensor = isinstance(kind, pa.FixedShapeTensorType)
    made = pa.array(X.tolist(), kind.storage_type if tensor else kind)
    made = pa.ExtensionArray.from_storage(kind, made) if tensor else made
    write_faces(tmp_path / "in" / "a.parquet", made)
    vectors, _ = ingest_all(tmp_path / "in", tmp_path / "run")
    np.testing.assert_allclose(vectors, X / np.linalg.norm(X, axis=1, keepdims=True), atol=1e-6)


def test_shards_without_rows_or_values_have_no_type(tmp_path: Path) -> None:
    """As pandas writes a shard of which everything was filtered out: columns of type null; and one whose models all failed."""
    write_faces(tmp_path / "in" / "b.parquet", X)
    empty = pa.table({"id": pa.nulls(0), "embedding": pa.nulls(0)})
    pq.write_table(empty, tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"anything": pa.array([], pa.int8())}), tmp_path / "in" / "c.parquet")
    vectors, results = ingest_all(tmp_path / "in", tmp_path / "run")
    assert (len(vectors), results.type) == (4, column_types.TEXT)
    pq.write_table(pa.table({"id": ["x", "y"], "embedding": pa.nulls(2)}), tmp_path / "in" / "d.parquet")
    with pytest.raises(InputError, match=r"d\.parquet, row 0: the embedding is null"):
        ingest_all(tmp_path / "in", tmp_path / "nulls")
    (tmp_path / "in" / "d.parquet").unlink()
    pq.write_table(pa.table({"id": pa.nulls(1), "embedding": [[1.0, 2.0]]}), tmp_path / "in" / "e.parquet")
    with pytest.raises(InputError, match=r"e\.parquet, row 0: the id is null"):
        ingest_all(tmp_path / "in", tmp_path / "no ids")


def test_an_id_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"caf\xe9", b"\xff", b"fine"], pa.binary())
    write_faces(tmp_path / "in" / "a.parquet", X, pa.Array.from_buffers(pa.string(), 4, raw.buffers()))
    with pytest.raises(InputError, match=r"(?s)a\.parquet, row 1: the id is not valid UTF-8.*row 2: the id is not valid UTF-8"):
        ingest_all(tmp_path / "in", tmp_path / "run")
    assert read_ids(Store.at(str(tmp_path / "run")), 0).to_pylist() == ["good", None, None, "fine"]


@pytest.mark.parametrize("stride", [1, 64, 1_000, 4_096, 2**22, 2**32, 2**40])
@pytest.mark.parametrize("buckets", [3, 4, 64, 1_000])
def test_integer_ids_of_any_stride_spread_over_all_buckets(stride: int, buckets: int) -> None:
    """Snowflake ids have low bits that hardly vary."""
    ids = pa.array(np.arange(50_000, dtype=np.int64) * stride + 5)
    results = np.bincount(id_checks.buckets_of(ids, buckets), minlength=buckets)
    expected = len(ids) / buckets
    assert results.max() <= expected + 6 * expected**0.5
    assert results.min() >= expected - 6 * expected**0.5


def test_long_ids_get_buckets_by_their_bytes() -> None:
    assert id_checks.buckets_for(2_000_000, 20_000_000) == 1
    assert id_checks.buckets_for(2_000_000, 2_000_000 * 1_200) == 9
    assert id_checks.buckets_for(5_000_001, 0) == 3


def test_a_file_of_many_row_groups_is_cut_in_linear_time() -> None:
    """131,072 row groups of one row: with a tuple that grows, a minute; lists take a fraction of a second of CPU."""
    footers = [Footer("f", (1,) * 131_072, pa.string(), 0, 2)]
    begun = time.process_time()
    tasks = plan_tasks(footers, 131_072)
    assert time.process_time() - begun < 5
    assert tasks[0].spans == (("f", tuple(range(131_072)), 0),)


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
        Footer(f"f{i}", tuple(int(n) for n in rng.choice([0, 1, 900, 70_000, 1_048_576], 4)), pa.int64(), 0, 2)
        for i in range(40)
    ]
    tasks = plan_tasks(footers, cutting.PART_FACES)
    starts = [0, *[s for p in tasks for s in p.starts[1:]]]
    assert starts[-1] == sum(sum(f.group_rows) for f in footers)
    sizes = np.diff(starts)
    assert sizes.max() <= 1.5 * cutting.PART_FACES
    assert sizes[:-1].min() >= cutting.PART_FACES // 2
    read = [(path, g) for p in tasks for path, groups, _ in p.spans for g in groups]
    assert read == [(f.path, g) for f in footers for g, n in enumerate(f.group_rows) if n]


def bad_list(rows: list[Any]) -> Callable[[Path], None]:
    return lambda path: write_faces(path, pa.array(rows, pa.list_(pa.float32()))) and None


def table_of(**table: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(table), path)


# ruff: noqa: E501 - one line a case reads best
BAD = {
    "missing column": (table_of(id=["a"], embeding=[[1.0]]), "has no column 'embedding'; did you mean 'embeding'? (set --embedding-column)"),
    "missing id": (table_of(face=["a"], embedding=[[1.0]]), "has no column 'id'; known: embedding, face (set --id-column)"),
    "wrong id type": (table_of(id=[1.5], embedding=[[1.0]]), "column 'id' is double; an id must be a string, an integer or binary: cast it to a string or an integer"),
    "decimal id": (table_of(id=pa.array([1, 2]).cast(pa.decimal128(19, 0)), embedding=[[1.0], [1.0]]), "column 'id' is decimal128(19, 0); an id must be a string, an integer or binary: cast it to"),
    "wrong embedding type": (table_of(id=["a"], embedding=["x"]), "column 'embedding' is string; an embedding must be a list of float16"),
    "list of integers": (table_of(id=["a"], embedding=[[1, 2]]), "column 'embedding' is list<"),
    "dimension": (bad_list([[1, 2], [1, 2, 3]]), "row 1: the embedding has dimension 3, but the first one has 2"),
    "empty list": (bad_list([[1, 2], []]), "row 1: the embedding is empty"),
    "all empty": (bad_list([[], None]), "holds no embedding at all: every one is null or empty"),
    "null embedding": (bad_list([[1, 2], None]), "row 1: the embedding is null"),
    "null value": (bad_list([[1, 2], [None, 1]]), "row 1: the embedding contains a null"),
    "nan": (bad_list([[1, 2], [1, 2], [float("nan"), 1]]), "row 2: the embedding contains a NaN or an infinity"),
    "infinity": (bad_list([[1, 2], [float("inf"), 1]]), "row 1: the embedding contains a NaN or an infinity"),
    "zero": (bad_list([[0, 0], [1, 1]]), "row 0: the embedding contains only zeros: it has no direction"),
    "repeated id": (table_of(id=["a", "b", "a"], embedding=[[1.0], [1.0], [1.0]]), "row 2: the id occurred before: ids must be unique"),
    "null id": (table_of(id=["a", None], embedding=[[1.0], [1.0]]), "row 1: the id is null"),
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
