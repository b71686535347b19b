"""The two-level map equation, minimised by greedy moves: our own engine. Source of the objective: Rosvall, Axelsson &
Bergstrom, "The map equation", Eur. Phys. J. Special Topics 178 (2009)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from faceflow.errors import InputError
from faceflow.kernels.flow import Flow, Graph, build_graph, directed_flow, locality_order, reordered, transpose
from faceflow.tables import Partition

SMALLEST_GAIN = 1e-10
"""Bits a single move must gain, as in Infomap's default; below, rounding decides."""

SMALLEST_ROUND = 1e-6
"""Relative gain of one round of tuning below which it is the last."""

MAX_ROUNDS = 20

FIRST_SHARE = 0.1
"""In the first pass, when every row is a module, modules with less than this share of the strongest one's flow are not
tried: logarithms are what that pass costs. Tuning tries all."""

RESTART_EDGES, MAX_RESTARTS = 1_000_000, 16
"""Small graphs are begun again from other orders while that touches no more edges than this, and at most so often."""


@dataclass(frozen=True)
class Network:
    """Units (rows, or groups of them) with their flow, and the flow between different units, both ways.

    out_*/in_*: compressed rows as `flow.Graph`; flow, enter, leave: float64[n], visit rate, flow in from and out to other
    units.
    """

    out_offsets: np.ndarray
    targets: np.ndarray
    out_flow: np.ndarray
    in_offsets: np.ndarray
    sources: np.ndarray
    in_flow: np.ndarray
    flow: np.ndarray
    enter: np.ndarray
    leave: np.ndarray

    def __len__(self) -> int:
        return len(self.flow)


@numba.njit(cache=True, nogil=True, inline="always")
def _plogp(x: float) -> float:
    return x * np.log2(x) if x > 0.0 else 0.0


@numba.njit(cache=True, nogil=True)
def _sum_plogp(x: np.ndarray) -> float:
    total = 0.0
    for v in x:
        total += _plogp(v)
    return total


@numba.njit(cache=True, nogil=True)
def _module_flows(
    offsets: np.ndarray, targets: np.ndarray, edge_flow: np.ndarray, scale: np.ndarray, module: np.ndarray,
    enter: np.ndarray, leave: np.ndarray,
) -> None:  # fmt: skip
    for i in range(len(offsets) - 1):
        a = module[i]
        for e in range(offsets[i], offsets[i + 1]):
            b = module[targets[e]]
            if a != b:
                f = edge_flow[e] * scale[i]
                leave[a] += f
                enter[b] += f


def codelength(graph: Graph, flow: Flow, module: np.ndarray) -> float:
    """Bits a step of the partition: L = plogp(sum enter) - sum plogp(enter) - sum plogp(leave) + sum plogp(leave + p)
    - sum plogp(row flow), over modules with enter and leave the flow in and out and p the flow of their rows.

    module: int64[n], any labels. Summed in float64 from the edges: nothing is carried over from the optimisation.
    """
    dense, count = _dense(module)
    enter, leave = np.zeros(count), np.zeros(count)
    _module_flows(graph.out_offsets, graph.targets, graph.out_weights, flow.per_weight, dense, enter, leave)
    inside = np.bincount(dense, weights=flow.rows, minlength=count)
    total = np.array([enter.sum()])
    return float(_sum_plogp(total) - _sum_plogp(enter) - _sum_plogp(leave) + _sum_plogp(leave + inside) - _sum_plogp(flow.rows))


@numba.njit(cache=True, nogil=True)
def _scale(offsets: np.ndarray, x: np.ndarray, per_row: np.ndarray) -> np.ndarray:
    out = np.empty(len(x), np.float32)
    for i in range(len(offsets) - 1):
        for e in range(offsets[i], offsets[i + 1]):
            out[e] = x[e] * per_row[i]
    return out


@numba.njit(cache=True, nogil=True)
def _gather_scale(sources: np.ndarray, x: np.ndarray, per_row: np.ndarray) -> np.ndarray:
    out = np.empty(len(x), np.float32)
    for e in range(len(x)):
        out[e] = x[e] * per_row[sources[e]]
    return out


@numba.njit(cache=True, nogil=True)
def _sum_others(offsets: np.ndarray, others: np.ndarray, x: np.ndarray) -> np.ndarray:
    out = np.zeros(len(offsets) - 1)
    for i in range(len(out)):
        for e in range(offsets[i], offsets[i + 1]):
            if others[e] != i:
                out[i] += x[e]
    return out


def network_of(graph: Graph, flow: Flow) -> Network:
    """The rows themselves as units. Edge flows are float32: they only steer moves, codelengths come from `codelength`."""
    out_flow = _scale(graph.out_offsets, graph.out_weights, flow.per_weight)
    in_flow = _gather_scale(graph.sources, graph.in_weights, flow.per_weight)
    return Network(
        graph.out_offsets, graph.targets, out_flow, graph.in_offsets, graph.sources, in_flow, flow.rows,
        _sum_others(graph.in_offsets, graph.sources, in_flow), _sum_others(graph.out_offsets, graph.targets, out_flow),
    )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def _move(
    out_offsets: np.ndarray, targets: np.ndarray, out_flow: np.ndarray,
    in_offsets: np.ndarray, sources: np.ndarray, in_flow: np.ndarray,
    flow: np.ndarray, enter: np.ndarray, leave: np.ndarray,
    module: np.ndarray, bound: np.ndarray, order: np.ndarray, smallest_gain: float, least_share: float,
) -> int:  # fmt: skip
    """Move units between modules (numbers below n, changed in place) until no active unit gains; returns the moves.

    bound: if not empty, units only join modules of units with the same bound. order: the units active at first.
    least_share: modules with less than this share of the flow to and from the unit's strongest other module are not tried.
    """
    n = len(flow)
    m_flow, m_enter, m_leave = np.zeros(n), np.zeros(n), np.zeros(n)
    members = np.zeros(n, np.int64)
    for i in range(n):
        m_flow[module[i]] += flow[i]
        members[module[i]] += 1
    for i in range(n):
        a = module[i]
        for e in range(out_offsets[i], out_offsets[i + 1]):
            b = module[targets[e]]
            if a != b:
                m_leave[a] += out_flow[e]
                m_enter[b] += out_flow[e]
    term = np.zeros(n)
    total = 0.0
    free = np.empty(n + 1, np.int64)
    spare = 0
    for m in range(n):
        total += m_enter[m]
        term[m] = -_plogp(m_enter[m]) - _plogp(m_leave[m]) + _plogp(m_leave[m] + m_flow[m])
        if members[m] == 0:
            free[spare] = m
            spare += 1
    to, come = np.zeros(n), np.zeros(n)
    seen, touched = np.zeros(n, np.uint8), np.empty(n, np.int64)
    queue, waiting = np.empty(n, np.int32), np.zeros(n, np.uint8)
    head, size = 0, len(order)
    for q in range(size):
        queue[q] = order[q]
        waiting[order[q]] = 1
    moves = 0
    while size > 0:
        i = queue[head]
        head = head + 1 if head + 1 < n else 0
        size -= 1
        waiting[i] = 0
        a = module[i]
        found = 0
        for e in range(out_offsets[i], out_offsets[i + 1]):
            j = targets[e]
            if j == i:
                continue
            m = module[j]
            if not seen[m]:
                seen[m] = 1
                touched[found] = m
                found += 1
            to[m] += out_flow[e]
        for e in range(in_offsets[i], in_offsets[i + 1]):
            j = sources[e]
            if j == i:
                continue
            m = module[j]
            if not seen[m]:
                seen[m] = 1
                touched[found] = m
                found += 1
            come[m] += in_flow[e]
        # Leaving a: what went out of i into a now leaves a's rest the other way round.
        enter_a = m_enter[a] - (enter[i] - come[a]) + to[a]
        leave_a = m_leave[a] - (leave[i] - to[a]) + come[a]
        flow_a = m_flow[a] - flow[i]
        if members[a] == 1:
            enter_a = leave_a = flow_a = 0.0
        term_a = -_plogp(enter_a) - _plogp(leave_a) + _plogp(leave_a + flow_a)
        base = _plogp(total)
        best, best_gain = a, smallest_gain
        best_enter = best_leave = best_term = best_total = 0.0
        # A module of its own is a choice too, where it is not alone already.
        alone = members[a] > 1 and spare > 0 and len(bound) == 0
        strongest = 0.0
        for t in range(found):
            m = touched[t]
            if m != a:
                strongest = max(strongest, to[m] + come[m])
        for t in range(found + 1):
            if t < found:
                b = touched[t]
                if b == a or to[b] + come[b] < least_share * strongest:
                    continue
            elif alone:
                b = free[spare - 1]
            else:
                continue
            enter_b = m_enter[b] + (enter[i] - come[b]) - to[b]
            leave_b = m_leave[b] + (leave[i] - to[b]) - come[b]
            new_total = total + (enter_a - m_enter[a]) + (enter_b - m_enter[b])
            term_b = -_plogp(enter_b) - _plogp(leave_b) + _plogp(leave_b + m_flow[b] + flow[i])
            gain = base + term[a] + term[b] - _plogp(new_total) - term_a - term_b
            if gain > best_gain:
                if len(bound) and t < found and bound[b] != bound[a]:
                    continue
                best, best_gain = b, gain
                best_enter, best_leave, best_term, best_total = enter_b, leave_b, term_b, new_total
        for t in range(found):
            m = touched[t]
            to[m] = 0.0
            come[m] = 0.0
            seen[m] = 0
        if best == a:
            continue
        moves += 1
        if members[best] == 0:
            spare -= 1
        m_enter[a], m_leave[a], m_flow[a], term[a] = enter_a, leave_a, flow_a, term_a
        m_enter[best], m_leave[best], term[best] = best_enter, best_leave, best_term
        m_flow[best] += flow[i]
        total = best_total
        members[a] -= 1
        members[best] += 1
        if members[a] == 0:
            free[spare] = a
            spare += 1
        module[i] = best
        for e in range(out_offsets[i], out_offsets[i + 1]):
            j = targets[e]
            if not waiting[j] and module[j] != best:
                waiting[j] = 1
                queue[(head + size) % n] = j
                size += 1
        for e in range(in_offsets[i], in_offsets[i + 1]):
            j = sources[e]
            if not waiting[j] and module[j] != best:
                waiting[j] = 1
                queue[(head + size) % n] = j
                size += 1
    return moves


@numba.njit(cache=True, nogil=True)
def _aggregate_edges(
    offsets: np.ndarray, targets: np.ndarray, out_flow: np.ndarray, module: np.ndarray,
    begin: np.ndarray, units: np.ndarray, new_offsets: np.ndarray, new_targets: np.ndarray, new_flow: np.ndarray,
) -> int:  # fmt: skip
    count = len(begin) - 1
    sums = np.zeros(count)
    seen = np.zeros(count, np.uint8)
    touched = np.empty(count, np.int32)
    at = 0
    for m in range(count):
        found = 0
        for u in range(begin[m], begin[m + 1]):
            i = units[u]
            for e in range(offsets[i], offsets[i + 1]):
                b = module[targets[e]]
                if b == m:
                    continue
                if not seen[b]:
                    seen[b] = 1
                    touched[found] = b
                    found += 1
                sums[b] += out_flow[e]
        for t in range(found):
            b = touched[t]
            new_targets[at] = b
            new_flow[at] = sums[b]
            at += 1
            sums[b] = 0.0
            seen[b] = 0
        new_offsets[m + 1] = at
    return at


def aggregate(network: Network, module: np.ndarray, count: int) -> Network:
    """Modules 0..count-1 as units of a smaller network, in float64."""
    units = np.argsort(module, kind="stable").astype(np.int32)
    begin = np.searchsorted(module[units], np.arange(count + 1))
    different = int(_count_between(network.out_offsets, network.targets, module))
    targets, out_flow = np.empty(different, np.int32), np.empty(different)
    offsets = np.zeros(count + 1, np.int64)
    used = _aggregate_edges(
        network.out_offsets, network.targets, network.out_flow, module, begin, units, offsets, targets, out_flow
    )
    targets, out_flow = targets[:used].copy(), out_flow[:used].copy()
    in_offsets, sources, in_flow = transpose(offsets, targets, out_flow)
    flow = np.bincount(module, weights=network.flow, minlength=count)
    return Network(
        offsets, targets, out_flow, in_offsets, sources, in_flow, flow,
        _sum_others(in_offsets, sources, in_flow), _sum_others(offsets, targets, out_flow),
    )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def _count_between(offsets: np.ndarray, targets: np.ndarray, module: np.ndarray) -> int:
    count = 0
    for i in range(len(offsets) - 1):
        for e in range(offsets[i], offsets[i + 1]):
            count += module[targets[e]] != module[i]
    return count


def _dense(module: np.ndarray) -> tuple[np.ndarray, int]:
    used = np.zeros(int(module.max()) + 1, np.int64)
    used[module] = 1
    number = np.cumsum(used) - 1
    return number[module], int(number[-1]) + 1


def _run_moves(
    network: Network, module: np.ndarray, order: np.ndarray, bound: np.ndarray | None = None, least_share: float = 0.0
) -> int:
    return int(
        _move(
            network.out_offsets, network.targets, network.out_flow, network.in_offsets, network.sources, network.in_flow,
            network.flow, network.enter, network.leave, module,
            np.empty(0, np.int64) if bound is None else bound, order, SMALLEST_GAIN, least_share,
        )
    )  # fmt: skip


def _settle(network: Network, module: np.ndarray, order: np.ndarray, least_share: float = 0.0) -> np.ndarray:
    """Move units, then groups of units, until no group gains: dense modules, one per unit."""
    _run_moves(network, module, order, least_share=least_share)
    module, count = _dense(module)
    level, of_level = network, module
    while True:
        level = aggregate(level, of_level, count)
        of_level = np.arange(count)
        if _run_moves(level, of_level, np.arange(count, dtype=np.int32)) == 0:
            return module
        of_level, count = _dense(of_level)
        module = of_level[module]


def optimize(
    graph: Graph, flow: Flow, seed: int = 0, start: np.ndarray | None = None, active: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """A partition of low codelength: (modules int64[n], dense; codelength in bits).

    seed: of the random orders in which rows are visited; 0 begins with the rows' own order. start: int64[n], modules to
    begin with (default: every row alone). active: int[...], with `start`, the only rows to look at first; others follow
    as their neighbors move, and unchanged parts of the graph cost one pass over their edges.
    Rounds of fine-tuning (rows move again) and coarse-tuning (modules split into parts that move as one) follow until two
    in a row gain too little. Small graphs are begun several times in different orders and the best is kept.
    """
    n = len(graph)
    if n == 0:
        return np.empty(0, np.int64), 0.0
    network = network_of(graph, flow)
    if active is not None:
        begin = _dense(np.asarray(start, np.int64))[0] if start is not None else np.arange(n)
        found = _settle(network, begin, np.asarray(active, np.int32))
        return found, codelength(graph, flow, found)
    restarts = 1 if start is not None else int(np.clip(RESTART_EDGES // max(1, len(graph.targets)), 1, MAX_RESTARTS))
    best, length = np.zeros(n, np.int64), codelength(graph, flow, np.zeros(n, np.int64))
    for attempt in range(restarts):
        order = np.arange(n, dtype=np.int32)
        if seed or attempt:
            np.random.default_rng([seed, attempt]).shuffle(order)
        begin = np.arange(n) if start is None else _dense(np.asarray(start, np.int64))[0].copy()
        found, new = _tuned(graph, flow, network, _settle(network, begin, order, FIRST_SHARE), order)
        if new < length:
            best, length = found, new
    return best, length


def _tuned(graph: Graph, flow: Flow, network: Network, best: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, float]:
    length, idle = codelength(graph, flow, best), 0
    for turn in range(MAX_ROUNDS):
        tried = _coarse_tune(network, best, order) if turn % 2 else _settle(network, best.copy(), order)
        new = codelength(graph, flow, tried)
        idle = idle + 1 if length - new <= SMALLEST_ROUND * length else 0
        if new < length:
            best, length = tried, new
        if idle == 2:
            break
    return best, length


def _coarse_tune(network: Network, module: np.ndarray, order: np.ndarray) -> np.ndarray:
    parts = np.arange(len(network))
    _run_moves(network, parts, order, module, FIRST_SHARE)
    parts, count = _dense(parts)
    above = np.empty(count, np.int64)
    above[parts] = module
    smaller = aggregate(network, parts, count)
    return _settle(smaller, above, np.arange(count, dtype=np.int32))[parts]


def detect(
    parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], seed: int = 0, trials: int = 1, threads: int = 1
) -> Partition:
    """Modules of the whole graph, the best of `trials` seeds: seed, seed + 1, …

    parts: as `flow.build_graph`. Rows without any edge are modules of their own. threads: for the flow; neither they nor
    the machine change the result. Returns dense modules and the codelength in bits (0 without any edge).
    """
    graph = build_graph(parts)
    n = len(graph)
    order = locality_order(graph)
    graph = reordered(graph, order)
    linked = (np.diff(graph.out_offsets) > 0) | (np.diff(graph.in_offsets) > 0)
    flow = directed_flow(graph, threads)
    best, length = np.arange(n), 0.0
    for trial in range(trials if linked.any() else 0):
        found, new = optimize(graph, flow, seed + trial)
        if trial == 0 or new < length:
            best, length = found, new
    modules = np.where(linked, best, -1)
    modules[~linked] = modules.max(initial=-1) + 1 + np.arange(int((~linked).sum()))
    found = np.empty(n, np.int64)
    found[order] = modules
    return Partition(_dense(found)[0] if n else found, length)


def map_equation(
    graph: Any, weights: np.ndarray | None = None, *, rows: int | None = None, seed: int = 0, trials: int = 1, threads: int = 1
) -> Partition:
    """Two-level map-equation modules of any directed weighted graph: `from faceflow import map_equation`.

    graph: a SciPy sparse matrix [n, n] whose entry (i, j) is the weight of edge i -> j, or a pair (sources, targets) of
    integer vectors with `weights` (default: 1 each) and `rows` (default: the largest number + 1). Repeated edges add up.
    seed, trials: the best of this many seeds; threads: CPU threads, without influence on the result.
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
        return detect([part], seed, trials, threads)
    sources, targets = (np.asarray(x) for x in graph)
    values = np.ones(len(sources), np.float32) if weights is None else np.asarray(weights, np.float32)
    if not len(sources) == len(targets) == len(values):
        raise InputError(f"{len(sources)} sources, {len(targets)} targets and {len(values)} weights: one of each per edge")
    n = rows if rows is not None else int(max(sources.max(initial=-1), targets.max(initial=-1))) + 1
    if len(sources) and (min(sources.min(), targets.min()) < 0 or sources.max() >= n):
        raise InputError(f"edges must lead from and to rows 0..{n - 1}")
    order = np.argsort(sources, kind="stable")
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(sources, minlength=n), out=offsets[1:])
    return detect([(offsets, targets[order].astype(np.int32), values[order])], seed, trials, threads)
