"""Training the coarse quantizer in one task: a seeded sample, the cells' order and shards, and the rule by which faces
probe."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from faceflow.kernels.ivf import plan as plans
from faceflow.kernels.ivf import probing, quantizer
from faceflow.stages.artifacts.faces import RunData, read_vectors
from faceflow.storage import layout
from faceflow.tables import QUANTIZER_METADATA


@dataclass(frozen=True)
class TrainQuantizer:
    """Request: how to make the quantizer. probes: None: as many as the predicted recall asks for; threads: of k-means."""

    data: RunData
    cells: int
    probes: int | None
    neighbors: int
    threshold: float | None
    seed: int
    workers: plans.Workers
    threads: int


def sample_rows(faces: int, training: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two seeded uniform samples of the rows 0..faces-1, ascending int64: for training, and for predicting recall.

    They are disjoint where there are faces enough.
    """
    rng = np.random.default_rng([seed, 3])
    drawn = rng.choice(faces, size=min(training + held_out, faces), replace=False)
    return np.sort(drawn[:training]), np.sort(drawn[-held_out:])


def _gather(data: RunData, rows: np.ndarray) -> np.ndarray:
    out = np.empty((len(rows), data.dim), np.float32)
    starts = data.parts.starts
    bounds = np.searchsorted(rows, starts)
    for part, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if end > begin:
            vectors = read_vectors(data.store, part, data.dim)
            np.take(vectors, rows[begin:end] - starts[part], axis=0, out=out[begin:end], mode="clip")
    return out


def train(training: TrainQuantizer) -> None:
    """Train on a seeded sample and choose the probes; write the centroids in locality order, cut into shards."""
    data, cells = training.data, training.cells
    faces = data.parts.faces
    rows, held_out = sample_rows(
        faces,
        cells * quantizer.SAMPLE_PER_CELL,
        plans.held_out_faces(faces),
        training.seed,
    )
    sample = _gather(data, rows)
    centroids, sizes = quantizer.train(sample, cells, training.seed, training.threads)
    del sample
    # A cell's share of the tiles' work grows with the square of its size, which the sample estimates.
    load = sizes + 1.0
    order = quantizer.locality_order(centroids, load**2)
    if training.probes is None:
        held = _gather(data, held_out)
        most = min(plans.MAX_PROBES, cells)
        choice = probing.choose_rule(
            held, faces, centroids, training.neighbors, training.threshold, most, *plans.target_recall(faces)
        )
    else:
        rule = probing.ProbeRule(None, min(training.probes, cells))
        choice = probing.Choice(rule, rule.widened(1, cells), float(training.probes), None)
    shards = plans.shard_count(faces, data.dim, training.neighbors, cells, choice.mean_probes, training.workers)
    cuts = quantizer.shard_starts(load[order] ** 2, shards)
    record = json.dumps(
        {"shard_starts": cuts.tolist(), "recall": choice.recall, "rule": asdict(choice.rule), "alone": asdict(choice.alone)}
    )
    schema = pa.schema([pa.field("centroid", pa.list_(pa.float32(), data.dim))], metadata={QUANTIZER_METADATA: record})
    column = pa.FixedSizeListArray.from_arrays(pa.array(centroids[order].ravel()), data.dim)
    data.store.write_arrow(layout.CENTROIDS, schema, [pa.record_batch([column], schema=schema)])
