"""Edge recipes: pure functions (neighbor table, parameters) -> weighted edges.

`threshold` takes a table part by part; the others compare the lists of two rows, so they take all rows as one block
`offsets int64[n + 1], rows int32[m], values float32[m]` (`csr.compress`), each row's neighbors by falling similarity, and
return such a block. Where a formula needs a row's own probability, a face has similarity 1 to itself."""

from __future__ import annotations

import itertools

import numba
import numpy as np

from faceflow.kernels.compiled import kernel
from faceflow.kernels.graph.csr import cut_by_edges
from faceflow.kernels.graph.shared_neighbors import CHUNKS, Block, add, as_words, in_common, no_rows, overlap, shared_sum
from faceflow.kernels.mapequation.flow import row_sums
from faceflow.tables import EdgeList, NeighborTable

NEP_TEMPERATURE, NEP_LEAST = 0.5, 0.22
FACEMAP_NEIGHBORS, FACEMAP_WINDOW = 256, 20
TPDI_TEMPERATURE, TPDI_MOST = 0.05, 0.7

SUPPORTED = 0.5
"""Share of a neighbor's own neighbors that must be near a face for the two to be joined by an edge below the threshold."""

BASE_WEIGHT, DENSE_POWER, DENSE_NEIGHBORS = 0.15, 3, 60
"""Of `auto`: weight of an edge at the support threshold, in units of the excess over it; the power of the excess, which grows
from 1 with the number of neighbors; and the number at which it has grown to that."""

SCALE = 0.4
"""Unit of the excess, in parts of the way from the support threshold to 1: about the mean excess (.50, .32 and .39 of the way
on three labeled sets), but the same whatever faces come and go."""

LEAST_WEIGHT = 1e-6


def threshold(table: NeighborTable, neighbors: int, min_similarity: float | None) -> EdgeList:
    """Edge i -> j for each of i's nearest `neighbors` with cosine >= min_similarity; its weight is the cosine.

    A cosine of zero or less carries no flow, so it never becomes an edge.
    Source: face-cluster-by-infomap (github.com/xiaoxiong74/face-cluster-by-infomap).
    """
    sources = np.repeat(np.arange(len(table)), np.diff(table.offsets))
    rank = np.arange(len(table.rows)) - table.offsets[sources]
    keep = (rank < neighbors) & (table.values > 0)
    if min_similarity is not None:
        keep &= table.values >= np.float32(min_similarity)
    return EdgeList(table.first_row, *kept((table.offsets, table.rows, table.values), keep))


def weighted(recipe: str, block: Block, strong: float, weak: float) -> Block:
    """The edges of a recipe that takes all rows at once; the thresholds are for `auto`."""
    if recipe == "auto":
        return auto(block, strong, weak)
    return {"shared": shared, "nep": nep, "facemap": facemap, "tpdi": tpdi}[recipe](block)


def shared(block: Block) -> Block:
    """Weight cosine x Jaccard overlap of the two neighbor sets, each with the row itself."""
    offsets, rows, values = block
    return offsets, rows, _positive(values * overlap(offsets, rows))


def nep(block: Block) -> Block:
    """Early stop by neighbor-based edge probability: with p_ij proportional to exp(-(2 - 2 cos) / 0.5) over i and its
    neighbors, NEP(i, j) = half the sum of p_it + p_jt over shared neighbors t; neighbors are kept in their order up to the
    first with NEP < 0.22, with weight NEP. Source: FC-ES, "Face Clustering via Early Stopping and Edge Recall", 2024."""
    offsets, rows, values = block
    similarity = np.clip(values, 0, 1)
    likely = np.exp(-(2 - 2 * similarity) / NEP_TEMPERATURE, dtype=np.float32)
    total = 1 + row_sums(offsets, likely)
    likely /= np.repeat(total, np.diff(offsets))
    own, one = (1 / total).astype(np.float32), np.float32(1)
    ones, all_ones = np.broadcast_to(one, len(rows)), np.broadcast_to(one, len(own))
    weight = (shared_sum(block, likely, ones, own, all_ones) + shared_sum(block, ones, likely, all_ones, own)) / 2
    stop = weight < NEP_LEAST
    # An edge is kept while no edge before it, of the same row, has stopped it.
    stopped = np.cumsum(stop)
    before = np.concatenate([[0], stopped])[offsets[:-1]]
    return kept((offsets, rows, weight), stopped == np.repeat(before, np.diff(offsets)))


def facemap(block: Block) -> Block:
    """Outlier cut: with P_r the share of the r-th of up to 256 neighbors in the sum of their cosines and D_r = P_r - P_{r+1},
    a row keeps its neighbors up to the rank where the mean of D over a window of 20 ranks about it lies farthest above the
    mean of the rest, in units of the deviation of the rest; weight P. Rows of 40 neighbors or fewer, where the rest says too
    little, keep all. Source: FaceMap (arXiv 2203.10090)."""
    offsets, rows, values = block
    weight = np.zeros(len(values), np.float32)
    _facemap(offsets, values, weight)
    return kept((offsets, rows, weight), weight > 0)


def tpdi(block: Block) -> Block:
    """Transition-probability distance: with Q_i the softmax of -(1 - cos) / 0.05 over i's neighbors, TPDi(i, j) =
    1 - sum over shared neighbors t of sqrt(Q_it Q_jt); an edge where it is below 0.7, with weight 1 - TPDi.
    Source: "On Mitigating Hard Clusters for Face Clustering", ECCV 2022."""
    offsets, rows, values = block
    root = np.exp((values.astype(np.float64) - 1) / (2 * TPDI_TEMPERATURE))
    total = row_sums(offsets, root**2)
    root = (root / np.repeat(np.sqrt(np.maximum(total, 1e-300)), np.diff(offsets))).astype(np.float32)
    none = np.zeros(len(offsets) - 1, np.float32)
    weight = shared_sum(block, root, root, none, none)
    return kept((offsets, rows, weight), weight > 1 - TPDI_MOST)


def auto(block: Block, strong: float, weak: float) -> Block:
    """Our own, without a parameter of the data set: the thresholds come from the data (`kernels.threshold.valley.Thresholds`).

    Edges from `strong` on are kept, and those from `weak` on that are `supported`. The weight is (excess + 0.15)^p x Jaccard
    overlap of the neighbor sets, excess the similarity over the support threshold in units of 0.4 of the way from there to 1, p
    from 1 for rows of few neighbors to 3 for rows of 60: in dense sets the flow must prefer near faces to the many less near
    ones, and can afford to. The block's memory is used for the result.
    """
    offsets, rows, values = close_up(block, supported(block, strong, weak))
    weight = overlap(offsets, rows)
    _raise_by_excess(offsets, rows, values, weak, SCALE * max(1 - weak, 1e-6), weight)
    return offsets, rows, weight


@kernel(parallel=True)
def _raise_by_excess(
    offsets: np.ndarray, rows: np.ndarray, values: np.ndarray, weak: float, scale: float, weight: np.ndarray
) -> None:
    for i in numba.prange(len(offsets) - 1):
        for e in range(offsets[i], offsets[i + 1]):
            fewer = min(offsets[i + 1] - offsets[i], offsets[rows[e] + 1] - offsets[rows[e]])
            excess = max(np.float64(values[e]) - weak, 0.0) / scale + BASE_WEIGHT
            # Three multiplications are four times as fast as a power, and in a dense set nearly all there is.
            raised = (
                excess**DENSE_POWER if fewer >= DENSE_NEIGHBORS else excess ** (1 + (DENSE_POWER - 1) * fewer / DENSE_NEIGHBORS)
            )
            weight[e] = max(raised * weight[e], LEAST_WEIGHT)


def supported(block: Block, strong: float, weak: float) -> np.ndarray:
    """bool[m]: edges from `strong` on, and those from `weak` on that the target's strong neighbors support: at least half
    of them, of two or more, are neighbors of the source too."""
    offsets, rows, values = block
    is_strong = values >= np.float32(strong)
    if strong <= weak or is_strong.all():
        return is_strong
    strong_ends = offsets[:-1] + row_sums(offsets, is_strong).astype(np.int64)
    cuts = cut_by_edges(offsets, CHUNKS)
    words = as_words(offsets, strong_ends, rows, False, cuts)
    _add_supported(block, strong_ends, np.float32(weak), cuts, words, is_strong)
    return is_strong


@kernel(parallel=True)
def _add_supported(
    block: Block, strong_ends: np.ndarray, weak: np.float32, cuts: np.ndarray,
    sets: tuple[np.ndarray, np.ndarray, np.ndarray], keep: np.ndarray,
) -> None:  # fmt: skip
    # sets: the strong neighbors of every row (`shared_neighbors.as_words`).
    offsets, rows, values = block
    starts, words, masks = sets
    for c in numba.prange(len(cuts) - 1):
        near = no_rows(len(offsets))
        for i in range(cuts[c], cuts[c + 1]):
            if strong_ends[i] == offsets[i + 1]:
                continue
            for e in range(offsets[i], offsets[i + 1]):
                add(near, rows[e])
            for e in range(strong_ends[i], offsets[i + 1]):
                theirs = strong_ends[rows[e]] - offsets[rows[e]]
                if values[e] >= weak and theirs >= 2:
                    keep[e] = in_common(near, starts, words, masks, rows[e]) >= SUPPORTED * theirs
            for e in range(offsets[i], offsets[i + 1]):
                near[rows[e] >> 6] = 0


def _positive(weights: np.ndarray) -> np.ndarray:
    return np.maximum(weights, np.float32(LEAST_WEIGHT), dtype=np.float32)


def _offsets_of(offsets: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The offsets of the rows with the edges where keep holds, int64[n + 1]."""
    new = np.zeros(len(offsets), np.int64)
    np.cumsum(row_sums(offsets, keep).astype(np.int64), out=new[1:])
    return new


def kept(block: Block, keep: np.ndarray) -> Block:
    """The edges of a block where keep, bool[m], holds."""
    offsets, rows, values = block
    new = _offsets_of(offsets, keep)
    kept_rows, kept_values = np.empty(new[-1], rows.dtype), np.empty(new[-1], values.dtype)
    _copy_kept(offsets, rows, values, keep, new, kept_rows, kept_values)
    return new, kept_rows, kept_values


def close_up(block: Block, keep: np.ndarray) -> Block:
    """As `kept`, in the block's own memory, of which it is most of what there is."""
    offsets, rows, values = block
    new = _offsets_of(offsets, keep)
    if new[-1] < len(rows):
        cuts = cut_by_edges(offsets, CHUNKS)
        _close_up(offsets, rows, values, keep, cuts)
        for first, last in itertools.pairwise(cuts.tolist()):
            selected, target = slice(new[first], new[last]), slice(offsets[first], offsets[first] + new[last] - new[first])
            for column in (rows, values):
                column[selected] = column[target]
    return new, rows[: new[-1]], values[: new[-1]]


@kernel(parallel=True)
def _close_up(offsets: np.ndarray, rows: np.ndarray, values: np.ndarray, keep: np.ndarray, cuts: np.ndarray) -> None:
    # Each chunk of rows to its own front.
    for c in numba.prange(len(cuts) - 1):
        at = offsets[cuts[c]]
        for e in range(offsets[cuts[c]], offsets[cuts[c + 1]]):
            if keep[e]:
                rows[at], values[at] = rows[e], values[e]
                at += 1


@kernel(parallel=True)
def _copy_kept(
    offsets: np.ndarray, rows: np.ndarray, values: np.ndarray, keep: np.ndarray,
    new: np.ndarray, kept_rows: np.ndarray, kept_values: np.ndarray,
) -> None:  # fmt: skip
    for i in numba.prange(len(offsets) - 1):
        at = new[i]
        for e in range(offsets[i], offsets[i + 1]):
            if keep[e]:
                kept_rows[at], kept_values[at] = rows[e], values[e]
                at += 1


@kernel(parallel=True)
def _facemap(offsets: np.ndarray, values: np.ndarray, weight: np.ndarray) -> None:
    for i in numba.prange(len(offsets) - 1):
        begin = offsets[i]
        count = min(offsets[i + 1] - begin, FACEMAP_NEIGHBORS)
        total = 0.0
        for r in range(count):
            total += max(np.float64(values[begin + r]), 0.0)
        if total <= 0:
            continue
        drops = max(count - 1, 0)
        cut = count
        if drops >= 2 * FACEMAP_WINDOW:
            drop = np.empty(drops)
            for r in range(drops):
                drop[r] = (max(values[begin + r], 0.0) - max(values[begin + r + 1], 0.0)) / total
            whole, squares, best = drop.sum(), (drop * drop).sum(), -np.inf
            for low in range(drops - FACEMAP_WINDOW + 1):
                inside = drop[low : low + FACEMAP_WINDOW]
                rest = drops - FACEMAP_WINDOW
                mean = (whole - inside.sum()) / rest
                spread = np.sqrt(max((squares - (inside * inside).sum()) / rest - mean * mean, 0.0))
                stands_out = (inside.sum() / FACEMAP_WINDOW - mean) / max(spread, 1e-12)
                if stands_out > best:
                    best, cut = stands_out, low + FACEMAP_WINDOW // 2 + 1
        for r in range(cut):
            weight[begin + r] = max(np.float64(values[begin + r]), 0.0) / total
