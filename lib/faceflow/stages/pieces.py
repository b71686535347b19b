"""Cutting the input into pieces: footers are read and checked, row groups gathered into parts, batches read back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from faceflow.errors import InputError, did_you_mean, one_line
from faceflow.storage.files import Store, count_read, explain
from faceflow.storage.inputs import open_input

PART_FACES = 131_072
SMALL_PART = 16_384
PART_BYTES = 512 * 2**20
READ_BATCH = 8_192
"""Rows decoded at once: bounds memory whatever the size of a row group."""


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

    spans: (path, row groups, row in file of the first); starts: input row, counted over all files, at
    which each part starts, and the end.
    """

    first_part: int
    spans: tuple[tuple[str, tuple[int, ...], int], ...]
    starts: tuple[int, ...]


def _value_type(field: pa.Field) -> pa.DataType | None:
    kind = field.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return kind.value_type
    return None


def read_footers(
    store: Store, paths: Sequence[str], id_column: str, embedding_column: str, exclusive_column: str | None = None
) -> list[Footer]:
    """Check each file's columns and note its row groups. Raises InputError naming the file and what is wrong."""
    found = []
    for path in paths:
        with readable(store, path) as parquet:
            schema = parquet.schema_arrow
            named = (
                (id_column, "--id-column"),
                (embedding_column, "--embedding-column"),
                (exclusive_column, "--exclusive-column"),
            )
            for column, flag in named:
                if column is None:
                    continue
                if schema.names.count(column) != 1:
                    count = schema.names.count(column)
                    detail = f"{did_you_mean(column, schema.names)} (set {flag})" if count == 0 else f" {count} times"
                    raise InputError(f"{one_line(path)} has {'no' if count == 0 else 'the'} column {column!r}{detail}")
            id_type, embedding = schema.field(id_column).type, schema.field(embedding_column)
            if not (pa.types.is_integer(id_type) or pa.types.is_string(id_type) or pa.types.is_large_string(id_type)):
                raise InputError(f"{one_line(path)}: column {id_column!r} is {id_type}; an id must be a string or an integer")
            if exclusive_column is not None:
                kind = schema.field(exclusive_column).type
                if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                    raise InputError(
                        f"{one_line(path)}: column {exclusive_column!r} is {kind}; it must be a string or an integer"
                    )
            value = _value_type(embedding)
            if value is None or not pa.types.is_floating(value):
                raise InputError(
                    f"{one_line(path)}: column {embedding_column!r} is {embedding.type}; an embedding must be a list of "
                    "float16, float32 or float64"
                )
            dim = embedding.type.list_size if pa.types.is_fixed_size_list(embedding.type) else None
            if dim == 0:
                raise InputError(f"{one_line(path)}: column {embedding_column!r} is {embedding.type}: embeddings are empty")
            groups = tuple(parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups))
            found.append(Footer(path, groups, str(id_type), dim))
    return found


def check_types(footers: list[Footer]) -> None:
    for footer in footers[1:]:
        first = footers[0]
        if footer.id_type != first.id_type:
            raise InputError(
                f"ids are {first.id_type} in {one_line(first.path)} but {footer.id_type} in {one_line(footer.path)}: make them "
                "one type"
            )
    fixed = [f for f in footers if f.dim is not None]
    for footer in fixed:
        if footer.dim != fixed[0].dim:
            raise InputError(
                f"embeddings have dimension {fixed[0].dim} in {one_line(fixed[0].path)} but {footer.dim} in "
                f"{one_line(footer.path)}: cluster the output of one model at a time"
            )


def first_dimension(store: Store, paths: Sequence[str], embedding_column: str) -> int:
    """Dimension of the first embedding that is there. Raises InputError when there is none."""
    for path in paths:
        with readable(store, path) as parquet:
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


def read_batches(piece: Piece, store: Store, columns: Sequence[str]) -> Iterator[tuple[str, int, pa.RecordBatch]]:
    for path, groups, row in piece.spans:
        with readable(store, path) as parquet:
            for batch in parquet.iter_batches(batch_size=READ_BATCH, row_groups=list(groups), columns=list(columns)):
                yield path, row, count_read(batch)
                row += batch.num_rows
