"""Faces of a sample that would count too often: near-identical ones count once, and no person's pairs drown all others'.

A histogram over pairs (`kernels.threshold.valley`) is one of people only as long as no group has most of them: n faces of one
make n^2 pairs. Six thousand copies of one photo are eighteen million pairs at cosine 1, and a person of three thousand photos
has more pairs than all others of a library of twenty thousand together."""

from __future__ import annotations

import numpy as np

from faceflow.kernels.compiled import kernel
from faceflow.kernels.knn.tile_kernel import QUERY_BLOCK
from faceflow.kernels.threshold.valley import BINS, Thresholds, chance_level, choose_thresholds, count_pairs, impostor_hill

PILOT_FACES = 2_048
"""Faces whose pairs tell where chance reaches to."""

NEAR_SHARE = 0.2
"""Two faces are near-identical from this share of the way from 1 down to the level that chance reaches: cosine .89 for LFW by a
MobileFaceNet, .994 by dlib's ResNet, .995 in 16 dimensions. Frames of one film are (.92 in a trial). LFW, CelebA and
look-alikes cluster with the same F (within .001) for shares of .1 to .3."""

CROWD = 30.0
"""Neighbors that a sampled face may have before its pairs weigh less. On LFW, its variants and CelebA F is the same within .003
for 10, 30 and 100; beside a person of 3,000 photos, or people in films, the threshold is that of the others for all three."""

CROWD_SAMPLE = 4_096
"""Faces among which neighbors are counted for that."""


def near_identical(vectors: np.ndarray, faces: int) -> float:
    """Cosine from which two of `faces` faces are near-identical, from a sample of them, float32[n, d], unit rows."""
    rows = np.unique(np.linspace(0, max(0, len(vectors) - 1), PILOT_FACES).astype(int))
    pilot = np.unique(vectors[rows], axis=0)  # else copies would be most of it
    order = np.arange(len(pilot))
    hill = impostor_hill(count_pairs(pilot, order, pilot, order)) if len(pilot) > 1 else None
    return 1.0 if hill is None else round(1 - NEAR_SHARE * (1 - chance_level(*hill, faces)), 6)


def count_and_mark(
    queries: np.ndarray, query_rows: np.ndarray, members: np.ndarray, member_rows: np.ndarray, near: float
) -> tuple[np.ndarray, np.ndarray]:
    """(histogram as `impostors.count_pairs`, bool[q]: which queries are near-identical to a member of a lower row)."""
    histogram, repeated = np.zeros(BINS, np.int64), np.zeros(len(queries), bool)
    for begin in range(0, len(members), QUERY_BLOCK):
        block = slice(begin, begin + QUERY_BLOCK)
        _count_and_mark(members[block] @ queries.T, member_rows[block], query_rows, np.float32(near), histogram, repeated)
    return histogram, repeated


@kernel
def _count_and_mark(
    product: np.ndarray, rows: np.ndarray, columns: np.ndarray, near: np.float32, histogram: np.ndarray, repeated: np.ndarray
) -> None:
    half = np.float32(BINS / 2)
    for i in range(product.shape[0]):
        for j in range(product.shape[1]):
            if columns[j] > rows[i]:
                s = product[i, j]
                histogram[min(BINS - 1, max(0, int((s + np.float32(1)) * half)))] += 1
                if s >= near:
                    repeated[j] = True


def neighbors_at(faces: np.ndarray, others: np.ndarray, threshold: float) -> np.ndarray:
    """int64[n]: how many of `others` have a cosine of `threshold` or more with each face, itself included where it is there."""
    results = np.zeros(len(faces), np.int64)
    for begin in range(0, len(faces), QUERY_BLOCK):
        block = slice(begin, begin + QUERY_BLOCK)
        results[block] = (faces[block] @ others.T >= np.float32(threshold)).sum(axis=1)
    return results


def weights(neighbors: np.ndarray) -> np.ndarray:
    """float32[n]: what each face's pairs weigh, from how many neighbors it has in the sample: those of a face with many weigh
    as much together as CROWD."""
    return np.minimum(1.0, CROWD / np.maximum(neighbors, 1)).astype(np.float32)


def count_weighted(
    queries: np.ndarray, query_rows: np.ndarray, query_weights: np.ndarray,
    members: np.ndarray, member_rows: np.ndarray, member_weights: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Histogram float64[BINS] as `impostors.count_pairs`, each pair with the product of its two weights, float32[...]."""
    histogram = np.zeros(BINS)
    for begin in range(0, len(members), QUERY_BLOCK):
        block = slice(begin, begin + QUERY_BLOCK)
        product = members[block] @ queries.T
        _count_weighted(product, member_rows[block], query_rows, member_weights[block], query_weights, histogram)
    return histogram


@kernel
def _count_weighted(
    product: np.ndarray, rows: np.ndarray, columns: np.ndarray, row_weights: np.ndarray, column_weights: np.ndarray,
    histogram: np.ndarray,
) -> None:  # fmt: skip
    half = np.float32(BINS / 2)
    for i in range(product.shape[0]):
        weight = np.float64(row_weights[i])
        for j in range(product.shape[1]):
            if columns[j] > rows[i]:
                histogram[min(BINS - 1, max(0, int((product[i, j] + np.float32(1)) * half)))] += weight * column_weights[j]


def choose(plain: np.ndarray, weighted: np.ndarray | None, faces: int) -> tuple[Thresholds, np.ndarray]:
    """(thresholds, the histogram that they come from): the weighted pairs' where these have a valley, else the plain pairs'.

    plain: int64[BINS]; weighted: float64[BINS], None where no face has neighbors enough.
    """
    if weighted is not None:
        rounded = np.rint(weighted).astype(np.int64)
        results = choose_thresholds(rounded, faces)
        if results.valley is not None:
            return results, rounded
    return choose_thresholds(plain, faces), plain
