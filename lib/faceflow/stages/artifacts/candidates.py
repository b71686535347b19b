"""Candidate files: what one shard, or one part, found for the rows of every part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from faceflow.kernels.knn import scratch, topk
from faceflow.kernels.knn.tile_search import Probes
from faceflow.stages.artifacts.faces import RunData, matrix, read_vectors
from faceflow.storage.object_store import Store
from faceflow.tables import CANDIDATES_SCHEMA, Parts


def probes_of(columns: Sequence[pa.ListArray]) -> Probes:
    counts = np.concatenate([np.empty(0, np.int64), *(np.diff(column.offsets.to_numpy()) for column in columns)])
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets, np.concatenate([np.empty(0, np.int32), *(column.flatten().to_numpy() for column in columns)])


@dataclass(frozen=True)
class Gathered:
    """Faces of all parts that meet in one shard: rows int32[n], ascending; probes, of each; vectors float32[n, dim]; bounds
    int64[parts + 1], where each part's begin."""

    rows: np.ndarray
    probes: Probes
    vectors: np.ndarray
    bounds: np.ndarray


def that_probe(batch: pa.RecordBatch, cells: range) -> pa.RecordBatch:
    """The faces of a batch of `probed_cells/` that probe one of these cells."""
    flat, offsets = batch.column(1).flatten().to_numpy(), batch.column(1).offsets.to_numpy()
    inside = np.concatenate([[0], np.cumsum((flat >= cells.start) & (flat < cells.stop))])
    offsets = offsets - offsets[0]
    selected = np.flatnonzero(inside[offsets[1:]] > inside[offsets[:-1]])
    return batch if len(selected) == batch.num_rows else batch.take(pa.array(selected))


def gather(data: RunData, batches: Sequence[pa.RecordBatch], of: Sequence[int] | None = None) -> Gathered:
    """The faces of one batch of `probed_cells/` a part (of: these parts, ascending, only), in row order, with their vectors
    from the batch or the part itself. These are in `scratch`, and hold until the next call."""
    run, parts, dim = data.store, data.parts, data.dim
    of = range(len(parts)) if of is None else of
    rows = np.concatenate(
        [
            np.empty(0, np.int64),
            *(batch.column(0).to_numpy() + parts.starts[part] for part, batch in zip(of, batches, strict=True)),
        ]
    )
    bounds = np.searchsorted(rows, parts.starts)
    vectors = scratch.array("vectors", (len(rows), dim), np.float32)
    for part, batch in zip(of, batches, strict=True):
        out = vectors[bounds[part] : bounds[part + 1]]
        if "vector" in batch.schema.names:
            out[:] = matrix(batch.column(2), dim)
        elif len(out):
            np.take(read_vectors(run, part, dim), batch.column(0).to_numpy(), axis=0, out=out, mode="clip")
    return Gathered(rows.astype(np.int32), probes_of([batch.column(1) for batch in batches]), vectors, bounds)


def write_candidates(run: Store, name: str, parts: Parts, rows: np.ndarray, bounds: np.ndarray, buffers: topk.Buffers) -> None:
    """Write what was found for gathered faces, one record batch a part."""
    run.write_arrow(
        name,
        CANDIDATES_SCHEMA,
        (
            candidates_batch(rows[b:e] - first, *buffers.take(np.arange(b, e)))
            for b, e, first in zip(bounds[:-1], bounds[1:], parts.starts, strict=False)
        ),
    )


def candidates_batch(rows: np.ndarray, offsets: np.ndarray, keys: np.ndarray) -> pa.RecordBatch:
    lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(keys, pa.uint64()))
    return pa.record_batch([pa.array(rows.astype(np.int32)), lists], schema=CANDIDATES_SCHEMA)


def read_candidates(run: Store, names: Sequence[str], part: int) -> list[topk.CandidateList]:
    """What each of these files holds for one part."""
    batches = [run.read_batch(name, part) for name in names]
    columns = [(batch.column(0).to_numpy(), batch.column(1)) for batch in batches if batch.num_rows]
    return [(rows, keys.offsets.to_numpy(), keys.values.to_numpy()) for rows, keys in columns]
