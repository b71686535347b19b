"""What a clustering method may use, read from a run's parts: the neighbor table, the pruned graph and the vectors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from faceflow.kernels.graph.edge_recipes import kept
from faceflow.kernels.graph.shared_neighbors import Block
from faceflow.kernels.methods import registry
from faceflow.stages.artifacts.faces import RunData, read_groups, read_vectors
from faceflow.storage import layout
from faceflow.tables import EdgeList, NeighborTable


def read(data: RunData, threshold: float | None, clusters: int | None, seed: int, threads: int) -> registry.Given:
    """Everything but the vectors is held whole, 8 bytes a neighbor and 8 an edge; vectors are read as they are asked for.
    Pairs of no positive similarity are left out, as they are of the graph."""
    run, parts, dim = data.store, data.parts, data.dim

    def tables() -> Iterator[Block]:
        for part in range(len(parts)):
            table = NeighborTable.from_batch(run.read_batch(layout.part("neighbors", part)), 0)
            block = table.offsets, table.rows, table.values
            yield kept(block, (table.values > 0) & (table.values >= np.float32(threshold if threshold is not None else 0)))

    leader = read_groups(run, parts.faces)

    def edges() -> Iterator[Block]:
        for part in range(len(parts)):
            results = EdgeList.from_batch(run.read_batch(layout.part("edges", part)), 0)
            # Faces that count as one with another have no edges but one to it.
            mine = leader[parts.starts[part] : parts.starts[part + 1]]
            follows = np.flatnonzero(mine != np.arange(parts.starts[part], parts.starts[part + 1]))
            offsets = results.offsets.copy()
            offsets[1:] += np.cumsum(np.bincount(follows, minlength=len(mine)))
            at = results.offsets[follows]
            yield offsets, np.insert(results.rows, at, mine[follows]), np.insert(results.values, at, np.float32(1))

    def vectors(rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), dim), np.float32)
        owner = np.searchsorted(parts.starts, rows, side="right") - 1
        for part in np.unique(owner):
            selected = owner == part
            out[selected] = read_vectors(run, int(part), dim)[rows[selected] - parts.starts[part]]
        return out

    return registry.Given(
        _whole(tables()), _whole(edges()), vectors, threshold if threshold is not None else 0.0, clusters, seed, threads
    )


def _whole(blocks: Iterator[Block]) -> Block:
    """Blocks of consecutive rows as one."""
    results = list(blocks)
    offsets = np.zeros(1 + sum(len(block[0]) - 1 for block in results), np.int64)
    np.cumsum(np.concatenate([np.empty(0, np.int64), *(np.diff(block[0]) for block in results)]), out=offsets[1:])
    rows = np.concatenate([np.empty(0, np.int32), *(block[1] for block in results)])
    return offsets, rows, np.concatenate([np.empty(0, np.float32), *(block[2] for block in results)])
