"""The threshold of the similarities where none is given, and the cosine from which faces are near-identical: both from pairs of
a sample of all faces (`kernels.threshold.valley`, `kernels.threshold.sample_weights`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from faceflow.kernels.ivf import plan as plans
from faceflow.kernels.threshold import sample_weights, valley
from faceflow.stages.artifacts.faces import matrix, read_vectors
from faceflow.stages.base import Context
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import sample_schema

BLOCK_FACES = 4_096
"""Faces whose pairs one task counts."""

MOST_SUBTRACTED = 0.25
"""Share of the sample up to which the pairs of near-identical faces are counted and subtracted; of more, those of the others
are counted again."""


@dataclass(frozen=True)
class Sample:
    """The sampled faces, as tasks read them: these parts' files of `sample/`."""

    run: Store
    parts: tuple[int, ...]
    dim: int

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows int64[n], ascending; vectors float32[n, dim])."""
        batches = [self.run.read_batch(layout.part("sample", part)) for part in self.parts]
        rows = np.concatenate([batch.column(0).to_numpy() for batch in batches]).astype(np.int64)
        return rows, np.concatenate([matrix(batch.column(1), self.dim) for batch in batches])


def settle(context: Context) -> dict[str, Any]:
    """The thresholds of a run as counts for the manifest: `threshold`, `support_threshold` (None: none), how they were found,
    and `near_identical`, where the edges depend on it."""
    config = context.config
    automatic = config.min_similarity == "auto"
    if not automatic and config.edges != "auto":
        return {"threshold": config.min_similarity, "support_threshold": config.min_similarity}
    faces = context.parts.faces
    sample = _draw(context, plans.pairs_counted(faces) if automatic else min(faces, sample_weights.PILOT_FACES))
    near = context.executor.call(near_identical, sample, faces, label="sample")
    counts: dict[str, Any] = {"threshold": config.min_similarity, "support_threshold": config.min_similarity}
    if automatic:
        results, histogram = _choose(context, sample, near)
        counts = {
            "threshold": results.strong,
            # Only the auto recipe can tell the pairs below the threshold apart.
            "support_threshold": results.weak if config.edges == "auto" else results.strong,
            "valley": results.valley,
            "impostors_per_face": results.impostors,
            "pairs": valley.coarser(histogram).tolist(),
            "flank": results.flank,
        }
    context.stores.run.delete("sample")
    return counts | {"near_identical": near}


def _draw(context: Context, count: int) -> Sample:
    parts, dim, run = context.parts, context.dim, context.stores.run
    rng = np.random.default_rng([context.config.seed, 5])
    rows = np.sort(rng.choice(parts.faces, count, replace=False))
    cuts = np.searchsorted(rows, parts.starts)
    selected = [part for part in range(len(parts)) if cuts[part + 1] > cuts[part]]
    context.executor.map(
        take_sample,
        [(run, part, dim, rows[cuts[part] : cuts[part + 1]] - parts.starts[part], parts.starts[part]) for part in selected],
        "sample",
    )
    return Sample(run, tuple(selected), dim)


def _choose(context: Context, sample: Sample, near: float) -> tuple[valley.Thresholds, np.ndarray]:
    """The thresholds, from pairs among which near-identical faces count as one, and no person more than `crowding.CROWD`."""
    executor, faces = context.executor, context.parts.faces
    counted = plans.pairs_counted(faces)
    blocks = range(-(-counted // BLOCK_FACES))
    surveyed = executor.map(survey_block, [(sample, block, near) for block in blocks], "threshold")
    plain = np.sum([np.zeros(valley.BINS, np.int64), *(histogram for histogram, _ in surveyed)], axis=0)
    weight = np.ones(counted, np.float32)
    weight[np.concatenate([np.empty(0, np.int64), *(repeated for _, repeated in surveyed)])] = 0
    dropped = np.flatnonzero(weight == 0)
    if len(dropped) > MOST_SUBTRACTED * counted:
        plain = _weigh(context, sample, weight)
    elif len(dropped):
        steps = range(-(-len(dropped) // BLOCK_FACES))
        plain = plain - np.sum(executor.map(count_pairs_of, [(sample, dropped, step) for step in steps], "threshold"), axis=0)
        plain = np.maximum(plain, 0)  # a product may round into another bin than before
    plain = np.rint(plain).astype(np.int64)
    first = valley.choose_thresholds(plain, faces)
    crowds = np.concatenate(
        executor.map(count_neighbors, [(sample, weight, block, first.strong) for block in blocks], "threshold")
    )
    bounded = weight * sample_weights.weights(crowds)
    weighted = _weigh(context, sample, bounded) if (bounded < weight).any() else None
    return sample_weights.choose(plain, weighted, faces)


def _weigh(context: Context, sample: Sample, weight: np.ndarray) -> np.ndarray:
    blocks = range(-(-len(weight) // BLOCK_FACES))
    return np.sum(context.executor.map(weigh_block, [(sample, weight, block) for block in blocks], "threshold"), axis=0)


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


def near_identical(sample: Sample, faces: int) -> float:
    """`crowding.near_identical` of the sample."""
    return sample_weights.near_identical(sample.read()[1], faces)


def survey_block(sample: Sample, block: int, near: float) -> tuple[np.ndarray, np.ndarray]:
    """Of one block of the sample with itself and all that comes after: the histogram of the pairs, and which faces of the
    sample (indices int64[...]) are near-identical to one of the block before them."""
    rows, vectors = sample.read()
    begin, end = block * BLOCK_FACES, (block + 1) * BLOCK_FACES
    histogram, repeated = sample_weights.count_and_mark(
        vectors[begin:], rows[begin:], vectors[begin:end], rows[begin:end], near
    )
    return histogram, begin + np.flatnonzero(repeated)


def count_pairs_of(sample: Sample, dropped: np.ndarray, step: int) -> np.ndarray:
    """Histogram of the pairs of one step of these faces (indices int64[...]) with all that are not among them, and with those
    of them that come later."""
    vectors = sample.read()[1]
    rank = np.full(len(vectors), len(dropped))
    rank[dropped] = np.arange(len(dropped))
    selected = dropped[step * BLOCK_FACES : (step + 1) * BLOCK_FACES]
    return valley.count_pairs(vectors, rank, vectors[selected], rank[selected])


def count_neighbors(sample: Sample, weight: np.ndarray, block: int, threshold: float) -> np.ndarray:
    """int64[b]: about how many neighbors each face of one block has in the sample, faces of weight 0 left out: counted among an
    even choice of it."""
    vectors = sample.read()[1]
    kept = np.flatnonzero(weight)
    chosen = kept[np.unique(np.linspace(0, len(kept) - 1, sample_weights.CROWD_SAMPLE).astype(int))]
    selected = np.arange(len(vectors))[block * BLOCK_FACES : (block + 1) * BLOCK_FACES]
    results = sample_weights.neighbors_at(vectors[selected], vectors[chosen], threshold) - np.isin(selected, chosen)
    return np.rint(np.maximum(results, 0) * (len(kept) / len(chosen))).astype(np.int64)


def weigh_block(sample: Sample, weight: np.ndarray, block: int) -> np.ndarray:
    """Histogram of the weighted pairs of one block of the sample with itself and all that comes after."""
    rows, vectors = sample.read()
    begin, end = block * BLOCK_FACES, (block + 1) * BLOCK_FACES
    late, early = np.flatnonzero(weight[begin:]) + begin, np.flatnonzero(weight[begin:end]) + begin
    return sample_weights.count_weighted(vectors[late], rows[late], weight[late], vectors[early], rows[early], weight[early])
