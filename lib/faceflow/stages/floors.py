"""The floor of the similarities where none is given: counts the pairs of a sample of all faces (`kernels.impostors`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from faceflow.kernels import impostors, plans
from faceflow.stages.base import Context
from faceflow.stages.reading import matrix, read_vectors
from faceflow.storage import layout
from faceflow.storage.files import Store
from faceflow.storage.manifests import is_whole
from faceflow.tables import sample_schema

BLOCK_FACES = 4_096
"""Faces whose pairs one task counts."""


def settle(context: Context) -> dict[str, Any]:
    """The floors of a run as counts for the manifest: `floor`, `weak_floor` (None: none), and how they were found."""
    config = context.config
    if config.min_similarity != "auto":
        return {"floor": config.min_similarity, "weak_floor": config.min_similarity}
    found, histogram = _choose(context)
    return {
        "floor": found.strong,
        # Only the auto recipe can tell the pairs below the floor apart.
        "weak_floor": found.weak if config.edges == "auto" else found.strong,
        "valley": found.valley,
        "impostors_a_face": found.impostors,
        "pairs": impostors.coarser(histogram).tolist(),
        "flank": found.flank,
    }


def _choose(context: Context) -> tuple[impostors.Floors, np.ndarray]:
    parts, dim, run, executor = context.parts, context.dim, context.stores.run, context.executor
    rng = np.random.default_rng([context.config.seed, 5])
    rows = np.sort(rng.choice(parts.faces, plans.pairs_counted(parts.faces), replace=False))
    cuts = np.searchsorted(rows, parts.starts)
    here = [part for part in range(len(parts)) if cuts[part + 1] > cuts[part]]
    executor.map(
        take_sample,
        [(run, part, dim, rows[cuts[part] : cuts[part + 1]] - parts.starts[part], parts.starts[part]) for part in here],
        "sample",
    )
    blocks = -(-len(rows) // BLOCK_FACES)
    counted = executor.map(count_block, [(run, here, dim, block) for block in range(blocks)], "floor")
    run.delete("sample")
    histogram = np.sum([np.zeros(impostors.BINS, np.int64), *counted], axis=0)
    return impostors.choose_floors(histogram, parts.faces), histogram


def take_sample(run: Store, part: int, dim: int, rows: np.ndarray, first_row: int) -> None:
    """Write the sampled faces of one part (rows: within the part), so that whoever counts need not read all the others."""
    name, schema = layout.part("sample", part), sample_schema(dim)
    if not is_whole(run, name):
        vectors = np.take(read_vectors(run, part, dim), rows, axis=0, mode="clip")
        columns = [
            pa.array((rows + first_row).astype(np.int32)),
            pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim),
        ]
        run.write_arrow(name, schema, [pa.record_batch(columns, schema=schema)])


def count_block(run: Store, parts: list[int], dim: int, block: int) -> np.ndarray:
    """Histogram (`impostors.count_pairs`) of the pairs of one block of the sample with itself and all that comes after."""
    batches = [run.read_batch(layout.part("sample", part)) for part in parts]
    rows = np.concatenate([batch.column(0).to_numpy() for batch in batches])
    vectors = np.concatenate([matrix(batch.column(1), dim) for batch in batches])
    begin, end = block * BLOCK_FACES, (block + 1) * BLOCK_FACES
    return impostors.count_pairs(vectors[begin:], rows[begin:], vectors[begin:end], rows[begin:end])
