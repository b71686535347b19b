"""Edge recall of a neighbor table, estimated from a sample of faces that were searched exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from faceflow.kernels.knn import topk
from faceflow.kernels.knn.tile_kernel import TileKernel
from faceflow.kernels.knn.topk import Buffers

TIE = 2e-6
"""Two similarities closer than this are tied: float32 products of one pair differ by that much between tile shapes."""

BANDS = 10
"""Bands of similarity by which a recall estimate is broken down."""

Z = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True)
class RecallEstimate:
    """Share of the true edges of a sample of faces that the neighbor table holds, with a 95 % interval.

    estimate, low, high: in 0..1; faces: sampled; edges: their true neighbors above the threshold and within k.
    """

    estimate: float
    low: float
    high: float
    faces: int
    edges: int


def sample_rows(faces: int, size: int, seed: int) -> np.ndarray:
    """A seeded uniform sample without repeats of the rows 0..faces-1, ascending int64; no training sample is reused."""
    rng = np.random.default_rng([seed, 4])
    return np.sort(rng.choice(faces, size=min(size, faces), replace=False))


def sample_new(new: range, share: float, seed: int, number: int) -> np.ndarray:
    """A seeded uniform sample without repeats of these rows, ascending int64: `share` of them, a broken one by chance."""
    rng = np.random.default_rng([seed, 4, number])
    size = min(len(new), int(len(new) * share + rng.random()))
    return new.start + np.sort(rng.choice(len(new), size=size, replace=False))


def carry_truth(
    truth: tuple[np.ndarray, np.ndarray, np.ndarray], now: np.ndarray, drawn: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The sampled faces of the base run that were kept, and those drawn now: (rows int64[n], ascending, known bool[n],
    offsets int64[n + 1], keys uint64[...]).

    truth: (rows, offsets, keys) of the base run, each face's k + 1 best; now: int[N], this run's row of every base row, -1 for
    those that are gone; drawn: rows of this run. A face is known whose list still holds its best among the base run's faces:
    one that is not full, or has lost no neighbor. Others, and those drawn, have none.
    """
    before, offsets, keys = truth
    similarities, neighbors = topk.decode(keys)
    owner = np.repeat(np.arange(len(before)), np.diff(offsets))
    target = now[neighbors] >= 0
    lost = np.bincount(owner, weights=~target, minlength=len(before)) > 0
    known = (now[before] >= 0) & ~(lost & (np.diff(offsets) > k))
    kept = target & known[owner]
    stay = np.flatnonzero(now[before] >= 0)
    rows = np.sort(np.concatenate([now[before[stay]].astype(np.int64), drawn]))
    places = np.searchsorted(rows, now[before[stay]])
    ends = np.concatenate([[0], np.cumsum(np.bincount(owner[kept], minlength=len(before))[stay])])
    carried = places, ends, topk.encode(similarities[kept], now[neighbors[kept]])
    offsets, neighbors, similarities = topk.merge([carried], len(rows), k + 1)
    flags = np.zeros(len(rows), bool)
    flags[places] = known[stay]
    return rows, flags, offsets, topk.encode(similarities, neighbors)


def search_part(
    queries: np.ndarray, query_rows: np.ndarray, members: np.ndarray, first_row: int, k: int, threshold: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Each query's k + 1 best among one part's rows, the query itself possibly among them: (offsets, keys).

    queries: float32[q, d]; query_rows: int32[q]; members: float32[m, d], whose rows start at first_row; all unit rows.
    """
    q, m = len(queries), len(members)
    buffers = Buffers.empty(q + m, k + 1, threshold)
    buffers.thresholds[q:] = np.inf  # members collect nothing
    rows = np.concatenate([query_rows, np.arange(first_row, first_row + m)]).astype(np.int32)
    TileKernel(queries, rows, buffers).between(np.arange(q), np.arange(q, q + m), members)
    return buffers.take(np.arange(q))


def check(
    truth: tuple[np.ndarray, np.ndarray], results: tuple[np.ndarray, np.ndarray], k: int, threshold: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """(similarities float32[n] of the true neighbors of one face, which of them are found bool[n]).

    truth: (rows, similarities) of its k nearest above the threshold by exact search; found: the same from the table. A
    neighbor tied with the threshold, or with the last of a full table, is not counted missing: either choice is right.
    """
    rows, similarities = truth
    if threshold is not None:
        clear = similarities >= np.float32(threshold) + TIE
        rows, similarities = rows[clear], similarities[clear]
    hit = np.isin(rows, results[0])
    if len(results[0]) >= k:
        hit |= similarities <= results[1].min() + TIE
    return similarities, hit


def add_bands(bands: np.ndarray, similarities: np.ndarray, hit: np.ndarray, threshold: float | None) -> None:
    """Add one face's true neighbors, and those found (`check`), to bands int64[2, b] of equal width from the threshold (none:
    -1) to a similarity of 1."""
    low = threshold if threshold is not None else -1.0
    width = max(1e-6, 1 - low) / bands.shape[1]
    band = ((similarities - low) / width).astype(np.int64).clip(0, bands.shape[1] - 1)
    for row, chosen in zip(bands, (band, band[hit]), strict=True):
        row += np.bincount(chosen, minlength=len(row))


def estimate(true: np.ndarray, results: np.ndarray) -> RecallEstimate:
    """The recall estimate from counts per sampled face, int64[n] each.

    A Wilson interval at the effective number of edges: edges of one face are missed together, so the variance is taken
    between faces (ratio estimator, Cochran, Sampling Techniques, 1977, ch. 6); where nothing is missed that variance is
    zero and the number of faces with an edge stands in. Without any true edge the recall is 1, by convention.
    """
    edges, faces = int(true.sum()), len(true)
    if edges == 0:
        return RecallEstimate(1.0, 0.0, 1.0, faces, 0)
    p = int(results.sum()) / edges
    effective = float((true > 0).sum())
    if p < 1 and faces > 1:
        variance = float(((results - p * true) ** 2).sum()) / edges**2 * faces / (faces - 1)
        effective = min(float(edges), p * (1 - p) / variance) if variance > 0 else effective
    center = (p + Z**2 / (2 * effective)) / (1 + Z**2 / effective)
    half = Z / (1 + Z**2 / effective) * np.sqrt(p * (1 - p) / effective + Z**2 / (4 * effective**2))
    return RecallEstimate(p, float(max(0.0, min(p, center - half))), float(min(1.0, max(p, center + half))), faces, edges)
