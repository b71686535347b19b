"""Clustering methods of the face literature on a neighbor table: density peaks, rank order, label games, splitting.

Tables are blocks `offsets int64[n + 1], rows int32[m], values float32[m]`, each row's neighbors by falling cosine, without
the row itself. Every function returns the links it finds, (sources, targets), or labels int64[n].
"""

from __future__ import annotations

import numba
import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from faceflow.kernels.compiled import kernel
from faceflow.kernels.graph.edge_recipes import tpdi
from faceflow.kernels.graph.shared_neighbors import Block

NDDE_NEIGHBORS, NDDE_TEMPERATURE = 20, 0.5
LCE_NEAREST = 3
RANK_ORDER_NEIGHBORS, RANK_ORDER_MOST = 20, 1.0
CDP_LARGEST, CDP_STEP = 300, 0.05
WHISPERS_ROUNDS = 20


def components(n: int, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """int64[n]: the connected component of each row, numbered by first row."""
    graph = coo_array((np.ones(len(sources), np.uint8), (sources, targets)), shape=(n, n))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def sources_of(block: Block) -> np.ndarray:
    return np.repeat(np.arange(len(block[0]) - 1), np.diff(block[0]))


def symmetric(block: Block) -> csr_array:
    """The table as a symmetric sparse matrix [n, n]: a pair's cosine, whichever of the two lists holds it; columns sorted."""
    n = len(block[0]) - 1
    matrix = csr_array((block[2], block[1], block[0]), shape=(n, n))
    both = matrix.maximum(matrix.T).tocsr()
    both.sort_indices()
    return both


def _first_of_each(owner: np.ndarray) -> np.ndarray:
    """bool[m]: the first entry of each owner, int64[m] ascending."""
    first = np.ones(len(owner), bool)
    first[1:] = owner[1:] != owner[:-1]
    return first


def ndde(block: Block) -> np.ndarray:
    """float64[n]: density by diffusion, the column sums of the rows' softmax of -(1 - cos) / 0.5 over their 20 nearest.
    Source: "On Mitigating Hard Clusters for Face Clustering", ECCV 2022."""
    offsets, rows, values = block
    rank = np.arange(len(rows)) - np.repeat(offsets[:-1], np.diff(offsets))
    near = rank < NDDE_NEIGHBORS
    owner, target = sources_of(block)[near], rows[near]
    raw = np.exp((values[near].astype(np.float64) - 1) / NDDE_TEMPERATURE)
    total = np.bincount(owner, raw, len(offsets) - 1)
    return np.bincount(target, raw / total[owner], len(offsets) - 1)


def density_peaks(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Links of each row to its neighbor nearest by TPDi (`edges.tpdi`: below 0.7) among those of at least its density (`ndde`);
    of equal density, to lower rows only, and of equal distance to the lowest. Source: as `ndde`."""
    density = ndde(block)
    offsets, rows, weights = tpdi(block)
    owner = sources_of((offsets, rows, weights))
    higher = (density[rows] > density[owner]) | ((density[rows] == density[owner]) & (rows < owner))
    owner, rows, weights = owner[higher], rows[higher], weights[higher]
    order = np.lexsort((rows, -weights, owner))
    first = _first_of_each(owner[order])
    return owner[order][first], rows[order][first]


def local_connectivity(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Links of local-connectivity edge selection, its part that needs no training: with s = 1 where both lists hold the pair,
    1/2 where one does, a row's density is the sum of s x cos; it links to the denser neighbor of largest s x cos, and to each
    denser one whose s x cos is above the mean cosine to its three nearest. Source: "Local Connectivity-Based Density Estimation
    for Face Clustering", CVPR 2023 (there s comes from a trained network)."""
    n = len(block[0]) - 1
    matrix = csr_array((block[2].astype(np.float64), block[1], block[0]), shape=(n, n))
    near = ((matrix + matrix.T) / 2).tocsr()  # s x cos: the cosine where both hold it, half where one does
    near.sort_indices()
    density = near.sum(axis=1)
    sources, targets, values = np.repeat(np.arange(n), np.diff(near.indptr)), near.indices, near.data
    denser = (density[targets] > density[sources]) | ((density[targets] == density[sources]) & (targets < sources))
    nearest = np.zeros(n)
    for i in range(min(LCE_NEAREST, int(np.diff(block[0]).max(initial=0)))):
        has = np.diff(block[0]) > i
        nearest[has] += block[2][block[0][:-1][has] + i]
    nearest /= np.clip(np.diff(block[0]), 1, LCE_NEAREST)
    order = np.lexsort((targets, -values, sources))
    order = order[denser[order]]
    first = _first_of_each(sources[order])
    chosen = np.concatenate([order[first], order[~first & (values[order] > nearest[sources[order]])]])
    return sources[chosen], targets[chosen].astype(np.int64)


def rank_order(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Links of neighbors with approximate rank-order distance below 1: with a's 20 nearest in order, a itself first (rank 0),
    d(a, b) counts those up to b's rank that b's 20 nearest do not hold, and the distance is (d(a, b) + d(b, a)) over the
    smaller of the two ranks; pairs of which only one list holds the other are not linked.
    Source: Otto, Wang & Jain, "Clustering Millions of Faces by Identity", IEEE TPAMI 40 (2018)."""
    keep = np.zeros(len(block[1]), np.bool_)
    _rank_order(block[0], block[1], RANK_ORDER_NEIGHBORS, RANK_ORDER_MOST, keep)
    return sources_of(block)[keep], block[1][keep].astype(np.int64)


@kernel
def _missing(offsets: np.ndarray, rows: np.ndarray, a: int, b: int, rank: int, k: int) -> int:
    # Of a and a's neighbors of ranks 1 to `rank`, how many are neither b nor among b's first k.
    count = 0
    for r in range(rank + 1):
        t = a if r == 0 else rows[offsets[a] + r - 1]
        results = t == b
        for f in range(offsets[b], min(offsets[b + 1], offsets[b] + k)):
            results |= rows[f] == t
        count += not results
    return count


@kernel(parallel=True)
def _rank_order(offsets: np.ndarray, rows: np.ndarray, k: int, most: float, keep: np.ndarray) -> None:
    for a in numba.prange(len(offsets) - 1):
        for e in range(offsets[a], min(offsets[a + 1], offsets[a] + k)):
            b, matched = rows[e], 0
            for f in range(offsets[b], min(offsets[b + 1], offsets[b] + k)):
                if rows[f] == a:
                    matched = f - offsets[b] + 1
            if matched:
                selected = e - offsets[a] + 1
                apart = _missing(offsets, rows, a, b, selected, k) + _missing(offsets, rows, b, a, matched, k)
                keep[e] = apart / min(selected, matched) < most


def split_components(block: Block, threshold: float) -> np.ndarray:
    """Labels of consensus-driven propagation's last step: components at the threshold; those of more than 300 rows again at a
    threshold higher by a twentieth of the way to 1, until none is so large. Source: Zhan et al., "Consensus-Driven
    Propagation in Massive Unlabeled Data for Face Recognition", ECCV 2018 (its threshold rises by 0.05)."""
    n = len(block[0]) - 1
    sources, targets, values = sources_of(block), block[1], block[2]
    label, level = np.empty(n, np.int64), threshold
    open_rows, used = np.ones(n, bool), 0
    while open_rows.any():
        keep = (values >= np.float32(level)) & open_rows[sources]
        sources, targets, values = sources[keep], targets[keep], values[keep]
        results = components(n, sources, targets)
        final = open_rows & (np.bincount(results)[results] <= (CDP_LARGEST if level < 1 else n))
        label[final] = used + results[final]
        used += n
        open_rows &= ~final
        level = min(1.0, level + CDP_STEP * (1 - threshold))
    return np.unique(label, return_inverse=True)[1].astype(np.int64)


def chinese_whispers(matrix: csr_array, seed: int) -> np.ndarray:
    """Labels after up to 20 rounds in each of which every row, in a random order, takes the label that its neighbors hold with
    the largest sum of weights; ties to the lowest label. matrix: symmetric.
    Source: Biemann, "Chinese Whispers", TextGraphs 2006."""
    n = matrix.shape[0]
    label, rng = np.arange(n), np.random.default_rng(seed)
    for _ in range(WHISPERS_ROUNDS):
        if not _whisper(matrix.indptr, matrix.indices, matrix.data, rng.permutation(n), label, np.zeros(n)):
            break
    return label


@kernel
def _whisper(
    offsets: np.ndarray, rows: np.ndarray, weights: np.ndarray, order: np.ndarray, label: np.ndarray, total: np.ndarray
) -> int:
    moved = 0
    for i in order:
        best, most = label[i], 0.0
        for e in range(offsets[i], offsets[i + 1]):
            total[label[rows[e]]] += weights[e]
        for e in range(offsets[i], offsets[i + 1]):
            heard = label[rows[e]]
            if total[heard] > most or (total[heard] == most and heard < best):
                best, most = heard, total[heard]
        for e in range(offsets[i], offsets[i + 1]):
            total[label[rows[e]]] = 0.0
        moved += best != label[i]
        label[i] = best
    return moved
