"""How well clusters come back when the edges are drawn again: the bootstrap of a graph's modules."""

from __future__ import annotations

import numpy as np

from faceflow.kernels.mapequation import two_level as mapequation


def stability(
    offsets: np.ndarray,
    rows: np.ndarray,
    weights: np.ndarray,
    clusters: np.ndarray,
    trials: int,
    seed: int,
    directed: bool = True,
) -> np.ndarray:
    """Mean Jaccard similarity of each cluster to the module that resembles it most, over resampled graphs; float64[c], in 0..1.

    offsets: int64[n + 1]; rows: int32[m]; weights: float32[m]; clusters: int64[n], numbers 0 … c - 1 all of which occur. A
    trial draws as many edges as there are, each time any of them (an edge's multiplicity is a Poisson number of mean 1), and
    detects modules again, from another seed.
    References: Hennig, Cluster-wise assessment of cluster stability, Computational Statistics & Data Analysis 52 (2007);
    Rosvall and Bergstrom, Mapping change in large networks, PLoS ONE 5 (2010).
    """
    total = np.zeros(int(clusters.max(initial=-1)) + 1)
    for trial in range(trials):
        rng = np.random.default_rng([seed, 6, trial])
        times = rng.poisson(1.0, len(rows)).astype(np.float32)
        drawn = times > 0
        kept = np.concatenate([[0], np.cumsum(drawn)])[offsets]
        graph = kept, rows[drawn], weights[drawn] * times[drawn]
        # Once begun is enough: with the best of several starts the stability of LFW's clusters is the same to .001.
        results = mapequation.detect([graph], seed + trial + 1, directed=directed, starts=1)
        total += best_jaccard(clusters, results.modules)
    return total / max(1, trials)


def best_jaccard(clusters: np.ndarray, modules: np.ndarray) -> np.ndarray:
    """Largest Jaccard similarity of each cluster to any module; both int64[n], numbers 0 … that all occur. float64[c]."""
    if len(clusters) == 0:
        return np.empty(0)
    size, other = np.bincount(clusters), np.bincount(modules)
    pairs, shared = np.unique(clusters * len(other) + modules, return_counts=True)
    mine, theirs = pairs // len(other), pairs % len(other)
    best = np.zeros(len(size))
    np.maximum.at(best, mine, shared / (size[mine] + other[theirs] - shared))
    return best
