"""Stable ids, transitions and events against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceflow.kernels.clusters.cluster_ids import canonical_order, stable_clusters, transitions
from faceflow.stages.publish.events import events


def by_definition(modules: list[int], past: list[int], next_id: int) -> dict[int, int]:
    """The id of each module, one face at a time."""
    order = canonical_order(np.array(modules))[0]
    shared: dict[tuple[int, int], int] = {}
    for m, p in zip(modules, past, strict=True):
        if p >= 0:
            shared[p, m] = shared.get((p, m), 0) + 1
    best_past = {m: min((p for p, q in shared if q == m), key=lambda p: (-shared[p, m], p), default=None) for m in set(modules)}
    results = {}
    for p in {p for p, _ in shared}:
        best = min((m for q, m in shared if q == p), key=lambda m: (-shared[p, m], order[m]))
        if best_past[best] == p:
            results[best] = p
    for m in sorted(set(modules) - set(results), key=lambda m: order[m]):
        results[m] = next_id
        next_id += 1
    return results


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(-1, 6)), min_size=1, max_size=40))
def test_stable_clusters_are_mutual_best_matches(faces: list[tuple[int, int]]) -> None:
    modules, past = [m for m, _ in faces], [p for _, p in faces]
    lookup, sizes = stable_clusters(np.array(modules), np.array(past), 7)
    expected = by_definition(modules, past, 7)
    assert {m: int(lookup[m]) for m in set(modules)} == expected
    assert len(set(expected.values())) == len(expected)
    assert sizes.tolist() == np.bincount(modules, minlength=len(sizes)).tolist()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 5), st.integers(-1, 5)).filter(lambda t: t != (-1, -1)), min_size=1, max_size=40))
def test_events_name_every_size_and_every_source(faces: list[tuple[int, int]]) -> None:
    before, after = np.array([b for b, _ in faces]), np.array([a for _, a in faces])
    table = events(*transitions(before, after)).to_pylist()
    plain = {row["cluster"]: row for row in table if row["event"] not in ("merged", "split")}
    for cluster in range(6):
        old, new = before == cluster, after == cluster
        if (old == new).all():
            assert cluster not in plain
            continue
        row = plain[cluster]
        kind = "created" if not old.any() else "vanished" if not new.any() else None
        kind = kind or ("grown" if new.sum() > old.sum() else "shrunk" if new.sum() < old.sum() else "changed")
        expected = [kind, int(old.sum()), int(new.sum()), int((new & ~old).sum()), int((old & ~new).sum())]
        assert [row[key] for key in ("event", "faces_before", "faces_after", "joined", "left")] == expected
        assert row["from"] == sorted({int(b) for b in before[new & ~old]} - {-1})
        assert row["into"] == sorted({int(a) for a in after[old & ~new]} - {-1})
    for row in table:
        if row["event"] == "merged":
            assert row["from"]
            assert not np.isin(row["from"], after).any()
        if row["event"] == "split":
            assert row["into"]
            assert not np.isin(row["into"], before).any()


def test_a_merger_and_a_split() -> None:
    before = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, -1])
    after = np.array([0, 0, 0, 0, 0, 2, 2, 2, 3, 3])
    results = [
        (row["event"], row["cluster"], row["from"], row["into"]) for row in events(*transitions(before, after)).to_pylist()
    ]
    assert results == [
        ("grown", 0, [1], []), ("merged", 0, [1], []), ("vanished", 1, [], [0]), ("shrunk", 2, [], [3]), ("split", 2, [], [3]),
        ("created", 3, [2], []),
    ]  # fmt: skip


def test_no_past() -> None:
    lookup, _ = stable_clusters(np.array([3, 3, 1]), np.array([-1, -1, -1]), 10)
    assert lookup[[3, 1]].tolist() == [10, 11]
    with pytest.raises(IndexError):
        lookup[9]
