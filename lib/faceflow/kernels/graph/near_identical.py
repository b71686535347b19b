"""Near-identical faces count as one: groups about a leader, and a neighbor table in which each group is its leader.

Copies, bursts and frames of one film count as one observation. Left as they are, they fill their own neighbor lists, and
those of everybody near, and the map equation makes a cluster of each film."""

from __future__ import annotations

import numba
import numpy as np

from faceflow.kernels.compiled import kernel
from faceflow.kernels.graph.csr import cut_by_edges
from faceflow.kernels.graph.shared_neighbors import Block

CHUNKS = 4
"""Ranges of rows that are collapsed side by side; each has 4 bytes a row of its own."""


def near_prefix(offsets: np.ndarray, values: np.ndarray, near: float) -> np.ndarray:
    """int64[n]: how many neighbors of each row, the first of its list (which falls), have a similarity of `near` or more."""
    results = np.zeros(len(offsets) - 1, np.int64)
    _near_prefix(offsets, values, np.float32(near), results)
    return results


@kernel
def _near_prefix(offsets: np.ndarray, values: np.ndarray, near: np.float32, results: np.ndarray) -> None:
    for i in range(len(results)):
        e = offsets[i]
        while e < offsets[i + 1] and values[e] >= near:
            e += 1
        results[i] = e - offsets[i]


def lead(rows: np.ndarray, offsets: np.ndarray, targets: np.ndarray, faces: int) -> np.ndarray:
    """int32[faces]: the leader of each face; itself for a leader, and for a face that is near-identical to none.

    rows: int64[r], ascending; targets[offsets[i]:offsets[i + 1]]: the faces that are near-identical to rows[i], the nearest
    first. In the order of the rows, a face follows its nearest leader, or becomes one and takes along those about it that
    follow none: each is near-identical to its leader, so that no chain joins faces that are unlike (Hartigan's leader
    algorithm, Clustering Algorithms, 1975, ch. 3).
    """
    leader = np.full(faces, -1, np.int32)
    _lead(rows, offsets, targets, leader)
    alone = leader < 0
    leader[alone] = np.flatnonzero(alone)
    return leader


@kernel
def _lead(rows: np.ndarray, offsets: np.ndarray, targets: np.ndarray, leader: np.ndarray) -> None:
    for i in range(len(rows)):
        r = rows[i]
        if leader[r] >= 0:
            continue
        for e in range(offsets[i], offsets[i + 1]):
            if leader[targets[e]] == targets[e]:
                leader[r] = targets[e]
                break
        if leader[r] < 0:
            leader[r] = r
            for e in range(offsets[i], offsets[i + 1]):
                if leader[targets[e]] < 0:
                    leader[targets[e]] = r


def distinct_neighbors(own: np.ndarray, offsets: np.ndarray, leaders: np.ndarray) -> np.ndarray:
    """int64[n]: how many leaders other than its own (own int64[n]) the neighbors of each face have, leaders[offsets[i]:…]."""
    results = np.zeros(len(offsets) - 1, np.int64)
    _distinct(own, offsets, leaders, results)
    return results


@kernel
def _distinct(own: np.ndarray, offsets: np.ndarray, leaders: np.ndarray, results: np.ndarray) -> None:
    for i in range(len(results)):
        mine = np.sort(leaders[offsets[i] : offsets[i + 1]])
        for e in range(len(mine)):
            if mine[e] != own[i] and (e == 0 or mine[e] != mine[e - 1]):
                results[i] += 1


def collapse(block: Block, leader: np.ndarray) -> Block:
    """The table with each group as its leader: followers have no neighbors, and are neighbors of no face.

    A leader's list is that of its whole group, a neighbor's similarity the largest that the group has to the neighbor's group.
    block: all rows, each list by falling similarity, which holds of the result too; leader: int32[n], in the numbers of the
    block.
    """
    offsets = block[0]
    followers = np.flatnonzero(leader != np.arange(len(leader)))
    if not len(followers):
        return block
    of = np.argsort(leader[followers], kind="stable")
    starts = np.searchsorted(leader[followers][of], np.arange(len(leader) + 1))
    group = followers[of].astype(np.int64)
    counts, cuts = np.zeros(len(leader), np.int64), cut_by_edges(offsets, CHUNKS)
    none = np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
    groups = leader, starts, group
    _collapse(block, groups, cuts, counts, none)
    new = np.zeros(len(leader) + 1, np.int64)
    np.cumsum(counts, out=new[1:])
    new_rows, new_values = np.empty(new[-1], np.int32), np.empty(new[-1], np.float32)
    _collapse(block, groups, cuts, counts, (new, new_rows, new_values))
    return new, new_rows, new_values


@kernel(parallel=True)
def _collapse(
    block: Block, groups: tuple[np.ndarray, np.ndarray, np.ndarray], cuts: np.ndarray, counts: np.ndarray, made: Block
) -> None:
    # Counts first, without entries in `made`; then fills it. groups: (leader of each row, where each leader's followers begin,
    # the followers).
    offsets, rows, values = block
    leader, starts, group = groups
    new, new_rows, new_values = made
    for c in numba.prange(len(cuts) - 1):
        place = np.full(len(leader), -1, np.int32)  # of a group in the list of the row at hand, from its first entry
        for i in range(cuts[c], cuts[c + 1]):
            if leader[i] != i:
                continue
            begin = new[i] if len(new) else np.int64(0)
            size = 0
            for m in range(starts[i] - 1, starts[i + 1]):
                member = i if m < starts[i] else group[m]
                for e in range(offsets[member], offsets[member + 1]):
                    t = leader[rows[e]]
                    if t == i:
                        continue
                    if place[t] < 0:
                        place[t] = size
                        if len(new):
                            new_rows[begin + size], new_values[begin + size] = t, values[e]
                        size += 1
                    elif len(new) and values[e] > new_values[begin + place[t]]:
                        new_values[begin + place[t]] = values[e]
            for m in range(starts[i] - 1, starts[i + 1]):
                member = i if m < starts[i] else group[m]
                for e in range(offsets[member], offsets[member + 1]):
                    place[leader[rows[e]]] = -1
            if len(new) and starts[i + 1] > starts[i]:
                order = np.argsort(-new_values[begin : begin + size], kind="mergesort")
                new_rows[begin : begin + size] = new_rows[begin : begin + size][order]
                new_values[begin : begin + size] = new_values[begin : begin + size][order]
            counts[i] = size
