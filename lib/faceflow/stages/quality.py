"""Quality without labels: sums of each part, beside its labels, and one table of all clusters, the most doubtful first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from faceflow.kernels import quality
from faceflow.storage import layout
from faceflow.storage.files import Store
from faceflow.tables import NeighborTable, Parts

SCHEMA = pa.schema(
    [("cluster", pa.int64())]
    + [(name, pa.int64() if i in (0, 1, 3, 5) else pa.float64()) for i, name in enumerate(quality.Doubts.__dataclass_fields__)]
)
"""`kernels.quality.Doubts` of one part, by cluster."""

NONE: dict[str, Any] = {"within": None, "between": None, "outside_share": 0.0, "doubtful_share": 0.0}


def write_part(run: Store, part: int, first_row: int, clusters: np.ndarray) -> None:
    """Write one part's sums; clusters: int64[N], of every face of the run."""
    table = NeighborTable.from_batch(run.read_batch(layout.part("neighbors", part)), first_row)
    known, found = quality.doubts(table.offsets, table.rows, table.values, first_row, clusters)
    columns = [known, *(getattr(found, name) for name in SCHEMA.names[1:])]
    run.write_arrow(layout.part("quality", part), SCHEMA, [pa.record_batch([pa.array(c) for c in columns], schema=SCHEMA)])


def summarize(run: Store, output: Store, run_id: str, parts: Parts) -> dict[str, Any]:
    """Write OUTPUT/quality/run=<run id>/clusters.parquet, one row a cluster of two faces and more; returns the totals."""
    batches = [run.read_batch(layout.part("quality", part)) for part in range(len(parts))]
    clusters = np.unique(np.concatenate([np.empty(0, np.int64), *(b.column(0).to_numpy() for b in batches)]))
    total = quality.Doubts.none(len(clusters))
    for batch in batches:
        columns = [batch.column(i).to_numpy() for i in range(1, batch.num_columns)]
        total.add(np.searchsorted(clusters, batch.column(0).to_numpy()), quality.Doubts(*columns))
    share = total.doubtful / np.maximum(total.faces, 1)
    order = np.lexsort((clusters, -total.faces, -share))
    order = order[total.faces[order] > 1]
    with np.errstate(invalid="ignore"):
        columns = [
            pa.array(clusters[order]), pa.array(total.faces[order]), pa.array(share[order]),
            pa.array((total.within / total.inside)[order], mask=(total.inside == 0)[order]),
            pa.array(total.nearest[order], mask=(total.outside == 0)[order]),
        ]  # fmt: skip
    with output.open_write(layout.quality_table(run_id), durable=True) as file:
        names = ["cluster", "faces", "doubtful_share", "within", "nearest_outside"]
        pq.write_table(pa.table(columns, names=names), file, compression="zstd")
    counts: dict[str, Any] = dict(NONE)
    inside, outside = int(total.inside.sum()), int(total.outside.sum())
    if inside:
        counts["within"] = round(float(total.within.sum()) / inside, 4)
    if outside:
        counts["between"] = round(float(total.between.sum()) / outside, 4)
    counts["outside_share"] = round(outside / max(1, parts.faces), 4)
    counts["doubtful_share"] = round(int(total.doubtful.sum()) / max(1, parts.faces), 4)
    return counts | {"sizes": quality.size_histogram(total.faces)}
