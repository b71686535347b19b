"""Which search plan costs least, and what it needs: arithmetic on sizes alone, so the choice never depends on the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

EXACT_WORK = 2e11
"""Floating-point operations up to which all pairs are compared in any case: about 2 s on two cores, and nothing missed."""

CROWDED_CELL = 250.0
"""Without a threshold: faces a cell from which the probes that a recall takes begin to rise, with the third power, as cells
that hold many people describe none of them. Measured on synthetic faces of 68 a person, recall 0.997, pairs that are only
compared in the assigned cell of one of them: 226 faces a cell need 1.2 probes a face on average, 285: 1.3, 539: 9.2, 1054:
71."""

JOINED_CELL, JOINED_POWER, JOINED_GROWTH = 265.0, 1.3, 0.4
"""With a threshold (`joins`): probes beyond the first = (faces a cell / JOINED_CELL)^JOINED_POWER * (faces / 1M)^JOINED_GROWTH.
Measured on the same faces, recall 0.998: 1M faces in cells of 250, 357, 500, 714, 1000, 1429: 1.6, 2.5, 3.4, 5.1, 8.1, 9.5
probes a face; 100k in cells of 357, 714, 1429: 1.7, 2.6, 4.1."""

TILE_OVERHEAD = 1.6
"""What a tile takes beside its product: scan, pushes and gathers."""

GPU_SMALL_TILES = 8.0
"""How much slower an operation of the cells plan is assumed to be than one of the exact plan on a GPU, where small tiles
leave most of the chip idle. An assumption, not a measurement."""


COUNTED_FACES = 32_768
"""Faces of a million or fewer of which all pairs are counted: half a billion pairs, seconds of one core. Of more faces, more in
proportion to the fourth root, as ever fewer of the pairs are of one person."""

MAX_PROBES = 256
"""The most cells that one face probes to reach TARGET_RECALL."""

ALLOWED_MISS = 0.002
"""Share of the edges that the probes may miss by prediction at a million faces and above; well below what a run promises
(0.01), as it is a prediction. Measured: 0.003 predicted and 0.005 missed at 1M synthetic faces."""

ALLOWED_MISS_ALONE = 0.01
"""The same for pairs without a common neighbor (`kernels.ivf.neighbor_join`); twice that from 8M faces on.
Measured on LFW, where 4,069 of 5,749 people have one photo and many two: edge recall .9998, and .9969 without this second
target."""

LEAST_HELD_OUT, HELD_OUT_AT_1M, MOST_HELD_OUT = 4_096, 16_384, 65_536
"""Held-out faces whose mutual pairs predict the recall: a twelfth of all, and from a million faces on in proportion to the
root of their number, so that about 12,000 pairs (of people with 68 photos) are seen: seconds of one core."""


def expected_probes(faces: int, cells: np.ndarray, joined: bool) -> np.ndarray:
    """Mean probes a face that the recall is expected to take, float64 as `cells`; joined: with the neighbor join."""
    crowd = faces / cells
    if not joined:
        return np.minimum(cells, 1.0 + (crowd / CROWDED_CELL) ** 3)
    return np.minimum(cells, 1.0 + (crowd / JOINED_CELL) ** JOINED_POWER * (faces / 1e6) ** JOINED_GROWTH)


LATER_WORKERS, SMALL_WORKER_BYTES = 256, 1_280 * 2**20
"""CPUs that an autoscaled cluster is taken to reach, and the memory that Ray has for tasks a CPU of its smallest machines:
clouds sell 2 GiB a CPU at least, of which Ray keeps a third."""


@dataclass(frozen=True)
class Plan:
    """A search plan and the work it is predicted to take, in floating-point operations of matrix products.

    index: 'exact' or 'cells'; cells: of the coarse quantizer (0 for exact); exact_work, cells_work: of either plan.
    """

    index: str
    cells: int
    exact_work: float
    cells_work: float

    def reason(self, flops: float) -> str:
        """Why this plan, with predicted seconds at `flops` operations a second over all workers."""
        exact, cells = self.exact_work / flops, self.cells_work / flops
        return f"{self.index}: all pairs would take about {exact:,.1f} s, cells {cells:,.1f} s"


def cells_work(
    faces: int, dim: int, cells: np.ndarray, probes: int | None, iterations: float, sample: int, joined: bool
) -> np.ndarray:
    """Operations of the cells plan, float64 as `cells`: training + assignment + tiles (own cell: each pair once)."""
    mean = expected_probes(faces, cells, joined) if probes is None else np.minimum(cells, probes)
    tiles = TILE_OVERHEAD * float(faces) ** 2 * (mean - 0.5) / cells
    return 2.0 * dim * (iterations * sample * cells**2 + faces * cells + tiles)


def choose(
    faces: int, dim: int, index: str, cells: int | None, probes: int | None, iterations: float, sample: int, joined: bool,
    on_gpu: bool = False,
) -> Plan:  # fmt: skip
    """The plan for `faces` faces of dimension `dim`; `index`, `cells` and `probes` as the settings give them.

    iterations, sample: Lloyd iterations and training faces a cell of the quantizer; joined: with the neighbor join, as it
    is with a threshold; on_gpu: whether tiles run on GPUs.
    """
    exact = float(dim) * faces * faces
    candidates = np.unique(np.geomspace(1, max(1, faces // 8), 2000).astype(np.int64)).astype(np.float64)
    work = cells_work(faces, dim, candidates, probes, iterations, sample, joined)
    best = cells or int(candidates[np.argmin(work)])
    cost = float(cells_work(faces, dim, np.array([float(best)]), probes, iterations, sample, joined)[0])
    if on_gpu:
        cost *= GPU_SMALL_TILES
    if index == "auto":
        index = "exact" if exact <= max(EXACT_WORK, cost) else "cells"
    return Plan(index, best if index == "cells" else 0, exact, cost)


@dataclass(frozen=True)
class Workers:
    """The workers that shards are cut for. count: tasks at once; bytes: resident memory that one may use."""

    count: int
    bytes: int

    @classmethod
    def of(cls, declared: int | None, limit: int | None, alive: int, smallest_share: int, fixed: bool) -> Workers:
        """declared, limit: `workers` and `memory_limit` as the settings give them; alive: CPUs of the cluster as of now;
        smallest_share: bytes a CPU of its tightest machine; fixed: whether no more machines can come. Where they can, as on an
        autoscaled cluster that begins with its head alone, shards are cut for many small ones."""
        count = declared or (alive if fixed else max(alive, LATER_WORKERS))
        return cls(count, limit or (smallest_share if fixed else min(smallest_share, SMALL_WORKER_BYTES)))


def shard_count(faces: int, dim: int, neighbors: int, cells: int, mean_probes: float, workers: Workers) -> int:
    """Shards such that one fits a worker's memory and all workers stay busy; results do not depend on it.

    A shard holds, for each face that probes one of its cells, the vector and room for k candidates and a half more; with
    every probe in another shard (the worst case) a face travels mean_probes times.
    """
    face_bytes = 4 * dim + 12 * neighbors + 64
    for_memory = faces * min(mean_probes, 4.0) * face_bytes / (0.25 * workers.bytes)
    for_balance = min(4 * workers.count, faces / 8_192)
    return max(1, min(cells, math.ceil(max(for_memory, for_balance))))


def pairs_counted(faces: int) -> int:
    """Faces of which all pairs are counted to find the threshold."""
    return min(faces, int(COUNTED_FACES * max(1.0, faces / 1e6) ** 0.25))


def target_recall(faces: int) -> tuple[float, float]:
    """Predicted edge recall that the probes are chosen for, of all pairs and of those without a common neighbor; a small set
    can afford higher ones."""
    scale = (faces / 1e6) ** (1 / 3)
    return 1 - ALLOWED_MISS * min(1.0, scale), 1 - ALLOWED_MISS_ALONE * min(2.0, scale)


def held_out_faces(faces: int) -> int:
    """How many faces are held out of the training to predict the recall."""
    most = HELD_OUT_AT_1M * max(1.0, faces / 1e6) ** 0.5
    return int(min(max(LEAST_HELD_OUT, faces // 12), most, MOST_HELD_OUT))
