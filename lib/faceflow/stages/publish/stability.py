"""How stable clusters are: their share of the edges, read where it lies, and resampled (`kernels.clusters.stability`)."""

from __future__ import annotations

import bisect

import numpy as np

from faceflow.kernels.clusters.stability import stability
from faceflow.stages.artifacts.faces import read_column, read_groups
from faceflow.storage import layout
from faceflow.storage.object_store import Store
from faceflow.tables import EdgeList, Parts

STABILITY_TRIALS, STABILITY_EDGES = 5, 300_000
"""Resampled graphs, and edges of the clusters looked at, at most: half a second."""

MOST_FACES_ON_S3 = 1_000_000
"""Where edges cannot be mapped, all of them would be fetched by one task: above this many faces, none are."""


def resample(
    run: Store, parts: Parts, lookup: np.ndarray, clusters: np.ndarray, seed: int, directed: bool | None
) -> np.ndarray:
    """How stable these clusters int64[c], the most doubtful first, are under resampled edges (`kernels.clusters.stability`),
    float64[c]: all of a small set; else the first and a random sample, each with the clusters that its edges lead to, up to
    STABILITY_EDGES; NaN for the others."""
    results = np.full(len(clusters), np.nan)
    if directed is None or not (run.is_local or parts.faces <= MOST_FACES_ON_S3):
        return results
    graph = _Graph(run, parts, lookup)
    shuffled = np.random.default_rng([seed, 8]).permutation(len(clusters))
    turns = dict.fromkeys(i for both in zip(range(len(clusters)), shuffled.tolist(), strict=True) for i in both)
    chosen, taken, edges = list[int](), set[int](), 0
    for i in turns:
        cluster = int(clusters[i])
        if graph.edges(cluster) > STABILITY_EDGES:
            continue
        reached = {cluster, *graph.neighbors(cluster)} - taken
        edges += sum(graph.edges(item) for item in reached)
        if chosen and edges > STABILITY_EDGES:
            break
        taken |= reached
        chosen.append(i)
    if chosen:
        rows = np.sort(np.concatenate([graph.rows(cluster) for cluster in taken]))
        offsets, targets, weights = graph.within(rows)
        numbers, mine = np.unique(graph.cluster_of(rows), return_inverse=True)
        every = stability(offsets, targets, weights, mine, STABILITY_TRIALS, seed, directed)
        results[chosen] = every[np.searchsorted(numbers, clusters[chosen])]
    return results


class _Graph:
    """Some clusters' share of the edges, read where they lie: a part is mapped, and of it only these rows are touched."""

    def __init__(self, run: Store, parts: Parts, lookup: np.ndarray) -> None:
        self._parts = parts
        self._clusters = lookup[read_column(run, "modules", range(len(parts)))]
        # Faces that count as one with another have no edges.
        counted = np.flatnonzero(read_groups(run, parts.faces) == np.arange(parts.faces))
        self._order = counted[np.argsort(self._clusters[counted], kind="stable")]
        self._starts = np.searchsorted(self._clusters[self._order], np.arange(int(lookup.max(initial=-1)) + 2))
        self._edges = [
            EdgeList.from_batch(run.read_batch(layout.part("edges", part)), parts.starts[part]) for part in range(len(parts))
        ]
        self._degrees = np.concatenate([np.diff(edges.offsets) for edges in self._edges])

    def rows(self, cluster: int) -> np.ndarray:
        return self._order[self._starts[cluster] : self._starts[cluster + 1]]

    def cluster_of(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._clusters[rows])

    def edges(self, cluster: int) -> int:
        return int(self._degrees[self.rows(cluster)].sum())

    def neighbors(self, cluster: int) -> list[int]:
        """Clusters that edges of this one lead to."""
        targets = [self._of(row)[0] for row in self.rows(cluster).tolist()]
        return [int(cluster) for cluster in np.unique(self._clusters[np.concatenate(targets)])]

    def within(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The edges among these rows int64[r], ascending, and numbered by them: (offsets, targets, weights)."""
        number = np.full(self._parts.faces, -1, np.int32)
        number[rows] = np.arange(len(rows), dtype=np.int32)
        lists = [self._of(row) for row in rows.tolist()]
        targets = number[np.concatenate([results for results, _ in lists])]
        weights = np.concatenate([values for _, values in lists])
        inside = targets >= 0
        counts = np.cumsum([0, *(len(results) for results, _ in lists)])
        return np.concatenate([[0], np.cumsum(inside)])[counts], targets[inside], weights[inside]

    def _of(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        part = bisect.bisect_right(self._parts.starts, row) - 1
        edges, local = self._edges[part], row - self._parts.starts[part]
        selected = slice(edges.offsets[local], edges.offsets[local + 1])
        return edges.rows[selected], edges.values[selected]
