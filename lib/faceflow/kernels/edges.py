"""Edge recipes: pure functions (neighbor table, parameters) -> edge list."""

from __future__ import annotations

import numpy as np

from faceflow.tables import EdgeList, NeighborTable


def threshold(table: NeighborTable, neighbors: int, min_similarity: float | None) -> EdgeList:
    """Edge i -> j for each of i's nearest `neighbors` with cosine >= min_similarity; its weight is the cosine.

    A cosine of zero or less carries no flow, so it never becomes an edge.
    Source: face-cluster-by-infomap (github.com/xiaoxiong74/face-cluster-by-infomap).
    """
    sources = np.repeat(np.arange(len(table)), np.diff(table.offsets))
    rank = np.arange(len(table.rows)) - table.offsets[sources]
    keep = (rank < neighbors) & (table.values > 0)
    if min_similarity is not None:
        keep &= table.values >= np.float32(min_similarity)
    offsets = np.zeros(len(table) + 1, np.int64)
    np.cumsum(np.bincount(sources[keep], minlength=len(table)), out=offsets[1:])
    return EdgeList(table.first_row, offsets, table.rows[keep], table.values[keep])
