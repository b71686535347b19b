"""Taking files in: rows are read, checked and written as parts, bad rows and repeated ids found."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from faceflow.cluster.executor import chunks
from faceflow.errors import InputError, one_line
from faceflow.kernels.clusters.naming import buckets_of_integers, buckets_of_texts, hash_integers, hash_texts
from faceflow.kernels.knn.vectors import hash_rows
from faceflow.stages import constraints_file
from faceflow.stages.artifacts.faces import read_ids
from faceflow.stages.base import Context, merge_sizes
from faceflow.stages.ingest import row_checks
from faceflow.stages.ingest.parquet_input import (
    Columns,
    Footer,
    IdTypes,
    IngestTask,
    check_dimensions,
    first_dimension,
    part_faces,
    plan_tasks,
    read_batches,
    read_footers,
    settle_ids,
)
from faceflow.storage import columns, layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import IDS_CHECKED_SCHEMA, MAX_FACES, ORIGINS_SCHEMA, QUARANTINED_SCHEMA, vectors_schema

log = logging.getLogger("faceflow")

FOOTERS_PER_TASK = 16

BUCKET_IDS, BUCKET_BYTES = 2_000_000, 256 * 2**20
"""Ids that one task compares for repeats, and bytes of them, at most: some 200 MB of short ids, three times the bytes of long
ones (signed URLs)."""


@dataclass(frozen=True)
class Taken:
    """What was read: dimension, starts of the parts by faces and by entries (quarantined rows included), bytes of each file
    written, the rows that cannot be used, the ids' types, and bytes of all ids."""

    dim: int
    starts: tuple[int, ...]
    entries: tuple[int, ...]
    sizes: dict[str, int]
    bad: row_checks.Tally
    ids: IdTypes
    id_bytes: int


def id_bytes_of(sizes: Mapping[str, int]) -> int:
    """Bytes of the ids of all parts, from the bytes of their files."""
    return sum(size for name, size in sizes.items() if name.startswith("ids/"))


def buckets_for(ids: int, id_bytes: int) -> int:
    """Buckets to compare so many ids in, of so many bytes together."""
    return max(1, -(-ids // BUCKET_IDS), -(-id_bytes // BUCKET_BYTES))


def take_in(
    context: Context, store: Store, files: Mapping[str, int], run: Store, dim: int | None = None, past: IdTypes | None = None
) -> Taken:
    """Read, check and write these files, in the order given, each with its number among the run's input files; `run` is where
    the parts go; dim: what the embeddings must have, past: the types that the ids had in the run before, if these are known."""
    config, executor = context.config, context.executor
    names = (config.id_column, config.embedding_column, config.exclusive_column)
    groups = list(chunks(list(files), FOOTERS_PER_TASK))
    footers: list[Footer] = [
        footer
        for collected in executor.map(read_footers, [(store, tuple(group), *names) for group in groups], "footers")
        for footer in collected
    ]
    types = settle_ids(footers, past)
    check_dimensions(footers)
    if config.constraints is not None and footers:
        constraints_file.read(config.constraints, config.storage_options, types.stored)
    rows = sum(sum(footer.group_rows) for footer in footers)
    if rows == 0:
        if dim is None:
            raise InputError(f"input {config.input} has no rows in its {len(files)} Parquet file(s)")
        return Taken(dim, (0,), (0,), {}, row_checks.Tally(), types, 0)
    if rows > MAX_FACES:
        raise InputError(f"input {config.input} has {rows} rows; at most {MAX_FACES} are supported in one run")
    dim = (
        dim
        or next((f.dim for f in footers if f.dim), None)
        or executor.call(first_dimension, store, tuple(f.path for f in footers), config.embedding_column, label="probe")
    )
    chosen = Columns(*names, types.stored)
    tasks = plan_tasks(footers, part_faces(rows, dim))
    numbers = [tuple(files[path] for path, _, _ in task.spans) for task in tasks]
    id_bytes = sum(footer.id_bytes for footer in footers)
    buckets = buckets_for(rows, id_bytes)
    executor.map(gather_ids, [(i, task, store, run, chosen, buckets) for i, task in enumerate(tasks)], "ids")
    executor.map(find_repeated, [(run, len(tasks), bucket) for bucket in range(buckets)], "repeats")
    results = executor.map(
        ingest_rows,
        [(task, number, store, run, chosen, dim, buckets) for task, number in zip(tasks, numbers, strict=True)],
        "ingest",
        sizes=[task.starts[-1] - task.starts[0] for task in tasks],
    )
    bad = row_checks.Tally()
    for _, _, tally in results:
        bad.include(tally)
    kept = [faces for _, counts, _ in results for faces in counts]
    entries = (0, *(start for task in tasks for start in task.starts[1:]))
    sizes = merge_sizes([sizes for sizes, _, _ in results])
    types = _wide_enough(context, run, types, footers, len(kept))
    return Taken(dim, tuple(np.cumsum([0, *kept]).tolist()), entries, sizes, bad, types, id_bytes)


def _wide_enough(context: Context, run: Store, types: IdTypes, footers: Sequence[Footer], parts: int) -> IdTypes:
    """The types with a published integer type that holds every id of these parts: the storage type where it is too narrow."""
    kind = types.published
    if not pa.types.is_integer(kind) or all(f.id_type == kind or pa.types.is_null(f.id_type) for f in footers):
        return types
    ranges = context.executor.map(id_range, [(run, part) for part in range(parts)], "ids")
    known = [pair for pair in ranges if pair is not None]
    limits = np.iinfo(kind.to_pandas_dtype())
    if all(limits.min <= low and high <= limits.max for low, high in known):
        return types
    log.warning("ids are published as %s: some do not fit into %s, as the first file has them", types.stored, kind)
    return IdTypes(types.stored, types.stored)


def id_range(run: Store, part: int) -> tuple[int, int] | None:
    """(smallest, largest) integer id of a part; None where it has none."""
    collected = pc.min_max(read_ids(run, part)).as_py()
    return None if collected["min"] is None else (collected["min"], collected["max"])


def judge(context: Context, bad: row_checks.Tally, rows: int) -> None:
    """Raise InputError where bad rows are not, or no longer, acceptable."""
    config = context.config
    if bad.total == 0:
        return
    said = f"{bad.total:,} of {rows:,} rows cannot be used:\n  {bad.text()}"
    if config.bad_rows == "fail":
        raise InputError(f"{said}\nmend or remove them, or set them aside with --bad-rows quarantine; nothing was published")
    if bad.total == rows:
        raise InputError(f"{said}\nno face is left; nothing was published")
    if bad.total > config.max_bad_fraction * rows:
        raise InputError(
            f"{said}\nthat is {bad.total / rows:.2%}, more than --max-bad-fraction {config.max_bad_fraction:.2%}; "
            "nothing was published"
        )
    log.warning(
        "%s\n  they are set aside: no cluster, and a line each in %s", said, layout.quarantined_folder(context.stores.run_id)
    )


def gather_ids(index: int, task: IngestTask, source: Store, run: Store, names: Columns, buckets: int) -> None:
    """Write one task's ids with their input rows, one record batch a bucket: equal ids meet in one bucket."""
    name = layout.gathered_ids(index)
    if is_whole(run, name):
        return
    ids = pa.concat_arrays([names.ids(batch, path, row)[0] for path, row, batch in read_batches(task, source, [names.id])])
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
    texts = values.fill_null(pa.scalar("" if values.type == columns.TEXT else b"", values.type))
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1], data


def _hashes(values: pa.Array | None, rows: int) -> np.ndarray:
    """uint64[rows]: a hash of each row's value (in its storage type), 0 for a null or where there is no such column."""
    if values is None:
        return np.zeros(rows, np.uint64)
    if pa.types.is_integer(values.type):
        collected = hash_integers(values.fill_null(0).to_numpy(zero_copy_only=False))
    else:
        collected = hash_texts(*_texts(values))
    collected[values.is_null().to_numpy(zero_copy_only=False)] = 0
    return collected


def find_repeated(run: Store, tasks: int, bucket: int) -> None:
    """Write the input rows of one bucket whose id stands in an earlier row, ascending."""
    name = layout.repeated_ids(bucket)
    if is_whole(run, name):
        return
    batches = [run.read_batch(layout.gathered_ids(task), bucket) for task in range(tasks)]
    ids = pa.concat_arrays([batch.column(0) for batch in batches])
    rows = np.concatenate([batch.column(1).to_numpy() for batch in batches])
    again = rows[row_checks.repeated(ids)]
    run.write_arrow(name, IDS_CHECKED_SCHEMA, [pa.record_batch([pa.array(again)], schema=IDS_CHECKED_SCHEMA)])


def _repeated_rows(run: Store, buckets: int, begin: int, end: int) -> np.ndarray:
    collected = [run.read_batch(layout.repeated_ids(bucket)).column(0).to_numpy() for bucket in range(buckets)]
    return np.concatenate([rows[(rows >= begin) & (rows < end)] for rows in collected])


def ingest_rows(
    task: IngestTask, files: tuple[int, ...], source: Store, run: Store, names: Columns, dim: int, buckets: int
) -> tuple[dict[str, int], list[int], row_checks.Tally]:
    """Write the vectors, ids, quarantined rows and origins of one task's parts; files: the number of each span's file.

    Returns the bytes of each file, the faces kept of each part, and the tally of the others.
    """
    parts = [PartWriter(run, task, i, dim) for i in range(len(task.starts) - 1)]
    if not all(part.is_whole for part in parts):
        again = _repeated_rows(run, buckets, task.starts[0], task.starts[-1])
        position, at = task.starts[0], 0
        numbers = {path: number for (path, _, _), number in zip(task.spans, files, strict=True)}
        wanted = [*dict.fromkeys(filter(None, (names.id, names.embedding, names.exclusive)))]
        for path, first, batch in read_batches(task, source, wanted):
            ids, not_text = names.ids(batch, path, first)
            verdict, lengths, x = row_checks.check_batch(ids, not_text, names.embeddings(batch), dim)
            photos = _hashes(names.exclusives(batch), len(ids))
            selected = again[(again >= position) & (again < position + len(ids))] - position
            selected = selected[verdict[selected] == row_checks.GOOD]
            if len(selected):
                x = np.delete(x, np.searchsorted(np.flatnonzero(verdict == row_checks.GOOD), selected), axis=0)
                verdict[selected] = row_checks.REPEATED
            done, used = 0, 0
            while done < len(ids):
                if at == len(parts):
                    raise InputError(f"{one_line(path)} holds more rows than its footer says: it was changed while being read")
                take = min(len(ids) - done, parts[at].room)
                kept = int((verdict[done : done + take] == row_checks.GOOD).sum())
                parts[at].add(
                    ids.slice(done, take), verdict[done : done + take], lengths[done : done + take], x[used : used + kept],
                    path, numbers[path], first + done, photos[done : done + take],
                )  # fmt: skip
                done, used = done + take, used + kept
                if parts[at].room == 0:
                    parts[at].close()
                    at += 1
            position += len(ids)
        if at != len(parts):
            raise InputError(
                f"{one_line(task.spans[-1][0])} holds fewer rows than its footer says: it is damaged or was changed while "
                "being read"
            )
    tally = row_checks.Tally()
    sizes: dict[str, int] = {}
    faces = []
    for part in parts:
        written = part.written()
        sizes |= written.sizes
        tally.include(written.quarantined)
        faces.append(written.kept)
    return sizes, faces, tally


@dataclass(frozen=True)
class WrittenPart:
    """What lies on the disk of one part: bytes of each file, faces kept, and the tally of the other rows."""

    sizes: dict[str, int]
    kept: int
    quarantined: row_checks.Tally


class PartWriter:
    """One part in the making: collects its rows, then writes four files."""

    def __init__(self, run: Store, task: IngestTask, index: int, dim: int) -> None:
        number = task.first_part + index
        self._run, self._dim, self._number = run, dim, number
        self._names = [layout.part(kind, number) for kind in ("vectors", "ids", "quarantined", "origins")]
        self._rows = task.starts[index + 1] - task.starts[index]
        self._filled = self._kept = 0
        self._vectors: np.ndarray | None = None
        self._ids: list[pa.Array] = []
        self._origins: list[pa.RecordBatch] = []
        self._quarantined: list[tuple[int, int, str, int, str]] = []

    @property
    def is_whole(self) -> bool:
        return all(is_whole(self._run, name) for name in self._names)

    @property
    def room(self) -> int:
        """Rows that are still to come."""
        return self._rows - self._filled

    def add(
        self, ids: pa.Array, verdict: np.ndarray, lengths: np.ndarray, x: np.ndarray, path: str, number: int, first: int,
        photos: np.ndarray,
    ) -> None:  # fmt: skip
        """Take consecutive rows; x holds the unit vectors of the good ones, number is the file's, first the row in it, photos
        the hashes of their exclusive values."""
        if self._vectors is None:
            self._vectors = np.empty((self._rows, self._dim), np.float32)
        self._vectors[self._kept : self._kept + len(x)] = x
        self._ids.append(ids)
        hashes = np.zeros(len(ids), np.uint64)
        hashes[verdict == row_checks.GOOD] = hash_rows(x)
        origins = [np.full(len(ids), number, np.int32), np.arange(first, first + len(ids)), hashes, photos]
        self._origins.append(pa.record_batch([pa.array(column) for column in origins], schema=ORIGINS_SCHEMA))
        for i in np.flatnonzero(verdict != row_checks.GOOD).tolist():
            reason = row_checks.REASONS[int(verdict[i])].format(length=int(lengths[i]), dim=self._dim)
            self._quarantined.append((self._filled + i, int(verdict[i]), path, first + i, reason))
        self._filled, self._kept = self._filled + len(ids), self._kept + len(x)

    def close(self) -> None:
        """Write the files and let the memory go."""
        assert self._vectors is not None
        columns = zip(*self._quarantined, strict=True) if self._quarantined else [[] for _ in QUARANTINED_SCHEMA]
        arrays = [pa.array(list(values), field.type) for values, field in zip(columns, QUARANTINED_SCHEMA, strict=True)]
        quarantined = pa.record_batch(arrays, schema=QUARANTINED_SCHEMA)
        write_faces(self._run, self._number, self._dim, self._vectors[: self._kept], pa.concat_arrays(self._ids), quarantined)
        origins = pa.Table.from_batches(self._origins).combine_chunks().to_batches()
        self._run.write_arrow(self._names[3], ORIGINS_SCHEMA, origins)
        self._vectors, self._ids, self._quarantined, self._origins = None, [], [], []

    def written(self) -> WrittenPart:
        """The part as its files tell it, whether they were written now or by an earlier attempt."""
        quarantined = self._run.read_batch(self._names[2])
        sizes = {name: self._run.size(name) or 0 for name in self._names}
        return WrittenPart(sizes, self._rows - quarantined.num_rows, tally_of(quarantined))


def write_faces(
    run: Store, part: int, dim: int, vectors: np.ndarray, ids: pa.Array, quarantined: pa.RecordBatch
) -> dict[str, int]:
    """Write the vectors, ids and quarantined rows of one part; returns the bytes of each file."""
    schema, id_schema = vectors_schema(dim), pa.schema([pa.field("id", ids.type)])
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim).cast(schema.field(0).type)
    batches = {
        "vectors": pa.record_batch([column], schema=schema), "ids": pa.record_batch([ids], schema=id_schema),
        "quarantined": quarantined,
    }  # fmt: skip
    names = {kind: layout.part(kind, part) for kind in batches}
    return {names[kind]: run.write_arrow(names[kind], batch.schema, [batch]) for kind, batch in batches.items()}


def tally_of(quarantined: pa.RecordBatch) -> row_checks.Tally:
    """The quarantined rows of a part by reason."""
    tally = row_checks.Tally()
    verdicts = quarantined.column("verdict").to_numpy()
    for verdict in np.unique(verdicts).tolist():
        selected = np.flatnonzero(verdicts == verdict)
        shown = quarantined.take(pa.array(selected[: row_checks.SHOWN])).to_pylist()
        tally.add(verdict, len(selected), [f"{one_line(r['file'])}, row {r['row']}: {r['reason']}" for r in shown])
    return tally
