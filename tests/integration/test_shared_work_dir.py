"""Several OUTPUTs with one folder of run directories: each command touches the runs of its own OUTPUT only."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from faceflow import ClusterConfig, run_clustering, run_nightly
from faceflow.cli.main import main
from faceflow.errors import InputError, SettingsError
from faceflow.runs import housekeeping
from faceflow.runs.status import status
from faceflow.storage import layout
from tests.conftest import write_faces

pytestmark = pytest.mark.usefixtures("ray_session")


def faces(folder: Path, seed: int) -> str:
    rng = np.random.default_rng(seed)
    x = np.repeat(rng.standard_normal((10, 16)), 8, axis=0) + 0.2 * rng.standard_normal((80, 16))
    write_faces(folder / "a.parquet", x.astype(np.float32), pa.array(np.arange(80)))
    return str(folder)


def config(tmp_path: Path, name: str, **more: object) -> ClusterConfig:
    source = str(tmp_path / f"in-{name}")
    plain = {"work_dir": str(tmp_path / "work"), "min_similarity": 0.5, "edges": "threshold"}
    return ClusterConfig(source, str(tmp_path / f"out-{name}"), **(plain | more))  # type: ignore[arg-type]


def age(run: Path, hours: float) -> None:
    """Have a run say that it was last heard of so long ago."""
    then = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=hours)).isoformat()
    for name in (layout.RUN_RECORD, layout.PROGRESS):
        if (run / name).exists():
            (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | {"updated": then}))


def test_clean_and_runs_and_status_know_their_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        faces(tmp_path / f"in-{name}", ord(name))
    a = run_nightly(config(tmp_path, "a"), progress=False, report=False)
    b = [run_clustering(config(tmp_path, "b", run_id=f"b{i}"), progress=False, report=False) for i in range(3)]
    work = str(tmp_path / "work")
    for run in (tmp_path / "work").iterdir():
        age(run, 48)
    listed = housekeeping.list_runs(str(tmp_path / "out-b"), work)
    assert {run.run_id for run in listed} == {"b0", "b1", "b2"}
    assert status(str(tmp_path / "out-a"), work_dir=work).run_id == a.run_id
    with pytest.raises(InputError, match=rf"has no run {a.run_id}"):
        status(str(tmp_path / "out-b"), a.run_id, work_dir=work)
    removed = housekeeping.clean(str(tmp_path / "out-b"), 0, work)
    assert {run.run_id for run in removed} == {"b0", "b1"}
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == sorted([a.run_id, b[-1].run_id])
    # So that A's clusters keep their ids.
    write_faces(tmp_path / "in-a" / "b.parquet", np.random.default_rng(9).standard_normal((4, 16)).astype(np.float32),
                pa.array(np.arange(100, 104)))  # fmt: skip
    again = run_nightly(config(tmp_path, "a"), progress=False, report=False)
    counts = json.loads((tmp_path / "work" / again.run_id / "manifests" / "ingest.json").read_text())["result"]
    assert (counts["changes"]["added"], counts["faces"]) == (4, 84)


def test_an_unfinished_run_of_another_output_is_neither_continued_nor_given_up(tmp_path: Path) -> None:
    for name in ("a", "b"):
        faces(tmp_path / f"in-{name}", 1)
    a = run_nightly(config(tmp_path, "a"), progress=False, report=False)
    unfinished = tmp_path / "work" / "a-unfinished"
    unfinished.mkdir()
    record = json.loads((tmp_path / "work" / a.run_id / "run.json").read_text())
    record |= {"state": "begun", "incremental": {"base": a.run_id, "files": "others"}}
    (unfinished / "run.json").write_text(json.dumps(record))
    age(unfinished, 48)
    before = (unfinished / "run.json").read_text()
    b = run_nightly(config(tmp_path, "b"), progress=False, report=False)
    assert b.run_id != "a-unfinished"
    assert (unfinished / "run.json").read_text() == before
    with pytest.raises(SettingsError, match=r"run a-unfinished of .* is of another OUTPUT, .*out-a: choose another --run-id"):
        run_clustering(config(tmp_path, "b", run_id="a-unfinished"), progress=False, report=False)
    # An incremental run of its own OUTPUT does give it up.
    write_faces(tmp_path / "in-a" / "b.parquet", np.eye(4, 16, dtype=np.float32), pa.array(np.arange(100, 104)))
    run_nightly(config(tmp_path, "a"), progress=False, report=False)
    assert json.loads((unfinished / "run.json").read_text())["state"] == "superseded"


def test_an_output_that_was_moved_keeps_its_runs(tmp_path: Path) -> None:
    faces(tmp_path / "in-a", 1)
    first = run_nightly(config(tmp_path, "a", work_dir=None), progress=False, report=False)
    (tmp_path / "out-a").rename(tmp_path / "moved")
    assert [run.run_id for run in housekeeping.list_runs(str(tmp_path / "moved"))] == [first.run_id]
    assert main(["status", str(tmp_path / "moved")]) == 0
    # Another OUTPUT whose runs lie in the first one's folder does not own those.
    other = config(tmp_path, "b", work_dir=str(tmp_path / "moved" / "_runs"))
    faces(tmp_path / "in-b", 2)
    run_clustering(other, progress=False, report=False)
    assert len(housekeeping.list_runs(str(tmp_path / "out-b"), other.work_dir)) == 1
    assert len(housekeeping.list_runs(str(tmp_path / "moved"))) == 1


def test_an_incremental_run_whose_base_lacks_files_runs_in_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    faces(tmp_path / "in-a", 1)
    first = run_nightly(config(tmp_path, "a"), progress=False, report=False)
    run = tmp_path / "work" / first.run_id
    (run / "vectors" / "part-00000.arrow").unlink()
    write_faces(tmp_path / "in-a" / "b.parquet", np.eye(4, 16, dtype=np.float32), pa.array(np.arange(100, 104)))
    second = run_nightly(config(tmp_path, "a"), progress=False, report=False)
    assert second.faces == 84
    assert "is not complete (vectors/part-00000.arrow is missing)" in caplog.text


def test_clean_removes_what_killed_writers_left(tmp_path: Path) -> None:
    faces(tmp_path / "in-a", 1)
    run = run_clustering(config(tmp_path, "a"), progress=False, report=False)
    left = [tmp_path / "work" / run.run_id / "vectors" / ".tmp-part-00000.arrow-aa", tmp_path / "out-a" / "labels" / ".tmp-x"]
    fresh = tmp_path / "out-a" / "labels" / ".tmp-fresh"
    for path in (*left, fresh):
        path.write_bytes(b"half")
    import os
    import time

    for path in left:
        os.utime(path, (time.time() - 100_000,) * 2)
    assert main(["clean", str(tmp_path / "out-a"), "--work-dir", str(tmp_path / "work"), "--keep", "0"]) == 0
    assert not any(path.exists() for path in left)
    assert fresh.exists()
