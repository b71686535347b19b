"""A night's ingest: only what is new or changed is read; what is still there keeps its parts, in their order.

Rows are numbered by when they first came: last night's, less those that are gone, then the new ones. Small parts, as nights
leave them, become one now and then.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from faceflow import __version__
from faceflow.errors import InputError
from faceflow.logs import event
from faceflow.stages.artifacts.faces import good_entries, id_type, read_ids, read_quarantined, read_vectors
from faceflow.stages.base import Context, Outcome, merge_sizes
from faceflow.stages.ingest import reading, row_checks
from faceflow.stages.ingest.parquet_input import IdTypes, part_faces
from faceflow.storage import columns, layout
from faceflow.storage.inputs import Listing
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import MAX_FACES, ORIGINS_SCHEMA, PAST_SCHEMA, QUARANTINED_SCHEMA, ROWS_TONIGHT_SCHEMA, Parts

log = logging.getLogger("faceflow")

GONE, KEPT, CHANGED, DROPPED, REPEATED = range(5)
"""What becomes of an entry of last night (KEPT: read again, and the same; CHANGED: its embedding is another; GONE: the rest),
and of one that was read tonight (DROPPED: it was there already; REPEATED: its id is that of a face in another file)."""

MATCHES_SCHEMA = pa.schema(
    [("entry", pa.int64()), ("verdict", pa.uint8()), ("file", pa.int32()), ("row", pa.int64()), ("photo", pa.uint64())]
)

READ_BY = ("id_column", "embedding_column", "exclusive_column", "bad_rows", "version of faceflow")
"""Settings without which a file that is as it was would not be read the same."""

MOST_SMALL = 8
"""As soon as there are so many parts of less than half of what is wanted with another such beside them, neighbors become one:
parts stay few however many nights pass, and faces are copied now and then, not every night."""


_ORIGIN = (np.int32, np.int64, np.uint64, np.uint64)


@dataclass(frozen=True)
class Side:
    """A run directory, and where its entries and its rows (entries that were not set aside) are cut into parts."""

    run: Store
    entries: tuple[int, ...]
    starts: tuple[int, ...]


def run(context: Context, listing: Listing) -> Outcome:
    """Compare the files, read those that are not as they were, tell new faces from old ones, and carry over the rest."""
    past, executor, stores = context.past, context.executor, context.stores
    assert past is not None
    store, files, snapshot = listing
    before: Mapping[str, Any] = past.done["ingest"].fingerprint["input_files"]
    numbers = {f.path: i for i, f in enumerate(files)}
    same = {f.path for f in files if before.get(f.path) == f.state}
    settings = past.done["ingest"].fingerprint
    now = context.config.public() | {"version of faceflow": __version__}
    other = next((key for key in READ_BY if settings[key] != now[key]), None)
    if context.config.verify_content or other is not None:
        same = set()
        if other is not None:
            log.info("changes  every file is read again: %s was %s, is %s", other, settings[other], now[other])
    read = {path: number for path, number in numbers.items() if path not in same}
    # By last night's numbers of the files: tonight's, or -1 where a file is gone or was read again.
    carried = np.array([numbers[path] if path in same else -1 for path in before], np.int32)
    told_of = {
        "same": len(same), "new": sum(path not in before for path in read), "read_again": sum(path in before for path in read),
        "gone": sum(path not in numbers for path in before),
    }  # fmt: skip
    log.info(
        "changes  files: %d as they were, %d new, %d read again, %d gone", *told_of.values(), extra=event("changes", **told_of)
    )
    counts = past.done["ingest"].counts
    staging = stores.run.child(layout.ARRIVALS)
    types = IdTypes(read_ids(past.run, 0).type, id_type(counts, past.run))
    taken = reading.take_in(context, store, read, staging, counts["dim"], types)
    old = Side(past.run, tuple(counts["entries"]), tuple(counts["starts"]))
    new = Side(staging, taken.entries, taken.starts)
    buckets = reading.buckets_for(old.entries[-1] + new.entries[-1], counts.get("id_bytes", 0) + taken.id_bytes)
    executor.map(match_bucket, [(stores.run, old, new, carried, b, buckets) for b in range(buckets)], "match")
    starts = past.parts
    bounds = compact([starts.rows(p) for p in range(len(starts))], part_faces(starts.faces, taken.dim))
    sources = [range(*pair) for pair in itertools.pairwise(bounds)]
    first = len(sources)
    carried_parts = executor.map(
        carry_part,
        [(stores.run, old, part, source, carried, taken.dim, buckets) for part, source in enumerate(sources)],
        "carry",
        sizes=[old.starts[source.stop] - old.starts[source.start] for source in sources],
    )
    new_parts = executor.map(
        place_part,
        [
            (stores.run, staging, p, new.entries[p], first + p, {n: path for path, n in read.items()}, taken.dim, buckets)
            for p in range(len(new.entries) - 1)
        ],
        "place",
    )
    every = [*carried_parts, *new_parts]
    bad = row_checks.Tally()
    for part in every:
        bad.include(part.quarantined)
    reading.judge(context, bad, sum(part.entries for part in every))
    faces = [part.faces for part in every]
    if sum(faces) > MAX_FACES:
        raise InputError(f"input {context.config.input} has {sum(faces)} faces; at most {MAX_FACES} are supported in one run")
    if sum(faces) == 0:
        raise InputError(f"input {context.config.input} has no face left in its {len(files)} Parquet file(s)")
    stayed = sum(part.faces for part in carried_parts)
    changed = sum(part.changed for part in new_parts)
    after = Parts(tuple(np.cumsum([0, *faces]).tolist()))
    sizes = executor.call(write_rows_tonight, stores.run, starts.faces, after, first, label="rows")
    result = {
        "faces": sum(faces), "quarantined": sum(part.entries - part.faces for part in every), "dim": taken.dim,
        "files": len(files), "input_snapshot": snapshot,
        "added": sum(faces) - stayed - changed, "changed": changed, "removed": starts.faces - stayed - changed,
        "starts": list(after.starts), "entries": np.cumsum([0, *(part.entries for part in every)]).tolist(),
        "sources": bounds, "id_type": columns.name_of(taken.ids.published),
        "id_bytes": reading.id_bytes_of(merge_sizes([part.sizes for part in every])),
    }  # fmt: skip
    return Outcome(result, merge_sizes([sizes, *(part.sizes for part in every)]))


def compact(rows: Sequence[int], wanted: int) -> list[int]:
    """Where to cut last night's parts, of so many rows each, into tonight's: bounds of the parts that become one, from 0 to
    len(rows). Parts of half the wanted rows and more stay as they are."""
    small = itertools.groupby(range(len(rows)), lambda part: 2 * rows[part] < wanted)
    runs = [run for run in (list(parts) for is_small, parts in small if is_small) if len(run) > 1]
    bounds = set(range(len(rows) + 1))
    if sum(map(len, runs)) < MOST_SMALL:
        return sorted(bounds)
    for run in runs:
        together = rows[run[0]]
        for part in run[1:]:
            if together + rows[part] > wanted:
                together = 0
            else:
                bounds.remove(part)
            together += rows[part]
    return sorted(bounds)


def write_rows_tonight(run: Store, past_faces: int, parts: Parts, carried: int) -> dict[str, int]:
    """Write tonight's row of every face of last night, from the parts that hold any: the first so many."""
    rows = np.full(past_faces, -1, np.int32)
    for part in range(carried):
        before = run.read_batch(layout.part("past", part)).column(0).to_numpy()
        rows[before] = np.arange(parts.starts[part], parts.starts[part + 1])
    sizes: dict[str, int] = {}
    _write(run, layout.ROWS_TONIGHT, ROWS_TONIGHT_SCHEMA, [rows], sizes)
    return sizes


@dataclass(frozen=True)
class PlacedPart:
    """One part of tonight: bytes of its files, faces, entries (rows set aside included), changed faces, and the tally of rows
    set aside."""

    sizes: dict[str, int]
    faces: int
    entries: int
    changed: int
    quarantined: row_checks.Tally


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
    selected = np.flatnonzero((reading.buckets_of(ids, buckets) == bucket) & good)
    origins = side.run.read_batch(layout.part("origins", part))
    if len(selected) < len(ids):
        ids, origins = ids.take(pa.array(selected)), origins.take(pa.array(selected))
    return _Bucket(side.entries[part] + selected, side.starts[part] + np.cumsum(good)[selected] - 1, ids, origins)


def match_bucket(run: Store, old: Side, new: Side, carried: np.ndarray, bucket: int, buckets: int) -> None:
    """Compare the ids of one bucket: write what becomes of last night's entries in files that were read again or are gone
    (first batch), and of those read tonight that are not new (second batch)."""
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
        # Where each id of last night stands among those read tonight, and -1 where it does not.
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
    told = np.flatnonzero(verdicts >= 0)
    batches = (
        [np.concatenate(column) for column in known],
        [entries[told], verdicts[told], np.zeros(len(told)), faces[told], photo[told]],  # the row that the face had
    )
    run.write_arrow(name, MATCHES_SCHEMA, [_batch(columns, MATCHES_SCHEMA) for columns in batches])


def _batch(columns: Sequence[np.ndarray], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [pa.array(c.astype(f.type.to_pandas_dtype())) for c, f in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)


def _read_matches(run: Store, buckets: int, which: int, begin: int, end: int) -> list[np.ndarray]:
    """[entries from `begin`, verdicts, files, rows] of the entries begin <= e < end, over all buckets, ascending."""
    results = [run.read_batch(layout.matches(bucket), which) for bucket in range(buckets)]
    columns = [np.concatenate([batch.column(c).to_numpy() for batch in results]) for c in range(len(MATCHES_SCHEMA))]
    selected = (columns[0] >= begin) & (columns[0] < end)
    order = np.argsort(columns[0][selected], kind="stable")
    return [columns[0][selected][order] - begin, *(column[selected][order] for column in columns[1:])]


def carry_part(run: Store, old: Side, part: int, source: range, carried: np.ndarray, dim: int, buckets: int) -> PlacedPart:
    """Write what is left of these parts of last night, as one; where that is all of a single one, its files are shared, not
    copied."""
    past, first_entry, first_row = old.run, old.entries[source.start], old.starts[source.start]
    ids = pa.concat_arrays([read_ids(past, item) for item in source])
    quarantined = _joined([_moved(read_quarantined(past, item), old.entries[item] - first_entry) for item in source])
    origins = _joined([past.read_batch(layout.part("origins", item)) for item in source])
    files, rows = carried[origins.column("file").to_numpy()].copy(), origins.column("row").to_numpy().copy()
    entry, verdict, new_files, new_rows, new_photos = _read_matches(run, buckets, 0, first_entry, first_entry + len(ids))
    stayed = verdict == KEPT
    photos = origins.column("photo").to_numpy().copy()
    files[entry[stayed]], rows[entry[stayed]], photos[entry[stayed]] = new_files[stayed], new_rows[stayed], new_photos[stayed]
    kept = files >= 0
    good = good_entries(quarantined, len(ids))
    names = {kind: layout.part(kind, part) for kind in ("vectors", "ids", "quarantined", "origins", "past")}
    sizes: dict[str, int] = {}
    faces = kept[good]
    if kept.all() and len(source) == 1:
        for kind in ("vectors", "ids", "quarantined"):
            sizes[names[kind]] = run.share(past, layout.part(kind, source.start), names[kind])
    else:
        vectors = np.empty((int(faces.sum()), dim), np.float32)
        done = 0
        for item in source:
            selected = np.flatnonzero(faces[old.starts[item] - first_row : old.starts[item + 1] - first_row])
            np.take(read_vectors(past, item, dim), selected, axis=0, out=vectors[done : done + len(selected)], mode="clip")
            done += len(selected)
        sizes |= reading.write_faces(run, part, dim, vectors, ids.filter(pa.array(kept)), _left(quarantined, kept))
    columns = [files[kept], rows[kept], origins.column("hash").to_numpy()[kept], photos[kept]]
    _write(run, names["origins"], ORIGINS_SCHEMA, columns, sizes)
    row_before = (first_row + np.flatnonzero(faces)).astype(np.int32)
    _write(run, names["past"], PAST_SCHEMA, [row_before, row_before], sizes)
    return PlacedPart(sizes, int(faces.sum()), int(kept.sum()), 0, reading.tally_of(_left(quarantined, kept)))


def place_part(
    run: Store, staging: Store, part: int, first_entry: int, number: int, paths: Mapping[int, str], dim: int, buckets: int
) -> PlacedPart:
    """Write the new faces of one part that was read tonight."""
    ids, quarantined = read_ids(staging, part), read_quarantined(staging, part)
    origins = staging.read_batch(layout.part("origins", part))
    entry, verdict, _, row_before, _ = _read_matches(run, buckets, 1, first_entry, first_entry + len(ids))
    kept, good = np.ones(len(ids), bool), good_entries(quarantined, len(ids))
    kept[entry[verdict == DROPPED]] = False
    repeated = entry[verdict == REPEATED]
    if len(repeated):
        quarantined = _with_repeated(quarantined, repeated, origins.take(pa.array(repeated)), paths)
    faces = kept[good]
    faces[np.searchsorted(np.flatnonzero(good), repeated)] = False
    names = {kind: layout.part(kind, number) for kind in ("origins", "past")}
    left = _left(quarantined, kept)
    vectors = read_vectors(staging, part, dim)[faces]
    sizes = reading.write_faces(run, number, dim, vectors, ids.filter(pa.array(kept)), left)
    _write(run, names["origins"], ORIGINS_SCHEMA, [c.to_numpy()[kept] for c in origins.columns], sizes)
    was = np.full(len(ids), -1, np.int32)
    was[entry[verdict == CHANGED]] = row_before[verdict == CHANGED]
    was = was[good][faces]
    _write(run, names["past"], PAST_SCHEMA, [np.full(len(was), -1, np.int32), was], sizes)
    changed = int((verdict == CHANGED).sum())
    return PlacedPart(sizes, int(faces.sum()), int(kept.sum()), changed, reading.tally_of(left))


def _with_repeated(
    quarantined: pa.RecordBatch, repeated: np.ndarray, origins: pa.RecordBatch, paths: Mapping[int, str]
) -> pa.RecordBatch:
    """The quarantined rows of a part with these entries, whose ids other files hold, among them."""
    count, reason = len(repeated), row_checks.REASONS[row_checks.REPEATED]
    files = [paths[number] for number in origins.column("file").to_pylist()]
    more = [repeated, [row_checks.REPEATED] * count, files, origins.column("row").to_numpy(), [reason] * count]
    batch = pa.record_batch(
        [pa.array(c, f.type) for c, f in zip(more, QUARANTINED_SCHEMA, strict=True)], schema=QUARANTINED_SCHEMA
    )
    return pa.Table.from_batches([quarantined, batch]).sort_by("position").combine_chunks().to_batches()[0]


def _moved(quarantined: pa.RecordBatch, by: int) -> pa.RecordBatch:
    """Quarantined rows whose positions count from so many entries earlier."""
    position = pa.array((quarantined.column("position").to_numpy() + by).astype(np.int32))
    return pa.record_batch([position, *quarantined.columns[1:]], schema=QUARANTINED_SCHEMA)


def _joined(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    columns = [pa.concat_arrays(column) for column in zip(*(batch.columns for batch in batches), strict=True)]
    return pa.record_batch(columns, schema=batches[0].schema)


def _left(quarantined: pa.RecordBatch, kept: np.ndarray) -> pa.RecordBatch:
    """The quarantined rows among the entries that are kept, by their new positions."""
    position = quarantined.column("position").to_numpy()
    target = kept[position]
    moved = (np.cumsum(kept) - 1)[position[target]].astype(np.int32)
    rest = quarantined.filter(pa.array(target))
    return pa.record_batch([pa.array(moved), *rest.columns[1:]], schema=QUARANTINED_SCHEMA)


def _write(run: Store, name: str, schema: pa.Schema, columns: Sequence[np.ndarray], sizes: dict[str, int]) -> None:
    sizes[name] = run.write_arrow(name, schema, [pa.record_batch([pa.array(c) for c in columns], schema=schema)])
