"""Nights that something comes in the way of: interruptions anywhere, a quantizer that does not fit, an input that changes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faceflow import ClusterConfig, run_clustering, run_nightly
from faceflow.cluster.executor import Executor
from faceflow.errors import PublishError, RunError, SettingsError
from faceflow.kernels.knn.recall import RecallEstimate
from faceflow.runs import pipeline, publication
from faceflow.runs.housekeeping import list_runs
from faceflow.runs.stages import STAGES
from faceflow.stages.base import Context, Redo
from faceflow.stages.search import stage as search
from faceflow.storage import manifests
from faceflow.storage.object_store import Store
from tests.benchmarks.nightly import labels_of, replay
from tests.integration.lake import SETTINGS, Lake, manifest, nightly, table_of

pytestmark = pytest.mark.usefixtures("ray_session")


def test_an_incremental_run_with_too_low_a_recall_searches_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = Lake(tmp_path / "in", 14, people=60)
    for i in range(3):
        lake.add(f"{i}.parquet", 300)
    settings = {"index": "cells", "cells": 12}
    nightly(tmp_path / "in", tmp_path / "out", **settings)
    lake.add("3.parquet", 30)
    real, seen = search.gate, []

    def low_once(context: Context) -> Redo | None:
        seen.append(context.results.quantize.incremental)
        if len(seen) > 1:
            return real(context)
        made = context.results.manifests["search"]
        low = dataclasses.replace(context.results.search, recall=RecallEstimate(0.5, 0.4, 0.6, 100, 1000))
        return real(context.with_results(context.results.with_stage(dataclasses.replace(made, result=low))))

    with_gate = tuple(dataclasses.replace(stage, gate=low_once) if stage.name == "search" else stage for stage in STAGES)
    monkeypatch.setattr(pipeline, "STAGES", with_gate)
    run = nightly(tmp_path / "in", tmp_path / "out", **settings)
    assert seen == [True, False]
    counts = manifest(tmp_path / "out", run.run_id, "quantize")
    assert counts["reason"] == "the measured recall was too low"
    assert counts["trained_faces"] == 930
    again = nightly(tmp_path / "in", tmp_path / "out", **settings)
    assert again.run_id == run.run_id


def test_a_quantizer_that_drifted_is_trained_again_even_if_that_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = Lake(tmp_path / "in", 15, people=60)
    for i in range(3):
        lake.add(f"{i}.parquet", 400)
    settings = {"index": "cells", "cells": 16}
    nightly(tmp_path / "in", tmp_path / "out", **settings)
    lake.centers = np.random.default_rng(99).standard_normal((3, 16))  # three people whom no cell was made for
    lake.add("3.parquet", 80)
    shutil.copytree(tmp_path / "out", tmp_path / "calm")
    calm = nightly(tmp_path / "in", tmp_path / "calm", **settings)
    counts = manifest(tmp_path / "calm", calm.run_id, "quantize")
    assert not counts["incremental"]
    assert "near their centroids" in counts["reason"] or "uneven" in counts["reason"]
    real = manifests.finish

    def stop(run: Store, results: Any) -> None:
        if results.stage == "quantize":
            raise OSError("the machine is gone")
        real(run, results)

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "finish", stop)
        with pytest.raises(Exception, match="the machine is gone"):
            nightly(tmp_path / "in", tmp_path / "out", **settings)
    run = nightly(tmp_path / "in", tmp_path / "out", **settings)
    assert not manifest(tmp_path / "out", run.run_id, "quantize")["incremental"]
    assert labels_of(tmp_path / "out", run.run_id) == labels_of(tmp_path / "calm", calm.run_id)


@pytest.mark.parametrize("index", ["exact", "cells"])
def test_an_interrupted_incremental_run_continues_or_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    settings = {"index": index} | ({"cells": 12} if index == "cells" else {})
    lake = Lake(tmp_path / "in", 6, people=40)
    for i in range(3):
        lake.add(f"{i}.parquet", 400)
    first = nightly(tmp_path / "in", tmp_path / "out", **settings)
    shutil.copytree(tmp_path / "out", tmp_path / "calm")
    lake.add("3.parquet", 30)
    lake.files["1.parquet"] = dict(list(lake.files["1.parquet"].items())[20:])
    lake.write("1.parquet")
    calm = nightly(tmp_path / "in", tmp_path / "calm", **settings)
    assert manifest(tmp_path / "calm", calm.run_id, "quantize")["incremental"]
    real = pipeline.advance
    for stage in STAGES:

        def stop(current: Any, context: Any, watcher: Any, until: str = stage.name) -> Any:
            if current.name == until:
                raise OSError("the machine is gone")
            return real(current, context, watcher)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "advance", stop)
            with pytest.raises(Exception, match="the machine is gone"):
                nightly(tmp_path / "in", tmp_path / "out", **settings)
        assert json.loads((tmp_path / "out" / "latest.json").read_text())["run_id"] == first.run_id
    runs = {p.name for p in (tmp_path / "out" / "_runs").iterdir()}
    assert len(runs) == 2  # one run, continued each time
    shutil.copytree(tmp_path / "out", tmp_path / "late")
    done = nightly(tmp_path / "in", tmp_path / "out", **settings)
    assert done.run_id in runs
    assert labels_of(tmp_path / "out", done.run_id) == labels_of(tmp_path / "calm", calm.run_id)
    lake.add("4.parquet", 10)  # the next run: what the interrupted one left is of no use, and does not stand in the way
    late = nightly(tmp_path / "in", tmp_path / "late", **settings)
    assert late.run_id not in runs
    assert late.faces == done.faces + 10


def test_a_file_that_appears_or_vanishes_while_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = Lake(tmp_path / "in", 21)
    for i in range(4):
        lake.add(f"{i}.parquet", 60)
    nightly(tmp_path / "in", tmp_path / "out")
    lake.add("7.parquet", 20)
    real = pipeline.choose_run

    def late(*given: Any) -> str:  # the input has been listed
        lake.add("25.parquet", 10)
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "choose_run", late)
        assert nightly(tmp_path / "in", tmp_path / "out").faces == 260
    lake.add("8.parquet", 5)
    last = nightly(tmp_path / "in", tmp_path / "out")
    assert manifest(tmp_path / "out", last.run_id, "ingest")["changes"]["added"] == 15
    assert labels_of(tmp_path / "out", last.run_id).keys() == {face for faces in lake.files.values() for face in faces}


def test_when_too_many_lost_neighbors_everything_is_searched(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "in", 22)
    for i in range(4):
        lake.add(f"{i}.parquet", 100)
    run = nightly(tmp_path / "in", tmp_path / "out", index="exact")
    labels = labels_of(tmp_path / "out", run.run_id)
    lake.files["2.parquet"] = dict(list(lake.files["2.parquet"].items())[:70])  # few go, but most were among the nearest of six
    lake.write("2.parquet")
    run = nightly(tmp_path / "in", tmp_path / "out", index="exact")
    counts = manifest(tmp_path / "out", run.run_id, "quantize")
    assert not counts["incremental"]
    assert "of 370 faces are new, or lost neighbors out of full tables" in counts["reason"]
    full = run_clustering(
        ClusterConfig(str(tmp_path / "in"), str(tmp_path / "full"), index="exact", **SETTINGS), progress=False, report=False
    )
    assert table_of(tmp_path / "out", run.run_id) == table_of(tmp_path / "full", full.run_id)
    assert replay(tmp_path / "out", labels, run.run_id) == labels_of(tmp_path / "out", run.run_id)


def test_a_table_of_labels_that_could_not_be_written_is_made_up_for(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake", reason="the lakes extra is not installed")
    lake = Lake(tmp_path / "in", 23)
    lake.add("0.parquet", 100)
    table = tmp_path / "table"
    table.write_text("in the way")
    config = ClusterConfig(str(tmp_path / "in"), str(tmp_path / "out"), labels_table=str(table), **SETTINGS)
    with pytest.raises(RunError, match="the same command tries again"):
        run_nightly(config, progress=False)
    run_id = json.loads((tmp_path / "out" / "latest.json").read_text())["run_id"]
    record = tmp_path / "out" / "_runs" / run_id / "run.json"
    assert json.loads(record.read_text())["state"] == "begun"
    assert (tmp_path / "out" / "reports" / f"run={run_id}" / "report.html").exists()
    table.unlink()
    for _ in range(2):
        assert run_nightly(config, progress=False, report=False).run_id == run_id
        results = deltalake.DeltaTable(str(table))
        assert results.version() == 0
        assert results.to_pyarrow_table().num_rows == 100
        assert json.loads(record.read_text())["state"] == "published"


def test_nothing_is_left_lying_about_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = Lake(tmp_path / "in", 24, people=40)
    lake.add("0.parquet", 500)
    settings = {"index": "cells", "cells": 8}
    nightly(tmp_path / "in", tmp_path / "out", **settings)
    lake.add("1.parquet", 20)
    real = manifests.finish

    def stop(run: Store, results: Any) -> None:  # the work of the stage is done, its traces are not yet removed
        real(run, results)
        raise OSError("the machine is gone")

    for _ in STAGES:
        with monkeypatch.context() as patch:
            patch.setattr(manifests, "finish", stop)
            with pytest.raises(RunError, match="the machine is gone"):
                nightly(tmp_path / "in", tmp_path / "out", **settings)
    run = nightly(tmp_path / "in", tmp_path / "out", **settings)
    folder = tmp_path / "out" / "_runs" / run.run_id
    assert manifest(tmp_path / "out", run.run_id, "quantize")["incremental"]
    scratch = {name for stage in STAGES for name in stage.scratch}
    assert scratch & {"active", "new_files", "candidates"} == {"active", "new_files", "candidates"}
    assert not scratch & {path.name for path in folder.iterdir()}
    assert not [path for path in folder.rglob(".tmp-*")]


def test_an_incremental_search_runs_where_searches_shall_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = Lake(tmp_path / "in", 25, people=40)
    lake.add("0.parquet", 500)
    real, asked = Executor.map, {}

    def anywhere(self: Executor, function: Any, tasks: Any, label: str, **more: Any) -> Any:
        asked[label] = more.pop("resources", None), "smaller" in more
        return real(self, function, tasks, label, **more)

    monkeypatch.setattr(Executor, "map", anywhere)
    for name in ("1.parquet", "2.parquet"):
        settings = {"index": "cells", "cells": 8, "search_resource": "searchers"}
        nightly(tmp_path / "in", tmp_path / "out", **settings)
        resources, in_steps = asked["search"]
        assert resources.custom == "searchers"
        assert in_steps
        lake.add(name, 20)
    assert asked["probe"][0].custom == "searchers"


def test_a_search_in_smaller_steps_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = Lake(tmp_path / "in", 26, people=40)
    lake.add("0.parquet", 500)
    settings = {"index": "cells", "cells": 8}
    nightly(tmp_path / "in", tmp_path / "out", **settings)
    lake.add("1.parquet", 40)
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    whole = nightly(tmp_path / "in", tmp_path / "whole", **settings)
    real = Executor.map

    def smaller(self: Executor, function: Any, tasks: Any, label: str, **more: Any) -> Any:
        if label == "search":
            tasks = [more["smaller"](more["smaller"](task)) for task in tasks]
        return real(self, function, tasks, label, **more)

    monkeypatch.setattr(Executor, "map", smaller)
    run = nightly(tmp_path / "in", tmp_path / "out", **settings)
    assert table_of(tmp_path / "out", run.run_id) == table_of(tmp_path / "whole", whole.run_id)


def test_what_a_run_wrote_that_was_never_published_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = Lake(tmp_path / "in", 27)
    lake.add("0.parquet", 200)
    first = nightly(tmp_path / "in", tmp_path / "out")
    lake.add("1.parquet", 20)
    real = publication.set_current

    def gone(*given: Any) -> None:
        raise OSError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(publication, "set_current", gone)
        with pytest.raises(RunError):
            nightly(tmp_path / "in", tmp_path / "out")

    def runs_in(folder: str) -> set[str]:
        return {path.name.removeprefix("run=") for path in (tmp_path / "out" / folder).iterdir()}

    (stale,) = runs_in("events")
    lake.add("2.parquet", 20)  # so that the run starts over

    def beaten(*given: Any) -> None:
        monkeypatch.setattr(publication, "set_current", real)
        nightly(tmp_path / "in", tmp_path / "out", run_id="winner")
        real(*given)

    monkeypatch.setattr(publication, "set_current", beaten)
    with pytest.raises(PublishError, match=r"run winner published to .* while the incremental run loser was running.*--run-id"):
        nightly(tmp_path / "in", tmp_path / "out", run_id="loser")
    assert runs_in("events") == runs_in("moves") == {"winner"}
    assert runs_in("labels") == {first.run_id, "winner"}
    states = {info.run_id: info.state for info in list_runs(str(tmp_path / "out"))}
    assert states == {first.run_id: "published", stale: "superseded", "winner": "published", "loser": "superseded"}
    lake.add("3.parquet", 10)
    last = nightly(tmp_path / "in", tmp_path / "out")
    assert last.faces == 250
    before, after = labels_of(tmp_path / "out", "winner"), labels_of(tmp_path / "out", last.run_id)
    assert replay(tmp_path / "out", before, last.run_id) == after


def test_cluster_ids_are_never_reused_even_after_a_run_that_renumbers(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "in", 28)
    lake.add("0.parquet", 200)
    nightly(tmp_path / "in", tmp_path / "out")
    given = json.loads((tmp_path / "out" / "latest.json").read_text())["next_id"]
    lake.files["0.parquet"] = dict(list(lake.files["0.parquet"].items())[:5])  # fewer people
    lake.write("0.parquet")
    config = ClusterConfig(str(tmp_path / "in"), str(tmp_path / "out"), **SETTINGS)
    renumbered = labels_of(tmp_path / "out", run_clustering(config, progress=False, report=False).run_id)
    assert json.loads((tmp_path / "out" / "latest.json").read_text())["next_id"] == given
    lake.files["1.parquet"] = {f"new-{i}": row for i, row in enumerate(np.eye(16, dtype=np.float32) * -1)}
    lake.write("1.parquet")
    last = nightly(tmp_path / "in", tmp_path / "out")
    fresh = set(labels_of(tmp_path / "out", last.run_id).values()) - set(renumbered.values())
    assert len(fresh) > 5
    assert min(fresh) >= given


def test_constraints_that_a_run_does_not_name_are_logged_as_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lake = Lake(tmp_path / "in", 29)
    lake.add("0.parquet", 60)
    (tmp_path / "decisions.csv").write_text("id_a,id_b,kind\nface-0,face-1,must-link\n")
    nightly(tmp_path / "in", tmp_path / "out", constraints=str(tmp_path / "decisions.csv"))
    assert "no longer hold" not in caplog.text
    lake.add("1.parquet", 5)
    nightly(tmp_path / "in", tmp_path / "out")
    assert "this run has none (--constraints): they no longer hold" in caplog.text


def test_a_missing_extra_is_said_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = Lake(tmp_path / "in", 30)
    lake.add("0.parquet", 20)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "deltalake" else real(name, *more))
    with pytest.raises(SettingsError, match=r"--labels-table writes a Delta table, .* pip install 'faceflow\[lakes\]'"):
        nightly(tmp_path / "in", tmp_path / "out", labels_table=str(tmp_path / "table"))
    assert not (tmp_path / "out").exists()
