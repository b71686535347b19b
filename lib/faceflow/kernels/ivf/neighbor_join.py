"""The neighbor join: two faces that both probe a cell and share a near member there are compared too.

A tile compares a face with the members of a cell, so two faces of one person that are assigned to other cells would only be
compared if one probed the other's. But both probe the cell where most of that person's faces are: a common neighbor there
proposes the pair. (The idea of neighbor exploring: Dong, Moses & Li, "Efficient k-nearest neighbor graph construction for
generic similarity measures", WWW 2011.) Measured on 1M synthetic faces, 2,000 cells: for an edge recall of .997 a face probes
3.1 cells instead of 8.2.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from faceflow.kernels.compiled import kernel
from faceflow.kernels.knn.tile_kernel import NO_LINK
from faceflow.kernels.knn.topk import Buffers, key_of, push_new, select_smallest

LINKS = 3
"""Members, the most similar ones, that propose pairs for a probing face."""

MOST_MET = 32
"""Probing faces, the most similar ones, that a member proposes pairs of: bounds the work where one face resembles thousands."""

LANES = 16


class Faces(NamedTuple):
    """Faces of one shard, by position: unit vectors float32[n, d], rows int32[n], and the cells that each probes, its assigned
    cell first (offsets int64[n + 1], cells int32[...])."""

    vectors: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray
    cells: np.ndarray


class Proposals(NamedTuple):
    """Who may be paired. probing: intp[p], positions of the faces that probe the cell; links: uint64[p, LINKS], their nearest
    members; lists: uint64[...], of each member m the probing faces that link to it, from begin[m] to begin[m + 1]; seen:
    int32[p], the last face that each was compared with."""

    probing: np.ndarray
    links: np.ndarray
    begin: np.ndarray
    lists: np.ndarray
    seen: np.ndarray


def join_neighbors(faces: Faces, buffers: Buffers, probing: np.ndarray, links: np.ndarray, members: int) -> None:
    """Compare the faces that probe one cell and share a link, and push what is above both ends' thresholds.

    faces, buffers: as `tile_kernel.TileKernel`; probing: intp[p], ascending positions; links: uint64[p, LINKS], as
    `TileKernel.between` gives them for the cell's `members` members. Pairs that a tile finds, as one probes the other's
    assigned cell, are left out. A pair may be proposed in several cells: its similarity is the same to the bit there, whatever
    the machine, and a buffer takes it once.
    """
    begin = np.zeros(members + 1, np.int64)
    lists = _lists(links, begin)
    s = np.empty(1, np.float32)
    proposals = Proposals(probing, links, begin, lists, np.full(len(probing), -1, np.int32))
    _join(faces, proposals, buffers, np.empty(LANES, np.float32), s, s.view(np.uint32))


@kernel
def _lists(links: np.ndarray, begin: np.ndarray) -> np.ndarray:
    # Per member the probing faces that link to it, as keys of similarity and face, at most MOST_MET of them; begin[m] is where
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


@kernel(allocates=False)
def _probes(offsets: np.ndarray, cells: np.ndarray, face: int, cell: int) -> bool:
    results = False
    for p in range(offsets[face], offsets[face + 1]):
        results |= cells[p] == cell
    return results


@kernel(allocates=False)
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


@kernel(allocates=False)
def _join(
    faces: Faces, proposals: Proposals, buffers: Buffers, lanes: np.ndarray, s: np.ndarray, bits: np.ndarray
) -> None:  # fmt: skip
    # lanes, s, bits: scratch; bits are those of s.
    vectors, rows, offsets, cells = faces
    probing, links, begin, lists, seen = proposals
    thresholds = buffers.thresholds
    for i in range(len(probing)):
        a = probing[i]
        assigned = cells[offsets[a]]
        for t in range(links.shape[1]):
            if links[i, t] == NO_LINK:
                break
            m = np.int64(links[i, t] & np.uint64(0xFFFFFFFF))
            for e in range(begin[m], begin[m + 1]):
                j = np.int64(lists[e] & np.uint64(0xFFFFFFFF))
                if j <= i or seen[j] == i:
                    continue
                seen[j] = i
                b = probing[j]
                if _probes(offsets, cells, a, cells[offsets[b]]) or _probes(offsets, cells, b, assigned):
                    continue
                s[0] = _dot(vectors, a, b, lanes)
                if s[0] >= thresholds[a]:
                    push_new(buffers, a, key_of(bits[0], rows[b]))
                if s[0] >= thresholds[b]:
                    push_new(buffers, b, key_of(bits[0], rows[a]))
