"""Adoption in whole runs: poor photos go to their person, strangers stay alone, whoever does the work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow import ClusterConfig, run_clustering
from faceflow.stages.artifacts.faces import RunData
from faceflow.stages.detect import singletons
from faceflow.storage.object_store import Store
from faceflow.tables import Parts
from faceflow.tools.datasets.synthesize import synthesize
from faceflow.tools.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("ray_session")


def labels(output: Path) -> pa.Table:
    pointer = json.loads((output / "latest.json").read_text())
    return pa.concat_tables([pq.read_table(f, partitioning=None) for f in sorted((output / pointer["labels"]).iterdir())])


def run(source: Path, output: Path, **settings: object) -> dict[str, int]:
    result = run_clustering(ClusterConfig(str(source), str(output), **settings), progress=False, report=False)  # type: ignore[arg-type]
    return json.loads((output / "_runs" / result.run_id / "manifests" / "detect.json").read_text())["result"]


def test_poor_photos_are_given_to_their_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in"
    synthesize(str(source), 12_000, look="ms1m", mean_size=40)
    counts = run(source, tmp_path / "auto", workers=1)
    assert counts["assigned"] > 0.5 * counts["singletons"] > 50
    plain = run(source, tmp_path / "never", assign_singletons="never")
    assert (plain["singletons"], plain["assigned"]) == (0, 0)
    assert plain["codelength"] == counts["codelength"]
    before, after = (evaluate(str(tmp_path / name), str(source)) for name in ("never", "auto"))
    assert after.bcubed_f > before.bcubed_f + 0.02
    assert after.pairwise_precision > before.pairwise_precision - 0.005
    # Only faces that stood alone have moved, and nearly all to the right person.
    alone = labels(tmp_path / "never")["cluster"].to_numpy()
    moved = np.bincount(alone)[alone] == 1
    truth = pq.read_table(source)["label"].to_numpy()
    now = labels(tmp_path / "auto")["cluster"].to_numpy()
    taken = moved & (np.bincount(now)[now] > 1)
    assert taken.sum() == counts["assigned"]
    main = {cluster: np.bincount(truth[now == cluster]).argmax() for cluster in np.unique(now[taken])}
    assert np.mean([main[cluster] == who for cluster, who in zip(now[taken], truth[taken], strict=True)]) > 0.95
    # The same for two workers, for blocks of another size, and after a try on a part.
    monkeypatch.setattr(singletons, "TRIED_FIRST", 100)
    run(source, tmp_path / "two", workers=2)
    assert labels(tmp_path / "two").equals(labels(tmp_path / "auto"))


@pytest.mark.parametrize("name", ["lfw_mobilefacenet128", "lfw_dlib128", "celeba_dev_mobilefacenet128"])
def test_strangers_stay_alone(face_data: Path, tmp_path: Path, name: str) -> None:
    """Thousands of people of one photo, and not one of them is given to somebody."""
    counts = run(face_data / f"{name}.parquet", tmp_path / "out")
    assert counts["singletons"] > 2_000
    assert counts["assigned"] <= 0.002 * counts["singletons"]


def test_a_given_threshold_keeps_the_graphs_own_clusters(face_data: Path, tmp_path: Path) -> None:
    source = face_data / "celeba_dev_mobilefacenet128.parquet"
    assert run(source, tmp_path / "given", min_similarity=0.49)["singletons"] == 0
    assert run(source, tmp_path / "asked", min_similarity=0.49, assign_singletons="always")["singletons"] > 0


def test_faces_that_stand_alone_are_not_all_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, begun, done = Parts(tuple(range(101))), [], []
    monkeypatch.setattr(singletons, "read_vectors", lambda run, part, dim: begun.append(part) or np.ones((1, dim), np.float32))

    def margins(faces: np.ndarray, people: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert len(begun) - len(done) <= 8
        done.append(1)
        return np.zeros(len(faces), np.int64), np.ones(len(faces))

    monkeypatch.setattr(singletons.singletons, "margins", margins)
    nearest, _ = singletons._compare(RunData(Store.at("nowhere"), parts, 4), np.arange(100), np.ones((3, 4), np.float32), 2)
    assert len(nearest) == len(begun) == 100
