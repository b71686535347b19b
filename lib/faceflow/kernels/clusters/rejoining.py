"""Parts of one cluster that the cap on neighbors cut apart: a test of two modules by the faces between their means.

A face keeps its k nearest neighbors. Of a person with many more photos the graph then shows only near ones, and the map
equation cuts it into parts, although all its photos are alike. Two parts of one cloud of faces pass into each other; two
people, however alike, have a gap between them."""

from __future__ import annotations

import numpy as np

HALF_WIDTH = 0.5
"""Of the windows in which faces are counted, about the two means (at -1 and 1) and halfway between them (at 0)."""

LEAST_DENSITY = 0.6
"""Faces halfway between two means, in parts of those about the mean with fewer, from which there is no gap. Two normal laws
have .6 where their deviation is .57 of half the distance of their means, a uniform law 1, the halves of a normal law 1.35. In
trials 2,000 pairs of look-alikes had .41 at most, parts of one person with changing age or pose mostly .6 to 1.2."""

SAMPLE = 256
"""Faces of a module that are looked at, at most."""

FEWEST = 8
"""Faces of a module of which a density can be estimated."""


def density_between(a: np.ndarray, b: np.ndarray) -> float:
    """How many faces lie halfway between the means of two modules, in parts of those about the mean with fewer of them.

    a: float32[n, d], b: float32[m, d], unit rows, n, m >= 2. Each face x is projected onto the line through the two means, its
    own left out of the mean of its module, as it would draw that towards itself: t(x) = (2 <x, A - B> - |A|^2 + |B|^2) / |A -
    B|^2 is 1 at A and -1 at B, the squares without the products of faces with themselves. Both modules weigh the same. inf
    where the means cannot be told apart, as faces deviate from them by half their distance or more: two normal laws are then
    one hill.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    n, m = len(a), len(b)
    sum_a, sum_b = a.sum(axis=0), b.sum(axis=0)
    own_a, own_b = (a * a).sum(axis=1), (b * b).sum(axis=1)
    aa = (sum_a @ sum_a - own_a.sum()) / (n * (n - 1))
    bb = (sum_b @ sum_b - own_b.sum()) / (m * (m - 1))
    distance = aa + bb - 2 * (sum_a @ sum_b) / (n * m)
    if distance <= 0:
        return float("inf")
    of_a = (a @ sum_a - own_a) / (n - 1) - a @ sum_b / m
    of_b = b @ sum_a / n - (b @ sum_b - own_b) / (m - 1)
    t = (2 * np.concatenate([of_a, of_b]) - aa + bb) / distance
    if (t[:n].var() + t[n:].var()) / 2 >= 1:
        return float("inf")
    weight = np.repeat([1 / n, 1 / m], [n, m])
    between, at_a, at_b = (float(weight[np.abs(t - center) < HALF_WIDTH].sum()) for center in (0, 1, -1))
    return between / max(min(at_a, at_b), 1e-9)


def join(pairs: np.ndarray, densities: np.ndarray, count: int) -> np.ndarray:
    """int64[count]: for each module the smallest number of those that it is one cluster with, by a chain of pairs without a
    gap.

    pairs: int64[p, 2]; densities: float[p], `density_between` of each.
    """
    up = np.arange(count)
    for a, b in pairs[densities >= LEAST_DENSITY].tolist():
        while up[a] != a:
            up[a] = a = int(up[up[a]])
        while up[b] != b:
            up[b] = b = int(up[up[b]])
        up[max(a, b)] = min(a, b)
    while not np.array_equal(up, up[up]):
        up = up[up]
    return up
