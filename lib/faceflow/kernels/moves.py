"""Greedy moves of the map equation: units and their flow, the queue of moves, and aggregation to larger units."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from faceflow.kernels.flow import Flow, Graph, transpose

SMALLEST_GAIN = 1e-10
"""Bits a single move must gain, as in Infomap's default; below, rounding decides."""


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
def plogp(x: float) -> float:
    return x * np.log2(x) if x > 0.0 else 0.0


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
        term[m] = -plogp(m_enter[m]) - plogp(m_leave[m]) + plogp(m_leave[m] + m_flow[m])
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
        term_a = -plogp(enter_a) - plogp(leave_a) + plogp(leave_a + flow_a)
        base = plogp(total)
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
            term_b = -plogp(enter_b) - plogp(leave_b) + plogp(leave_b + m_flow[b] + flow[i])
            gain = base + term[a] + term[b] - plogp(new_total) - term_a - term_b
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


def dense(module: np.ndarray) -> tuple[np.ndarray, int]:
    used = np.zeros(int(module.max()) + 1, np.int64)
    used[module] = 1
    number = np.cumsum(used) - 1
    return number[module], int(number[-1]) + 1


def run_moves(
    network: Network, module: np.ndarray, order: np.ndarray, bound: np.ndarray | None = None, least_share: float = 0.0
) -> int:
    return int(
        _move(
            network.out_offsets, network.targets, network.out_flow, network.in_offsets, network.sources, network.in_flow,
            network.flow, network.enter, network.leave, module,
            np.empty(0, np.int64) if bound is None else bound, order, SMALLEST_GAIN, least_share,
        )
    )  # fmt: skip


def settle(network: Network, module: np.ndarray, order: np.ndarray, least_share: float = 0.0) -> np.ndarray:
    """Move units, then groups of units, until no group gains: dense modules, one per unit."""
    run_moves(network, module, order, least_share=least_share)
    module, count = dense(module)
    level, of_level = network, module
    while True:
        level = aggregate(level, of_level, count)
        of_level = np.arange(count)
        if run_moves(level, of_level, np.arange(count, dtype=np.int32)) == 0:
            return module
        of_level, count = dense(of_level)
        module = of_level[module]
