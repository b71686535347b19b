"""Stage 6, publish: modules -> stable cluster ids -> label Parquet. The pipeline then makes them current."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from faceflow.kernels.clusters.naming import canonical_order, stable_clusters, transitions
from faceflow.stages.artifacts.faces import good_entries, id_type, label_table, read_column, read_ids, read_quarantined
from faceflow.stages.base import Context, LastNight, Outcome, Stage
from faceflow.stages.publish import quality
from faceflow.stages.publish.events import events, moves_schema
from faceflow.storage import columns, layout, table_formats
from faceflow.storage.object_store import Store
from faceflow.tables import Parts

CLUSTERS_SCHEMA = pa.schema([pa.field("cluster", pa.int64(), nullable=False)])
"""Per module number, and per face: the published cluster."""


def run(context: Context) -> Outcome:
    """Name the clusters once, then write every part's labels; after a night also what became of the clusters."""
    stores, parts, past = context.stores, context.parts, context.last_night
    counts, pieces = context.executor.call(
        name_clusters, stores.run, stores.output, stores.run_id, parts, past, context.first_id, label="clusters"
    )
    kind = id_type(context.done["ingest"].counts, stores.run)
    results = context.executor.map(
        publish_part,
        [(stores.run, stores.output, stores.run_id, part, parts, past, kind) for part in range(len(parts))],
        "publish",
        sizes=[parts.rows(part) for part in range(len(parts))],
    )
    config = context.config
    collected, examples = context.executor.call(
        quality.summarize, stores.run, stores.output, stores.run_id, parts, config.seed,
        config.flow == "directed" if config.method == "infomap" else None, label="quality",
    )  # fmt: skip
    shown = {key: value for key, value in collected.items() if key != "sizes"}
    for_report = {"examples": examples, "similarities": sum(part.similarities for part in results).tolist()}
    if past is not None:
        counts["moved"] = sum(part.moved for part in results)
    counts["label_bytes"] = sum(part.label_bytes for part in results)
    return Outcome(counts | {"quality": collected} | for_report | shown, pieces)


def labels_are_there(context: Context) -> bool:
    """Whether OUTPUT still holds every label part (it may have been emptied while the run directory lay elsewhere)."""
    names = context.stores.output.names(layout.label_folder(context.stores.run_id))
    return len(names) == len(context.parts)


STAGE = Stage(
    name="publish",
    reads=("ids", "modules", "neighbors", "edges"),
    writes=("clusters", "quality"),
    scratch=("quality",),
    settings=("id_column",),
    after=("ingest", "detect"),
    packages=("faceflow",),
    whole=labels_are_there,
    run=run,
)


def _before(run: Store, parts: Iterable[int]) -> np.ndarray:
    """The row that each face of these parts, by its id, had in the run before; -1 for a new one."""
    return read_column(run, "past", parts, 1)


def _clusters(run: Store, parts: Iterable[int]) -> np.ndarray:
    """The cluster of each face of these parts of a finished run."""
    return run.read_batch(layout.CLUSTERS).column(0).to_numpy()[read_column(run, "modules", parts)]


def name_clusters(
    run: Store, output: Store, run_id: str, parts: Parts, past: LastNight | None, first_id: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """Write the module -> cluster lookup: ids from first_id on by falling size, ties by first row; after a night, the ids
    that the clusters had (`kernels.clusters.naming.stable_clusters`), and the events."""
    modules = read_column(run, "modules", range(len(parts)))
    lookup, sizes = canonical_order(modules)
    lookup[lookup >= 0] += first_id
    counts: dict[str, Any] = {"clusters": len(sizes), "singletons": int((sizes == 1).sum()), "next_id": first_id + len(sizes)}
    if past is not None:
        clusters_before = _clusters(past.run, range(len(past.parts)))
        before = _before(run, range(len(parts)))
        known = np.where(before >= 0, clusters_before[before], -1)
        lookup, _ = stable_clusters(modules, known, first_id)
        counts["next_id"] = max(first_id, int(lookup.max()) + 1)
        gone = np.ones(len(clusters_before), bool)
        gone[before[before >= 0]] = False
        counts["untouched_moved"] = int(((known >= 0) & (known != lookup[modules])).sum())
        pairs = transitions(
            np.concatenate([known, clusters_before[gone]]), np.concatenate([lookup[modules], np.full(int(gone.sum()), -1)])
        )
        happened = events(*pairs)
        with output.open_write(layout.events_part(run_id), durable=True) as file:
            pq.write_table(happened, file, compression="zstd")
        counts["events"] = {item["values"]: item["counts"] for item in happened.column("event").value_counts().to_pylist()}
    pieces = {}
    for name, clusters in ((layout.CLUSTERS, lookup), (layout.CLUSTERS_OF_FACES, lookup[modules])):
        pieces[name] = run.write_arrow(name, CLUSTERS_SCHEMA, [pa.record_batch([clusters], schema=CLUSTERS_SCHEMA)])
    return counts, pieces


@dataclass(frozen=True)
class Published:
    """What is known of one part whose labels are written: their bytes, how many faces moved to another cluster (of a night),
    and the histogram of its similarities inside and outside clusters (`kernels.clusters.quality.doubts`)."""

    label_bytes: int
    moved: int
    similarities: np.ndarray


def publish_part(
    run: Store, output: Store, run_id: str, part: int, parts: Parts, past: LastNight | None, kind: pa.DataType
) -> Published:
    """Write one part's labels, `id` and `cluster` in input order, null for a row set aside.

    Rows set aside are also listed, with file, row and reason, under `quarantined/`; after a night, faces whose cluster is
    another under `moves/`. How sure its clusters are goes to `quality/`.
    """
    ids, quarantined = read_ids(run, part), read_quarantined(run, part)
    good = good_entries(quarantined, len(ids))
    every = run.read_batch(layout.CLUSTERS_OF_FACES).column(0).to_numpy()
    clusters = every[parts.starts[part] : parts.starts[part + 1]]
    histogram = quality.write_part(run, part, parts.starts[part], every)
    if quarantined.num_rows:
        lines = {"id": columns.as_published(ids.take(quarantined.column("position")), kind)}
        lines |= {name: quarantined.column(name) for name in ("file", "row", "reason")}
        with output.open_write(layout.quarantined_part(run_id, part), durable=True) as file:
            pq.write_table(pa.table(lines), file, compression="zstd")
    moves = 0
    if past is not None:
        moved = _moves(run, part, len(parts), ids.filter(pa.array(good)), clusters, past, kind)
        moves = len(moved)
        with output.open_write(layout.moves_part(run_id, part), durable=True) as file:
            pq.write_table(moved, file, compression="zstd")
    with output.open_write(layout.label_part(run_id, part), durable=True) as file:
        pq.write_table(label_table(ids, kind, good, clusters), file, compression="zstd")
        return Published(int(file.tell()), moves, histogram)


def commit_table(table: Store, output: Store, run_id: str, sequence: int) -> int:
    """Put the run's labels into a Delta table, file by file, in one commit; returns its version. sequence: of their
    publication.

    Raises PublishError where another run was published since.
    """
    folder = layout.label_folder(run_id)
    names = output.names(folder)

    def batches() -> Iterator[pa.RecordBatch]:
        for name in names:
            yield from labels_of(name).to_batches()

    def labels_of(name: str) -> pa.Table:
        return table_formats.as_delta(pq.read_table(pa.BufferReader(output.read_bytes(f"{folder}/{name}"))))

    def is_current() -> bool:
        return (layout.read_latest(output) or {}).get("run_id") == run_id

    fence = table_formats.Fence(output.root, sequence, is_current)
    return table_formats.commit_labels(table, run_id, labels_of(names[0]).schema, batches, fence)


def _moves(
    run: Store, part: int, parts: int, ids: pa.Array, clusters: np.ndarray, past: LastNight, kind: pa.DataType
) -> pa.Table:
    """One part's faces whose cluster is another than before, or that are new; and those that were in it and are gone."""
    before = _before(run, [part])
    known = before >= 0
    carried = part < len(past.sources)
    source = past.sources[part] if carried else range(len(past.parts) if known.any() else 0)
    old = _clusters(past.run, source) if source else np.empty(0, np.int64)
    first = past.parts.starts[source.start]
    was = np.full(len(before), -1, np.int64)
    was[known] = old[before[known] - first]
    moved = np.flatnonzero(was != clusters)
    collected = [ids.take(pa.array(moved)), pa.array(was[moved], mask=~known[moved]), pa.array(clusters[moved])]
    if carried:
        # A face whose embedding is another is in a part of its own.
        elsewhere = _before(run, [part, *range(len(past.sources), parts)]) - first
        gone = np.ones(len(old), bool)
        gone[elsewhere[(elsewhere >= 0) & (elsewhere < len(old))]] = False
        faces_before = []
        for item in source:
            ids_before = read_ids(past.run, item)
            faces_before.append(ids_before.filter(pa.array(good_entries(read_quarantined(past.run, item), len(ids_before)))))
        left = pa.concat_arrays(faces_before).filter(pa.array(gone))
        ended = [left, pa.array(old[gone]), pa.nulls(len(left), pa.int64())]
        collected = [pa.concat_arrays(both) for both in zip(collected, ended, strict=True)]
    return pa.table([columns.as_published(collected[0], kind), *collected[1:]], schema=moves_schema(kind))
