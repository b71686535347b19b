"""Quality without labels: sums of each part, beside its labels, and one table of all clusters, the least certain first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from faceflow.kernels.clusters import quality
from faceflow.stages.artifacts.faces import ids_of, rows_of
from faceflow.stages.publish.stability import resample
from faceflow.stages.results import Example, QualityResult
from faceflow.storage import layout
from faceflow.storage.layout import RunStores
from faceflow.storage.object_store import Store
from faceflow.tables import NeighborTable, Parts

SUMS = ("within", "between", "nearest")
SCHEMA = pa.schema(
    [("cluster", pa.int64())] + [(name, pa.float64() if name in SUMS else pa.int64()) for name in quality.Doubts._fields]
)
"""`kernels.clusters.quality.Doubts` of one part, by cluster."""

LARGEST, DOUBTFUL, SHOWN_FACES = 12, 12, 8
"""Clusters that the report shows, and how many of their faces."""


def write_part(run: Store, part: int, first_row: int, clusters: np.ndarray) -> np.ndarray:
    """Write one part's sums; clusters: int64[N], of every face of the run. Returns the histogram of its similarities
    (`kernels.clusters.quality.doubts`)."""
    table = NeighborTable.from_batch(run.read_batch(layout.part("neighbors", part)), first_row)
    # Looked up at random, once for each neighbor: half the bytes stay in the caches for longer.
    narrow = clusters.astype(np.int32) if clusters.max(initial=0) < 2**31 else clusters
    known, results, histogram = quality.doubts(table.offsets, table.rows, table.values, first_row, narrow)
    columns = [known.astype(np.int64), *(getattr(results, name) for name in SCHEMA.names[1:])]
    run.write_arrow(layout.part("quality", part), SCHEMA, [pa.record_batch([pa.array(c) for c in columns], schema=SCHEMA)])
    return histogram


@dataclass(frozen=True)
class Summarize:
    """Request: the quality of all clusters. directed: how the map equation made them; None: something else did."""

    stores: RunStores
    parts: Parts
    seed: int
    directed: bool | None


@dataclass(frozen=True)
class Summary:
    """The totals, and what the report shows of some clusters."""

    quality: QualityResult
    examples: tuple[Example, ...]


def summarize(request: Summarize) -> Summary:
    """Write OUTPUT/quality/run=<run id>/clusters.parquet, one row a cluster of two faces and more, the least certain first."""
    run, output, run_id = request.stores.run, request.stores.output, request.stores.run_id
    parts = request.parts
    batches = [run.read_batch(layout.part("quality", part)) for part in range(len(parts))]
    clusters = np.unique(np.concatenate([np.empty(0, np.int64), *(b.column(0).to_numpy() for b in batches)]))
    total = quality.Doubts.none(len(clusters))
    for batch in batches:
        columns = [batch.column(i).to_numpy() for i in range(1, batch.num_columns)]
        total.add(np.searchsorted(clusters, batch.column(0).to_numpy()), quality.Doubts(*columns))
    share = total.doubtful / np.maximum(total.faces, 1)
    order = np.lexsort((clusters, -total.faces, -share))
    order = order[total.faces[order] > 1]
    lookup, near = run.read_batch(layout.CLUSTERS).column(0).to_numpy(), total.other >= 0
    stable = resample(run, parts, lookup, clusters[order], request.seed, request.directed)
    beside = np.full(len(clusters), -1)
    beside[near] = lookup[rows_of(run, "modules", parts, total.other[near])]
    with np.errstate(invalid="ignore"):
        columns = [
            pa.array(clusters[order]), pa.array(total.faces[order]), pa.array(share[order]),
            pa.array((total.within / total.inside)[order], mask=(total.inside == 0)[order]),
            pa.array(total.nearest[order], mask=~near[order]), pa.array(beside[order], mask=~near[order]),
            pa.array(stable, mask=np.isnan(stable)),
        ]  # fmt: skip
    names = ["cluster", "faces", "doubtful_share", "within", "nearest_outside", "nearest_cluster", "stability"]
    table = pa.table(columns, names=names)
    with output.open_write(layout.quality_table(run_id), durable=True) as file:
        pq.write_table(table, file, compression="zstd")
    largest = np.lexsort((clusters[order], -total.faces[order]))[:LARGEST]
    doubtful = np.flatnonzero(share[order[:DOUBTFUL]] > 0)
    chosen = np.union1d(largest, doubtful)
    pairs = np.stack([total.face, total.other])[:, order[chosen]]
    shown = _shown(run, parts, lookup, clusters[order[chosen]], pairs)
    examples = tuple(
        Example(**row, largest=i in largest, doubtful=i in doubtful, ids=tuple(ids), pair=tuple(pair))
        for i, row, (ids, pair) in zip(chosen.tolist(), table.take(pa.array(chosen)).to_pylist(), shown, strict=True)
    )
    inside, outside, tried = int(total.inside.sum()), int(total.outside.sum()), ~np.isnan(stable)
    result = QualityResult(
        within=round(float(total.within.sum()) / inside, 4) if inside else None,
        between=round(float(total.between.sum()) / outside, 4) if outside else None,
        outside_share=round(outside / max(1, parts.faces), 4),
        doubtful_share=round(int(total.doubtful.sum()) / max(1, parts.faces), 4),
        stability=round(float(np.average(stable[tried], weights=total.faces[order][tried])), 4) if tried.any() else None,
        stability_clusters=int(tried.sum()),
        sizes=quality.size_histogram(total.faces),
    )
    return Summary(result, examples)


def _shown(
    run: Store, parts: Parts, lookup: np.ndarray, clusters: np.ndarray, pairs: np.ndarray
) -> Iterator[tuple[list[str], list[str]]]:
    """Of each of these clusters int64[c] the ids of some of its faces, evenly from first to last, and of its pair (face,
    nearest outside) int64[2, c]; none where a pair's row is -1."""
    order = np.argsort(clusters)
    at = np.searchsorted(clusters[order], lookup).clip(max=len(clusters) - 1)
    number = np.where(clusters[order][at] == lookup, order[at], -1) if len(clusters) else np.full(len(lookup), -1)
    results: list[list[int]] = [[] for _ in clusters]
    for part in range(len(parts)):
        selected = number[run.read_batch(layout.part("modules", part)).column(0).to_numpy()]
        at = np.flatnonzero(selected >= 0)
        for i in np.unique(selected[at]).tolist():
            results[i] += (_evenly(at[selected[at] == i], SHOWN_FACES) + parts.starts[part]).tolist()
    results = [_evenly(np.array(rows, np.int64), SHOWN_FACES).tolist() for rows in results]
    wanted = np.unique(np.concatenate([pairs.ravel(), *map(np.array, results)]).astype(np.int64))
    wanted = wanted[wanted >= 0]
    ids = dict(zip(wanted.tolist(), ids_of(run, parts, wanted), strict=True))
    for i, rows in enumerate(results):
        yield [ids[row] for row in rows], [ids[row] for row in pairs[:, i].tolist() if row >= 0]


def _evenly(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, from the first to the last."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(int)]
