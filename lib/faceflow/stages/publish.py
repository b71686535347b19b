"""Stage 6, publish: modules -> stable cluster ids -> label Parquet. The pipeline then makes them current."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from faceflow.kernels.identity import canonical_order
from faceflow.stages.base import Context, Outcome, Stage
from faceflow.stages.reading import read_ids, read_rejected
from faceflow.storage import layout
from faceflow.storage.files import Store
from faceflow.tables import Parts

CLUSTERS_SCHEMA = pa.schema([pa.field("cluster", pa.int64(), nullable=False)])
"""Per module number: the published cluster."""


def run(context: Context) -> Outcome:
    """Order the clusters once, then write every part's labels."""
    stores, parts = context.stores, context.parts
    counts, pieces = context.executor.call(name_clusters, stores.run, parts, label="clusters")
    results = context.executor.map(
        publish_part,
        [(stores.run, stores.output, stores.run_id, part) for part in range(len(parts))],
        "publish",
        sizes=[parts.rows(part) for part in range(len(parts))],
    )
    return Outcome(counts | {"label_bytes": sum(results)}, pieces)


def labels_are_there(context: Context) -> bool:
    """Whether OUTPUT still holds every label part (it may have been emptied while the run directory lay elsewhere)."""
    names = context.stores.output.names(layout.label_folder(context.stores.run_id))
    return len(names) == len(context.parts)


STAGE = Stage(
    name="publish",
    reads=("ids", "modules"),
    writes=("clusters",),
    settings=("id_column",),
    after=("ingest", "detect"),
    packages=("faceflow",),
    whole=labels_are_there,
    run=run,
)


def name_clusters(run: Store, parts: Parts) -> tuple[dict[str, int], dict[str, int]]:
    """Write the module -> cluster lookup: ids 0..C-1 by falling size, ties by first row."""
    modules = np.concatenate([run.read_batch(layout.part("modules", p)).column(0).to_numpy() for p in range(len(parts))])
    lookup, sizes = canonical_order(modules)
    size = run.write_arrow(layout.CLUSTERS, CLUSTERS_SCHEMA, [pa.record_batch([lookup], schema=CLUSTERS_SCHEMA)])
    return {"clusters": len(sizes), "singletons": int((sizes == 1).sum())}, {layout.CLUSTERS: size}


def publish_part(run: Store, output: Store, run_id: str, part: int) -> int:
    """Write one part's labels, `id` and `cluster` in input order, null for a row set aside; returns the file's bytes.

    Rows set aside are also listed, with file, row and reason, under `rejected/`.
    """
    ids, rejected = read_ids(run, part), read_rejected(run, part)
    modules = run.read_batch(layout.part("modules", part)).column(0).to_numpy()
    aside = np.zeros(len(ids), bool)
    aside[rejected.column("position").to_numpy()] = True
    clusters = np.zeros(len(ids), np.int64)
    clusters[~aside] = run.read_batch(layout.CLUSTERS).column(0).to_numpy()[modules]
    schema = pa.schema([pa.field("id", ids.type), pa.field("cluster", pa.int64())])
    if rejected.num_rows:
        lines = {"id": ids.take(rejected.column("position"))} | {n: rejected.column(n) for n in ("file", "row", "reason")}
        with output.open_write(layout.rejected_part(run_id, part), durable=True) as file:
            pq.write_table(pa.table(lines), file, compression="zstd")
    with output.open_write(layout.label_part(run_id, part), durable=True) as file:
        pq.write_table(pa.table([ids, pa.array(clusters, mask=aside)], schema=schema), file, compression="zstd")
        return int(file.tell())
