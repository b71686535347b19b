"""Constraints on modules: what they promise, on random graphs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceflow.errors import InputError
from faceflow.kernels.clusters.constraints import check, impose, must_groups, separate

PAIRS = st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), max_size=12)


def as_pairs(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, np.int64).reshape(-1, 2)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=15, max_size=15), PAIRS, PAIRS, st.integers(0, 1000))
def test_what_is_imposed_holds(
    modules: list[int], must: list[tuple[int, int]], cannot: list[tuple[int, int]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    before, rows = np.array(modules), rng.permutation(15)
    m, c = as_pairs(must), as_pairs(cannot)
    try:
        group = check(m, c, 15, str)
    except InputError:
        grouped = must_groups(15, m)
        assert any(grouped[a] == grouped[b] for a, b in cannot)
        return
    assert all(group[a] != group[b] for a, b in cannot)
    sources, targets = rng.integers(0, 15, (2, 40))
    weights = rng.random(40)

    def edges(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        kept = mask[sources] & mask[targets]
        return sources[kept], targets[kept], weights[kept]

    after = impose(before, rows, m, c, edges)
    assert all(after[rows[a]] == after[rows[b]] for a, b in must)
    assert all(after[rows[a]] != after[rows[b]] for a, b in cannot)
    touched = set(before[rows[m.ravel()]].tolist()) | set(before[rows[c.ravel()]].tolist())
    for module in set(modules) - touched:  # other modules stay as they are
        selected = before == module
        assert len(set(after[selected].tolist())) == 1
        assert not np.isin(after[~selected], after[selected]).any()
    np.testing.assert_array_equal(after, impose(before, rows, m, c, edges))


def test_a_module_is_split_along_its_edges() -> None:
    # Two cliques of four that one edge holds together; one face of each cannot be with the other.
    pairs = [(i, j) for block in (range(4), range(4, 8)) for i in block for j in block if i < j] + [(3, 4)]
    sources, targets = np.array(pairs).T
    edges = sources, targets, np.ones(len(pairs))
    results = impose(np.zeros(8, np.int64), np.array([0, 7]), as_pairs([]), as_pairs([(0, 1)]), lambda mask: edges)
    assert results[:4].tolist() == [results[0]] * 4
    assert results[4:].tolist() == [results[7]] * 4
    assert results[0] != results[7]


def test_a_contradiction_is_reported_with_its_chain() -> None:
    names = ["ann", "bob", "cleo", "dan"]
    with pytest.raises(InputError) as caught:
        check(as_pairs([(0, 1), (1, 2), (2, 3), (0, 3)]), as_pairs([(0, 2)]), 4, names.__getitem__)
    assert str(caught.value) == (
        "constraints contradict each other: ann must be with bob; bob must be with cleo; but ann cannot be with cleo"
    )
    with pytest.raises(InputError, match="ann cannot be with itself"):
        check(as_pairs([]), as_pairs([(0, 0)]), 4, names.__getitem__)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.booleans()), min_size=2, max_size=20), st.integers(0, 99))
def test_faces_of_one_photo_are_kept_apart(faces: list[tuple[int, int, bool]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    modules, photos = np.array([m for m, _, _ in faces]), np.array([p for _, p, _ in faces], np.uint64)
    fixed, n = np.array([f for _, _, f in faces]), len(faces)
    sources, targets = rng.integers(0, n, (2, 3 * n))
    weights = rng.random(3 * n)

    def edges(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        kept = mask[sources] | mask[targets]
        return sources[kept], targets[kept], weights[kept]

    after, moved, stayed = separate(modules, photos, fixed, edges)
    assert moved == int((after != modules).sum())
    assert not (after != modules)[fixed | (photos == 0)].any()
    left = 0
    for photo in range(1, 5):
        selected = photos == photo
        for module in set(after[selected].tolist()):
            crowd = selected & (after == module)
            left += max(0, int(crowd.sum()) - 1)
            assert not crowd.any() or (crowd & ~fixed).sum() <= (0 if (crowd & fixed).any() else 1)
    assert left == stayed


def test_the_nearest_stays_and_the_other_goes_where_it_is_drawn() -> None:
    modules, photos = np.array([0, 0, 0, 1, 1]), np.array([0, 7, 7, 0, 0], np.uint64)
    edges = np.array([1, 2, 2]), np.array([0, 0, 3]), np.array([0.9, 0.6, 0.5])
    after, moved, stayed = separate(modules, photos, np.zeros(5, bool), lambda mask: edges)
    assert after.tolist() == [0, 0, 1, 1, 1]
    assert (moved, stayed) == (1, 0)


def separate_plainly(
    modules: np.ndarray, photos: np.ndarray, fixed: np.ndarray, edges: list[tuple[int, int, float]]
) -> tuple[list[int], int, int]:
    """`separate` by its description, with dictionaries and sets."""
    now = modules.tolist()
    held = {(m, p) for m, p in zip(now, photos.tolist(), strict=True) if p}
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (m, p) in enumerate(zip(modules.tolist(), photos.tolist(), strict=True)):
        if p:
            groups.setdefault((m, p), []).append(row)
    fresh, moved, stayed = max(now) + 1, 0, 0
    for (module, photo), rows in sorted((g, rows) for g, rows in groups.items() if len(rows) > 1):
        pull: dict[int, dict[int, float]] = {row: {} for row in rows}
        for a, b, w in edges:
            for end, other in ((a, b), (b, a)):
                if end in pull:
                    m = int(modules[other])
                    pull[end][m] = pull[end].get(m, 0.0) + w
        rows.sort(key=lambda row: (not fixed[row], -pull[row].get(module, 0.0), row))
        for row in rows[1:]:
            if fixed[row]:
                stayed += 1
                continue
            open_ = sorted((-w, m) for m, w in pull[row].items() if m != module and (m, photo) not in held)
            now[row] = open_[0][1] if open_ else fresh
            fresh += not open_
            held.add((now[row], photo))
            moved += 1
    return now, moved, stayed


@settings(max_examples=200)
@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 20), st.integers(0, 10_000))
def test_faces_of_one_photo_are_separated_as_described(n: int, clusters: int, photos: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    modules, taken = rng.integers(0, clusters, n), rng.integers(0, photos, n).astype(np.uint64) * np.uint64(2**40 + 7)
    fixed = rng.random(n) < 0.15
    sources, targets = rng.integers(0, n, (2, 3 * n))
    weights = rng.integers(1, 9, 3 * n) / 8  # sums are exact

    def edges(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        kept = mask[sources] | mask[targets]
        return sources[kept], targets[kept], weights[kept]

    results, moved, stayed = separate(modules, taken, fixed, edges)
    links = list(zip(sources.tolist(), targets.tolist(), weights.tolist(), strict=True))
    assert (results.tolist(), moved, stayed) == separate_plainly(modules, taken, fixed, links)
