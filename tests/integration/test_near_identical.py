"""Libraries in which one photo, one person or a few films have most of the files: the clusters of others do not suffer.

Real faces, alone and beside ten thousand copies of one photo, twenty photos five hundred times each, three thousand photos of
one person whose look changes with the years, and ten people in five films of a hundred frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow import ClusterConfig, run_clustering, run_nightly
from faceflow.kernels.clusters.scores import score
from tests.conftest import write_faces

pytestmark = pytest.mark.usefixtures("ray_session")


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def noise(rng: np.random.Generator, count: int, dim: int, width: float) -> np.ndarray:
    return width * rng.standard_normal((count, dim)) / np.sqrt(dim)


def ageing(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    """Photos of one person along an arc: all pairs far above the threshold, and near ones nearer than far ones."""
    center, axis = unit(rng.standard_normal((2, dim)))
    return unit(center + 0.5 * np.linspace(-1, 1, count)[:, None] * axis + noise(rng, count, dim, 0.5))


def films(rng: np.random.Generator, dim: int, people: int = 10, clips: int = 5, frames: int = 100) -> np.ndarray:
    results = []
    for _ in range(people):
        center = unit(rng.standard_normal((1, dim)))
        for _ in range(clips):
            results.append(unit(unit(center + noise(rng, 1, dim, 0.8)) + noise(rng, frames, dim, 0.2)))
    return np.concatenate(results)


class Library:
    """LFW, and what is put beside it: (faces, labels), and how many are LFW's own."""

    def __init__(self, folder: Path) -> None:
        table = pq.read_table(folder / "lfw_mobilefacenet128.parquet")
        self.x = unit(np.asarray(table["embedding"].combine_chunks().flatten()).reshape(len(table), -1))
        self.labels = np.unique(table["label"].to_numpy(), return_inverse=True)[1]
        self.own, self.rng = len(self.x), np.random.default_rng(5)
        self.people: list[int] = []

    def add(self, x: np.ndarray, labels: np.ndarray) -> None:
        self.x, self.labels = np.concatenate([self.x, x]), np.concatenate([self.labels, labels])

    def copy(self, photo: int, times: int) -> None:
        self.add(np.repeat(self.x[photo : photo + 1], times, axis=0), np.repeat(self.labels[photo], times))

    def person(self, x: np.ndarray) -> None:
        self.people.append(int(self.labels.max()) + 1)
        self.add(x, np.full(len(x), self.people[-1]))

    def crowd(self) -> None:
        self.copy(100, 10_000)
        for photo in range(0, self.own, 662):
            self.copy(photo, 500)
        self.person(ageing(self.rng, 3_000, self.x.shape[1]))
        for x in np.split(films(self.rng, self.x.shape[1]), 10):
            self.person(x)

    def run(self, tmp_path: Path, name: str, **settings: Any) -> np.ndarray:
        """Clusters of the defaults, int64[n]; files are shuffled, as a library's are."""
        order = np.random.default_rng(1).permutation(len(self.x))
        write_faces(tmp_path / name / "in.parquet", self.x[order], pa.array(order))
        config = ClusterConfig(str(tmp_path / name), str(tmp_path / f"{name}-out"), **settings)
        result = run_clustering(config, progress=False, report=False)
        table = pa.concat_tables([pq.read_table(f, partitioning=None) for f in sorted(Path(result.labels).iterdir())])
        clusters = np.empty(len(self.x), np.int64)
        clusters[table["id"].to_numpy()] = table["cluster"].to_numpy()
        return clusters

    def f(self, clusters: np.ndarray) -> float:
        """Mean of pairwise and BCubed F over LFW's own faces."""
        results = score(np.unique(clusters[: self.own], return_inverse=True)[1], self.labels[: self.own])
        return (results.pairwise_f + results.bcubed_f) / 2

    def tasks(self, clusters: np.ndarray) -> list[int]:
        """Clusters that each added person's faces are in, but for one face in a hundred."""
        results = []
        for person in self.people:
            counts = np.sort(np.unique(clusters[self.labels == person], return_counts=True)[1])[::-1]
            results.append(int(np.searchsorted(np.cumsum(counts), 0.99 * counts.sum())) + 1)
        return results


@pytest.mark.timeout(400)
def test_a_crowd_harms_nobody_else(face_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = Library(face_data)
    alone = library.f(library.run(tmp_path, "alone"))
    assert alone > 0.99
    library.crowd()
    clusters = library.run(tmp_path, "crowd")
    assert abs(library.f(clusters) - alone) <= 0.003
    assert library.tasks(clusters) == [1] * 11
    assert len(np.unique(clusters[np.flatnonzero(library.labels == library.labels[100])[-10_000:]])) == 1
    # Nobody shares a cluster with them but their own.
    for person in library.people:
        main = np.bincount(clusters[library.labels == person]).argmax()
        assert (library.labels[clusters == main] == person).all()
    assert "faces have 200 neighbors above the threshold, as many as --neighbors keeps" in caplog.text


def test_incremental_runs_with_many_near_identical_faces(face_data: Path, tmp_path: Path) -> None:
    """Copies and frames that come with one incremental run after the other count as one with those that are there."""
    table = pq.read_table(face_data / "lfw_mobilefacenet128.parquet").slice(0, 3_000)
    x = unit(np.asarray(table["embedding"].combine_chunks().flatten()).reshape(len(table), -1))
    clips = films(np.random.default_rng(3), 128, people=2, clips=3, frames=60)
    order = np.random.default_rng(4).permutation(len(clips))
    write_faces(tmp_path / "in" / "a.parquet", x, pa.array(np.arange(len(x))))
    config = ClusterConfig(str(tmp_path / "in"), str(tmp_path / "out"), neighbors=50, min_similarity=0.5)
    run_nightly(config, progress=False, report=False)
    for night, selected in enumerate(np.array_split(order, 3)):
        faces = np.concatenate([clips[selected], np.repeat(x[7:8], 40, axis=0)])
        ids = np.concatenate([10_000 + selected, 20_000 + 40 * night + np.arange(40)])
        write_faces(tmp_path / "in" / f"b{night}.parquet", faces, pa.array(ids))
        result = run_nightly(config, progress=False, report=False)
    manifest = json.loads((tmp_path / "out" / "_runs" / result.run_id / "manifests" / "search.json").read_text())["result"]
    assert manifest["followers"] >= 110 + len(clips) * 0.9
    labels = pa.concat_tables([pq.read_table(f, partitioning=None) for f in sorted(Path(result.labels).iterdir())])
    cluster = dict(zip(labels["id"].to_pylist(), labels["cluster"].to_pylist(), strict=True))
    assert len({cluster[i] for i in [7, *range(20_000, 20_120)]}) == 1
    for person in range(2):
        assert len({cluster[10_000 + i] for i in range(180 * person, 180 * person + 180)}) == 1
