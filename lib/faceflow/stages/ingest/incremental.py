"""Incremental ingest: only new and changed files are read; rows that are still there keep their parts, in their order.

Rows are numbered by when they first came: the base run's, less those that are gone, then the new ones. Small parts, as
incremental runs leave them, become one now and then.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from faceflow import __version__
from faceflow.errors import InputError
from faceflow.logs import event
from faceflow.stages.artifacts.faces import good_entries, read_ids, read_quarantined, read_vectors
from faceflow.stages.base import BaseRun, Context, Outcome, merge_sizes
from faceflow.stages.ingest import part_writer, row_checks
from faceflow.stages.ingest.id_checks import buckets_for
from faceflow.stages.ingest.matching import (
    CHANGED,
    DROPPED,
    KEPT,
    REPEATED,
    MatchBucket,
    Side,
    match_bucket,
    read_matches,
)
from faceflow.stages.ingest.parquet_input import IdTypes, part_faces
from faceflow.stages.ingest.reading import check_bad_rows, id_bytes_of, read_files
from faceflow.stages.results import IngestResult, RowChanges
from faceflow.storage import column_types, layout
from faceflow.storage.inputs import Listing
from faceflow.storage.object_store import Store
from faceflow.tables import BASE_ROWS_SCHEMA, MAX_FACES, ORIGINS_SCHEMA, QUARANTINED_SCHEMA, ROWS_NOW_SCHEMA, Parts

log = logging.getLogger("faceflow")

READ_BY = ("id_column", "embedding_column", "exclusive_column", "bad_rows", "version of faceflow")
"""Settings without which an unchanged file would not be read the same."""

MOST_SMALL = 8
"""As soon as there are so many parts of less than half of what is wanted with another such beside them, neighbors become one:
parts stay few however many incremental runs pass, and faces are copied now and then, not every time."""


@dataclass(frozen=True)
class FileChanges:
    """Files of the input by their numbers, against the base run's. read: paths of those to read; carried: int32[base files], by
    the base run's numbers, this run's, or -1 where a file is gone or is read again; same, new, again, gone: how many."""

    read: Mapping[str, int]
    carried: np.ndarray
    same: int
    new: int
    again: int
    gone: int


def compare_files(context: Context, base: BaseRun, listing: Listing) -> FileChanges:
    """Which files are as the base run read them. All are read again where a setting of reading differs."""
    before = base.results.manifests["ingest"].fingerprint
    known = before["input_files"]
    assert isinstance(known, dict)
    numbers = {f.path: i for i, f in enumerate(listing.files)}
    same = {f.path for f in listing.files if known.get(f.path) == f.state}
    now = {**context.config.public(), "version of faceflow": __version__}
    other = next((key for key in READ_BY if before[key] != now[key]), None)
    if other is not None:
        log.info("changes  every file is read again: %s was %s, is %s", other, before[other], now[other])
    if context.config.verify_content or other is not None:
        same = set()
    read = {path: number for path, number in numbers.items() if path not in same}
    carried = np.array([numbers[path] if path in same else -1 for path in known], np.int32)
    again = sum(path in known for path in read)
    gone = sum(path not in numbers for path in known)
    return FileChanges(read, carried, len(same), len(read) - again, again, gone)


def run(context: Context, base: BaseRun, listing: Listing) -> Outcome[IngestResult]:
    """Compare the files, read those that differ, tell new faces from known ones, and carry over the rest."""
    executor, stores = context.executor, context.stores
    files = compare_files(context, base, listing)
    log.info(
        "changes  files: %d unchanged, %d new, %d read again, %d gone", files.same, files.new, files.again, files.gone,
        extra=event("changes", same=files.same, new=files.new, read_again=files.again, gone=files.gone),
    )  # fmt: skip
    before = base.results.ingest
    staging = stores.run.child(layout.NEW_FILES)
    types = IdTypes(read_ids(base.store, 0).type, column_types.type_of(before.id_type))
    read = read_files(context, listing.store, files.read, staging, before.dim, types)
    old, new = Side(base.store, before.entries, before.starts), Side(staging, read.entries, read.starts)
    buckets = buckets_for(old.entries[-1] + new.entries[-1], before.id_bytes + read.id_bytes)
    executor.map(
        match_bucket, [MatchBucket(stores.run, old, new, files.carried, b, buckets) for b in range(buckets)], "match"
    )  # fmt: skip
    known = before.parts
    bounds = compact([known.rows(p) for p in range(len(known))], part_faces(known.faces, read.dim))
    sources = [range(*pair) for pair in itertools.pairwise(bounds)]
    carried = executor.map(
        carry_part,
        [
            CarryPart(stores.run, old, part, source, files.carried, read.dim, buckets)
            for part, source in enumerate(sources)
        ],
        "carry",
        sizes=[old.starts[source.stop] - old.starts[source.start] for source in sources],
    )  # fmt: skip
    paths = {number: path for path, number in files.read.items()}
    added = executor.map(
        place_part,
        [
            PlacePart(stores.run, staging, p, new.entries[p], len(sources) + p, paths, read.dim, buckets)
            for p in range(len(new.entries) - 1)
        ],
        "place",
    )
    placed = [*carried, *added]
    bad = row_checks.Tally()
    for part in placed:
        bad.include(part.quarantined)
    check_bad_rows(context, bad, sum(part.entries for part in placed))
    faces = [part.faces for part in placed]
    if sum(faces) > MAX_FACES:
        raise InputError(f"input {context.config.input} has {sum(faces)} faces; at most {MAX_FACES} are supported in one run")
    if sum(faces) == 0:
        raise InputError(f"input {context.config.input} has no face left in its {len(listing.files)} Parquet file(s)")
    kept, changed = sum(part.faces for part in carried), sum(part.changed for part in added)
    parts = Parts(tuple(np.cumsum([0, *faces]).tolist()))
    sizes = executor.call(write_rows_now, WriteRowsNow(stores.run, known.faces, parts, len(sources)), "rows")
    result = IngestResult(
        faces=parts.faces, quarantined=sum(part.entries - part.faces for part in placed), dim=read.dim,
        files=len(listing.files), starts=parts.starts,
        entries=tuple(np.cumsum([0, *(part.entries for part in placed)]).tolist()),
        id_type=column_types.name_of(read.ids.published),
        id_bytes=id_bytes_of(merge_sizes([part.sizes for part in placed])), input_snapshot=listing.snapshot,
        changes=RowChanges(parts.faces - kept - changed, changed, known.faces - kept - changed, tuple(bounds)),
    )  # fmt: skip
    return Outcome(result, merge_sizes([sizes, *(part.sizes for part in placed)]))


def compact(rows: Sequence[int], wanted: int) -> list[int]:
    """Where to cut the base run's parts, of so many rows each, into this run's: bounds of the parts that become one, from 0 to
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


@dataclass(frozen=True)
class WriteRowsNow:
    """Request: this run's row of each of the base run's faces; carried: parts that hold any, the first so many."""

    run: Store
    base_faces: int
    parts: Parts
    carried: int


def write_rows_now(request: WriteRowsNow) -> dict[str, int]:
    """Write this run's row of every face of the base run; returns the file's bytes."""
    rows = np.full(request.base_faces, -1, np.int32)
    for part in range(request.carried):
        before = request.run.read_batch(layout.part("base_rows", part)).column(0).to_numpy()
        rows[before] = np.arange(request.parts.starts[part], request.parts.starts[part + 1])
    sizes: dict[str, int] = {}
    _write(request.run, layout.ROWS_NOW, ROWS_NOW_SCHEMA, [rows], sizes)
    return sizes


@dataclass(frozen=True)
class PlacedPart:
    """One part of this run: bytes of its files, faces, entries (quarantined rows included), changed faces, and the tally of
    quarantined rows."""

    sizes: dict[str, int]
    faces: int
    entries: int
    changed: int
    quarantined: row_checks.Tally


@dataclass(frozen=True)
class CarryPart:
    """Request: the part that these base parts become. carried: as in `matching.MatchBucket`."""

    run: Store
    old: Side
    part: int
    source: range
    carried: np.ndarray
    dim: int
    buckets: int


def carry_part(request: CarryPart) -> PlacedPart:
    """Write what is left of these base parts, as one; where that is all of a single one, its files are shared, not copied."""
    run, old, part, source = request.run, request.old, request.part, request.source
    carried, dim, buckets = request.carried, request.dim, request.buckets
    base, first_entry, first_row = old.run, old.entries[source.start], old.starts[source.start]
    ids = pa.concat_arrays([read_ids(base, item) for item in source])
    quarantined = _joined([_moved(read_quarantined(base, item), old.entries[item] - first_entry) for item in source])
    origins = _joined([base.read_batch(layout.part("origins", item)) for item in source])
    files, rows = carried[origins.column("file").to_numpy()].copy(), origins.column("row").to_numpy().copy()
    entry, verdict, new_files, new_rows, new_photos = read_matches(run, buckets, 0, first_entry, first_entry + len(ids))
    stayed = verdict == KEPT
    photos = origins.column("photo").to_numpy().copy()
    files[entry[stayed]], rows[entry[stayed]], photos[entry[stayed]] = new_files[stayed], new_rows[stayed], new_photos[stayed]
    kept = files >= 0
    good = good_entries(quarantined, len(ids))
    names = {kind: layout.part(kind, part) for kind in ("vectors", "ids", "quarantined", "origins", "base_rows")}
    sizes: dict[str, int] = {}
    faces = kept[good]
    if kept.all() and len(source) == 1:
        for kind in ("vectors", "ids", "quarantined"):
            sizes[names[kind]] = run.share(base, layout.part(kind, source.start), names[kind])
    else:
        vectors = np.empty((int(faces.sum()), dim), np.float32)
        done = 0
        for item in source:
            selected = np.flatnonzero(faces[old.starts[item] - first_row : old.starts[item + 1] - first_row])
            np.take(read_vectors(base, item, dim), selected, axis=0, out=vectors[done : done + len(selected)], mode="clip")
            done += len(selected)
        sizes |= part_writer.write_faces(run, part, dim, vectors, ids.filter(pa.array(kept)), _left(quarantined, kept))
    columns = [files[kept], rows[kept], origins.column("hash").to_numpy()[kept], photos[kept]]
    _write(run, names["origins"], ORIGINS_SCHEMA, columns, sizes)
    row_before = (first_row + np.flatnonzero(faces)).astype(np.int32)
    _write(run, names["base_rows"], BASE_ROWS_SCHEMA, [row_before, row_before], sizes)
    return PlacedPart(sizes, int(faces.sum()), int(kept.sum()), 0, part_writer.tally_of(_left(quarantined, kept)))


@dataclass(frozen=True)
class PlacePart:
    """Request: the new and changed faces of one part that was read now. read: the files' run directory; number: of the part in
    this run; paths: of the files, by their numbers."""

    run: Store
    read: Store
    part: int
    first_entry: int
    number: int
    paths: Mapping[int, str]
    dim: int
    buckets: int


def place_part(request: PlacePart) -> PlacedPart:
    """Write the new and changed faces of one part that was read now."""
    run, staging, part, number = request.run, request.read, request.part, request.number
    first_entry, dim, buckets = request.first_entry, request.dim, request.buckets
    ids, quarantined = read_ids(staging, part), read_quarantined(staging, part)
    origins = staging.read_batch(layout.part("origins", part))
    entry, verdict, _, row_before, _ = read_matches(run, buckets, 1, first_entry, first_entry + len(ids))
    kept, good = np.ones(len(ids), bool), good_entries(quarantined, len(ids))
    kept[entry[verdict == DROPPED]] = False
    repeated = entry[verdict == REPEATED]
    if len(repeated):
        quarantined = _with_repeated(quarantined, repeated, origins.take(pa.array(repeated)), request.paths)
    faces = kept[good]
    faces[np.searchsorted(np.flatnonzero(good), repeated)] = False
    names = {kind: layout.part(kind, number) for kind in ("origins", "base_rows")}
    left = _left(quarantined, kept)
    vectors = read_vectors(staging, part, dim)[faces]
    sizes = part_writer.write_faces(run, number, dim, vectors, ids.filter(pa.array(kept)), left)
    _write(run, names["origins"], ORIGINS_SCHEMA, [c.to_numpy()[kept] for c in origins.columns], sizes)
    was = np.full(len(ids), -1, np.int32)
    was[entry[verdict == CHANGED]] = row_before[verdict == CHANGED]
    was = was[good][faces]
    _write(run, names["base_rows"], BASE_ROWS_SCHEMA, [np.full(len(was), -1, np.int32), was], sizes)
    changed = int((verdict == CHANGED).sum())
    return PlacedPart(sizes, int(faces.sum()), int(kept.sum()), changed, part_writer.tally_of(left))


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
