"""One part in the making: its rows are collected, then written as four files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from faceflow.errors import one_line
from faceflow.kernels.knn.vectors import hash_rows
from faceflow.stages.ingest import row_checks
from faceflow.stages.ingest.parquet_input import IngestTask
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import ORIGINS_SCHEMA, QUARANTINED_SCHEMA, vectors_schema


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of a file, checked.

    ids: of all; verdicts, lengths: of their embeddings (`row_checks`); vectors: float32[good, d], unit vectors of the good
    ones; path, file: the file's path and number; first: the row in it of the first; photos: uint64[n], hashes of their
    exclusive values.
    """

    ids: pa.Array
    verdicts: np.ndarray
    lengths: np.ndarray
    vectors: np.ndarray
    path: str
    file: int
    first: int
    photos: np.ndarray

    def slice(self, begin: int, count: int) -> Batch:
        """The rows from `begin` on, `count` of them."""
        good = np.cumsum(self.verdicts == row_checks.GOOD)
        low, high = (int(good[at - 1]) if at else 0 for at in (begin, begin + count))
        rows = slice(begin, begin + count)
        return Batch(
            self.ids.slice(begin, count), self.verdicts[rows], self.lengths[rows], self.vectors[low:high], self.path, self.file,
            self.first + begin, self.photos[rows],
        )  # fmt: skip


@dataclass(frozen=True)
class WrittenPart:
    """The files of one part: bytes of each, faces kept, and the tally of the other rows."""

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

    def add(self, batch: Batch) -> None:
        """Take consecutive rows."""
        x, ids = batch.vectors, batch.ids
        if self._vectors is None:
            self._vectors = np.empty((self._rows, self._dim), np.float32)
        self._vectors[self._kept : self._kept + len(x)] = x
        self._ids.append(ids)
        hashes = np.zeros(len(ids), np.uint64)
        hashes[batch.verdicts == row_checks.GOOD] = hash_rows(x)
        rows = np.arange(batch.first, batch.first + len(ids))
        origins = [np.full(len(ids), batch.file, np.int32), rows, hashes, batch.photos]
        self._origins.append(pa.record_batch([pa.array(column) for column in origins], schema=ORIGINS_SCHEMA))
        for i in np.flatnonzero(batch.verdicts != row_checks.GOOD).tolist():
            verdict = int(batch.verdicts[i])
            reason = row_checks.REASONS[verdict].format(length=int(batch.lengths[i]), dim=self._dim)
            self._quarantined.append((self._filled + i, verdict, batch.path, batch.first + i, reason))
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
