"""Pairs of visitors of one cell: two faces that both probe a cell, and resemble the same member of it, are compared too.

A tile compares a face with the members of a cell, so two faces of one person that live in cells of their own would only meet
if one probed the other's. But both know the person's home: whoever they both resemble there introduces them. (The idea of
neighbor exploring: Dong, Moses & Li, "Efficient k-nearest neighbor graph construction for generic similarity measures",
WWW 2011.) Measured on 1M synthetic faces, 2,000 cells: for an edge recall of .997 a face probes 3.1 cells instead of 8.2.
"""

from __future__ import annotations

import numba
import numpy as np

from faceflow.kernels.knn.tiles import NO_LINK
from faceflow.kernels.knn.topk import Buffers, key_of, push_new, select_smallest

LINKS = 3
"""Members, the most similar ones, through which a visitor meets others."""

MOST_MET = 32
"""Visitors, the most similar ones, that a member introduces: bounds the work where one face resembles thousands."""

LANES = 16


def join_visitors(
    vectors: np.ndarray,
    rows: np.ndarray,
    buffers: Buffers,
    probes: tuple[np.ndarray, np.ndarray],
    visitors: np.ndarray,
    links: np.ndarray,
    members: int,
) -> None:
    """Compare visitors of one cell that share a link, and push what is above both ends' thresholds.

    vectors, rows, buffers, probes: as `tiles.TileKernel`; visitors: intp[v], ascending positions; links: uint64[v, LINKS], as
    `TileKernel.between` gives them for the cell's `members` members. Pairs that a tile finds, as one probes the other's home,
    are left out. A pair may meet in several cells: its similarity is the same to the bit there, whatever the machine, and a
    buffer takes it once.
    """
    counts = np.zeros(members + 1, np.int64)
    lists = _lists(links, counts)
    s = np.empty(1, np.float32)
    _join(
        vectors, rows, *probes, visitors, links, counts, lists, np.full(len(visitors), -1, np.int32),
        buffers.keys, buffers.counts, buffers.thresholds, buffers.k, np.empty(LANES, np.float32), s, s.view(np.uint32),
    )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def _lists(links: np.ndarray, begin: np.ndarray) -> np.ndarray:
    # Per member the visitors that link to it, as keys of similarity and visitor, at most MOST_MET of them; begin[m] is where
    # member m's end, and begin[m - 1] where they start.
    members = len(begin) - 1
    sizes = np.zeros(members + 1, np.int64)
    for i in range(links.shape[0]):
        for t in range(links.shape[1]):
            if links[i, t] != NO_LINK:
                sizes[np.int64(links[i, t] & np.uint64(0xFFFFFFFF)) + 1] += 1
    for m in range(members):
        sizes[m + 1] += sizes[m]
    every = np.empty(sizes[members], np.uint64)
    cursor = sizes[:-1].copy()
    for i in range(links.shape[0]):
        for t in range(links.shape[1]):
            if links[i, t] != NO_LINK:
                at = np.int64(links[i, t] & np.uint64(0xFFFFFFFF))
                every[cursor[at]] = (links[i, t] & np.uint64(0xFFFFFFFF00000000)) | np.uint64(i)
                cursor[at] += 1
    kept = 0
    for m in range(members):
        results = sizes[m + 1] - sizes[m]
        n = min(results, MOST_MET)
        if n < results:
            select_smallest(every, sizes[m], results, n)
        for j in range(n):
            every[kept + j] = every[sizes[m] + j]
        kept += n
        begin[m + 1] = kept
    return every[:kept]


@numba.njit(cache=True, nogil=True, _nrt=False)
def _probes(offsets: np.ndarray, cells: np.ndarray, face: int, cell: int) -> bool:
    results = False
    for p in range(offsets[face], offsets[face + 1]):
        results |= cells[p] == cell
    return results


@numba.njit(cache=True, nogil=True, _nrt=False)
def _dot(vectors: np.ndarray, a: int, b: int, lanes: np.ndarray) -> np.float32:
    # A fixed order of additions: the same bits on every machine.
    dim = vectors.shape[1]
    whole = dim // LANES * LANES
    for u in range(LANES):
        lanes[u] = np.float32(0)
    for begin in range(0, whole, LANES):
        for u in range(LANES):
            lanes[u] += vectors[a, begin + u] * vectors[b, begin + u]
    total = np.float32(0)
    for j in range(whole, dim):
        total += vectors[a, j] * vectors[b, j]
    for u in range(LANES):
        total += lanes[u]
    return total


@numba.njit(cache=True, nogil=True, _nrt=False)
def _join(
    vectors: np.ndarray, rows: np.ndarray, offsets: np.ndarray, cells: np.ndarray, visitors: np.ndarray, links: np.ndarray,
    begin: np.ndarray, lists: np.ndarray, seen: np.ndarray,
    keys: np.ndarray, counts: np.ndarray, thresholds: np.ndarray, k: int, lanes: np.ndarray, s: np.ndarray, bits: np.ndarray,
) -> None:  # fmt: skip
    for i in range(len(visitors)):
        a = visitors[i]
        home = cells[offsets[a]]
        for t in range(links.shape[1]):
            if links[i, t] == NO_LINK:
                break
            m = np.int64(links[i, t] & np.uint64(0xFFFFFFFF))
            for e in range(begin[m], begin[m + 1]):
                j = np.int64(lists[e] & np.uint64(0xFFFFFFFF))
                if j <= i or seen[j] == i:
                    continue
                seen[j] = i
                b = visitors[j]
                if _probes(offsets, cells, a, cells[offsets[b]]) or _probes(offsets, cells, b, home):
                    continue
                s[0] = _dot(vectors, a, b, lanes)
                if s[0] >= thresholds[a]:
                    push_new(keys, counts, thresholds, k, a, key_of(bits[0], rows[b]))
                if s[0] >= thresholds[b]:
                    push_new(keys, counts, thresholds, k, b, key_of(bits[0], rows[a]))
