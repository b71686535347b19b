"""Stability under resampled edges: certain where there is no doubt, low where there is, and its arithmetic by brute force."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from faceflow.kernels.clusters.stability import best_jaccard, stability


def graph(links: list[tuple[int, int, float]], n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    both = sorted([*links, *((b, a, w) for a, b, w in links)])
    offsets = np.searchsorted([a for a, _, _ in both], np.arange(n + 1))
    return offsets, np.array([b for _, b, _ in both], np.int32), np.array([w for _, _, w in both], np.float32)


def clique(first: int, size: int, weight: float = 1.0) -> list[tuple[int, int, float]]:
    return [(i, j, weight) for i in range(first, first + size) for j in range(i + 1, first + size)]


def test_cliques_come_back_and_what_hangs_by_a_thread_does_not() -> None:
    # Two cliques apart; two that were put into one cluster; and two halves of one clique that were put into two.
    links = [*clique(0, 12), *clique(12, 12), *clique(24, 10), *clique(34, 10), *clique(44, 20)]
    clusters = np.repeat([0, 1, 2, 3, 4], [12, 12, 20, 10, 10])
    results = stability(*graph(links, 64), clusters, 5, 0)
    np.testing.assert_allclose(results, [1, 1, 0.5, 0.5, 0.5], atol=0.05)
    np.testing.assert_array_equal(results, stability(*graph(links, 64), clusters, 5, 0))


def test_a_chain_is_less_stable_than_a_clique() -> None:
    links = [*clique(0, 16), *((i, i + 1, 1.0) for i in range(16, 31))]
    results = stability(*graph(links, 32), np.repeat([0, 1], 16), 8, 0)
    assert results[0] == 1
    assert results[1] < 0.7


@given(seed=st.integers(0, 10_000), n=st.integers(0, 40), a=st.integers(1, 8), b=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_best_jaccard_by_brute_force(seed: int, n: int, a: int, b: int) -> None:
    rng = np.random.default_rng(seed)
    clusters, modules = (np.unique(rng.integers(0, k, n), return_inverse=True)[1] for k in (a, b))
    sets = [[set(np.flatnonzero(labels == k)) for k in range(labels.max(initial=-1) + 1)] for labels in (clusters, modules)]
    expected = [max(len(one & other) / len(one | other) for other in sets[1]) for one in sets[0]]
    np.testing.assert_allclose(best_jaccard(clusters, modules), expected)
