"""Which search plan costs least, and what it needs: arithmetic on sizes alone, so the choice never depends on the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

EXACT_WORK = 2e11
"""Floating-point operations up to which all pairs are compared in any case: about 2 s on two cores, and nothing missed."""

EXPECTED_PROBES = 8.0
"""Mean probes a face that the number of cells is chosen for. Measured on 1M synthetic faces: 5.7 to 8."""


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
    faces: int, dim: int, cells: np.ndarray | float, probes: float, iterations: int, sample: int
) -> np.ndarray | float:
    """Operations of the cells plan: training + assignment + tiles (a face is compared with its own cell once a pair)."""
    similarities = iterations * sample * cells**2 + faces * cells + float(faces) ** 2 * max(0.5, probes - 0.5) / cells
    return 2.0 * dim * similarities


def choose(faces: int, dim: int, index: str, cells: int | None, probes: int | None, iterations: int, sample: int) -> Plan:
    """The plan for `faces` faces of dimension `dim`; `index`, `cells` and `probes` as the settings give them.

    iterations, sample: Lloyd iterations and training faces a cell of the quantizer.
    """
    expected = float(probes or EXPECTED_PROBES)
    exact = float(dim) * faces * faces
    candidates = np.unique(np.geomspace(1, max(1, faces // 8), 2000).astype(np.int64)).astype(np.float64)
    work = cells_work(faces, dim, candidates, expected, iterations, sample)
    best = cells or int(candidates[np.argmin(work)])
    cost = float(cells_work(faces, dim, float(best), expected, iterations, sample))
    if index == "auto":
        index = "exact" if exact <= max(EXACT_WORK, cost) else "cells"
    return Plan(index, best if index == "cells" else 0, exact, cost)


def shard_count(faces: int, dim: int, neighbors: int, cells: int, mean_probes: float, worker_bytes: int, workers: int) -> int:
    """Shards such that one fits a worker's memory and all workers stay busy; results do not depend on it.

    A shard holds, for each face that probes one of its cells, the vector and a buffer of 2k candidates; with every probe
    in another shard (the worst case) a face travels mean_probes times. worker_bytes: resident bytes a worker may use.
    """
    face_bytes = 4 * dim + 16 * neighbors + 64
    for_memory = faces * min(mean_probes, 4.0) * face_bytes / (0.4 * worker_bytes)
    for_balance = min(4 * workers, faces / 8_192)
    return max(1, min(cells, math.ceil(max(for_memory, for_balance))))
