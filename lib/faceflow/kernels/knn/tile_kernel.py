"""The tile kernel: exact similarities of (queries x members), pushed to both sides' top-k buffers. One per CPU core.

Why not faiss here: `IndexFlatIP.range_search` runs at the same speed (88 against 87 GFLOP/s for 2,000 x 500 x 256 on one
AVX-512 core) but returns every hit above one radius; pushing straight from the product lets each row's threshold rise to its
running k-th best and serves both ends of a pair at once, so memory does not follow the hits.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from faceflow.kernels.compiled import kernel
from faceflow.kernels.knn.topk import Buffers, key_of, push, similarity_of

QUERY_BLOCK = 256
"""Rows of one product: its float32 block with a typical cell's members stays in a core's L2 cache. Part of the result's
definition: BLAS may round differently for other shapes, so blocks depend on the data alone."""

MEMBER_BLOCK = 2048
CHUNK = 64


NO_LINK = np.uint64(0xFF800000_FFFFFFFF)
"""The key of similarity minus infinity: behind every other."""


@kernel(allocates=False)
def _link(links: np.ndarray, i: int, key: np.uint64) -> np.float32:
    # Insert into a short ascending list, the last one falls out; the similarity below which none enters any more.
    at = links.shape[1] - 1
    if key < links[i, at]:
        while at > 0 and links[i, at - 1] > key:
            links[i, at] = links[i, at - 1]
            at -= 1
        links[i, at] = key
    return similarity_of(links[i, links.shape[1] - 1])


class Block(NamedTuple):
    """A product of queries and members: similarities float32[q, m], and their bits; first: the pairs j <= i + first are left
    out (the lower triangle of a tile with itself), -q - 1 for none; slots, rows: of the queries and of the members."""

    product: np.ndarray
    bits: np.ndarray
    first: int
    q_slots: np.ndarray
    q_rows: np.ndarray
    m_slots: np.ndarray
    m_rows: np.ndarray


class Taken(NamedTuple):
    """Which pairs the member's own tiles find: lines[line_of[c], u] says whether member u probes cell c, the one that a query
    is assigned to (int32[q]); line 0 is for cells that no member probes."""

    q_cells: np.ndarray
    line_of: np.ndarray
    lines: np.ndarray


class Links(NamedTuple):
    """Each query's nearest members so far, uint64[q, t], as keys of similarity and first + j, ascending. Which they are must
    not depend on what else the query finds, so they have a threshold of their own, or the last link."""

    keys: np.ndarray
    first: int
    threshold: np.float32


NO_LINKS = Links(np.empty((QUERY_BLOCK, 0), np.uint64), 0, np.float32(np.inf))


@kernel(allocates=False)
def _push_block(
    block: Block, taken: Taken, links: Links, buffers: Buffers, m_thresholds: np.ndarray, hits: np.ndarray
) -> None:  # fmt: skip
    # m_thresholds, hits: scratch of one entry a member, and one more.
    product, bits, first, q_slots, q_rows, m_slots, m_rows = block
    thresholds, link_keys, link_threshold = buffers.thresholds, links.keys, links.threshold
    n, m = product.shape
    wanted = link_keys.shape[1]
    for j in range(m):
        m_thresholds[j] = thresholds[m_slots[j]]
    for i in range(n):
        slot = q_slots[i]
        threshold = thresholds[slot]
        linked = link_threshold
        if wanted > 0:
            linked = max(linked, similarity_of(link_keys[i, wanted - 1]))
        lowest = min(threshold, linked)
        # Most chunks hold no hit, and the first loop is nearly all the work for them: it vectorises, as unsigned indices cannot
        # be meant from the end. Where there are hits, their places are collected without a branch to guess wrong.
        results = 0
        row = product[i]
        for begin in range(max(0, i + first + 1), m, CHUNK):
            start, end = np.uint64(begin), np.uint64(min(begin + CHUNK, m))
            near = np.int32(0)
            for u in range(start, end):
                near += np.int32(row[u] >= min(lowest, m_thresholds[u]))
            if near:
                for u in range(start, end):
                    hits[results] = u
                    results += int(row[u] >= min(lowest, m_thresholds[u]))
        line = taken.lines[taken.line_of[taken.q_cells[i]]]
        for h in range(results):
            u = hits[h]
            s = row[u]
            if s >= linked:
                linked = max(link_threshold, _link(link_keys, i, key_of(bits[i, u], np.int32(links.first + u))))
            if s >= threshold:
                push(buffers, slot, key_of(bits[i, u], m_rows[u]))
                threshold = thresholds[slot]
            if s >= m_thresholds[u] and not line[u]:
                push(buffers, m_slots[u], key_of(bits[i, u], q_rows[i]))
                m_thresholds[u] = thresholds[m_slots[u]]


@kernel
def _list_cells(offsets: np.ndarray, cells: np.ndarray, faces: np.ndarray, line_of: np.ndarray) -> int:
    lines = 1
    for i in faces:
        for p in range(offsets[i], offsets[i + 1]):
            if line_of[cells[p]] == 0:
                line_of[cells[p]] = lines
                lines += 1
    return lines


@kernel
def _mark_cells(offsets: np.ndarray, cells: np.ndarray, faces: np.ndarray, line_of: np.ndarray, lines: np.ndarray) -> None:
    lines[:] = False
    for u in range(len(faces)):
        for p in range(offsets[faces[u]], offsets[faces[u] + 1]):
            lines[line_of[cells[p]], u] = True


@kernel
def _unlist_cells(offsets: np.ndarray, cells: np.ndarray, faces: np.ndarray, line_of: np.ndarray) -> None:
    for i in faces:
        for p in range(offsets[i], offsets[i + 1]):
            line_of[cells[p]] = 0


class TileKernel:
    """Runs tiles against one set of buffers; holds the scratch memory of one worker.

    vectors: float32[n, d], unit rows, C-contiguous; rows: int32[n], their global rows. Positions, from here on, are
    indices into both and into the buffers.
    probes: (offsets int64[n + 1], cells int32[...]), the cells each face probes, its assigned cell first. With it, a pair is
    not given to its member when the member probes the query's assigned cell: that tile finds the pair from the member's
    side, and no pair may be found twice.
    """

    def __init__(
        self, vectors: np.ndarray, rows: np.ndarray, buffers: Buffers, probes: tuple[np.ndarray, np.ndarray] | None = None
    ) -> None:
        self.vectors, self.rows, self.buffers = vectors, rows, buffers
        if probes is None:
            probes = np.zeros(len(rows) + 1, np.int64), np.empty(0, np.int32)
            self._assigned = np.zeros(len(rows), np.int32)
        else:
            self._assigned = probes[1][probes[0][:-1]]
        self._probes = probes
        self._line_of = np.zeros(int(probes[1].max(initial=0)) + 1, np.int32)
        self._none_taken = Taken(np.zeros(QUERY_BLOCK, np.int32), np.zeros(1, np.int32), np.zeros((1, MEMBER_BLOCK), np.bool_))
        self._product = np.empty(QUERY_BLOCK * MEMBER_BLOCK, np.float32)
        self._queries = np.empty((QUERY_BLOCK, vectors.shape[1]), np.float32)
        self._thresholds = np.empty(MEMBER_BLOCK, np.float32)
        self._hits = np.empty(MEMBER_BLOCK + 1, np.int32)

    def _block(
        self, queries: np.ndarray, members: np.ndarray, first: int, q: np.ndarray, m: np.ndarray, taken: Taken,
        links: Links = NO_LINKS,
    ) -> None:  # fmt: skip
        product = self._product[: len(queries) * len(members)].reshape(len(queries), len(members))
        np.matmul(queries, members.T, out=product)
        block = Block(product, product.view(np.uint32), first, q, self.rows[q], m, self.rows[m])
        _push_block(block, taken, links, self.buffers, self._thresholds, self._hits)

    def within(self, positions: np.ndarray, vectors: np.ndarray) -> None:
        """All pairs among `positions` (intp[m]), faces of one cell; `vectors` are theirs, gathered, float32[m, d]."""
        n = len(positions)
        for i in range(0, n, QUERY_BLOCK):
            q = positions[i : i + QUERY_BLOCK]
            for j in range(i, n, MEMBER_BLOCK):
                m = positions[j : j + MEMBER_BLOCK]
                self._block(vectors[i : i + QUERY_BLOCK], vectors[j : j + MEMBER_BLOCK], i - j, q, m, self._none_taken)

    def across(self, queries: np.ndarray, members: np.ndarray, member_vectors: np.ndarray) -> None:
        """All pairs (queries x members), two sets of positions without a common one, that no other tile finds."""
        for j in range(0, len(members), MEMBER_BLOCK):
            m = members[j : j + MEMBER_BLOCK]
            for i in range(0, len(queries), QUERY_BLOCK):
                q = queries[i : i + QUERY_BLOCK]
                block = np.take(self.vectors, q, axis=0, out=self._queries[: len(q)], mode="clip")
                self._block(block, member_vectors[j : j + MEMBER_BLOCK], -QUERY_BLOCK - 1, q, m, self._none_taken)

    def between(
        self, queries: np.ndarray, members: np.ndarray, member_vectors: np.ndarray, links: np.ndarray | None = None,
        threshold: float = np.inf,
    ) -> None:  # fmt: skip
        """All pairs (queries x members), two sets of positions without a common one; each pair serves both ends.

        links: if given, uint64[len(queries), t], receives each query's t nearest members of similarity `threshold` at least, as
        `topk` keys of similarity and index into `members`, ascending; NO_LINK where there are fewer.
        """
        if links is None:
            links = np.empty((len(queries), 0), np.uint64)
        links.fill(NO_LINK)
        count = _list_cells(*self._probes, members, self._line_of)
        for j in range(0, len(members), MEMBER_BLOCK):
            m = members[j : j + MEMBER_BLOCK]
            lines = np.empty((count, len(m)), np.bool_)
            _mark_cells(*self._probes, m, self._line_of, lines)
            for i in range(0, len(queries), QUERY_BLOCK):
                q = queries[i : i + QUERY_BLOCK]
                block = np.take(self.vectors, q, axis=0, out=self._queries[: len(q)], mode="clip")
                self._block(
                    block, member_vectors[j : j + MEMBER_BLOCK], -QUERY_BLOCK - 1, q, m,
                    Taken(self._assigned[q], self._line_of, lines),
                    Links(links[i : i + QUERY_BLOCK], j, np.float32(threshold)),
                )  # fmt: skip
        _unlist_cells(*self._probes, members, self._line_of)


def measure_flops(dim: int) -> float:
    """Floating-point operations a second of tiles of dimension `dim` on this core, from about 0.1 s of them."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((4 * QUERY_BLOCK, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kernel = TileKernel(vectors, np.arange(len(vectors), dtype=np.int32), Buffers.empty(len(vectors), 8, 0.9))
    queries, members = np.arange(2 * QUERY_BLOCK), np.arange(2 * QUERY_BLOCK, 4 * QUERY_BLOCK)
    kernel.between(queries, members, vectors[members])  # compiles and warms up
    begun, rounds = time.perf_counter(), 0
    while time.perf_counter() - begun < 0.1:
        kernel.between(queries, members, vectors[members])
        rounds += 1
    return rounds * 2.0 * dim * len(queries) * len(members) / (time.perf_counter() - begun)
