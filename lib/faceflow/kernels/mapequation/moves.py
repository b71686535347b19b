"""The kernels of greedy moves: single units into modules where that shortens the codelength.

Everything that reads all edges runs on all threads; what changes modules runs either on blocks of units that cannot touch each
other's modules, each against a frozen view of the rest, or in one queue. So the result never depends on the threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from faceflow.kernels.compiled import kernel
from faceflow.kernels.mapequation.network import Edges, Network, plogp

SMALLEST_GAIN = 1e-10
"""Bits a single move must gain, as in Infomap's default; below, rounding decides."""

MOST_MOVES = 100
"""Moves a unit, on average, after which a queue is given up: a handful is usual, and rounding must not make it endless."""

FIRST_SHARE = 0.1
"""In moves within blocks, where every unit is a module at first, modules with less than this share of the strongest one's flow
are not tried: logarithms are what that pass costs. Later moves try all."""


@kernel(inline=True)
def _term(enter: float, leave: float, flow: float) -> float:
    # What one module adds to the codelength, the flow between all modules aside.
    return -plogp(enter) - plogp(leave) + plogp(leave + flow)


class Modules(NamedTuple):
    """The modules that units are in. of: int64[n], each unit's; flow, enter, leave: float64[modules], visit rate, flow in and
    out; term: what each adds to the codelength, the flow between all modules aside; members: int64[modules], units of each."""

    of: np.ndarray
    flow: np.ndarray
    enter: np.ndarray
    leave: np.ndarray
    term: np.ndarray
    members: np.ndarray


class Scratch(NamedTuple):
    """Of one unit's neighboring modules: to, come: float64[modules], its flow to and from each; seen: uint8[modules]; touched:
    int64[modules], those that have any. All zero between two units but touched."""

    to: np.ndarray
    come: np.ndarray
    seen: np.ndarray
    touched: np.ndarray


class Queue(NamedTuple):
    """Units that wait to be moved: a ring of `capacity` in units int32[...] from `first` on, with `size` units in it at first.

    waiting: uint8[n], which units are in it; free: int64[...], numbers of empty modules, `spare` of them.
    """

    units: np.ndarray
    waiting: np.ndarray
    free: np.ndarray
    first: int
    capacity: int
    size: int
    spare: int


@kernel(inline=True)
def _collect(edges: Edges, i: int, module: np.ndarray, group: Any, sums: np.ndarray, scratch: Scratch, place: int) -> int:
    # Adds the flow between unit i and each neighboring module to sums; new ones are touched from `place` on. Returns where
    # they end.
    scale = edges.scale[i]
    for e in range(edges.offsets[i], edges.offsets[i + 1]):
        j = edges.others[e]
        if j == i:
            continue
        if group is not None:  # noqa: SIM102 - numba prunes this test when it compiles
            if group[j] != group[i]:
                continue
        m = module[j]
        if not scratch.seen[m]:
            scratch.seen[m] = 1
            scratch.touched[place] = m
            place += 1
        sums[m] += edges.weights.dtype.type(edges.weights[e] * scale)
    return place


@kernel(inline=True)
def _wake(edges: Edges, i: int, module: np.ndarray, group: Any, best: int, queue: Queue, head: int, size: int) -> int:
    # Puts the neighbors of unit i that are not in its new module `best` into the queue; returns the queue's size.
    for e in range(edges.offsets[i], edges.offsets[i + 1]):
        j = edges.others[e]
        if group is not None:  # noqa: SIM102 - as above
            if group[j] != group[i]:
                continue
        if not queue.waiting[j] and module[j] != best:
            queue.waiting[j] = 1
            queue.units[queue.first + (head + size) % queue.capacity] = j
            size += 1
    return size


@kernel(allocates=False)
def drain(
    network: Network, modules: Modules, scratch: Scratch, queue: Queue, group: Any, total: float, rest: float, share: float
) -> int:
    """Move units until none of the queue gains; returns the moves.

    group: None, or units only see others of their group. total: flow into the modules at hand; rest: that into all others,
    which stays. share: see FIRST_SHARE.
    """
    flow, enter, leave = network.flow, network.enter, network.leave
    module, m_flow, m_enter, m_leave, term, members = modules
    to, come, seen, touched = scratch
    first, capacity, free = queue.first, queue.capacity, queue.free
    size, spare = queue.size, queue.spare
    head = moves = 0
    while size > 0 and moves < MOST_MOVES * capacity:
        i = queue.units[first + head]
        head = head + 1 if head + 1 < capacity else 0
        size -= 1
        queue.waiting[i] = 0
        a = module[i]
        end = _collect(network.out, i, module, group, to, scratch, first)
        end = _collect(network.into, i, module, group, come, scratch, end)
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
        for t in range(first, end):
            if touched[t] != a:
                strongest = max(strongest, to[touched[t]] + come[touched[t]])
        for t in range(first, end + 1):
            if t < end:
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
        for t in range(first, end):
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
        size = _wake(network.out, i, module, group, best, queue, head, size)
        size = _wake(network.into, i, module, group, best, queue, head, size)
    return moves


@kernel(allocates=False)
def _find_movers(
    network: Network, modules: Modules, scratch: Scratch, span: tuple[int, int], total: float, movers: np.ndarray
) -> None:
    # Marks the units of span that would gain by a move as things stand; a unit with all its flow inside its module cannot.
    flow, enter, leave = network.flow, network.enter, network.leave
    module, m_flow, m_enter, m_leave, term, members = modules
    to, come, seen, touched = scratch
    base = plogp(total)
    for i in range(span[0], span[1]):
        a = module[i]
        results = _collect(network.out, i, module, None, to, scratch, 0)
        results = _collect(network.into, i, module, None, come, scratch, results)
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


# A parallel loop of numba takes arrays but no NamedTuples: they are unpacked before it, and made again in it.


@kernel(parallel=True)
def find_all_movers(
    network: Network, modules: Modules, scratch: Scratch, cuts: np.ndarray, total: float, movers: np.ndarray
) -> None:
    # scratch: a row of each array for each range of units between two cuts.
    out, into, flow, enter, leave = network
    out_offsets, targets, out_weights, out_scale = out
    in_offsets, sources, in_weights, in_scale = into
    of, m_flow, m_enter, m_leave, term, members = modules
    to, come, seen, touched = scratch
    for c in numba.prange(len(cuts) - 1):
        whole = Network(
            Edges(out_offsets, targets, out_weights, out_scale), Edges(in_offsets, sources, in_weights, in_scale), flow, enter,
            leave,
        )  # fmt: skip
        state = Modules(of, m_flow, m_enter, m_leave, term, members)
        _find_movers(whole, state, Scratch(to[c], come[c], seen[c], touched[c]), (cuts[c], cuts[c + 1]), total, movers)


@kernel(parallel=True)
def drain_blocks(
    network: Network, modules: Modules, scratch: Scratch, queue: Queue, group: np.ndarray, cuts: np.ndarray,
    totals: np.ndarray, rests: np.ndarray,
) -> None:  # fmt: skip
    # Blocks hold whole groups, and a unit sees only its group: no two blocks touch the same entry of any array.
    out, into, flow, enter, leave = network
    out_offsets, targets, out_weights, out_scale = out
    in_offsets, sources, in_weights, in_scale = into
    of, m_flow, m_enter, m_leave, term, members = modules
    to, come, seen, touched = scratch
    units, waiting, free = queue.units, queue.waiting, queue.free
    for c in numba.prange(len(cuts) - 1):
        whole = Network(
            Edges(out_offsets, targets, out_weights, out_scale), Edges(in_offsets, sources, in_weights, in_scale), flow, enter,
            leave,
        )  # fmt: skip
        state, count = Modules(of, m_flow, m_enter, m_leave, term, members), cuts[c + 1] - cuts[c]
        own = Queue(units, waiting, free, cuts[c], count, count, 0)
        drain(whole, state, Scratch(to, come, seen, touched), own, group, totals[c], rests[c], FIRST_SHARE)


@kernel(parallel=True)
def cut_flows(edges: Edges, module: np.ndarray) -> np.ndarray:
    # Each unit's flow to or from other modules.
    offsets, others, weights, scale = edges
    out = np.empty(len(offsets) - 1)
    for i in numba.prange(len(out)):
        total = 0.0
        for e in range(offsets[i], offsets[i + 1]):
            if module[others[e]] != module[i]:
                total += weights.dtype.type(weights[e] * scale[i])
        out[i] = total
    return out


@kernel
def terms(m_enter: np.ndarray, m_leave: np.ndarray, m_flow: np.ndarray) -> np.ndarray:
    term = np.empty(len(m_flow))
    for m in range(len(m_flow)):
        term[m] = _term(m_enter[m], m_leave[m], m_flow[m])
    return term
