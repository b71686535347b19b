"""From raw modules to published cluster ids."""

from __future__ import annotations

import numpy as np


def canonical_order(modules: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cluster ids 0..C-1 by falling size, ties by first row.

    modules: int64[N], any non-negative numbers below a few N. Returns (lookup int64[max module + 1], sizes int64[C]):
    the cluster of module m is lookup[m] (-1 for a number no row has), and sizes[c] its number of rows.
    """
    sizes = np.bincount(modules)
    first = np.full(len(sizes), len(modules), np.int64)
    # Writing in reverse leaves the smallest row of each module.
    first[modules[::-1]] = np.arange(len(modules) - 1, -1, -1)
    used = np.flatnonzero(sizes)
    order = used[np.lexsort((first[used], -sizes[used]))]
    lookup = np.full(len(sizes), -1, np.int64)
    lookup[order] = np.arange(len(order))
    return lookup, sizes[order].astype(np.int64)


def stable_clusters(modules: np.ndarray, past: np.ndarray, next_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster ids that stay: a module takes the id of the past cluster with which it shares most faces when each is the
    other's best match; otherwise a fresh one.

    modules: int64[N]; past: int64[N], each face's cluster before, -1 for none; next_id: the first id that was never given.
    Ties go to the lower (older) id, and among modules to the larger, then to the one with the first row. Fresh ids follow
    `canonical_order`. Returns (lookup int64[max module + 1], sizes int64[max module + 1]), -1 and 0 for a number no row has.
    """
    order, _ = canonical_order(modules)
    sizes = np.bincount(modules, minlength=len(order))
    lookup = np.full(len(order), -1, np.int64)
    known = past >= 0
    pairs, shared = np.unique(past[known] * len(order) + modules[known], return_counts=True)
    before, module = pairs // max(1, len(order)), pairs % max(1, len(order))
    best_of_module = np.full(len(order), -1, np.int64)
    by_module = np.lexsort((before, -shared, module))
    first = by_module[np.unique(module[by_module], return_index=True)[1]]
    best_of_module[module[first]] = before[first]
    by_past = np.lexsort((order[module], -shared, before))
    first = by_past[np.unique(before[by_past], return_index=True)[1]]
    mutual = first[best_of_module[module[first]] == before[first]]
    lookup[module[mutual]] = before[mutual]
    fresh = np.flatnonzero((lookup < 0) & (sizes > 0))
    fresh = fresh[np.argsort(order[fresh])]
    lookup[fresh] = next_id + np.arange(len(fresh))
    return lookup, sizes


def transitions(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of clusters that share faces: (clusters before, clusters after, faces they share), int64[p] each.

    before, after: int64[n], each face's cluster in two runs, -1 where it has none or was not there.
    """
    width = int(after.max(initial=-1)) + 2
    pairs, count = np.unique((before + 1) * width + after + 1, return_counts=True)
    return pairs // width - 1, pairs % width - 1, count.astype(np.int64)
