"""Search of what is new against everything: only pairs with at least one active face; last night's tables hold the others.

An active face is new, or has lost a neighbor that its full table cannot replace. As `search`, but a pair of two faces that are
not active is never looked at.
"""

from __future__ import annotations

import numba
import numpy as np

from faceflow.kernels.search import Probes, by_cell
from faceflow.kernels.tiles import TileKernel
from faceflow.kernels.topk import Buffers, decode


def search_cells(
    vectors: np.ndarray, rows: np.ndarray, probes: Probes, cells: range, active: np.ndarray, k: int, floor: float | None
) -> Buffers:
    """Search every cell of one shard: the active faces that probe it against all that live there.

    Nobody is introduced, and nobody finds an active face by his own probes, so active faces should probe more cells than
    others (`probing.Choice.alone`). vectors, rows, probes, cells: as `search.search_cells`, of the faces that are active or at
    home here; active: bool[n]. Returns buffers with one slot per face: the pair's other face, at both ends.
    """
    buffers = Buffers.empty(len(rows), k, floor)
    kernel = TileKernel(vectors, rows, buffers, probes)
    for members, visitors in by_cell(probes, cells):
        here = active[members]
        new, old = members[here], members[~here]
        if len(new):
            new_vectors = vectors[new]
            kernel.within(new, new_vectors)
            kernel.across(old, new, new_vectors)
        visitors = visitors[active[visitors]]
        if len(visitors):
            # An active member that probes the visitor's home finds it there; one that is not finds nobody by itself.
            kernel.between(visitors, new, vectors[new])
            kernel.across(old, visitors, vectors[visitors])
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
    state = np.zeros(len(kept), np.uint8)
    left = np.empty(len(kept) + 1, np.int64)
    total = _count_left(offsets, neighbors, kept, new_rows, k, state, left)
    rows, values = np.empty(total, np.int32), np.empty(total, np.float32)
    _move_left(offsets, neighbors, similarities, kept, new_rows, left, rows, values)
    return left, rows, values, state


@numba.njit(cache=True, nogil=True)
def _count_left(
    offsets: np.ndarray,
    neighbors: np.ndarray,
    kept: np.ndarray,
    new_rows: np.ndarray,
    k: int,
    state: np.ndarray,
    left: np.ndarray,
) -> int:
    left[0] = 0
    for i in range(len(kept)):
        count = 0
        begin, end = offsets[kept[i]], offsets[kept[i] + 1]
        for e in range(begin, end):
            count += new_rows[neighbors[e]] >= 0
        if count < end - begin:
            state[i] = 2 if end - begin >= k else 1
            if state[i] == 2:
                count = 0
        left[i + 1] = left[i] + count
    return left[-1]


@numba.njit(cache=True, nogil=True)
def _move_left(
    offsets: np.ndarray, neighbors: np.ndarray, similarities: np.ndarray, kept: np.ndarray, new_rows: np.ndarray,
    left: np.ndarray, rows: np.ndarray, values: np.ndarray,
) -> None:  # fmt: skip
    for i in range(len(kept)):
        at = left[i]
        if left[i + 1] > at:
            for e in range(offsets[kept[i]], offsets[kept[i] + 1]):
                row = new_rows[neighbors[e]]
                if row >= 0:
                    rows[at], values[at] = row, similarities[e]
                    at += 1


def take_rows(table: tuple[np.ndarray, np.ndarray], which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows `which` (int[m]) of ragged rows (offsets, values): (offsets, values)."""
    offsets, values = table
    ends = np.zeros(len(which) + 1, np.int64)
    np.cumsum(np.diff(offsets)[which], out=ends[1:])
    out = np.empty(ends[-1], values.dtype)
    _copy_rows(values, offsets, which, out, ends, np.arange(len(which)))
    return ends, out


def put_rows(
    table: tuple[np.ndarray, np.ndarray, np.ndarray], which: np.ndarray, other: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A table (offsets, rows, similarities) in which the rows `which` (int[m], ascending) are those of `other`, in order."""
    counts = np.diff(table[0])
    counts[which] = np.diff(other[0])
    ends = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=ends[1:])
    rest = np.delete(np.arange(len(counts)), which)
    out = [np.empty(ends[-1], column.dtype) for column in table[1:]]
    for column, old, new in zip(out, table[1:], other[1:], strict=True):
        _copy_rows(old, table[0], rest, column, ends, rest)
        _copy_rows(new, other[0], np.arange(len(which)), column, ends, which)
    return ends, out[0], out[1]


@numba.njit(cache=True, nogil=True)
def _copy_rows(
    values: np.ndarray, offsets: np.ndarray, rows: np.ndarray, out: np.ndarray, out_offsets: np.ndarray, out_rows: np.ndarray
) -> None:
    for i in range(len(rows)):
        begin, at = offsets[rows[i]], out_offsets[out_rows[i]]
        for e in range(offsets[rows[i] + 1] - begin):
            out[at + e] = values[begin + e]


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
