"""The threshold of the similarities where none is given, and the cosine from which faces are near-identical: both from pairs of
a sample of all faces (`kernels.threshold.valley`, `kernels.threshold.sample_weights`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from faceflow.cluster.executor import Executor
from faceflow.kernels.ivf import plan as plans
from faceflow.kernels.threshold import sample_weights, valley
from faceflow.stages.artifacts.faces import RunData, matrix, read_vectors
from faceflow.stages.base import Context
from faceflow.stages.results import ThresholdResult
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


def choose(context: Context) -> ThresholdResult:
    """The thresholds of a run, and from where faces are near-identical, where the edges depend on it."""
    config = context.config
    automatic = config.min_similarity == "auto"
    given = config.min_similarity if not isinstance(config.min_similarity, str) else None
    if not automatic and config.edges != "auto":
        return ThresholdResult(given, given)
    faces, executor = context.parts.faces, context.executor
    sample = _draw(context, plans.pairs_counted(faces) if automatic else min(faces, sample_weights.PILOT_FACES))
    near = executor.call(near_identical, NearIdentical(sample, faces), "sample")
    if automatic:
        chosen, histogram = _choose(executor, sample, faces, near)
        result = ThresholdResult(
            chosen.strong,
            # Only the auto recipe can tell the pairs below the threshold apart.
            chosen.weak if config.edges == "auto" else chosen.strong,
            automatic=True, valley=chosen.valley, impostors_per_face=chosen.impostors, near_identical=near,
            pairs=tuple(valley.coarser(histogram).tolist()), flank=chosen.flank,
        )  # fmt: skip
    else:
        result = ThresholdResult(given, given, near_identical=near)
    context.stores.run.delete("sample")
    return result


def _draw(context: Context, count: int) -> Sample:
    data, parts = context.data, context.parts
    rng = np.random.default_rng([context.config.seed, 5])
    rows = np.sort(rng.choice(parts.faces, count, replace=False))
    cuts = np.searchsorted(rows, parts.starts)
    drawn = [part for part in range(len(parts)) if cuts[part + 1] > cuts[part]]
    requests = [TakeSample(data, part, rows[cuts[part] : cuts[part + 1]] - parts.starts[part]) for part in drawn]
    context.executor.map(take_sample, requests, "sample")
    return Sample(data.store, tuple(drawn), data.dim)


def _choose(executor: Executor, sample: Sample, faces: int, near: float) -> tuple[valley.Thresholds, np.ndarray]:
    """The thresholds, from pairs among which near-identical faces count as one, and no person more than
    `sample_weights.CROWD`."""
    counted = plans.pairs_counted(faces)
    blocks = range(-(-counted // BLOCK_FACES))
    surveyed = executor.map(survey_block, [SurveyBlock(sample, block, near) for block in blocks], "threshold")
    plain = np.sum([np.zeros(valley.BINS, np.int64), *(histogram for histogram, _ in surveyed)], axis=0)
    weight = np.ones(counted, np.float32)
    weight[np.concatenate([np.empty(0, np.int64), *(repeated for _, repeated in surveyed)])] = 0
    dropped = np.flatnonzero(weight == 0)
    if len(dropped) > MOST_SUBTRACTED * counted:
        plain = _weigh(executor, sample, weight)
    elif len(dropped):
        steps = [CountPairs(sample, dropped, step) for step in range(-(-len(dropped) // BLOCK_FACES))]
        plain = plain - np.sum(executor.map(count_pairs_of, steps, "threshold"), axis=0)
        plain = np.maximum(plain, 0)  # a product may round into another bin than before
    plain = np.rint(plain).astype(np.int64)
    first = valley.choose_thresholds(plain, faces)
    requests = [CountNeighbors(sample, weight, block, first.strong) for block in blocks]
    crowds = np.concatenate(executor.map(count_neighbors, requests, "threshold"))
    bounded = weight * sample_weights.weights(crowds)
    weighted = _weigh(executor, sample, bounded) if (bounded < weight).any() else None
    return sample_weights.choose(plain, weighted, faces)


def _weigh(executor: Executor, sample: Sample, weight: np.ndarray) -> np.ndarray:
    blocks = range(-(-len(weight) // BLOCK_FACES))
    histograms = executor.map(weigh_block, [WeighBlock(sample, weight, block) for block in blocks], "threshold")
    return np.asarray(np.sum(histograms, axis=0))


@dataclass(frozen=True)
class TakeSample:
    """Request: the sampled faces of one part; rows: within it."""

    data: RunData
    part: int
    rows: np.ndarray


def take_sample(request: TakeSample) -> None:
    """Write the sampled faces of one part, so that a counting task need not read all the others."""
    data, part, rows = request.data, request.part, request.rows
    name, schema = layout.part("sample", part), sample_schema(data.dim)
    if not is_whole(data.store, name):
        vectors = np.take(read_vectors(data.store, part, data.dim), rows, axis=0, mode="clip")
        columns = [
            pa.array((rows + data.parts.starts[part]).astype(np.int32)),
            pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), data.dim),
        ]
        data.store.write_arrow(name, schema, [pa.record_batch(columns, schema=schema)])


@dataclass(frozen=True)
class NearIdentical:
    """Request: from where faces count as one, in a set of so many."""

    sample: Sample
    faces: int


def near_identical(request: NearIdentical) -> float:
    """`sample_weights.near_identical` of the sample."""
    return sample_weights.near_identical(request.sample.read()[1], request.faces)


@dataclass(frozen=True)
class SurveyBlock:
    """Request: one block of the sample; near: cosine from which faces are near-identical."""

    sample: Sample
    block: int
    near: float


def survey_block(request: SurveyBlock) -> tuple[np.ndarray, np.ndarray]:
    """Of one block of the sample with itself and all that comes after: the histogram of the pairs, and which faces of the
    sample (indices int64[...]) are near-identical to one of the block before them."""
    rows, vectors = request.sample.read()
    begin, end = request.block * BLOCK_FACES, (request.block + 1) * BLOCK_FACES
    histogram, repeated = sample_weights.count_and_mark(
        vectors[begin:], rows[begin:], vectors[begin:end], rows[begin:end], request.near
    )
    return histogram, begin + np.flatnonzero(repeated)


@dataclass(frozen=True)
class CountPairs:
    """Request: one step of the dropped faces, indices int64[...] in the sample."""

    sample: Sample
    dropped: np.ndarray
    step: int


def count_pairs_of(request: CountPairs) -> np.ndarray:
    """Histogram of the pairs of one step of the dropped faces with all that are not among them, and with those of them that
    come later."""
    vectors, dropped = request.sample.read()[1], request.dropped
    rank = np.full(len(vectors), len(dropped))
    rank[dropped] = np.arange(len(dropped))
    chosen = dropped[request.step * BLOCK_FACES : (request.step + 1) * BLOCK_FACES]
    return valley.count_pairs(vectors, rank, vectors[chosen], rank[chosen])


@dataclass(frozen=True)
class CountNeighbors:
    """Request: the neighbors of one block of the sample; weight: float32[sample], 0 for faces that are left out."""

    sample: Sample
    weight: np.ndarray
    block: int
    threshold: float


def count_neighbors(request: CountNeighbors) -> np.ndarray:
    """int64[b]: about how many neighbors each face of one block has in the sample, counted among an even choice of it."""
    vectors = request.sample.read()[1]
    kept = np.flatnonzero(request.weight)
    chosen = kept[np.unique(np.linspace(0, len(kept) - 1, sample_weights.CROWD_SAMPLE).astype(int))]
    block = np.arange(len(vectors))[request.block * BLOCK_FACES : (request.block + 1) * BLOCK_FACES]
    counts = sample_weights.neighbors_at(vectors[block], vectors[chosen], request.threshold) - np.isin(block, chosen)
    return np.asarray(np.rint(np.maximum(counts, 0) * (len(kept) / len(chosen))), np.int64)


@dataclass(frozen=True)
class WeighBlock:
    """Request: one block of the sample with weights float32[sample]."""

    sample: Sample
    weight: np.ndarray
    block: int


def weigh_block(request: WeighBlock) -> np.ndarray:
    """Histogram of the weighted pairs of one block of the sample with itself and all that comes after."""
    rows, vectors = request.sample.read()
    weight, begin, end = request.weight, request.block * BLOCK_FACES, (request.block + 1) * BLOCK_FACES
    late, early = np.flatnonzero(weight[begin:]) + begin, np.flatnonzero(weight[begin:end]) + begin
    return sample_weights.count_weighted(vectors[late], rows[late], weight[late], vectors[early], rows[early], weight[early])
