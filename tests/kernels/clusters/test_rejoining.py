"""Pieces of one cloud pass into each other, two people do not: the test of two modules on laws with a known answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from faceflow.kernels.clusters import rejoining


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def cloud(along: np.ndarray, dim: int = 128, noise: float = 0.6, seed: int = 0) -> np.ndarray:
    """Faces of one person at these places of a line through the person's center."""
    rng = np.random.default_rng(seed)
    center, axis = unit(rng.standard_normal((2, dim)))
    return unit(center + along[:, None] * axis + noise * rng.standard_normal((len(along), dim)) / np.sqrt(dim))


def person(rng: np.random.Generator, count: int, center: np.ndarray, noise: float = 0.7) -> np.ndarray:
    return unit(center + noise * rng.standard_normal((count, center.shape[1])) / np.sqrt(center.shape[1]))


@pytest.mark.parametrize(
    ("law", "least", "most"),
    [("uniform", 0.8, 1.25), ("normal", 1.1, 1.7), ("random halves", 0.8, np.inf)],
)
def test_tasks_of_one_cloud(law: str, least: float, most: float) -> None:
    rng = np.random.default_rng(4)
    along = rng.uniform(-0.8, 0.8, 4_000) if law != "normal" else 0.5 * rng.standard_normal(4_000)
    x = cloud(along)
    low = along < 0 if law != "random halves" else rng.random(len(x)) < 0.5
    results = rejoining.density_between(x[low], x[~low])
    assert least <= results <= most
    assert results == pytest.approx(rejoining.density_between(x[~low], x[low]), rel=1e-9)


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.8, 0.9])
def test_two_people_have_a_gap_however_alike_they_are(cosine: float) -> None:
    rng = np.random.default_rng(5)
    a, b = unit(rng.standard_normal((2, 256)))
    b = unit((cosine * a + np.sqrt(1 - cosine**2) * unit((b - (a @ b) * a)[None])[0])[None])[0]
    for sizes in ((200, 200), (256, 20)):
        results = rejoining.density_between(person(rng, sizes[0], a[None]), person(rng, sizes[1], b[None]))
        assert results < rejoining.LEAST_DENSITY / 2


def test_poor_photos_of_one_person_are_not_another() -> None:
    """They lie farther from the center, as noise is larger, on a line through it: quality passes from good to poor."""
    rng = np.random.default_rng(6)
    center = unit(rng.standard_normal((1, 128)))
    noise = rng.uniform(0.4, 1.6, 3_000)
    x = unit(center + noise[:, None] * rng.standard_normal((3_000, 128)) / np.sqrt(128))
    poor = noise > 1.0
    assert rejoining.density_between(x[poor], x[~poor]) > rejoining.LEAST_DENSITY


def test_chains_of_tasks_are_one() -> None:
    pairs = np.array([[0, 1], [1, 2], [3, 4], [4, 5]])
    joined = rejoining.join(pairs, np.array([1.0, 0.7, 0.59, 9.0]), 7)
    assert joined.tolist() == [0, 0, 0, 3, 4, 4, 6]


def test_people_of_a_real_set_are_apart(face_data: Path) -> None:
    """The forty people of LFW with most photos, pair by pair; and each one's photos, cut in two at random, together."""
    t = pq.read_table(face_data / "lfw_mobilefacenet128.parquet")
    x = unit(np.asarray(t["embedding"].combine_chunks().flatten()).reshape(len(t), -1))
    labels = t["label"].to_numpy()
    largest = np.argsort(-np.bincount(labels))[:40]
    faces = [x[labels == label] for label in largest]
    apart = [rejoining.density_between(a, b) for i, a in enumerate(faces) for b in faces[:i]]
    assert max(apart) < rejoining.LEAST_DENSITY
    rng = np.random.default_rng(0)
    halves = []
    for item in faces:
        first = rng.permutation(len(item)) < len(item) // 2
        halves.append(rejoining.density_between(item[first], item[~first]))
    assert np.mean(np.array(halves) >= rejoining.LEAST_DENSITY) > 0.9
