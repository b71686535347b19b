"""Every kind of bad input through the command line: exit code 2, the exact message, nothing published, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow.cli.main import main
from tests.conftest import ROOT, write_faces

pytestmark = pytest.mark.usefixtures("ray_session")

NOTHING = "nothing was published"
FIX = f"Fix or remove them, or pass --bad-rows quarantine; {NOTHING}"


def table(**columns: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        pq.write_table(pa.table(columns), folder / "a.parquet")

    return write


def rows(*embeddings: Any, ids: Any = None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        names = pa.array([f"f{i}" for i in range(len(embeddings))]) if ids is None else pa.array(ids, pa.string())
        write_faces(folder / "a.parquet", pa.array(list(embeddings), pa.list_(pa.float32())), names)

    return write


def two_files(first: Any, second: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_faces(folder / "a.parquet", *first)
        write_faces(folder / "b.parquet", *second)

    return write


def damaged(damage: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = write_faces(
            folder / "a.parquet", np.random.default_rng(0).random((4000, 8), np.float32), write_page_checksum=True
        )
        path.write_bytes(damage(path.read_bytes()))

    return write


def linked_to_nothing(folder: Path) -> None:
    (folder / "a.parquet").symlink_to(folder / "gone.parquet")


def linked_to_a_folder(folder: Path) -> None:
    write_faces(folder.parent / "elsewhere" / "b.parquet", np.ones((3, 2), np.float32))
    write_faces(folder / "a.parquet", np.ones((3, 2), np.float32))
    (folder / "more").symlink_to(folder.parent / "elsewhere")


def beside_a_note(folder: Path) -> None:
    write_faces(folder / "a.parquet", np.ones((3, 2), np.float32))
    (folder / "notes.txt").write_text("not faces")


def of_nothing(folder: Path) -> None:
    write_faces(folder / "a.parquet", np.ones((0, 2), np.float32), pa.array([], pa.string()))


NAN, INF = float("nan"), float("inf")
ONES = np.ones((3, 2), np.float32)

CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing column": (table(id=["a"], embeding=[[1.0]]), "{a} has no column 'embedding'; did you mean 'embeding'? (set --embedding-column)"),
    "missing id column": (table(face=["a"], embedding=[[1.0]]), "{a} has no column 'id'; known: embedding, face (set --id-column)"),
    "wrong type of id": (table(id=[1.5], embedding=[[1.0]]), "{a}: column 'id' is double; an id must be a string, an integer or binary: cast it to a string or an integer"),
    "wrong type of embedding": (table(id=["a"], embedding=["x"]), "{a}: column 'embedding' is string; an embedding must be a list of float16, float32 or float64"),
    "dimension between rows": (rows([1, 2], [1, 2, 3]), "1 of 2 rows cannot be used:\n  {a}, row 1: the embedding has dimension 3, but the first one has 2\n" + FIX),
    "dimension between files": (two_files((ONES,), (np.ones((1, 3), np.float32), pa.array(["z"]))), "embeddings have dimension 2 in {a} but 3 in {b}: cluster the output of one model at a time"),
    "types of ids between files": (two_files((ONES,), (ONES, pa.array([7, 8, 9]))), "ids are string in {a} but int64 in {b}: make them one type"),
    "empty list": (rows([1, 2], []), "1 of 2 rows cannot be used:\n  {a}, row 1: the embedding is empty\n" + FIX),
    "null embedding": (rows(None, [1, 2]), "1 of 2 rows cannot be used:\n  {a}, row 0: the embedding is null\n" + FIX),
    "null id": (rows([1, 2], [2, 1], ids=["x", None]), "1 of 2 rows cannot be used:\n  {a}, row 1: the id is null: every face needs one\n" + FIX),
    "nan": (rows([1, 2], [NAN, 1]), "1 of 2 rows cannot be used:\n  {a}, row 1: the embedding contains a NaN or an infinity\n" + FIX),
    "infinity": (rows([1, 2], [1, -INF]), "1 of 2 rows cannot be used:\n  {a}, row 1: the embedding contains a NaN or an infinity\n" + FIX),
    "zeros": (rows([1, 2], [0, 0]), "1 of 2 rows cannot be used:\n  {a}, row 1: the embedding contains only zeros: it has no direction\n" + FIX),
    "repeated id": (rows([1, 2], [2, 1], ids=["x", "x"]), "1 of 2 rows cannot be used:\n  {a}, row 1: the id occurred before: ids must be unique\n" + FIX),
    "repeated id in another file": (two_files((ONES,), (ONES[:1], pa.array(["face-2"]))), "1 of 4 rows cannot be used:\n  {b}, row 0: the id occurred before: ids must be unique\n" + FIX),
    "only empty lists": (rows([], None), "column 'embedding' holds no embedding at all: every one is null or empty"),
    "empty file": (damaged(lambda data: b""), "cannot read {a}: Parquet file size is 0 bytes"),
    "truncated": (damaged(lambda data: data[: len(data) // 2]), "cannot read {a}: Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file."),
    "corrupted page": (damaged(lambda data: data[:60_000] + bytes(100) + data[60_100:]), "cannot read {a}: "),
    "no Parquet inside": (lambda folder: (folder / "a.parquet").write_bytes(b"id,embedding\n" * 9) and None, "cannot read {a}: Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file."),
    "link to nothing": (linked_to_nothing, "{a} is a link to a file that is not there: restore it or remove the link"),
    "link to a folder": (linked_to_a_folder, "{in}/more is a link to a folder, and those are not followed: name the folder itself as input, or put the files, or links to them, in its place"),
    "file of another kind": (beside_a_note, "{in}/notes.txt is not a Parquet file (its name does not end in .parquet, .pq or .parq): move it away, or name the files with a glob"),
    "no rows": (of_nothing, "input {in} has no rows in its 1 Parquet file(s)"),
    "empty folder": (lambda folder: None, "input {in} holds no Parquet file"),
}  # fmt: skip
# ruff: noqa: E501 - one line a case reads best


@pytest.mark.parametrize("case", CASES)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    write, message = CASES[case]
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder)
    assert main(["cluster", str(folder), str(tmp_path / "out"), "--quiet"]) == 2
    message = message.replace("{a}", f"{folder}/a.parquet").replace("{b}", f"{folder}/b.parquet").replace("{in}", str(folder))
    said = capsys.readouterr().err
    if message.endswith(": "):  # the rest is pyarrow's, or the system's
        assert said.startswith(f"error: {message}")
        assert len(said.splitlines()) == 1
    else:
        assert said == f"error: {message}\n"
    assert not (tmp_path / "out" / "latest.json").exists()
    assert not (tmp_path / "out" / "labels").exists()


def test_output_inside_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_faces(tmp_path / "in" / "a.parquet", ONES)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for output in (tmp_path / "in" / "out", tmp_path / "in", tmp_path / "link" / "out"):
        assert main(["cluster", str(tmp_path / "in"), str(output), "--quiet"]) == 2
        expected = f"OUTPUT {output} lies inside INPUT {tmp_path / 'in'}: labels would become input; choose another place"
        assert capsys.readouterr().err == f"error: {expected}\n"
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["a.parquet"]


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_faces(tmp_path / "in" / "a.parquet", ONES)
    (tmp_path / "file").write_text("x")
    assert main(["cluster", str(tmp_path / "in"), str(tmp_path / "file" / "out"), "--quiet"]) == 2
    assert capsys.readouterr().err == f"error: cannot write to {tmp_path / 'file' / 'out'}: Not a directory\n"


def test_files_that_may_not_be_read_or_written(tmp_path: Path) -> None:
    """As another user, since root may read everything."""
    if os.geteuid() != 0:
        pytest.skip("takes root, to become another user")
    write_faces(tmp_path / "in" / "a.parquet", ONES).chmod(0o600)
    (tmp_path / "out").mkdir(mode=0o755)
    script = (
        "import os; from faceflow.storage import inputs; from faceflow.storage.object_store import Store\n"
        "Store.at('/').fs; os.chdir('/'); os.setuid(65534)\n"
        f"store, found = inputs.list_parquet({str(tmp_path / 'in')!r}, None)\n"
        "from faceflow.stages.ingest.parquet_input import Columns, ReadFooters, read_footers\n"
        "try: read_footers(ReadFooters(store, tuple(f.path for f in found), Columns('id', 'embedding', None)))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        f"try: Store.at({str(tmp_path / 'out')!r}).check_writable()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    for folder in [tmp_path, *tmp_path.parents][:-2]:
        folder.chmod(folder.stat().st_mode | 0o055)
    env = {"PYTHONPATH": str(ROOT / "lib"), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60, check=False)
    first, second = done.stdout.splitlines()
    assert first.startswith(f"InputError cannot read {tmp_path}/in/a.parquet: ")
    assert first.endswith("Permission denied"), done.stderr
    assert second == f"SettingsError cannot write to {tmp_path}/out: Permission denied"


@pytest.mark.parametrize(("count", "clusters"), [(1, 1), (40, 1)])
def test_a_single_row_and_identical_rows(tmp_path: Path, count: int, clusters: int, capsys: pytest.CaptureFixture[str]) -> None:
    write_faces(tmp_path / "in" / "a.parquet", np.ones((count, 4), np.float32))
    for index in ("exact", "cells"):
        if index == "cells" and count == 1:
            continue
        flags = ["--index", index, "--quiet"]
        assert main(["cluster", str(tmp_path / "in"), str(tmp_path / index), *flags]) == 0, capsys.readouterr().err
        results = pq.read_table(next((tmp_path / index / "labels").rglob("part-*.parquet")), partitioning=None)
        assert results["cluster"].to_pylist() == [0] * count
        assert len(set(results["cluster"].to_pylist())) == clusters
