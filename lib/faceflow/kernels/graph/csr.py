"""Building the graph in memory: compressed rows both ways from parts, rows ordered for locality, symmetric on request.

Parts are iterated twice and each is let go before the next, so that at the peak the graph itself is all there is: 16 bytes
an edge.
"""

from __future__ import annotations

from collections.abc import Iterable

import numba
import numpy as np

from faceflow.errors import InputError
from faceflow.kernels.compiled import kernel
from faceflow.kernels.mapequation.flow import Graph, use_threads

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Compressed rows: (offsets int64[n + 1], others int32[m], weights [m])."""

Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Consecutive rows of a graph: (offsets int64[r + 1], targets int32[...], weights [...])."""

FIRST_EDGES, LABEL_ROUNDS = 6, 2
"""Of `locality_order`: in a neighbor table the first edges are the strongest."""

CHUNKS = 8
"""Blocks of rows that are transposed side by side; each counts in-edges of every row, 4 bytes a row and block."""


def build_graph(parts: Iterable[Part], threads: int = 1) -> Graph:
    """A graph from consecutive blocks of rows, in their own order. `parts` is iterated twice.

    Edges of weight zero carry no flow and are dropped. Raises InputError for a weight that is negative or not finite, or
    a target that is no row.
    """
    return load(parts, threads, by_locality=False)[0]


def load(parts: Iterable[Part], threads: int = 1, by_locality: bool = True) -> tuple[Graph, np.ndarray]:
    """(the graph, the old row of each of its rows int64[n]): as `build_graph`, rows in `locality_order` if so asked."""
    offsets, targets, weights, order = compress(parts, threads, by_locality)
    return Graph(offsets, targets, weights, *transpose(offsets, targets, weights)), order


def compress(
    parts: Iterable[Part], threads: int = 1, by_locality: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The rows of all parts as one block (offsets int64[n + 1], targets int32[m], weights float32[m]), each row's edges in the
    order they came in, and the old row of each of its rows int64[n]. Rows are in `locality_order` if so asked, and targets
    numbered so. Raises as `build_graph`."""
    use_threads(threads)
    counts, firsts, edges = [], [], 0
    lowest: int = 0
    highest: int = -1
    for offsets, targets, weights in parts:
        kept = np.empty(len(offsets) - 1, np.int64)
        first = np.full((len(kept) if by_locality else 0, FIRST_EDGES), -1, np.int32)
        low, high, wrong = map(int, _survey(offsets, targets, weights, kept, first))
        lowest, highest = min(lowest, low), max(highest, high)
        if wrong:
            raise InputError("edge weights must be finite and not negative")
        counts.append(kept)
        firsts.append(first)
        edges += int(kept.sum())
    degrees = np.concatenate([np.empty(0, np.int64), *counts])
    n = len(degrees)
    if lowest < 0 or highest >= n:
        raise InputError(f"an edge leads to row {lowest if lowest < 0 else highest}, but there are only {n} rows")
    order = np.arange(n)
    if by_locality:
        order = locality_order(np.concatenate([np.empty((0, FIRST_EDGES), np.int32), *firsts]))
    del firsts
    number = np.empty(n, np.int32)
    number[order] = np.arange(n, dtype=np.int32)
    out_offsets = np.zeros(n + 1, np.int64)
    np.cumsum(degrees[order], out=out_offsets[1:])
    targets_out, weights_out = np.empty(edges, np.int32), np.empty(edges, np.float32)
    row = 0
    for offsets, targets, weights in parts:
        _copy_rows(offsets, targets, weights, row, number, out_offsets, targets_out, weights_out)
        row += len(offsets) - 1
    return out_offsets, targets_out, weights_out, order


def taken_back(block: Part, order: np.ndarray, number: np.ndarray, rows: range) -> Part:
    """Consecutive rows of `compress`'s parts, by their old numbers, from its block (or one with fewer edges): number: int64[n],
    the new row of each old one."""
    selected = number[rows.start : rows.stop]
    offsets = np.zeros(len(selected) + 1, np.int64)
    np.cumsum(np.diff(block[0])[selected], out=offsets[1:])
    targets, weights = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    _copy_back(*block, selected, order, offsets, targets, weights)
    return offsets, targets, weights


def locality_order(firsts: np.ndarray) -> np.ndarray:
    """An order of the rows in which rows of one cluster stand near each other: int64[n], the old row of each new one.

    firsts: int32[n, FIRST_EDGES], each row's first neighbors, -1 for none. Every row takes the smallest label among its own
    and theirs, a few times over; rows are then sorted by label. Cache misses are what flow and moves cost; on 1M faces in
    random order this halves both.
    """
    label = np.arange(len(firsts), dtype=np.int32)
    for _ in range(LABEL_ROUNDS):
        _smallest_labels(firsts, label)
    return np.argsort(label, kind="stable")


def symmetric(graph: Graph) -> Graph:
    """Every edge in both directions; where both were there, both remain. A loop stays one, as Infomap counts it. Both ways
    share one set of arrays."""
    offsets = graph.out_offsets + graph.in_offsets
    offsets[1:] -= np.cumsum(_count_loops(graph.out_offsets, graph.targets))
    targets, weights = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    _interleave(
        (graph.out_offsets, graph.targets, graph.out_weights), (graph.in_offsets, graph.sources, graph.in_weights),
        (offsets, targets, weights),
    )  # fmt: skip
    return Graph(offsets, targets, weights, offsets, targets, weights)


def cut_by_edges(offsets: np.ndarray, chunks: int) -> np.ndarray:
    """int64[chunks + 1]: where to cut compressed rows into chunks of about equally many edges."""
    cuts = np.searchsorted(offsets, offsets[-1] * np.arange(chunks + 1) // chunks)
    cuts[0], cuts[-1] = 0, len(offsets) - 1
    return cuts


def transpose(offsets: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same edges by target: (in_offsets, sources, weights); sources rise within a row."""
    n = len(offsets) - 1
    cuts = cut_by_edges(offsets, CHUNKS)
    before = np.zeros((CHUNKS, n), np.int32)
    in_offsets = np.zeros(n + 1, np.int64)
    sources, moved = np.empty(len(targets), np.int32), np.empty(len(targets), weights.dtype)
    _count_targets(offsets, targets, cuts, before)
    _start_chunks(before, in_offsets)
    _transpose(offsets, targets, weights, cuts, before, in_offsets, sources, moved)
    return in_offsets, sources, moved


@kernel(parallel=True)
def _survey(
    offsets: np.ndarray, targets: np.ndarray, weights: np.ndarray, kept: np.ndarray, firsts: np.ndarray
) -> tuple[int, int, int]:
    # Lowest and highest target, and the weights that are negative or not finite.
    lowest, highest, wrong = 0, -1, 0
    for i in numba.prange(len(kept)):
        count = 0
        for e in range(offsets[i], offsets[i + 1]):
            lowest = min(lowest, int(targets[e]))
            highest = max(highest, int(targets[e]))
            wrong += not 0 <= weights[e] < np.inf
            if weights[e] > 0:
                if count < FIRST_EDGES and len(firsts):
                    firsts[i, count] = targets[e]
                count += 1
        kept[i] = count
    return lowest, highest, wrong


@kernel
def _smallest_labels(firsts: np.ndarray, label: np.ndarray) -> None:
    for i in range(len(label)):
        least = label[i]
        for e in range(FIRST_EDGES):
            if firsts[i, e] >= 0:
                least = min(least, label[firsts[i, e]])
        label[i] = least
        for e in range(FIRST_EDGES):
            if firsts[i, e] >= 0:
                label[firsts[i, e]] = min(label[firsts[i, e]], least)


@kernel(parallel=True)
def _copy_rows(
    old_offsets: np.ndarray, old_targets: np.ndarray, old_weights: np.ndarray, first_row: int, number: np.ndarray,
    offsets: np.ndarray, targets: np.ndarray, weights: np.ndarray,
) -> None:  # fmt: skip
    for i in numba.prange(len(old_offsets) - 1):
        at = offsets[number[first_row + i]]
        for e in range(old_offsets[i], old_offsets[i + 1]):
            if old_weights[e] > 0:
                targets[at] = number[old_targets[e]]
                weights[at] = old_weights[e]
                at += 1


@kernel(parallel=True)
def _copy_back(
    offsets: np.ndarray, targets: np.ndarray, weights: np.ndarray, rows: np.ndarray, order: np.ndarray,
    out_offsets: np.ndarray, out_targets: np.ndarray, out_weights: np.ndarray,
) -> None:  # fmt: skip
    for i in numba.prange(len(rows)):
        shift = out_offsets[i] - offsets[rows[i]]
        for e in range(offsets[rows[i]], offsets[rows[i] + 1]):
            out_targets[e + shift] = order[targets[e]]
            out_weights[e + shift] = weights[e]


@kernel(parallel=True)
def _count_loops(offsets: np.ndarray, targets: np.ndarray) -> np.ndarray:
    out = np.zeros(len(offsets) - 1, np.int64)
    for i in numba.prange(len(out)):
        for e in range(offsets[i], offsets[i + 1]):
            out[i] += targets[e] == i
    return out


@kernel(parallel=True)
def _interleave(out: Rows, into: Rows, made: Rows) -> None:
    out_offsets, targets, out_weights = out
    in_offsets, sources, in_weights = into
    offsets, others, weights = made
    for i in numba.prange(len(offsets) - 1):
        at = offsets[i]
        for e in range(out_offsets[i], out_offsets[i + 1]):
            others[at] = targets[e]
            weights[at] = out_weights[e]
            at += 1
        for e in range(in_offsets[i], in_offsets[i + 1]):
            if sources[e] != i:
                others[at] = sources[e]
                weights[at] = in_weights[e]
                at += 1


@kernel(parallel=True)
def _count_targets(offsets: np.ndarray, targets: np.ndarray, cuts: np.ndarray, before: np.ndarray) -> None:
    for c in numba.prange(len(cuts) - 1):
        for e in range(offsets[cuts[c]], offsets[cuts[c + 1]]):
            before[c, targets[e]] += 1


@kernel
def _start_chunks(before: np.ndarray, in_offsets: np.ndarray) -> None:
    for t in range(before.shape[1]):
        total = 0
        for c in range(before.shape[0]):
            selected = before[c, t]
            before[c, t] = total
            total += selected
        in_offsets[t + 1] = in_offsets[t] + total


@kernel(parallel=True)
def _transpose(
    offsets: np.ndarray, targets: np.ndarray, weights: np.ndarray, cuts: np.ndarray, before: np.ndarray,
    in_offsets: np.ndarray, sources: np.ndarray, moved: np.ndarray,
) -> None:  # fmt: skip
    for c in numba.prange(len(cuts) - 1):
        for i in range(cuts[c], cuts[c + 1]):
            for e in range(offsets[i], offsets[i + 1]):
                t = targets[e]
                at = in_offsets[t] + before[c, t]
                before[c, t] += 1
                sources[at] = i
                moved[at] = weights[e]
