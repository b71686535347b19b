"""Stage 2, quantize: choose the search plan; train the quantizer and send each face to the shards it probes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from faceflow.cluster.executor import Resources
from faceflow.errors import SettingsError
from faceflow.kernels import plans, probing, quantizer, tiles
from faceflow.stages.base import Context, Outcome, Stage, merge_pieces
from faceflow.stages.reading import read_quantizer, read_vectors
from faceflow.storage import layout
from faceflow.storage.files import Store
from faceflow.storage.manifests import is_whole
from faceflow.tables import QUANTIZER_METADATA, cells_schema

log = logging.getLogger("faceflow")

MAX_PROBES = 256
"""The most cells that one face probes to reach TARGET_RECALL."""

ALLOWED_MISS = 0.002
"""Share of the edges that the probes may miss by prediction at a million faces and above; well below what a run promises
(0.01), as it is a prediction. Measured: 0.003 predicted and 0.005 missed at 1M synthetic faces."""

ALLOWED_MISS_ALONE = 0.01
"""The same for pairs that nobody can introduce to each other (`kernels.joins`); twice that from 8M faces on. Measured on LFW,
where 4,069 of 5,749 people have one photo and many two: edge recall .9998, and .9969 without this second target."""

LEAST_HELD_OUT, HELD_OUT_AT_1M, MOST_HELD_OUT = 4_096, 16_384, 65_536
"""Held-out faces whose mutual pairs predict the recall: a twelfth of all, and from a million faces on in proportion to the
root of their number, so that about 12,000 pairs (of people with 68 photos) are seen: seconds of one core."""


def run(context: Context) -> Outcome:
    """Fix the plan; train, order and cut the cells; assign every part."""
    config, parts, dim = context.config, context.parts, context.dim
    run, executor = context.stores.run, context.executor
    if config.cells and config.cells > parts.faces:
        raise SettingsError(f"cells is {config.cells}, but there are only {parts.faces} faces: give fewer cells")
    plan = plans.choose(
        parts.faces,
        dim,
        config.index,
        config.cells,
        config.probes,
        quantizer.ITERATIONS,
        quantizer.SAMPLE_PER_CELL,
        joined=config.min_similarity is not None,
        on_gpu=config.gpus_per_worker > 0,
    )
    workers = min(executor.cpus, config.workers or executor.cpus)
    flops = executor.call(measure_flops, dim, label="measure") * workers
    log.info("plan     %s (measured: %.0f GFLOP/s with %d workers)", plan.reason(flops), flops / 1e9, workers)
    counts: dict[str, Any] = {"index": plan.index, "gflops": round(flops / 1e9, 1)}
    counts |= {"exact_seconds": round(plan.exact_work / flops, 1), "cells_seconds": round(plan.cells_work / flops, 1)}
    if plan.index == "exact":
        return Outcome(counts, {})
    training = Training(
        plan.cells, config.probes, config.neighbors, config.min_similarity, config.seed,
        config.memory_limit or executor.worker_memory, workers,
    )  # fmt: skip
    if not is_whole(run, layout.CENTROIDS):
        executor.call(
            train, run, parts.starts, dim, training, executor.largest_machine_cpus, label="train", resources=Resources(cpus=0)
        )
    with run.open_arrow(layout.CENTROIDS) as reader:
        trained = json.loads(reader.schema.metadata[QUANTIZER_METADATA])
    rule = probing.ProbeRule(trained["margin"], trained["most"]).widened(context.effort, plan.cells)
    results = executor.map(
        assign_part,
        [(run, part, parts.starts[part], dim, rule) for part in range(len(parts))],
        "quantize",
        sizes=[parts.rows(part) for part in range(len(parts))],
    )
    pieces = merge_pieces([pieces for pieces, _, _ in results])
    pieces[layout.CENTROIDS] = run.size(layout.CENTROIDS) or 0
    travelled = sum(sent for _, _, sent in results)
    counts |= {
        "cells": plan.cells,
        "shards": len(trained["shard_starts"]) - 1,
        "mean_probes": round(sum(probed for _, probed, _ in results) / parts.faces, 3),
        "predicted_recall": None if context.effort else trained["recall"],
        "exhausted": rule.margin is None and rule.most >= plan.cells,
        "travelled": travelled,
        "bytes_moved": travelled * 4 * dim,
    }
    return Outcome(counts, pieces)


STAGE = Stage(
    name="quantize",
    reads=("vectors",),
    writes=("quantizer", "cells"),
    settings=("index", "cells", "probes", "neighbors", "min_similarity", "seed"),
    after=("ingest",),
    packages=("faceflow", "numpy"),
    run=run,
)


def measure_flops(dim: int) -> float:
    """Operations a second of one worker's tiles at this dimension; for the predictions only, never for a choice."""
    return tiles.measure_flops(dim)


def target_recall(faces: int) -> tuple[float, float]:
    """Predicted edge recall that the probes are chosen for, of all pairs and of those that nobody introduces; a small set
    can afford higher ones."""
    scale = (faces / 1e6) ** (1 / 3)
    return 1 - ALLOWED_MISS * min(1.0, scale), 1 - ALLOWED_MISS_ALONE * min(2.0, scale)


def held_out_faces(faces: int) -> int:
    """How many faces are held out of the training to predict the recall."""
    most = HELD_OUT_AT_1M * max(1.0, faces / 1e6) ** 0.5
    return int(min(max(LEAST_HELD_OUT, faces // 12), most, MOST_HELD_OUT))


@dataclass(frozen=True)
class Training:
    """How to make the quantizer; probes None: as many as the predicted recall asks for."""

    cells: int
    probes: int | None
    neighbors: int
    floor: float | None
    seed: int
    worker_bytes: int
    workers: int


def sample_rows(faces: int, training: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two seeded uniform samples of the rows 0..faces-1, ascending int64: for training, and for predicting recall.

    They are disjoint where there are faces enough.
    """
    rng = np.random.default_rng([seed, 3])
    drawn = rng.choice(faces, size=min(training + held_out, faces), replace=False)
    return np.sort(drawn[:training]), np.sort(drawn[-held_out:])


def _gather(run: Store, starts: tuple[int, ...], dim: int, rows: np.ndarray) -> np.ndarray:
    out = np.empty((len(rows), dim), np.float32)
    bounds = np.searchsorted(rows, starts)
    for part, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if end > begin:
            np.take(read_vectors(run, part, dim), rows[begin:end] - starts[part], axis=0, out=out[begin:end], mode="clip")
    return out


def train(run: Store, starts: tuple[int, ...], dim: int, training: Training, threads: int) -> None:
    """Train on a seeded sample and choose the probes; write the centroids in locality order, cut into shards."""
    cells = training.cells
    rows, held_out = sample_rows(
        starts[-1],
        cells * quantizer.SAMPLE_PER_CELL,
        held_out_faces(starts[-1]),
        training.seed,
    )
    sample = _gather(run, starts, dim, rows)
    centroids = quantizer.train(sample, cells, training.seed, threads)
    # A cell's share of the tiles' work grows with the square of its size, which the sample estimates.
    load = np.bincount(quantizer.nearest_cell(sample, centroids, threads)[0], minlength=cells) + 1.0
    order = quantizer.locality_order(centroids, load**2)
    del sample
    if training.probes is None:
        held = _gather(run, starts, dim, held_out)
        most = min(MAX_PROBES, cells)
        rule, mean_probes, recall = probing.choose_rule(
            held, starts[-1], centroids, training.neighbors, training.floor, most, *target_recall(starts[-1])
        )
    else:
        rule, mean_probes, recall = probing.ProbeRule(None, min(training.probes, cells)), float(training.probes), None
    shards = plans.shard_count(starts[-1], dim, training.neighbors, cells, mean_probes, training.worker_bytes, training.workers)
    cuts = quantizer.shard_starts(load[order] ** 2, shards)
    record = json.dumps({"shard_starts": cuts.tolist(), "margin": rule.margin, "most": rule.most, "recall": recall})
    schema = pa.schema([pa.field("centroid", pa.list_(pa.float32(), dim))], metadata={QUANTIZER_METADATA: record})
    column = pa.FixedSizeListArray.from_arrays(pa.array(centroids[order].ravel()), dim)
    run.write_arrow(layout.CENTROIDS, schema, [pa.record_batch([column], schema=schema)])


def assign_part(run: Store, part: int, first_row: int, dim: int, rule: probing.ProbeRule) -> tuple[dict[str, int], int, int]:
    """Write one part's cells: one record batch per shard with the faces that probe a cell of it.

    Returns the file's bytes, the number of probes, and how many (face, shard) pairs travel. On a disk shards gather the
    vectors from the part itself; on S3 the vectors travel in the batch, so that a shard reads what it needs by range.
    """
    name = layout.part("cells", part)
    if is_whole(run, name):
        with run.open_arrow(name) as reader:
            metadata = json.loads(reader.schema.metadata[QUANTIZER_METADATA])
            return {name: run.size(name) or 0}, metadata["probes"], metadata["sent"]
    vectors = read_vectors(run, part, dim)
    centroids, starts = read_quantizer(run, dim)
    offsets, cells = probing.probe(vectors, centroids, rule)
    # One entry per (shard, face) that meet, in that order; a face may probe several cells of one shard.
    owner = np.repeat(np.arange(len(vectors)), np.diff(offsets))
    travel = np.unique((np.searchsorted(starts, cells, side="right") - 1) * len(vectors) + owner)
    bounds = np.searchsorted(travel, np.arange(len(starts)) * len(vectors))
    metadata = json.dumps({"probes": len(cells), "sent": len(travel)})
    schema = cells_schema(None if run.is_local else dim).with_metadata({QUANTIZER_METADATA: metadata})
    lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(cells), type=schema.field(1).type)

    def batches() -> Iterator[pa.RecordBatch]:
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            here = travel[begin:end] % len(vectors)
            columns = [pa.array((here + first_row).astype(np.int32)), lists.take(pa.array(here))]
            if not run.is_local:
                column = pa.FixedSizeListArray.from_arrays(pa.array(vectors[here].ravel()), dim)
                columns.append(column.cast(schema.field(2).type))
            yield pa.record_batch(columns, schema=schema)

    return {name: run.write_arrow(name, schema, batches())}, len(cells), len(travel)
