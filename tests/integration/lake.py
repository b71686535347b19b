"""A data lake that grows, and incremental runs over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from faceflow import ClusterConfig, run_nightly
from faceflow.runs.pipeline import RunResult
from faceflow.stages.artifacts.faces import good_entries, read_ids, read_quarantined
from faceflow.storage import layout
from faceflow.storage.object_store import Store
from faceflow.tables import NeighborTable
from tests.conftest import write_faces

SETTINGS: dict[str, Any] = {"min_similarity": 0.5, "neighbors": 6, "edges": "threshold"}


class Lake:
    """A growing folder of Parquet files: faces of a few people, so that tables are full and deletions bite."""

    def __init__(self, folder: Path, seed: int, people: int = 12, dim: int = 16) -> None:
        self.folder, self.rng = folder, np.random.default_rng(seed)
        self.centers = self.rng.standard_normal((people, dim))
        self.files: dict[str, dict[str, np.ndarray]] = {}
        self.count = 0

    def faces(self, count: int) -> dict[str, np.ndarray]:
        made = {}
        for _ in range(count):
            center = self.centers[self.rng.integers(len(self.centers))]
            made[f"face-{self.count}"] = (center + 0.35 * self.rng.standard_normal(len(center))).astype(np.float32)
            self.count += 1
        return made

    def write(self, name: str) -> None:
        faces = self.files[name]
        write_faces(self.folder / name, np.array(list(faces.values())), pa.array(list(faces)), row_group_size=40)

    def add(self, name: str, count: int) -> None:
        self.files[name] = self.faces(count)
        self.write(name)

    def change(self) -> str:
        """One random thing that happens to a data lake."""
        rng, names = self.rng, sorted(self.files)
        kind = str(rng.choice(["add", "add", "append", "remove rows", "remove file", "embed again", "compact", "reorder"]))
        name = str(rng.choice(names))
        faces = self.files[name]
        if kind == "add" or len(names) < 3:
            self.add(f"{rng.integers(100):02d}-{self.count}.parquet", int(rng.integers(1, 60)))
            return "add"
        if kind == "append":
            self.files[name] = faces | self.faces(int(rng.integers(1, 30)))
        elif kind == "remove rows":
            self.files[name] = {k: v for k, v in faces.items() if rng.random() < 0.8} or faces
        elif kind == "embed again":
            self.files[name] = {k: v if rng.random() < 0.7 else next(iter(self.faces(1).values())) for k, v in faces.items()}
        elif kind == "reorder":
            self.files[name] = dict(sorted(faces.items(), key=lambda _: rng.random()))
        else:
            del self.files[name]
            (self.folder / name).unlink()
            if kind == "compact":  # the same faces, in another file
                name = f"{rng.integers(100):02d}-compacted-{self.count}.parquet"
                self.files[name] = faces
        if name in self.files:
            self.write(name)
        return kind


def nightly(lake: Path, output: Path, **more: Any) -> RunResult:
    return run_nightly(ClusterConfig(str(lake), str(output), **(SETTINGS | more)), progress=False, report=False)


def table_of(output: Path, run_id: str) -> dict[str, dict[str, float]]:
    """Per id, its neighbors' ids and similarities."""
    run = Store.at(str(output / "_runs" / run_id))
    counts = json.loads((output / "_runs" / run_id / "manifests" / "ingest.json").read_text())["result"]
    parts = range(len(counts["starts"]) - 1)
    ids: list[str] = []
    for p in parts:
        every = read_ids(run, p)
        ids += every.filter(pa.array(good_entries(read_quarantined(run, p), len(every)))).to_pylist()
    results: dict[str, dict[str, float]] = {}
    for p in parts:
        table = NeighborTable.from_batch(run.read_batch(layout.part("neighbors", p)), counts["starts"][p])
        for i in range(len(table)):
            selected = slice(table.offsets[i], table.offsets[i + 1])
            assert (np.diff(table.values[selected]) <= 0).all()
            pairs = zip(table.rows[selected].tolist(), table.values[selected].tolist(), strict=True)
            results[ids[counts["starts"][p] + i]] = {ids[row]: value for row, value in pairs}
    return results


def manifest(output: Path, run_id: str, stage: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((output / "_runs" / run_id / "manifests" / f"{stage}.json").read_text())["result"]
    return results
