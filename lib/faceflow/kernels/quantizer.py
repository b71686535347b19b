"""The coarse quantizer: spherical k-means cells, their order and grouping into shards, and each face's nearest cells.

faiss on the CPU does the clustering and the assignment; its results do not depend on the number of threads (tested).
"""

from __future__ import annotations

import faiss
import numpy as np

ITERATIONS = 5
"""Lloyd iterations: a few suffice for a search that probes several cells."""

SAMPLE_PER_CELL = 48
"""Training faces a cell: between faiss's own minimum (39) and where recall stops rising (64)."""


def train(sample: np.ndarray, cells: int, seed: int, threads: int) -> np.ndarray:
    """Unit centroids of a spherical k-means, float32[cells, d].

    sample: float32[n, d], unit rows, n >= cells. threads: CPU threads to use; the result does not depend on it.
    """
    faiss.omp_set_num_threads(threads)
    kmeans = faiss.Kmeans(
        sample.shape[1], cells, niter=ITERATIONS, spherical=True, seed=seed + 1,
        min_points_per_centroid=1, max_points_per_centroid=max(256, -(-len(sample) // cells)),
    )  # fmt: skip
    kmeans.train(sample)
    return np.ascontiguousarray(kmeans.centroids, np.float32)


def nearest_cells(vectors: np.ndarray, centroids: np.ndarray, probes: int, threads: int = 1) -> np.ndarray:
    """The `probes` cells nearest to each vector, nearest first: int32[n, probes]; probes <= len(centroids).

    Every row holds distinct cells: a vector whose similarity to a centroid is not comparable does not occur (unit rows).
    """
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    _, cells = index.search(vectors, probes)
    return cells.astype(np.int32)


def locality_order(centroids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """An order of the cells in which near cells stand near each other: balanced bisection along principal axes.

    centroids: float32[c, d]; weights: float64[c], each cell's share of the work. Returns intp[c], a permutation.
    """
    order: list[np.ndarray] = []
    stack = [np.arange(len(centroids))]
    while stack:
        group = stack.pop()
        if len(group) <= 2:
            order.append(group)
            continue
        spread = centroids[group].astype(np.float64)
        spread -= spread.mean(axis=0)
        axis = spread[0] + 1e-3
        for _ in range(12):  # power iteration: a rough axis is enough, a fixed number of steps is deterministic
            axis = spread.T @ (spread @ axis)
            axis /= np.linalg.norm(axis) + 1e-300
        by_axis = group[np.argsort(spread @ axis, kind="stable")]
        half = np.searchsorted(np.cumsum(weights[by_axis]), weights[by_axis].sum() / 2) + 1
        half = int(np.clip(half, 1, len(group) - 1))
        stack += [by_axis[half:], by_axis[:half]]
    return np.concatenate(order) if order else np.empty(0, np.intp)


def shard_starts(weights: np.ndarray, shards: int) -> np.ndarray:
    """Cut cells, in their order, into `shards` runs of about equal weight: int64[shards + 1], starts and the end."""
    total = np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)])
    cuts = np.searchsorted(total, total[-1] * np.arange(1, shards) / shards)
    return np.maximum.accumulate(np.concatenate([[0], cuts, [len(weights)]])).astype(np.int64)
