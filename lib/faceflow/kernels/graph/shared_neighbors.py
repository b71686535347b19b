"""What the neighbor lists of two rows have in common, for every edge: how many rows, or a sum over them.

Lists come as one block `offsets int64[n + 1], rows int32[m], values float32[m]`. Rows should stand so that those of one cluster
are near each other (`csr.locality_order`): a list is then a few words of 64 rows, and two lists are compared word by word.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic

from faceflow.kernels.compiled import kernel
from faceflow.kernels.graph.csr import cut_by_edges

Block = tuple[np.ndarray, np.ndarray, np.ndarray]

CHUNKS = 64
"""Blocks of rows whose lists are compared side by side."""


@intrinsic
def _ones(typing: Any, word: Any) -> Any:
    """Bits that are set in a uint64."""
    return numba.uint64(numba.uint64), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


def overlap(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """float32[m]: Jaccard overlap of the neighbor sets of an edge's two rows, each with the row itself."""
    cuts = cut_by_edges(offsets, CHUNKS)
    out = np.empty(len(rows), np.float32)
    _overlap(offsets, rows, cuts, *as_words(offsets, offsets[1:], rows, True, cuts), out)
    return out


def as_words(
    offsets: np.ndarray, ends: np.ndarray, rows: np.ndarray, own: bool, cuts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each row's list up to ends[i], and with `own` the row itself, as a set: (starts int64[n + 1], words int32[w], masks
    uint64[w]); bit b of a mask stands for row 64 x word + b."""
    starts = np.zeros(len(offsets), np.int64)
    _count_words(offsets, ends, rows, own, cuts, starts)
    np.cumsum(starts, out=starts)
    words, masks = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.uint64)
    _fill_words(offsets, ends, rows, own, cuts, starts, words, masks)
    return starts, words, masks


@kernel
def no_rows(n: int) -> np.ndarray:
    """An empty set of n rows, as one mask a word."""
    return np.zeros((n + 63) // 64, np.uint64)


@kernel
def add(near: np.ndarray, row: int) -> None:
    near[row >> 6] |= np.uint64(1) << np.uint64(row & 63)


@kernel
def in_common(near: np.ndarray, starts: np.ndarray, words: np.ndarray, masks: np.ndarray, row: int) -> int:
    """How many rows of one row's set (`as_words`) are in the set `near`."""
    count = np.uint64(0)
    for w in range(np.uint64(starts[row]), np.uint64(starts[row + 1])):
        count += _ones(masks[w] & near[words[w]])
    return int(count)


@kernel(parallel=True)
def _count_words(
    offsets: np.ndarray, ends: np.ndarray, rows: np.ndarray, own: bool, cuts: np.ndarray, counts: np.ndarray
) -> None:
    # counts[i + 1]: words of 64 rows that row i's list touches.
    for c in numba.prange(len(cuts) - 1):
        last = np.full((len(offsets) + 63) // 64, -1, np.int32)  # the row that touched a word last
        for i in range(cuts[c], cuts[c + 1]):
            count = 0
            if own:
                last[i >> 6] = i
                count += 1
            for e in range(offsets[i], ends[i]):
                w = rows[e] >> 6
                count += last[w] != i
                last[w] = i
            counts[i + 1] = count


@kernel(parallel=True)
def _fill_words(
    offsets: np.ndarray, ends: np.ndarray, rows: np.ndarray, own: bool, cuts: np.ndarray, starts: np.ndarray,
    words: np.ndarray, masks: np.ndarray,
) -> None:  # fmt: skip
    for c in numba.prange(len(cuts) - 1):
        place = np.full((len(offsets) + 63) // 64, -1, np.int64)  # where a word is; below the row's first: not there yet
        for i in range(cuts[c], cuts[c + 1]):
            at = starts[i]
            if own:
                words[at], masks[at], place[i >> 6] = i >> 6, np.uint64(1) << np.uint64(i & 63), at
                at += 1
            for e in range(offsets[i], ends[i]):
                w = rows[e] >> 6
                bit = np.uint64(1) << np.uint64(rows[e] & 63)
                if place[w] < starts[i]:
                    words[at], masks[at], place[w] = w, bit, at
                    at += 1
                else:
                    masks[place[w]] |= bit


@kernel(parallel=True)
def _overlap(
    offsets: np.ndarray, rows: np.ndarray, cuts: np.ndarray, starts: np.ndarray, words: np.ndarray, masks: np.ndarray,
    out: np.ndarray,
) -> None:  # fmt: skip
    for c in numba.prange(len(cuts) - 1):
        near = no_rows(len(offsets))
        for i in range(cuts[c], cuts[c + 1]):
            add(near, i)
            for e in range(offsets[i], offsets[i + 1]):
                add(near, rows[e])
            for e in range(offsets[i], offsets[i + 1]):
                common = in_common(near, starts, words, masks, rows[e])
                union = (offsets[i + 1] - offsets[i]) + (offsets[rows[e] + 1] - offsets[rows[e]]) + 2 - common
                out[e] = common / union
            near[i >> 6] = 0
            for e in range(offsets[i], offsets[i + 1]):
                near[rows[e] >> 6] = 0


def shared_sum(
    block: Block, selected: np.ndarray, target: np.ndarray, own_here: np.ndarray, own_there: np.ndarray
) -> np.ndarray:
    """For each edge (i, j) the sum of here[i, t] x there[j, t] over all t in both rows' lists, a row itself being in its own
    with own_here, own_there: float32[m]."""
    offsets, rows, _ = block
    out = np.zeros(len(rows), np.float32)
    cuts = cut_by_edges(offsets, CHUNKS)
    _sum_shared(offsets, rows, selected, target, own_here, own_there, cuts, out)
    return out


@kernel(parallel=True)
def _sum_shared(
    offsets: np.ndarray, rows: np.ndarray, selected: np.ndarray, target: np.ndarray, own_here: np.ndarray, own_there:
    np.ndarray, cuts: np.ndarray, out: np.ndarray,
) -> None:  # fmt: skip
    for c in numba.prange(len(cuts) - 1):
        at = np.zeros(len(offsets), np.int64)  # 1 + the edge by which the row in hand reaches a row; 0 for none
        for i in range(cuts[c], cuts[c + 1]):
            for e in range(offsets[i], offsets[i + 1]):
                at[rows[e]] = e + 1
            for e in range(offsets[i], offsets[i + 1]):
                j = rows[e]
                total = 0.0
                for f in range(offsets[j], offsets[j + 1]):
                    t = rows[f]
                    if t == i:
                        total += np.float64(own_here[i]) * target[f]
                    elif at[t] > 0:
                        total += np.float64(selected[at[t] - 1]) * target[f]
                total += np.float64(selected[e]) * own_there[j]
                out[e] = total
            for e in range(offsets[i], offsets[i + 1]):
                at[rows[e]] = 0
