"""Which faces of an incremental run were in its base run: ids are compared by bucket, embeddings by their hashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from faceflow.stages.artifacts.faces import good_entries, read_ids, read_quarantined
from faceflow.stages.ingest import id_checks
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store

GONE, KEPT, CHANGED, DROPPED, REPEATED = range(5)
"""What becomes of an entry of the base run (KEPT: read again, and the same; CHANGED: its embedding differs; GONE: the rest),
and of one that was read now (DROPPED: it is a kept one; REPEATED: its id is that of a face in another file)."""

MATCHES_SCHEMA = pa.schema(
    [("entry", pa.int64()), ("verdict", pa.uint8()), ("file", pa.int32()), ("row", pa.int64()), ("photo", pa.uint64())]
)

_ORIGIN = (np.int32, np.int64, np.uint64, np.uint64)


@dataclass(frozen=True)
class Side:
    """A run directory, and where its entries and its rows (entries that are not quarantined) are cut into parts."""

    run: Store
    entries: tuple[int, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class _Bucket:
    """Of one part, the rows that fall into one bucket of ids: their entries and rows (int64[n]), ids and origins."""

    entries: np.ndarray
    rows: np.ndarray
    ids: pa.Array
    origins: pa.RecordBatch


def _read_bucket(side: Side, part: int, bucket: int, buckets: int) -> _Bucket:
    ids = read_ids(side.run, part)
    good = good_entries(read_quarantined(side.run, part), len(ids))
    selected = np.flatnonzero((id_checks.buckets_of(ids, buckets) == bucket) & good)
    origins = side.run.read_batch(layout.part("origins", part))
    if len(selected) < len(ids):
        ids, origins = ids.take(pa.array(selected)), origins.take(pa.array(selected))
    return _Bucket(side.entries[part] + selected, side.starts[part] + np.cumsum(good)[selected] - 1, ids, origins)


@dataclass(frozen=True)
class MatchBucket:
    """Request: compare the ids of one bucket. old: the base run; new: the files read now; carried: int32[files], by the base
    run's numbers of the files, this run's, or -1 where a file is gone or was read again."""

    run: Store
    old: Side
    new: Side
    carried: np.ndarray
    bucket: int
    buckets: int


def match_bucket(request: MatchBucket) -> None:
    """Compare the ids of one bucket: write what becomes of the base run's entries in files that were read again or are gone
    (first batch), and of those read now that are not new (second batch)."""
    run, old, new, carried = request.run, request.old, request.new, request.carried
    bucket, buckets = request.bucket, request.buckets
    name = layout.matches(bucket)
    if is_whole(run, name):
        return
    after = [_read_bucket(new, part, bucket, buckets) for part in range(len(new.entries) - 1)]
    entries = np.concatenate([np.empty(0, np.int64), *(a.entries for a in after)])
    ids = pa.concat_arrays([a.ids for a in after]) if after else None
    file, row, hashes, photo = (
        np.concatenate([np.empty(0, t), *(a.origins.column(c).to_numpy() for a in after)]) for c, t in enumerate(_ORIGIN)
    )
    verdicts, faces = np.full(len(entries), -1, np.int16), np.zeros(len(entries), np.int64)
    known = [[np.empty(0, f.type.to_pandas_dtype())] for f in MATCHES_SCHEMA]
    for part in range(len(old.entries) - 1):
        before = _read_bucket(old, part, bucket, buckets)
        # Where each id of the base run is among those read now, -1 where it is not.
        at = np.full(len(before.entries), -1, np.int64)
        if ids is not None:
            at = pc.index_in(before.ids, value_set=ids).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        stays = carried[before.origins.column("file").to_numpy()] >= 0
        verdicts[at[stays & (at >= 0)]] = REPEATED
        back = ~stays & (at >= 0)
        target = at[back]
        equal = before.origins.column("hash").to_numpy()[back] == hashes[target]
        verdicts[target], faces[target] = np.where(equal, DROPPED, CHANGED), before.rows[back]
        for column, values in zip(
            known, (before.entries[back], np.where(equal, KEPT, CHANGED), file[target], row[target], photo[target]), strict=True
        ):
            column.append(values)
    known_ids = np.flatnonzero(verdicts >= 0)
    batches = (
        [np.concatenate(column) for column in known],
        [
            entries[known_ids],
            verdicts[known_ids],
            np.zeros(len(known_ids)),
            faces[known_ids],
            photo[known_ids],
        ],  # the row that the face had
    )
    run.write_arrow(name, MATCHES_SCHEMA, [_batch(columns, MATCHES_SCHEMA) for columns in batches])


def _batch(columns: Sequence[np.ndarray], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [pa.array(c.astype(f.type.to_pandas_dtype())) for c, f in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)


def read_matches(run: Store, buckets: int, which: int, begin: int, end: int) -> list[np.ndarray]:
    """[entries from `begin`, verdicts, files, rows] of the entries begin <= e < end, over all buckets, ascending."""
    results = [run.read_batch(layout.matches(bucket), which) for bucket in range(buckets)]
    columns = [np.concatenate([batch.column(c).to_numpy() for batch in results]) for c in range(len(MATCHES_SCHEMA))]
    selected = (columns[0] >= begin) & (columns[0] < end)
    order = np.argsort(columns[0][selected], kind="stable")
    return [columns[0][selected][order] - begin, *(column[selected][order] for column in columns[1:])]
