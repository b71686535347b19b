"""Delta and Iceberg tables under any name, partitions of any value, other writers' types, and commits that stall."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow import ClusterConfig, run_clustering, run_nightly
from faceflow.cli.main import main
from faceflow.errors import InputError
from faceflow.storage.file_info import TableSnapshot
from faceflow.storage.inputs import list_faces
from faceflow.tools.evaluate import evaluate
from tests.conftest import S3

deltalake = pytest.importorskip("deltalake", reason="the lakes extra is not installed")


def faces(ids: pa.Array, seed: int = 0, **more: Any) -> pa.Table:
    """Faces of eight people with these ids."""
    centers = np.random.default_rng(7).standard_normal((8, 16))
    x = centers[np.arange(len(ids)) % 8] + 0.2 * np.random.default_rng(seed).standard_normal((len(ids), 16))
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float32).ravel()), 16).cast(pa.list_(pa.float32()))
    return pa.table({"id": ids, "embedding": vectors} | more)


def numbers(first: int, count: int) -> pa.Array:
    return pa.array(np.arange(first, first + count))


def files_of(address: str, options: dict[str, Any] | None = None) -> tuple[int, Any]:
    store, files, snapshot = list_faces(address, options)
    return sum(pq.read_metadata(store.fs.open(file.path)).num_rows for file in files), snapshot


NAMES = ["faces.parquet", "faces.pq", "[old] faces", "what?", "a*b", "faces.npz", "plain"]


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_known_by_what_lies_in_it(tmp_path: Path, name: str) -> None:
    table = tmp_path / "made"
    deltalake.write_deltalake(table, faces(numbers(0, 300)))
    deltalake.write_deltalake(table, faces(numbers(600, 200)), mode="overwrite")
    table.rename(tmp_path / name)
    rows, snapshot = files_of(str(tmp_path / name))
    assert rows == 200
    assert snapshot == TableSnapshot("delta", 1)


@pytest.mark.usefixtures("ray_session")
def test_rows_that_were_deleted_are_not_published_again(tmp_path: Path) -> None:
    table = tmp_path / "faces.parquet"
    deltalake.write_deltalake(table, faces(numbers(0, 300)))
    deltalake.DeltaTable(table).delete("id < 100")
    run_clustering(ClusterConfig(str(table), str(tmp_path / "out")), progress=False, report=False)
    latest = json.loads((tmp_path / "out" / "latest.json").read_text())
    assert latest["input_snapshot"] == {"format": "delta", "snapshot": 1}
    labels = pq.read_table(tmp_path / "out" / latest["labels"], partitioning=None)
    assert sorted(labels["id"].to_pylist()) == list(range(100, 300))
    # TRUTH is read as a table, too: its deleted rows would be ids that the labels lack.
    truth = tmp_path / "truth.parquet"
    deltalake.write_deltalake(truth, pa.table({"id": numbers(0, 300), "label": numbers(0, 300)}))
    deltalake.DeltaTable(truth).delete("id < 100")
    assert evaluate(str(tmp_path / "out"), str(truth)).faces == 200


@pytest.mark.parametrize(
    "address",
    [
        lambda root: root,  # the folder above
        lambda root: root / "table" / "day=1",  # a partition
        lambda root: root / "table" / "*" / "*.parquet",
        lambda root: root / "*",
        lambda root: next((root / "table").rglob("*.parquet")),  # one file
    ],
    ids=["above", "partition", "glob of files", "glob of folders", "file"],
)
def test_files_of_a_table_are_not_read_past_it(tmp_path: Path, address: Callable[[Path], Path]) -> None:
    root = tmp_path / "root"
    deltalake.write_deltalake(root / "table", faces(numbers(0, 40), day=pa.array([1, 2] * 20)), partition_by=["day"])
    with pytest.raises(InputError, match=r"root/table is a Delta table, .* name the table itself as INPUT"):
        list_faces(str(address(root)), None)
    assert files_of(str(root / "table"))[0] == 40


def test_files_of_an_iceberg_table_are_not_read_past_it(tmp_path: Path) -> None:
    pytest.importorskip("pyiceberg", reason="the lakes extra is not installed")
    from pyiceberg.catalog.sql import SqlCatalog

    catalog = SqlCatalog("test", uri=f"sqlite:///{tmp_path}/catalog.db", warehouse=f"file://{tmp_path}/warehouse")
    catalog.create_namespace("lake")
    table = catalog.create_table("lake.faces", faces(numbers(0, 1)).schema)
    table.append(faces(numbers(0, 30)))
    folder = table.location().removeprefix("file://")
    for address in (folder + "/data", folder + "/data/*.parquet", str(Path(folder).parent)):
        with pytest.raises(InputError, match="is an Iceberg table"):
            list_faces(address, None)
    renamed = Path(folder).with_name("faces.parquet")
    shutil.copytree(folder, renamed)
    assert list_faces(str(renamed), None).snapshot == TableSnapshot("iceberg", table.current_snapshot().snapshot_id)


CITIES = ["New York", "a:b", "50%", "Zürich", "a/b", "100%25", "x=y", "plain", "東京", "a+b", "q?#[1]"]


def test_partitions_of_any_value(tmp_path: Path) -> None:
    table = faces(numbers(0, 110), city=pa.array(CITIES * 10))
    deltalake.write_deltalake(tmp_path / "table", table, partition_by=["city"])
    _, files, _ = list_faces(str(tmp_path / "table"), None)
    assert len(files) == len(CITIES)
    assert all(Path(file.path).stat().st_size == file.size for file in files)
    assert files_of(str(tmp_path / "table"))[0] == 110


def test_partitions_of_any_value_on_s3(s3: S3) -> None:
    storage = {
        "AWS_ACCESS_KEY_ID": s3.options["key"], "AWS_SECRET_ACCESS_KEY": s3.options["secret"], "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3.endpoint, "AWS_ALLOW_HTTP": "true", "aws_conditional_put": "etag",
    }  # fmt: skip
    cities = [city for city in CITIES if city not in ("a/b", "q?#[1]")]  # which SeaweedFS or delta-rs do not keep apart
    table = faces(numbers(0, 10 * len(cities)), city=pa.array(cities * 10))
    deltalake.write_deltalake("s3://faces/city.parquet", table, partition_by=["city"], storage_options=storage)
    assert files_of("s3://faces/city.parquet", s3.options)[0] == 10 * len(cities)
    with pytest.raises(InputError, match="is a Delta table"):
        list_faces("s3://faces/city.parquet/city=plain", s3.options)


def test_markers_of_hadoop_and_globs_of_folders(tmp_path: Path) -> None:
    for day in ("2024-01-01", "2024-01-02", "2023-12-31"):
        folder = tmp_path / f"date={day}"
        folder.mkdir()
        pq.write_table(faces(numbers(0, 5)), folder / "part-0.parquet")
        for name in ("_SUCCESS", ".part-0.parquet.crc", "part-0.parquet.crc", "sub_$folder$"):
            (folder / name).write_bytes(b"x")
    (tmp_path / "date=2024-01-01_$folder$").write_bytes(b"")
    assert files_of(str(tmp_path))[0] == 15
    assert files_of(str(tmp_path / "date=2024-*"))[0] == 10
    assert files_of(str(tmp_path / "date=*" / "*"))[0] == 15
    (tmp_path / "date=2024-01-02" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"notes\.txt is not a Parquet file"):
        list_faces(str(tmp_path / "date=2024-*"), None)


def cast_ids(table: pa.Table, kind: pa.DataType) -> pa.Table:
    return table.set_column(0, "id", table["id"].cast(kind))


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("first", "later"),
    [
        (pa.string(), [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
        (pa.large_string(), [pa.string()]),
        (pa.int32(), [pa.int64(), pa.uint8()]),
        (pa.int64(), [pa.int32()]),
    ],
    ids=str,
)  # fmt: skip
def test_incremental_runs_over_files_of_other_writers(tmp_path: Path, first: pa.DataType, later: list[pa.DataType]) -> None:
    """What `delete()` of a Delta table, an Iceberg promotion or another writer's file does to ids: they stay the same faces,
    and are published in the type of the first file."""
    number = pa.types.is_integer(first)
    lake = tmp_path / "lake"
    lake.mkdir()

    def ids(begin: int, count: int) -> pa.Array:
        return numbers(begin, count) if number else numbers(begin, count).cast(pa.string())

    def published(run_id: str) -> pa.Table:
        return pq.read_table(tmp_path / "out" / "labels" / f"run={run_id}", partitioning=None)

    config = ClusterConfig(str(lake), str(tmp_path / "out"), min_similarity=0.5, edges="threshold")
    pq.write_table(cast_ids(faces(ids(0, 80)), first), lake / "a.parquet")
    one = run_nightly(config, progress=False, report=False)
    assert published(one.run_id)["id"].type == first
    before = published(one.run_id)
    for i, kind in enumerate(later):
        # The first file is written again by the other writer, and new faces come in its type.
        pq.write_table(cast_ids(faces(ids(0, 80)), kind), lake / "a.parquet")
        pq.write_table(cast_ids(faces(ids(100 + 40 * i, 40), seed=i), kind), lake / f"b{i}.parquet")
        run = run_nightly(config, progress=False, report=False)
        counts = json.loads((tmp_path / "out" / "_runs" / run.run_id / "manifests" / "ingest.json").read_text())["result"]
        assert [counts["changes"][key] for key in ("added", "changed", "removed")] == [40, 0, 0]
        labels = published(run.run_id)
        assert labels["id"].type == first
        assert pq.read_schema(next((tmp_path / "out" / "moves" / f"run={run.run_id}").iterdir())).field("id").type == first
        assert labels.slice(0, 80).to_pydict() == before.to_pydict()
        assert evaluate(str(tmp_path / "out"), str(tmp_path / "out" / "labels" / f"run={run.run_id}"),
                        label_column="cluster").pairwise_f == 1  # fmt: skip


@pytest.mark.usefixtures("ray_session")
def test_ids_that_outgrow_the_published_type_widen_it(tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    lake.mkdir()
    config = ClusterConfig(str(lake), str(tmp_path / "out"), min_similarity=0.5, edges="threshold")
    pq.write_table(cast_ids(faces(numbers(0, 40)), pa.int32()), lake / "a.parquet")
    run_nightly(config, progress=False, report=False)
    pq.write_table(faces(numbers(2**40, 8)), lake / "b.parquet")
    run = run_nightly(config, progress=False, report=False)
    labels = pq.read_table(tmp_path / "out" / "labels" / f"run={run.run_id}", partitioning=None)
    assert labels["id"].type == pa.int64()
    assert labels["id"].to_pylist() == [*range(40), *range(2**40, 2**40 + 8)]


@pytest.mark.usefixtures("ray_session")
def test_uuid_ids_with_constraints(tmp_path: Path) -> None:
    raw = pa.array([bytes([i]) * 16 for i in range(40)], pa.binary(16))
    table = faces(raw)
    table = table.set_column(0, "id", pa.ExtensionArray.from_storage(pa.uuid(), raw))
    pq.write_table(table, tmp_path / "in.parquet")
    written = ",".join(str(uuid.UUID(bytes=item)) for item in raw.to_pylist()[:2])
    (tmp_path / "c.csv").write_text(f"id_a,id_b,kind\n{written},Must-Link\n")
    config = ClusterConfig(str(tmp_path / "in.parquet"), str(tmp_path / "out"), min_similarity=0.7)
    free = run_clustering(config, progress=False, report=True)
    run = run_clustering(replace(config, constraints=str(tmp_path / "c.csv")), progress=False, report=False)
    labels = pq.read_table(run.labels, partitioning=None)
    assert labels["id"].type == pa.uuid()
    clusters = labels["cluster"].to_pylist()
    assert clusters[0] == clusters[1]
    assert run.clusters == free.clusters - 1


@pytest.mark.usefixtures("ray_session")
def test_ids_that_are_not_utf8_are_quarantined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = pa.array([b"caf\xe9", *(f"face-{i}".encode() for i in range(79))], pa.binary())
    table = faces(numbers(0, 80)).set_column(0, "id", pa.Array.from_buffers(pa.string(), 80, raw.buffers()))
    pq.write_table(table, tmp_path / "in.parquet")
    command = ["cluster", str(tmp_path / "in.parquet"), str(tmp_path / "out"), "--min-similarity", "0.5", "--quiet"]
    assert main(command) == 2
    assert "in.parquet, row 0: the id is not valid UTF-8" in capsys.readouterr().err
    assert main([*command, "--bad-rows", "quarantine", "--max-bad-fraction", "0.1"]) == 0
    latest = json.loads((tmp_path / "out" / "latest.json").read_text())
    labels = pq.read_table(tmp_path / "out" / latest["labels"], partitioning=None).to_pylist()
    assert labels[0] == {"id": None, "cluster": None}
    assert all(row["cluster"] is not None for row in labels[1:])


@pytest.mark.parametrize("pattern", ["*/*.parquet", "**/*.parquet", "[abc]/x*/*", "?"])
def test_a_glob_over_plain_folders_and_a_table(tmp_path: Path, pattern: str) -> None:
    for name in ("a", "c"):
        (tmp_path / name / "x").mkdir(parents=True)
        pq.write_table(faces(numbers(0, 5)), tmp_path / name / "x.parquet")
        pq.write_table(faces(numbers(0, 5)), tmp_path / name / "x" / "y.parquet")
    deltalake.write_deltalake(tmp_path / "b", faces(numbers(0, 8)))
    deltalake.write_deltalake(tmp_path / "b", faces(numbers(8, 4)), mode="overwrite")
    (tmp_path / "b" / "x").mkdir()
    next((tmp_path / "b").glob("*.parquet")).rename(tmp_path / "b" / "x" / "part.parquet")
    with pytest.raises(InputError, match=r"/b is a Delta table"):
        list_faces(str(tmp_path / pattern), None)


def test_hidden_folders_under_a_glob(tmp_path: Path) -> None:
    for name in ("day=1", "_temporary/0", ".staging"):
        (tmp_path / name).mkdir(parents=True)
        pq.write_table(faces(numbers(0, 5)), tmp_path / name / "p.parquet")
    assert len(list_faces(str(tmp_path / "**" / "*.parquet"), None).files) == 1
    assert len(list_faces(str(tmp_path / "_temporary" / "*" / "*.parquet"), None).files) == 1  # named by the user


@pytest.mark.usefixtures("ray_session")
def test_ids_of_extension_types_that_say_nothing_about_ids(tmp_path: Path) -> None:
    ids = pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array([f'"{i}"' for i in range(40)]))
    pq.write_table(faces(ids), tmp_path / "in.parquet")
    run = run_clustering(ClusterConfig(str(tmp_path / "in.parquet"), str(tmp_path / "out"), min_similarity=0.5),
                         progress=False, report=False)  # fmt: skip
    labels = pq.read_table(run.labels, partitioning=None)
    assert labels["id"].type == pa.string()
    assert labels["id"].to_pylist() == [f'"{i}"' for i in range(40)]
