"""The same searches on one GPU, by faiss's flat GPU index; needs the `gpu` extra. No symmetric trick: a GPU returns each
query's k best, so of every two sets each is searched among the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import faiss
import numpy as np

from faceflow.errors import SettingsError
from faceflow.kernels.ivf.neighbor_join import LINKS, Faces, join_neighbors
from faceflow.kernels.knn.tile_kernel import NO_LINK
from faceflow.kernels.knn.tile_search import Probes, by_cell
from faceflow.kernels.knn.topk import Buffers, encode

QUERY_BATCH = 262_144
"""Queries handed over at once: faiss itself pages them through pinned memory, copying one page while it searches another."""

ROW = np.uint64(0xFFFFFFFF)
"""The half of a key (`topk.encode`) that holds the row."""

MAX_NEIGHBORS = 2047
"""faiss's GPU selection holds 2048 results; one of them is the face itself."""


def check_device() -> None:
    """Run a real kernel, so that a missing driver or a wrong wheel is known before any work.

    Raises SettingsError with the cause.
    """
    if not hasattr(faiss, "StandardGpuResources"):
        raise SettingsError(
            "gpus_per_worker is above 0, but this faiss has no GPU support: install the 'gpu' extra, and no faiss-cpu beside it"
        )
    try:
        unit = np.eye(4, 8, dtype=np.float32)
        similarities, results = faiss.knn_gpu(faiss.StandardGpuResources(), unit, unit, 1, metric=faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise SettingsError(f"gpus_per_worker is above 0, but the GPU does not work: {str(error).splitlines()[0]}") from None
    if not (np.array_equal(results[:, 0], np.arange(4)) and np.allclose(similarities, 1)):
        raise SettingsError("gpus_per_worker is above 0, but the GPU returned a wrong product: check driver and wheel")


@functools.lru_cache(maxsize=1)
def _resources() -> Any:
    """One set a process: each reserves memory of the GPU (1.5 GiB by default) and streams, and must outlive its indexes."""
    return faiss.StandardGpuResources()


class _GpuIndex:
    def __init__(self, members: np.ndarray, rows: np.ndarray, k: int, threshold: float | None, float16: bool) -> None:
        config = faiss.GpuIndexFlatConfig()
        config.useFloat16 = float16
        self._index = faiss.GpuIndexFlatIP(_resources(), members.shape[1], config)
        self._index.add(members)
        self._rows, self._k = rows, min(k + 1, len(members))
        self._threshold = np.float32(-np.inf if threshold is None else threshold)

    def search(self, queries: np.ndarray, query_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(query positions int64[m], keys uint64[m]) of the hits above the threshold, the query itself left out."""
        positions, keys = [], []
        for begin in range(0, len(queries), QUERY_BATCH):
            batch = slice(begin, begin + QUERY_BATCH)
            similarities, results = self._index.search(queries[batch], self._k)
            neighbor = self._rows[results]
            good = (results >= 0) & (similarities >= self._threshold) & (neighbor != query_rows[batch, None])
            positions.append(np.nonzero(good)[0] + begin)
            keys.append(encode(similarities[good], neighbor[good]))
        return np.concatenate(positions), np.concatenate(keys)


def _offsets(positions: np.ndarray, n: int) -> np.ndarray:
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(positions, minlength=n), out=offsets[1:])
    return offsets


def search_blocks(
    members: np.ndarray,
    first_row: int,
    others: Iterable[tuple[int, np.ndarray]],
    k: int,
    threshold: float | None,
    take: Callable[[int, np.ndarray, np.ndarray], None],
    float16: bool = False,
) -> None:
    """As `kernels.knn.tile_search.search_blocks`, but each block of `others` and `members` itself only receive `members`."""
    index = _GpuIndex(members, np.arange(first_row, first_row + len(members), dtype=np.int32), k, threshold, float16)
    for row, queries in [(first_row, members), *others]:
        positions, keys = index.search(queries, np.arange(row, row + len(queries), dtype=np.int32))
        take(row, _offsets(positions, len(queries)), keys)


def search_cells(
    vectors: np.ndarray, rows: np.ndarray, probes: Probes, cells: range, k: int, threshold: float | None, float16: bool = False
) -> Buffers:
    """As `kernels.knn.tile_search.search_cells`: members and probing faces are searched among the members, and members among
    the probing faces, as a pair serves both ends; the neighbor join runs on the CPU."""
    buffers = Buffers.empty(len(rows), k, threshold)
    assigned = probes[1][probes[0][:-1]]
    for members, probing in by_cell(probes, cells):
        queries = np.concatenate([members, probing])
        positions, keys = _GpuIndex(vectors[members], rows[members], k, threshold, float16).search(
            vectors[queries], rows[queries]
        )
        buffers.extend(queries, _offsets(positions, len(queries)), keys)
        if len(probing):
            index = _GpuIndex(vectors[probing], rows[probing], k, threshold, float16)
            back, back_keys = index.search(vectors[members], rows[members])
            face = np.searchsorted(rows[probing], (back_keys & ROW).astype(np.int64))
            # The tile of the probing face's assigned cell finds the pair where the member probes that: none is found twice.
            new = ~_probe(probes, members[back], assigned[probing[face]])
            buffers.extend(members, _offsets(back[new], len(members)), back_keys[new])
        if threshold is not None:
            links = _links(positions - len(members), keys, rows[members], len(probing))
            join_neighbors(Faces(vectors, rows, *probes), buffers, probing, links, len(members))
    return buffers


def _probe(probes: Probes, faces: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """bool[n]: whether faces[i] probes cells[i]."""
    offsets, flat = probes
    counts = (offsets[1:] - offsets[:-1])[faces]
    starts = np.concatenate([[0], np.cumsum(counts)])
    pair = np.repeat(np.arange(len(faces)), counts)
    probed = flat[offsets[faces][pair] + np.arange(starts[-1]) - starts[pair]]
    return np.bincount(pair[probed == cells[pair]], minlength=len(faces)) > 0


def _links(face: np.ndarray, keys: np.ndarray, member_rows: np.ndarray, faces: int) -> np.ndarray:
    """Each probing face's nearest members, as `tile_kernel.TileKernel.between` gives them; face < 0: a member."""
    face, keys = face[face >= 0], keys[face >= 0]
    order = np.lexsort((keys, face))
    face, keys = face[order], keys[order]
    rank = np.arange(len(face)) - np.searchsorted(face, face)
    links = np.full((faces, LINKS), NO_LINK)
    near = rank < LINKS
    member = np.searchsorted(member_rows, (keys[near] & ROW).astype(np.int64)).astype(np.uint64)
    links[face[near], rank[near]] = (keys[near] & np.uint64(0xFFFFFFFF00000000)) | member
    return links
