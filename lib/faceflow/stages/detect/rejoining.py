"""Modules that the cap on neighbors cut out of one cluster are joined again (`kernels.clusters.rejoining`)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from faceflow.kernels.clusters import rejoining
from faceflow.stages.artifacts.faces import RunData, read_vectors
from faceflow.storage import layout
from faceflow.tables import EdgeList, NeighborTable

CAPPED = 0.5
"""Share of a module's faces whose lists are full, from which the cap may have cut it out of a larger cluster."""

LEAST_EDGES = 0.01
"""Edges between two capped modules, in parts of those of the one with fewer, from which they are compared."""

MODULES_AT_ONCE = 1_024
"""Modules whose sampled faces are in memory together: 256 MB at 256 dimensions."""


def join_capped(data: RunData, neighbors: int, modules: np.ndarray, edges: Iterable[EdgeList]) -> tuple[np.ndarray, int]:
    """(modules int64[N] in which those that are one cluster have one number, how many modules went into another).

    edges: all of the graph, part by part.
    """
    run, parts = data.store, data.parts
    size = np.bincount(modules)
    full = np.zeros(len(size))
    for part in range(len(parts)):
        first = parts.starts[part]
        table = NeighborTable.from_batch(run.read_batch(layout.part("neighbors", part)), first)
        selected = modules[first : parts.starts[part + 1]]
        full += np.bincount(selected[np.diff(table.offsets) >= neighbors], minlength=len(size))
    capped = (full >= CAPPED * np.maximum(size, 1)) & (size >= rejoining.FEWEST)
    if capped.sum() < 2:
        return modules, 0
    pairs = _near_pairs(modules, capped, edges)
    densities = np.zeros(len(pairs))
    begin = 0
    while begin < len(pairs):
        # As many pairs as have no more modules than fit.
        ends = pairs[begin : begin + MODULES_AT_ONCE * MODULES_AT_ONCE].ravel()
        seen = np.zeros(len(ends), bool)
        seen[np.unique(ends, return_index=True)[1]] = True
        step = int(np.searchsorted(np.cumsum(seen)[1::2], MODULES_AT_ONCE, side="right"))
        chosen = pairs[begin : begin + step]
        numbers, at = np.unique(chosen, return_inverse=True)
        vectors = _sample(data, modules, numbers)
        for i, (a, b) in enumerate(at.reshape(-1, 2).tolist()):
            densities[begin + i] = rejoining.density_between(vectors[a], vectors[b])
        begin += step
    joined = rejoining.join(pairs, densities, len(size))
    return joined[modules], int((joined != np.arange(len(size))).sum())


def _near_pairs(modules: np.ndarray, capped: np.ndarray, edges: Iterable[EdgeList]) -> np.ndarray:
    """int64[p, 2]: the pairs of capped modules that edges bind, ascending."""
    count = len(capped)
    within = np.zeros(count, np.int64)
    results: list[tuple[np.ndarray, np.ndarray]] = []
    for part in edges:
        a, b = modules[part.sources()], modules[part.rows]
        both = capped[a] & capped[b]
        a, b = a[both], b[both]
        within += np.bincount(a, minlength=count)
        a, b = a[a != b], b[a != b]
        results.append(np.unique(np.minimum(a, b) * count + np.maximum(a, b), return_counts=True))
    keys = np.concatenate([np.empty(0, np.int64), *(keys for keys, _ in results)])
    pair, at = np.unique(keys, return_inverse=True)
    between = np.bincount(at, np.concatenate([np.empty(0), *(counts for _, counts in results)]), minlength=len(pair))
    first, second = pair // count, pair % count
    kept = between >= LEAST_EDGES * np.minimum(within[first], within[second])
    return np.stack([first[kept], second[kept]], axis=1)


def _sample(data: RunData, modules: np.ndarray, chosen: np.ndarray) -> list[np.ndarray]:
    """The vectors float32[s, dim] of evenly chosen faces of each of these modules int64[c]."""
    run, parts, dim = data.store, data.parts, data.dim
    order = np.argsort(modules, kind="stable")
    starts = np.searchsorted(modules[order], chosen)
    ends = np.searchsorted(modules[order], chosen, side="right")
    rows = [
        order[np.unique(np.linspace(begin, end - 1, min(end - begin, rejoining.SAMPLE)).astype(np.int64))]
        for begin, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    every = np.concatenate(rows)
    vectors = np.empty((len(every), dim), np.float32)
    by_row = np.argsort(every, kind="stable")
    cuts = np.searchsorted(every[by_row], parts.starts)
    for part in np.flatnonzero(np.diff(cuts)).tolist():
        selected = by_row[cuts[part] : cuts[part + 1]]
        vectors[selected] = read_vectors(run, part, dim)[every[selected] - parts.starts[part]]
    return np.split(vectors, np.cumsum([len(item) for item in rows])[:-1])
