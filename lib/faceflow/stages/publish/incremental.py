"""Incremental publish: clusters keep the ids that they had in the base run, and events say what became of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from faceflow.kernels.clusters.cluster_ids import stable_clusters, transitions
from faceflow.stages.artifacts.faces import good_entries, read_column, read_ids, read_quarantined
from faceflow.stages.changes import Changes, same_ids
from faceflow.stages.publish.events import events, moves_schema
from faceflow.storage import column_types, layout
from faceflow.storage.layout import RunStores
from faceflow.storage.object_store import Store
from faceflow.tables import Parts


@dataclass(frozen=True)
class Named:
    """lookup: int64[modules], the cluster id of each module; moved_known: faces of both runs in another cluster; events: how
    many of each."""

    lookup: np.ndarray
    moved_known: int
    events: Mapping[str, int]


def name_clusters(stores: RunStores, parts: Parts, modules: np.ndarray, changes: Changes, first_id: int) -> Named:
    """Give modules the ids that their clusters had (`cluster_ids.stable_clusters`), new ones from first_id on, and
    write the events. modules: int64[N]."""
    known_before = _clusters(changes.base, range(len(changes.base_parts)))
    base_rows = same_ids(stores.run, range(len(parts)))
    known = np.where(base_rows >= 0, known_before[base_rows], -1)
    lookup, _ = stable_clusters(modules, known, first_id)
    removed = np.ones(len(known_before), bool)
    removed[base_rows[base_rows >= 0]] = False
    pairs = transitions(
        np.concatenate([known, known_before[removed]]),
        np.concatenate([lookup[modules], np.full(int(removed.sum()), -1)]),
    )
    happened = events(*pairs)
    with stores.output.open_write(layout.events_part(stores.run_id), durable=True) as file:
        pq.write_table(happened, file, compression="zstd")
    counts = {item["values"]: item["counts"] for item in happened.column("event").value_counts().to_pylist()}
    return Named(lookup, int(((known >= 0) & (known != lookup[modules])).sum()), counts)


def _clusters(run: Store, parts: Iterable[int]) -> np.ndarray:
    """The cluster of each face of these parts of a finished run."""
    return np.asarray(run.read_batch(layout.CLUSTERS).column(0).to_numpy()[read_column(run, "modules", parts)])


def moves(run: Store, part: int, parts: Parts, clusters: np.ndarray, changes: Changes, kind: pa.DataType) -> pa.Table:
    """One part's faces whose cluster is another than before, or that are new; and those that were in it and are gone.

    clusters: int64[n], of its faces; kind: type of the published ids.
    """
    ids = read_ids(run, part)
    ids = ids.filter(pa.array(good_entries(read_quarantined(run, part), len(ids))))
    before = same_ids(run, [part])
    known = before >= 0
    carried = not changes.is_new(part)
    source = changes.sources[part] if carried else range(len(changes.base_parts) if known.any() else 0)
    old = _clusters(changes.base, source) if source else np.empty(0, np.int64)
    first = changes.base_parts.starts[source.start]
    was = np.full(len(before), -1, np.int64)
    was[known] = old[before[known] - first]
    moved = np.flatnonzero(was != clusters)
    columns_of = [ids.take(pa.array(moved)), pa.array(was[moved], mask=~known[moved]), pa.array(clusters[moved])]
    if carried:
        # A changed face is in a part of its own.
        elsewhere = same_ids(run, [part, *range(changes.carried_parts, len(parts))]) - first
        gone = np.ones(len(old), bool)
        gone[elsewhere[(elsewhere >= 0) & (elsewhere < len(old))]] = False
        ids_before = []
        for item in source:
            stored = read_ids(changes.base, item)
            ids_before.append(stored.filter(pa.array(good_entries(read_quarantined(changes.base, item), len(stored)))))
        left = pa.concat_arrays(ids_before).filter(pa.array(gone))
        ended = [left, pa.array(old[gone]), pa.nulls(len(left), pa.int64())]
        columns_of = [pa.concat_arrays(pair) for pair in zip(columns_of, ended, strict=True)]
    return pa.table([column_types.as_published(columns_of[0], kind), *columns_of[1:]], schema=moves_schema(kind))
