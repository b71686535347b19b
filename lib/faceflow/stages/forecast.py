"""A look at the input before a run: a sample of its faces, read where row groups begin, and what it foretells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from faceflow.config import ClusterConfig
from faceflow.errors import InputError
from faceflow.kernels import impostors, plans, probing, quantizer
from faceflow.stages import checking
from faceflow.stages.pieces import Columns, Footer, readable, settle_ids
from faceflow.storage.files import Store

PAIRED_FACES = 32_768
"""Faces of which all pairs are counted: as many as the floor of a million is found from."""

TRAINING_FACES = 131_072
"""Faces that a quantizer is trained on, at most; a larger one than they allow is foretold from a smaller."""

COUNTED_BY_FACE = 1.5
"""Times the faces looked at that there are, up to which each one's neighbors are counted."""

SHORTEST_BLOCK = 32
"""Consecutive faces of one row group, at least: fewer cost as much to read."""


@dataclass(frozen=True)
class Outlook:
    """What the sample foretells of the whole set.

    sampled: faces looked at; floor, weak_floor, valley, impostors: as quantize finds them (None: given, or none); neighbors,
    strong: a face, from the weak floor and from the floor on, at most k; plan: of the search; probes: a face, mean; id_bytes: a
    face's id, mean; unusable: share of the sampled rows that would be rejected.
    """

    dim: int
    sampled: int
    floor: float | None
    weak_floor: float | None
    valley: float | None
    impostors: float | None
    neighbors: float
    strong: float
    plan: plans.Plan
    probes: float
    id_bytes: float
    unusable: float


def look(config: ClusterConfig, store: Store, footers: Sequence[Footer], dim: int, threads: int) -> Outlook:
    """Read a sample of the input and foretell the rest. Raises InputError where no face of it can be used."""
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
    counts = _Pairs(vectors[paired], block[paired], _block_length(block), faces)
    floor, weak, valley, strangers = _floors(config, counts, faces)
    neighbors, strong = (counts.neighbors(each, config.neighbors) for each in (weak, floor))
    probes = float(config.probes or 0)
    if training:
        apart = vectors[order[: len(order) // 2][:held]], vectors[order[-min(training, len(order) // 2) :]]
        probes = _probes(config, *apart, faces, plan.cells, floor, threads)
    return Outlook(
        dim, len(vectors), floor, weak, valley, strangers, neighbors, strong, plan, probes, id_bytes, unusable
    )  # fmt: skip


def _floors(
    config: ClusterConfig, counts: _Pairs, faces: int
) -> tuple[float | None, float | None, float | None, float | None]:  # fmt: skip
    """(floor, weak floor, valley, impostors a face)."""
    if isinstance(config.min_similarity, str):
        found = impostors.choose_floors(counts.histogram, faces)
        return found.strong, found.weak if config.edges == "auto" else found.strong, found.valley, found.impostors
    return config.min_similarity, config.min_similarity, None, None


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
    found: list[np.ndarray] = []
    blocks: list[int] = []
    rows = id_bytes = 0
    by_path: dict[str, list[tuple[int, int]]] = {}
    names = Columns(config.id_column, config.embedding_column, None, settle_ids(footers, None).stored)
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
                good = checking.check_batch(ids, not_text, names.embeddings(batch), dim)[2]
                rows, id_bytes = rows + len(ids), id_bytes + ids.nbytes
                found.append(good)
                blocks.append(len(good))
    vectors = np.concatenate(found)
    return vectors, np.repeat(np.arange(len(blocks)), blocks), id_bytes / max(1, rows), 1 - len(vectors) / max(1, rows)


def _block_length(block: np.ndarray) -> float:
    """Faces of the block that a face is in, on average."""
    return float((np.bincount(block).astype(float) ** 2).sum() / len(block))


class _Pairs:
    """Pairs of the sample by similarity, weighed so that they stand for all pairs of the set.

    Faces of one block are neighbors in the file, and a file may be sorted by person: pairs within a block stand for such pairs
    alone, the others for all the rest. In a shuffled file both are the same, and the weights do not matter. length: of a block,
    of which `vectors` may be a part.
    """

    def __init__(self, vectors: np.ndarray, block: np.ndarray, length: float, faces: int) -> None:
        rows = np.arange(len(vectors), dtype=np.int32)
        every = impostors.count_pairs(vectors, rows, vectors, rows)
        cuts = np.searchsorted(block, np.arange(int(block[-1]) + 2))
        inside = np.zeros_like(every)
        for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
            inside += impostors.count_pairs(vectors[begin:end], rows[begin:end], vectors[begin:end], rows[begin:end])
        here = _block_length(block)
        self._inside, self._across, self._sampled = inside, every - inside, len(vectors)
        self._vectors = vectors
        self._near = (length - 1) / max(1.0, here - 1)
        self._far = max(1.0, (faces - length) / max(1.0, len(vectors) - here))
        if self._across.sum() == 0:
            self._across, self._inside = every, np.zeros_like(every)
            self._far = faces / len(vectors)

    @property
    def histogram(self) -> np.ndarray:
        """As `impostors.choose_floors` wants it: a uniform sample of all pairs."""
        return self._across + np.round(self._inside * (self._near / self._far)).astype(np.int64)

    def neighbors(self, floor: float | None, k: int) -> float:
        """Expected neighbors a face at a similarity of `floor` or more, at most k."""
        if floor is None:
            return float(k)
        if self._across.sum() and self._far <= COUNTED_BY_FACE and not self._inside.sum():
            # Nearly all faces are here: a person of more photos than k counts for k only.
            found = np.concatenate(
                [
                    (self._vectors[begin : begin + 1024] @ self._vectors.T >= np.float32(floor)).sum(axis=1) - 1
                    for begin in range(0, len(self._vectors), 1024)
                ]
            )
            return float(np.minimum(found * self._far, k).mean())
        start = int(np.clip((floor + 1) * impostors.BINS / 2, 0, impostors.BINS))
        inside, across = (2 * counts[start:].sum() / self._sampled for counts in (self._inside, self._across))
        return min(float(k), float(inside * self._near + across * self._far))


def _probes(
    config: ClusterConfig, held_out: np.ndarray, training: np.ndarray, faces: int, cells: int, floor: float | None, threads: int
) -> float:  # fmt: skip
    """Probes a face, by the rule that quantize would choose with these faces in place of its own samples."""
    fewer = min(cells, max(1, len(training) // quantizer.SAMPLE_PER_CELL))
    centroids, _ = quantizer.train(training, fewer, config.seed, threads)
    choice = probing.choose_rule(
        held_out, faces, centroids, config.neighbors, floor, min(plans.MAX_PROBES, fewer), *plans.target_recall(faces)
    )
    # Smaller cells hold fewer people each.
    mine, real = plans.expected_probes(faces, np.array([fewer, cells], float), floor is not None)
    return 1.0 + max(0.0, choice.mean_probes - 1.0) * float((real - 1) / max(mine - 1, 1e-9)) if mine > 1 else 1.0
