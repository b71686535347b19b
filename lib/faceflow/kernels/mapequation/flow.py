"""The random walk whose description the map equation minimises: row flow and edge flow, directed and undirected."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from faceflow.kernels.compiled import kernel

ALPHA = 0.15
"""Teleportation probability, Infomap's default."""

TOLERANCE = 1e-11
"""L1 change of the row flow at which the power iteration stops: what is missing then is below 6e-11, as each step takes at
least a share ALPHA off it."""

MOST_SOLVER_STEPS = 60
"""Steps of the solver, of two products each: on graphs of faces it needs 6 to 20. What it leaves, the power iteration does."""

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


@kernel(parallel=True)
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


@kernel(parallel=True)
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
    """Flow of a symmetric graph (`csr.symmetric`): a row is visited in proportion to the weight of its edges.

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
    threads: CPU threads, without influence on the result; start: float64[n], `rows` of the flow of a graph like it;
    tolerance: change of the rates in one step, summed over rows, below which they count as stationary.
    The rates solve a linear system (`_solve`); steps of the walk itself, one as a rule, then show that they are stationary.
    """
    n = len(graph)
    use_threads(threads)
    strength = row_sums(graph.out_offsets, graph.out_weights)
    total = float(strength.sum())
    if total == 0:
        return Flow(np.zeros(n), np.zeros(n), 0)
    jump, dangling = strength / total, strength == 0
    inverse = np.divide(1.0, strength, out=np.zeros(n), where=~dangling)
    p = jump if start is None else _with_teleportation(start / start.sum(), jump, dangling)
    p, iterations = _solve(graph, inverse, jump, p, tolerance)
    after = np.empty(n)
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
    per_weight = p * inverse
    per_weight /= float(p[~dangling].sum())
    rows = np.empty(n)
    _pull(graph.in_offsets, graph.sources, graph.in_weights, per_weight, rows)
    return Flow(rows, per_weight, iterations)


def _with_teleportation(rows: np.ndarray, jump: np.ndarray, dangling: np.ndarray) -> np.ndarray:
    """The visit rates with teleportation, of whose last step these are the rows."""
    stuck = (1 - ALPHA) * float(rows[dangling].sum())
    stuck /= 1 + stuck
    return (1 - ALPHA) * (1 - stuck) * rows + jump * (ALPHA + (1 - ALPHA) * stuck)


def _solve(graph: Graph, inverse: np.ndarray, jump: np.ndarray, start: np.ndarray, tolerance: float) -> tuple[np.ndarray, int]:
    """(visit rates float64[n] near `tolerance`, products that took): x of (I - (1 - ALPHA) W) x = jump, normalised, where W
    moves a walker along an edge. As dangling rows teleport where all do, that is the walk's (Del Corso, Gulli & Romani,
    "Fast PageRank computation via a sparse linear system", Internet Math. 2005).

    By BiCGSTAB (van der Vorst, SIAM J. Sci. Stat. Comput. 13, 1992): 33 products where the power iteration takes 150 (1M faces,
    90M edges). Sums are NumPy's, and do not depend on threads. Where it breaks down, what it had by then is returned.
    """

    def apply(vector: np.ndarray, out: np.ndarray) -> np.ndarray:
        np.multiply(vector, inverse, out=scaled)
        _pull(graph.in_offsets, graph.sources, graph.in_weights, scaled, out)
        out *= ALPHA - 1
        out += vector
        return out

    def dot(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.multiply(a, b, out=scaled).sum())

    scaled, direction, turned, image = np.empty_like(jump), np.zeros_like(jump), np.zeros_like(jump), np.empty_like(jump)
    # Rates as they are visited sum to 1; x sums to as much as leaks: what the walk loses of it is what jump puts in.
    x = start / (1 - (1 - ALPHA) * float(start[inverse > 0].sum()))
    residual = jump - apply(x, image)
    shadow = residual.copy()
    least, best, products = float(np.abs(residual).sum()), x.copy(), 1
    rho = alpha = omega = 1.0
    for _ in range(MOST_SOLVER_STEPS):
        if least < tolerance * float(x.sum()):
            break
        before, rho = rho, dot(shadow, residual)
        if rho == 0:
            break
        direction -= np.multiply(turned, omega, out=scaled)
        direction *= rho / before * alpha / omega
        direction += residual
        apply(direction, turned)
        products += 2
        along = dot(shadow, turned)
        if along == 0:
            break
        alpha = rho / along
        x += np.multiply(direction, alpha, out=scaled)
        residual -= np.multiply(turned, alpha, out=scaled)
        apply(residual, image)
        size = dot(image, image)
        omega = dot(image, residual) / size if size else 0.0
        x += np.multiply(residual, omega, out=scaled)
        residual -= np.multiply(image, omega, out=scaled)
        left = float(np.abs(residual).sum())
        if left < least:
            least = left
            best[:] = x
        if omega == 0 or not np.isfinite(left):
            break
    rates = np.maximum(best, 0)
    return rates / rates.sum(), products
