"""Stage 1, ingest: Parquet -> checked, unit-length vectors and ids, in parts of about 128k faces. Row order is fixed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from faceflow.cluster.executor import chunks
from faceflow.errors import InputError, did_you_mean
from faceflow.kernels.vectors import FINE, NOT_FINITE, normalize_rows
from faceflow.stages.base import Context, Outcome, Stage, merge_pieces
from faceflow.storage import layout
from faceflow.storage.files import FileInfo, Store, explain
from faceflow.storage.inputs import contains, list_parquet, open_input
from faceflow.storage.manifests import is_whole
from faceflow.tables import MAX_FACES, vectors_schema

PART_FACES = 131_072
SMALL_PART = 16_384
PART_BYTES = 512 * 2**20
READ_BATCH = 8_192
"""Rows decoded at once: bounds memory whatever the size of a row group."""

FOOTERS_PER_TASK = 16


@dataclass(frozen=True)
class Footer:
    """What planning needs of one file: rows of each row group, the id's type, the dimension if the type fixes it."""

    path: str
    group_rows: tuple[int, ...]
    id_type: str
    dim: int | None


@dataclass(frozen=True)
class Piece:
    """One ingest task: consecutive row groups that become one or more parts.

    spans: (path, row groups, row in file of the first); starts: global first row of each part, and the end.
    """

    first_part: int
    spans: tuple[tuple[str, tuple[int, ...], int], ...]
    starts: tuple[int, ...]


def _files(context: Context) -> list[FileInfo]:
    config = context.config
    if contains(config.input, config.output, config.storage_options):
        raise InputError(
            f"OUTPUT {config.output} lies inside INPUT {config.input}: labels would become input; choose another place"
        )
    return list_parquet(config.input, config.storage_options)[1]


def inputs(context: Context) -> dict[str, Any]:
    """The exact files this run is made from."""
    return {"input_files": {f.path: [f.size, f.version] for f in _files(context)}}


def run(context: Context) -> Outcome:
    """Read every footer, cut the rows into parts, then read, check and write the parts in parallel."""
    config, executor = context.config, context.executor
    store, files = list_parquet(config.input, config.storage_options)
    columns = (config.id_column, config.embedding_column)
    groups = list(chunks([f.path for f in files], FOOTERS_PER_TASK))
    footers = [
        footer
        for found in executor.map(read_footers, [(store, tuple(group), *columns) for group in groups], "footers")
        for footer in found
    ]
    _check_types(footers)
    faces = sum(sum(footer.group_rows) for footer in footers)
    if faces == 0:
        raise InputError(f"input {config.input} has no rows in its {len(files)} Parquet file(s)")
    if faces > MAX_FACES:
        raise InputError(f"input {config.input} has {faces} rows; at most {MAX_FACES} are supported in one run")
    dim = next((f.dim for f in footers if f.dim), None) or executor.call(
        first_dimension, store, tuple(f.path for f in footers if sum(f.group_rows)), *columns, label="probe"
    )
    pieces = plan_pieces(footers, part_faces(faces, dim))
    results = executor.map(
        ingest_piece,
        [(piece, store, context.stores.run, columns, dim) for piece in pieces],
        "ingest",
        sizes=[piece.starts[-1] - piece.starts[0] for piece in pieces],
    )
    starts = [0] + [end for piece in pieces for end in piece.starts[1:]]
    return Outcome({"faces": faces, "dim": dim, "files": len(files), "starts": starts}, merge_pieces(results))


STAGE = Stage(
    name="ingest",
    reads=(),
    writes=("vectors", "ids"),
    settings=("input", "id_column", "embedding_column"),
    packages=("faceflow",),
    inputs=inputs,
    run=run,
)


# -- planning -----------------------------------------------------------------------------------------------------------


def _value_type(field: pa.Field) -> pa.DataType | None:
    kind = field.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return kind.value_type
    return None


def read_footers(store: Store, paths: Sequence[str], id_column: str, embedding_column: str) -> list[Footer]:
    """Check each file's columns and note its row groups. Raises InputError naming the file and what is wrong."""
    found = []
    for path in paths:
        with _readable(store, path) as parquet:
            schema = parquet.schema_arrow
            for column, flag in ((id_column, "--id-column"), (embedding_column, "--embedding-column")):
                if schema.names.count(column) != 1:
                    count = schema.names.count(column)
                    detail = f"{did_you_mean(column, schema.names)} (set {flag})" if count == 0 else f" {count} times"
                    raise InputError(f"{path} has {'no' if count == 0 else 'the'} column {column!r}{detail}")
            id_type, embedding = schema.field(id_column).type, schema.field(embedding_column)
            if not (pa.types.is_integer(id_type) or pa.types.is_string(id_type) or pa.types.is_large_string(id_type)):
                raise InputError(f"{path}: column {id_column!r} is {id_type}; an id must be a string or an integer")
            value = _value_type(embedding)
            if value is None or not pa.types.is_floating(value):
                raise InputError(
                    f"{path}: column {embedding_column!r} is {embedding.type}; an embedding must be a list of "
                    "float16, float32 or float64"
                )
            dim = embedding.type.list_size if pa.types.is_fixed_size_list(embedding.type) else None
            if dim == 0:
                raise InputError(f"{path}: column {embedding_column!r} is {embedding.type}: embeddings are empty")
            groups = tuple(parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups))
            found.append(Footer(path, groups, str(id_type), dim))
    return found


def _check_types(footers: list[Footer]) -> None:
    first = footers[0]
    for footer in footers:
        if footer.id_type != first.id_type:
            raise InputError(
                f"ids are {first.id_type} in {first.path} but {footer.id_type} in {footer.path}: make them one type"
            )
    fixed = [f for f in footers if f.dim is not None]
    for footer in fixed:
        if footer.dim != fixed[0].dim:
            raise InputError(
                f"embeddings have dimension {fixed[0].dim} in {fixed[0].path} but {footer.dim} in {footer.path}: "
                "cluster the output of one model at a time"
            )


def first_dimension(store: Store, paths: Sequence[str], id_column: str, embedding_column: str) -> int:
    """Dimension of the first embedding that is there. Raises InputError when there is none."""
    for path in paths:
        with _readable(store, path) as parquet:
            for batch in parquet.iter_batches(batch_size=1024, columns=[embedding_column]):
                lengths = batch.column(0).value_lengths().drop_null()
                nonzero = lengths.filter(pc.greater(lengths, 0))
                if len(nonzero):
                    return int(nonzero[0].as_py())
    raise InputError(f"column {embedding_column!r} holds no embedding at all: every one is null or empty")


def part_faces(faces: int, dim: int) -> int:
    """Faces of a part: PART_FACES; fewer in a small set, so that several workers share it, and where their vectors would
    pass PART_BYTES."""
    return max(1_024, min(PART_FACES, max(SMALL_PART, faces // 8), PART_BYTES // (4 * dim)))


def plan_pieces(footers: Sequence[Footer], wanted: int) -> list[Piece]:
    """Gather small row groups into parts of about `wanted` rows and cut large ones evenly; depends on footers alone."""
    pieces: list[Piece] = []
    spans: list[tuple[str, tuple[int, ...], int]] = []
    rows = first_row = first_part = 0

    def close() -> None:
        nonlocal spans, rows, first_row, first_part
        if rows:
            count = max(1, round(rows / wanted))
            starts = tuple(first_row + rows * i // count for i in range(count + 1))
            pieces.append(Piece(first_part, tuple(spans), starts))
            first_row, first_part = first_row + rows, first_part + count
        spans, rows = [], 0

    for footer in footers:
        in_file = 0
        for group, n in enumerate(footer.group_rows):
            if rows >= wanted // 2 and rows + n > wanted * 3 // 2:
                close()
            if n:
                if spans and spans[-1][0] == footer.path and spans[-1][1][-1] == group - 1:
                    spans[-1] = (footer.path, (*spans[-1][1], group), spans[-1][2])
                else:
                    spans.append((footer.path, (group,), in_file))
                rows += n
                in_file += n
            if rows >= wanted:
                close()
    close()
    return pieces


# -- reading ------------------------------------------------------------------------------------------------------------


class _readable:  # noqa: N801 - reads as a with-statement
    """A Parquet file opened for reading; whatever goes wrong with its bytes becomes an InputError that names it."""

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path

    def __enter__(self) -> pq.ParquetFile:
        try:
            self._source = open_input(self._store, self._path)
            return pq.ParquetFile(self._source)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._source.close()
        if isinstance(error, (pa.ArrowException, OSError)) and not isinstance(error, InputError):
            raise self._unreadable(error) from None

    def _unreadable(self, error: BaseException) -> InputError:
        return InputError(f"cannot read {self._path}: {explain(error)}")


def _batches(piece: Piece, store: Store, columns: tuple[str, str]) -> Iterator[tuple[str, int, pa.RecordBatch]]:
    for path, groups, row in piece.spans:
        with _readable(store, path) as parquet:
            for batch in parquet.iter_batches(batch_size=READ_BATCH, row_groups=list(groups), columns=list(columns)):
                yield path, row, batch
                row += batch.num_rows


def ingest_piece(piece: Piece, source: Store, run: Store, columns: tuple[str, str], dim: int) -> dict[str, int]:
    """Write the vectors and ids of one piece's parts; returns the bytes of each file."""
    sizes: dict[str, int] = {}
    names = [
        (layout.part("vectors", i), layout.part("ids", i))
        for i in range(piece.first_part, piece.first_part + len(piece.starts) - 1)
    ]
    if all(is_whole(run, name) for pair in names for name in pair):
        return {name: run.size(name) or 0 for pair in names for name in pair}
    rows = np.diff(piece.starts)
    part = filled = 0
    vectors, ids = np.empty((rows[0], dim), np.float32), []
    for path, first, batch in _batches(piece, source, columns):
        block = _vectors_of(batch.column(columns[1]), path, first, dim)
        id_column = batch.column(columns[0])
        if id_column.null_count:
            where = first + int(np.flatnonzero(id_column.is_null().to_numpy(zero_copy_only=False))[0])
            raise InputError(f"{path}, row {where}: the id in column {columns[0]!r} is null; every face needs one")
        done = 0
        while done < len(block):
            take = min(len(block) - done, rows[part] - filled)
            vectors[filled : filled + take] = block[done : done + take]
            ids.append(id_column.slice(done, take))
            done, filled = done + take, filled + take
            if filled == rows[part]:
                sizes |= _write_part(run, names[part], vectors, ids)
                part, filled, ids = part + 1, 0, []
                if part < len(rows):
                    vectors = np.empty((rows[part], dim), np.float32)
    if part != len(rows):
        raise InputError(
            f"{piece.spans[-1][0]} holds fewer rows than its footer says: it is damaged or was changed while being read"
        )
    return sizes


def _write_part(run: Store, names: tuple[str, str], vectors: np.ndarray, ids: list[pa.Array]) -> dict[str, int]:
    schema = vectors_schema(vectors.shape[1])
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    batch = pa.record_batch([column.cast(schema.field(0).type)], schema=schema)
    id_array = pa.concat_arrays(ids)
    id_schema = pa.schema([pa.field("id", id_array.type, nullable=False)])
    return {
        names[0]: run.write_arrow(names[0], schema, [batch]),
        names[1]: run.write_arrow(names[1], id_schema, [pa.record_batch([id_array], schema=id_schema)]),
    }


def _vectors_of(column: pa.Array, path: str, first: int, dim: int) -> np.ndarray:
    """Unit float32 [n, dim] from a list column; raises InputError naming the first bad row and why."""

    def fail(row: int, why: str) -> InputError:
        return InputError(f"{path}, row {first + row}: {why}")

    if column.null_count:
        raise fail(int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0]), "the embedding is null")
    if pa.types.is_fixed_size_list(column.type):
        lengths = np.full(len(column), column.type.list_size)
    else:
        lengths = np.diff(column.offsets.to_numpy())
    wrong = np.flatnonzero(lengths != dim)
    if len(wrong):
        n = int(lengths[wrong[0]])
        raise fail(
            int(wrong[0]),
            "the embedding is empty" if n == 0 else f"the embedding has dimension {n}, but the first one has {dim}",
        )
    values = column.flatten()
    if values.null_count:
        where = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise fail(where // dim, "the embedding contains a null")
    raw = values.to_numpy(zero_copy_only=False).reshape(-1, dim)
    # float64 is normalised before it is rounded, so that no value over- or underflows on the way.
    x = np.array(raw, dtype=np.float64 if raw.dtype == np.float64 else np.float32, order="C")
    verdict = normalize_rows(x)
    bad = np.flatnonzero(verdict != FINE)
    if len(bad):
        reason = "a NaN or an infinity" if verdict[bad[0]] == NOT_FINITE else "only zeros: it has no direction"
        raise fail(int(bad[0]), f"the embedding contains {reason}")
    return x.astype(np.float32, copy=False)
