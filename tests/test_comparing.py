"""`compare`: one run, every method, one table; and a method in the place of the map equation."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from faceflow import comparing
from faceflow.cli import main
from faceflow.config import METHODS
from faceflow.evaluation import evaluate
from faceflow.kernels import methods
from faceflow.synthesis import synthesize


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    synthesize(str(folder / "faces"), 3_000, dim=64, mean_size=20)
    return folder


def test_every_method_is_scored_and_its_labels_are_kept(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(methods.METHODS, "cdp", methods.Method(methods.METHODS["cdp"].run, "too small a limit", 2_999))
    faces, out = str(made / "faces"), made / "out"
    assert main(["compare", faces, faces, "--output", str(out), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = Path(found["folder"])
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == list(METHODS)
    assert "not run above 2,999 faces" in rows.pop("cdp")["skipped"]
    with open(folder / "table.csv") as file:
        assert [line["method"] for line in csv.DictReader(file)] == list(METHODS)
    text = (folder / "table.txt").read_text()
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    for name, row in rows.items():
        scores = evaluate(str(folder / f"labels-{name}.parquet"), faces)
        assert row["skipped"] == ""
        assert (row["pairwise_f"], row["bcubed_recall"], row["clusters"]) == (
            scores.pairwise_f, scores.bcubed_recall, scores.clusters,
        )  # fmt: skip
        assert f"{scores.bcubed_f:.4f}" in text
        assert row["seconds"] >= 0
        assert row["peak_memory_bytes"] > 2**26
    # The map equation on the run's own graph is what the run published.
    published = evaluate(str(out), faces)
    assert rows["infomap"]["pairwise_f"] == pytest.approx(published.pairwise_f, abs=0.002)
    assert rows["hac-single"]["clusters"] == rows["components"]["clusters"]


def test_a_method_in_place_of_the_map_equation(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--json", "--quiet", "--method"]
    assert main(["cluster", str(made / "faces"), str(made / "dpc"), *flags, "dpc"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    labels = pq.read_table(str(made / "dpc" / "labels" / f"run={result['run_id']}"), partitioning=None)
    assert len(labels) == 3_000
    assert len(labels["cluster"].unique()) == result["clusters"] < 1_500
    assert result["codelength"] > 0
    assert evaluate(str(made / "dpc"), str(made / "faces")).pairwise_precision > 0.85


def test_what_cannot_be_compared_is_said_first(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faces, out = str(made / "faces"), str(made / "none")
    for flags, message in (
        (["--methods", "infomap,hac"], "unknown method 'hac'"),
        (["--label-column", "person"], "no column 'person'"),
    ):
        assert main(["compare", faces, faces, "--output", out, *flags]) == 2
        assert message in capsys.readouterr().err
    assert main(["cluster", faces, out, "--method", "minibatch-kmeans"]) == 2
    assert "set clusters" in capsys.readouterr().err
    assert not Path(out).exists()


def test_a_table_of_skipped_methods_is_a_table() -> None:
    rows = [comparing.Row("leiden", skipped="leidenalg is missing")]
    assert "leidenalg is missing" in comparing.table(rows)
    assert comparing._plot(rows) is None
