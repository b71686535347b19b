"""Near-identical faces: groups about leaders, and tables in which a group is its leader, against plain Python."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from faceflow.kernels.graph import near_identical
from faceflow.kernels.graph.shared_neighbors import Block


def table(n: int, k: int, levels: int, seed: int) -> Block:
    """The k nearest of each of n faces on few levels of similarity, so that ties abound."""
    rng = np.random.default_rng(seed)
    s = rng.integers(1, levels + 1, (n, n)) / levels
    s = np.maximum(s, s.T).astype(np.float32)
    np.fill_diagonal(s, -1)
    order = np.argsort(-s, axis=1, kind="stable")[:, : min(k, n - 1)]
    counts = np.full(n, order.shape[1])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return offsets, order.ravel().astype(np.int32), np.take_along_axis(s, order, axis=1).ravel()


def near_lists(block: Block, near: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    offsets, rows, _ = block
    ends = near_identical.near_prefix(block[0], block[2], near)
    selected = np.flatnonzero(ends)
    targets = np.concatenate([np.empty(0, np.int32), *(rows[offsets[i] : offsets[i] + ends[i]] for i in selected)])
    return selected, np.concatenate([[0], np.cumsum(ends[selected])]), targets


def test_the_prefix_is_what_is_near() -> None:
    block = table(40, 12, 5, 1)
    results = near_identical.near_prefix(block[0], block[2], 0.8)
    for i, (a, b) in enumerate(itertools.pairwise(block[0])):
        assert results[i] == (block[2][a:b] >= np.float32(0.8)).sum()


@given(st.integers(2, 60), st.integers(1, 20), st.integers(2, 8), st.integers(0, 10_000))
def test_every_follower_is_near_its_leader(n: int, k: int, levels: int, seed: int) -> None:
    block = table(n, k, levels, seed)
    selected, offsets, targets = near_lists(block, 0.75)
    leader = near_identical.lead(selected, offsets, targets, n)
    assert (leader[leader] == leader).all()
    lists = {int(i): set(targets[a:b].tolist()) for i, (a, b) in zip(selected, itertools.pairwise(offsets), strict=True)}
    for i, j in enumerate(leader.tolist()):
        assert i == j or j in lists.get(i, set()) or i in lists[j]
    # A leader has no neighbor that comes before it and could be followed.
    for i in np.flatnonzero(leader == np.arange(n)).tolist():
        assert not any(j < i and leader[j] == j for j in lists.get(i, set()))


def test_copies_beyond_the_cap_have_one_leader() -> None:
    """A thousand copies of one photo: each list holds the first few only, as ties go by row."""
    n, k = 1_000, 20
    lists = [[j for j in range(k + 1) if j != i][:k] for i in range(n)]
    leader = near_identical.lead(np.arange(n), np.arange(n + 1) * k, np.array(lists, np.int32).ravel(), n)
    assert (leader == 0).all()


def plain_collapse(block: Block, leader: np.ndarray) -> list[dict[int, float]]:
    offsets, rows, values = block
    results: list[dict[int, float]] = [{} for _ in leader]
    for i in range(len(leader)):
        mine = results[leader[i]]
        for e in range(offsets[i], offsets[i + 1]):
            other = int(leader[rows[e]])
            if other != leader[i]:
                mine[other] = max(mine.get(other, -2.0), float(values[e]))
    return results


@given(st.integers(2, 60), st.integers(1, 20), st.integers(2, 8), st.floats(0.5, 1), st.integers(0, 10_000))
def test_a_collapsed_table_is_that_of_its_groups(n: int, k: int, levels: int, near: float, seed: int) -> None:
    block = table(n, k, levels, seed)
    leader = near_identical.lead(*near_lists(block, near), n)
    offsets, rows, values = near_identical.collapse(block, leader)
    assert values.dtype == np.float32
    assert rows.dtype == np.int32
    expected = plain_collapse(block, leader)
    for i, (a, b) in enumerate(itertools.pairwise(offsets)):
        assert dict(zip(rows[a:b].tolist(), values[a:b].tolist(), strict=True)) == expected[i]
        assert (np.diff(values[a:b]) <= 0).all()
        assert b - a == len(expected[i])


def test_without_groups_nothing_is_copied() -> None:
    block = table(30, 8, 4, 2)
    assert near_identical.collapse(block, np.arange(30)) is block


def test_distinct_neighbors_are_groups_other_than_the_own() -> None:
    leader = np.array([0, 0, 0, 3, 3, 5], np.int32)
    offsets, rows = np.array([0, 4, 4, 7]), np.array([1, 2, 3, 4, 0, 1, 5])
    assert near_identical.distinct_neighbors(leader[[0, 5, 3]], offsets, leader[rows]).tolist() == [1, 0, 2]
