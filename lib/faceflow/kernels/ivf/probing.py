"""Which cells each face probes, and how many that takes for a predicted edge recall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from faceflow.kernels.compiled import kernel
from faceflow.kernels.knn.tile_kernel import CHUNK, QUERY_BLOCK, TileKernel
from faceflow.kernels.knn.topk import Buffers, decode, key_of, select_smallest

UNTOLD_PROBES = 8
"""Probes where a sample holds no pair above the threshold: there is next to nothing to find."""

FEWEST_ALONE = 50
"""Pairs without a common neighbor in the sample from which on they say something."""

MARGIN_STEP = 1e-4
"""Margins are rounded up to a multiple: BLAS rounds differently in blocks of another shape, or on other machines, and must
neither lose the pair that set the margin nor move it."""


@dataclass(frozen=True)
class ProbeRule:
    """Which cells a face probes: its nearest one, and every further one whose centroid is at most `margin` less similar,
    `most` at most. margin None: always `most`.

    A fixed number of probes wastes most of them on faces that lie well inside their cell; the margin spends them on the
    faces that do not.
    """

    margin: float | None
    most: int

    def widened(self, effort: int, cells: int) -> ProbeRule:
        """The rule after `effort` failed attempts at the wanted recall: each doubles `most` and adds half to the margin."""
        most = min(cells, self.most * 2**effort)
        if self.margin is None or most == cells:
            return ProbeRule(None if effort else self.margin, most)
        return ProbeRule(self.margin * 1.5**effort, most)


def probe(vectors: np.ndarray, centroids: np.ndarray, rule: ProbeRule) -> tuple[np.ndarray, np.ndarray]:
    """The cells that each face probes, nearest first, ties to the lower cell: (offsets int64[n + 1], cells int32[...]).

    vectors: float32[n, d], unit rows; centroids: float32[c, d].
    """
    offsets, keys = probe_keys(vectors, centroids, rule)
    return offsets, decode(keys)[1]


def probe_keys(vectors: np.ndarray, centroids: np.ndarray, rule: ProbeRule) -> tuple[np.ndarray, np.ndarray]:
    """As `probe`, but (offsets, `topk` keys uint64[...]) of similarity and cell."""
    n, cells = len(vectors), len(centroids)
    most = min(rule.most, cells)
    margin = np.float32(np.inf if rule.margin is None else rule.margin)
    product = np.empty((min(QUERY_BLOCK, n), cells), np.float32)
    counts, out = np.empty(n, np.int64), []
    scratch = np.empty(cells, np.uint64)
    for begin in range(0, n, QUERY_BLOCK):
        block = product[: min(QUERY_BLOCK, n - begin)]
        np.matmul(vectors[begin : begin + len(block)], centroids.T, out=block)
        nearest = np.empty(len(block) * most, np.uint64)
        # NumPy's maximum runs at the speed of memory; the same loop in numba was six times slower.
        least = block.max(axis=1) - margin
        total = _within_margin(block, block.view(np.uint32), least, most, scratch, counts[begin : begin + len(block)], nearest)
        out.append(nearest[:total].copy())
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets, np.concatenate(out) if out else np.empty(0, np.uint64)


@kernel
def _within_margin(
    product: np.ndarray, bits: np.ndarray, least: np.ndarray, most: int,
    scratch: np.ndarray, counts: np.ndarray, out: np.ndarray,
) -> int:  # fmt: skip
    total = 0
    for i in range(product.shape[0]):
        row = product[i]
        results = 0
        for begin in range(0, len(row), CHUNK):
            start, end = np.uint64(begin), np.uint64(min(begin + CHUNK, len(row)))  # unsigned, as in `tiles`
            near = np.int32(0)
            for j in range(start, end):
                near += np.int32(row[j] >= least[i])
            if near:
                for j in range(start, end):
                    if row[j] >= least[i]:
                        scratch[results] = key_of(bits[i, j], np.int32(j))
                        results += 1
        if results > most:
            select_smallest(scratch, 0, results, most)
            results = most
        nearest = scratch[:results]
        nearest.sort()
        out[total : total + results] = nearest
        total += results
        counts[i] = results
    return total


@dataclass(frozen=True)
class Choice:
    """How faces probe, and what to expect of it.

    rule: for a search of all faces, with the neighbor join (`kernels.ivf.neighbor_join`); alone: for one in which a face must
    find its neighbors by its own probes (`kernels.knn.incremental_search`); mean_probes: cells that a face probes by `rule`, on
    average; recall: the predicted edge recall (None: there was no pair to tell by).
    """

    rule: ProbeRule
    alone: ProbeRule
    mean_probes: float
    recall: float | None


def choose_rule(
    vectors: np.ndarray,
    faces: int,
    centroids: np.ndarray,
    neighbors: int,
    threshold: float | None,
    most: int,
    target: float,
    target_alone: float,
) -> Choice:
    """The smallest margin with a predicted edge recall of `target`.

    vectors: float32[n, d], a uniform sample of the `faces` faces: pairs of it above the threshold (with threshold None: each
    face's nearest in it) are a sample of the edges. A pair is found when one face probes the other's assigned cell. With a
    threshold it is also found when both probe a third cell and a common neighbor there proposes the pair
    (`kernels.ivf.neighbor_join`), which works for people with many photos. Two photos that are all there is of a person have
    none: of pairs without a common neighbor in the sample, `target_alone` must be found without it. A face with
    more neighbors than k keeps only k of them, so its pairs weigh less: without that, the easy faces amid a large cluster would
    outvote the hard ones at its edge.
    """
    n = len(vectors)
    # Without a threshold, only as many of the sample's faces are neighbors as the sample has of all faces.
    k = neighbors if threshold is not None else -(-neighbors * n // faces)
    buffers = Buffers.empty(n, min(k, max(1, n - 1)), threshold)
    selected = np.arange(n)
    TileKernel(vectors, selected.astype(np.int32), buffers).within(selected, vectors)
    offsets, keys = buffers.take(selected)
    if len(keys) == 0:
        rule = ProbeRule(None, min(most, UNTOLD_PROBES))
        return Choice(rule, rule, float(rule.most), None)
    probed, probe_key = probe_keys(vectors, centroids, ProbeRule(None, most))
    similarities, cells = decode(probe_key)
    short = np.repeat(similarities[probed[:-1]], np.diff(probed)) - similarities
    assigned, joined, own = (np.empty(len(keys), np.float32) for _ in range(3))
    pairs = Pairs(assigned, joined, own, np.empty(len(keys), np.bool_))
    _find_margins((offsets, decode(keys)[1]), (probed, cells, short), len(centroids), pairs)
    alone = pairs.alone
    owner = np.repeat(selected, np.diff(offsets))
    weights = np.minimum(1.0, neighbors * n / (faces * np.diff(offsets)[owner]))
    margin, recall = _quantile(pairs.assigned if threshold is None else pairs.joined, weights, target)
    if threshold is not None and alone.sum() >= FEWEST_ALONE:
        margin = max(margin, _quantile(pairs.assigned[alone], weights[alone], target_alone)[0])
        recall = float(weights[pairs.joined <= margin].sum() / weights.sum())
    if not np.isfinite(margin):
        return Choice(ProbeRule(None, most), ProbeRule(None, most), float(most), 0.0)
    margin, wide = (
        float(MARGIN_STEP * np.ceil(m / MARGIN_STEP + 0.5)) for m in (margin, _quantile(pairs.own, weights, target)[0])
    )
    mean_probes = float((short <= margin).sum() / n)
    return Choice(ProbeRule(margin, most), ProbeRule(max(margin, wide), most), mean_probes, round(recall, 5))


def _quantile(needed: np.ndarray, weights: np.ndarray, target: float) -> tuple[float, float]:
    """The smallest margin that a share `target` of the pairs needs at most, and that share; the largest finite one where
    `target` is out of reach, infinity where none is."""
    order = np.argsort(needed, kind="stable")
    needed, reached = needed[order], np.cumsum(weights[order]) / weights.sum()
    finite = int(np.isfinite(needed).sum())
    if finite == 0:
        return np.inf, 0.0
    at = min(finite - 1, int(np.searchsorted(reached, target)))
    return float(needed[at]), float(reached[at])


class Pairs(NamedTuple):
    """Of each pair (i, neighbor) the margins, float32[...], at which one probes the other's assigned cell (assigned), both
    probe one cell (joined), and i itself probes the other's assigned cell (own); infinite where that is not within the cells
    listed. alone: bool[...], whether the two have no common neighbor."""

    assigned: np.ndarray
    joined: np.ndarray
    own: np.ndarray
    alone: np.ndarray


@kernel
def _find_margins(
    table: tuple[np.ndarray, np.ndarray], probes: tuple[np.ndarray, np.ndarray, np.ndarray], count: int, pairs: Pairs
) -> None:
    # table: (offsets, neighbors); probes: (offsets, cells, by how much each is farther than the nearest); count: of cells.
    offsets, neighbors = table
    probed, cells, short = probes
    assigned, joined, own, alone = pairs
    mine = np.full(count, np.float32(np.inf))
    known = np.full(len(offsets) - 1, -1, np.int64)
    for i in range(len(offsets) - 1):
        for p in range(probed[i], probed[i + 1]):
            mine[cells[p]] = short[p]
        for e in range(offsets[i], offsets[i + 1]):
            known[neighbors[e]] = i
        for e in range(offsets[i], offsets[i + 1]):
            j = neighbors[e]
            least = mine[cells[probed[j]]]
            either = least
            own[e] = least
            for p in range(probed[j], probed[j + 1]):
                if cells[p] == cells[probed[i]]:
                    least = min(least, short[p])
                either = min(either, max(mine[cells[p]], short[p]))
            assigned[e] = least
            joined[e] = either
            shared = False
            for t in range(offsets[j], offsets[j + 1]):
                shared |= known[neighbors[t]] == i
            alone[e] = not shared
        for p in range(probed[i], probed[i + 1]):
            mine[cells[p]] = np.float32(np.inf)
