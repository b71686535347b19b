"""Greedy search of the map equation: units move between modules, then modules of units, until no move gains."""

from __future__ import annotations

import numba
import numpy as np

from faceflow.kernels.graph.csr import cut_by_edges
from faceflow.kernels.mapequation.moves import (
    Modules,
    Queue,
    Scratch,
    cut_flows,
    drain,
    drain_blocks,
    find_all_movers,
    terms,
)
from faceflow.kernels.mapequation.network import Network, aggregate, dense

BLOCK_UNITS, MOST_BLOCKS = 16_384, 64
"""Units of a block whose first moves are made side by side with other blocks', and the most blocks: both depend on the graph
alone, as the blocks are part of the result's definition."""

REST_SHARE = 0.5
"""Of the flow into the single units of other blocks, how much a block takes to remain between their modules: somewhere between
all of it, as it is at first, and the few per cent that are left in the end. The moves that follow know the truth."""


def first_modules(network: Network, order: np.ndarray, group: np.ndarray | None = None) -> np.ndarray:
    """Modules (numbers of units, int64[n]) after every unit, alone at first, has moved within its group: int64[n].

    order: a permutation of the units, the order of their first moves. group: int64[n]; default: blocks of consecutive units.
    """
    n = network.units
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
    modules = Modules(
        module, network.flow.copy(), network.enter.copy(), network.leave.copy(),
        terms(network.enter, network.leave, network.flow), np.ones(n, np.int64),
    )  # fmt: skip
    queue = Queue(by_group, np.ones(n, np.uint8), np.empty(0, np.int64), 0, n, n, 0)
    drain_blocks(network, modules, _scratch((n,)), queue, group, cuts, own, rests)
    return module


def run_moves(network: Network, module: np.ndarray, order: np.ndarray, search: bool = False) -> int:
    """Move units between modules (numbers below n, changed in place) until no active unit gains; returns the moves.

    order: the units active at first. search: of these only such as would gain by a move as things stand.
    """
    n = network.units
    enter = np.bincount(module, cut_flows(network.into, module), minlength=n)
    leave = np.bincount(module, cut_flows(network.out, module), minlength=n)
    flow, members = np.bincount(module, network.flow, minlength=n), np.bincount(module, minlength=n)
    modules, total = Modules(module, flow, enter, leave, terms(enter, leave, flow), members), float(enter.sum())
    if search:
        threads = numba.get_num_threads()
        cuts, movers = cut_by_edges(network.out.offsets + network.into.offsets, threads), np.empty(n, np.uint8)
        find_all_movers(network, modules, _scratch((threads, int(module.max()) + 1)), cuts, total, movers)
        order = order[movers[order] == 1]
    if len(order) == 0:
        return 0
    free = np.empty(n + 1, np.int64)
    empty = np.flatnonzero(members == 0)
    free[: len(empty)] = empty
    units, waiting = np.empty(n, np.int32), np.zeros(n, np.uint8)
    units[: len(order)] = order
    waiting[order] = 1
    queue = Queue(units, waiting, free, 0, n, len(order), len(empty))
    return int(drain(network, modules, _scratch((n,)), queue, None, total, 0.0, 0.0))


def _scratch(size: tuple[int, ...]) -> Scratch:
    return Scratch(np.zeros(size), np.zeros(size), np.zeros(size, np.uint8), np.empty(size, np.int64))


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
