"""Edge recipes against brute force, straight from their formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceflow.kernels.graph import csr, edge_recipes

Lists = dict[int, dict[int, float]]
"""Per row its neighbors with their similarity, nearest first."""


def table(seed: int, rows: int, k: int, groups: int = 4) -> edge_recipes.Block:
    """Each row's k nearest of random unit vectors about a few centres."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((groups, 8))[rng.integers(0, groups, rows)] + 0.5 * rng.standard_normal((rows, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    product = (vectors @ vectors.T).astype(np.float32)
    lists = []
    for i in range(rows):
        others = [j for j in np.lexsort((np.arange(rows), -product[i])) if j != i and product[i, j] > 0]
        lists.append(others[: int(rng.integers(0, k + 1))])
    offsets = np.concatenate([[0], np.cumsum([len(results) for results in lists])]).astype(np.int64)
    targets = np.array([j for results in lists for j in results], np.int32)
    return offsets, targets, product[np.repeat(np.arange(rows), np.diff(offsets)), targets]


def lists_of(block: edge_recipes.Block) -> Lists:
    offsets, rows, values = block
    return {i: {int(rows[e]): float(values[e]) for e in range(offsets[i], offsets[i + 1])} for i in range(len(offsets) - 1)}


def jaccard(lists: Lists, i: int, j: int) -> float:
    a, b = {i, *lists[i]}, {j, *lists[j]}
    return len(a & b) / len(a | b)


def shared(lists: Lists, **_: Any) -> Lists:
    return {i: {j: s * jaccard(lists, i, j) for j, s in near.items()} for i, near in lists.items()}


def nep(lists: Lists) -> Lists:
    likely = {}
    for i, near in lists.items():
        raw = {t: math.exp(-(2 - 2 * min(max(s, 0), 1)) / 0.5) for t, s in {i: 1.0, **near}.items()}
        likely[i] = {t: value / sum(raw.values()) for t, value in raw.items()}
    out: Lists = {}
    for i, near in lists.items():
        out[i] = {}
        for j in near:
            weight = sum(likely[i][t] + likely[j][t] for t in likely[i].keys() & likely[j].keys()) / 2
            if weight < 0.22:
                break
            out[i][j] = weight
    return out


def tpdi(lists: Lists) -> Lists:
    share = {}
    for i, near in lists.items():
        raw = {t: math.exp(-(1 - s) / 0.05) for t, s in near.items()}
        share[i] = {t: value / sum(raw.values()) for t, value in raw.items()}
    out: Lists = {}
    for i, near in lists.items():
        weights = {j: sum(math.sqrt(share[i][t] * share[j][t]) for t in share[i].keys() & share[j].keys()) for j in near}
        out[i] = {j: w for j, w in weights.items() if 1 - w < 0.7}
    return out


def facemap(lists: Lists) -> Lists:
    out: Lists = {}
    for i, near in lists.items():
        rows, p = list(near)[:256], np.array(list(near.values())[:256])
        p = p / p.sum() if len(p) else p
        drops = -np.diff(p)
        cut, best = len(p), -math.inf
        for low in range(len(drops) - 19 if len(drops) >= 40 else 0):
            rest = np.concatenate([drops[:low], drops[low + 20 :]])
            stands_out = (drops[low : low + 20].mean() - rest.mean()) / max(rest.std(), 1e-12)
            if stands_out > best:
                best, cut = stands_out, low + 11
        out[i] = dict(zip(rows[:cut], p[:cut].tolist(), strict=True))
    return out


def auto(lists: Lists, strong: float, weak: float) -> Lists:
    firm = {i: {j for j, s in near.items() if s >= strong} for i, near in lists.items()}
    kept: Lists = {}
    for i, near in lists.items():
        kept[i] = {}
        for j, s in near.items():
            vouching = len(firm[j] & near.keys())
            if s >= strong or (s >= weak and len(firm[j]) >= 2 and vouching >= 0.5 * len(firm[j])):
                kept[i][j] = s
    return {
        i: {
            j: (max(s - weak, 0) / (0.4 * (1 - weak)) + 0.15) ** (1 + 2 * min(1, min(len(near), len(kept[j])) / 60))
            * jaccard(kept, i, j)
            for j, s in near.items()
        }
        for i, near in kept.items()
    }


@pytest.mark.parametrize("name", ["shared", "nep", "facemap", "tpdi"])
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 120), k=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_recipe_equals_its_formula(name: str, seed: int, rows: int, k: int) -> None:
    block = table(seed, rows, k)
    results, truth = lists_of(getattr(edge_recipes, name)(block)), globals()[name](lists_of(block))
    for i in range(rows):
        assert list(results[i]) == list(truth[i]), i
        np.testing.assert_allclose(list(results[i].values()), list(truth[i].values()), rtol=2e-5, atol=1e-6)


@given(
    seed=st.integers(0, 10_000), rows=st.integers(1, 80), k=st.integers(0, 70),
    strong=st.floats(0.3, 0.95), below=st.floats(0, 0.3),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_auto_equals_its_formula(seed: int, rows: int, k: int, strong: float, below: float) -> None:
    block = table(seed, rows, k)
    strong, weak = float(np.float32(strong)), float(np.float32(strong - below))
    truth = auto(lists_of(block), strong, weak)
    results = lists_of(edge_recipes.auto(block, strong, weak))  # in the block's memory
    for i in range(rows):
        assert list(results[i]) == list(truth[i]), i
        np.testing.assert_allclose(list(results[i].values()), list(truth[i].values()), rtol=1e-5, atol=2e-6)


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 200), k=st.integers(0, 30), share=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_closing_up_keeps_what_kept_keeps(seed: int, rows: int, k: int, share: float) -> None:
    block = table(seed, rows, k)
    keep = np.random.default_rng(seed).random(len(block[1])) < share
    expected = edge_recipes.kept(block, keep)
    for results, wanted in zip(edge_recipes.close_up(block, keep), expected, strict=True):
        np.testing.assert_array_equal(results, wanted)


def test_recipes_do_not_depend_on_threads_or_on_the_rows_order() -> None:
    block = table(1, 400, 60, groups=9)
    results = {}
    for threads in (1, 2):
        for by_locality in (False, True):
            offsets, rows, values, order = csr.compress([block], threads, by_locality)
            ends, targets, weights = edge_recipes.auto((offsets, rows, values), 0.7, 0.6)
            triples = sorted(zip(order[np.repeat(np.arange(len(order)), np.diff(ends))], order[targets], weights, strict=True))
            results[threads, by_locality] = triples
    assert len(results[1, False]) > 1_000
    assert all(triples == results[1, False] for triples in results.values())


def test_no_edges_at_all() -> None:
    empty = np.zeros(4, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
    for name in ("shared", "nep", "facemap", "tpdi"):
        assert len(getattr(edge_recipes, name)(empty)[1]) == 0
    assert len(edge_recipes.auto(empty, 0.5, 0.4)[1]) == 0
