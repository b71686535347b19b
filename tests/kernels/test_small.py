"""Vectors, edges, identity, metrics, the infomap engine and synthetic faces against small oracles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from faceflow.kernels.clusters import cluster_ids
from faceflow.kernels.clusters import scores as metrics
from faceflow.kernels.graph import edge_recipes
from faceflow.kernels.knn import incremental_search, vectors
from faceflow.kernels.mapequation import infomap_package
from faceflow.tables import EdgeList, NeighborTable
from faceflow.tools.datasets import synthetic_faces


def test_normalize_rows() -> None:
    x = np.array([[3, 4], [0, 0], [np.nan, 1], [np.inf, 1], [1e-30, 0], [3e37, 4e37]], np.float32)
    verdict = vectors.normalize_rows(x)
    assert verdict.tolist() == [vectors.FINE, vectors.ZERO, vectors.NOT_FINITE, vectors.NOT_FINITE, vectors.FINE, vectors.FINE]
    np.testing.assert_allclose(x[[0, 4, 5]], [[0.6, 0.8], [1, 0], [0.6, 0.8]], rtol=1e-6)
    big = np.array([[3e200, 4e200]])
    assert vectors.normalize_rows(big).tolist() == [vectors.FINE]
    np.testing.assert_allclose(big, [[0.6, 0.8]])


def test_threshold_recipe() -> None:
    table = NeighborTable(
        10, np.array([0, 3, 3, 5]), np.array([11, 12, 9, 10, 11], np.int32), np.array([0.9, 0.6, 0.5, 0.7, -0.1], np.float32)
    )
    got = edge_recipes.threshold(table, 2, 0.6)
    assert got.offsets.tolist() == [0, 2, 2, 3]
    assert [(int(a), int(b), round(float(w), 3)) for a, b, w in zip(got.sources(), got.rows, got.values, strict=True)] == [
        (10, 11, 0.9),
        (10, 12, 0.6),
        (12, 10, 0.7),
    ]
    assert len(edge_recipes.threshold(table, 9, None).rows) == 4  # a negative cosine never becomes an edge


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60))
def test_canonical_order(modules: list[int]) -> None:
    m = np.array(modules)
    lookup, sizes = cluster_ids.canonical_order(m)
    clusters = lookup[m]
    assert sorted(set(clusters)) == list(range(len(sizes)))
    np.testing.assert_array_equal(np.bincount(clusters), sizes)
    first = [int(np.flatnonzero(clusters == c)[0]) for c in range(len(sizes))]
    assert sorted(range(len(sizes)), key=lambda c: (-sizes[c], first[c])) == list(range(len(sizes)))
    for a, b in itertools.combinations(range(len(m)), 2):
        assert (m[a] == m[b]) == (clusters[a] == clusters[b])


def dense(values: list[int]) -> np.ndarray:
    return np.unique(np.array(values), return_inverse=True)[1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=40))
def test_scores_against_scikit_learn_and_definitions(pairs: list[tuple[int, int]]) -> None:
    c, t = dense([p[0] for p in pairs]), dense([p[1] for p in pairs])
    s = metrics.score(c, t)
    assert s.nmi == pytest.approx(sk.normalized_mutual_info_score(t, c), abs=1e-9)
    assert s.ari == pytest.approx(sk.adjusted_rand_score(t, c), abs=1e-12)
    (_, fp), (fn, tp) = sk.pair_confusion_matrix(t, c)
    assert s.pairwise_precision == pytest.approx(tp / (tp + fp) if tp + fp else 1.0)
    assert s.pairwise_recall == pytest.approx(tp / (tp + fn) if tp + fn else 1.0)
    same = (c[:, None] == c) & (t[:, None] == t)
    assert s.bcubed_precision == pytest.approx((same.sum(1) / (c[:, None] == c).sum(1)).mean())
    assert s.bcubed_recall == pytest.approx((same.sum(1) / (t[:, None] == t).sum(1)).mean())
    assert (s.faces, s.clusters, s.identities) == (len(c), c.max() + 1, t.max() + 1)
    assert s.singletons == (np.bincount(c) == 1).sum()


def test_scores_are_exact_where_pair_counts_pass_float_precision() -> None:
    """One pair wrong among 10^13: a float would round it away."""
    n = 5_000_000
    clusters, identities = np.zeros(n, np.int64), np.zeros(n, np.int64)
    identities[-1] = clusters[-1] = 1
    identities[-2] = 2
    s = metrics.score(clusters, identities)
    real, claimed = (n - 2) * (n - 3) // 2, (n - 1) * (n - 2) // 2
    assert s.pairwise_recall == 1
    assert s.pairwise_precision == real / claimed < 1


def table_of(links: list[tuple[int, int, float]], n: int) -> EdgeList:
    links = sorted(links)
    counts = np.bincount([a for a, _, _ in links], minlength=n)
    return EdgeList(
        0, np.concatenate([[0], np.cumsum(counts)]), np.array([b for _, b, _ in links], np.int32),
        np.array([w for *_, w in links], np.float32),
    )  # fmt: skip


def test_infomap_engine_two_cliques_and_rows_alone() -> None:
    cliques = [(a, b, 1.0) for group in (range(4), range(5, 9)) for a in group for b in group if a != b]
    results = infomap_package.detect([table_of([*cliques, (0, 5, 0.1)], 11)], 11, seed=0)
    m = results.modules
    assert len(set(m[:4])) == len(set(m[5:9])) == 1
    assert m[0] != m[5]
    assert len({m[4], m[9], m[10], m[0], m[5]}) == 5
    again = infomap_package.detect([table_of([*cliques, (0, 5, 0.1)], 11)], 11, seed=0)
    np.testing.assert_array_equal(m, again.modules)


def test_infomap_engine_without_edges() -> None:
    results = infomap_package.detect([table_of([], 3)], 3, seed=0)
    assert len(set(results.modules)) == 3
    assert results.codelength == 0


def test_synthetic_faces_are_seeded_and_cluster() -> None:
    rng = np.random.default_rng(0)
    sizes = synthetic_faces.draw_sizes(5000, 20, rng)
    assert sizes.sum() == 5000
    assert sizes.min() >= 1
    assert sizes.mean() == pytest.approx(20, rel=0.2)
    world = synthetic_faces.make_world(sizes, 64, 1)
    a, b = synthetic_faces.make_faces(world, 0, 3000), synthetic_faces.make_faces(world, 0, 3000)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)
    s = a @ a.T
    same = world.labels[:3000, None] == world.labels[:3000]
    np.fill_diagonal(same, False)
    assert s[same].mean() > 0.6
    assert abs(s[~same].mean()) < 0.05


def test_sizes_like_a_distribution() -> None:
    sizes = synthetic_faces.sizes_like(np.array([1, 10]), np.array([3, 1]), 10_000, np.random.default_rng(0))
    assert sizes.sum() == 10_000
    assert (sizes[:-1] == 1).mean() == pytest.approx(0.75, abs=0.03)


def test_rows_that_lead_to_a_marked_one() -> None:
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 5, 60))])
    rows = rng.integers(0, 100, offsets[-1]).astype(np.int32)
    marked = rng.random(100) < 0.2
    expected = [bool(marked[rows[a:b]].any()) for a, b in itertools.pairwise(offsets)]
    assert incremental_search.leads_to(offsets, rows, marked).tolist() == expected
    assert any(expected)
    assert not all(expected)
