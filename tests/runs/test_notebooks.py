"""What a notebook shows: a line a stage while a run works, and its result and partitions as tables."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import faceflow
from faceflow import logs
from faceflow.tables import Partition
from tests.conftest import write_faces


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """IPython as its kernel loads it."""
    events = SimpleNamespace(register=lambda event, callback: None)  # which Ray asks for
    shell = SimpleNamespace(config={"IPKernelApp": {}}, events=events)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


@pytest.mark.usefixtures("ray_session", "notebook")
def test_a_run_prints_a_line_a_stage_and_its_result_is_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("faceflow", None):  # pytest has handlers of its own
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    faces = np.repeat(np.eye(4, 8, dtype=np.float32), 5, axis=0)
    config = faceflow.ClusterConfig(str(write_faces(tmp_path / "a.parquet", faces)), str(tmp_path / "out"), min_similarity=0.5)
    result = faceflow.run_clustering(config, report=False)
    printed = capsys.readouterr().out
    stages = [line.split()[1] for line in printed.splitlines() if "begins" in line]
    assert stages == ["ingest", "quantize", "search", "link", "detect", "publish"]
    table = result._repr_html_()
    assert "<td>20</td>" in table
    assert "<td>4 (0 singletons)</td>" in table
    assert not logging.getLogger("faceflow").handlers
    faceflow.run_clustering(config, progress=False, report=False)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("notebook")
def test_lines_go_where_the_user_sends_log_records(capsys: pytest.CaptureFixture[str]) -> None:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("faceflow")
    log.addHandler(handler)
    try:
        with logs.lines_in_notebook(True):
            log.warning("a line")
    finally:
        log.removeHandler(handler)
    assert records == ["a line"]
    assert capsys.readouterr().out == ""


def test_outside_a_notebook_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert not logs.in_notebook()
    with logs.lines_in_notebook(True):
        logging.getLogger("faceflow").info("a line")
    assert capsys.readouterr().out == ""


def test_a_partition_is_a_table() -> None:
    table = Partition(np.array([0, 0, 1, 2, 2, 2]), 1.5)._repr_html_()
    assert "<td>3 (1 of one row)</td>" in table
    assert "<td>3 rows</td>" in table
    assert "<td>1.500000 bits</td>" in table
    assert "<td>0 rows</td>" in Partition(np.zeros(0, np.int64), 0.0)._repr_html_()
