"""Stage 6, publish: modules -> stable cluster ids -> label Parquet. The pipeline then makes them current."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from faceflow.kernels.clusters.cluster_ids import canonical_order
from faceflow.stages.artifacts.faces import good_entries, label_table, read_column, read_ids, read_quarantined
from faceflow.stages.base import Context, Outcome, Stage
from faceflow.stages.changes import Changes
from faceflow.stages.publish import incremental, quality
from faceflow.stages.results import PublishResult
from faceflow.storage import column_types, layout
from faceflow.storage.layout import RunStores
from faceflow.tables import Parts

CLUSTERS_SCHEMA = pa.schema([pa.field("cluster", pa.int64(), nullable=False)])
"""Per module number, and per face: the published cluster."""


def run(context: Context) -> Outcome[PublishResult]:
    """Name the clusters once, then write every part's labels; after a base run also what became of its clusters."""
    stores, parts, changes, config = context.stores, context.parts, context.changes, context.config
    executor = context.executor
    named = executor.call(name_clusters, NameClusters(stores, parts, changes, context.first_id), "clusters")
    kind = column_types.type_of(context.results.ingest.id_type)
    published = executor.map(
        publish_part,
        [PublishPart(stores, part, parts, changes, kind) for part in range(len(parts))],
        "publish",
        sizes=[parts.rows(part) for part in range(len(parts))],
    )
    directed = config.flow == "directed" if config.method == "infomap" else None
    summary = executor.call(quality.summarize, quality.Summarize(stores, parts, config.seed, directed), "quality")
    inside, between = np.sum([part.similarities for part in published], axis=0).tolist()
    result = PublishResult(
        named.clusters, named.singletons, named.next_id, sum(part.label_bytes for part in published), summary.quality,
        (tuple(inside), tuple(between)), summary.examples,
        moved=sum(part.moved for part in published) if changes is not None else None,
        moved_known=named.moved_known, events=named.events,
    )  # fmt: skip
    return Outcome(result, named.files)


def labels_are_complete(context: Context) -> bool:
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
    whole=labels_are_complete,
    run=run,
)


@dataclass(frozen=True)
class NameClusters:
    """Request: the cluster id of each module; first_id: the first that was never given."""

    stores: RunStores
    parts: Parts
    changes: Changes | None
    first_id: int


@dataclass(frozen=True)
class NamedClusters:
    """What was named (`results.PublishResult`), and the bytes of the files."""

    clusters: int
    singletons: int
    next_id: int
    files: dict[str, int]
    moved_known: int | None = None
    events: dict[str, int] | None = None


def name_clusters(request: NameClusters) -> NamedClusters:
    """Write the module -> cluster lookup: ids from first_id on by falling size, ties by first row; after a base run the ids
    that its clusters had, and the events."""
    stores, changes, first_id = request.stores, request.changes, request.first_id
    modules = read_column(stores.run, "modules", range(len(request.parts)))
    lookup, sizes = canonical_order(modules)
    lookup[lookup >= 0] += first_id
    next_id, moved_known, events = first_id + len(sizes), None, None
    if changes is not None:
        named = incremental.name_clusters(stores, request.parts, modules, changes, first_id)
        lookup, moved_known, events = named.lookup, named.moved_known, dict(named.events)
        next_id = max(first_id, int(lookup.max()) + 1)
    files = {}
    for name, clusters in ((layout.CLUSTERS, lookup), (layout.CLUSTERS_OF_FACES, lookup[modules])):
        batch = pa.record_batch([clusters], schema=CLUSTERS_SCHEMA)
        files[name] = stores.run.write_arrow(name, CLUSTERS_SCHEMA, [batch])
    return NamedClusters(len(sizes), int((sizes == 1).sum()), next_id, files, moved_known, events)


@dataclass(frozen=True)
class PublishPart:
    """Request: the labels of one part; kind: type of the published ids."""

    stores: RunStores
    part: int
    parts: Parts
    changes: Changes | None
    kind: pa.DataType


@dataclass(frozen=True)
class PublishedPart:
    """What is known of one part whose labels are written: their bytes, faces in another cluster than in the base run, and the
    histogram of its similarities inside and outside clusters (`kernels.clusters.quality.doubts`)."""

    label_bytes: int
    moved: int
    similarities: np.ndarray


def publish_part(request: PublishPart) -> PublishedPart:
    """Write one part's labels, `id` and `cluster` in input order, null for a quarantined row.

    Quarantined rows are also listed, with file, row and reason, under `quarantined/`; after a base run, faces in another
    cluster under `moves/`. How certain its clusters are goes to `quality/`.
    """
    run, output, run_id = request.stores.run, request.stores.output, request.stores.run_id
    part, parts, kind = request.part, request.parts, request.kind
    ids, quarantined = read_ids(run, part), read_quarantined(run, part)
    good = good_entries(quarantined, len(ids))
    every = run.read_batch(layout.CLUSTERS_OF_FACES).column(0).to_numpy()
    clusters = every[parts.starts[part] : parts.starts[part + 1]]
    histogram = quality.write_part(run, part, parts.starts[part], every)
    if quarantined.num_rows:
        rows = {"id": column_types.as_published(ids.take(quarantined.column("position")), kind)}
        rows |= {name: quarantined.column(name) for name in ("file", "row", "reason")}
        with output.open_write(layout.quarantined_part(run_id, part), durable=True) as file:
            pq.write_table(pa.table(rows), file, compression="zstd")
    moved = 0
    if request.changes is not None:
        moves = incremental.moves(run, part, parts, clusters, request.changes, kind)
        moved = len(moves)
        with output.open_write(layout.moves_part(run_id, part), durable=True) as file:
            pq.write_table(moves, file, compression="zstd")
    with output.open_write(layout.label_part(run_id, part), durable=True) as file:
        pq.write_table(label_table(ids, kind, good, clusters), file, compression="zstd")
        return PublishedPart(int(file.tell()), moved, histogram)
