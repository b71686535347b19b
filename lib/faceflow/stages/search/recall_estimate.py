"""The recall estimate: sampled faces are searched exactly, and what the search missed is counted.

An incremental run keeps the base run's sample, knows its true neighbors, and searches for them among the new faces only; of
these it samples as large a share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from faceflow.kernels.knn import recall, topk
from faceflow.kernels.knn.recall import RecallEstimate
from faceflow.stages.artifacts.candidates import candidates_batch, read_candidates
from faceflow.stages.artifacts.faces import RunData, matrix, read_vectors
from faceflow.stages.base import Context
from faceflow.stages.changes import Changes, rows_now
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.tables import CANDIDATES_SCHEMA, TRUTH_SCHEMA, NeighborTable, queries_schema


@dataclass(frozen=True)
class Sampled:
    """faces: how many are sampled; unknown: of how many every true neighbor is to be found; known_parts: the first parts, whose
    faces the others have been compared with."""

    faces: int
    unknown: int
    known_parts: int


@dataclass(frozen=True)
class Measured:
    """The recall estimate, true neighbors and those found by similarity, and the bytes of the file that is kept."""

    recall: RecallEstimate
    bands: tuple[tuple[int, ...], tuple[int, ...]]
    files: Mapping[str, int]


def draw(context: Context) -> Sampled:
    """Choose the faces to sample, and write them with the true neighbors that are known already."""
    config, changes = context.config, context.carried
    if changes is not None and context.base is not None:
        before = context.base.results.manifests["search"].fingerprint
        if before.get("recall_sample") != config.recall_sample or changes.base.size(layout.TRUTH) is None:
            changes = None
    since = context.results.quantize.since_full
    request = WriteSample(context.data, config.recall_sample, config.neighbors, config.seed, since, changes)
    faces, unknown = context.executor.call(write_sample, request, "sample")
    return Sampled(faces, unknown, changes.carried_parts if changes is not None else 0)


def measure(context: Context, sampled: Sampled) -> Measured:
    """Compare the neighbor tables with the truth."""
    data, k, executor = context.data, context.config.neighbors, context.executor
    threshold = context.results.quantize.threshold.similarity
    searched = range(0 if sampled.unknown else sampled.known_parts, len(data.parts))
    executor.call(join_queries, data, "recall")
    executor.map(
        search_truth,
        [SearchTruth(data, part, k, threshold, part >= sampled.known_parts) for part in searched],
        "recall",
        sizes=[data.parts.rows(part) for part in searched],
    )
    estimate, bands = executor.call(compare, Compare(data, searched, sampled.faces, k, threshold), "recall")
    below, above = (tuple(band) for band in bands.tolist())
    return Measured(estimate, (below, above), {layout.TRUTH: data.store.size(layout.TRUTH) or 0})


@dataclass(frozen=True)
class WriteSample:
    """Request: `size` sampled faces with their k true neighbors as far as known; since_full: incremental runs since the last
    full one, which the draw depends on; changes: None: nothing is known."""

    data: RunData
    size: int
    k: int
    seed: int
    since_full: int
    changes: Changes | None


def write_sample(request: WriteSample) -> tuple[int, int]:
    """Write which faces are sampled, ascending, and what is known of them; returns how many, and of how many nothing is."""
    run, parts, changes = request.data.store, request.data.parts, request.changes
    if not is_whole(run, layout.SAMPLE):
        if changes is None:
            rows = recall.sample_rows(parts.faces, request.size, request.seed)
            known, offsets, keys = np.zeros(len(rows), bool), np.zeros(len(rows) + 1, np.int64), np.empty(0, np.uint64)
        else:
            before = changes.base.read_batch(layout.TRUTH)
            truth = before.column(0).to_numpy(), before.column(2).offsets.to_numpy(), before.column(2).values.to_numpy()
            new = range(parts.starts[changes.carried_parts], parts.faces)
            share = before.num_rows / changes.base_parts.faces
            drawn = recall.sample_new(new, share, request.seed, request.since_full)
            rows, known, offsets, keys = recall.carry_truth(truth, rows_now(run), drawn, request.k)
        lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(keys, pa.uint64()))
        columns = [pa.array(rows.astype(np.int32)), pa.array(known), lists]
        run.write_arrow(layout.SAMPLE, TRUTH_SCHEMA, [pa.record_batch(columns, schema=TRUTH_SCHEMA)])
    sample = run.read_batch(layout.SAMPLE)
    return sample.num_rows, sample.num_rows - int(sample.column(1).to_numpy(zero_copy_only=False).sum())


def write_queries(data: RunData, part: int, table: NeighborTable) -> None:
    """Write the sampled faces of one part, with their neighbors of its table."""
    run, first_row, schema = data.store, data.parts.starts[part], queries_schema(data.dim)
    sample = run.read_batch(layout.SAMPLE).column(0).to_numpy()
    rows = sample[(sample >= first_row) & (sample < data.parts.starts[part + 1])]
    vectors = read_vectors(run, part, data.dim)[rows - first_row]
    columns = [
        pa.array(rows),
        pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), data.dim),
        table.to_batch().column(0).take(pa.array(rows - first_row)),
    ]
    batch = pa.record_batch([c.cast(f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
    run.write_arrow(layout.queries(part), schema, [batch])


def join_queries(data: RunData) -> None:
    """Write the sampled faces of all parts as one batch, which every part's search of the truth reads."""
    run = data.store
    if not is_whole(run, layout.ALL_QUERIES):
        batches = [run.read_batch(layout.queries(part)) for part in range(len(data.parts))]
        joined = pa.Table.from_batches(batches).combine_chunks()
        run.write_arrow(layout.ALL_QUERIES, queries_schema(data.dim), joined.to_batches())


@dataclass(frozen=True)
class SearchTruth:
    """Request: the true neighbors of the sampled faces in one part: of all of them if the part is new, else of those of which
    nothing is known."""

    data: RunData
    part: int
    k: int
    threshold: float | None
    is_new: bool


def search_truth(request: SearchTruth) -> None:
    """Search the sampled faces exactly in one part."""
    data, part = request.data, request.part
    run, dim = data.store, data.dim
    if is_whole(run, layout.truth(part)):
        return
    queries, known = run.read_batch(layout.ALL_QUERIES), run.read_batch(layout.SAMPLE).column(1).to_numpy(zero_copy_only=False)
    asked = np.arange(len(known)) if request.is_new else np.flatnonzero(~known)
    vectors, rows = matrix(queries["vector"], dim)[asked], queries["row"].to_numpy()[asked]
    members = read_vectors(run, part, dim)
    offsets, keys = recall.search_part(vectors, rows, members, data.parts.starts[part], request.k, request.threshold)
    run.write_arrow(layout.truth(part), CANDIDATES_SCHEMA, [candidates_batch(asked, offsets, keys)])


@dataclass(frozen=True)
class Compare:
    """Request: what was found for so many sampled faces against the truth of the searched parts."""

    data: RunData
    searched: range
    sampled: int
    k: int
    threshold: float | None


def compare(request: Compare) -> tuple[RecallEstimate, np.ndarray]:
    """Compare what was found for the sampled faces with the truth; also by similarity (`recall.add_bands`). The truth is kept,
    for the next incremental run."""
    run, sampled, k, threshold = request.data.store, request.sampled, request.k, request.threshold
    queries, sample = run.read_batch(layout.ALL_QUERIES), run.read_batch(layout.SAMPLE)
    lists = read_candidates(run, [layout.truth(part) for part in request.searched], 0)
    lists.append((np.arange(sampled), sample.column(2).offsets.to_numpy(), sample.column(2).values.to_numpy()))
    offsets, rows, similarities = topk.merge(lists, sampled, k + 1)
    truth = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(topk.encode(similarities, rows)))
    columns = [sample.column(0), pa.array(np.ones(sampled, bool)), truth]
    run.write_arrow(layout.TRUTH, TRUTH_SCHEMA, [pa.record_batch(columns, schema=TRUTH_SCHEMA)])
    table = NeighborTable.from_batch(pa.record_batch([queries["neighbors"]], names=["neighbors"]), 0)
    counts, bands = np.zeros((2, sampled), np.int64), np.zeros((2, recall.BANDS), np.int64)
    for i, row in enumerate(queries["row"].to_pylist()):
        span = slice(offsets[i], offsets[i + 1])
        others = rows[span] != row
        true_neighbors = rows[span][others][:k], similarities[span][others][:k]
        mine = slice(table.offsets[i], table.offsets[i + 1])
        true, hit = recall.check(true_neighbors, (table.rows[mine], table.values[mine]), k, threshold)
        counts[:, i] = len(hit), hit.sum()
        recall.add_bands(bands, true, hit, threshold)
    return recall.estimate(*counts), bands
