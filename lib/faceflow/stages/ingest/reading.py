"""Reading files: rows are read, checked and written as parts; bad rows and repeated ids are quarantined."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from faceflow.cluster.executor import Executor
from faceflow.config import ClusterConfig
from faceflow.errors import InputError, one_line
from faceflow.stages import constraints_file
from faceflow.stages.artifacts.faces import read_ids
from faceflow.stages.base import Context, merge_sizes
from faceflow.stages.ingest import row_checks
from faceflow.stages.ingest.id_checks import (
    FindRepeated,
    GatherIds,
    buckets_for,
    find_repeated,
    gather_ids,
    hashes_of,
    repeated_rows,
)
from faceflow.stages.ingest.parquet_input import (
    Columns,
    FirstDimension,
    Footer,
    IdTypes,
    IngestTask,
    ReadFooters,
    check_dimensions,
    common_id_types,
    first_dimension,
    part_faces,
    plan_tasks,
    read_batches,
    read_footers,
)
from faceflow.stages.ingest.part_writer import Batch, PartWriter
from faceflow.storage import layout
from faceflow.storage.object_store import Store
from faceflow.tables import MAX_FACES

log = logging.getLogger("faceflow")

FOOTERS_PER_TASK = 16


@dataclass(frozen=True)
class FilesRead:
    """What was read: dimension, starts of the parts by faces and by entries (quarantined rows included), bytes of each file
    written, the rows that cannot be used, the ids' types, and bytes of all ids."""

    dim: int
    starts: tuple[int, ...]
    entries: tuple[int, ...]
    sizes: Mapping[str, int]
    bad: row_checks.Tally
    ids: IdTypes
    id_bytes: int


def id_bytes_of(sizes: Mapping[str, int]) -> int:
    """Bytes of the ids of all parts, from the bytes of their files."""
    return sum(size for name, size in sizes.items() if name.startswith("ids/"))


def columns_of(config: ClusterConfig) -> Columns:
    """The columns that a run reads; the ids' storage type is not known yet."""
    return Columns(config.id_column, config.embedding_column, config.exclusive_column)


def all_footers(executor: Executor, store: Store, paths: Sequence[str], names: Columns) -> list[Footer]:
    """The footers of all files that have rows, read in parallel. Raises InputError as `read_footers`."""
    groups = [tuple(paths[i : i + FOOTERS_PER_TASK]) for i in range(0, len(paths), FOOTERS_PER_TASK)]
    footers = executor.map(read_footers, [ReadFooters(store, group, names) for group in groups], "footers")
    return list(itertools.chain.from_iterable(footers))


def dimension_of(executor: Executor, store: Store, footers: Sequence[Footer], embedding_column: str) -> int:
    """The embeddings' dimension: of the first type that fixes it, else of the first embedding."""
    check_dimensions(footers)
    fixed = next((footer.dim for footer in footers if footer.dim), None)
    paths = tuple(footer.path for footer in footers)
    return fixed or executor.call(first_dimension, FirstDimension(store, paths, embedding_column), "dimension")


def read_files(
    context: Context, store: Store, files: Mapping[str, int], run: Store, dim: int | None = None, base: IdTypes | None = None
) -> FilesRead:
    """Read, check and write these files, in the order given, each with its number among the run's input files.

    run: where the parts go; dim: what the embeddings must have; base: the types of the ids in the base run.
    """
    config, executor = context.config, context.executor
    footers = all_footers(executor, store, list(files), columns_of(config))
    types = common_id_types(footers, base)
    check_dimensions(footers)
    if config.constraints is not None and footers:
        constraints_file.read(config.constraints, config.storage_options, types.stored)
    rows = sum(sum(footer.group_rows) for footer in footers)
    if rows == 0:
        if dim is None:
            raise InputError(f"input {config.input} has no rows in its {len(files)} Parquet file(s)")
        return FilesRead(dim, (0,), (0,), {}, row_checks.Tally(), types, 0)
    if rows > MAX_FACES:
        raise InputError(f"input {config.input} has {rows} rows; at most {MAX_FACES} are supported in one run")
    dim = dim or dimension_of(executor, store, footers, config.embedding_column)
    names = Columns(config.id_column, config.embedding_column, config.exclusive_column, types.stored)
    tasks = plan_tasks(footers, part_faces(rows, dim))
    id_bytes = sum(footer.id_bytes for footer in footers)
    buckets = buckets_for(rows, id_bytes)
    executor.map(gather_ids, [GatherIds(i, task, store, run, names, buckets) for i, task in enumerate(tasks)], "ids")
    executor.map(find_repeated, [FindRepeated(run, len(tasks), bucket) for bucket in range(buckets)], "repeats")
    results = executor.map(
        ingest_rows,
        [
            IngestRows(task, tuple(files[path] for path, _, _ in task.spans), store, run, names, dim, buckets)
            for task in tasks
        ],
        "ingest",
        sizes=[task.starts[-1] - task.starts[0] for task in tasks],
    )  # fmt: skip
    bad = row_checks.Tally()
    for result in results:
        bad.include(result.quarantined)
    kept = [faces for result in results for faces in result.kept]
    entries = (0, *(start for task in tasks for start in task.starts[1:]))
    types = _wide_enough(context, run, types, footers, len(kept))
    sizes = merge_sizes([result.sizes for result in results])
    return FilesRead(dim, tuple(np.cumsum([0, *kept]).tolist()), entries, sizes, bad, types, id_bytes)


def _wide_enough(context: Context, run: Store, types: IdTypes, footers: Sequence[Footer], parts: int) -> IdTypes:
    """The types with a published integer type that holds every id of these parts: the storage type where it is too narrow."""
    kind = types.published
    if not pa.types.is_integer(kind) or all(f.id_type == kind or pa.types.is_null(f.id_type) for f in footers):
        return types
    ranges = context.executor.map(id_range, [IdRange(run, part) for part in range(parts)], "ids")
    known = [pair for pair in ranges if pair is not None]
    limits = np.iinfo(kind.to_pandas_dtype())
    if all(limits.min <= low and high <= limits.max for low, high in known):
        return types
    log.warning("ids are published as %s: some do not fit into %s, the first file's type", types.stored, kind)
    return IdTypes(types.stored, types.stored)


@dataclass(frozen=True)
class IdRange:
    """Request: the range of one part's integer ids."""

    run: Store
    part: int


def id_range(request: IdRange) -> tuple[int, int] | None:
    """(smallest, largest) integer id of a part; None where it has none."""
    limits = pc.min_max(read_ids(request.run, request.part)).as_py()
    return None if limits["min"] is None else (limits["min"], limits["max"])


def check_bad_rows(context: Context, bad: row_checks.Tally, rows: int) -> None:
    """Raise InputError where bad rows are not, or no longer, acceptable; else say which rows are quarantined."""
    config = context.config
    if bad.total == 0:
        return
    listed = f"{bad.total:,} of {rows:,} rows cannot be used:\n  {bad.text()}"
    if config.bad_rows == "fail":
        raise InputError(f"{listed}\nFix or remove them, or pass --bad-rows quarantine; nothing was published")
    if bad.total == rows:
        raise InputError(f"{listed}\nNo usable row is left; nothing was published")
    if bad.total > config.max_bad_fraction * rows:
        raise InputError(
            f"{listed}\nThat is {bad.total / rows:.2%}, more than --max-bad-fraction {config.max_bad_fraction:.2%}; "
            "nothing was published"
        )
    folder = layout.quarantined_folder(context.stores.run_id)
    log.warning("%s\n  They are quarantined: no cluster, and one line each in %s", listed, folder)


@dataclass(frozen=True)
class IngestRows:
    """Request: the parts of one task; files: the number of each of its spans' files."""

    task: IngestTask
    files: tuple[int, ...]
    source: Store
    run: Store
    columns: Columns
    dim: int
    buckets: int


@dataclass(frozen=True)
class RowsIngested:
    """Bytes of each file, the faces kept of each part, and the tally of the other rows."""

    sizes: dict[str, int]
    kept: list[int]
    quarantined: row_checks.Tally


def ingest_rows(request: IngestRows) -> RowsIngested:
    """Write the vectors, ids, quarantined rows and origins of one task's parts."""
    task, run = request.task, request.run
    parts = [PartWriter(run, task, i, request.dim) for i in range(len(task.starts) - 1)]
    if not all(part.is_whole for part in parts):
        _write_parts(request, parts)
    tally = row_checks.Tally()
    sizes: dict[str, int] = {}
    faces = []
    for part in parts:
        written = part.written()
        sizes |= written.sizes
        tally.include(written.quarantined)
        faces.append(written.kept)
    return RowsIngested(sizes, faces, tally)


def _write_parts(request: IngestRows, parts: Sequence[PartWriter]) -> None:
    task, names = request.task, request.columns
    again = repeated_rows(request.run, request.buckets, task.starts[0], task.starts[-1])
    position, at = task.starts[0], 0
    numbers = {path: number for (path, _, _), number in zip(task.spans, request.files, strict=True)}
    wanted = [*dict.fromkeys(filter(None, (names.id, names.embedding, names.exclusive)))]
    for path, first, batch in read_batches(task, request.source, wanted):
        ids, not_text = names.ids(batch, path, first)
        verdicts, lengths, x = row_checks.check_batch(ids, not_text, names.embeddings(batch), request.dim)
        repeats = again[(again >= position) & (again < position + len(ids))] - position
        repeats = repeats[verdicts[repeats] == row_checks.GOOD]
        if len(repeats):
            x = np.delete(x, np.searchsorted(np.flatnonzero(verdicts == row_checks.GOOD), repeats), axis=0)
            verdicts[repeats] = row_checks.REPEATED
        photos = hashes_of(names.exclusives(batch), len(ids))
        checked = Batch(ids, verdicts, lengths, x, path, numbers[path], first, photos)
        done = 0
        while done < len(ids):
            if at == len(parts):
                raise InputError(f"{one_line(path)} holds more rows than its footer says: it was changed while being read")
            count = min(len(ids) - done, parts[at].room)
            parts[at].add(checked.slice(done, count))
            done += count
            if parts[at].room == 0:
                parts[at].close()
                at += 1
        position += len(ids)
    if at != len(parts):
        raise InputError(
            f"{one_line(task.spans[-1][0])} holds fewer rows than its footer says: it is damaged or was changed while being "
            "read"
        )
