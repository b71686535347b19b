"""The recall certificate: sampled faces are searched exactly. A night keeps last night's sample, knows its true neighbors, and
searches for them among the new faces only; of these it samples as large a share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from faceflow.kernels.knn import recall, topk
from faceflow.stages.artifacts.candidates import candidates_batch, read_candidates
from faceflow.stages.artifacts.faces import matrix, read_vectors, rows_tonight
from faceflow.stages.base import Context, LastNight
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import CANDIDATES_SCHEMA, TRUTH_SCHEMA, NeighborTable, Parts, queries_schema


@dataclass(frozen=True)
class Sampled:
    """faces: how many are sampled; unknown: of how many every true neighbor is to be found; old_parts: parts whose faces the
    others have been compared with."""

    faces: int
    unknown: int
    old_parts: int


def draw(context: Context) -> Sampled:
    """Choose the faces of the certificate, and write them with the true neighbors that are known already."""
    config, plan = context.config, context.done["quantize"].counts
    past = context.last_night if plan["incremental"] else None
    if past is not None:
        assert context.past is not None
        before = context.past.done["search"].fingerprint
        if before.get("recall_sample") != config.recall_sample or past.run.size(layout.TRUTH) is None:
            past = None
    faces, unknown = context.executor.call(
        write_sample, context.stores.run, context.parts, config.recall_sample, config.neighbors, config.seed, plan["nights"],
        past, label="sample",
    )  # fmt: skip
    return Sampled(faces, unknown, len(past.sources) if past is not None else 0)


def certify(context: Context, sampled: Sampled) -> tuple[dict[str, Any], dict[str, int]]:
    """Compare the neighbor tables with the truth: counts `recall` and `recall_bands`, and the bytes of what is kept."""
    run, parts, dim, neighbors = context.stores.run, context.parts, context.dim, context.config.neighbors
    threshold, executor = context.thresholds[0], context.executor
    searched = range(0 if sampled.unknown else sampled.old_parts, len(parts))
    executor.call(join_queries, run, dim, len(parts), label="sampled")
    executor.map(
        search_truth,
        [(run, parts, part, dim, neighbors, threshold, part >= sampled.old_parts) for part in searched],
        "certify",
        sizes=[parts.rows(part) for part in searched],
    )
    certificate, bands = executor.call(compare, run, searched, sampled.faces, neighbors, threshold, label="recall")
    return {"recall": asdict(certificate), "recall_bands": bands.tolist()}, {layout.TRUTH: run.size(layout.TRUTH) or 0}


def write_sample(
    run: Store, parts: Parts, size: int, neighbors: int, seed: int, nights: int, past: LastNight | None
) -> tuple[int, int]:
    """Write which faces are sampled, ascending, and what is known of them; returns how many, and of how many nothing is."""
    if not is_whole(run, layout.SAMPLE):
        if past is None:
            rows = recall.sample_rows(parts.faces, size, seed)
            known, offsets, keys = np.zeros(len(rows), bool), np.zeros(len(rows) + 1, np.int64), np.empty(0, np.uint64)
        else:
            before = past.run.read_batch(layout.TRUTH)
            truth = before.column(0).to_numpy(), before.column(2).offsets.to_numpy(), before.column(2).values.to_numpy()
            new = range(parts.starts[len(past.sources)], parts.faces)
            drawn = recall.sample_new(new, before.num_rows / past.parts.faces, seed, nights)
            rows, known, offsets, keys = recall.carry_truth(truth, rows_tonight(run), drawn, neighbors)
        lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(keys, pa.uint64()))
        columns = [pa.array(rows.astype(np.int32)), pa.array(known), lists]
        run.write_arrow(layout.SAMPLE, TRUTH_SCHEMA, [pa.record_batch(columns, schema=TRUTH_SCHEMA)])
    sample = run.read_batch(layout.SAMPLE)
    return sample.num_rows, sample.num_rows - int(sample.column(1).to_numpy(zero_copy_only=False).sum())


def write_queries(run: Store, parts: Parts, part: int, dim: int, table: NeighborTable) -> None:
    """Write the sampled faces of one part, with their neighbors of its table."""
    first_row, schema = parts.starts[part], queries_schema(dim)
    sample = run.read_batch(layout.SAMPLE).column(0).to_numpy()
    selected = sample[(sample >= first_row) & (sample < parts.starts[part + 1])]
    columns = [
        pa.array(selected),
        pa.FixedSizeListArray.from_arrays(pa.array(read_vectors(run, part, dim)[selected - first_row].ravel()), dim),
        table.to_batch().column(0).take(pa.array(selected - first_row)),
    ]
    batch = pa.record_batch([c.cast(f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
    run.write_arrow(layout.queries(part), schema, [batch])


def join_queries(run: Store, dim: int, parts: int) -> None:
    """Write the sampled faces of all parts as one batch, which every part's search of the truth reads."""
    if not is_whole(run, layout.ALL_QUERIES):
        joined = pa.Table.from_batches([run.read_batch(layout.queries(part)) for part in range(parts)]).combine_chunks()
        run.write_arrow(layout.ALL_QUERIES, queries_schema(dim), joined.to_batches())


def search_truth(run: Store, parts: Parts, part: int, dim: int, neighbors: int, threshold: float | None, new: bool) -> None:
    """Search the sampled faces exactly in one part: all of them if it is new to them, else those of whom nothing is known."""
    if is_whole(run, layout.truth(part)):
        return
    queries, known = run.read_batch(layout.ALL_QUERIES), run.read_batch(layout.SAMPLE).column(1).to_numpy(zero_copy_only=False)
    selected = np.arange(len(known)) if new else np.flatnonzero(~known)
    vectors, rows = matrix(queries["vector"], dim)[selected], queries["row"].to_numpy()[selected]
    offsets, keys = recall.search_part(vectors, rows, read_vectors(run, part, dim), parts.starts[part], neighbors, threshold)
    run.write_arrow(layout.truth(part), CANDIDATES_SCHEMA, [candidates_batch(selected, offsets, keys)])


def compare(
    run: Store, searched: range, sampled: int, neighbors: int, threshold: float | None
) -> tuple[recall.Certificate, np.ndarray]:
    """Compare what was found for the sampled faces with the truth; also by similarity (`recall.add_bands`). The truth is kept,
    for the next night."""
    queries, sample = run.read_batch(layout.ALL_QUERIES), run.read_batch(layout.SAMPLE)
    lists = read_candidates(run, [layout.truth(part) for part in searched], 0)
    lists.append((np.arange(sampled), sample.column(2).offsets.to_numpy(), sample.column(2).values.to_numpy()))
    offsets, rows, similarities = topk.merge(lists, sampled, neighbors + 1)
    truth = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(topk.encode(similarities, rows)))
    columns = [sample.column(0), pa.array(np.ones(sampled, bool)), truth]
    run.write_arrow(layout.TRUTH, TRUTH_SCHEMA, [pa.record_batch(columns, schema=TRUTH_SCHEMA)])
    results = NeighborTable.from_batch(pa.record_batch([queries["neighbors"]], names=["neighbors"]), 0)
    counts, bands = np.zeros((2, sampled), np.int64), np.zeros((2, recall.BANDS), np.int64)
    for i, row in enumerate(queries["row"].to_pylist()):
        selected = slice(offsets[i], offsets[i + 1])
        others = rows[selected] != row
        true_neighbors = rows[selected][others][:neighbors], similarities[selected][others][:neighbors]
        mine = slice(results.offsets[i], results.offsets[i + 1])
        true, hit = recall.check(true_neighbors, (results.rows[mine], results.values[mine]), neighbors, threshold)
        counts[:, i] = len(hit), hit.sum()
        recall.add_bands(bands, true, hit, threshold)
    return recall.certify(*counts), bands
