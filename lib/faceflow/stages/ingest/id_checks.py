"""Ids that occur twice: hashed into buckets, so that equal ids meet in one task. No other row checks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from faceflow.kernels.id_hashing import buckets_of_integers, buckets_of_texts, hash_integers, hash_texts
from faceflow.stages.ingest import row_checks
from faceflow.stages.ingest.parquet_input import Columns, IngestTask, read_batches
from faceflow.storage import column_types, layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import IDS_CHECKED_SCHEMA

BUCKET_IDS, BUCKET_BYTES = 2_000_000, 256 * 2**20
"""Ids that one task compares for repeats, and bytes of them, at most: some 200 MB of short ids, three times the bytes of long
ones (signed URLs)."""


def buckets_for(ids: int, id_bytes: int) -> int:
    """Buckets to compare so many ids in, of so many bytes together."""
    return max(1, -(-ids // BUCKET_IDS), -(-id_bytes // BUCKET_BYTES))


@dataclass(frozen=True)
class GatherIds:
    """Request: the ids of ingest task `index`, by bucket."""

    index: int
    task: IngestTask
    source: Store
    run: Store
    columns: Columns
    buckets: int


def gather_ids(request: GatherIds) -> None:
    """Write one task's ids with their input rows, one record batch a bucket: equal ids meet in one bucket."""
    task, run, names, buckets = request.task, request.run, request.columns, request.buckets
    name = layout.gathered_ids(request.index)
    if is_whole(run, name):
        return
    ids = pa.concat_arrays(
        [names.ids(batch, path, row)[0] for path, row, batch in read_batches(task, request.source, [names.id])]
    )
    rows = np.arange(task.starts[0], task.starts[0] + len(ids))
    bucket = buckets_of(ids, buckets)
    schema = pa.schema([pa.field("id", ids.type), *IDS_CHECKED_SCHEMA])
    batches = (
        pa.record_batch([ids.take(pa.array(selected)), pa.array(rows[selected])], schema=schema)
        for selected in (np.flatnonzero(bucket == b) for b in range(buckets))
    )
    run.write_arrow(name, schema, batches)


def buckets_of(ids: pa.Array, buckets: int) -> np.ndarray:
    """int64[n]: a bucket for each id (in its storage type), equal ids in one, by a hash."""
    if buckets == 1:
        return np.zeros(len(ids), np.int64)
    if pa.types.is_integer(ids.type):
        return buckets_of_integers(ids.fill_null(0).to_numpy(zero_copy_only=False), buckets)
    return buckets_of_texts(*_texts(ids), buckets)


def _texts(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, bytes) of a column of large strings or large binary values; nulls are empty."""
    texts = values.fill_null(pa.scalar("" if values.type == column_types.TEXT else b"", values.type))
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1], data


def hashes_of(values: pa.Array | None, rows: int) -> np.ndarray:
    """uint64[rows]: a hash of each row's value (in its storage type), 0 for a null or where there is no such column."""
    if values is None:
        return np.zeros(rows, np.uint64)
    if pa.types.is_integer(values.type):
        collected = hash_integers(values.fill_null(0).to_numpy(zero_copy_only=False))
    else:
        collected = hash_texts(*_texts(values))
    collected[values.is_null().to_numpy(zero_copy_only=False)] = 0
    return collected


@dataclass(frozen=True)
class FindRepeated:
    """Request: the repeated ids of one bucket; tasks: that gathered ids."""

    run: Store
    tasks: int
    bucket: int


def find_repeated(request: FindRepeated) -> None:
    """Write the input rows of one bucket whose id stands in an earlier row, ascending."""
    run, bucket = request.run, request.bucket
    name = layout.repeated_ids(bucket)
    if is_whole(run, name):
        return
    batches = [run.read_batch(layout.gathered_ids(task), bucket) for task in range(request.tasks)]
    ids = pa.concat_arrays([batch.column(0) for batch in batches])
    rows = np.concatenate([batch.column(1).to_numpy() for batch in batches])
    again = rows[row_checks.repeated(ids)]
    run.write_arrow(name, IDS_CHECKED_SCHEMA, [pa.record_batch([pa.array(again)], schema=IDS_CHECKED_SCHEMA)])


def repeated_rows(run: Store, buckets: int, begin: int, end: int) -> np.ndarray:
    """The input rows begin <= row < end whose id occurred before, int64[...], over all buckets."""
    collected = [run.read_batch(layout.repeated_ids(bucket)).column(0).to_numpy() for bucket in range(buckets)]
    return np.concatenate([rows[(rows >= begin) & (rows < end)] for rows in collected])
