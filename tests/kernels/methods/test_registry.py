"""Methods against brute force from their papers' formulas, and against the libraries on all pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceflow import config
from faceflow.errors import InputError, SettingsError
from faceflow.kernels.clusters.scores import score
from faceflow.kernels.graph.shared_neighbors import Block
from faceflow.kernels.methods import algorithms, registry

Cosines = dict[int, dict[int, float]]


def faces(seed: int, people: int, photos: int, spread: float = 0.12, dim: int = 24) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    identity = np.repeat(np.arange(people), photos)
    vectors = rng.standard_normal((people, dim))[identity] / math.sqrt(dim) + spread * rng.standard_normal((len(identity), dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), identity


def table(vectors: np.ndarray, threshold: float, k: int = 10**6) -> Block:
    product = vectors @ vectors.T
    product = np.minimum(product, product.T)
    np.fill_diagonal(product, -2)
    lists = []
    for i, row in enumerate(product):
        lists.append([j for j in np.lexsort((np.arange(len(row)), -row)) if row[j] >= np.float32(threshold) and j != i][:k])
    offsets = np.concatenate([[0], np.cumsum([len(results) for results in lists])]).astype(np.int64)
    targets = np.array([j for results in lists for j in results], np.int32)
    return offsets, targets, product[np.repeat(np.arange(len(vectors)), np.diff(offsets)), targets]


def given_of(vectors: np.ndarray, threshold: float, clusters: int | None = None) -> registry.Given:
    block = table(vectors, threshold)
    return registry.Given(block, block, lambda rows: vectors[rows], threshold, clusters)


def cosines(block: Block) -> Cosines:
    offsets, rows, values = block
    return {i: {int(rows[e]): float(values[e]) for e in range(offsets[i], offsets[i + 1])} for i in range(len(offsets) - 1)}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two labelings are one partition."""
    return len(np.unique(a)) == len(np.unique(b)) == len(np.unique(np.column_stack([a, b]), axis=0))


def links(results: tuple[np.ndarray, np.ndarray]) -> set[tuple[int, int]]:
    return set(zip(*(item.tolist() for item in results), strict=True))


@pytest.mark.parametrize("name", registry.METHODS)
def test_people_who_are_well_apart_are_found_the_same_each_time(name: str) -> None:
    vectors, identity = faces(3, 12, 15, spread=0.06)
    first, second = (registry.cluster(name, given_of(vectors, 0.75, 12)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first[0] == 0
    scores = score(first, identity)
    # HDBSCAN divides by density, rank order only joins those whose 20 nearest agree: both leave some apart.
    assert scores.pairwise_precision == 1 or (name == "minibatch-kmeans" and scores.pairwise_precision > 0.7)
    assert scores.pairwise_recall > (0.05 if name in ("hdbscan", "rank-order", "dpc", "minibatch-kmeans") else 0.99)


@pytest.mark.parametrize("name", registry.METHODS)
def test_no_faces_and_no_neighbors(name: str) -> None:
    empty = given_of(np.empty((0, 4), np.float32), 0.5, 1)
    assert len(registry.cluster(name, empty)) == 0
    alone = given_of(np.eye(5, dtype=np.float32), 0.5, 5)
    assert len(np.unique(registry.cluster(name, alone))) == 5


def test_settings_know_every_method() -> None:
    assert set(config.METHODS) == set(registry.METHODS)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 40), spread=st.floats(0.05, 0.3))
@settings(max_examples=25, deadline=None)
def test_density_peaks_equal_their_formula(seed: int, k: int, spread: float) -> None:
    block = table(faces(seed, 6, 9, spread)[0], 0.1, k)
    near = cosines(block)
    density = dict.fromkeys(near, 0.0)
    for row in near.values():
        first = dict(list(row.items())[:20])
        raw = {j: math.exp(-(1 - c) / 0.5) for j, c in first.items()}
        for j, value in raw.items():
            density[j] += value / sum(raw.values())
    share = {}
    for i, row in near.items():
        raw = {j: math.exp(-(1 - c) / 0.05) for j, c in row.items()}
        share[i] = {j: value / sum(raw.values()) for j, value in raw.items()}
    np.testing.assert_allclose(algorithms.ndde(block), [density[i] for i in near], rtol=1e-6)
    results = dict(links(algorithms.density_peaks(block)))
    exact = algorithms.ndde(block)
    for i, row in near.items():
        distance = {j: 1 - sum(math.sqrt(share[i][t] * share[j][t]) for t in share[i].keys() & share[j].keys()) for j in row}
        allowed = {j: d for j, d in distance.items() if d < 0.7 - 1e-6 and (exact[j], i) > (exact[i], j)}
        assert (i in results) == bool(allowed) or min(abs(d - 0.7) for d in distance.values()) < 1e-5
        if i in results and allowed:
            assert distance[results[i]] == pytest.approx(min(allowed.values()), abs=1e-5)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 40), spread=st.floats(0.05, 0.3))
@settings(max_examples=25, deadline=None)
def test_local_connectivity_equals_its_formula(seed: int, k: int, spread: float) -> None:
    block = table(faces(seed, 6, 9, spread)[0], 0.1, k)
    near = cosines(block)
    weight: Cosines = {i: {} for i in near}
    for i in near:
        for j in near:
            selected, target = near[i].get(j, 0.0), near[j].get(i, 0.0)
            if selected or target:
                weight[i][j] = (selected + target) / 2
    density = {i: sum(weight[i].values()) for i in near}
    expected = set()
    for i in near:
        denser = {j: w for j, w in weight[i].items() if (density[j], -j) > (density[i], -i)}
        if denser:
            expected.add((i, min(denser, key=lambda j: (-denser[j], j))))
        three = list(near[i].values())[:3]
        expected |= {(i, j) for j, w in denser.items() if three and w > sum(three) / len(three)}
    results = links(algorithms.local_connectivity(block))
    odd = results ^ expected  # a comparison of two float sums may fall either way
    assert len(odd) <= 0.02 * len(expected) + 1, odd


@given(seed=st.integers(0, 10_000), k=st.integers(1, 60), spread=st.floats(0.05, 0.4))
@settings(max_examples=25, deadline=None)
def test_rank_order_equals_its_formula(seed: int, k: int, spread: float) -> None:
    block = table(faces(seed, 5, 12, spread)[0], 0.0, k)
    order = {i: [i, *list(row)[:20]] for i, row in cosines(block).items()}

    def apart(a: int, b: int) -> int:
        return sum(t not in order[b] for t in order[a][: order[a].index(b) + 1])

    expected = {
        (a, b)
        for a in order
        for b in order[a][1:]
        if a in order[b] and (apart(a, b) + apart(b, a)) / min(order[a].index(b), order[b].index(a)) < 1
    }
    assert links(algorithms.rank_order(block)) == expected


@given(seed=st.integers(0, 10_000), spread=st.floats(0.1, 0.3), threshold=st.floats(0.1, 0.6))
@settings(max_examples=25, deadline=None)
def test_components_split_at_rising_thresholds(seed: int, spread: float, threshold: float) -> None:
    vectors, _ = faces(seed, 5, 10, spread)
    block = table(vectors, threshold)
    label = np.zeros(len(vectors), int)
    todo, level = [set(range(len(vectors)))], threshold
    done: list[set[int]] = []
    near = cosines(block)
    while todo:
        parts: list[set[int]] = []
        for rows in todo:
            left = set(rows)
            while left:
                part, edge = set(), {left.pop()}
                while edge:
                    i = edge.pop()
                    part.add(i)
                    fresh = {j for j, c in near[i].items() if c >= np.float32(level)} & left
                    left -= fresh
                    edge |= fresh
                parts.append(part)
        done += [part for part in parts if len(part) <= 8 or level >= 1]
        todo = [part for part in parts if len(part) > 8 and level < 1]
        level = min(1.0, level + algorithms.CDP_STEP * (1 - threshold))
    for number, part in enumerate(done):
        label[list(part)] = number
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithms, "CDP_LARGEST", 8)
        assert same(algorithms.split_components(block, threshold), label)


@given(seed=st.integers(0, 10_000), spread=st.floats(0.05, 0.3), threshold=st.floats(0.2, 0.8))
@settings(max_examples=25, deadline=None)
def test_linkage_and_dbscan_equal_the_libraries_on_all_pairs(seed: int, spread: float, threshold: float) -> None:
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform
    from sklearn.cluster import DBSCAN

    vectors, _ = faces(seed, 6, 8, spread)
    product = vectors @ vectors.T
    distance = np.clip(1 - np.minimum(product, product.T), 0, 2).astype(np.float64)
    np.fill_diagonal(distance, 0)
    if (np.abs(distance - (1 - threshold)) < 1e-5).any():
        return
    known = given_of(vectors, threshold)
    for name, kind in (("hac-average", "average"), ("hac-single", "single")):
        tree = linkage(squareform(distance, checks=False), kind)
        if np.abs(tree[:, 2] - (1 - threshold)).min() > 1e-5:
            assert same(registry.cluster(name, known), fcluster(tree, 1 - threshold, "distance"))
    truth = DBSCAN(eps=1 - threshold, min_samples=registry.DBSCAN_LEAST, metric="precomputed").fit(distance).labels_
    ours = registry.cluster("knn-dbscan", known)
    noise = truth < 0
    assert same(ours[~noise], truth[~noise]) or not (~noise).any()
    assert len(np.unique(ours[noise])) == noise.sum()


def test_whispers_come_to_rest() -> None:
    vectors, _ = faces(1, 8, 10, spread=0.2)
    matrix = algorithms.symmetric(table(vectors, 0.3))
    label = algorithms.chinese_whispers(matrix, 5)
    for i in range(len(label)):  # at rest: every row holds the label that is loudest about it
        heard = np.bincount(label[matrix.indices[matrix.indptr[i] : matrix.indptr[i + 1]]],
                            matrix.data[matrix.indptr[i] : matrix.indptr[i + 1]], len(label))  # fmt: skip
        assert heard.max() == 0 or heard[label[i]] == pytest.approx(heard.max())


def test_what_cannot_be_done_is_said() -> None:
    vectors, _ = faces(1, 2, 3)
    with pytest.raises(SettingsError, match="set --clusters"):
        registry.cluster("minibatch-kmeans", given_of(vectors, 0.5))
    with pytest.raises(SettingsError, match="there are 6 faces"):
        registry.cluster("minibatch-kmeans", given_of(vectors, 0.5, 7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "LARGEST_DENSE", 2)
        with pytest.raises(InputError, match="raise --min-similarity"):
            registry.cluster("hac-average", given_of(vectors, -1.0))
