"""Stage 2, quantize: choose the search plan; train the quantizer and send each face to the shards it probes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from faceflow.cluster.executor import Resources
from faceflow.errors import SettingsError
from faceflow.kernels import quantizer
from faceflow.stages.base import Context, Outcome, Stage, merge_pieces
from faceflow.stages.reading import read_quantizer, read_vectors
from faceflow.storage import layout
from faceflow.storage.files import Store
from faceflow.storage.manifests import is_whole
from faceflow.tables import QUANTIZER_METADATA, cells_schema

EXPECTED_PROBES, MAX_PROBES = 8, 64
"""Mean probes that the number of cells is chosen for, and the most that one face makes to reach TARGET_RECALL."""

TARGET_RECALL = 0.9975
"""Predicted edge recall that the probes are chosen for: above what a run promises (0.99), as it is a prediction."""

PREDICTION_FACES = 16_384
"""Held-out faces whose mutual pairs predict the recall: 0.6 s on two cores, and thousands of pairs up to 5M faces."""

SHARD_FACES = 65_536
EXACT_UP_TO = 20_000
"""Faces below which comparing all pairs is faster than training a quantizer."""


def default_cells(faces: int, probes: int) -> int:
    """The number of cells with the least work: training + assignment + tiles, in similarities computed.

    training = 5 iterations x 64 faces a cell x cells^2; assignment = faces x cells; tiles = faces^2 x probes / cells.
    """
    cells = np.unique(np.geomspace(1, max(1, faces // 8), 2000).astype(np.int64)).astype(np.float64)
    training = quantizer.ITERATIONS * quantizer.SAMPLE_PER_CELL * cells**2
    work = training + faces * cells + float(faces) ** 2 * probes / cells
    return int(cells[np.argmin(work)])


def run(context: Context) -> Outcome:
    """Fix the plan; train, order and cut the cells; assign every part."""
    config, parts = context.config, context.parts
    index = config.index
    if index == "auto":
        index = "exact" if parts.faces <= EXACT_UP_TO else "cells"
    if index == "exact":
        return Outcome({"index": "exact"}, {})
    cells = config.cells or default_cells(parts.faces, config.probes or EXPECTED_PROBES)
    if cells > parts.faces:
        raise SettingsError(f"cells is {cells}, but there are only {parts.faces} faces: give fewer cells")
    shards = max(1, min(cells, max(4, -(-parts.faces // SHARD_FACES))))
    run, executor, dim = context.stores.run, context.executor, context.dim
    training = Training(cells, config.probes, shards, config.neighbors, config.min_similarity, config.seed)
    if not is_whole(run, layout.CENTROIDS):
        executor.call(
            train, run, parts.starts, dim, training, executor.largest_machine_cpus, label="train", resources=Resources(cpus=0)
        )
    with run.open_arrow(layout.CENTROIDS) as reader:
        trained = json.loads(reader.schema.metadata[QUANTIZER_METADATA])
    rule = quantizer.ProbeRule(trained["margin"], trained["most"])
    results = executor.map(
        assign_part,
        [(run, part, parts.starts[part], dim, rule) for part in range(len(parts))],
        "quantize",
        sizes=[parts.rows(part) for part in range(len(parts))],
    )
    pieces = merge_pieces([pieces for pieces, _, _ in results])
    pieces[layout.CENTROIDS] = run.size(layout.CENTROIDS) or 0
    counts = {
        "index": "cells",
        "cells": cells,
        "shards": shards,
        "mean_probes": round(sum(probed for _, probed, _ in results) / parts.faces, 3),
        "predicted_recall": trained["recall"],
        "travelled": sum(sent for _, _, sent in results),
    }
    return Outcome(counts, pieces)


STAGE = Stage(
    name="quantize",
    reads=("vectors",),
    writes=("quantizer", "cells"),
    settings=("index", "cells", "probes", "neighbors", "min_similarity", "seed"),
    after=("ingest",),
    packages=("faceflow", "faiss"),
    run=run,
)


@dataclass(frozen=True)
class Training:
    """How to make the quantizer; probes None: as many as the predicted recall asks for."""

    cells: int
    probes: int | None
    shards: int
    neighbors: int
    floor: float | None
    seed: int


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
    rows, held_out = sample_rows(starts[-1], cells * quantizer.SAMPLE_PER_CELL, PREDICTION_FACES, training.seed)
    sample = _gather(run, starts, dim, rows)
    centroids = quantizer.train(sample, cells, training.seed, threads)
    # A cell's share of the tiles' work grows with the square of its size, which the sample estimates.
    load = np.bincount(quantizer.nearest_cells(sample, centroids, 1, threads)[:, 0], minlength=cells) + 1.0
    order = quantizer.locality_order(centroids, load**2)
    cuts = quantizer.shard_starts(load[order] ** 2, training.shards)
    del sample
    if training.probes is None:
        held = _gather(run, starts, dim, held_out)
        most = min(MAX_PROBES, cells)
        rule, recall = quantizer.choose_rule(held, centroids, training.neighbors, training.floor, most, TARGET_RECALL, threads)
    else:
        rule, recall = quantizer.ProbeRule(None, min(training.probes, cells)), None
    record = json.dumps({"shard_starts": cuts.tolist(), "margin": rule.margin, "most": rule.most, "recall": recall})
    schema = pa.schema([pa.field("centroid", pa.list_(pa.float32(), dim))], metadata={QUANTIZER_METADATA: record})
    column = pa.FixedSizeListArray.from_arrays(pa.array(centroids[order].ravel()), dim)
    run.write_arrow(layout.CENTROIDS, schema, [pa.record_batch([column], schema=schema)])


def assign_part(run: Store, part: int, first_row: int, dim: int, rule: quantizer.ProbeRule) -> tuple[dict[str, int], int, int]:
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
    offsets, cells = quantizer.probe(vectors, centroids, rule)
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
