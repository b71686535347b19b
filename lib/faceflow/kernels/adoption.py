"""Faces that no edge binds to anybody, and the people whose poor photos they may be: a test of one margin each.

A poor photo is unlike every single photo of its person, yet nearer to their mean than to the mean of anybody else. A stranger
is nearest to somebody too, but only by chance: the largest similarities of a face to many people it does not belong to are
spaced as the top of a sample is."""

from __future__ import annotations

import numba
import numpy as np

SPACINGS = 16
"""Spacings below the largest one, from which a face's own scale is taken: those of a poor photo are smaller."""

RATE = 0.05
"""Share of strangers among the faces that are adopted, at most, as expected."""

LARGEST_P = 0.25
"""However few strangers there are: a face that a stranger would look like one time in four stays alone."""


@numba.njit(cache=True, nogil=True)
def add_members(sums: np.ndarray, counts: np.ndarray, vectors: np.ndarray, owner: np.ndarray, most: int) -> None:
    """Add the vectors float32[n, d] to the sums float64[h, d] of their owners int64[n] (-1: nobody), the first `most` of each;
    counts int64[h] says how many each has by now."""
    for i in range(len(owner)):
        h = owner[i]
        if h >= 0 and counts[h] < most:
            counts[h] += 1
            for j in range(vectors.shape[1]):
                sums[h, j] += vectors[i, j]


def margins(faces: np.ndarray, people: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(nearest person int64[n], p-value float64[n]) of each face, under the hypothesis that it is a stranger to all.

    faces: float32[n, d]; people: float32[h, d], unit rows, h >= SPACINGS + 2. Let x_1 >= x_2 >= … be a face's similarities. For
    strangers the normalised spacings j (x_j - x_{j+1}) are independent and exponential of one scale (Rényi, On the theory of
    order statistics, 1953; exactly so for an exponential tail), so that (x_1 - x_2) over the mean of the next SPACINGS = m of
    them exceeds t with probability (1 + t / m)^-m.
    """
    similarities = faces @ people.T
    top = np.argpartition(-similarities, SPACINGS + 1, axis=1)[:, : SPACINGS + 2]
    values = np.take_along_axis(similarities, top, axis=1)
    order = np.lexsort((top, -values), axis=1)
    values = np.take_along_axis(values, order, axis=1).astype(np.float64)
    gaps = values[:, :-1] - values[:, 1:]
    scale = (gaps[:, 1:] * np.arange(2, SPACINGS + 2)).mean(axis=1)
    t = gaps[:, 0] / np.maximum(scale, 1e-9)
    return np.take_along_axis(top, order[:, :1], axis=1)[:, 0].astype(np.int64), (1 + t / SPACINGS) ** -SPACINGS


def accepted(p: np.ndarray, rate: float = RATE) -> np.ndarray:
    """bool[n]: the largest set of smallest p-values of which a share `rate` at most is expected to be strangers.

    Benjamini and Hochberg's step-up procedure, with the share of strangers among all estimated from the p-values above one half
    (Storey, A direct approach to false discovery rates, JRSS B 64, 2002).
    """
    n = len(p)
    if n == 0:
        return np.zeros(0, bool)
    strangers = min(1.0, (1 + int((p > 0.5).sum())) / (0.5 * n))
    ranked = np.sort(p)
    passed = np.flatnonzero(ranked * n * strangers <= rate * np.arange(1, n + 1))
    return p <= min(LARGEST_P, ranked[passed[-1]]) if len(passed) else np.zeros(n, bool)
