"""The certificate: exact where it can be, covering where it samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from faceflow.kernels.ivf import plan as plans
from faceflow.kernels.knn import recall, topk
from tests.kernels.knn.test_tile_search import unit


def test_search_part_is_exact() -> None:
    x = unit(900, 16, 0)
    rows = recall.sample_rows(900, 40, 1)
    offsets, keys = recall.search_part(x[rows], rows.astype(np.int32), x[300:], 300, 5, 0.4)
    s = x[rows].astype(np.float64) @ x[300:].T.astype(np.float64)
    for i in range(40):
        want = [j + 300 for j in np.argsort(-s[i], kind="stable")[:6] if s[i, j] >= 0.4]
        got = np.sort(keys[offsets[i] : offsets[i + 1]]) & np.uint64(0xFFFFFFFF)
        assert got.tolist() == want


def best(similarities: np.ndarray, row: int, among: np.ndarray, k: int) -> np.ndarray:
    """The keys of a row's k + 1 best of these rows from a similarity of 0.3 on."""
    selected = among[similarities[row, among] >= 0.3]
    return np.sort(topk.encode(similarities[row, selected], selected))[: k + 1]


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 12), st.integers(0, 12))
def test_truth_that_is_carried_over_is_that_of_an_exact_search(seed: int, k: int, gone: int, new: int) -> None:
    rng = np.random.default_rng(seed)
    old = int(rng.integers(1, 30))
    n = old + new
    similarities = rng.random((n, n)).astype(np.float32)
    np.fill_diagonal(similarities, 1)
    # The faces of an incremental run: those of the base run that stay, in another order, and the new ones behind them.
    stay = rng.permutation(old)[min(gone, old) :]
    current = np.concatenate([stay, np.arange(old, n)])
    now = np.full(old, -1, np.int32)
    now[stay] = np.arange(len(stay))
    sampled = np.flatnonzero(rng.random(old) < 0.7)
    lists = [best(similarities, row, np.arange(old), k) for row in sampled]
    offsets = np.cumsum([0, *map(len, lists)])
    drawn = recall.sample_new(range(len(stay), len(current)), 0.5, seed, 3)
    assert len(drawn) - new / 2 in (-0.5, 0, 0.5)
    rows, known, ends, keys = recall.carry_truth(
        (sampled.astype(np.int32), offsets, np.concatenate([np.empty(0, np.uint64), *lists])), now, drawn, k
    )
    assert rows.tolist() == sorted([*now[sampled][now[sampled] >= 0], *drawn])
    assert not known[np.isin(rows, drawn)].any()
    target = similarities[np.ix_(current, current)]
    fresh = np.arange(len(stay), len(current))
    for i, row in enumerate(rows.tolist()):
        mine = keys[ends[i] : ends[i + 1]]
        if known[i]:
            results = np.sort(np.concatenate([mine, best(target, row, fresh, k)]))[: k + 1]
            assert results.tolist() == best(target, row, np.arange(len(current)), k).tolist()
        else:
            assert len(mine) == 0
        if not gone and row < len(stay):
            assert known[i]


def counted(truth: Any, results: Any, k: int, threshold: float | None) -> tuple[int, int]:
    similarities, hit = recall.check(truth, results, k, threshold)
    bands = np.zeros((2, recall.BANDS), np.int64)
    recall.add_bands(bands, similarities, hit, threshold)
    assert bands.sum(axis=1).tolist() == [len(hit), hit.sum()]
    return len(hit), int(hit.sum())


def test_only_ties_are_forgiven() -> None:
    truth = np.array([1, 2, 3]), np.array([0.9, 0.8, 0.7], np.float32)
    assert counted(truth, (np.array([1, 3]), np.array([0.9, 0.7], np.float32)), 5, 0.5) == (3, 2)
    assert counted(truth, (np.array([1, 2, 9]), np.array([0.9, 0.8, 0.7], np.float32)), 3, 0.5) == (3, 3)
    assert counted(truth, (np.array([1, 2]), np.array([0.9, 0.8], np.float32)), 5, 0.7) == (2, 2)


def test_interval_covers_the_truth() -> None:
    """Faces miss edges together; over many samples the 95 % interval holds the true recall about 95 % of the time."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, 60, 20_000)
    rate = np.where(rng.random(20_000) < 0.03, 0.6, 1.0)
    results = rng.binomial(true, rate)
    real = results.sum() / true.sum()
    covered = 0
    for _ in range(300):
        some = rng.choice(20_000, 1000, replace=False)
        c = recall.estimate(true[some], results[some])
        covered += c.low <= real <= c.high
    assert 0.92 <= covered / 300 <= 0.99


def test_certificates_of_perfect_and_empty_samples() -> None:
    perfect = recall.estimate(np.full(1000, 20), np.full(1000, 20))
    assert perfect.estimate == perfect.high == 1
    assert 0.99 < perfect.low < 1
    nothing = recall.estimate(np.zeros(10, np.int64), np.zeros(10, np.int64))
    assert (nothing.estimate, nothing.low, nothing.high, nothing.edges) == (1, 0, 1, 0)


def test_plans() -> None:
    def choose(n: int, **settings: object) -> plans.Plan:
        wanted = {"index": "auto", "cells": None, "probes": None} | settings
        return plans.choose(n, 256, iterations=5, sample=64, joined=True, **wanted)  # type: ignore[arg-type]

    assert choose(10_000).index == "exact"
    assert choose(200_000).index == "cells"
    assert choose(200_000, index="exact").cells == 0
    assert choose(10_000, index="cells", cells=30).cells == 30
    sizes = [10_000, 100_000, 1_000_000, 10_000_000]
    cells = [choose(n, index="cells").cells for n in sizes]
    assert cells == sorted(cells)
    work = [choose(n).cells_work for n in sizes]
    # Cheaper than quadratic, dearer than linear.
    assert all(10 < b / a < 60 for a, b in zip(work[:-1], work[1:], strict=True))
    assert "all pairs would take about" in choose(10_000).reason(1e11)


@pytest.mark.parametrize("memory", [2**29, 2**31, 2**33])
def test_shards_fit_the_memory(memory: int) -> None:
    shards = plans.shard_count(5_000_000, 256, 80, 7000, 3.0, plans.Workers(2, memory))
    assert 5_000_000 * 3.0 / shards * (4 * 256 + 16 * 80) <= 0.5 * memory
    assert plans.shard_count(1000, 256, 80, 30, 3.0, plans.Workers(64, memory)) == 1


def test_shards_on_a_cluster_that_grows_are_those_of_what_it_becomes() -> None:
    """A head of 16 CPUs and 64 GiB, alone at the start; 256 CPUs with a quarter of its memory a CPU come when tasks wait."""
    at_start = plans.Workers.of(None, None, alive=16, smallest_share=4 * 2**30, fixed=False)
    later = plans.Workers.of(None, None, alive=256, smallest_share=2**30, fixed=True)
    counts = [plans.shard_count(5_000_000, 256, 80, 7_000, 3.0, workers) for workers in (at_start, later)]
    assert counts == [611, 611]
    held = 5_000_000 * 3.0 * (4 * 256 + 12 * 80 + 64) / counts[0]
    assert held < 0.25 * 2**30
    # What is declared, or cannot grow, is believed.
    assert plans.Workers.of(8, 2**33, 16, 2**30, fixed=False) == plans.Workers(8, 2**33)
    assert plans.Workers.of(None, None, 2, 2**33, fixed=True) == plans.Workers(2, 2**33)
