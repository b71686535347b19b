"""Stage 2, quantize: choose the search plan; for the cells plan train the quantizer and send each face to the shards it probes."""

from __future__ import annotations

from collections.abc import Iterator

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
from faceflow.tables import CENTROIDS_METADATA, cells_schema

DEFAULT_PROBES = 3
SHARD_FACES = 65_536
EXACT_UP_TO = 20_000
"""Faces below which comparing all pairs is faster than training a quantizer."""


def default_cells(faces: int, probes: int) -> int:
    """The number of cells with the least work: training + assignment + tiles, in similarities computed.

    training = 5 iterations x 48 faces a cell x cells^2; assignment = faces x cells; tiles = faces^2 x probes / cells.
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
    cells = config.cells or default_cells(parts.faces, config.probes or DEFAULT_PROBES)
    if cells > parts.faces:
        raise SettingsError(f"cells is {cells}, but there are only {parts.faces} faces: give fewer cells")
    probes = min(config.probes or DEFAULT_PROBES, cells)
    shards = max(1, min(cells, max(4, -(-parts.faces // SHARD_FACES))))
    run, executor, dim = context.stores.run, context.executor, context.dim
    if not is_whole(run, layout.CENTROIDS):
        executor.call(
            train, run, parts.starts, dim, cells, shards, config.seed, executor.largest_machine_cpus,
            label="train", resources=Resources(cpus=0),
        )  # fmt: skip
    results = executor.map(
        assign_part,
        [(run, part, parts.starts[part], dim, probes) for part in range(len(parts))],
        "quantize",
        sizes=[parts.rows(part) for part in range(len(parts))],
    )
    pieces = merge_pieces([pieces for pieces, _ in results])
    pieces[layout.CENTROIDS] = run.size(layout.CENTROIDS) or 0
    counts = {"index": "cells", "cells": cells, "probes": probes, "shards": shards}
    return Outcome(counts | {"travelled": sum(sent for _, sent in results)}, pieces)


STAGE = Stage(
    name="quantize",
    reads=("vectors",),
    writes=("quantizer", "cells"),
    settings=("index", "cells", "probes", "seed"),
    after=("ingest",),
    packages=("faceflow", "faiss"),
    run=run,
)


def sample_rows(faces: int, wanted: int, seed: int) -> np.ndarray:
    """`wanted` distinct rows of 0..faces-1, ascending: int64."""
    rng = np.random.default_rng([seed, 3])
    return np.sort(rng.choice(faces, size=min(wanted, faces), replace=False, shuffle=False))


def train(run: Store, starts: tuple[int, ...], dim: int, cells: int, shards: int, seed: int, threads: int) -> None:
    """Train on a seeded sample; write the centroids in locality order with the cut into shards."""
    rows = sample_rows(starts[-1], cells * quantizer.SAMPLE_PER_CELL, seed)
    sample = np.empty((len(rows), dim), np.float32)
    bounds = np.searchsorted(rows, starts)
    for part, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if end > begin:
            np.take(read_vectors(run, part, dim), rows[begin:end] - starts[part], axis=0, out=sample[begin:end], mode="clip")
    centroids = quantizer.train(sample, cells, seed, threads)
    # A cell's share of the tiles' work grows with the square of its size, which the sample estimates.
    load = np.bincount(quantizer.nearest_cells(sample, centroids, 1, threads)[:, 0], minlength=cells) + 1.0
    order = quantizer.locality_order(centroids, load**2)
    cuts = quantizer.shard_starts(load[order] ** 2, shards)
    schema = pa.schema(
        [pa.field("centroid", pa.list_(pa.float32(), dim))], metadata={CENTROIDS_METADATA: ",".join(map(str, cuts))}
    )
    column = pa.FixedSizeListArray.from_arrays(pa.array(centroids[order].ravel()), dim)
    run.write_arrow(layout.CENTROIDS, schema, [pa.record_batch([column], schema=schema)])


def assign_part(run: Store, part: int, first_row: int, dim: int, probes: int) -> tuple[dict[str, int], int]:
    """Write one part's cells: one record batch per shard with the faces that probe a cell of it.

    Returns the file's bytes and how many (face, shard) pairs travel. On a disk shards gather the vectors from the part
    itself; on S3 the vectors travel in the batch, so that a shard reads what it needs by range.
    """
    name = layout.part("cells", part)
    if is_whole(run, name):
        with run.open_arrow(name) as reader:
            return {name: run.size(name) or 0}, sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
    vectors = read_vectors(run, part, dim)
    centroids, starts = read_quantizer(run, dim)
    cells = quantizer.nearest_cells(vectors, centroids, probes)
    shard_of = (np.searchsorted(starts, cells, side="right") - 1).astype(np.int32)
    schema = cells_schema(probes, None if run.is_local else dim)
    sent = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal sent
        for shard in range(len(starts) - 1):
            here = np.flatnonzero((shard_of == shard).any(axis=1))
            sent += len(here)
            columns = [
                pa.array((here + first_row).astype(np.int32)),
                pa.FixedSizeListArray.from_arrays(pa.array(cells[here].ravel()), probes),
            ]
            if not run.is_local:
                columns.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors[here].ravel()), dim))
            yield pa.record_batch([c.cast(f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)

    return {name: run.write_arrow(name, schema, batches())}, sent
