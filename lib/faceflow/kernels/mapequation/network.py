"""Units of the map equation with their flow: a network made from a graph's flow, and its aggregation to larger units."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from faceflow.kernels.graph.csr import cut_by_edges, transpose
from faceflow.kernels.mapequation.flow import Flow, Graph


@dataclass(frozen=True)
class Network:
    """Units (rows, or groups of them) with their flow, and the flow between different units, both ways.

    out_*/in_*: compressed rows as `flow.Graph`; edge e out of unit i carries out_weights[e] * out_scale[i], an edge into it
    in_weights[e] * in_scale[i], rounded to the weights' type: both ends of an edge must see the same flow, to the
    bit, or the gains of moves contradict each other and go round in circles. flow, enter, leave: float64[n], visit rate, flow
    in from and out to other units.
    """

    out_offsets: np.ndarray
    targets: np.ndarray
    out_weights: np.ndarray
    out_scale: np.ndarray
    in_offsets: np.ndarray
    sources: np.ndarray
    in_weights: np.ndarray
    in_scale: np.ndarray
    flow: np.ndarray
    enter: np.ndarray
    leave: np.ndarray

    def __len__(self) -> int:
        return len(self.flow)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """As the compiled kernels take it."""
        return (
            self.out_offsets, self.targets, self.out_weights, self.out_scale,
            self.in_offsets, self.sources, self.in_weights, self.in_scale, self.flow, self.enter, self.leave,
        )  # fmt: skip


@numba.njit(cache=True, nogil=True, inline="always")
def plogp(x: float) -> float:
    return x * np.log2(x) if x > 0.0 else 0.0


@numba.njit(cache=True, nogil=True, parallel=True)
def _carry(sources: np.ndarray, weights: np.ndarray, per_weight: np.ndarray) -> None:
    for e in numba.prange(len(weights)):
        weights[e] = weights[e] * per_weight[sources[e]]


@numba.njit(cache=True, nogil=True, parallel=True)
def _sum_others(offsets: np.ndarray, others: np.ndarray, weights: np.ndarray, scale: np.ndarray) -> np.ndarray:
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
    return _complete(
        graph.out_offsets, graph.targets, graph.out_weights, flow.per_weight,
        graph.in_offsets, graph.sources, in_weights, in_scale, flow.rows,
    )  # fmt: skip


def _complete(*arrays: np.ndarray) -> Network:
    into, out = _sum_others(*arrays[4:8]), _sum_others(*arrays[:4])
    return Network(*arrays, into, out)  # type: ignore[call-arg]  # mypy cannot count a starred tuple


@numba.njit(cache=True, nogil=True, _nrt=False)
def _sum_modules(
    offsets: np.ndarray, targets: np.ndarray, weights: np.ndarray, scale: np.ndarray, module: np.ndarray,
    begin: np.ndarray, units: np.ndarray, starts: np.ndarray, first: int, last: int,
    sums: np.ndarray, seen: np.ndarray, touched: np.ndarray, new_targets: np.ndarray, new_flow: np.ndarray, used: np.ndarray,
) -> None:  # fmt: skip
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


@numba.njit(cache=True, nogil=True, parallel=True)
def _sum_all_modules(
    offsets: np.ndarray, targets: np.ndarray, weights: np.ndarray, scale: np.ndarray, module: np.ndarray,
    begin: np.ndarray, units: np.ndarray, starts: np.ndarray, cuts: np.ndarray,
    sums: np.ndarray, seen: np.ndarray, touched: np.ndarray, new_targets: np.ndarray, new_flow: np.ndarray, used: np.ndarray,
) -> None:  # fmt: skip
    for c in numba.prange(len(cuts) - 1):
        _sum_modules(
            offsets, targets, weights, scale, module, begin, units, starts, cuts[c], cuts[c + 1],
            sums[c], seen[c], touched[c], new_targets, new_flow, used,
        )  # fmt: skip


@numba.njit(cache=True, nogil=True, parallel=True)
def _count_crossing(offsets: np.ndarray, targets: np.ndarray, module: np.ndarray) -> np.ndarray:
    out = np.empty(len(offsets) - 1, np.int64)
    for i in numba.prange(len(out)):
        count = 0
        for e in range(offsets[i], offsets[i + 1]):
            count += module[targets[e]] != module[i]
        out[i] = count
    return out


@numba.njit(cache=True, nogil=True, parallel=True)
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
    out = network.arrays[:4]
    units = np.argsort(module, kind="stable")
    begin = np.searchsorted(module[units], np.arange(count + 1))
    crossing = np.bincount(module, _count_crossing(*out[:2], module), minlength=count).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(crossing)])
    edges = np.concatenate([[0], np.cumsum(np.bincount(module, np.diff(out[0]), minlength=count))]).astype(np.int64)
    threads = numba.get_num_threads()
    cuts = cut_by_edges(edges, threads)
    targets, flow, used = np.empty(starts[-1], np.int32), np.empty(starts[-1]), np.empty(count, np.int64)
    size = threads, count
    _sum_all_modules(
        *out, module, begin, units.astype(np.int32), starts, cuts,
        np.zeros(size), np.zeros(size, np.uint8), np.empty(size, np.int32), targets, flow, used,
    )  # fmt: skip
    offsets = np.concatenate([[0], np.cumsum(used)])
    new_targets, new_flow = np.empty(offsets[-1], np.int32), np.empty(offsets[-1])
    _close_gaps(starts, targets, flow, offsets, new_targets, new_flow)
    one = np.ones(count)
    return _complete(
        offsets, new_targets, new_flow, one, *transpose(offsets, new_targets, new_flow), one,
        np.bincount(module, weights=network.flow, minlength=count),
    )  # fmt: skip


def dense(module: np.ndarray) -> tuple[np.ndarray, int]:
    """(the same partition numbered 0..count-1 in the order of the old numbers, count)."""
    used = np.zeros(int(module.max()) + 1, np.int64)
    used[module] = 1
    number = np.cumsum(used) - 1
    return number[module], int(number[-1]) + 1
