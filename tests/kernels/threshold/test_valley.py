"""The automatic threshold: on pairs with a known law, on real faces, and where there is nothing to find."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from faceflow.kernels.threshold import valley


def all_pairs(vectors: np.ndarray) -> np.ndarray:
    rows = np.arange(len(vectors), dtype=np.int32)
    return valley.count_pairs(vectors, rows, vectors, rows)


def people(rng: np.random.Generator, identities: int, photos: int, dim: int, noise: float) -> np.ndarray:
    centres = rng.standard_normal((identities, dim))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    faces = np.repeat(centres, photos, axis=0) + noise * rng.standard_normal((identities * photos, dim)) / np.sqrt(dim)
    return (faces / np.linalg.norm(faces, axis=1, keepdims=True)).astype(np.float32)


def test_every_pair_is_counted_once() -> None:
    vectors = people(np.random.default_rng(0), 30, 10, 16, 0.7)
    histogram = all_pairs(vectors)
    truth = (vectors @ vectors.T)[np.triu_indices(300, 1)]
    assert histogram.sum() == len(truth)
    edges = np.linspace(-1, 1, valley.BINS + 1)
    assert np.abs(np.cumsum(histogram) - np.searchsorted(np.sort(truth), edges[1:])).max() <= 5  # roundings at a bin's edge


def test_blocks_add_up_to_the_whole() -> None:
    vectors = people(np.random.default_rng(1), 20, 10, 16, 0.7)
    rows = np.arange(200, dtype=np.int32)
    blocks = [valley.count_pairs(vectors[b:], rows[b:], vectors[b : b + 64], rows[b : b + 64]) for b in range(0, 200, 64)]
    assert np.sum(blocks) == 200 * 199 // 2
    assert np.abs(np.cumsum(np.sum(blocks, axis=0)) - np.cumsum(all_pairs(vectors))).max() <= 5


@pytest.mark.parametrize("photos", [3, 30])
def test_the_threshold_lies_between_impostors_and_one_person(photos: int) -> None:
    vectors = people(np.random.default_rng(2), 3_000 // photos, photos, 64, 0.7)
    thresholds = valley.choose_thresholds(all_pairs(vectors), len(vectors))
    labels = np.repeat(np.arange(3_000 // photos), photos)
    product = (vectors @ vectors.T)[np.triu_indices(3_000, 1)]
    same = (labels[:, None] == labels)[np.triu_indices(3_000, 1)]
    assert thresholds.valley is not None
    assert (product[~same] >= thresholds.strong).sum() < 0.05 * (product >= thresholds.strong).sum()
    assert (product[same] >= thresholds.strong).mean() > 0.95
    assert thresholds.weak <= thresholds.strong


def test_an_embedding_that_is_not_centred_moves_the_threshold_with_it() -> None:
    vectors = people(np.random.default_rng(3), 200, 15, 64, 0.7)
    selected = valley.choose_thresholds(all_pairs(vectors), len(vectors))
    shifted = np.concatenate([vectors, np.full((len(vectors), 1), 2.0, np.float32)], axis=1)
    shifted /= np.linalg.norm(shifted, axis=1, keepdims=True)
    target = valley.choose_thresholds(all_pairs(shifted), len(vectors))
    assert target.strong == pytest.approx((selected.strong + 4) / 5, abs=0.004)


@pytest.mark.parametrize(
    ("sizes", "copies", "noise"),
    [([3] * 700, 0.1, 0.0), ([3] * 700, 0.5, 0.0), ([3] * 700, 0.1, 0.02), ([400] + [50] * 2, 0.0, 0.0), ([300, 300], 0.0, 0.0),
     ([1000] + [20] * 20, 0.0, 0.0)],
)  # fmt: skip
def test_copies_of_photos_and_people_with_most_photos_do_not_move_the_threshold(
    sizes: list[int], copies: float, noise: float
) -> None:
    rng = np.random.default_rng(5)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    centres = rng.standard_normal((len(sizes), 128))
    vectors = centres[labels] / np.linalg.norm(centres[labels], axis=1, keepdims=True)
    vectors += 0.6 * rng.standard_normal(vectors.shape) / np.sqrt(128)
    again = rng.choice(len(labels), int(copies * len(labels)), replace=False)
    vectors = np.concatenate([vectors, vectors[again] + noise * rng.standard_normal((len(again), 128)) / np.sqrt(128)])
    labels = np.concatenate([labels, labels[again]])
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    thresholds = valley.choose_thresholds(all_pairs(vectors), len(vectors))
    product = (vectors @ vectors.T)[np.triu_indices(len(labels), 1)]
    same = (labels[:, None] == labels)[np.triu_indices(len(labels), 1)]
    assert (product[same] >= thresholds.strong).mean() > 0.95
    assert (product[~same] >= thresholds.strong).mean() < 1e-3


def test_strangers_only_leave_the_threshold_to_their_own_law() -> None:
    rng = np.random.default_rng(4)
    vectors = rng.standard_normal((4_000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    thresholds = valley.choose_thresholds(all_pairs(vectors), len(vectors))
    assert thresholds.valley is None
    assert thresholds.weak == thresholds.strong
    product = (vectors @ vectors.T)[np.triu_indices(4_000, 1)]
    assert (product >= thresholds.strong).sum() <= 40


@pytest.mark.parametrize("faces", [1, 2, 3])
def test_next_to_nothing_gives_some_threshold(faces: int) -> None:
    vectors = np.eye(faces, 8, dtype=np.float32)
    thresholds = valley.choose_thresholds(all_pairs(vectors), faces)
    assert -1 <= thresholds.weak <= thresholds.strong <= 1


def test_one_point_gives_some_threshold() -> None:
    vectors = np.ones((50, 4), np.float32) / 2
    thresholds = valley.choose_thresholds(all_pairs(vectors), 50)
    assert -1 <= thresholds.weak <= thresholds.strong <= 1


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("lfw_mobilefacenet128", 0.49, 0.54), ("lfw_dlib128", 0.9465, 0.953), ("celeba_dev_mobilefacenet128", 0.47, 0.50)],
)
def test_threshold_of_real_faces_lies_where_the_best_one_does(face_data: Path, name: str, low: float, high: float) -> None:
    # The ranges are those of fixed thresholds within .003 of the best one's F.
    column = pq.read_table(face_data / f"{name}.parquet")["embedding"].combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(column), -1)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    thresholds = valley.choose_thresholds(all_pairs(vectors), len(vectors))
    assert low <= thresholds.strong <= high
    # Two halves of the faces agree with each other.
    halves = [
        valley.choose_thresholds(all_pairs(np.ascontiguousarray(vectors[i::2])), len(vectors) // 2).strong for i in (0, 1)
    ]
    assert abs(halves[0] - halves[1]) < 0.03
