"""How sure clusters are of themselves, without labels: how near their faces are to each other and to faces outside."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np


@dataclass(frozen=True)
class Doubts:
    """Sums per cluster, by which parts add up. All arrays have one entry a cluster.

    faces: how many; inside, outside: those with a neighbor in the cluster, or in another; within: sum over the former of their
    mean similarity to it; between: sum over the latter of the similarity of the nearest; doubtful: faces that are nearer to one
    outside than to those inside on average; nearest: the largest similarity to a face outside.
    """

    faces: np.ndarray
    inside: np.ndarray
    within: np.ndarray
    outside: np.ndarray
    between: np.ndarray
    doubtful: np.ndarray
    nearest: np.ndarray

    @classmethod
    def none(cls, clusters: int) -> Doubts:
        counts, sums = (lambda: np.zeros(clusters, np.int64)), (lambda: np.zeros(clusters))
        return cls(counts(), counts(), sums(), counts(), sums(), counts(), np.full(clusters, -1.0))

    def add(self, clusters: np.ndarray, other: Doubts) -> None:
        """Add sums of the clusters int64[...], each named once."""
        for name in ("faces", "inside", "within", "outside", "between", "doubtful"):
            getattr(self, name)[clusters] += getattr(other, name)
        self.nearest[clusters] = np.maximum(self.nearest[clusters], other.nearest)


def doubts(
    offsets: np.ndarray, rows: np.ndarray, similarities: np.ndarray, first_row: int, cluster: np.ndarray
) -> tuple[np.ndarray, Doubts]:
    """(clusters int64[c], their sums) of one part of the neighbor table.

    offsets: int64[r + 1]; rows: int32[m]; similarities: float32[m]; first_row: of the part; cluster: int64[N], of every row. A
    face without a neighbor inside is not doubtful: there is nothing to compare.
    """
    here = cluster[first_row : first_row + len(offsets) - 1]
    known, number = np.unique(here, return_inverse=True)
    found = Doubts.none(len(known))
    _sum_doubts(
        offsets, rows, similarities, first_row, cluster, number,
        found.faces, found.inside, found.within, found.outside, found.between, found.doubtful, found.nearest,
    )  # fmt: skip
    return known, found


@numba.njit(cache=True, nogil=True)
def _sum_doubts(
    offsets: np.ndarray, rows: np.ndarray, similarities: np.ndarray, first_row: int, cluster: np.ndarray, number: np.ndarray,
    faces: np.ndarray, inside: np.ndarray, within: np.ndarray, outside: np.ndarray, between: np.ndarray, doubtful: np.ndarray,
    nearest: np.ndarray,
) -> None:  # fmt: skip
    for i in range(len(number)):
        mine, at = cluster[first_row + i], number[i]
        count, total, best = 0, 0.0, -2.0
        for e in range(offsets[i], offsets[i + 1]):
            if cluster[rows[e]] == mine:
                count += 1
                total += similarities[e]
            else:
                best = max(best, np.float64(similarities[e]))
        faces[at] += 1
        if count:
            inside[at] += 1
            within[at] += total / count
        if best > -2:
            outside[at] += 1
            between[at] += best
            nearest[at] = max(nearest[at], best)
            doubtful[at] += count > 0 and best > total / count


def size_histogram(sizes: np.ndarray) -> dict[str, int]:
    """How many clusters there are of each size: 1, 2, 3-4, 5-8, … (only those that occur)."""
    band = np.ceil(np.log2(sizes)).astype(int) if len(sizes) else np.empty(0, int)
    counts = np.bincount(band)
    return {(str(2**b) if b < 2 else f"{2 ** (b - 1) + 1}-{2**b}"): int(count) for b, count in enumerate(counts) if count}
