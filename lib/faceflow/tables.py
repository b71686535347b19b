"""The tables that stages exchange: frozen containers with shape checks, and their Arrow schemas. No I/O, no algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from faceflow.errors import InputError

MAX_FACES = 2**31 - 1
"""Rows are stored as int32: half the bytes of every neighbor table and edge list."""


def vectors_schema(dim: int) -> pa.Schema:
    """One unit-length float32 vector a row, in row order."""
    return pa.schema([pa.field("vector", pa.list_(pa.float32(), dim), nullable=False)])


def cells_schema(dim: int | None) -> pa.Schema:
    """Faces that travel from one part to one shard, by their row in the part; `dim` is None where their vectors stay behind, as
    shards can read them from the part itself."""
    fields = [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("probes", pa.list_(pa.int32()), nullable=False),
    ]
    if dim is not None:
        fields.append(pa.field("vector", pa.list_(pa.float32(), dim), nullable=False))
    return pa.schema(fields)


ASSIGNED_CELLS_SCHEMA = pa.schema([pa.field("cell", pa.int32(), nullable=False)])
"""The assigned cell of each of one part's faces: that of the nearest centroid."""

CANDIDATES_SCHEMA = pa.schema(
    [pa.field("row", pa.int32(), nullable=False), pa.field("keys", pa.large_list(pa.uint64()), nullable=False)]
)
"""The candidate neighbors one shard found for rows of one part (row: within the part), as the keys of `kernels.knn.topk`."""

IDS_CHECKED_SCHEMA = pa.schema([pa.field("row", pa.int64(), nullable=False)])
"""Input rows, counted over all files; `id_check/ids-*` has the id before it."""

QUARANTINED_SCHEMA = pa.schema(
    [("position", pa.int32()), ("verdict", pa.uint8()), ("file", pa.string()), ("row", pa.int64()), ("reason", pa.string())]
)
"""Rows of one part that cannot be used: position among the part's input rows, verdict of `stages.ingest.row_checks`, and the
place."""

ORIGINS_SCHEMA = pa.schema([("file", pa.int32()), ("row", pa.int64()), ("hash", pa.uint64()), ("photo", pa.uint64())])
"""Where each entry of `ids/` came from: which of the run's input files, in sorted order, the row in it, a hash of the embedding
(0 for a row quarantined), and one of the exclusive column's value (0 for none)."""

ROWS_NOW_SCHEMA = pa.schema([pa.field("row", pa.int32(), nullable=False)])
"""Of every face of the base run, its row in this one, or -1."""

BASE_ROWS_SCHEMA = pa.schema([pa.field("kept", pa.int32(), nullable=False), pa.field("same_id", pa.int32(), nullable=False)])
"""kept: the row that each face of one part has in the base run, with the same embedding, else -1; same_id: the row of the same
id, whatever its embedding was, else -1."""

STATE_SCHEMA = pa.schema([pa.field("state", pa.uint8(), nullable=False)])
"""What an incremental run does to each face of one part: `SAME`, `CHANGED` (its neighbors differ) or `ACTIVE` (it is searched
for); while tables are carried over, CHANGED stands for having lost neighbors."""

SAME, CHANGED, ACTIVE = range(3)

TRUTH_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("known", pa.bool_(), nullable=False),
        pa.field("keys", pa.large_list(pa.field("item", pa.uint64(), nullable=False)), nullable=False),
    ]
)
"""Sampled faces: row, whether their true neighbors are known, and these, the face itself among them, as `topk.encode`d keys."""

NEAR_SCHEMA = pa.schema(
    [pa.field("row", pa.int32(), nullable=False), pa.field("near", pa.large_list(pa.int32()), nullable=False)]
)
"""Rows that have near-identical neighbors, and these, the nearest first."""

GROUPS_SCHEMA = pa.schema([pa.field("row", pa.int32(), nullable=False), pa.field("leader", pa.int32(), nullable=False)])
"""Faces that count as one with another, near-identical one, ascending, and which."""

_LINK = pa.struct([pa.field("row", pa.int32(), nullable=False), pa.field("value", pa.float32(), nullable=False)])


def queries_schema(dim: int) -> pa.Schema:
    """Sampled faces: global row, vector, and their neighbors as found."""
    return pa.schema([("row", pa.int32()), ("vector", pa.list_(pa.float32(), dim)), ("neighbors", pa.large_list(_LINK))])


def sample_schema(dim: int) -> pa.Schema:
    """Sampled faces of one part: global row, vector."""
    return pa.schema([("row", pa.int32()), ("vector", pa.list_(pa.float32(), dim))])


NEIGHBORS_SCHEMA = pa.schema([pa.field("neighbors", pa.large_list(pa.field("item", _LINK, nullable=False)))])
WIDER_SCHEMA = pa.schema([pa.field("row", pa.int32(), nullable=False), NEIGHBORS_SCHEMA.field(0)])
"""Rows whose lists were searched again among leaders only, ascending, and these lists."""

EDGES_SCHEMA = pa.schema([pa.field("edges", pa.large_list(pa.field("item", _LINK, nullable=False)))])
MODULES_SCHEMA = pa.schema(
    [
        pa.field("module", pa.int64(), nullable=False),
        pa.field("flow", pa.float64(), nullable=False),
        pa.field("graph_module", pa.int64(), nullable=False),
    ]
)
"""Each row's module, its visit rate, and the module of the graph alone, before singletons and constraints."""
QUANTIZER_METADATA = b"faceflow"
"""Schema metadata of the centroids: JSON with shard_starts, margin, most and the predicted recall."""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class _Ragged:
    """Per row a slice of (row, value) pairs: `rows[offsets[i]:offsets[i + 1]]`.

    first_row: global row of the table's first row.
    offsets: int64[n + 1]; rows: int32[m], global rows; values: float32[m].
    """

    first_row: int
    offsets: np.ndarray
    rows: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        name = type(self).__name__
        _check(self.offsets.ndim == 1 and len(self.offsets) >= 1, f"{name}: offsets must be a non-empty vector")
        _check(
            self.rows.shape == self.values.shape == (int(self.offsets[-1]),),
            f"{name}: {len(self.rows)} rows and {len(self.values)} values, but offsets end at {self.offsets[-1]}",
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sources(self) -> np.ndarray:
        """int32[m]: the global row that each pair belongs to."""
        rows = np.arange(self.first_row, self.first_row + len(self), dtype=np.int32)
        return np.repeat(rows, np.diff(self.offsets))

    def to_arrow(self, schema: pa.Schema) -> pa.RecordBatch:
        """One record batch with one list column, sharing memory with the arrays."""
        values = pa.StructArray.from_arrays(
            [pa.array(self.rows, pa.int32()), pa.array(self.values, pa.float32())], fields=list(_LINK)
        )
        lists = pa.LargeListArray.from_arrays(pa.array(self.offsets, pa.int64()), values, type=schema.field(0).type)
        return pa.record_batch([lists], schema=schema)

    @staticmethod
    def _arrays(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        column = batch.column(0)
        offsets = column.offsets.to_numpy()
        pairs = column.flatten()
        return offsets - offsets[0], pairs.field(0).to_numpy(), pairs.field(1).to_numpy()


@dataclass(frozen=True)
class NeighborTable(_Ragged):
    """Neighbors of each row (never itself), by falling cosine similarity, ties by row."""

    def to_batch(self) -> pa.RecordBatch:
        return self.to_arrow(NEIGHBORS_SCHEMA)

    @classmethod
    def from_batch(cls, batch: pa.RecordBatch, first_row: int) -> NeighborTable:
        return cls(first_row, *cls._arrays(batch))

    @classmethod
    def joined(cls, batches: Sequence[pa.RecordBatch]) -> NeighborTable:
        """Of consecutive rows from 0, in several batches; a single one is not copied."""
        results = [cls._arrays(batch) for batch in batches]
        if len(results) == 1:
            return cls(0, *results[0])
        counts = [np.diff(offsets) for offsets, _, _ in results]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        return cls(0, offsets, *(np.concatenate([item[i] for item in results]) for i in (1, 2)))


@dataclass(frozen=True)
class EdgeList(_Ragged):
    """Directed weighted links row -> row that survived pruning; values are the weights."""

    def to_batch(self) -> pa.RecordBatch:
        return self.to_arrow(EDGES_SCHEMA)

    @classmethod
    def from_batch(cls, batch: pa.RecordBatch, first_row: int) -> EdgeList:
        return cls(first_row, *cls._arrays(batch))


@dataclass(frozen=True)
class Partition:
    """One module per row (int64[N]), its codelength in bits, and the rows' visit rates (float64[N]; None: not known)."""

    modules: np.ndarray
    codelength: float
    flow: np.ndarray | None = None

    def __post_init__(self) -> None:
        _check(self.modules.ndim == 1, "Partition: modules must be a vector")

    def _repr_html_(self) -> str:
        sizes = np.unique(self.modules, return_counts=True)[1]
        rows = {
            "rows": f"{len(self.modules):,}",
            "modules": f"{len(sizes):,} ({np.count_nonzero(sizes == 1):,} of one row)",
            "largest module": f"{sizes.max(initial=0):,} rows",
            "codelength": f"{self.codelength:.6f} bits",
        }
        cells = "".join(f"<tr><th style='text-align:left'>{k}</th><td>{v}</td></tr>" for k, v in rows.items())
        return f"<table>{cells}</table>"


@dataclass(frozen=True)
class Parts:
    """Where each part's rows lie: part i holds rows `starts[i] .. starts[i + 1] - 1`."""

    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def faces(self) -> int:
        return self.starts[-1]

    def rows(self, part: int) -> int:
        return self.starts[part + 1] - self.starts[part]
