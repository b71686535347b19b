"""The two-level map equation, minimised by greedy moves: our own engine. Source of the objective: Rosvall, Axelsson &
Bergstrom, "The map equation", Eur. Phys. J. Special Topics 178 (2009)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from faceflow.errors import InputError
from faceflow.kernels.compiled import kernel
from faceflow.kernels.graph.csr import Part, cut_by_edges, load, symmetric
from faceflow.kernels.mapequation.flow import TOLERANCE, Flow, Graph, directed_flow, undirected_flow
from faceflow.kernels.mapequation.greedy import first_modules, settle
from faceflow.kernels.mapequation.network import Network, aggregate, dense, network_of, plogp
from faceflow.tables import Partition

SMALLEST_ROUND = 1e-6
"""Relative gain of one round of tuning below which it is the last."""

MAX_ROUNDS = 20

PARALLEL_EDGES = 1_000_000
"""Edges below which one thread is faster: waking others takes longer than the loops do, the more so on a busy machine."""

EARLIER_TOLERANCE = 1e-7
"""As `flow.TOLERANCE`, where the flow continues from an earlier one: the codelength is right to about a millionth."""

MOST_LOST = 3e-5
"""Share of the codelength that continuing from earlier modules may cost, as far as one coarse-tuning tells."""

SUM_CHUNKS = 16
"""Blocks of rows whose sums `codelength` takes side by side, at most."""

RESTART_EDGES, MAX_RESTARTS = 1_000_000, 16
"""Small graphs are begun again from other orders while that touches no more edges than this, and at most so often."""


@kernel
def _sum_plogp(x: np.ndarray) -> float:
    total = 0.0
    for v in x:
        total += plogp(v)
    return total


@kernel(parallel=True)
def _module_flows(
    offsets: np.ndarray, targets: np.ndarray, weights: np.ndarray, scale: np.ndarray, module: np.ndarray, cuts: np.ndarray,
    enter: np.ndarray, leave: np.ndarray,
) -> None:  # fmt: skip
    for c in numba.prange(len(cuts) - 1):
        for i in range(cuts[c], cuts[c + 1]):
            a = module[i]
            for e in range(offsets[i], offsets[i + 1]):
                b = module[targets[e]]
                if a != b:
                    f = weights[e] * scale[i]
                    leave[c, a] += f
                    enter[c, b] += f


def codelength(graph: Graph, flow: Flow, module: np.ndarray) -> float:
    """Bits a step of the partition: L = plogp(sum enter) - sum plogp(enter) - sum plogp(leave) + sum plogp(leave + p)
    - sum plogp(row flow), over modules with enter and leave the flow in and out and p the flow of their rows.

    module: int64[n], any labels. Summed in float64 from the edges: nothing is carried over from the optimisation.
    """
    numbered, count = dense(module)
    # Each chunk of rows sums for itself; how many there are depends on the graph alone, so the result does not on the threads.
    chunks = int(np.clip(len(graph.targets) // (4 * count), 1, SUM_CHUNKS))
    cuts = cut_by_edges(graph.out_offsets, chunks)
    enter, leave = np.zeros((chunks, count)), np.zeros((chunks, count))
    _module_flows(graph.out_offsets, graph.targets, graph.out_weights, flow.per_weight, numbered, cuts, enter, leave)
    enter, leave = enter.sum(axis=0), leave.sum(axis=0)
    inside = np.bincount(numbered, weights=flow.rows, minlength=count)
    total = np.array([enter.sum()])
    return float(_sum_plogp(total) - _sum_plogp(enter) - _sum_plogp(leave) + _sum_plogp(leave + inside) - _sum_plogp(flow.rows))


def optimize(
    graph: Graph, flow: Flow, seed: int = 0, start: np.ndarray | None = None, active: np.ndarray | None = None,
    network: Network | None = None, starts: int = MAX_RESTARTS,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """A partition of low codelength: (modules int64[n], dense; codelength in bits).

    seed: of the random orders in which rows are visited; 0 begins with the rows' own order. start: int64[n], modules to
    begin with (default: every row alone). active: int[...], with `start`, the only rows to look at first; others follow
    as their neighbors move, and unchanged parts of the graph cost one pass over their edges. network: `network_of(graph, flow)`
    where the caller has it already.
    Rounds of fine-tuning (rows move again) and coarse-tuning (modules split into parts that move as one) follow until two
    in a row gain too little. Small graphs are begun several times, `starts` at most, in different orders, and the best is kept.
    """
    n = len(graph)
    if n == 0:
        return np.empty(0, np.int64), 0.0
    network = network or network_of(graph, flow)
    if active is not None:
        begin = dense(np.asarray(start, np.int64))[0] if start is not None else np.arange(n)
        results = settle(network, begin, np.asarray(active, np.int32))
        return results, codelength(graph, flow, results)
    restarts = 1 if start is not None else int(np.clip(RESTART_EDGES // max(1, len(graph.targets)), 1, starts))
    best, length = np.zeros(n, np.int64), codelength(graph, flow, np.zeros(n, np.int64))
    for attempt in range(restarts):
        order = np.arange(n, dtype=np.int32)
        if seed or attempt:
            np.random.default_rng([seed, attempt]).shuffle(order)
        begin = first_modules(network, order) if start is None else dense(np.asarray(start, np.int64))[0].copy()
        results, new = _tuned(graph, flow, network, settle(network, begin, order, search=True), order)
        if new < length:
            best, length = results, new
    return best, length


def _tuned(graph: Graph, flow: Flow, network: Network, best: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, float]:
    length, idle = codelength(graph, flow, best), 0
    for turn in range(MAX_ROUNDS):
        tried = settle(network, best.copy(), order, search=True) if turn % 2 else _coarse_tune(network, best, order)
        new = codelength(graph, flow, tried)
        idle = idle + 1 if length - new <= SMALLEST_ROUND * length else 0
        if new < length:
            best, length = tried, new
        if idle == 2:
            break
    return best, length


def _coarse_tune(network: Network, module: np.ndarray, order: np.ndarray) -> np.ndarray:
    parts, count = dense(first_modules(network, order, module))
    above = np.empty(count, np.int64)
    above[parts] = module
    smaller = aggregate(network, parts, count)
    return settle(smaller, above, np.arange(count, dtype=np.int32))[parts]


@dataclass(frozen=True)
class Earlier:
    """Where to continue from: modules int64[n] of a graph that was nearly the same (any numbers; a new row has one of its own);
    active bool[n], the rows whose edges are others now; flow float64[n], the rows' visit rates then (0 for a new one); check:
    whether to see by one round of coarse-tuning if too much was lost that way."""

    modules: np.ndarray
    active: np.ndarray
    flow: np.ndarray
    check: bool = True


def _continued(
    graph: Graph, flow: Flow, network: Network, earlier: Earlier, order: np.ndarray, seed: int
) -> tuple[np.ndarray, float]:
    active = np.flatnonzero(earlier.active[order])
    results, length = optimize(graph, flow, start=earlier.modules[order], active=active, network=network)
    if not earlier.check and len(graph.targets) >= PARALLEL_EDGES:  # of a small graph it costs next to nothing
        return results, length
    tried = _coarse_tune(network, results, np.arange(len(graph), dtype=np.int32))
    new = codelength(graph, flow, tried)
    if length - new > MOST_LOST * length:
        other, fresh = optimize(graph, flow, seed, network=network)
        if fresh < new:
            return other, fresh
    return (tried, new) if new < length else (results, length)


def detect(
    parts: Iterable[Part], seed: int = 0, trials: int = 1, threads: int = 1, directed: bool = True,
    earlier: Earlier | None = None, starts: int = MAX_RESTARTS,
) -> Partition:  # fmt: skip
    """Modules of the whole graph, the best of `trials` seeds: seed, seed + 1, …

    parts: consecutive blocks of rows, iterated twice (`csr.load`). Rows without any edge are modules of their own.
    threads: CPU threads; neither they nor the machine change the result. directed: False counts every edge both ways
    (`flow.undirected_flow`). earlier: what to continue from, in place of the seeds; starts: as of `optimize`.
    Returns dense modules and the codelength in bits (0 without any edge).
    """
    graph, order = load(parts, threads)
    if not directed:
        graph = symmetric(graph)
    n = len(graph)
    threads = threads if len(graph.targets) >= PARALLEL_EDGES else 1  # the flow sets it for all that follows
    linked = (np.diff(graph.out_offsets) > 0) | (np.diff(graph.in_offsets) > 0)
    rates = _start_of(earlier, order) if earlier is not None else (None, TOLERANCE)
    flow = directed_flow(graph, threads, *rates) if directed else undirected_flow(graph, threads)
    best, length = np.arange(n), 0.0
    if linked.any():
        network = network_of(graph, flow, consume=True)
        if earlier is not None:
            best, length = _continued(graph, flow, network, earlier, order, seed)
        for trial in range(trials if earlier is None else 0):
            results, new = optimize(graph, flow, seed + trial, network=network, starts=starts)
            if trial == 0 or new < length:
                best, length = results, new
    modules = np.where(linked, best, -1)
    modules[~linked] = modules.max(initial=-1) + 1 + np.arange(int((~linked).sum()))
    results, visits = np.empty(n, np.int64), np.empty(n)
    results[order], visits[order] = modules, flow.rows
    return Partition(dense(results)[0] if n else results, length, visits)


def measure(parts: Iterable[Part], modules: np.ndarray, threads: int = 1, directed: bool = True) -> Partition:
    """The codelength of modules, int64[n], that were found in another way. parts, threads, directed: as `detect`."""
    graph = load(parts, threads, by_locality=False)[0]
    if not directed:
        graph = symmetric(graph)
    flow = directed_flow(graph, threads) if directed else undirected_flow(graph, threads)
    linked = bool(len(graph.targets))
    return Partition(modules, codelength(graph, flow, modules) if linked else 0.0, flow.rows)


def _start_of(earlier: Earlier, order: np.ndarray) -> tuple[np.ndarray | None, float]:
    rates = earlier.flow[order]
    if not rates.any():
        return None, EARLIER_TOLERANCE
    # A new row begins with the rate of the others, on average.
    rates[rates == 0] = rates[rates > 0].mean()
    return rates, EARLIER_TOLERANCE


def map_equation(
    graph: Any, weights: np.ndarray | None = None, *, rows: int | None = None, seed: int = 0, trials: int = 1, threads: int = 1,
    directed: bool = True,
) -> Partition:  # fmt: skip
    """Two-level map-equation modules of any weighted graph: `from faceflow import map_equation`.

    graph: a SciPy sparse matrix [n, n] whose entry (i, j) is the weight of edge i -> j, or a pair (sources, targets) of
    integer vectors with `weights` (default: 1 each) and `rows` (default: the largest number + 1). Repeated edges add up.
    seed, trials: the best of this many seeds; threads: CPU threads, without influence on the result. directed: False takes
    every edge both ways.
    Returns a Partition: modules int64[n], dense, and the codelength in bits. Raises InputError for a matrix that is not
    square, vectors of different length, and weights that are negative or not finite.

    >>> map_equation((np.array([0, 1, 2, 3]), np.array([1, 0, 3, 2]))).modules.tolist()
    [0, 0, 1, 1]
    """
    if hasattr(graph, "tocsr"):
        matrix = graph.tocsr()
        if matrix.shape[0] != matrix.shape[1]:
            raise InputError(f"the matrix has shape {matrix.shape}: a graph's is square")
        part = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data.astype(np.float32)
        return detect([part], seed, trials, threads, directed)
    if not isinstance(graph, (tuple, list)) or len(graph) != 2:
        kind = f"a dense array of shape {graph.shape}" if isinstance(graph, np.ndarray) else f"a {type(graph).__name__}"
        raise InputError(
            f"the graph is {kind}: it must be a SciPy sparse matrix, as scipy.sparse.csr_array(a) makes one, or a pair "
            "(sources, targets)"
        )
    sources, targets = (np.asarray(x) for x in graph)
    if not all(item.ndim == 1 and np.issubdtype(item.dtype, np.integer) for item in (sources, targets)) and len(sources):
        raise InputError("sources and targets must be vectors of integers")
    values = np.ones(len(sources), np.float32) if weights is None else np.asarray(weights, np.float32)
    if not len(sources) == len(targets) == len(values):
        raise InputError(f"{len(sources)} sources, {len(targets)} targets and {len(values)} weights: one of each per edge")
    n = rows if rows is not None else int(max(sources.max(initial=-1), targets.max(initial=-1))) + 1
    if len(sources) and (min(sources.min(), targets.min()) < 0 or sources.max() >= n):
        raise InputError(f"edges must lead from and to rows 0..{n - 1}")
    order = np.argsort(sources, kind="stable")
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(sources, minlength=n), out=offsets[1:])
    return detect([(offsets, targets[order].astype(np.int32), values[order])], seed, trials, threads, directed)
