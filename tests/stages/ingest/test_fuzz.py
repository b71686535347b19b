"""Ingest against arbitrary small Parquet files and against valid ones with flipped bytes: right rows or an InputError."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceflow.errors import InputError
from tests.stages.ingest.test_stage import ingest_all

numbers = st.one_of(st.floats(width=32), st.none())
embeddings = st.one_of(st.none(), st.lists(numbers, max_size=3), st.just([1.0, 2.0]))
texts = st.one_of(st.none(), st.text(max_size=4), st.sampled_from(["../x", "<script>", "a\nb", ""]))
columns = st.sampled_from(["id", "embedding", "ID", "embedding ", "x"])
types = st.sampled_from(
    [
        pa.list_(pa.float32()),
        pa.large_list(pa.float64()),
        pa.list_(pa.float16()),
        pa.list_(pa.int32()),
        pa.string(),
        pa.float32(),
    ]
)


def is_good(face: Any, embedding: Any) -> bool:
    return (
        face is not None
        and embedding is not None
        and len(embedding) > 0
        and all(v is not None and np.isfinite(v) for v in embedding)
        and any(v != 0 for v in embedding)
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(texts, embeddings), max_size=8), st.integers(1, 4), st.sampled_from([pa.float32(), pa.float64()]))
def test_values(rows: list[tuple[Any, Any]], group: int, value: pa.DataType) -> None:
    table = pa.table(
        {"id": pa.array([r[0] for r in rows], pa.string()), "embedding": pa.array([r[1] for r in rows], pa.list_(value))}
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in").mkdir()
        pq.write_table(table, Path(folder) / "in" / "a.parquet", row_group_size=group)
        first = next((len(e) for _, e in rows if e), None)
        fine = all(is_good(*row) and len(row[1]) == first for row in rows) and len({r[0] for r in rows}) == len(rows)
        if not (rows and fine):
            if rows:
                with pytest.raises(InputError):
                    ingest_all(Path(folder) / "in", Path(folder) / "run")
            return
        vectors, ids = ingest_all(Path(folder) / "in", Path(folder) / "run")
        assert ids.to_pylist() == [r[0] for r in rows]
        want = np.array([r[1] for r in rows], np.float64)
        want /= np.abs(want).max(axis=1, keepdims=True)
        np.testing.assert_allclose(vectors, want / np.linalg.norm(want, axis=1, keepdims=True), atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(columns, types), max_size=4), st.integers(0, 3))
def test_schemas(fields: list[tuple[str, pa.DataType]], rows: int) -> None:
    arrays = [pa.nulls(rows, kind) for _, kind in fields]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in").mkdir()
        table = pa.Table.from_arrays(arrays, schema=pa.schema([pa.field(name, kind) for name, kind in fields]))
        pq.write_table(table, Path(folder) / "in" / "a.parquet")
        with pytest.raises(InputError):
            ingest_all(Path(folder) / "in", Path(folder) / "run")


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_flipped_bytes(tmp_path: Path, compression: str) -> None:
    """Pages with checksums, as here, tell every flip of a value; never a traceback or another number of rows."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((200, 8)).astype(np.float32)
    table = pa.table({"id": [f"face-{i}" for i in range(200)], "embedding": pa.FixedSizeListArray.from_arrays(x.ravel(), 8)})
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.parquet"
    pq.write_table(table, path, row_group_size=70, compression=compression, write_page_checksum=True)
    good = path.read_bytes()
    refused = 0
    for attempt in range(150):
        damaged = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            vectors, ids = ingest_all(tmp_path / "in", tmp_path / f"run{attempt}")
        except InputError:
            refused += 1
            continue
        assert len(vectors) == len(ids) == 200
    assert refused > 100
