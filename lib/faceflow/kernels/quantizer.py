"""The coarse quantizer: spherical k-means cells, their order and grouping into shards, and each face's nearest cells.

faiss on the CPU does the clustering and the assignment; its results do not depend on the number of threads (tested).
"""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numba
import numpy as np

from faceflow.kernels.tiles import CHUNK, QUERY_BLOCK, TileKernel
from faceflow.kernels.topk import Buffers, decode, key_of, select_smallest

ITERATIONS = 5
"""Lloyd iterations: a few suffice for a search that probes several cells."""

SAMPLE_PER_CELL = 64
"""Training faces a cell. 200k synthetic faces, 579 cells: recall with one probe is .971 with 48 and .990 with 200, but
time grows in proportion."""

UNTOLD_PROBES = 8
"""Probes where a sample holds no pair above the floor: there is next to nothing to find."""

MARGIN_STEP = 1e-4
"""Margins are rounded up to a multiple: BLAS rounds differently in blocks of another shape, or on other machines, and must
neither lose the pair that set the margin nor move it."""


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


@dataclass(frozen=True)
class ProbeRule:
    """Which cells a face probes: its nearest one, and every further one whose centroid is at most `margin` less similar,
    `most` at most. margin None: always `most`.

    A fixed number of probes wastes most of them on faces that lie well inside their cell; the margin spends them on the
    faces that do not. Measured on 1M synthetic faces, 2,000 cells, predicted recall 0.997: 5.7 probes a face on average
    instead of more than 32.
    """

    margin: float | None
    most: int

    def widened(self, effort: int, cells: int) -> ProbeRule:
        """The rule after `effort` failed attempts at the wanted recall: each doubles `most` and adds half to the margin."""
        most = min(cells, self.most * 2**effort)
        if self.margin is None or most == cells:
            return ProbeRule(None if effort else self.margin, most)
        return ProbeRule(self.margin * 1.5**effort, most)


def probe(vectors: np.ndarray, centroids: np.ndarray, rule: ProbeRule) -> tuple[np.ndarray, np.ndarray]:
    """The cells that each face probes, nearest first: (offsets int64[n + 1], cells int32[...]).

    vectors: float32[n, d], unit rows; centroids: float32[c, d].
    """
    n, cells = len(vectors), len(centroids)
    if rule.margin is None:
        found = nearest_cells(vectors, centroids, min(rule.most, cells))
        return np.arange(n + 1, dtype=np.int64) * found.shape[1], found.ravel()
    product = np.empty((min(QUERY_BLOCK, n), cells), np.float32)
    counts, out = np.empty(n, np.int64), []
    scratch = np.empty(cells, np.uint64)
    for begin in range(0, n, QUERY_BLOCK):
        block = product[: min(QUERY_BLOCK, n - begin)]
        np.matmul(vectors[begin : begin + len(block)], centroids.T, out=block)
        nearest = np.empty(len(block) * rule.most, np.int32)
        total = _within_margin(
            block,
            block.view(np.uint32),
            np.float32(rule.margin),
            rule.most,
            scratch,
            counts[begin : begin + len(block)],
            nearest,
        )
        out.append(nearest[:total].copy())
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets, np.concatenate(out) if out else np.empty(0, np.int32)


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})  # so that the maximum vectorises; no NaN comes here
def _within_margin(
    product: np.ndarray, bits: np.ndarray, margin: np.float32, most: int,
    scratch: np.ndarray, counts: np.ndarray, out: np.ndarray,
) -> int:  # fmt: skip
    total = 0
    for i in range(product.shape[0]):
        row = product[i]
        best = np.float32(-2.0)
        for j in range(len(row)):
            best = max(best, row[j])
        least = best - margin
        found = 0
        for begin in range(0, len(row), CHUNK):
            chunk = row[begin : begin + CHUNK]
            near = 0
            for j in range(len(chunk)):
                near += int(chunk[j] >= least)
            if near:
                for j in range(begin, begin + len(chunk)):
                    if row[j] >= least:
                        scratch[found] = key_of(bits[i, j], np.int32(j))
                        found += 1
        if found > most:
            select_smallest(scratch, found, most)
            found = most
        nearest = scratch[:found]
        nearest.sort()
        for j in range(found):
            out[total + j] = np.int32(nearest[j] & np.uint64(0xFFFFFFFF))
        total += found
        counts[i] = found
    return total


def choose_rule(
    vectors: np.ndarray,
    faces: int,
    centroids: np.ndarray,
    neighbors: int,
    floor: float | None,
    most: int,
    target: float,
    threads: int,
) -> tuple[ProbeRule, float, float | None]:
    """The smallest margin with a predicted edge recall of `target`, the mean probes it makes, and that prediction (None:
    no pair to tell by).

    vectors: float32[n, d], a uniform sample of the `faces` faces: pairs of it above the floor (with floor None: each
    face's nearest in it) are a sample of the edges. A pair is found when either face probes the other's home
    cell; the margin it takes is the smaller of the two. A face with more neighbors than k keeps only k of them, so its
    pairs weigh less: without that, the easy faces amid a large cluster would outvote the hard ones at its edge.
    """
    n = len(vectors)
    # Without a floor, only as many of the sample's faces are neighbors as the sample has of all faces.
    k = neighbors if floor is not None else -(-neighbors * n // faces)
    buffers = Buffers.empty(n, min(k, max(1, n - 1)), floor)
    here = np.arange(n)
    TileKernel(vectors, here.astype(np.int32), buffers).within(here, vectors)
    offsets, keys = buffers.take(here)
    if len(keys) == 0:
        return ProbeRule(None, min(most, UNTOLD_PROBES)), float(min(most, UNTOLD_PROBES)), None
    a, (_, b) = np.repeat(here, np.diff(offsets)), decode(keys)
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    similarities, cells = index.search(vectors, most)
    short = similarities[:, :1] - similarities
    needed = np.minimum(_margin_to(short, cells, a, b), _margin_to(short, cells, b, a))
    weights = np.minimum(1.0, neighbors * n / (faces * np.diff(offsets)[a]))
    order = np.argsort(needed, kind="stable")
    needed, reached = needed[order], np.cumsum(weights[order]) / weights.sum()
    within_reach = int(np.isfinite(needed).sum())
    if within_reach == 0:
        return ProbeRule(None, most), float(most), 0.0
    at = min(within_reach - 1, int(np.searchsorted(reached, target)))
    margin = MARGIN_STEP * np.ceil(needed[at] / MARGIN_STEP + 0.5)
    mean_probes = float((short <= margin).sum(axis=1).mean())
    return ProbeRule(float(margin), most), mean_probes, round(float(reached[at]), 5)


def _margin_to(short: np.ndarray, cells: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Margin at which face a probes the home cell of face b; infinite where that is not among its nearest cells."""
    match = cells[a] == cells[b, :1]
    return np.where(match.any(axis=1), short[a, match.argmax(axis=1)], np.inf)


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
