"""Incremental search: only pairs with at least one active face; the base run's tables hold the others.

An active face is new, or has lost a neighbor that its full table cannot replace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numba
import numpy as np

from faceflow.kernels.compiled import kernel
from faceflow.kernels.knn.tile_kernel import TileKernel
from faceflow.kernels.knn.tile_search import Probes, probes_by_cell
from faceflow.kernels.knn.topk import Buffers, CandidateList, decode, key_of, similarity_of

MOST_RESIDENTS = 2_048
"""Faces of one cell that are compared at once: what they find is put away before the next come."""

Residents = Callable[[int], Iterable[tuple[np.ndarray, np.ndarray]]]
"""The faces of a cell that are not active, in blocks of MOST_RESIDENTS at most: (rows int32[m], unit vectors float32[m, d])."""


def search_cells(
    vectors: np.ndarray, rows: np.ndarray, probes: Probes, cells: range, own: range, residents: Residents, k: int,
    threshold: float | None, keys: np.ndarray | None = None,
) -> tuple[CandidateList, CandidateList]:  # fmt: skip
    """Search a range of cells: the active faces that probe a cell against those that are assigned to it.

    There is no neighbor join, and other faces do not probe, so active faces should probe more cells than in a full search
    (`probing.Choice.alone`). vectors, rows, probes, cells: as `tile_search.search_cells`, of the active faces alone, which are
    compared with each other in cells of `own` only; keys: memory for len(rows) + MOST_RESIDENTS buffers. Inactive faces appear
    only in their assigned cell, so they need a buffer only meanwhile.
    Returns the candidates of the active faces, and of the others that have any: the pair's other face, at both ends.
    """
    n = len(rows)
    buffers = Buffers.empty(n + MOST_RESIDENTS, k, threshold, keys)
    rows = np.concatenate([rows, np.zeros(MOST_RESIDENTS, np.int32)])
    kernel = TileKernel(vectors, rows, buffers, probes)
    results: list[CandidateList] = []
    for cell, selected, assigned in probes_by_cell(probes, cells):
        new = selected[assigned]
        if cell in own and len(new):
            kernel.within(new, vectors[new])
            # An active member that probes the other face's assigned cell finds it there.
            kernel.between(selected[~assigned], new, vectors[new])
        for their_rows, their_vectors in residents(cell):
            slots = np.arange(n, n + len(their_rows))
            rows[slots] = their_rows
            buffers.clear(n, threshold)
            kernel.across(selected, slots, their_vectors)
            offsets, keys = buffers.take(slots)
            met = np.flatnonzero(np.diff(offsets))
            results.append((their_rows[met], np.append(offsets[met], offsets[-1]), keys))
    return (rows[:n], *buffers.take(np.arange(n))), joined(results)


def joined(lists: list[CandidateList]) -> CandidateList:
    """Lists of different rows as one."""
    rows = [np.empty(0, np.int32), *(rows for rows, _, _ in lists)]
    counts = [np.empty(0, np.int64), *(np.diff(offsets) for _, offsets, _ in lists)]
    keys = [np.empty(0, np.uint64), *(keys for _, _, keys in lists)]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return np.concatenate(rows), offsets, np.concatenate(keys)


def search_part(
    queries: np.ndarray, query_rows: np.ndarray, members: np.ndarray, first_row: int, active: np.ndarray, k: int,
    threshold: float | None,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """All active faces against one part, for the exact plan: (offsets, keys) of the queries, and of the part's faces.

    queries: float32[q, d] and query_rows: int32[q], every active face of the data set; members: float32[m, d], unit rows that
    start at first_row; active: bool[m], which of them are among the queries: their candidates come as queries' only.
    """
    q, m = len(queries), len(members)
    buffers = Buffers.empty(q + m, k + 1, threshold)  # one more, as a query may meet itself
    buffers.thresholds[q:][active] = np.inf
    rows = np.concatenate([query_rows, np.arange(first_row, first_row + m)]).astype(np.int32)
    kernel = TileKernel(queries, rows, buffers)
    kernel.between(np.arange(q), np.arange(q, q + m), members)
    offsets, keys = buffers.take(np.arange(q))
    owner = np.repeat(query_rows, np.diff(offsets))
    kept = decode(keys)[1] != owner
    ends = np.concatenate([[0], np.cumsum(kept)])[offsets]
    return (ends, keys[kept]), buffers.take(np.arange(q, q + m))


@kernel(parallel=True)
def leads_to(offsets: np.ndarray, rows: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """bool[n]: which of the rows of a block (offsets int64[n + 1], rows int32[m]) have an edge to a marked one (bool[N])."""
    out = np.zeros(len(offsets) - 1, np.bool_)
    for i in numba.prange(len(out)):
        for e in range(offsets[i], offsets[i + 1]):
            if marked[rows[e]]:
                out[i] = True
                break
    return out


def carry_table(
    offsets: np.ndarray, neighbors: np.ndarray, similarities: np.ndarray, kept: np.ndarray, new_rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The base run's neighbors of the faces that were kept, by this run's rows.

    offsets, neighbors, similarities: one part of the base run's table; kept: int[...], ascending, which of its rows were
    kept; new_rows: int32[N], this run's row of every base row, -1 for those that are gone; k: most neighbors of a row.
    Returns (offsets, rows, similarities, state uint8[len(kept)]): 0: unchanged; 1: has lost neighbors; 2: has lost some of k,
    which cut off others: it has no neighbors here, and must be searched for again.
    """
    state = np.zeros(len(kept), np.uint8)
    left = np.empty(len(kept) + 1, np.int64)
    total = _count_left(offsets, neighbors, kept, new_rows, k, state, left)
    rows, values = np.empty(total, np.int32), np.empty(total, np.float32)
    _move_left(offsets, neighbors, similarities, kept, new_rows, left, rows, values)
    return left, rows, values, state


@kernel
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


@kernel
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


def merge_into(
    table: tuple[np.ndarray, np.ndarray, np.ndarray], lists: list[CandidateList], active: np.ndarray, new: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A table (offsets, rows, similarities) of n rows with new candidates: (offsets, rows, similarities, changed).

    lists: as `topk.merge` takes them. active: bool[n], the rows that were searched: their own lists are empty, and they take
    every candidate. Others know all faces but those of new, bool[N], and take only these. Each row keeps its k best; changed:
    bool[n], those that took any.
    """
    offsets, rows, values = table
    n = len(offsets) - 1
    begin = np.zeros(n + 1, np.int64)
    for owners, ends, keys in lists:
        _count_wanted(owners, ends, keys, active, new, begin[1:])
    np.cumsum(begin, out=begin)
    pool, cursor = np.empty(begin[-1], np.uint64), begin[:-1].copy()
    for owners, ends, keys in lists:
        _put_wanted(owners, ends, keys, active, new, cursor, pool)
    counts, out_offsets = np.empty(n, np.int64), np.zeros(n + 1, np.int64)
    _sort_once(begin, pool, counts)
    np.cumsum(np.minimum(np.diff(offsets) + counts, k), out=out_offsets[1:])
    out_rows, out_values, changed = (
        np.empty(out_offsets[-1], np.int32),
        np.empty(out_offsets[-1], np.float32),
        np.zeros(n, bool),
    )
    merged = Rows(out_offsets, out_rows, out_values.view(np.uint32))
    _merge_sorted(Rows(offsets, rows, values.view(np.uint32)), begin, counts, pool, merged, changed)
    return out_offsets, out_rows, out_values, changed


@kernel
def _count_wanted(
    owners: np.ndarray, ends: np.ndarray, keys: np.ndarray, active: np.ndarray, new: np.ndarray, counts: np.ndarray
) -> None:
    for i in range(len(owners)):
        for e in range(ends[i], ends[i + 1]):
            counts[owners[i]] += active[owners[i]] or new[np.uint32(keys[e])]


@kernel
def _put_wanted(
    owners: np.ndarray, ends: np.ndarray, keys: np.ndarray, active: np.ndarray, new: np.ndarray, cursor: np.ndarray,
    pool: np.ndarray,
) -> None:  # fmt: skip
    for i in range(len(owners)):
        for e in range(ends[i], ends[i + 1]):
            if active[owners[i]] or new[np.uint32(keys[e])]:
                pool[cursor[owners[i]]] = keys[e]
                cursor[owners[i]] += 1


@kernel
def _sort_once(begin: np.ndarray, pool: np.ndarray, counts: np.ndarray) -> None:
    # Several shards may have found the same pair.
    for i in range(len(counts)):
        mine = pool[begin[i] : begin[i + 1]]
        if len(mine) > 1:
            mine.sort()
        at = 0
        for e in range(len(mine)):
            if e == 0 or mine[e] != mine[e - 1]:
                mine[at] = mine[e]
                at += 1
        counts[i] = at


class Rows(NamedTuple):
    """Neighbor lists as compressed rows: offsets int64[n + 1], rows int32[m], bits uint32[m] of the similarities."""

    offsets: np.ndarray
    rows: np.ndarray
    bits: np.ndarray


@kernel
def _merge_sorted(
    old: Rows, begin: np.ndarray, counts: np.ndarray, pool: np.ndarray, merged: Rows, changed: np.ndarray
) -> None:
    # counts[i] new keys of row i from pool[begin[i]] on, sorted; merged.offsets says how many entries a row ends with.
    offsets, rows, bits = old
    out_offsets, out_rows, out_bits = merged
    for i in range(len(counts)):
        have, at, end = np.uint64(offsets[i]), np.uint64(out_offsets[i]), np.uint64(out_offsets[i + 1])
        for f in range(np.uint64(begin[i]), np.uint64(begin[i] + counts[i])):
            while at < end and have < np.uint64(offsets[i + 1]) and key_of(bits[have], rows[have]) < pool[f]:
                out_rows[at], out_bits[at] = rows[have], bits[have]
                at, have = at + np.uint64(1), have + np.uint64(1)
            if at == end:
                break
            out_rows[at], out_bits[at] = np.int32(np.uint32(pool[f])), np.float32(similarity_of(pool[f])).view(np.uint32)
            at += np.uint64(1)
            changed[i] = True
        for e in range(end - at):
            out_rows[at + e], out_bits[at + e] = rows[have + e], bits[have + e]
