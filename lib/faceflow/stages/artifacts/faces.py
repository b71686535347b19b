"""Reading the parts that ingest and quantize wrote, as arrays: shared by the stages that follow."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from faceflow.storage import column_types, layout
from faceflow.storage.object_store import Store
from faceflow.tables import QUANTIZER_METADATA, Parts


@dataclass(frozen=True)
class RunData:
    """Where the parts of a run lie: what a task needs to read any of them. dim: of the vectors."""

    store: Store
    parts: Parts
    dim: int


def matrix(column: pa.Array, dim: int) -> np.ndarray:
    """A fixed-size-list column as an array [n, dim] that shares its memory."""
    return np.asarray(column.flatten().to_numpy().reshape(-1, dim))


def read_vectors(run: Store, part: int, dim: int) -> np.ndarray:
    """float32[n, dim] of one part; on a disk a memory map, of which only what is used is read."""
    return matrix(run.read_batch(layout.part("vectors", part)).column(0), dim)


def read_ids(run: Store, part: int) -> pa.Array:
    """Ids of all input rows of one part, quarantined ones (`read_quarantined`) included, in their storage type."""
    ids = run.read_batch(layout.part("ids", part)).column(0)
    stored = column_types.id_storage(ids.type)
    return ids if stored is None else column_types.cast(ids, stored)


def read_quarantined(run: Store, part: int) -> pa.RecordBatch:
    """The rows of one part that cannot be used: `tables.QUARANTINED_SCHEMA`."""
    return run.read_batch(layout.part("quarantined", part))


def good_entries(quarantined: pa.RecordBatch, entries: int) -> np.ndarray:
    """bool[entries]: which entries of a part's ids are faces, as they were not quarantined."""
    good = np.ones(entries, bool)
    good[quarantined.column("position").to_numpy()] = False
    return good


def label_table(ids: pa.Array, kind: pa.DataType, good: np.ndarray, clusters: np.ndarray) -> pa.Table:
    """`id` (of this type), `cluster` of one part's input rows: clusters int64[...] of the good ones, null for the others."""
    every = np.zeros(len(ids), np.int64)
    every[good] = clusters
    return pa.table([column_types.as_published(ids, kind), pa.array(every, mask=~good)], names=["id", "cluster"])


def read_column(run: Store, kind: str, parts: Iterable[int], column: int = 0) -> np.ndarray:
    """One column of these parts' files (`base_rows`, `modules`, `state`), one after the other."""
    return np.concatenate([run.read_batch(layout.part(kind, part)).column(column).to_numpy() for part in parts])


def rows_of(run: Store, kind: str, parts: Parts, rows: np.ndarray, column: int = 0) -> np.ndarray:
    """One column of these rows int64[n], in any order, part by part."""
    results = np.empty(len(rows), np.int64)
    for part in range(len(parts)):
        selected = np.flatnonzero((rows >= parts.starts[part]) & (rows < parts.starts[part + 1]))
        if len(selected):
            results[selected] = (
                run.read_batch(layout.part(kind, part)).column(column).to_numpy()[rows[selected] - parts.starts[part]]
            )
    return results


def ids_of(run: Store, parts: Parts, rows: np.ndarray) -> list[str]:
    """The ids of these rows int64[n], ascending, as text."""
    results: list[str] = []
    cuts = np.searchsorted(rows, parts.starts)
    for part in np.flatnonzero(np.diff(cuts)).tolist():
        ids = read_ids(run, part)
        entries = np.flatnonzero(good_entries(read_quarantined(run, part), len(ids)))
        selected = entries[rows[cuts[part] : cuts[part + 1]] - parts.starts[part]]
        results += map(column_types.shown, ids.take(pa.array(selected)).to_pylist())
    return results


def read_followers(run: Store, name: str = layout.GROUPS) -> tuple[np.ndarray, np.ndarray]:
    """(faces that count as one with another int32[f], ascending; the leader of each int32[f])."""
    batch = run.read_batch(name)
    return batch.column(0).to_numpy(), batch.column(1).to_numpy()


def leaders_of(rows: np.ndarray, followers: np.ndarray, leaders: np.ndarray) -> np.ndarray:
    """int32[n]: the leader of each of these rows, or itself, from `read_followers`."""
    at = np.searchsorted(followers, rows).clip(max=max(0, len(followers) - 1))
    return np.where(followers[at] == rows, leaders[at], rows) if len(followers) else rows


def read_groups(run: Store, faces: int, name: str = layout.GROUPS) -> np.ndarray:
    """int32[faces]: the face that each one counts as one with (`kernels.graph.near_identical`), itself where the run has no
    groups."""
    leader = np.arange(faces, dtype=np.int32)
    if run.exists(name):
        followers, leaders = read_followers(run, name)
        leader[followers] = leaders
    return leader


def read_quantizer(run: Store, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(centroids float32[cells, dim], first cell of each shard and the end int64[shards + 1])."""
    batch = run.read_batch(layout.CENTROIDS)
    record = json.loads(batch.schema.metadata[QUANTIZER_METADATA])
    return matrix(batch.column(0), dim), np.array(record["shard_starts"])
