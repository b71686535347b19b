"""The random walk whose description the map equation minimises: row flow and edge flow, directed and undirected."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

ALPHA = 0.15
"""Teleportation probability, Infomap's default."""

TOLERANCE = 1e-11
"""L1 change of the row flow at which the power iteration stops: what is missing then is below 6e-11, as each step takes at
least a share ALPHA off it."""

EXTRAPOLATE_EVERY = 6
"""Steps between two power extrapolations. Clusters hardly touch, so the slow modes of the walk all have an eigenvalue
close to 1 - ALPHA, and one extrapolation with that value removes them together (Kamvar, Haveliwala, Manning & Golub,
"Extrapolation methods for accelerating PageRank computations", WWW 2003). The stopping rule does not change. Where one gained
less than plain steps are sure to, there are other modes, which it blows up: then it is the last."""

MAX_ITERATIONS = 400


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


@numba.njit(cache=True, nogil=True, parallel=True)
def _pull(in_offsets: np.ndarray, sources: np.ndarray, weights: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    # Each row sums its own edges in order: the result does not depend on the number of threads.
    for i in numba.prange(len(in_offsets) - 1):
        total = 0.0
        for e in range(in_offsets[i], in_offsets[i + 1]):
            total += x[sources[e]] * weights[e]
        out[i] = total


def row_sums(offsets: np.ndarray, values: np.ndarray) -> np.ndarray:
    """float64[n]: the sum of each row of ragged rows, in the order of its values, whatever the rows before it."""
    out = np.empty(len(offsets) - 1)
    _sum_rows(offsets, values, out)
    return out


@numba.njit(cache=True, nogil=True, parallel=True)
def _sum_rows(offsets: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    for i in numba.prange(len(offsets) - 1):
        total = 0.0
        for e in range(offsets[i], offsets[i + 1]):
            total += values[e]
        out[i] = total


def use_threads(threads: int) -> None:
    """Let compiled loops of this thread use so many CPU threads, as far as the process has them."""
    numba.set_num_threads(max(1, min(threads, numba.config.NUMBA_NUM_THREADS)))


def undirected_flow(graph: Graph, threads: int = 1) -> Flow:
    """Flow of a symmetric graph (`graphs.symmetric`): a row is visited in proportion to the weight of its edges.

    Nothing teleports and nothing dangles; edge (i, j, w) carries w over the sum of all weights, each way.
    """
    use_threads(threads)
    strength = row_sums(graph.out_offsets, graph.out_weights)
    total = float(strength.sum())
    return Flow(strength / (total or 1.0), np.full(len(graph), 1.0 / total if total else 0.0), 0)


def directed_flow(graph: Graph, threads: int = 1, start: np.ndarray | None = None, tolerance: float = TOLERANCE) -> Flow:
    """PageRank flow as Infomap's `--directed` defines it.

    With probability ALPHA, and always from a row without out-edges, the walker teleports to a row in proportion to its
    out-weight; otherwise it follows an edge in proportion to its weight. From the stationary visit rates, one last step
    without teleportation gives the edge flows, normalised to 1, and each row's flow is what comes in.
    Source: Lambiotte & Rosvall, "Ranking and clustering of nodes in networks with smart teleportation", Phys. Rev. E 85
    (2012) (recorded teleportation off, teleportation to links).
    threads: CPU threads, without influence on the result; start: float64[n], visit rates to begin with;
    tolerance: change of the rates in one step, summed over rows, below which they count as stationary.
    """
    n = len(graph)
    use_threads(threads)
    strength = row_sums(graph.out_offsets, graph.out_weights)
    total = float(strength.sum())
    if total == 0:
        return Flow(np.zeros(n), np.zeros(n), 0)
    jump, dangling = strength / total, strength == 0
    inverse = np.divide(1.0, strength, out=np.zeros(n), where=~dangling)
    p = jump.copy() if start is None else start / start.sum()
    after, iterations, change_then = np.empty(n), 0, np.inf
    for _ in range(MAX_ITERATIONS):
        iterations += 1
        _pull(graph.in_offsets, graph.sources, graph.in_weights, p * inverse, after)
        after *= 1 - ALPHA
        after += jump * (ALPHA + (1 - ALPHA) * float(p[dangling].sum()))
        after /= after.sum()
        change = float(np.abs(after - p).sum())
        p, after = after, p
        if change < tolerance:
            break
        if iterations % EXTRAPOLATE_EVERY == 0 and change > 100 * tolerance and change_then > 0:
            if change > change_then * (1 - ALPHA) ** EXTRAPOLATE_EVERY:
                change_then = 0.0
                continue
            change_then = change
            p += (p - after) * ((1 - ALPHA) / ALPHA)
            np.maximum(p, 0, out=p)
            p /= p.sum()
    per_weight = p * inverse
    per_weight /= float(p[~dangling].sum())
    rows = np.empty(n)
    _pull(graph.in_offsets, graph.sources, graph.in_weights, per_weight, rows)
    return Flow(rows, per_weight, iterations)
