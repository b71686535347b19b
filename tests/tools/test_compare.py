"""`compare`: one run, every method, one table; and a method in the place of the map equation."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow.cli.main import main
from faceflow.config import METHODS
from faceflow.errors import InputError
from faceflow.kernels.methods import registry
from faceflow.tools import compare
from faceflow.tools.datasets.convert import import_neighbors
from faceflow.tools.datasets.synthesize import synthesize
from faceflow.tools.evaluate import evaluate


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    synthesize(str(folder / "faces"), 3_000, dim=64, mean_size=20)
    return folder


def test_every_method_is_scored_and_its_labels_are_kept(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.METHODS, "cdp", registry.Method(registry.METHODS["cdp"].run, "too small a limit", 2_999))
    faces, out = str(made / "faces"), made / "out"
    command = ["compare", faces, faces, "--output", str(out), "--json", "--quiet", "--methods", ",".join(METHODS)]
    assert main(command) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = Path(results["folder"])
    rows = {row["method"]: row for row in results["rows"]}
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


def test_methods_that_need_the_number_of_clusters_run_only_on_request(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(executor: object, request: compare.RunMethod) -> compare.Row:
        ran.append(request.name)
        return compare.Row(request.name, skipped="not run")

    monkeypatch.setattr(compare, "_run", run)
    faces = str(made / "faces")
    assert main(["compare", faces, faces, "--output", str(made / "out"), "--quiet"]) == 0
    assert ran == [name for name in METHODS if name != "minibatch-kmeans"]


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


def test_a_published_neighbor_table(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pq.read_table(made / "faces")
    x = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    product = x @ x.T
    nearest = np.argsort(-product, axis=1)[:, :30]
    data = np.stack([nearest, 1 - np.take_along_axis(product, nearest, 1)], axis=1).astype(np.float32)
    data[7, 0, 29], data[8, :, 29] = -1, data[8, :, 28]  # one is absent, one named twice
    np.savez_compressed(tmp_path / "faiss_k_30.npz", data=data)
    pq.write_table(table.set_column(0, "id", pa.array(np.arange(len(table)))), tmp_path / "truth.parquet")
    offsets, rows, values = import_neighbors(str(tmp_path / "faiss_k_30.npz"))
    assert np.diff(offsets).tolist() == [28 if i in (7, 8) else 29 for i in range(len(table))]
    np.testing.assert_array_equal(rows[:29], nearest[0][nearest[0] != 0])
    np.testing.assert_allclose(values[:29], product[0][rows[:29]], atol=1e-5)
    flags = ["--output", str(tmp_path / "out"), "--quiet", "--methods", "infomap,dpc,hac-average"]
    arguments = ["compare", str(tmp_path / "faiss_k_30.npz"), str(tmp_path / "truth.parquet"), *flags]
    assert main([*arguments, "--min-similarity", "0.6", "--json"]) == 0
    results = {row["method"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert results["infomap"]["pairwise_f"] > 0.8
    assert results["dpc"]["pairwise_f"] > 0.8
    assert "needs the embeddings" in results["hac-average"]["skipped"]
    assert main(arguments) == 2
    assert "give --min-similarity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((4, 3, 2), np.float32), "a neighbor table is floats"),
        (np.full((4, 2, 2), 9, np.float32), "neighbor 0 of face 0 is 9.0"),
        (np.full((4, 2, 2), np.nan, np.float32), "neighbor 0 of face 0 is nan"),
    ],
)
def test_tables_that_are_none_are_refused(tmp_path: Path, data: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "t.npz", data=data)
    with pytest.raises(InputError, match=message):
        import_neighbors(str(tmp_path / "t.npz"))
    np.savez(tmp_path / "u.npz", other=data)
    with pytest.raises(InputError, match="only other"):
        import_neighbors(str(tmp_path / "u.npz"))
    (tmp_path / "v.npz").write_bytes((tmp_path / "t.npz").read_bytes()[:40])
    with pytest.raises(InputError, match="cannot read"):
        import_neighbors(str(tmp_path / "v.npz"))


def test_a_table_of_skipped_methods_is_a_table() -> None:
    rows = [compare.Row("leiden", skipped="leidenalg is missing")]
    assert "leidenalg is missing" in compare.table(rows)
    assert compare._plot(rows) is None
