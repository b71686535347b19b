"""The lease on a run directory: what a process that was stalled can still write once another has taken its run over."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from faceflow.errors import RunError, SettingsError
from faceflow.runs.lease import FencedStore, claim, fence_off
from faceflow.storage.object_store import Store
from tests.conftest import ROOT, S3, write_faces
from tests.s3_faults import FaultyS3


@pytest.fixture(params=["disk", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return Store.at(str(tmp_path / "runs" / "r"))
    s3: S3 = request.getfixturevalue("s3")
    return Store.at(f"s3://faces/leases/{tmp_path.name}", s3.options)


def visible(run: Store) -> list[str]:
    """Names in a run directory, but for lock files."""
    return [name for name in run.names("") if not name.startswith(".")]


def test_a_stale_holder_writes_nothing_more(run: Store) -> None:
    first = claim(run, "r")
    fenced = FencedStore.of(run, first)
    fenced.write_json("kept.json", {"by": "first"})
    first.release()  # as where its threads stand still
    second = claim(run, "r")  # of the same process: a claim that does not wait
    assert second.token == first.token + 1
    second.write(stage="search")
    first._renewed -= 100  # what a suspended process finds when it goes on
    for write in (
        lambda: fenced.write_json("kept.json", {"by": "stale"}),
        lambda: fenced.child("more").write_bytes("x", b"stale"),
        lambda: fenced.replace_json("latest.json", {}, None),
        lambda: fenced.delete("kept.json"),
        lambda: fenced.share(run, "kept.json", "other.json"),
        lambda: first.write(stage="link"),
        first.check,
    ):
        with pytest.raises(RunError, match=r"run r was taken over by process .*: it writes nothing more"):
            write()
    assert run.read_json("kept.json") == {"by": "first"}
    assert visible(run) == ["kept.json", "progress.json"]
    state = run.read_json("progress.json")
    assert state is not None
    assert (state["token"], state["stage"]) == (second.token, "search")
    FencedStore.of(run, second).write_json("kept.json", {"by": "second"})
    second.release()


def test_a_file_begun_before_the_lease_was_lost_does_not_appear(tmp_path: Path) -> None:
    run = Store.at(str(tmp_path))
    first = claim(run, "r")

    def write_while_another_claims() -> None:
        with FencedStore.of(run, first).open_write("slow.bin") as file:
            file.write(b"half")
            first.release()
            claim(run, "r").release()
            first._renewed -= 100

    with pytest.raises(RunError):
        write_while_another_claims()
    assert visible(run) == ["progress.json"]


def test_a_superseded_run_is_fenced_off(tmp_path: Path) -> None:
    run = Store.at(str(tmp_path))
    stalled = claim(run, "r")
    stalled.release()
    assert fence_off(run, "r", "superseded")
    stalled._renewed -= 100
    with pytest.raises(RunError):
        stalled.check()


def test_heartbeats_go_on_while_the_driver_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faceflow.runs.lease.HEARTBEAT", 0.1)
    lease = claim(Store.at(str(tmp_path)), "r")
    first = lease._version
    time.sleep(0.6)
    assert lease._version != first
    lease.release()


def test_a_task_of_a_stale_holder_writes_nothing_more(run: Store) -> None:
    first = claim(run, "r")
    sent = pickle.loads(pickle.dumps(FencedStore.of(run, first).child("vectors")))
    sent.write_bytes("part-0", b"first")
    first.release()
    second = claim(run, "r")
    for write in (
        lambda: sent.write_bytes("part-1", b"stale"),
        lambda: sent.child("part").write_json("x.json", {}),
        lambda: sent.delete("part-0"),
        lambda: sent.share(run, "progress.json", "copy"),
    ):
        with pytest.raises(RunError, match="run r was taken over by another process: this task writes nothing more"):
            write()
    assert not run.exists("vectors/part-1")
    assert not run.exists("vectors/part/x.json")
    assert not run.exists("vectors/copy")
    assert run.read_bytes("vectors/part-0") == b"first"
    now = pickle.loads(pickle.dumps(FencedStore.of(run, second)))
    now.write_bytes("vectors/part-1", b"second")
    second.release()


def test_a_heartbeat_whose_answer_was_lost_is_the_holder_s_own(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The put arrives, its answer does not, and the holder asks again with the version that it knows."""
    lease = claim(run, "r")
    lease.release()
    known = lease._version
    lease.write(stage="search")
    lease._version = known
    lease.write(stage="link")  # finds its own
    lease.write(stage="detect")
    state = run.read_json("progress.json")
    assert state is not None
    assert (state["stage"], state["token"]) == ("detect", lease.token)
    # Not, where another has come between the look and the next write.
    other = claim(run, "r")
    lease._version = known
    with pytest.raises(RunError):
        lease.write(stage="publish")
    other.write(stage="ingest")
    other.release()


def test_a_store_without_conditional_writes_is_refused(s3: S3) -> None:
    with FaultyS3(s3.endpoint, rate=0.0, ignore_conditions=True) as proxy:
        careless = Store.at("s3://faces/careless", s3.options | {"endpoint_url": proxy.endpoint})
        with pytest.raises(SettingsError, match=r"s3://faces/careless ignores conditional writes .*: two runs could overwrite"):
            careless.check_conditional_writes()
    honest = Store.at("s3://faces/careless", s3.options)
    honest.check_conditional_writes()
    assert not any("condition" in path for path in honest.fs.find(honest.root))


def test_a_disk_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.at(str(tmp_path)).check_conditional_writes()
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    with pytest.raises(SettingsError, match="ignores file locks"):
        Store.at(str(tmp_path)).check_conditional_writes()


DRIVER = """
import sys
from faceflow.runs import lease
lease.SILENT_AFTER, lease.HEARTBEAT, lease.RENEW_BEFORE_WRITE = 3.0, 0.5, 1.0
from faceflow.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.timeout(300)
def test_a_driver_that_was_suspended_ends_once_another_has_its_run(tmp_path: Path) -> None:
    """A real one, stopped in mid-run as a suspended machine is: the second command finishes the run, the first one, woken, ends
    with exit code 3 and leaves everything as it is."""
    rng = np.random.default_rng(0)
    centers = np.repeat(rng.standard_normal((400, 64)), 20, axis=0)
    faces = (centers + 0.4 * rng.standard_normal(centers.shape)).astype(np.float32)
    write_faces(tmp_path / "in" / "a.parquet", faces, pa.array(np.arange(len(faces))))
    flags = ["cluster", str(tmp_path / "in"), str(tmp_path / "out"), "--run-id", "r", "--index", "cells", "--cells", "64"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "lib")}
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", DRIVER, *flags]
    first = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    manifests = tmp_path / "out" / "_runs" / "r" / "manifests"
    try:
        for _ in range(2_000):
            if (manifests / "ingest.json").exists() or first.poll() is not None:
                break
            time.sleep(0.02)
        assert first.poll() is None
        os.kill(first.pid, signal.SIGSTOP)
        time.sleep(3.5)
        second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
        assert second.returncode == 0, second.stderr
        whole = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
        os.kill(first.pid, signal.SIGCONT)
        _, said = first.communicate(timeout=100)
    finally:
        first.kill()
    assert first.returncode == 3, said
    assert "error: run r was taken over by process" in said
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    # Tasks that were under way when it was stopped may write a scratch file; what the run consists of stays.
    named = {path for name in manifests.glob("*.json") for path in json.loads(name.read_text()).get("files", {})}
    assert named
    for path, modified in whole.items():
        assert path.suffix == ".lock" or after.get(path) == modified, path
