"""The input as tasks: footers are read and checked, row groups gathered into parts, batches read back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from faceflow.errors import InputError, did_you_mean, one_line
from faceflow.storage import column_types
from faceflow.storage.inputs import open_input
from faceflow.storage.object_store import Store, explain
from faceflow.storage.traffic import count_read

PART_FACES = 131_072
SMALL_PART = 16_384
PART_BYTES = 512 * 2**20
READ_BATCH = 8_192
"""Rows decoded at once: bounds memory whatever the size of a row group."""


@dataclass(frozen=True)
class Footer:
    """What planning needs of one file that has rows: rows of each row group, the ids' type and bytes, the dimension if the type
    fixes it."""

    path: str
    group_rows: tuple[int, ...]
    id_type: pa.DataType
    id_bytes: int
    dim: int | None


@dataclass(frozen=True)
class Columns:
    """Names of the columns with the id, the embedding and, if there is one, the exclusive value; stored: the ids' storage type
    (`storage.column_types`)."""

    id: str
    embedding: str
    exclusive: str | None
    stored: pa.DataType = column_types.TEXT

    def ids(self, batch: pa.RecordBatch, path: str, row: int) -> tuple[pa.Array, np.ndarray]:
        """(ids of a batch, null where they are not valid UTF-8; the places of these, int64[...]). path, row: where the batch
        begins, for the error where an id does not fit the type of the others."""
        results = batch.column(batch.schema.get_field_index(self.id))
        try:
            return column_types.readable(column_types.cast(results, self.stored))
        except pa.ArrowInvalid:
            for i in range(len(results)):
                try:
                    column_types.cast(results[i : i + 1], self.stored)
                except pa.ArrowInvalid:
                    raise InputError(
                        f"{one_line(path)}, row {row + i}: id {results[i].as_py()} does not fit into {self.stored}, the "
                        "type of the ids of other files"
                    ) from None
            raise

    def embeddings(self, batch: pa.RecordBatch) -> pa.Array:
        """The embeddings of a batch, as lists of floats."""
        results = batch.column(batch.schema.get_field_index(self.embedding))
        kind = column_types.embedding_storage(results.type)
        assert kind is not None  # read_footers has seen to it
        return column_types.cast(results, pa.list_(pa.float32()) if pa.types.is_null(kind) else kind)

    def exclusives(self, batch: pa.RecordBatch) -> pa.Array | None:
        """The exclusive values of a batch in their storage type; None without such a column."""
        if self.exclusive is None:
            return None
        results = batch.column(batch.schema.get_field_index(self.exclusive))
        kind = column_types.id_storage(results.type)
        assert kind is not None
        return column_types.cast(results, column_types.TEXT if pa.types.is_null(kind) else kind)


@dataclass(frozen=True)
class IngestTask:
    """One ingest task: consecutive row groups that become one or more parts.

    spans: (path, row groups, row in file of the first); starts: input row, counted over all files, at
    which each part starts, and the end.
    """

    first_part: int
    spans: tuple[tuple[str, tuple[int, ...], int], ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class ReadFooters:
    """Request: these files' footers, with the columns that they must have."""

    store: Store
    paths: tuple[str, ...]
    columns: Columns


def read_footers(request: ReadFooters) -> list[Footer]:
    """Check each file's columns and note its row groups; a file without rows says nothing, whatever its columns (pandas writes
    them as null). Raises InputError naming the file and what is wrong."""
    store, names = request.store, request.columns
    results = []
    for path in request.paths:
        with readable(store, path) as parquet:
            if parquet.metadata.num_rows == 0:
                continue
            schema = parquet.schema_arrow
            named = (
                (names.id, "--id-column"),
                (names.embedding, "--embedding-column"),
                (names.exclusive, "--exclusive-column"),
            )
            for column, flag in named:
                if column is None:
                    continue
                if schema.names.count(column) != 1:
                    count = schema.names.count(column)
                    detail = f"{did_you_mean(column, schema.names)} (set {flag})" if count == 0 else f" {count} times"
                    raise InputError(f"{one_line(path)} has {'no' if count == 0 else 'the'} column {column!r}{detail}")
            id_type, embedding = schema.field(names.id).type, schema.field(names.embedding)
            if column_types.id_storage(id_type) is None:
                raise InputError(
                    f"{one_line(path)}: column {names.id!r} is {id_type}; an id must be a string, an integer or binary: "
                    f"{column_types.CASTS}"
                )
            if names.exclusive is not None:
                kind = schema.field(names.exclusive).type
                if column_types.id_storage(kind) is None:
                    raise InputError(
                        f"{one_line(path)}: column {names.exclusive!r} is {kind}; it must be a string or an integer: "
                        f"{column_types.CASTS}"
                    )
            stored = column_types.embedding_storage(embedding.type)
            if stored is None:
                raise InputError(
                    f"{one_line(path)}: column {names.embedding!r} is {embedding.type}; an embedding must be a list of "
                    "float16, float32 or float64"
                )
            dim = stored.list_size if pa.types.is_fixed_size_list(stored) else None
            if dim == 0:
                raise InputError(f"{one_line(path)}: column {names.embedding!r} is {embedding.type}: embeddings are empty")
            groups, id_bytes = _survey(parquet.metadata, names.id)
            results.append(Footer(path, groups, id_type, id_bytes, dim))
    return results


def _survey(metadata: pq.FileMetaData, id_column: str) -> tuple[tuple[int, ...], int]:
    """(rows of each row group, uncompressed bytes of the ids) by a file's footer."""
    leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    leaf = leaves.index(id_column) if id_column in leaves else None
    rows, id_bytes = [], 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        rows.append(group.num_rows)
        id_bytes += group.column(leaf).total_uncompressed_size if leaf is not None else 0
    return tuple(rows), id_bytes


@dataclass(frozen=True)
class IdTypes:
    """The ids of a run. stored: their type between ingest and publish; published: the type that labels give them."""

    stored: pa.DataType
    published: pa.DataType


def common_id_types(footers: Sequence[Footer], base: IdTypes | None) -> IdTypes:
    """The types of ids that these files and the base run have in common: published as that run did, else as the first file
    has them. Text is one type however it is held, and so are integers and binary values.

    Raises InputError where files, or a file and the base run, differ.
    """
    known = [(footer, column_types.id_storage(footer.id_type)) for footer in footers]
    known = [(footer, kind) for footer, kind in known if kind is not None and not pa.types.is_null(kind)]
    integers = (column_types.INTEGER, column_types.UNSIGNED)
    first = base.stored if base is not None else known[0][1] if known else column_types.TEXT
    for footer, kind in known:
        if kind != first and not (kind in integers and first in integers):
            target = f"{base.published} in the current run" if base is not None else (
                f"{known[0][0].id_type} in {one_line(known[0][0].path)}"
            )  # fmt: skip
            raise InputError(f"ids are {target} but {footer.id_type} in {one_line(footer.path)}: make them one type")
    if base is not None:
        return base
    if any(kind == column_types.INTEGER for _, kind in known):
        first = column_types.INTEGER
    return IdTypes(first, column_types.published(known[0][0].id_type) if known else pa.string())


def check_dimensions(footers: Sequence[Footer]) -> None:
    """Raise InputError where the types of two files fix different dimensions."""
    fixed = [f for f in footers if f.dim is not None]
    for footer in fixed:
        if footer.dim != fixed[0].dim:
            raise InputError(
                f"embeddings have dimension {fixed[0].dim} in {one_line(fixed[0].path)} but {footer.dim} in "
                f"{one_line(footer.path)}: cluster the output of one model at a time"
            )


@dataclass(frozen=True)
class FirstDimension:
    """Request: the dimension of the embeddings of these files."""

    store: Store
    paths: tuple[str, ...]
    embedding_column: str


def first_dimension(request: FirstDimension) -> int:
    """Dimension of the first embedding that is not empty. Raises InputError when there is none."""
    names = Columns("", request.embedding_column, None)
    for path in request.paths:
        with readable(request.store, path) as parquet:
            for batch in parquet.iter_batches(batch_size=1024, columns=[request.embedding_column]):
                lengths = names.embeddings(batch).value_lengths().drop_null()
                nonzero = lengths.filter(pc.greater(lengths, 0))
                if len(nonzero):
                    return int(nonzero[0].as_py())
    raise InputError(f"column {request.embedding_column!r} holds no embedding at all: every one is null or empty")


def part_faces(faces: int, dim: int) -> int:
    """Faces of a part: PART_FACES; fewer in a small set, so that several workers share it, and where their vectors would
    pass PART_BYTES."""
    return max(1_024, min(PART_FACES, max(SMALL_PART, faces // 8), PART_BYTES // (4 * dim)))


def plan_tasks(footers: Sequence[Footer], wanted: int) -> list[IngestTask]:
    """Gather small row groups into parts of about `wanted` rows and cut large ones evenly; depends on footers alone."""
    tasks: list[IngestTask] = []
    spans: list[tuple[str, list[int], int]] = []
    rows = first_row = first_part = 0

    def close() -> None:
        nonlocal spans, rows, first_row, first_part
        if rows:
            count = max(1, round(rows / wanted))
            starts = tuple(first_row + rows * i // count for i in range(count + 1))
            tasks.append(IngestTask(first_part, tuple((path, tuple(groups), row) for path, groups, row in spans), starts))
            first_row, first_part = first_row + rows, first_part + count
        spans, rows = [], 0

    for footer in footers:
        in_file = 0
        for group, n in enumerate(footer.group_rows):
            if rows >= wanted // 2 and rows + n > wanted * 3 // 2:
                close()
            if n:
                if spans and spans[-1][0] == footer.path and spans[-1][1][-1] == group - 1:
                    spans[-1][1].append(group)
                else:
                    spans.append((footer.path, [group], in_file))
                rows += n
                in_file += n
            if rows >= wanted:
                close()
    close()
    return tasks


class readable:  # noqa: N801 - reads as a with-statement
    """A Parquet file opened for reading; whatever goes wrong with its bytes becomes an InputError that names it."""

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path

    def __enter__(self) -> pq.ParquetFile:
        try:
            self._source = open_input(self._store, self._path)
            return pq.ParquetFile(self._source, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._source.close()
        if isinstance(error, (pa.ArrowException, OSError)) and not isinstance(error, InputError):
            raise self._unreadable(error) from None

    def _unreadable(self, error: BaseException) -> InputError:
        return InputError(f"cannot read {one_line(self._path)}: {explain(error)}")


def read_batches(task: IngestTask, store: Store, names: Sequence[str]) -> Iterator[tuple[str, int, pa.RecordBatch]]:
    """(file, row in it, batch with the columns of these names) of all rows of a task."""
    for path, groups, row in task.spans:
        with readable(store, path) as parquet:
            for batch in parquet.iter_batches(batch_size=READ_BATCH, row_groups=list(groups), columns=list(names)):
                yield path, row, count_read(batch)
                row += batch.num_rows
