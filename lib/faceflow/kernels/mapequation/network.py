"""Units of the map equation with their flow: a network made from a graph's flow, and its aggregation to larger units."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from faceflow.kernels.compiled import kernel
from faceflow.kernels.graph.csr import cut_by_edges, transpose
from faceflow.kernels.mapequation.flow import Flow, Graph


class Edges(NamedTuple):
    """Edges of each unit one way, as compressed rows: edge e of unit i leads to unit `others[e]` and carries
    `weights[e] * scale[i]`, rounded to the weights' type.

    offsets: int64[n + 1]; others: int32[m]; weights: float32[m] or float64[m]; scale: float64[n].
    """

    offsets: np.ndarray
    others: np.ndarray
    weights: np.ndarray
    scale: np.ndarray


class Network(NamedTuple):
    """Units (rows, or groups of them) with their flow, and the flow between different units, both ways.

    Both ends of an edge must see the same flow, to the bit, or the gains of moves contradict each other and go round in
    circles. flow, enter, leave: float64[n], visit rate, flow in from and out to other units.
    """

    out: Edges
    into: Edges
    flow: np.ndarray
    enter: np.ndarray
    leave: np.ndarray

    @property
    def units(self) -> int:
        return len(self.flow)


@kernel(inline=True)
def plogp(x: float) -> float:
    """x log2 x; 0 at 0."""
    return x * np.log2(x) if x > 0.0 else 0.0


@kernel(parallel=True)
def _carry(sources: np.ndarray, weights: np.ndarray, per_weight: np.ndarray) -> None:
    for e in numba.prange(len(weights)):
        weights[e] = weights[e] * per_weight[sources[e]]


@kernel(parallel=True)
def _sum_others(edges: Edges) -> np.ndarray:
    # Each unit's flow to, or from, other units.
    offsets, others, weights, scale = edges
    out = np.zeros(len(offsets) - 1)
    for i in numba.prange(len(out)):
        total = 0.0
        for e in range(offsets[i], offsets[i + 1]):
            if others[e] != i:
                total += weights.dtype.type(weights[e] * scale[i])
        out[i] = total
    return out


def network_of(graph: Graph, flow: Flow, consume: bool = False) -> Network:
    """The rows themselves as units. Flows of in-edges are float32: they only steer moves, codelengths come from `codelength`.

    consume: write them over the graph's in_weights, which saves 4 bytes an edge; the graph then serves for nothing else that
    looks at its in-edges.
    """
    one = np.ones(len(graph))
    if graph.sources is graph.targets:  # symmetric: every edge carries the same share of its weight, each way
        in_weights, in_scale = graph.in_weights, flow.per_weight
    else:
        in_weights, in_scale = graph.in_weights if consume else graph.in_weights.copy(), one
        _carry(graph.sources, in_weights, flow.per_weight)
    out = Edges(graph.out_offsets, graph.targets, graph.out_weights, flow.per_weight)
    return _complete(out, Edges(graph.in_offsets, graph.sources, in_weights, in_scale), flow.rows)


def _complete(out: Edges, into: Edges, flow: np.ndarray) -> Network:
    return Network(out, into, flow, _sum_others(into), _sum_others(out))


class Grouping(NamedTuple):
    """Units by module: module: int64[n], of each unit; begin: int64[modules + 1], where each module's units begin among `units`
    int32[n]; starts: int64[modules + 1], where its edges have room."""

    module: np.ndarray
    begin: np.ndarray
    units: np.ndarray
    starts: np.ndarray


class Sums(NamedTuple):
    """Of each module so far: sums: float64[modules], flow to it; seen: uint8[modules]; touched: int32[modules], those seen."""

    sums: np.ndarray
    seen: np.ndarray
    touched: np.ndarray


class Crossing(NamedTuple):
    """Edges between modules, from each one's `starts` on: targets int32[m], flow float64[m], and used int64[modules], how
    many."""

    targets: np.ndarray
    flow: np.ndarray
    used: np.ndarray


@kernel(allocates=False)
def _sum_modules(edges: Edges, grouping: Grouping, scratch: Sums, made: Crossing, first: int, last: int) -> None:
    offsets, targets, weights, scale = edges
    module, begin, units, starts = grouping
    sums, seen, touched = scratch
    new_targets, new_flow, used = made
    for m in range(first, last):
        results = 0
        for u in range(begin[m], begin[m + 1]):
            i = units[u]
            for e in range(offsets[i], offsets[i + 1]):
                b = module[targets[e]]
                if b == m:
                    continue
                if not seen[b]:
                    seen[b] = 1
                    touched[results] = b
                    results += 1
                sums[b] += weights.dtype.type(weights[e] * scale[i])
        for t in range(results):
            b = touched[t]
            new_targets[starts[m] + t] = b
            new_flow[starts[m] + t] = sums[b]
            sums[b] = 0.0
            seen[b] = 0
        used[m] = results


@kernel(parallel=True)
def _sum_all_modules(edges: Edges, grouping: Grouping, scratch: Sums, made: Crossing, cuts: np.ndarray) -> None:
    # scratch: a row of each array for each range of modules between two cuts. A parallel loop takes no NamedTuples.
    offsets, targets, weights, scale = edges
    module, begin, units, starts = grouping
    sums, seen, touched = scratch
    new_targets, new_flow, used = made
    for c in numba.prange(len(cuts) - 1):
        _sum_modules(
            Edges(offsets, targets, weights, scale), Grouping(module, begin, units, starts), Sums(sums[c], seen[c], touched[c]),
            Crossing(new_targets, new_flow, used), cuts[c], cuts[c + 1],
        )  # fmt: skip


@kernel(parallel=True)
def _count_crossing(offsets: np.ndarray, targets: np.ndarray, module: np.ndarray) -> np.ndarray:
    out = np.empty(len(offsets) - 1, np.int64)
    for i in numba.prange(len(out)):
        count = 0
        for e in range(offsets[i], offsets[i + 1]):
            count += module[targets[e]] != module[i]
        out[i] = count
    return out


@kernel(parallel=True)
def _close_gaps(
    starts: np.ndarray,
    old_targets: np.ndarray,
    old_flow: np.ndarray,
    offsets: np.ndarray,
    targets: np.ndarray,
    flow: np.ndarray,
) -> None:
    for m in numba.prange(len(offsets) - 1):
        for t in range(offsets[m + 1] - offsets[m]):
            targets[offsets[m] + t] = old_targets[starts[m] + t]
            flow[offsets[m] + t] = old_flow[starts[m] + t]


def aggregate(network: Network, module: np.ndarray, count: int) -> Network:
    """Modules 0..count-1 as units of a smaller network, in float64."""
    out = network.out
    units = np.argsort(module, kind="stable")
    begin = np.searchsorted(module[units], np.arange(count + 1))
    crossing = np.bincount(module, _count_crossing(out.offsets, out.others, module), minlength=count).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(crossing)])
    edges = np.concatenate([[0], np.cumsum(np.bincount(module, np.diff(out.offsets), minlength=count))]).astype(np.int64)
    threads = numba.get_num_threads()
    cuts, size = cut_by_edges(edges, threads), (threads, count)
    made = Crossing(np.empty(starts[-1], np.int32), np.empty(starts[-1]), np.empty(count, np.int64))
    scratch = Sums(np.zeros(size), np.zeros(size, np.uint8), np.empty(size, np.int32))
    _sum_all_modules(out, Grouping(module, begin, units.astype(np.int32), starts), scratch, made, cuts)
    offsets = np.concatenate([[0], np.cumsum(made.used)])
    targets, flow = np.empty(offsets[-1], np.int32), np.empty(offsets[-1])
    _close_gaps(starts, made.targets, made.flow, offsets, targets, flow)
    one = np.ones(count)
    return _complete(
        Edges(offsets, targets, flow, one), Edges(*transpose(offsets, targets, flow), one),
        np.bincount(module, weights=network.flow, minlength=count),
    )  # fmt: skip


def dense(module: np.ndarray) -> tuple[np.ndarray, int]:
    """(the same partition numbered 0..count-1 in the order of the old numbers, count)."""
    used = np.zeros(int(module.max()) + 1, np.int64)
    used[module] = 1
    number = np.cumsum(used) - 1
    return number[module], int(number[-1]) + 1
