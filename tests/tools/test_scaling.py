"""The scaling job: one answer for any number of workers, figures that add up, and clear refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from faceflow.cli.main import main
from faceflow.cluster.step_records import Step
from faceflow.runs.status import record_of
from faceflow.storage.manifests import StepRecord
from faceflow.tools.datasets.synthesize import synthesize
from faceflow.tools.plan import costs
from faceflow.tools.scaling import measure
from faceflow.tools.scaling.predict import Run, predict

pytestmark = pytest.mark.usefixtures("ray_session")


def test_it_runs_the_grid_and_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "SHORTEST_SECONDS", 0.0)  # these runs take a second, or less
    synthesize(str(tmp_path / "in"), 3_000, dim=32, mean_size=15)
    out = tmp_path / "out"
    command = ["scaling", str(tmp_path / "in"), "--output", str(out), "--workers", "1,2", "--faces", "1k,3000"]
    assert main([*command, "--repeats", "2", "--predict", "8:1M", "--quiet"]) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "scaling.json").read_text())
    assert sorted((run["faces"], run["workers"]) for run in results["runs"]) == sorted(
        [(1000, 1), (1000, 2), (3000, 1), (3000, 2)] * 2
    )
    for run in results["runs"]:
        stages = sum(value for stage, value in run["seconds"].items() if stage != "total")
        assert 0 < stages <= run["seconds"]["total"] + 0.01
        assert run["steps"]["search"]
    with open(out / "scaling.csv") as file:
        assert len(list(csv.DictReader(file))) == 8
    with Image.open(out / "scaling.png") as image:
        assert image.width > 1000
    assert (out / "reading.txt").read_text().strip() in printed
    assert printed.count("efficiency") == 7  # of each stage, and of all
    assert "Projected, not measured: 1,000,000 faces, 8 workers" in printed
    # Only what was asked for stays.
    assert sorted(path.name for path in out.iterdir()) == [
        "inputs",
        "reading.txt",
        "scaling.csv",
        "scaling.json",
        "scaling.png",
    ]


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthesize(str(tmp_path / "in"), 500, dim=16)
    for flags, said in (
        (["--faces", "600"], "holds 500 rows"),
        (["--faces", "many"], "is not a number"),
        (["--workers", "0"], "must be 1 or more"),
        (["--workers", "1,64"], "has 2"),
    ):
        assert main(["scaling", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *flags]) == 2
        assert said in capsys.readouterr().err


def step(label: str, tasks: int, busy: float, seconds: float) -> StepRecord:
    usage = Step(label, tasks, seconds=seconds, busy_seconds=busy, longest_seconds=busy / tasks)
    return record_of(usage)


def test_projections_divide_what_can_be_divided() -> None:
    seconds = {"ingest": 0.0, "quantize": 0.0, "search": 41.0, "link": 10.0, "detect": 20.0, "publish": 0.0, "total": 72.0}
    steps = {"search": [step("search", 16, 80.0, 40.0)], "detect": [step("detect", 1, 20.0, 20.0)]}
    load = costs.Workload(
        1_000_000, 256, 90, 90, 0.05, 10_000, 2_000, 4, 32_768, 1_000, 5, 64, 16_384, True, True, 8, 2, 2, 8e10
    )
    runs = [Run(1_000_000, 2, repeat, seconds, steps, 0, load) for repeat in range(3)]
    four, sixteen, many = (item.seconds for item in predict(runs, [(4, 1_000_000), (16, 1_000_000), (1000, 1_000_000)]))
    assert four == pytest.approx(1 + 20 + 30 + 1)  # half the search, all of link and detect, and what lies outside stages
    assert sixteen == many == pytest.approx(1 + 5 + 30 + 1)  # never faster than the longest task
    (same,) = predict(runs, [(2, 1_000_000)])
    assert (same.low, same.seconds, same.high) == (72.0, 72.0, 72.0)
    # Detection grows a little faster than the faces, the search faster than that.
    (five,) = predict(runs, [(2, 5_000_000)])
    assert 5 * 72 < five.seconds < 15 * 72
