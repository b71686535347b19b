"""From raw modules to published cluster ids."""

from __future__ import annotations

import numba
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


@numba.njit(cache=True, nogil=True)
def _hash_texts(offsets: np.ndarray, data: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(out)):
        h = np.uint64(14695981039346656037)
        for j in range(offsets[i], offsets[i + 1]):
            h = (h ^ np.uint64(data[j])) * np.uint64(1099511628211)
        out[i] = h ^ (h >> np.uint64(32))


def buckets_of_texts(offsets: np.ndarray, data: np.ndarray, buckets: int) -> np.ndarray:
    """int64[n]: a bucket 0..buckets-1 for each text data[offsets[i]:offsets[i + 1]], equal texts in one.

    offsets: int32 or int64[n + 1]; data: uint8[...]. The hash is 64-bit FNV-1a (Fowler, Noll & Vo).
    """
    out = np.empty(len(offsets) - 1, np.uint64)
    _hash_texts(offsets, data, out)
    return (out % np.uint64(buckets)).astype(np.int64)
