"""Quality without labels against brute force; parts add up to the whole."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from faceflow.kernels.clusters.quality import BINS, Doubts, doubts, size_histogram


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 60), clusters=st.integers(1, 12), cut=st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_doubts_equal_brute_force_in_any_parts(seed: int, rows: int, clusters: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, clusters, rows)
    lists = [rng.choice(rows, int(rng.integers(0, min(rows, 9) + 1)), replace=False) for _ in range(rows)]
    values = [rng.random(len(results)).astype(np.float32) for results in lists]
    total, cut, seen = Doubts.none(clusters), min(cut, rows), np.zeros((2, BINS), np.int64)
    for first, last in ((0, cut), (cut, rows)):
        offsets = np.concatenate([[0], np.cumsum([len(results) for results in lists[first:last]])]).astype(np.int64)
        flat = [np.concatenate([np.empty(0), *item[first:last]]) for item in (lists, values)]
        known, results, histogram = doubts(offsets, flat[0].astype(np.int32), flat[1].astype(np.float32), first, cluster)
        total.add(known, results)
        seen += histogram
    for c in range(clusters):
        faces = np.flatnonzero(cluster == c)
        inside = {i: values[i][cluster[lists[i]] == c] for i in faces}
        outside = {i: values[i][cluster[lists[i]] != c] for i in faces}
        near = [float(outside[i].max()) for i in faces if len(outside[i])]
        assert total.faces[c] == len(faces)
        assert total.inside[c] == sum(len(v) > 0 for v in inside.values())
        np.testing.assert_allclose(total.within[c], sum(v.mean(dtype=np.float64) for v in inside.values() if len(v)), atol=1e-6)
        assert total.outside[c] == len(near)
        np.testing.assert_allclose(total.between[c], sum(near), atol=1e-6)
        assert total.nearest[c] == max(near, default=-1)
        if near:
            face, other = int(total.face[c]), int(total.other[c])
            assert cluster[face] == c
            assert cluster[other] != c
            assert values[face][list(lists[face]).index(other)] == total.nearest[c]
        assert total.doubtful[c] == sum(
            len(inside[i]) > 0 and len(outside[i]) > 0 and outside[i].max() > inside[i].mean(dtype=np.float64) for i in faces
        )
    edges = np.linspace(-1, 1, BINS + 1)
    for kind, same in ((0, True), (1, False)):
        every = [v for i in range(rows) for j, v in zip(lists[i], values[i], strict=True) if (cluster[i] == cluster[j]) == same]
        np.testing.assert_array_equal(seen[kind], np.histogram(every, edges)[0])


def test_histogram_counts_every_cluster_once() -> None:
    results = size_histogram(np.array([1, 1, 2, 3, 4, 5, 8, 9, 16, 17]))
    assert results == {"1": 2, "2": 1, "3-4": 2, "5-8": 2, "9-16": 2, "17-32": 1}
    assert size_histogram(np.empty(0, int)) == {}
    assert size_histogram(np.array([2, 8])) == {"1": 0, "2": 1, "3-4": 0, "5-8": 1}
    sizes = np.arange(1, 1000)
    assert sum(size_histogram(sizes).values()) == len(sizes)
