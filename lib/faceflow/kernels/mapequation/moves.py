"""Greedy moves of the map equation: single units into modules where that shortens the codelength.

Everything that reads all edges runs on all threads; what changes modules runs either on blocks of units that cannot touch each
other's modules, each against a frozen view of the rest, or in one queue. So the result never depends on the threads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from faceflow.kernels.graph.csr import cut_by_edges
from faceflow.kernels.mapequation.network import Network, aggregate, dense, plogp

SMALLEST_GAIN = 1e-10
"""Bits a single move must gain, as in Infomap's default; below, rounding decides."""

MOST_MOVES = 100
"""Moves a unit, on average, after which a queue is given up: a handful is usual, and rounding must not make it endless."""

BLOCK_UNITS, MOST_BLOCKS = 16_384, 64
"""Units of a block whose first moves are made side by side with other blocks', and the most blocks: both depend on the graph
alone, as the blocks are part of the result's definition."""

REST_SHARE = 0.5
"""Of the flow into the single units of other blocks, how much a block takes to remain between their modules: somewhere between
all of it, as it is at first, and the few per cent that are left in the end. The moves that follow know the truth."""

FIRST_SHARE = 0.1
"""In moves within blocks, where every unit is a module at first, modules with less than this share of the strongest one's flow
are not tried: logarithms are what that pass costs. Later moves try all."""


@numba.njit(cache=True, nogil=True, inline="always")
def _term(enter: float, leave: float, flow: float) -> float:
    # What one module adds to the codelength, the flow between all modules aside.
    return -plogp(enter) - plogp(leave) + plogp(leave + flow)


@numba.njit(cache=True, nogil=True, inline="always")
def _collect(
    offsets: np.ndarray, others: np.ndarray, weights: np.ndarray, scale: float, i: int, module: np.ndarray, group: Any,
    sums: np.ndarray, seen: np.ndarray, touched: np.ndarray, first: int, results: int,
) -> int:  # fmt: skip
    # Adds the flow between unit i and each neighboring module to sums; returns how many modules are now touched.
    for e in range(offsets[i], offsets[i + 1]):
        j = others[e]
        if j == i:
            continue
        if group is not None:  # noqa: SIM102 - numba prunes this test when it compiles
            if group[j] != group[i]:
                continue
        m = module[j]
        if not seen[m]:
            seen[m] = 1
            touched[first + results] = m
            results += 1
        sums[m] += weights.dtype.type(weights[e] * scale)
    return results


@numba.njit(cache=True, nogil=True, inline="always")
def _wake(
    offsets: np.ndarray, others: np.ndarray, i: int, module: np.ndarray, group: Any, best: int,
    waiting: np.ndarray, queue: np.ndarray, first: int, capacity: int, head: int, size: int,
) -> int:  # fmt: skip
    for e in range(offsets[i], offsets[i + 1]):
        j = others[e]
        if group is not None:  # noqa: SIM102 - as above
            if group[j] != group[i]:
                continue
        if not waiting[j] and module[j] != best:
            waiting[j] = 1
            queue[first + (head + size) % capacity] = j
            size += 1
    return size


@numba.njit(cache=True, nogil=True, _nrt=False)
def _drain(
    network: Any, module: np.ndarray, group: Any,
    m_flow: np.ndarray, m_enter: np.ndarray, m_leave: np.ndarray, term: np.ndarray, members: np.ndarray,
    to: np.ndarray, come: np.ndarray, seen: np.ndarray, touched: np.ndarray, waiting: np.ndarray, free: np.ndarray, spare: int,
    queue: np.ndarray, first: int, capacity: int, size: int, total: float, rest: float, share: float,
) -> int:  # fmt: skip
    """Move units until none of the queue gains; returns the moves.

    queue: `size` units from queue[first] on, a ring of `capacity`. group: None, or units only see others of their group.
    total: flow into the modules at hand; rest: that into all others, which stays. free: numbers of empty modules, `spare` of
    them. share: see FIRST_SHARE.
    """
    out_offsets, targets, out_weights, out_scale, in_offsets, sources, in_weights, in_scale, flow, enter, leave = network
    head = moves = 0
    while size > 0 and moves < MOST_MOVES * capacity:
        i = queue[first + head]
        head = head + 1 if head + 1 < capacity else 0
        size -= 1
        waiting[i] = 0
        a = module[i]
        results = _collect(out_offsets, targets, out_weights, out_scale[i], i, module, group, to, seen, touched, first, 0)
        results = _collect(in_offsets, sources, in_weights, in_scale[i], i, module, group, come, seen, touched, first, results)
        # Leaving a: what went out of i into a now leaves a's rest the other way round.
        enter_a = m_enter[a] - (enter[i] - come[a]) + to[a]
        leave_a = m_leave[a] - (leave[i] - to[a]) + come[a]
        flow_a = m_flow[a] - flow[i]
        if members[a] == 1:
            enter_a = leave_a = flow_a = 0.0
        term_a = _term(enter_a, leave_a, flow_a)
        base = plogp(total + rest)
        best, best_gain = a, SMALLEST_GAIN
        best_enter = best_leave = best_term = best_change = 0.0
        strongest = 0.0
        for t in range(first, first + results):
            if touched[t] != a:
                strongest = max(strongest, to[touched[t]] + come[touched[t]])
        for t in range(first, first + results + 1):
            if t < first + results:
                b = touched[t]
                if b == a or to[b] + come[b] < share * strongest:
                    continue
            elif spare > 0 and members[a] > 1:
                b = free[spare - 1]  # a module of its own is a choice too, where it is not alone already
            else:
                continue
            enter_b = m_enter[b] + (enter[i] - come[b]) - to[b]
            leave_b = m_leave[b] + (leave[i] - to[b]) - come[b]
            change = (enter_a - m_enter[a]) + (enter_b - m_enter[b])
            term_b = _term(enter_b, leave_b, m_flow[b] + flow[i])
            gain = base + term[a] + term[b] - plogp(total + rest + change) - term_a - term_b
            if gain > best_gain:
                best, best_gain = b, gain
                best_enter, best_leave, best_term, best_change = enter_b, leave_b, term_b, change
        for t in range(first, first + results):
            to[touched[t]] = 0.0
            come[touched[t]] = 0.0
            seen[touched[t]] = 0
        if best == a:
            continue
        moves += 1
        if members[best] == 0:
            spare -= 1
        m_enter[a], m_leave[a], m_flow[a], term[a] = enter_a, leave_a, flow_a, term_a
        m_enter[best], m_leave[best], term[best] = best_enter, best_leave, best_term
        m_flow[best] += flow[i]
        total += best_change
        members[a] -= 1
        members[best] += 1
        if group is None:  # noqa: SIM102 - as above
            if members[a] == 0:
                free[spare] = a
                spare += 1
        module[i] = best
        size = _wake(out_offsets, targets, i, module, group, best, waiting, queue, first, capacity, head, size)
        size = _wake(in_offsets, sources, i, module, group, best, waiting, queue, first, capacity, head, size)
    return moves


@numba.njit(cache=True, nogil=True, _nrt=False)
def _find_movers(
    network: Any, module: np.ndarray, m_flow: np.ndarray, m_enter: np.ndarray, m_leave: np.ndarray, term: np.ndarray,
    members: np.ndarray, to: np.ndarray, come: np.ndarray, seen: np.ndarray, touched: np.ndarray,
    begin: int, end: int, total: float, movers: np.ndarray,
) -> None:  # fmt: skip
    # Marks the units of begin..end-1 that would gain by a move as things stand; a unit with all its flow inside its module
    # cannot.
    out_offsets, targets, out_weights, out_scale, in_offsets, sources, in_weights, in_scale, flow, enter, leave = network
    base = plogp(total)
    for i in range(begin, end):
        a = module[i]
        results = _collect(out_offsets, targets, out_weights, out_scale[i], i, module, None, to, seen, touched, 0, 0)
        results = _collect(in_offsets, sources, in_weights, in_scale[i], i, module, None, come, seen, touched, 0, results)
        movers[i] = 0
        if results > 1 or (results == 1 and touched[0] != a):
            enter_a = m_enter[a] - (enter[i] - come[a]) + to[a]
            leave_a = m_leave[a] - (leave[i] - to[a]) + come[a]
            flow_a = m_flow[a] - flow[i]
            if members[a] == 1:
                enter_a = leave_a = flow_a = 0.0
            stay = base + term[a] - _term(enter_a, leave_a, flow_a) - SMALLEST_GAIN
            for t in range(results + 1):
                enter_b, leave_b, flow_b, term_b = 0.0, 0.0, 0.0, 0.0
                to_b, come_b = 0.0, 0.0
                if t < results:
                    b = touched[t]
                    if b == a:
                        continue
                    enter_b, leave_b, flow_b, term_b = m_enter[b], m_leave[b], m_flow[b], term[b]
                    to_b, come_b = to[b], come[b]
                elif members[a] == 1:
                    continue
                new_enter = enter_b + (enter[i] - come_b) - to_b
                new_leave = leave_b + (leave[i] - to_b) - come_b
                change = (enter_a - m_enter[a]) + (new_enter - enter_b)
                new_term = _term(new_enter, new_leave, flow_b + flow[i])
                if stay + term_b - plogp(total + change) - new_term > 0.0:
                    movers[i] = 1
                    break
        for t in range(results):
            to[touched[t]] = 0.0
            come[touched[t]] = 0.0
            seen[touched[t]] = 0


@numba.njit(cache=True, nogil=True, parallel=True)
def _find_all_movers(
    network: Any, module: np.ndarray, m_flow: np.ndarray, m_enter: np.ndarray, m_leave: np.ndarray, term: np.ndarray,
    members: np.ndarray, to: np.ndarray, come: np.ndarray, seen: np.ndarray, touched: np.ndarray,
    cuts: np.ndarray, total: float, movers: np.ndarray,
) -> None:  # fmt: skip
    for c in numba.prange(len(cuts) - 1):
        _find_movers(
            network, module, m_flow, m_enter, m_leave, term, members, to[c], come[c], seen[c], touched[c],
            cuts[c], cuts[c + 1], total, movers,
        )  # fmt: skip


@numba.njit(cache=True, nogil=True, parallel=True)
def _drain_blocks(
    network: Any, module: np.ndarray, group: np.ndarray,
    m_flow: np.ndarray, m_enter: np.ndarray, m_leave: np.ndarray, term: np.ndarray, members: np.ndarray,
    to: np.ndarray, come: np.ndarray, seen: np.ndarray, touched: np.ndarray, waiting: np.ndarray, free: np.ndarray,
    queue: np.ndarray, cuts: np.ndarray, totals: np.ndarray, rests: np.ndarray,
) -> None:  # fmt: skip
    # Blocks hold whole groups, and a unit sees only its group: no two blocks touch the same entry of any array.
    for c in numba.prange(len(cuts) - 1):
        _drain(
            network, module, group, m_flow, m_enter, m_leave, term, members, to, come, seen, touched, waiting, free, 0,
            queue, cuts[c], cuts[c + 1] - cuts[c], cuts[c + 1] - cuts[c], totals[c], rests[c], FIRST_SHARE,
        )  # fmt: skip


@numba.njit(cache=True, nogil=True, parallel=True)
def _cut_flows(
    offsets: np.ndarray, others: np.ndarray, weights: np.ndarray, scale: np.ndarray, module: np.ndarray
) -> np.ndarray:
    # Each unit's flow to or from other modules.
    out = np.empty(len(offsets) - 1)
    for i in numba.prange(len(out)):
        total = 0.0
        for e in range(offsets[i], offsets[i + 1]):
            if module[others[e]] != module[i]:
                total += weights.dtype.type(weights[e] * scale[i])
        out[i] = total
    return out


@numba.njit(cache=True, nogil=True)
def _terms(m_enter: np.ndarray, m_leave: np.ndarray, m_flow: np.ndarray) -> np.ndarray:
    term = np.empty(len(m_flow))
    for m in range(len(m_flow)):
        term[m] = _term(m_enter[m], m_leave[m], m_flow[m])
    return term


def first_modules(network: Network, order: np.ndarray, group: np.ndarray | None = None) -> np.ndarray:
    """Modules (numbers of units, int64[n]) after every unit, alone at first, has moved within its group: int64[n].

    order: a permutation of the units, the order of their first moves. group: int64[n]; default: blocks of consecutive units.
    """
    n = len(network)
    blocks = int(np.clip(n // BLOCK_UNITS, 1, MOST_BLOCKS))
    if group is None:
        group = np.arange(n) * blocks // max(1, n)
    by_group = order[np.argsort(group[order], kind="stable")].astype(np.int32)
    ends = np.flatnonzero(np.diff(group[by_group], append=-1)) + 1  # blocks end where groups do
    wanted = n * np.arange(1, blocks) // blocks
    cuts = np.unique(np.concatenate([[0], ends[np.searchsorted(ends, wanted)], [n]]).astype(np.int64))
    module = np.arange(n)
    own = np.add.reduceat(network.enter[by_group], cuts[:-1]) if n else np.empty(0)
    rests = REST_SHARE * (network.enter.sum() - own)
    _drain_blocks(
        network.arrays, module, group, network.flow.copy(), network.enter.copy(), network.leave.copy(),
        _terms(network.enter, network.leave, network.flow), np.ones(n, np.int64),
        np.zeros(n), np.zeros(n), np.zeros(n, np.uint8), np.empty(n, np.int64), np.ones(n, np.uint8), np.empty(0, np.int64),
        by_group, cuts, own, rests,
    )  # fmt: skip
    return module


def run_moves(network: Network, module: np.ndarray, order: np.ndarray, search: bool = False) -> int:
    """Move units between modules (numbers below n, changed in place) until no active unit gains; returns the moves.

    order: the units active at first. search: of these only such as would gain by a move as things stand.
    """
    n, arrays = len(network), network.arrays
    enter = np.bincount(module, _cut_flows(*arrays[4:8], module), minlength=n)
    leave = np.bincount(module, _cut_flows(*arrays[:4], module), minlength=n)
    flow, members = np.bincount(module, network.flow, minlength=n), np.bincount(module, minlength=n)
    term, total = _terms(enter, leave, flow), float(enter.sum())
    if search:
        threads, modules = numba.get_num_threads(), int(module.max()) + 1
        cuts = cut_by_edges(arrays[0] + arrays[4], threads)
        movers, size = np.empty(n, np.uint8), (threads, modules)
        _find_all_movers(
            arrays, module, flow, enter, leave, term, members, np.zeros(size), np.zeros(size), np.zeros(size, np.uint8),
            np.empty(size, np.int64), cuts, total, movers,
        )  # fmt: skip
        order = order[movers[order] == 1]
    if len(order) == 0:
        return 0
    free = np.empty(n + 1, np.int64)
    empty = np.flatnonzero(members == 0)
    free[: len(empty)] = empty
    queue, waiting = np.empty(n, np.int32), np.zeros(n, np.uint8)
    queue[: len(order)] = order
    waiting[order] = 1
    return int(
        _drain(
            arrays, module, None, flow, enter, leave, term, members,
            np.zeros(n), np.zeros(n), np.zeros(n, np.uint8), np.empty(n, np.int64), waiting, free, len(empty),
            queue, 0, n, len(order), total, 0.0, 0.0,
        )
    )  # fmt: skip


def settle(network: Network, module: np.ndarray, order: np.ndarray, search: bool = False) -> np.ndarray:
    """Move units, then groups of units, until no group gains: dense modules, one per unit."""
    run_moves(network, module, order, search)
    module, count = dense(module)
    level, of_level = network, module
    while True:
        level = aggregate(level, of_level, count)
        of_level = np.arange(count)
        if run_moves(level, of_level, np.arange(count, dtype=np.int32)) == 0:
            return module
        of_level, count = dense(of_level)
        module = of_level[module]
