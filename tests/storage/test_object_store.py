"""The store's promises, on a disk and on a real S3 server alike."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from faceflow.errors import FingerprintError, InputError, PublishError, RunError, SettingsError
from faceflow.storage import manifests
from faceflow.storage.inputs import contains, list_faces, list_parquet
from faceflow.storage.manifests import Manifest
from faceflow.storage.object_store import Store
from tests.conftest import write_faces


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return Store.at(str(tmp_path / "out"))
    s3 = request.getfixturevalue("s3")
    return Store.at(f"s3://faces/{tmp_path.name}", s3.options)


def test_a_full_disk_is_named_and_nothing_is_left(small_disk: Callable[[int], Path]) -> None:
    store = Store.at(str(small_disk(64)))
    store.write_bytes("a", b"x" * 20_000)
    with pytest.raises(
        RunError, match=r"the disk is full: .*small-disk/b needs more than [0-9,]+ bytes, and [0-9,]+ are free there"
    ):
        store.write_bytes("b", b"x" * 100_000)
    assert store.names("") == ["a"]
    assert not [p for p in Path(store.root).iterdir() if p.name != "a"]


def test_whole_or_not_at_all(store: Store) -> None:
    store.write_bytes("a/b", b"first")

    def half() -> None:
        with store.open_write("a/b") as file:
            file.write(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        half()
    assert store.read_bytes("a/b") == b"first"
    assert store.names("a") == ["b"]
    assert store.size("a/b") == 5
    assert store.size("a/none") is None
    assert store.names("none") == []
    store.delete("a")
    assert not store.exists("a/b")
    store.delete("a")


def test_arrow_batches_are_read_one_at_a_time(store: Store) -> None:
    schema = pa.schema([("x", pa.int64())])
    batches = [pa.record_batch([pa.array(np.arange(i, i + 3))], schema=schema) for i in range(5)]
    written = store.write_arrow("t.arrow", schema, batches)
    assert store.size("t.arrow") == written
    assert store.read_batch("t.arrow", 3).column(0).to_pylist() == [3, 4, 5]
    assert manifests.is_whole(store, "t.arrow")
    store.write_bytes("short.arrow", store.read_bytes("t.arrow")[:-20])
    assert not manifests.is_whole(store, "short.arrow")
    assert not manifests.is_whole(store, "none.arrow")


def test_replace_json_only_over_the_expected_version(store: Store) -> None:
    store.replace_json("latest.json", {"n": 1}, None)
    with pytest.raises(PublishError):
        store.replace_json("latest.json", {"n": 2}, None)
    version = store.version("latest.json")
    store.replace_json("latest.json", {"n": 3}, version)
    with pytest.raises(PublishError):
        store.replace_json("latest.json", {"n": 4}, version)
    assert store.read_json("latest.json") == {"n": 3}
    assert store.read_json("none.json") is None


def _race(store: Store, expected: str | None, number: int, results: Any) -> None:
    try:
        store.replace_json("latest.json", {"n": number}, expected)
        results.put(number)
    except PublishError:
        results.put(None)


def test_of_many_writers_one_wins(store: Store) -> None:
    store.replace_json("latest.json", {"n": -1}, None)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    version = store.version("latest.json")
    writers = [context.Process(target=_race, args=(store, version, n, results)) for n in range(4)]
    for writer in writers:
        writer.start()
    outcomes = [results.get(timeout=120) for _ in writers]
    for writer in writers:
        writer.join()
    winners = [n for n in outcomes if n is not None]
    assert len(winners) == 1
    assert store.read_json("latest.json") == {"n": winners[0]}


def test_options_do_not_show() -> None:
    assert "hush" not in repr(Store.at("s3://b/p", {"secret": "hush"}))


def test_unknown_scheme() -> None:
    with pytest.raises(SettingsError, match="only local paths and s3://"):
        Store.at("gs://bucket/x")


def test_unwritable_output_says_why(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("x")
    with pytest.raises(SettingsError, match=r"cannot write to .*file/out: Not a directory"):
        Store.at(str(blocker / "out")).check_writable()


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_list_parquet_folder_glob_and_file(tmp_path: Path) -> None:
    touch(tmp_path, "b/day=2/x.parquet", "a.parquet", "b/day=1/y.parquet", "_SUCCESS", ".x.crc", "b/_tmp/z.parquet")
    names = [f.path[len(str(tmp_path)) + 1 :] for f in list_parquet(str(tmp_path), None)[1]]
    assert names == ["a.parquet", "b/day=1/y.parquet", "b/day=2/x.parquet"]
    assert len(list_parquet(str(tmp_path / "b/*/*.parquet"), None)[1]) == 2  # but for what is hidden
    assert len(list_parquet(str(tmp_path / "b/_tmp/*.parquet"), None)[1]) == 1  # unless it is named
    assert len(list_parquet(str(tmp_path / "a.parquet"), None)[1]) == 1


def test_list_parquet_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        list_parquet(str(tmp_path / "none"), None)
    with pytest.raises(InputError, match="holds no Parquet file"):
        list_parquet(str(tmp_path), None)
    touch(tmp_path, "a.parquet", "notes.txt")
    with pytest.raises(InputError, match=r"notes\.txt is not a Parquet file"):
        list_parquet(str(tmp_path), None)


def test_contains(tmp_path: Path) -> None:
    assert contains(str(tmp_path), str(tmp_path / "x" / "y"))
    assert contains(str(tmp_path), str(tmp_path))
    assert not contains(str(tmp_path / "x"), str(tmp_path / "xy"))
    assert contains("s3://b/p", "s3://b/p/q")
    assert not contains("s3://b/p", "s3://b/pq")
    assert not contains(str(tmp_path), "s3://b/p")


@dataclass(frozen=True)
class Made:
    """What a stage made."""

    n: int


def test_manifest_mismatch_names_the_key_and_both_values(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    before = {"neighbors": 80, "input_files": {"a": [1, "x"], "b": [2, "y"]}}
    assert manifests.load(store, "search", before, Made) is None
    manifests.begin(store, "search", before)
    manifests.finish(store, Manifest("search", before, Made(1), {}, 2.5))
    loaded = manifests.load(store, "search", before, Made)
    assert loaded is not None
    assert (loaded.result, loaded.seconds) == (Made(1), 2.5)
    with pytest.raises(FingerprintError) as caught:
        manifests.load(store, "search", before | {"neighbors": 50}, Made)
    assert "neighbors: was 80, is 50" in str(caught.value)
    assert "--run-id" in str(caught.value)
    with pytest.raises(FingerprintError) as caught:
        manifests.load(store, "search", before | {"input_files": {"a": [1, "x"], "b": [3, "z"]}}, Made)
    assert 'b: was [2, "y"], is [3, "z"]' in str(caught.value)


def test_a_lost_file_makes_the_stage_run_again(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    store.write_bytes("p", b"12345")
    manifests.finish(store, Manifest("s", {}, Made(1), {"p": 5}, 0))
    assert manifests.load(store, "s", {}, Made) is not None
    store.write_bytes("p", b"123")
    assert manifests.load(store, "s", {}, Made) is None


def test_a_file_shared_again_leaves_nothing_behind(tmp_path: Path) -> None:
    store, other = Store.at(str(tmp_path / "one")), Store.at(str(tmp_path / "two"))
    store.write_bytes("vectors/a", b"faces")
    for _ in range(3):
        assert other.share(store, "vectors/a", "vectors/b") == 5
    assert [path.name for path in (tmp_path / "two" / "vectors").iterdir()] == ["b"]
    store.delete("vectors")
    assert other.read_bytes("vectors/b") == b"faces"


def test_a_disk_without_second_names_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*given: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    store, other = Store.at(str(tmp_path / "one")), Store.at(str(tmp_path / "two"))
    store.write_bytes("a", b"faces")
    assert other.share(store, "a", "b") == 5
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["b"]


def test_links_to_files_are_what_they_lead_to(tmp_path: Path) -> None:
    write_faces(tmp_path / "elsewhere" / "a.parquet", np.ones((3, 2), np.float32))
    write_faces(tmp_path / "in" / "b.parquet", np.ones((2, 2), np.float32))
    (tmp_path / "in" / "a.parquet").symlink_to(tmp_path / "elsewhere" / "a.parquet")

    def states(address: str) -> dict[str, list[int | str | None]]:
        return {Path(file.path).name: file.state for file in list_faces(address, None).files}

    for address in (str(tmp_path / "in"), str(tmp_path / "in" / "*.parquet"), str(tmp_path / "in" / "a.parquet")):
        collected = states(address)
        assert collected["a.parquet"] == states(str(tmp_path / "elsewhere"))["a.parquet"]
    assert collected.keys() == {"a.parquet"}
    before = states(str(tmp_path / "in"))
    write_faces(tmp_path / "elsewhere" / "a.parquet", np.ones((4, 2), np.float32))
    after = states(str(tmp_path / "in"))
    assert before["b.parquet"] == after["b.parquet"]
    assert before["a.parquet"] != after["a.parquet"]


def test_what_killed_writers_left_is_removed(store: Store) -> None:
    store.write_bytes("kept", b"x")
    if store.is_local:
        left = Path(store.root) / "deep" / ".tmp-half-1a2b"
        left.parent.mkdir()
        left.write_bytes(b"half")
    else:
        bucket, _, key = store.address("deep/half")[len("s3://") :].partition("/")
        store.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    assert store.remove_leftovers(time.time() - 3_600) == 0  # it may be running
    assert store.remove_leftovers(time.time() + 3_600) == 1
    assert store.remove_leftovers(time.time() + 3_600) == 0
    assert store.read_bytes("kept") == b"x"


def test_a_lock_that_a_suspended_process_holds_is_not_waited_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    store = Store.at(str(tmp_path))
    version = store.replace_json("latest.json", {"n": 1}, None)
    monkeypatch.setattr("faceflow.storage.local_files.LOCK_SECONDS", 0.2)
    with open(tmp_path / ".latest.json.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=r"another process has held the lock .*latest\.json\.lock .* it may be suspended"):
            store.replace_json("latest.json", {"n": 2}, version)
    store.replace_json("latest.json", {"n": 2}, version)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp-")] == []
