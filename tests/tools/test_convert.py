"""Files of the literature's benchmarks, as Parquet; sizes that do not fit are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from faceflow.cli.main import main
from faceflow.tools.datasets.convert import import_faces


def files(folder: Path, faces: int = 20_000, dim: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((faces, dim)).astype(np.float32), rng.integers(0, 50, faces)
    features.tofile(folder / "f.bin")
    (folder / "f.meta").write_text("".join(f"{label}\n" for label in labels))
    np.save(folder / "f.npy", features.astype(np.float64))
    np.save(folder / "l.npy", labels)
    return features, labels


@pytest.mark.parametrize(("features", "labels", "dim"), [("f.bin", "f.meta", 8), ("f.npy", "l.npy", None), ("f.npy", None, 8)])
def test_imports(tmp_path: Path, features: str, labels: str | None, dim: int | None) -> None:
    x, truth = files(tmp_path)
    labels_file = str(tmp_path / labels) if labels else None
    made = import_faces(str(tmp_path / features), str(tmp_path / "out"), labels=labels_file, dim=dim)
    assert made == {"faces": 20_000, "identities": 50 if labels else 0, "files": 1}
    table = pq.read_table(tmp_path / "out")
    assert table["id"].to_pylist() == list(range(20_000))
    np.testing.assert_array_equal(table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 8), x)
    if labels:
        np.testing.assert_array_equal(table["label"].to_numpy(), truth)
    else:
        assert table.column_names == ["id", "embedding"]


def _long(folder: Path) -> None:
    with (folder / "f.meta").open("a") as file:
        file.write("3\n")


def _wordy(folder: Path) -> None:
    (folder / "f.meta").write_text("1\ntwo\n")


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (None, ["--dim", "7", "--labels", "f.meta"], "f.bin has 640,000 bytes: not a multiple of 28"),
        (None, ["--labels", "f.meta"], "--dim is missing"),
        (_long, ["--dim", "8", "--labels", "f.meta"], "f.meta has 20,001 labels, but there are 20,000 faces"),
        (_wordy, ["--dim", "8", "--labels", "f.meta"], "f.meta, line 2: 'two' is no integer"),
        (None, ["--dim", "8", "--labels", "none.meta"], "none.meta: No such file or directory"),
        (None, ["--dim", "8", "--labels", "f.npy"], "f.npy is an array float64[20000, 8]: labels are integers"),
    ],
)
def test_refuses_what_does_not_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: object,
    flags: list[str],
    message: str,
) -> None:
    files(tmp_path)
    if callable(spoil):
        spoil(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["import", "f.bin", "out", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_never_loads_a_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "f.npy", np.array([{"a": 1}], object), allow_pickle=True)
    assert main(["import", str(tmp_path / "f.npy"), str(tmp_path / "out")]) == 2
    assert "cannot read" in capsys.readouterr().err
    np.savez(tmp_path / "f.npz", a=np.zeros(3))
    (tmp_path / "f.npz").rename(tmp_path / "g.npy")
    assert main(["import", str(tmp_path / "g.npy"), str(tmp_path / "out")]) == 2
    assert "archive of several arrays" in capsys.readouterr().err
