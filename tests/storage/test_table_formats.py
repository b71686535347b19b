"""Delta and Iceberg tables as inputs and outputs, made by their own libraries, on a disk and on S3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow.cli.main import main
from faceflow.errors import InputError, SettingsError
from faceflow.storage.file_info import TableSnapshot
from faceflow.storage.inputs import list_faces
from faceflow.storage.object_store import Store
from tests.conftest import S3

deltalake = pytest.importorskip("deltalake", reason="the lakes extra is not installed")
pytest.importorskip("pyiceberg", reason="the lakes extra is not installed")


def faces(first: int, count: int) -> pa.Table:
    """`count` faces of twenty people, with ids from `first` on."""
    rng = np.random.default_rng(first)
    centers = np.random.default_rng(7).standard_normal((20, 16))
    x = (centers[np.arange(count) % 20] + 0.2 * rng.standard_normal((count, 16))).astype(np.float32)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 16).cast(pa.list_(pa.float32()))
    return pa.table({"id": pa.array(np.arange(first, first + count)), "embedding": embedding})


def rows(files: list[Any]) -> int:
    return sum(pq.read_metadata(file.path).num_rows for file in files)


@pytest.fixture
def delta(tmp_path: Path) -> str:
    """Version 0: 300 faces; 1: 100 more; 2: the first 300 replaced by others."""
    table = str(tmp_path / "delta table")
    deltalake.write_deltalake(table, faces(0, 300))
    deltalake.write_deltalake(table, faces(1000, 100), mode="append")
    deltalake.write_deltalake(table, faces(600, 200), mode="overwrite", predicate="id < 1000")
    return table


def test_a_delta_snapshot_is_its_own_files(delta: str) -> None:
    for version, count in ((None, 300), (0, 300), (1, 400), (2, 300)):
        _, files, snapshot = list_faces(delta, None, version)
        assert rows(files) == count
        assert snapshot == TableSnapshot("delta", 2 if version is None else version)
        assert all(file.size == Path(file.path).stat().st_size and file.version for file in files)
    # Beside these lie files that no longer belong to the table.
    assert len(list(Path(delta).glob("*.parquet"))) > len(list_faces(delta, None, 2)[1])


def test_delta_refusals(delta: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no version 17: the newest is 2"):
        list_faces(delta, None, 17)
    (tmp_path / "plain").mkdir()
    pq.write_table(faces(0, 10), tmp_path / "plain" / "a.parquet")
    with pytest.raises(SettingsError, match="neither a Delta nor an Iceberg table"):
        list_faces(str(tmp_path / "plain"), None, 3)
    vectors = str(tmp_path / "vectors")
    deltalake.write_deltalake(vectors, faces(0, 10), configuration={"delta.enableDeletionVectors": "false"})
    (Path(vectors) / "_delta_log" / f"{1:020}.json").write_text("not json")
    with pytest.raises(InputError, match="cannot read Delta table"):
        list_faces(vectors, None)


@pytest.fixture
def iceberg(tmp_path: Path) -> Any:
    from pyiceberg.catalog.sql import SqlCatalog

    catalog = SqlCatalog("test", uri=f"sqlite:///{tmp_path}/catalog.db", warehouse=f"file://{tmp_path}/warehouse")
    catalog.create_namespace("lake")
    table = catalog.create_table("lake.faces", faces(0, 1).schema)
    table.append(faces(0, 300))
    table.append(faces(1000, 100))
    return table


def test_an_iceberg_snapshot_is_its_own_files(iceberg: Any) -> None:
    folder = iceberg.location().removeprefix("file://")
    first, second = (item.snapshot_id for item in iceberg.metadata.snapshots)
    for address in (folder, iceberg.metadata_location.removeprefix("file://")):
        for version, count in ((None, 400), (first, 300), (second, 400)):
            _, files, snapshot = list_faces(address, None, version)
            assert rows(files) == count
            assert snapshot == TableSnapshot("iceberg", version or second)
    with pytest.raises(InputError, match="has no snapshot 17"):
        list_faces(folder, None, 17)


def test_an_iceberg_table_rewritten_after_a_delete(iceberg: Any) -> None:
    iceberg.delete("id < 100")
    _, files, _ = list_faces(iceberg.location().removeprefix("file://"), None)
    assert rows(files) == 300


@pytest.mark.usefixtures("ray_session")
def test_from_a_table_to_a_table(delta: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "out", tmp_path / "labels table"
    command = ["cluster", delta, str(out), "--snapshot", "1", "--labels-table", str(table), "--quiet"]
    assert main([*command, "--run-id", "one"]) == 0
    latest = json.loads((out / "latest.json").read_text())
    assert latest["input_snapshot"] == {"format": "delta", "snapshot": 1}
    made = deltalake.DeltaTable(table)
    published = pq.read_table(out / latest["labels"], partitioning=None)
    assert pa.table(made.to_pyarrow_table()).sort_by("id").equals(published.sort_by("id"))
    assert made.history(1)[0]["faceflow_run_id"] == "one"
    # The run is there already: nothing is committed twice. Another run replaces the content by one commit.
    assert main([*command, "--run-id", "one"]) == 0
    assert deltalake.DeltaTable(table).version() == 0
    assert main(["cluster", delta, str(out), "--labels-table", str(table), "--quiet", "--run-id", "two"]) == 0
    made = deltalake.DeltaTable(table)
    assert made.version() == 1
    assert len(made.to_pyarrow_table()) == 300
    capsys.readouterr()


@pytest.mark.usefixtures("ray_session")
def test_an_incremental_run_on_a_delta_table(delta: str, tmp_path: Path) -> None:
    """What a compaction moves to other files is told apart from what is new."""
    out = tmp_path / "out"
    assert main(["nightly", delta, str(out), "--quiet", "--run-id", "one"]) == 0
    deltalake.write_deltalake(delta, faces(9000, 40), mode="append")
    deltalake.DeltaTable(delta).optimize.compact()
    assert main(["nightly", delta, str(out), "--quiet", "--run-id", "two"]) == 0
    counts = json.loads((out / "_runs" / "two" / "manifests" / "ingest.json").read_text())["result"]
    assert [counts["changes"][key] for key in ("added", "changed", "removed")] == [40, 0, 0]
    assert counts["input_snapshot"]["snapshot"] == deltalake.DeltaTable(delta).version()


@pytest.mark.usefixtures("ray_session")
def test_tables_on_s3(s3: S3, tmp_path: Path) -> None:
    storage = {
        "AWS_ACCESS_KEY_ID": s3.options["key"], "AWS_SECRET_ACCESS_KEY": s3.options["secret"], "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3.endpoint, "AWS_ALLOW_HTTP": "true", "aws_conditional_put": "etag",
    }  # fmt: skip
    deltalake.write_deltalake("s3://faces/delta", faces(0, 300), storage_options=storage)
    deltalake.write_deltalake("s3://faces/delta", faces(500, 60), mode="overwrite", storage_options=storage)
    command = ["cluster", "s3://faces/delta", "s3://faces/delta-out", "--labels-table", "s3://faces/delta-labels", "--quiet"]
    assert main([*command, "--storage-options", json.dumps(s3.options)]) == 0
    latest = Store.at("s3://faces/delta-out", s3.options).read_json("latest.json")
    assert latest is not None
    assert latest["faces"] == 60
    made = deltalake.DeltaTable("s3://faces/delta-labels", storage_options=storage)
    assert sorted(pa.table(made.to_pyarrow_table())["id"].to_pylist()) == list(range(500, 560))
