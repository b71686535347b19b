"""Exact top-k search over lists of tiles: one shard of the cells plan, one row of blocks of the exact plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from faceflow.kernels.compiled import kernel
from faceflow.kernels.ivf.neighbor_join import LINKS, Faces, join_neighbors
from faceflow.kernels.knn.tile_kernel import TileKernel
from faceflow.kernels.knn.topk import Buffers

Probes = tuple[np.ndarray, np.ndarray]
"""(offsets int64[n + 1], cells int32[...]): face i probes `cells[offsets[i]:offsets[i + 1]]`, its assigned cell first."""


def search_cells(
    vectors: np.ndarray,
    rows: np.ndarray,
    probes: Probes,
    cells: range,
    k: int,
    threshold: float | None,
    keys: np.ndarray | None = None,
) -> Buffers:
    """Search every cell of one shard: its members against each other and against the faces that probe it; with a threshold,
    those probing faces that share a near member against each other too (`kernels.ivf.neighbor_join`).

    vectors: float32[n, d], unit rows: every face that probes a cell of the shard; rows: int32[n], ascending; cells: the
    shard's; keys: memory for the buffers (`topk.Buffers.empty`). Returns buffers with one slot per face: its candidates among
    the faces it was compared with, in either direction.
    """
    buffers = Buffers.empty(len(rows), k, threshold, keys)
    kernel = TileKernel(vectors, rows, buffers, probes)
    for members, probing in by_cell(probes, cells):
        member_vectors = vectors[members]
        kernel.within(members, member_vectors)
        links = np.empty((len(probing), 0 if threshold is None else LINKS), np.uint64)
        kernel.between(probing, members, member_vectors, links, np.inf if threshold is None else threshold)
        if threshold is not None:
            join_neighbors(Faces(vectors, rows, *probes), buffers, probing, links, len(members))
    return buffers


def by_cell(probes: Probes, cells: range) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(members, probing) of each cell that has members: positions of the faces assigned to it and of the others that probe
    it."""
    for _, positions, assigned in probes_by_cell(probes, cells):
        if assigned.any():
            yield positions[assigned], positions[~assigned]


def probes_by_cell(probes: Probes, cells: range) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(cell, positions of the faces that probe it, ascending, which of them are assigned to it) of each cell that is probed."""
    bounds, positions, assigned = _sort_by_cell(*probes, cells.start, cells.stop)
    for cell, begin, end in zip(cells, bounds[:-1], bounds[1:], strict=True):
        if begin < end:
            yield cell, positions[begin:end], assigned[begin:end]


@kernel
def _sort_by_cell(offsets: np.ndarray, flat: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    bounds = np.zeros(stop - start + 1, np.int64)
    for e in range(offsets[0], offsets[-1]):
        if start <= flat[e] < stop:
            bounds[flat[e] - start + 1] += 1
    for c in range(len(bounds) - 1):
        bounds[c + 1] += bounds[c]
    cursor = bounds[:-1].copy()
    positions, assigned = np.empty(bounds[-1], np.int64), np.empty(bounds[-1], np.bool_)
    for i in range(len(offsets) - 1):
        for e in range(offsets[i], offsets[i + 1]):
            if start <= flat[e] < stop:
                at = cursor[flat[e] - start]
                positions[at], assigned[at] = i, e == offsets[i]
                cursor[flat[e] - start] = at + 1
    return bounds, positions, assigned


def ring(block: int, blocks: int) -> list[int]:
    """Blocks that `block` is compared with, itself first, so that over all blocks each pair of blocks comes up once."""
    half = (blocks - 1) // 2
    others = [(block + i) % blocks for i in range(1, half + 1)]
    if blocks % 2 == 0 and block < blocks // 2:
        others.append(block + blocks // 2)
    return [block, *others]


def search_blocks(
    members: np.ndarray,
    first_row: int,
    others: Iterable[tuple[int, np.ndarray]],
    k: int,
    threshold: float | None,
    take: Callable[[int, np.ndarray, np.ndarray], None],
) -> None:
    """Compare one block of faces with itself and with other blocks, each pair serving both ends.

    members: float32[m, d], unit rows, whose rows start at first_row; others: (first row, float32[q, d]) of further
    blocks, one at a time. take(first_row, offsets, keys) receives each block's candidates, `members`' own last.
    """
    m, dim = members.shape
    buffers = Buffers.empty(m, k, threshold)
    vectors, rows = members, np.arange(first_row, first_row + m, dtype=np.int32)
    selected = np.arange(m)
    TileKernel(vectors, rows, buffers).within(selected, members)
    for other_row, other in others:
        q = len(other)
        if len(vectors) < m + q:  # at most a few times: blocks are of about equal size
            buffers = buffers.resized(m + q)
            vectors = np.concatenate([members, np.empty((q, dim), np.float32)])
            rows = np.concatenate([rows[:m], np.empty(q, np.int32)])
        target = np.arange(m, m + q)
        buffers.clear(m, threshold)
        vectors[target], rows[target] = other, np.arange(other_row, other_row + q)
        TileKernel(vectors, rows, buffers).between(target, selected, members)
        take(other_row, *buffers.take(target))
    take(first_row, *buffers.take(selected))


def blocks_of(rows: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of the even cut of `rows` rows into blocks of at most `block_rows`."""
    count = -(-rows // block_rows)
    for i in range(count):
        yield rows * i // count, rows * (i + 1) // count
