"""Where pairs of one person begin: a threshold for the cosine similarity, found without labels from the similarities of many
pairs.

In a histogram over pairs of faces, pairs of different people (impostors) make a hill whose right flank falls, pairs of one
person another whose left flank rises; between them lies a valley. Both flanks are fitted there, which tells at each
similarity what share of the pairs are impostors. As the pairs are a uniform sample, that share is the one among the neighbors
of all faces, however many there are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from faceflow.kernels.compiled import kernel
from faceflow.kernels.knn.tile_kernel import QUERY_BLOCK

BINS = 32_768
"""Bins of a histogram over cosines from -1 to 1: enough where all cosines lie within a hundredth of each other."""

SHOWN_BINS = 1_024
"""Bins of a histogram that a plot shows: finer than its pixels."""

SMOOTHING, COARSE = 0.1, 0.25
"""Width of the smoothing kernel, in deviations of the impostors' hill; and while that is not known, of the narrowest hill."""

TENTH = 0.2513
"""Width of the densest tenth of a normal law, in deviations."""

HILL = 2.0
"""Deviations right of the impostors' median from which on the valley is looked for."""

LEFT_FLANK, RIGHT_SHARE = 1.5, 0.5
"""How far the flanks are fitted: on the left up to this factor of e over the valley, on the right no farther and at most so
much of the way to the top of the hill beyond."""

CERTAIN, LEAST_DEPTH = 3.0, 0.05
"""How many times its own error, and how much in factors of e, a valley's depth must be to count as one."""

CHANCE_NEIGHBORS = 1e-3
"""Without a valley: impostor neighbors a face that a normal law of the angles lets expect above the threshold."""

STRONG_SHARE, WEAK_SHARE = 0.1, 0.5
"""Share of impostors among the pairs at the two thresholds, by the fitted flanks. Impostors really fall faster than
exponentially: on three labeled sets the share is .03 to .05 where the fit says .1."""


@dataclass(frozen=True)
class Thresholds:
    """Cosine similarities from which faces are neighbors.

    strong: pairs above it are; weak: pairs above it are where shared neighbors bear witness (`edges.supported`); impostors:
    expected number of impostor neighbors of a face above `strong`, at most, by the fitted flank; valley: None where the
    similarities show none, so that the threshold comes from the impostors' hill alone; flank: (logarithm of the impostor pairs
    a bin at the valley, how much it falls per unit of cosine), as fitted (None where the valley is)."""

    strong: float
    weak: float
    impostors: float
    valley: float | None
    flank: tuple[float, float] | None = None


def count_pairs(queries: np.ndarray, query_rows: np.ndarray, members: np.ndarray, member_rows: np.ndarray) -> np.ndarray:
    """Histogram int64[BINS] of the cosines of all pairs (query, member) with the query's row above the member's.

    queries: float32[q, d]; members: float32[m, d]; unit rows; the rows' numbers beside them.
    """
    histogram = np.zeros(BINS, np.int64)
    for begin in range(0, len(members), QUERY_BLOCK):
        block = slice(begin, begin + QUERY_BLOCK)
        _count(members[block] @ queries.T, member_rows[block], query_rows, histogram)
    return histogram


@kernel
def _count(product: np.ndarray, rows: np.ndarray, columns: np.ndarray, histogram: np.ndarray) -> None:
    half = np.float32(BINS / 2)
    for i in range(product.shape[0]):
        for j in range(product.shape[1]):
            if columns[j] > rows[i]:
                histogram[min(BINS - 1, max(0, int((product[i, j] + np.float32(1)) * half)))] += 1


def choose_thresholds(histogram: np.ndarray, faces: int) -> Thresholds:
    """Thresholds for a set of `faces` faces, from the histogram (`count_pairs`) of a uniform sample of its pairs."""
    pairs = int(histogram.sum())
    centers = _centers()
    if pairs == 0:
        return Thresholds(1.0, 1.0, 0.0, None)
    coarse = _coarse_valley(histogram)
    middle, deviation = _hill(histogram[: coarse[0]] if coarse is not None else histogram, centers)
    # Again, smoothed as befits the hill that is now known.
    logs, window = _smooth(histogram, SMOOTHING * deviation * BINS / 2)
    start = min(BINS - 2, int(np.searchsorted(centers, middle + HILL * deviation)))
    results = _valley(logs, window, start) or coarse
    if results is None:
        return _without_valley(middle, deviation, faces)
    valley, peak = results
    start = min(start, valley)
    (fall, falls), (rise, rises) = _flanks(histogram, centers, logs, valley, peak, start)
    if falls + rises <= 0 or falls <= 0:
        return _without_valley(middle, deviation, faces)
    # Where the two flanks stand to each other as the share wants; between the hill and its top whatever the fit says.
    strong, weak = (
        float(np.clip(centers[valley] + (fall - rise - math.log(share / (1 - share))) / (falls + rises), low, centers[peak]))
        for share, low in ((STRONG_SHARE, centers[valley] - deviation), (WEAK_SHARE, centers[start]))
    )
    weak = min(weak, strong)
    beyond = math.exp(min(fall - falls * (strong - centers[valley]), 40.0)) / (falls * 2 / BINS)
    impostors = min(beyond, float(histogram[centers >= strong].sum())) / pairs * (faces - 1)
    flank = round(fall, 4), round(falls, 4)
    return Thresholds(round(strong, 6), round(weak, 6), float(f"{impostors:.3g}"), round(float(centers[valley]), 6), flank)


def impostor_hill(histogram: np.ndarray) -> tuple[float, float] | None:
    """(median, deviation to the left of it) of the pairs of different people; None where there is no pair."""
    if histogram.sum() == 0:
        return None
    coarse = _coarse_valley(histogram)
    return _hill(histogram[: coarse[0]] if coarse is not None else histogram, _centers())


def chance_level(middle: float, deviation: float, faces: int) -> float:
    """The cosine above which a face of `faces` has CHANCE_NEIGHBORS impostor neighbors, by a normal law of the angles of which
    `impostor_hill` gives median and deviation."""
    # Angles, as they cannot pass 0: an embedding whose cosines all lie near 1 would have its level above it.
    angle = math.acos(max(-1.0, min(1.0, middle)))
    spread = max(math.acos(max(-1.0, middle - deviation)) - angle, 1e-4)
    z = -NormalDist().inv_cdf(min(0.5, CHANCE_NEIGHBORS / max(1, faces - 1)))
    return round(math.cos(max(0.0, angle - z * spread)), 6)


def _centers() -> np.ndarray:
    return (np.arange(BINS) + 0.5) * 2 / BINS - 1


def _coarse_valley(histogram: np.ndarray) -> tuple[int, int] | None:
    return _valley(*_smooth(histogram, COARSE * _narrowest(histogram) * BINS / 2))


def coarser(histogram: np.ndarray) -> np.ndarray:
    """The histogram in SHOWN_BINS bins, for a plot."""
    return histogram.reshape(SHOWN_BINS, -1).sum(axis=1)


def _smooth(histogram: np.ndarray, width: float) -> tuple[np.ndarray, float]:
    """The logarithm of the histogram under a normal kernel of `width` bins (nothing counts as half a pair in the window), and
    how many bins the window is wide."""
    width = max(width, 0.5)
    reach = np.arange(-math.ceil(4 * width), math.ceil(4 * width) + 1)
    kernel = np.exp(-0.5 * (reach / width) ** 2)
    kernel /= kernel.sum()
    smooth = np.convolve(histogram, kernel)[len(reach) // 2 : len(reach) // 2 + BINS]
    window = 1 / float((kernel**2).sum())
    return np.log(np.maximum(smooth, 0) + 0.5 / window), window


def _narrowest(histogram: np.ndarray) -> float:
    """Deviation of a normal law whose densest tenth is as narrow as that of the histogram, whatever hills it has."""
    share = np.concatenate([[0.0], histogram.cumsum() / histogram.sum()])
    edges = np.linspace(-1, 1, BINS + 1)
    levels = np.linspace(0, 0.9, 181)
    lengths = np.interp(levels + 0.1, share, edges) - np.interp(levels, share, edges)
    return max(float(lengths.min()) / TENTH, 2 / BINS)


def _hill(histogram: np.ndarray, centers: np.ndarray) -> tuple[float, float]:
    """(median, deviation to the left of it) of these pairs."""
    share = histogram.cumsum() / histogram.sum()
    middle = float(np.interp(0.5, share, centers[: len(share)]))
    return middle, max(middle - float(np.interp(0.158655, share, centers[: len(share)])), 2 / BINS)


def _valley(logs: np.ndarray, window: float, start: int = 0) -> tuple[int, int] | None:
    """(bin of the first certain valley from `start` on, bin of the top of the hill beyond it), or None where none is certain.

    The deepest is found first; where there is another left of it, as when copies of one photo make a hill of their own near 1,
    that one parts different people.
    """
    results, end = None, len(logs)
    while end - start >= 3:
        tail = logs[start:end]
        before, after = np.maximum.accumulate(tail), np.maximum.accumulate(tail[::-1])[::-1]
        depth = np.minimum(before, after) - tail
        deepest = float(depth.max())
        at = np.flatnonzero(depth >= deepest - 1e-9)
        valley = start + int(at[len(at) // 2])  # amid an empty stretch
        peak = valley + int(np.argmax(logs[valley:end]))
        counts = np.exp(np.array([logs[valley], min(logs[peak], before.max())])) * window
        if deepest < max(LEAST_DEPTH, CERTAIN * float((1 / np.sqrt(counts + 0.5)).sum())):
            break
        results, end = (valley, peak), valley
    return results


def _flanks(
    histogram: np.ndarray, centers: np.ndarray, logs: np.ndarray, valley: int, peak: int, start: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """A falling and a rising exponential that together fit the bins about the valley: (logarithm of the impostor pairs a bin
    there, factors of e they fall by per unit of cosine), (the same of the others, which rise)."""
    low = valley
    while low > start and logs[low] < logs[valley] + LEFT_FLANK:
        low -= 1
    high = valley + max(2, min(int(RIGHT_SHARE * (peak - valley)), valley - low))
    unit = max(centers[valley] - centers[low], 2 / BINS)
    x = (centers[low : high + 1] - centers[valley]) / unit
    y = histogram[low : high + 1].astype(float)
    level = float(logs[valley]) - math.log(2)
    theta = np.array([level, -1.0, level, 1.0])
    design = np.stack([np.ones_like(x), x], axis=1)

    def likelihood(theta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        parts = np.exp(np.clip(design @ theta.reshape(2, 2).T, -40, 40))
        mean = parts.sum(axis=1)
        jacobian = np.concatenate([design * parts[:, :1], design * parts[:, 1:]], axis=1)
        return float((y * np.log(mean) - mean).sum()), jacobian, mean

    value, jacobian, mean = likelihood(theta)
    damping = 1e-3
    for _ in range(500):  # Fisher scoring, damped
        information = jacobian.T @ (jacobian / mean[:, None])
        move = np.linalg.solve(information + damping * np.diag(np.diag(information) + 1e-9), jacobian.T @ (y / mean - 1))
        new = theta + np.clip(move, -1, 1)
        results = likelihood(new)
        if results[0] < value:
            damping *= 4
            if damping > 1e9:
                break
            continue
        gained = results[0] - value
        theta, (value, jacobian, mean), damping = new, results, max(damping / 4, 1e-9)
        if gained < 1e-9 * max(1.0, abs(value)):
            break
    fall, rise = (theta[:2], theta[2:]) if theta[1] <= theta[3] else (theta[2:], theta[:2])
    return (float(fall[0]), float(-fall[1] / unit)), (float(rise[0]), float(rise[1] / unit))


def _without_valley(middle: float, deviation: float, faces: int) -> Thresholds:
    threshold = chance_level(middle, deviation, faces)
    return Thresholds(threshold, threshold, CHANCE_NEIGHBORS, None)
