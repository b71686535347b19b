"""Quality of clusters without labels: how near their faces are to each other and to faces outside."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from faceflow.kernels.compiled import kernel

BINS = 1_024
"""Bands of the histogram of similarities from -1 to 1: fifty where all lie in a tenth of the range."""


class Doubts(NamedTuple):
    """Sums per cluster, by which parts add up. All arrays have one entry a cluster.

    faces: how many; inside, outside: those with a neighbor in the cluster, or in another; within: sum over the former of their
    mean similarity to it; between: sum over the latter of the similarity of the nearest; doubtful: faces that are nearer to one
    outside than to those inside on average; nearest: the largest similarity to a face outside, and face, other: the rows of
    that pair (-1: none).
    """

    faces: np.ndarray
    inside: np.ndarray
    within: np.ndarray
    outside: np.ndarray
    between: np.ndarray
    doubtful: np.ndarray
    nearest: np.ndarray
    face: np.ndarray
    other: np.ndarray

    @classmethod
    def none(cls, clusters: int) -> Doubts:
        counts, sums = (lambda: np.zeros(clusters, np.int64)), (lambda: np.zeros(clusters))
        nearest = np.full(clusters, -1.0), np.full(clusters, -1), np.full(clusters, -1)
        return cls(counts(), counts(), sums(), counts(), sums(), counts(), *nearest)

    def add(self, clusters: np.ndarray, other: Doubts) -> None:
        """Add sums of the clusters int64[...], each named once."""
        for name in ("faces", "inside", "within", "outside", "between", "doubtful"):
            getattr(self, name)[clusters] += getattr(other, name)
        nearer = other.nearest > self.nearest[clusters]
        for name in ("nearest", "face", "other"):
            getattr(self, name)[clusters[nearer]] = getattr(other, name)[nearer]


def doubts(
    offsets: np.ndarray, rows: np.ndarray, similarities: np.ndarray, first_row: int, cluster: np.ndarray
) -> tuple[np.ndarray, Doubts, np.ndarray]:
    """(clusters int64[c], their sums, histogram int64[2, BINS] of the similarities inside and outside clusters, from -1 to 1)
    of one part of the neighbor table.

    offsets: int64[r + 1]; rows: int32[m]; similarities: float32[m]; first_row: of the part; cluster: int64[N], of every row. A
    face without a neighbor inside is not doubtful: there is nothing to compare.
    """
    selected = cluster[first_row : first_row + len(offsets) - 1]
    known, number = np.unique(selected, return_inverse=True)
    results, histogram = Doubts.none(len(known)), np.zeros(2 * BINS, np.int64)
    _sum_doubts((offsets, rows, similarities), first_row, cluster, number, results, histogram)
    return known, results, histogram.reshape(2, BINS)


@kernel
def _sum_doubts(
    table: tuple[np.ndarray, np.ndarray, np.ndarray], first_row: int, cluster: np.ndarray, number: np.ndarray, sums: Doubts,
    histogram: np.ndarray,
) -> None:  # fmt: skip
    offsets, rows, similarities = table
    faces, inside, within, outside, between, doubtful, nearest, face, other = sums
    for i in range(len(number)):
        mine, at = cluster[first_row + i], number[i]
        count, total, best, at_best = 0, 0.0, -2.0, -1
        for e in range(offsets[i], offsets[i + 1]):
            band = np.uint32((similarities[e] + np.float32(1)) * np.float32(BINS / 2))
            band = min(band, np.uint32(BINS - 1))
            if cluster[rows[e]] == mine:
                count += 1
                total += similarities[e]
                histogram[band] += 1
            else:
                histogram[band + np.uint32(BINS)] += 1
                if similarities[e] > best:
                    best, at_best = np.float64(similarities[e]), rows[e]
        faces[at] += 1
        if count:
            inside[at] += 1
            within[at] += total / count
        if best > -2:
            outside[at] += 1
            between[at] += best
            if best > nearest[at]:
                nearest[at], face[at], other[at] = best, first_row + i, at_best
            doubtful[at] += count > 0 and best > total / count


def size_histogram(sizes: np.ndarray) -> dict[str, int]:
    """How many clusters there are of each size: 1, 2, 3-4, 5-8, … up to the largest."""
    band = np.ceil(np.log2(sizes)).astype(int) if len(sizes) else np.empty(0, int)
    counts = np.bincount(band)
    return {(str(2**b) if b < 2 else f"{2 ** (b - 1) + 1}-{2**b}"): int(count) for b, count in enumerate(counts)}
