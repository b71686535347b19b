"""Search of what is new against everything: only pairs with at least one active face; last night's tables hold the others.

An active face is new, or has lost a neighbor that its full table cannot replace. As `search`, but a pair of two faces that are
not active is never looked at.
"""

from __future__ import annotations

import numpy as np

from faceflow.kernels.search import Probes, by_cell
from faceflow.kernels.tiles import TileKernel
from faceflow.kernels.topk import Buffers, decode


def search_cells(
    vectors: np.ndarray, rows: np.ndarray, probes: Probes, cells: range, active: np.ndarray, k: int, floor: float | None
) -> Buffers:
    """Search every cell of one shard for pairs with an active face: one face of the pair is at home there, the other at home
    there or visiting. Nobody is introduced, so active faces should probe more cells than others (`probing.Choice.alone`).

    vectors, rows, probes, cells: as `search.search_cells`; active: bool[n]. Returns buffers with one slot per face: the pair's
    other face, at both ends.
    """
    buffers = Buffers.empty(len(rows), k, floor)
    kernel = TileKernel(vectors, rows, buffers, probes)
    for members, visitors in by_cell(probes, cells):
        new = members[active[members]]
        old = members[~active[members]]
        new_visitors, old_visitors = visitors[active[visitors]], visitors[~active[visitors]]
        if len(new):
            new_vectors = vectors[new]
            kernel.within(new, new_vectors)
            kernel.across(old, new, new_vectors)
            kernel.between(old_visitors, new, new_vectors)
        if len(new_visitors):
            kernel.between(new_visitors, members, vectors[members])
    return buffers


def search_part(
    queries: np.ndarray, query_rows: np.ndarray, members: np.ndarray, first_row: int, active: np.ndarray, k: int,
    floor: float | None,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """All active faces against one part, for the exact plan: (offsets, keys) of the queries, and of the part's faces.

    queries: float32[q, d] and query_rows: int32[q], every active face of the data set; members: float32[m, d], unit rows that
    start at first_row; active: bool[m], which of them are among the queries: their candidates come as queries' only.
    """
    q, m = len(queries), len(members)
    buffers = Buffers.empty(q + m, k + 1, floor)  # one more, as a query may meet itself
    buffers.floors[q:][active] = np.inf
    rows = np.concatenate([query_rows, np.arange(first_row, first_row + m)]).astype(np.int32)
    kernel = TileKernel(queries, rows, buffers)
    kernel.between(np.arange(q), np.arange(q, q + m), members)
    offsets, keys = buffers.take(np.arange(q))
    owner = np.repeat(query_rows, np.diff(offsets))
    kept = decode(keys)[1] != owner
    ends = np.concatenate([[0], np.cumsum(kept)])[offsets]
    return (ends, keys[kept]), buffers.take(np.arange(q, q + m))


def carry_table(
    offsets: np.ndarray, neighbors: np.ndarray, similarities: np.ndarray, kept: np.ndarray, new_rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Last night's neighbors of the faces that are still there, by tonight's rows.

    offsets, neighbors, similarities: one part of the neighbor table; kept: int[...], ascending, which of its rows are still
    there; new_rows: int32[N], tonight's row of every row of last night, -1 for those that are gone; k: most neighbors of a row.
    Returns (offsets, rows, similarities, state uint8[len(kept)]): 0: as it was; 1: has lost neighbors; 2: has lost some of k,
    which cut off others: it is given no neighbors, and must be searched again.
    """
    counts = np.diff(offsets)[kept]
    owner = np.repeat(np.arange(len(kept)), counts)
    places = np.repeat(offsets[kept] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) + np.arange(len(owner))
    rows, values = new_rows[neighbors[places]], similarities[places]
    there = rows >= 0
    left = np.bincount(owner[there], minlength=len(kept))
    state = np.where(left == counts, 0, np.where(counts >= k, 2, 1)).astype(np.uint8)
    there &= state[owner] != 2
    left[state == 2] = 0
    return np.concatenate([[0], np.cumsum(left)]), rows[there], values[there], state


def changed_rows(before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """bool[n]: rows whose neighbors, (offsets, rows) of two tables of n rows, are not the same."""
    counts, counts_after = np.diff(before[0]), np.diff(after[0])
    changed = np.asarray(counts != counts_after)
    same = np.flatnonzero(~changed & (counts > 0))
    length = counts[same]
    owner = np.repeat(same, length)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(length) - length, length)
    differ = before[1][before[0][owner] + within] != after[1][after[0][owner] + within]
    changed[owner[differ]] = True
    return changed
