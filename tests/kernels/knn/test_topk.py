from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from faceflow.kernels.knn import topk

floats = st.floats(-1, 1, width=32)


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.tuples(floats, st.integers(0, 2**31 - 1)), min_size=1, max_size=50))
def test_keys_sort_by_falling_similarity_then_row_and_decode(pairs: list[tuple[float, int]]) -> None:
    s = np.array([p[0] for p in pairs], np.float32) + np.float32(0)
    rows = np.array([p[1] for p in pairs], np.int32)
    keys = topk.encode(s, rows)
    np.testing.assert_array_equal(np.argsort(keys, kind="stable"), np.lexsort((rows, -s)))
    back, rows_back = topk.decode(keys)
    np.testing.assert_array_equal(back, s)
    np.testing.assert_array_equal(rows_back, rows)


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), st.data())
def test_select_smallest(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    first = data.draw(st.integers(0, 3))
    a = np.array([99] * first + values + [99], np.uint64)
    topk.select_smallest(a, first, len(values), k)
    assert sorted(a[first : first + k]) == sorted(values)[:k]
    assert a[first + k - 1] == sorted(values)[k - 1]
    assert sorted(a) == sorted([99] * (first + 1) + values)


@settings(deadline=None)  # the first call compiles
@given(st.integers(1, 5), st.lists(st.tuples(floats, st.integers(0, 500)), max_size=80, unique_by=lambda p: p[1]))
def test_buffers_keep_the_k_best_whatever_the_order(k: int, pairs: list[tuple[float, int]]) -> None:
    keys = topk.encode(np.array([p[0] for p in pairs], np.float32), np.array([p[1] for p in pairs], np.int32))
    buffers = topk.Buffers.empty(2, k, None)
    buffers.extend(np.array([1]), np.array([0, len(keys)]), keys)
    offsets, kept = buffers.take(np.array([0, 1]))
    assert offsets[1] == 0
    np.testing.assert_array_equal(np.sort(kept), np.sort(keys)[:k])


@settings(deadline=None)  # the first call compiles
@given(st.integers(1, 4), st.lists(st.lists(st.tuples(st.integers(0, 3), floats, st.integers(0, 40)), max_size=30), max_size=3))
def test_merge_equals_sorting_everything(k: int, shards: list[list[tuple[int, float, int]]]) -> None:
    """Several lists may hold the same candidate; one list does not hold it twice."""
    lists, every = [], {row: set() for row in range(4)}
    for shard in shards:
        mine: dict[int, list[int]] = {}
        for row, s, neighbor in {(row, neighbor): (row, s, neighbor) for row, s, neighbor in shard}.values():
            key = int(topk.encode(np.array([s], np.float32), np.array([neighbor], np.int32))[0])
            mine.setdefault(row, []).append(key)
            every[row].add(key)
        rows = np.array(sorted(mine), np.int32)
        offsets = np.concatenate([[0], np.cumsum([len(mine[r]) for r in sorted(mine)])]).astype(np.int64)
        lists.append((rows, offsets, np.array([x for r in sorted(mine) for x in mine[r]], np.uint64)))
    offsets, neighbors, similarities = topk.merge(lists, 4, k)
    for row in range(4):
        want_s, want = topk.decode(np.array(sorted(every[row])[:k], np.uint64))
        selected = slice(offsets[row], offsets[row + 1])
        np.testing.assert_array_equal(neighbors[selected], want)
        np.testing.assert_array_equal(similarities[selected], want_s)
