"""Labels as commits to a Delta table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow.cli.main import main
from faceflow.errors import PublishError, RunError
from faceflow.stages.publish.delta_labels import CommitLabels, commit_labels
from faceflow.storage import table_formats
from faceflow.storage.object_store import Store
from tests.integration.test_tables import faces, numbers

deltalake = pytest.importorskip("deltalake", reason="the lakes extra is not installed")


def batches(value: int) -> Callable[[], list[pa.RecordBatch]]:
    return lambda: [pa.record_batch({"id": [1], "cluster": [value]})]


def test_a_stalled_run_does_not_replace_later_labels(tmp_path: Path) -> None:
    """A driver stops between publication and its commit; the next run publishes and commits; the first one goes on."""
    table = Store.at(str(tmp_path / "labels"))
    schema = batches(0)()[0].schema
    table_formats.commit_labels(table, "first", schema, batches(1), table_formats.Fence("out", 10, lambda: True))
    table_formats.commit_labels(table, "second", schema, batches(2), table_formats.Fence("out", 20, lambda: True))
    for stalled in (table_formats.Fence("out", 15, lambda: True), table_formats.Fence("out", 30, lambda: False)):
        with pytest.raises(PublishError, match="a later run was published while run stalled was stalled"):
            table_formats.commit_labels(table, "stalled", schema, batches(9), stalled)
    made = deltalake.DeltaTable(table.root)
    assert (made.version(), made.to_pyarrow_table()["cluster"].to_pylist()) == (1, [2])
    # Another OUTPUT counts for itself.
    table_formats.commit_labels(table, "other", schema, batches(3), table_formats.Fence("elsewhere", 5, lambda: True))
    assert table_formats.committed(table) == "other"


def test_a_commit_that_comes_between_is_seen(tmp_path: Path) -> None:
    """The stalled run has looked at the table and at latest.json already, and is writing its labels."""
    table = Store.at(str(tmp_path / "labels"))
    schema = batches(0)()[0].schema
    table_formats.commit_labels(table, "first", schema, batches(1), table_formats.Fence("out", 10, lambda: True))
    later = []

    def while_writing() -> list[pa.RecordBatch]:
        if not later:
            later.append(
                table_formats.commit_labels(table, "later", schema, batches(2), table_formats.Fence("out", 30, lambda: True))
            )
        return batches(9)()

    with pytest.raises(PublishError):
        table_formats.commit_labels(table, "stalled", schema, while_writing, table_formats.Fence("out", 20, lambda: True))
    assert deltalake.DeltaTable(table.root).to_pyarrow_table()["cluster"].to_pylist() == [2]


def test_upkeep_that_comes_between_does_not_stop_a_commit(tmp_path: Path) -> None:
    table = Store.at(str(tmp_path / "labels"))
    schema = batches(0)()[0].schema
    table_formats.commit_labels(table, "first", schema, batches(1), table_formats.Fence("out", 10, lambda: True))
    done = []

    def while_writing() -> list[pa.RecordBatch]:
        if not done:
            done.append(deltalake.DeltaTable(table.root).alter.set_table_properties({"delta.appendOnly": "false"}))
        return batches(5)()

    table_formats.commit_labels(table, "second", schema, while_writing, table_formats.Fence("out", 20, lambda: True))
    assert deltalake.DeltaTable(table.root).to_pyarrow_table()["cluster"].to_pylist() == [5]


def test_a_task_that_stalled_before_its_commit_asks_latest_json(tmp_path: Path) -> None:
    out = Store.at(str(tmp_path / "out"))
    for run_id in ("a", "b"):
        path = tmp_path / "out" / "labels" / f"run={run_id}" / "part-00000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"id": [run_id], "cluster": [0]}), path)
    out.write_json("latest.json", {"run_id": "b", "labels": "labels/run=b"})
    table = Store.at(str(tmp_path / "table"))
    with pytest.raises(PublishError):
        commit_labels(CommitLabels(table, out, "a", 5))
    commit_labels(CommitLabels(table, out, "b", 6))
    assert deltalake.DeltaTable(table.root).to_pyarrow_table()["id"].to_pylist() == ["b"]


def test_a_commit_that_upkeep_has_pushed_out_of_sight_is_not_made_again(tmp_path: Path) -> None:
    """A table is compacted and vacuumed between runs without other changes."""
    table = Store.at(str(tmp_path / "labels"))
    schema = batches(0)()[0].schema
    fence = table_formats.Fence("out", 10, lambda: True)
    table_formats.commit_labels(table, "first", schema, batches(1), fence)
    for i in range(table_formats.COMMITS_READ + 1):
        deltalake.DeltaTable(table.root).alter.set_table_description(f"night {i}")
    assert table_formats.committed(table) is None
    version = deltalake.DeltaTable(table.root).version()
    assert table_formats.commit_labels(table, "first", schema, batches(1), fence) == version


@pytest.mark.parametrize(
    ("kind", "value", "delta"),
    [(pa.uint8(), 200, pa.int16()), (pa.uint16(), 2**15, pa.int32()), (pa.uint32(), 2**31, pa.int64()),
     (pa.uint64(), 7, pa.int64()), (pa.int32(), 5, pa.int32()), (pa.string(), "x", pa.string())],
    ids=str,
)  # fmt: skip
def test_ids_of_types_that_delta_lacks(tmp_path: Path, kind: pa.DataType, value: Any, delta: pa.DataType) -> None:
    labels = table_formats.as_delta(pa.table({"id": pa.array([value], kind), "cluster": [0]}))
    assert labels["id"].type == delta
    table_formats.commit_labels(
        Store.at(str(tmp_path)), "r", labels.schema, labels.to_batches, table_formats.Fence("o", 1, lambda: True)
    )
    assert deltalake.DeltaTable(tmp_path).to_pyarrow_table()["id"].to_pylist() == [value]


def test_ids_that_no_delta_type_holds(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="do not fit into int64"):
        table_formats.as_delta(pa.table({"id": pa.array([2**63], pa.uint64()), "cluster": [0]}))
    raw = pa.array([b"1" * 16], pa.binary(16))
    for ids in (raw, pa.ExtensionArray.from_storage(pa.uuid(), raw)):
        labels = table_formats.as_delta(pa.table({"id": ids, "cluster": [0]}))
        assert labels["id"].to_pylist() == [b"1" * 16]


@pytest.mark.parametrize("where", ["input", "foreign", "inside input", "above output"])
def test_a_labels_table_never_replaces_anything_but_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    source, foreign = tmp_path / "lake" / "faces", tmp_path / "foreign"
    for table in (source, foreign):
        deltalake.write_deltalake(table, faces(numbers(0, 40)))
    named = {"input": source, "foreign": foreign, "inside input": source / "labels", "above output": tmp_path / "deep"}[where]
    out = tmp_path / "deep" / "out"
    assert main(["cluster", str(source), str(out), "--labels-table", str(named), "--quiet"]) == 2
    printed = capsys.readouterr().err
    assert "name another table" in printed
    assert "embedding" in printed if where == "foreign" else "overlap" in printed
    assert not out.exists()
    for table in (source, foreign):
        made = deltalake.DeltaTable(table)
        assert (made.version(), pa.schema(made.schema()).names) == (0, ["id", "embedding"])
