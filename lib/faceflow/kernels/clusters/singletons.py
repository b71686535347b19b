"""Faces that no edge binds to anybody, and the people whose poor photos they may be: a test of one margin each.

A poor photo is unlike every single photo of its person, yet nearer to their mean than to the mean of anybody else. A stranger
is nearest to some cluster too, but only by chance: the largest similarities of a face to many people it does not belong to are
spaced as the top of a sample is."""

from __future__ import annotations

import numba
import numpy as np

from faceflow.kernels.compiled import kernel

SPACINGS = 16
"""Spacings below the largest one, from which a face's own scale is taken: those of a poor photo are smaller."""

RATE = 0.05
"""Share of strangers among the faces that are assigned, at most, as expected."""

LARGEST_P = 0.25
"""However few strangers there are: a face that a stranger would look like one time in four stays alone."""

PEOPLE_BLOCK = 2_048
"""People compared with at once: with 1,024 faces, a product of 8 MB."""

CHUNKS = 8
"""Ranges of people whose members are summed side by side."""

GLANCE = 64
"""Similarities looked at together."""


@kernel(parallel=True)
def add_members(sums: np.ndarray, counts: np.ndarray, vectors: np.ndarray, owner: np.ndarray, most: int) -> None:
    """Add the vectors float32[n, d] to the sums float64[h, d] of their owners int64[n] (-1: none), the first `most` of each;
    counts int64[h] says how many each has by now."""
    per_chunk = len(counts) // CHUNKS + 1
    for c in numba.prange(CHUNKS):  # each adds to its own owners, in the order of the rows
        for i in range(len(owner)):
            h = owner[i]
            if h >= c * per_chunk and h < (c + 1) * per_chunk and counts[h] < most:
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
    values, top = nearest(faces, people, SPACINGS + 2)
    gaps = -np.diff(values.astype(np.float64), axis=1)
    scale = (gaps[:, 1:] * np.arange(2, SPACINGS + 2)).mean(axis=1)
    t = gaps[:, 0] / np.maximum(scale, 1e-9)
    return top[:, 0], (1 + t / SPACINGS) ** -SPACINGS


def nearest(faces: np.ndarray, people: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(similarities float32[n, k], falling; whose, int64[n, k]) of each face's k nearest people; of equal ones the first."""
    values, top = np.full((len(faces), k), -np.inf, np.float32), np.zeros((len(faces), k), np.int64)
    product = np.empty((len(faces), min(PEOPLE_BLOCK, len(people))), np.float32)
    for begin in range(0, len(people), PEOPLE_BLOCK):
        block = people[begin : begin + PEOPLE_BLOCK]
        selected = product if len(block) == product.shape[1] else np.empty((len(faces), len(block)), np.float32)
        np.matmul(faces, block.T, out=selected)
        _keep_nearest(selected, begin, values, top)
    return values, top


@kernel(allocates=False)
def _keep_nearest(product: np.ndarray, begin: int, values: np.ndarray, top: np.ndarray) -> None:
    k = values.shape[1]
    for i in range(product.shape[0]):
        least = values[i, k - 1]
        for first in range(0, product.shape[1], GLANCE):
            last = min(first + GLANCE, product.shape[1])
            nearer = 0
            for j in range(first, last):  # hardly ever any: vectors of the processor see to it
                nearer += product[i, j] > least
            if nearer == 0:
                continue
            for j in range(first, last):
                s = product[i, j]
                if s > least:
                    at = k - 1
                    while at > 0 and values[i, at - 1] < s:
                        values[i, at], top[i, at] = values[i, at - 1], top[i, at - 1]
                        at -= 1
                    values[i, at], top[i, at] = s, begin + j
                    least = values[i, k - 1]


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
