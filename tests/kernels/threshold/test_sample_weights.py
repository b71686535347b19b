"""Sampled faces that would count too often: counts against NumPy, and a level that follows the embedding's scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from faceflow.kernels.threshold import sample_weights, valley


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def people(sizes: list[int], dim: int = 64, noise: float = 0.7, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = unit(rng.standard_normal((len(sizes), dim)))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return unit(centers[labels] + noise * rng.standard_normal((len(labels), dim)) / np.sqrt(dim))


def bins(cosines: np.ndarray) -> np.ndarray:
    return np.clip(((cosines + np.float32(1)) * np.float32(valley.BINS / 2)).astype(int), 0, valley.BINS - 1)


def test_pairs_are_counted_and_repeats_marked_in_one_pass() -> None:
    x = people([4] * 60)
    x[200:] = x[:40]
    rows = np.arange(len(x))
    histogram, repeated = sample_weights.count_and_mark(x, rows, x, rows, 0.99)
    assert (histogram == valley.count_pairs(x, rows, x, rows)).all()
    product = x @ x.T
    assert repeated.tolist() == [bool((product[i, :i] >= 0.99).any()) for i in range(len(x))]
    assert repeated.sum() == 40


def test_weighted_pairs() -> None:
    x = people([6] * 30, seed=1)
    rng = np.random.default_rng(2)
    weights, rows = rng.random(len(x)).astype(np.float32), np.arange(len(x))
    total = sum(
        sample_weights.count_weighted(x[b:], rows[b:], weights[b:], x[b : b + 50], rows[b : b + 50], weights[b : b + 50])
        for b in range(0, len(x), 50)
    )
    i, j = np.triu_indices(len(x), 1)
    expected = np.bincount(bins((x @ x.T)[i, j]), weights[i].astype(float) * weights[j], valley.BINS)
    assert np.abs(np.cumsum(total) - np.cumsum(expected)).max() <= 5  # roundings at a bin's edge


def test_neighbors_and_weights() -> None:
    x = people([300, 50, 10, 1], noise=0.3)
    results = sample_weights.neighbors_at(x, x, 0.6) - 1
    assert results[0] == 299
    weights = sample_weights.weights(results)
    assert weights[0] * 299 == pytest.approx(sample_weights.CROWD)
    assert weights[355] == weights[-1] == 1


def test_near_identical_follows_the_scale_of_the_embedding() -> None:
    x = people([3] * 1_000, noise=0.7)
    selected = sample_weights.near_identical(x, len(x))
    assert 0.85 < selected < 0.97
    # All cosines squeezed towards 1, as in embeddings that are not centred: the same faces are near-identical.
    shifted = unit(np.concatenate([x, np.full((len(x), 1), 2.0, np.float32)], axis=1))
    assert sample_weights.near_identical(shifted, len(x)) == pytest.approx((selected + 4) / 5, abs=0.004)
    # Where chance reaches far, as in few dimensions, they are nearer to each other.
    assert sample_weights.near_identical(unit(np.random.default_rng(0).standard_normal((2_000, 8))), 2_000) > 0.98
    assert sample_weights.near_identical(x[:1], 1) == 1.0


@pytest.mark.parametrize("copies", [0.5, 3.0])
def test_copies_do_not_move_the_level(copies: float) -> None:
    x = people([3] * 700)
    again = np.concatenate([x, np.repeat(x[:1], int(copies * len(x)), axis=0)])
    shuffled = again[np.random.default_rng(1).permutation(len(again))]
    assert sample_weights.near_identical(shuffled, len(again)) == pytest.approx(
        sample_weights.near_identical(x, len(x)), abs=0.01
    )


def test_real_faces_are_hardly_ever_near_identical(face_data: Path) -> None:
    for name, level in (("lfw_mobilefacenet128", 0.896), ("lfw_dlib128", 0.994), ("celeba_dev_mobilefacenet128", 0.894)):
        t = pq.read_table(face_data / f"{name}.parquet")
        x = unit(np.asarray(t["embedding"].combine_chunks().flatten()).reshape(len(t), -1))
        near = sample_weights.near_identical(x, len(x))
        assert near == pytest.approx(level, abs=0.004)
        _, repeated = sample_weights.count_and_mark(x, np.arange(len(x)), x, np.arange(len(x)), near)
        assert repeated.mean() < 0.04


def test_the_weighted_pairs_are_believed_where_they_have_a_valley() -> None:
    x = people([8] * 300, noise=0.6, seed=3)
    rows = np.arange(len(x))
    plain = valley.count_pairs(x, rows, x, rows)
    flat = np.histogram(np.random.default_rng(0).normal(0, 0.1, 10**6), valley.BINS, (-1, 1))[0].astype(float)
    results, histogram = sample_weights.choose(plain, flat, len(x))
    assert results == valley.choose_thresholds(plain, len(x))
    assert histogram is plain
    results, histogram = sample_weights.choose(np.rint(flat).astype(np.int64), plain.astype(float), len(x))
    assert results.valley is not None
    assert (histogram == plain).all()
