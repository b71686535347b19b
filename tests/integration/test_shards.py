"""Neighbor tables and their recall, whatever the workers, shards, memory and kills."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from faceflow import ClusterConfig, RunResult, run_clustering
from faceflow.errors import QualityError, SettingsError
from faceflow.stages.base import Context
from faceflow.stages.quantize import full as quantize_full
from faceflow.stages.quantize.training import TrainQuantizer
from faceflow.stages.search import full as search_full
from faceflow.stages.search.full import SearchCellsShard
from faceflow.storage import layout
from faceflow.storage.object_store import Store
from faceflow.tables import NeighborTable
from tests.conftest import write_faces

pytestmark = pytest.mark.usefixtures("ray_session")


def run(source: Path | str, output: Path | str, **settings: object) -> RunResult:
    return run_clustering(ClusterConfig(str(source), str(output), **settings), progress=False, report=False)  # type: ignore[arg-type]


def spread_out(n: int = 3000, dim: int = 16) -> np.ndarray:
    """Faces without any structure: the hardest case for cells."""
    return np.random.default_rng(0).standard_normal((n, dim)).astype(np.float32)


def test_low_recall_fails_loudly_or_raises_the_probes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_faces(tmp_path / "in" / "a.parquet", spread_out())
    hard = {"index": "cells", "cells": 60, "probes": 1, "min_similarity": 0.6}
    with pytest.raises(QualityError, match=r"edge recall 0\.\d+ .* is below --min-recall 0\.99: use --raise-probes"):
        run(tmp_path / "in", tmp_path / "out", **hard)
    assert not (tmp_path / "out" / "latest.json").exists()
    with pytest.raises(QualityError):
        run(tmp_path / "in", tmp_path / "out", **hard)  # continues to the same verdict
    result = run(tmp_path / "in", tmp_path / "out", **hard, raise_probes=True)
    assert result.recall.estimate >= 0.99
    pointer = json.loads((tmp_path / "out" / "latest.json").read_text())
    assert pointer["recall"] == result.recall.estimate
    assert pointer["recall_interval"][0] <= pointer["recall"] <= pointer["recall_interval"][1]
    accepted = run(tmp_path / "in", tmp_path / "out", **hard, min_recall=0)
    assert accepted.recall.estimate < 0.99


def tables(output: Path) -> list[NeighborTable]:
    (folder,) = (output / "_runs").iterdir()
    store = Store.at(str(folder))
    starts = json.loads((folder / "manifests" / "ingest.json").read_text())["result"]["starts"]
    return [NeighborTable.from_batch(store.read_batch(layout.part("neighbors", i)), s) for i, s in enumerate(starts[:-1])]


def same_tables(a: list[NeighborTable], b: list[NeighborTable]) -> bool:
    return all(
        np.array_equal(getattr(x, f), getattr(y, f)) for x, y in zip(a, b, strict=True) for f in ("offsets", "rows", "values")
    )


@pytest.mark.parametrize("threshold", [0.4, None])
def test_tables_do_not_depend_on_workers_shards_or_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float | None
) -> None:
    write_faces(tmp_path / "in" / "a.parquet", spread_out(40_000), row_group_size=5000)
    settings = {
        "index": "cells",
        "cells": 80,
        "min_similarity": threshold,
        "neighbors": 10,
        "min_recall": 0,
        "engine": "infomap",
    }
    until_search(tmp_path / "in", tmp_path / "one", workers=1, **settings)
    one = tables(tmp_path / "one")
    assert sum(len(t.rows) for t in one) > 100_000
    until_search(tmp_path / "in", tmp_path / "two", workers=2, **settings)
    assert same_tables(one, tables(tmp_path / "two"))
    with monkeypatch.context() as patch:
        patch.setattr(quantize_full, "train", functools.partial(train_into_shards, 23))
        until_search(tmp_path / "in", tmp_path / "shards", **settings)
    plan = json.loads(next((tmp_path / "shards" / "_runs").glob("*/manifests/quantize.json")).read_text())
    assert plan["result"]["cells"]["shards"] == 23
    assert same_tables(one, tables(tmp_path / "shards"))
    with monkeypatch.context() as patch:
        flag = tmp_path / "killed"
        patch.setattr(search_full, "search_cells_shard", functools.partial(killed_thrice, str(flag)))
        until_search(tmp_path / "in", tmp_path / "kill", **settings)
    assert [f.name for f in sorted(tmp_path.glob("killed-*"))] == ["killed-0", "killed-1", "killed-2"]
    assert same_tables(one, tables(tmp_path / "kill"))


def train_into_shards(shards: int, request: TrainQuantizer) -> None:
    """In a worker: the real training, with another number of shards."""
    from faceflow.kernels.ivf import plan as plans
    from faceflow.stages.quantize.training import train

    real = plans.shard_count
    plans.shard_count = lambda *a: shards
    try:
        train(request)
    finally:
        plans.shard_count = real


def killed_thrice(flag: str, request: SearchCellsShard) -> None:
    """In a worker: dies by SIGKILL three times, then does the real work: in four steps, as its memory may be the reason."""
    from faceflow.stages.search.full import search_cells_shard

    for i in range(3):
        try:
            open(f"{flag}-{i}", "x").close()
        except FileExistsError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)
    assert request.steps in (1, 2, 4)
    search_cells_shard(request)


def until_search(source: Path, output: Path, **settings: object) -> None:
    """A run that stops after the search stage."""
    from faceflow.runs import pipeline

    class EnoughError(Exception):
        pass

    def stop(context: Context) -> None:
        raise EnoughError

    upto = tuple(dataclasses.replace(stage, gate=stop) if stage.name == "search" else stage for stage in pipeline.STAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "STAGES", upto)
        with pytest.raises(EnoughError):
            run(source, output, **settings)


def test_no_threshold_keeps_the_plain_nearest(tmp_path: Path) -> None:
    x = spread_out(2000)
    write_faces(tmp_path / "in" / "a.parquet", x)
    for index in ("exact", "cells"):
        until_search(tmp_path / "in", tmp_path / index, index=index, neighbors=7, min_similarity=None)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    s = unit @ unit.T
    np.fill_diagonal(s, -2)
    want = np.sort(np.argsort(-s, axis=1)[:, :7], axis=1)
    exact = np.concatenate([np.sort(t.rows.reshape(-1, 7), axis=1) for t in tables(tmp_path / "exact")])
    assert (exact == want).mean() > 0.9999
    cells = np.concatenate([t.rows for t in tables(tmp_path / "cells")]).reshape(-1, 7)
    assert np.mean([len(set(a) & set(b)) / 7 for a, b in zip(cells, want, strict=True)]) > 0.95


def test_a_small_memory_limit_makes_more_shards(tmp_path: Path) -> None:
    from faceflow.kernels.ivf.plan import Workers, shard_count

    assert shard_count(1_000_000, 512, 200, 2000, 3, Workers(2, 2**29)) > shard_count(
        1_000_000, 512, 200, 2000, 3, Workers(2, 2**34)
    )
    write_faces(tmp_path / "in" / "a.parquet", spread_out(100))
    with pytest.raises(SettingsError, match="memory_limit is 1000: it must be at least 512MiB"):
        run(tmp_path / "in", tmp_path / "out", memory_limit=1000)
