"""The tile kernel: exact similarities of (queries x members), pushed to both sides' top-k buffers. One per CPU core.

Why not faiss here: `IndexFlatIP.range_search` runs at the same speed (88 against 87 GFLOP/s for 2,000 x 500 x 256 on one
AVX-512 core) but returns every hit above one radius; pushing straight from the product lets each row's floor rise to its
running k-th best and serves both ends of a pair at once, so memory does not follow the hits.
"""

from __future__ import annotations

import time

import numba
import numpy as np

from faceflow.kernels.topk import Buffers, key_of, push

QUERY_BLOCK = 256
"""Rows of one product: its float32 block with a typical cell's members stays in a core's L2 cache. Part of the result's
definition: BLAS may round differently for other shapes, so blocks depend on the data alone."""

MEMBER_BLOCK = 2048
CHUNK = 64


@numba.njit(cache=True, nogil=True)
def _push_block(
    product: np.ndarray,
    bits: np.ndarray,
    first: int,
    q_slots: np.ndarray,
    q_rows: np.ndarray,
    q_homes: np.ndarray,
    m_slots: np.ndarray,
    m_rows: np.ndarray,
    probe_offsets: np.ndarray,
    probe_cells: np.ndarray,
    m_floors: np.ndarray,
    keys: np.ndarray,
    counts: np.ndarray,
    floors: np.ndarray,
    k: int,
) -> None:
    # first: the pairs j <= i + first are left out (the lower triangle of a tile with itself); -len(queries) for none.
    n, m = product.shape
    for j in range(m):
        m_floors[j] = floors[m_slots[j]]
    for i in range(n):
        slot = q_slots[i]
        floor = floors[slot]
        j = max(0, i + first + 1)
        while j < m:
            # Almost every chunk holds no hit: this test is nearly all the work, and over slices it vectorises (measured:
            # 9.7 elements a nanosecond, 0.6 with indices into the whole block).
            chunk = product[i, j : j + CHUNK]
            theirs = m_floors[j : min(j + CHUNK, m)]
            hits = 0
            for u in range(len(chunk)):
                hits += int(chunk[u] >= min(floor, theirs[u]))
            if hits:
                for u in range(j, j + len(chunk)):
                    s = product[i, u]
                    if s >= floor:
                        push(keys, counts, floors, k, slot, key_of(bits[i, u], m_rows[u]))
                        floor = floors[slot]
                    if s >= m_floors[u]:
                        seen = False
                        for p in range(probe_offsets[m_slots[u]], probe_offsets[m_slots[u] + 1]):
                            seen |= probe_cells[p] == q_homes[i]
                        if not seen:
                            push(keys, counts, floors, k, m_slots[u], key_of(bits[i, u], q_rows[i]))
                            m_floors[u] = floors[m_slots[u]]
            j += CHUNK


class TileKernel:
    """Runs tiles against one set of buffers; holds the scratch memory of one worker.

    vectors: float32[n, d], unit rows, C-contiguous; rows: int32[n], their global rows. Positions, from here on, are
    indices into both and into the buffers.
    probes: (offsets int64[n + 1], cells int32[...]), the cells each face probes, its home cell first. With it, a pair is
    not given to its member when the member probes the query's home cell: that tile finds the pair from the member's
    side, and no pair may be found twice.
    """

    def __init__(
        self, vectors: np.ndarray, rows: np.ndarray, buffers: Buffers, probes: tuple[np.ndarray, np.ndarray] | None = None
    ) -> None:
        self.vectors, self.rows, self.buffers = vectors, rows, buffers
        if probes is None:
            self._probes = np.zeros(len(rows) + 1, np.int64), np.empty(0, np.int32)
            self._homes = np.full(len(rows), -1, np.int32)
        else:
            self._probes = probes
            self._homes = probes[1][probes[0][:-1]]
        self._product = np.empty(QUERY_BLOCK * MEMBER_BLOCK, np.float32)
        self._queries = np.empty((QUERY_BLOCK, vectors.shape[1]), np.float32)
        self._floors = np.empty(MEMBER_BLOCK, np.float32)

    def _block(
        self, queries: np.ndarray, members: np.ndarray, first: int, q: np.ndarray, m: np.ndarray, homes: np.ndarray
    ) -> None:
        product = self._product[: len(queries) * len(members)].reshape(len(queries), len(members))
        np.matmul(queries, members.T, out=product)
        b = self.buffers
        _push_block(
            product, product.view(np.uint32), first, q, self.rows[q], homes, m, self.rows[m], *self._probes,
            self._floors, b.keys, b.counts, b.floors, b.k,
        )  # fmt: skip

    def within(self, positions: np.ndarray, vectors: np.ndarray) -> None:
        """All pairs among `positions` (intp[m]), faces of one cell; `vectors` are theirs, gathered, float32[m, d]."""
        n = len(positions)
        nowhere = np.full(QUERY_BLOCK, -1, np.int32)  # each pair comes up once here: both ends keep it
        for i in range(0, n, QUERY_BLOCK):
            q = positions[i : i + QUERY_BLOCK]
            for j in range(i, n, MEMBER_BLOCK):
                m = positions[j : j + MEMBER_BLOCK]
                self._block(vectors[i : i + QUERY_BLOCK], vectors[j : j + MEMBER_BLOCK], i - j, q, m, nowhere)

    def between(self, queries: np.ndarray, members: np.ndarray, member_vectors: np.ndarray) -> None:
        """All pairs (queries x members), two sets of positions without a common one; each pair serves both ends."""
        for i in range(0, len(queries), QUERY_BLOCK):
            q = queries[i : i + QUERY_BLOCK]
            block = np.take(self.vectors, q, axis=0, out=self._queries[: len(q)], mode="clip")
            for j in range(0, len(members), MEMBER_BLOCK):
                m = members[j : j + MEMBER_BLOCK]
                self._block(block, member_vectors[j : j + MEMBER_BLOCK], -QUERY_BLOCK - 1, q, m, self._homes[q])


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
