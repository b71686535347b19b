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
