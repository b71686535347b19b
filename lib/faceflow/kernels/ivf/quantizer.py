"""The coarse quantizer: spherical k-means cells, their order and their grouping into shards.

Why not faiss here: a face is assigned by one matrix product, and NumPy's BLAS knows newer processors. faiss-cpu 1.15.1 brings
an OpenBLAS that takes a Sapphire Rapids for a processor of 2004: 35 GFLOP/s on two cores where NumPy reaches 190.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from faceflow.kernels.compiled import kernel
from faceflow.kernels.knn.tile_kernel import QUERY_BLOCK

SHARES = 8, 4, 2, 1, 1
"""Of each Lloyd iteration: one face in so many of the sample; a few iterations suffice for a search that probes several cells,
and the first need not be exact. 1M synthetic faces, 2,000 cells, three seeds, four held-out samples each: 3.8 probes a face,
4.0 with the whole sample each time, which takes 1.7 times as long."""

FEWEST_PER_CELL = 8
"""Faces a cell that an iteration takes at least, where the sample has them."""

ITERATIONS = sum(1 / share for share in SHARES)
"""Passes over the sample that they amount to."""

SAMPLE_PER_CELL = 64
"""Training faces a cell. 1M synthetic faces, 2,000 cells, five iterations: for the same predicted recall a face probes 14.4
cells with 32, 6.3 with 64 and 4.8 with 128, but time grows in proportion."""


def nearest_cell(vectors: np.ndarray, centroids: np.ndarray, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The cell nearest to each vector and its similarity: (int32[n], float32[n]); ties to the lower cell.

    vectors: float32[n, d], unit rows; centroids: float32[c, d]. threads: CPU threads, without influence on the result, as
    the blocks are the same.
    """
    cells, similarities = np.empty(len(vectors), np.int32), np.empty(len(vectors), np.float32)

    def assign(begin: int, end: int) -> None:
        product = np.empty((QUERY_BLOCK, len(centroids)), np.float32)
        for i in range(begin, end, QUERY_BLOCK):
            block = vectors[i : i + QUERY_BLOCK]
            selected = np.matmul(block, centroids.T, out=product[: len(block)])
            cells[i : i + len(block)] = selected.argmax(axis=1)
            similarities[i : i + len(block)] = selected[np.arange(len(block)), cells[i : i + len(block)]]

    step = max(1, -(-len(vectors) // (QUERY_BLOCK * 4 * threads))) * QUERY_BLOCK
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(assign, i, min(i + step, len(vectors))) for i in range(0, len(vectors), step)]:
            future.result()
    return cells, similarities


def train(sample: np.ndarray, cells: int, seed: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit centroids of a spherical k-means, float32[cells, d]: Lloyd iterations (SHARES) from random faces of the sample; and
    how many of the sample each cell had before its centroid moved for the last time, int64[cells].

    sample: float32[n, d], unit rows, n >= cells. threads: CPU threads to use; the result does not depend on it. A cell that
    becomes empty starts again at the face that lies furthest from its centroid.
    """
    rng = np.random.default_rng([seed, 5])
    centroids = sample[np.sort(rng.choice(len(sample), cells, replace=False))].astype(np.float32)
    cell = np.empty(0, np.int32)
    for share in SHARES:
        faces = sample[:: max(1, min(share, len(sample) // (FEWEST_PER_CELL * cells)))]
        cell, similarities = nearest_cell(faces, centroids, threads)
        sums = np.zeros((cells, sample.shape[1]), np.float64)
        _add_rows(faces, cell, sums)
        lengths = np.linalg.norm(sums, axis=1)
        empty = np.flatnonzero(lengths <= 1e-12)
        centroids = (sums / np.maximum(lengths, 1e-300)[:, None]).astype(np.float32)
        centroids[empty] = faces[np.argsort(similarities, kind="stable")[: len(empty)]]
    return centroids, np.bincount(cell, minlength=cells)


@kernel
def _add_rows(vectors: np.ndarray, cell: np.ndarray, sums: np.ndarray) -> None:
    for i in range(len(vectors)):
        for j in range(vectors.shape[1]):
            sums[cell[i], j] += vectors[i, j]


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
