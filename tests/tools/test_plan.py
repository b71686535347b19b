"""The forecast against what a run then does, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from faceflow import ClusterConfig, run_clustering
from faceflow.cli.main import main
from faceflow.tools.datasets.synthesize import synthesize
from faceflow.tools.plan import costs
from faceflow.tools.plan.forecast import plan_run
from tests.conftest import write_faces

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.mark.parametrize("order", ["shuffled", "sorted by person"])
def test_the_plan_predicts_what_the_run_finds(tmp_path: Path, order: str) -> None:
    """Neighbors, edges and threshold, although only a part of the faces is looked at, and whatever the order of the file."""
    rng = np.random.default_rng(3)
    people, item = 3_000, 24
    labels = np.repeat(np.arange(people), item)
    if order == "shuffled":
        labels = rng.permutation(labels)
    centers = rng.standard_normal((people, 48))
    x = centers[labels] + 0.55 * rng.standard_normal((len(labels), 48))
    source = write_faces(
        tmp_path / "in" / "f.parquet", x.astype(np.float32), pa.array(labels * 0 + np.arange(len(labels))), row_group_size=600
    )
    config = ClusterConfig(str(source), str(tmp_path / "out"))
    results = plan_run(config)
    assert 0.4 < results.sampled / results.faces < 1
    result = run_clustering(config, progress=False, report=False)
    assert result.similarity_threshold is not None
    assert results.similarity_threshold == pytest.approx(result.similarity_threshold, abs=0.03)
    assert results.edges == pytest.approx(result.edges, rel=0.1)
    assert results.faces == result.faces
    assert results.seconds["total"] > 0
    assert not results.problems


@pytest.mark.parametrize("k", [20, 200])
def test_the_cap_on_neighbors_holds_face_by_face(face_data: Path, tmp_path: Path, k: int) -> None:
    """A real long tail, in a file that is sorted by person: most have one photo, one has 530."""
    config = ClusterConfig(str(face_data / "lfw_mobilefacenet128.parquet"), str(tmp_path / "out"), neighbors=k, min_recall=0.0)
    results = plan_run(config)
    result = run_clustering(config, progress=False, report=False)
    assert results.similarity_threshold == pytest.approx(result.similarity_threshold, abs=0.02)
    assert results.edges == pytest.approx(result.edges, rel=0.1)


def test_a_run_that_cannot_fit_is_refused_with_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesize(str(tmp_path / "in"), 3_000, dim=32)
    assert main(["plan", str(tmp_path / "in"), str(tmp_path / "out"), "--json"]) == 0
    fits = json.loads(capsys.readouterr().out)
    assert fits["problems"] == []
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(costs, "GRAPH_BYTES", 10**8)
    monkeypatch.setattr(costs, "ROW_DISK", 10**9)
    assert main(["plan", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert "--detect-resource" in printed.err
    assert "--work-dir" in printed.err
    assert "3,000 faces" in printed.out


def test_bad_input_is_refused_as_a_run_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    source = write_faces(tmp_path / "zeros.parquet", np.zeros((50, 8), np.float32))
    assert main(["plan", str(source)]) == 2
    assert "none of the rows looked at can be used" in capsys.readouterr().err


def test_more_of_anything_takes_longer() -> None:
    base = costs.Workload(
        1_000_000, 256, 90, 90, 0.05, 10_000, 2_000, 4, 32_768, 1_000, 5, 64, 16_384, True, True, 8, 2, 2, 8e10
    )
    total = sum(costs.stage_seconds(base).values())
    for change in (
        {"faces": 2_000_000},
        {"dim": 512},
        {"neighbors": 180},
        {"edges": 180},
        {"flops": 4e10},
        {"native": False},
        {"single": 0.3},
    ):
        worse = costs.Workload(**{**vars(base), **change})
        assert sum(costs.stage_seconds(worse).values()) > total, change
    faster = costs.Workload(**{**vars(base), "workers": 8})
    assert sum(costs.stage_seconds(faster).values()) < total
    assert costs.stage_seconds(faster)["detect"] == costs.stage_seconds(base)["detect"]
