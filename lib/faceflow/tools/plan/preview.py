"""A look at the input before a run: a sample of its faces, read where row groups begin, and what it foretells."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from faceflow.config import ClusterConfig
from faceflow.errors import InputError
from faceflow.kernels.ivf import plan as plans
from faceflow.kernels.ivf import probing, quantizer
from faceflow.kernels.threshold import sample_weights, valley
from faceflow.stages.ingest import row_checks
from faceflow.stages.ingest.parquet_input import Columns, Footer, common_id_types, readable
from faceflow.storage.object_store import Store

PAIRED_FACES = 32_768
"""Faces of which all pairs are counted: as many as the threshold of a million is found from."""

TRAINING_FACES = 131_072
"""Faces that a quantizer is trained on, at most; a larger one than they allow is foretold from a smaller."""

COUNTED_BY_FACE = 1.5
"""Times the faces looked at that there are, up to which neighbors are counted, not drawn."""

SUPPORTED = 0.5
"""Share of the pairs between the two thresholds that the auto recipe keeps, about."""

DRAWS = 8
"""Numbers of neighbors that are drawn for each face."""

FEWEST_OTHERS = 4
"""Neighbors of a face in a cluster that singletons may be given to (`stages.detect.singletons.FEWEST_FACES`)."""

SHORTEST_BLOCK = 32
"""Consecutive faces of one row group, at least: fewer cost as much to read."""


@dataclass(frozen=True)
class Outlook:
    """What the sample foretells of the whole set.

    sampled: faces looked at; threshold, support_threshold, valley, impostors: as quantize finds them (None: given, or none);
    neighbors: of a face from the support threshold on, at most k; edges: those that are left, near-identical faces counting as
    one; single: share of the faces that have none; people: clusters of five faces and more; plan: of the search; probes: a
    face, mean; id_bytes: a face's id, mean; unusable: share of the sampled rows that would be quarantined.
    """

    dim: int
    sampled: int
    threshold: float | None
    support_threshold: float | None
    valley: float | None
    impostors: float | None
    neighbors: float
    edges: float
    single: float
    people: float
    plan: plans.Plan
    probes: float
    id_bytes: float
    unusable: float


@dataclass(frozen=True)
class Look:
    """Request: what a sample of these files foretells."""

    config: ClusterConfig
    store: Store
    footers: tuple[Footer, ...]
    dim: int
    threads: int


def look(request: Look) -> Outlook:
    """Read a sample of the input and foretell the rest. Raises InputError where no face of it can be used."""
    config, store, footers, dim, threads = request.config, request.store, request.footers, request.dim, request.threads
    faces = sum(sum(footer.group_rows) for footer in footers)
    plan = plans.choose(
        faces, dim, config.index, config.cells, config.probes, quantizer.ITERATIONS, quantizer.SAMPLE_PER_CELL,
        joined=config.min_similarity is not None, on_gpu=config.gpus_per_worker > 0,
    )  # fmt: skip
    training = min(TRAINING_FACES, quantizer.SAMPLE_PER_CELL * plan.cells) if config.probes is None else 0
    held = plans.held_out_faces(faces) if training else 0
    vectors, block, id_bytes, unusable = _sample(config, store, footers, dim, PAIRED_FACES + training + held)
    if len(vectors) < 2:
        raise InputError(f"input {config.input}: none of the rows looked at can be used, so nothing can be foretold")
    order = np.random.default_rng([config.seed, 7]).permutation(len(vectors))
    paired = np.sort(order[:PAIRED_FACES])
    sample = _Sample.of(vectors[paired], block[paired], _block_length(block), faces)
    near = sample_weights.near_identical(sample.vectors, faces)
    alone = sample.without(sample.repeated(near)) if config.edges == "auto" or config.min_similarity == "auto" else sample
    threshold, weak, valley, strangers = _thresholds(config, alone, faces)
    kept = len(alone.vectors) / len(sample.vectors)  # near-identical faces have no edges of their own
    k = float(config.neighbors)
    if threshold is None or weak is None:
        neighbors = edges = k
        single, people = 0.0, faces / 20
    else:
        neighbors = float(np.minimum(sample.expected(weak, config.seed), k).mean())
        item = alone.expected(threshold, config.seed)
        edges = kept * float(np.minimum(item, k).mean())
        if config.edges == "auto":
            edges += kept * SUPPORTED * float(np.minimum(alone.expected(weak, config.seed), k).mean()) - SUPPORTED * edges
        single = kept * float(np.exp(-item).mean())
        people = kept * faces * float(np.where(item >= FEWEST_OTHERS, 1 / (1 + item), 0).mean())
    probes = float(config.probes or 0)
    if training:
        apart = vectors[order[: len(order) // 2][:held]], vectors[order[-min(training, len(order) // 2) :]]
        probes = _probes(config, *apart, faces, cells=plan.cells, threshold=threshold, threads=threads)
    return Outlook(
        dim, len(vectors), threshold, weak, valley, strangers, neighbors, edges, single, people, plan, probes, id_bytes,
        unusable
    )  # fmt: skip


def _thresholds(
    config: ClusterConfig, sample: _Sample, faces: int
) -> tuple[float | None, float | None, float | None, float | None]:  # fmt: skip
    """(threshold, support threshold, valley, impostors a face), as `stages.quantize.threshold` finds them."""
    if not isinstance(config.min_similarity, str):
        return config.min_similarity, config.min_similarity, None, None
    weights = np.ones(len(sample.vectors), np.float32)
    plain = np.rint(sample.histogram(weights)).astype(np.int64)
    inside, elsewhere = sample.neighbors(valley.choose_thresholds(plain, faces).strong)
    bounded = sample_weights.weights(elsewhere + inside * (sample.near / sample.far))
    results, _ = sample_weights.choose(plain, sample.histogram(bounded) if (bounded < 1).any() else None, faces)
    return results.strong, results.weak if config.edges == "auto" else results.strong, results.valley, results.impostors


def _sample(
    config: ClusterConfig, store: Store, footers: Sequence[Footer], dim: int, wanted: int
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """(unit vectors float32[s, d], number of the block that each is from int64[s], bytes of an id, share of unusable rows).

    A block is the beginning of a row group, as reading costs whole pages; blocks are as far apart as the set allows.
    """
    groups = [(footer.path, group, rows) for footer in footers for group, rows in enumerate(footer.group_rows) if rows]
    length = max(SHORTEST_BLOCK, -(-wanted // len(groups)))
    step = max(1, len(groups) * length // wanted)
    chosen = groups[::step]
    results: list[np.ndarray] = []
    blocks: list[int] = []
    rows = id_bytes = 0
    by_path: dict[str, list[tuple[int, int]]] = {}
    names = Columns(config.id_column, config.embedding_column, None, common_id_types(footers, None).stored)
    for path, group, size in chosen:
        by_path.setdefault(path, []).append((group, min(size, length)))
    for path, places in by_path.items():
        with readable(store, path) as parquet:
            for group, take in places:
                batch = next(
                    parquet.iter_batches(
                        batch_size=take, row_groups=[group], columns=[config.id_column, config.embedding_column]
                    )
                )  # fmt: skip
                ids, not_text = names.ids(batch, path, 0)
                good = row_checks.check_batch(ids, not_text, names.embeddings(batch), dim)[2]
                rows, id_bytes = rows + len(ids), id_bytes + ids.nbytes
                results.append(good)
                blocks.append(len(good))
    vectors = np.concatenate(results)
    return vectors, np.repeat(np.arange(len(blocks)), blocks), id_bytes / max(1, rows), 1 - len(vectors) / max(1, rows)


def _block_length(block: np.ndarray) -> float:
    """Faces of the block that a face is in, on average."""
    return float((np.bincount(block).astype(float) ** 2).sum() / len(block))


@dataclass(frozen=True)
class _Sample:
    """Sampled faces and what they stand for.

    Faces of one block are neighbors in the file, and a file may be sorted by person: pairs within a block stand for such pairs
    alone, the others for all the rest. In a shuffled file both are the same. near, far: faces of the whole set, beside a face,
    that each other one of its block, or of another block, stands for.
    """

    vectors: np.ndarray
    block: np.ndarray
    near: float
    far: float

    @classmethod
    def of(cls, vectors: np.ndarray, block: np.ndarray, length: float, faces: int) -> _Sample:
        """length: of a block, of which `vectors` may be a part."""
        selected = _block_length(block)
        if selected >= len(vectors):  # a single block
            return cls(vectors, np.arange(len(vectors)), 0.0, faces / len(vectors))
        near = (length - 1) / max(1.0, selected - 1)
        return cls(vectors, block, near, max(1.0, (faces - length) / max(1.0, len(vectors) - selected)))

    @property
    def _blocks(self) -> Iterator[slice]:
        cuts = np.searchsorted(self.block, np.arange(int(self.block[-1]) + 2))
        return (slice(begin, end) for begin, end in itertools.pairwise(cuts) if end - begin > 1)

    def without(self, dropped: np.ndarray) -> _Sample:
        """The sample less the faces where bool[n] holds."""
        return replace(self, vectors=self.vectors[~dropped], block=self.block[~dropped])

    def repeated(self, near: float) -> np.ndarray:
        """bool[n]: faces that are near-identical to an earlier one."""
        rows = np.arange(len(self.vectors))
        return sample_weights.count_and_mark(self.vectors, rows, self.vectors, rows, near)[1]

    def histogram(self, weights: np.ndarray) -> np.ndarray:
        """Histogram float64[BINS] of the weighted pairs, as of a uniform sample of all pairs."""
        rows, v = np.arange(len(self.vectors)), self.vectors
        total = sample_weights.count_weighted(v, rows, weights, v, rows, weights)
        for b in self._blocks:
            inside = sample_weights.count_weighted(v[b], rows[b], weights[b], v[b], rows[b], weights[b])
            total += (self.near / self.far - 1) * inside
        return np.maximum(total, 0)

    def neighbors(self, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """(in its block, elsewhere), int64[n]: sampled faces with a similarity of `threshold` or more to each."""
        inside = np.zeros(len(self.vectors), np.int64)
        for b in self._blocks:
            inside[b] = sample_weights.neighbors_at(self.vectors[b], self.vectors[b], threshold) - 1
        return inside, sample_weights.neighbors_at(self.vectors, self.vectors, threshold) - 1 - inside

    def expected(self, threshold: float, seed: int) -> np.ndarray:
        """float64[n, DRAWS]: how many neighbors each face may have in the whole set at a similarity of `threshold` or more.

        Where nearly all faces are here they are counted. Else those elsewhere are drawn: counts are Poisson about a face's own
        rate, rates have a gamma law over all faces, whose two moments the counts give (empirical Bayes: Robbins, An empirical
        Bayes approach to statistics, 1956).
        """
        inside, elsewhere = self.neighbors(threshold)
        known = (inside * self.near)[:, None]
        mean, excess = float(elsewhere.mean()), float(elsewhere.var() - elsewhere.mean())
        if self.far <= COUNTED_BY_FACE or mean == 0:
            return np.repeat(known + elsewhere[:, None] * self.far, DRAWS, axis=1)
        if excess <= 0:
            return np.repeat(known + mean * self.far, DRAWS, axis=1)
        shape, scale = mean**2 / excess, excess / mean
        drawn = np.random.default_rng([seed, 11]).gamma(shape + elsewhere[:, None], scale / (1 + scale), (len(inside), DRAWS))
        return known + drawn * self.far


def _probes(
    config: ClusterConfig, held_out: np.ndarray, training: np.ndarray, faces: int, *, cells: int, threshold: float | None,
    threads: int,
) -> float:  # fmt: skip
    """Probes a face, by the rule that quantize would choose with these faces in place of its own samples."""
    fewer = min(cells, max(1, len(training) // quantizer.SAMPLE_PER_CELL))
    centroids, _ = quantizer.train(training, fewer, config.seed, threads)
    choice = probing.choose_rule(
        held_out, faces, centroids, config.neighbors, threshold, min(plans.MAX_PROBES, fewer), *plans.target_recall(faces)
    )
    # Smaller cells hold fewer people each.
    mine, real = plans.expected_probes(faces, np.array([fewer, cells], float), threshold is not None)
    return 1.0 + max(0.0, choice.mean_probes - 1.0) * float((real - 1) / max(mine - 1, 1e-9)) if mine > 1 else 1.0
