"""Full search: each shard runs its tiles, of all pairs or of the cells, and writes candidates for every part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from faceflow.cluster.executor import Resources
from faceflow.errors import SettingsError
from faceflow.kernels.knn import scratch, topk
from faceflow.kernels.knn import tile_search as cpu
from faceflow.stages.artifacts.candidates import candidates_batch, gather, read_candidates, that_probe, write_candidates
from faceflow.stages.artifacts.faces import RunData, read_quantizer, read_vectors
from faceflow.stages.base import Context
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.tables import CANDIDATES_SCHEMA, Parts

EXACT_BLOCKS = 16
SMALLEST_BLOCK, LARGEST_BLOCK = 1_024, 65_536
"""Faces of one block of the exact plan: about EXACT_BLOCKS shards, within what a product and its buffers may weigh."""

Block = tuple[int, int, int]
"""(part, first row within it, end) of one block of the exact plan."""


@dataclass(frozen=True)
class Limits:
    """What a search keeps and where it runs. neighbors: of a face, at most; threshold: least similarity (None: none)."""

    neighbors: int
    threshold: float | None
    on_gpu: bool = False
    float16: bool = False

    @classmethod
    def of(cls, context: Context) -> Limits:
        config = context.config
        support = context.results.quantize.threshold.support
        return cls(config.neighbors, support, config.gpus_per_worker > 0, config.gpu_float16)


def search(context: Context) -> int:
    """Search every shard; returns the number of candidate files."""
    config, data, limits = context.config, context.data, Limits.of(context)
    resources = Resources(gpus=config.gpus_per_worker, custom=config.search_resource)
    if limits.on_gpu:
        context.executor.call(check_gpu, limits.neighbors, "gpu", resources=resources)
    cells = context.results.quantize.cells
    if cells is None:
        blocks = exact_blocks(data.parts)
        context.executor.map(
            search_exact_shard,
            [SearchExactShard(data, limits, tuple(blocks), shard) for shard in range(len(blocks))],
            "search",
            sizes=[end - begin for _, begin, end in blocks],
            resources=resources,
        )
        return len(blocks)
    context.executor.map(
        search_cells_shard,
        [SearchCellsShard(data, limits, shard) for shard in range(cells.shards)],
        "search",
        resources=resources,
        smaller=in_smaller_steps,
    )
    return cells.shards


def check_gpu(neighbors: int) -> None:
    """Raise SettingsError where this worker has no GPU, or one that cannot keep so many neighbors."""
    from faceflow.kernels.knn import gpu_search

    gpu_search.check_device()
    if neighbors > gpu_search.MAX_NEIGHBORS:
        raise SettingsError(f"neighbors is {neighbors}: a GPU search keeps at most {gpu_search.MAX_NEIGHBORS}")


def exact_blocks(parts: Parts) -> list[Block]:
    """The cut of all rows into blocks of about equal size that do not straddle parts; depends on the parts alone."""
    wanted = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, -(-parts.faces // EXACT_BLOCKS)))
    return [(part, *block) for part in range(len(parts)) for block in cpu.blocks_of(parts.rows(part), wanted)]


@dataclass(frozen=True)
class SearchExactShard:
    """Request: one block of the exact plan against those that the ring gives it."""

    data: RunData
    limits: Limits
    blocks: tuple[Block, ...]
    shard: int


def search_exact_shard(request: SearchExactShard) -> None:
    """Compare one block with the blocks that the ring gives it, and write the candidates of every part."""
    data, limits, blocks, shard = request.data, request.limits, request.blocks, request.shard
    parts = data.parts
    if is_whole(data.store, layout.candidates(shard)):
        return

    def load(block: Block) -> tuple[int, np.ndarray]:
        part, begin, end = block
        return parts.starts[part] + begin, np.ascontiguousarray(read_vectors(data.store, part, data.dim)[begin:end])

    lists: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}

    def take(first_row: int, offsets: np.ndarray, keys: np.ndarray) -> None:
        part = int(np.searchsorted(parts.starts, first_row, side="right")) - 1
        lists.setdefault(part, []).append((first_row - parts.starts[part], offsets, keys))

    first_row, members = load(blocks[shard])
    if limits.on_gpu:
        from faceflow.kernels.knn import gpu_search

        others = [b for b in range(len(blocks)) if b != shard]
        gpu_search.search_blocks(
            members, first_row, (load(blocks[b]) for b in others), limits.neighbors, limits.threshold, take, limits.float16
        )
    else:
        others = cpu.ring(shard, len(blocks))[1:]
        cpu.search_blocks(
            members, first_row, (load(blocks[b]) for b in others), limits.neighbors, limits.threshold, take
        )  # fmt: skip

    def batches() -> Iterator[pa.RecordBatch]:
        for part in range(len(parts)):
            mine = sorted(lists.pop(part, []), key=lambda item: item[0])
            rows = [np.arange(first, first + len(offsets) - 1) for first, offsets, _ in mine]
            counts = [np.diff(offsets) for _, offsets, _ in mine]
            offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.empty(0, np.int64), *counts]))])
            keys = np.concatenate([np.empty(0, np.uint64), *(keys for _, _, keys in mine)])
            yield candidates_batch(np.concatenate([np.empty(0, np.int64), *rows]), offsets, keys)

    data.store.write_arrow(layout.candidates(shard), CANDIDATES_SCHEMA, batches())


@dataclass(frozen=True)
class SearchCellsShard:
    """Request: one shard of the cells plan; its cells one after the other in `steps` groups, of which only one is in memory."""

    data: RunData
    limits: Limits
    shard: int
    steps: int = 1


def in_smaller_steps(request: SearchCellsShard) -> SearchCellsShard:
    """The same shard in twice as many steps."""
    return replace(request, steps=2 * request.steps)


def search_cells_shard(request: SearchCellsShard) -> None:
    """Search one shard and write the candidates of every part."""
    data, shard = request.data, request.shard
    run, parts = data.store, data.parts
    name = layout.candidates(shard)
    if is_whole(run, name):
        return
    starts = read_quantizer(run, data.dim)[1]
    begin, end = int(starts[shard]), int(starts[shard + 1])
    steps = min(request.steps, end - begin)
    if steps == 1:
        _search_cells(request, range(begin, end), name)
        return
    files = [layout.candidates_step(shard, steps, step) for step in range(steps)]
    for step, path in enumerate(files):
        span = range(begin + (end - begin) * step // steps, begin + (end - begin) * (step + 1) // steps)
        if not is_whole(run, path):
            _search_cells(request, span, path)

    def batches() -> Iterator[pa.RecordBatch]:
        for part in range(len(parts)):
            lists = read_candidates(run, files, part)
            offsets, rows, similarities = topk.merge(lists, parts.rows(part), request.limits.neighbors)
            filled = np.flatnonzero(np.diff(offsets))
            yield candidates_batch(filled, np.append(offsets[filled], offsets[-1]), topk.encode(similarities, rows))

    run.write_arrow(name, CANDIDATES_SCHEMA, batches())
    for path in files:
        run.delete(path)


def _search_cells(request: SearchCellsShard, cells: range, name: str) -> None:
    """Gather the faces that probe these cells of a shard, search them, and write the candidates of every part."""
    data, limits = request.data, request.limits
    batches = [
        that_probe(data.store.read_batch(layout.part("probed_cells", part), request.shard), cells)
        for part in range(len(data.parts))
    ]
    faces = gather(data, batches)
    if limits.on_gpu:
        from faceflow.kernels.knn import gpu_search

        buffers = gpu_search.search_cells(
            faces.vectors, faces.rows, faces.probes, cells, limits.neighbors, limits.threshold, limits.float16
        )
    else:
        keys = scratch.array("keys", (len(faces.rows) * topk.room_for(limits.neighbors),), np.uint64)
        buffers = cpu.search_cells(
            faces.vectors, faces.rows, faces.probes, cells, limits.neighbors, limits.threshold, keys
        )  # fmt: skip
    rows, bounds = faces.rows, faces.bounds
    del batches, faces  # the vectors are most of the memory
    write_candidates(data.store, name, data.parts, rows, bounds, buffers)
