"""The random walk whose description the map equation minimises: CSR graph both ways, row flow and edge flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from faceflow.errors import InputError

ALPHA = 0.15
"""Teleportation probability, Infomap's default."""

TOLERANCE = 1e-11
"""L1 change of the row flow at which the power iteration stops: what is missing then is below 6e-11, as each step takes at
least a share ALPHA off it."""

EXTRAPOLATE_EVERY = 6
"""Steps between two power extrapolations. Clusters hardly touch, so the slow modes of the walk all have an eigenvalue
close to 1 - ALPHA, and one extrapolation with that value removes them together (Kamvar, Haveliwala, Manning & Golub,
"Extrapolation methods for accelerating PageRank computations", WWW 2003). The stopping rule does not change."""

MAX_ITERATIONS = 400

FIRST_EDGES, LABEL_ROUNDS = 6, 2
"""Of `locality_order`: in a neighbor table the first edges are the strongest."""


@dataclass(frozen=True)
class Graph:
    """A weighted directed graph in compressed rows, both ways.

    out_offsets, in_offsets: int64[n + 1]; targets, sources: int32[m]; out_weights, in_weights: float32[m], positive.
    """

    out_offsets: np.ndarray
    targets: np.ndarray
    out_weights: np.ndarray
    in_offsets: np.ndarray
    sources: np.ndarray
    in_weights: np.ndarray

    def __len__(self) -> int:
        return len(self.out_offsets) - 1


@dataclass(frozen=True)
class Flow:
    """Stationary flow: rows float64[n], visit rate of each row, sums to 1; per_weight float64[n]: flow that each unit of
    a row's out-weight carries, so that edge (i, j, w) carries per_weight[i] * w."""

    rows: np.ndarray
    per_weight: np.ndarray
    iterations: int


def build_graph(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Graph:
    """A graph from consecutive row blocks in compressed form: (offsets int64[r + 1], targets int32[...], weights[...]).

    Edges of weight zero carry no flow and are dropped. Raises InputError for a weight that is negative or not finite, or
    a target that is no row.
    """
    n = sum(len(offsets) - 1 for offsets, _, _ in parts)
    out_offsets, m = np.zeros(n + 1, np.int64), sum(len(targets) for _, targets, _ in parts)
    targets, weights = np.empty(m, np.int32), np.empty(m, np.float32)
    row = at = 0
    for offsets, part_targets, part_weights in parts:
        if len(part_targets) and not (part_targets.min() >= 0 and part_targets.max() < n):
            raise InputError(f"an edge leads to row {part_targets.max()}, but there are only {n} rows")
        if not (np.isfinite(part_weights).all() and (part_weights >= 0).all()):
            raise InputError("edge weights must be finite and not negative")
        r = len(offsets) - 1
        if (part_weights > 0).all():
            kept: slice | np.ndarray = slice(None)
            counts = np.diff(offsets)
        else:
            kept = part_weights > 0
            owner = np.repeat(np.arange(r), np.diff(offsets))
            counts = np.bincount(owner[kept], minlength=r)
        size = int(counts.sum())
        targets[at : at + size], weights[at : at + size] = part_targets[kept], part_weights[kept]
        np.cumsum(counts, out=out_offsets[row + 1 : row + 1 + r])
        out_offsets[row + 1 : row + 1 + r] += at
        row, at = row + r, at + size
    return graph_of(out_offsets, targets[:at], weights[:at])


def graph_of(offsets: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> Graph:
    """A graph from its compressed rows."""
    return Graph(offsets, targets, weights, *transpose(offsets, targets, weights))


def locality_order(graph: Graph) -> np.ndarray:
    """An order of the rows in which rows of one cluster stand near each other: int64[n], the old row of each new one.

    Every row takes the smallest label among its own and its first FIRST_EDGES neighbors', a few times over; rows are then
    sorted by label. Cache misses are what flow and moves cost; on 1M faces in random order this halves both.
    """
    label = np.arange(len(graph), dtype=np.int32)
    for _ in range(LABEL_ROUNDS):
        _smallest_labels(graph.out_offsets, graph.targets, label)
    return np.argsort(label, kind="stable")


@numba.njit(cache=True, nogil=True)
def _smallest_labels(offsets: np.ndarray, targets: np.ndarray, label: np.ndarray) -> None:
    for i in range(len(label)):
        least = label[i]
        end = min(offsets[i + 1], offsets[i] + FIRST_EDGES)
        for e in range(offsets[i], end):
            least = min(least, label[targets[e]])
        label[i] = least
        for e in range(offsets[i], end):
            label[targets[e]] = min(label[targets[e]], least)


def reordered(graph: Graph, order: np.ndarray) -> Graph:
    """The same graph with row order[i] as row i; within a row, edges keep their order."""
    number = np.empty(len(order), np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    offsets = np.zeros(len(order) + 1, np.int64)
    np.cumsum(np.diff(graph.out_offsets)[order], out=offsets[1:])
    targets, weights = np.empty_like(graph.targets), np.empty_like(graph.out_weights)
    _copy_rows(graph.out_offsets, graph.targets, graph.out_weights, order, number, offsets, targets, weights)
    return graph_of(offsets, targets, weights)


@numba.njit(cache=True, nogil=True, parallel=True)
def _copy_rows(
    old_offsets: np.ndarray, old_targets: np.ndarray, old_weights: np.ndarray, order: np.ndarray, number: np.ndarray,
    offsets: np.ndarray, targets: np.ndarray, weights: np.ndarray,
) -> None:  # fmt: skip
    for i in numba.prange(len(order)):
        at = offsets[i]
        for e in range(old_offsets[order[i]], old_offsets[order[i] + 1]):
            targets[at] = number[old_targets[e]]
            weights[at] = old_weights[e]
            at += 1


def transpose(offsets: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same edges by target: (in_offsets, sources, weights); sources rise within a row."""
    n = len(offsets) - 1
    in_offsets = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(targets, minlength=n), out=in_offsets[1:])
    sources, moved = np.empty(len(targets), np.int32), np.empty(len(targets), weights.dtype)
    _transpose(offsets, targets, weights, in_offsets[:-1].copy(), sources, moved)
    return in_offsets, sources, moved


@numba.njit(cache=True, nogil=True)
def _transpose(
    offsets: np.ndarray, targets: np.ndarray, weights: np.ndarray,
    cursor: np.ndarray, sources: np.ndarray, moved: np.ndarray,
) -> None:  # fmt: skip
    for i in range(len(offsets) - 1):
        for e in range(offsets[i], offsets[i + 1]):
            at = cursor[targets[e]]
            cursor[targets[e]] = at + 1
            sources[at] = i
            moved[at] = weights[e]


@numba.njit(cache=True, nogil=True, parallel=True)
def _pull(in_offsets: np.ndarray, sources: np.ndarray, weights: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    # Each row sums its own edges in order: the result does not depend on the number of threads.
    for i in numba.prange(len(in_offsets) - 1):
        total = 0.0
        for e in range(in_offsets[i], in_offsets[i + 1]):
            total += x[sources[e]] * weights[e]
        out[i] = total


@numba.njit(cache=True, nogil=True, parallel=True)
def _row_sums(offsets: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    for i in numba.prange(len(offsets) - 1):
        total = 0.0
        for e in range(offsets[i], offsets[i + 1]):
            total += weights[e]
        out[i] = total


def directed_flow(graph: Graph, threads: int = 1, start: np.ndarray | None = None) -> Flow:
    """PageRank flow as Infomap's `--directed` defines it.

    With probability ALPHA, and always from a row without out-edges, the walker teleports to a row in proportion to its
    out-weight; otherwise it follows an edge in proportion to its weight. From the stationary visit rates, one last step
    without teleportation gives the edge flows, normalised to 1, and each row's flow is what comes in.
    Source: Lambiotte & Rosvall, "Ranking and clustering of nodes in networks with smart teleportation", Phys. Rev. E 85
    (2012) (recorded teleportation off, teleportation to links).
    threads: CPU threads, without influence on the result; start: float64[n], visit rates to begin with.
    """
    n = len(graph)
    strength = np.empty(n)
    numba.set_num_threads(max(1, min(threads, numba.config.NUMBA_NUM_THREADS)))
    _row_sums(graph.out_offsets, graph.out_weights, strength)
    total = float(strength.sum())
    if total == 0:
        return Flow(np.zeros(n), np.zeros(n), 0)
    jump, dangling = strength / total, strength == 0
    inverse = np.divide(1.0, strength, out=np.zeros(n), where=~dangling)
    p = jump.copy() if start is None else start / start.sum()
    after, iterations = np.empty(n), 0
    for _ in range(MAX_ITERATIONS):
        iterations += 1
        _pull(graph.in_offsets, graph.sources, graph.in_weights, p * inverse, after)
        after *= 1 - ALPHA
        after += jump * (ALPHA + (1 - ALPHA) * float(p[dangling].sum()))
        after /= after.sum()
        change = float(np.abs(after - p).sum())
        p, after = after, p
        if change < TOLERANCE:
            break
        if iterations % EXTRAPOLATE_EVERY == 0 and change > 100 * TOLERANCE:
            p += (p - after) * ((1 - ALPHA) / ALPHA)
            np.maximum(p, 0, out=p)
            p /= p.sum()
    per_weight = p * inverse
    per_weight /= float(p[~dangling].sum())
    rows = np.empty(n)
    _pull(graph.in_offsets, graph.sources, graph.in_weights, per_weight, rows)
    return Flow(rows, per_weight, iterations)
