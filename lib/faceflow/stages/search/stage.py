"""Stage 3, search: each shard runs its tiles; each part merges what the shards found into its neighbor table."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from faceflow.cluster.executor import Resources
from faceflow.kernels.graph import csr, edge_recipes
from faceflow.kernels.ivf import probing, quantizer
from faceflow.kernels.knn import recall, scratch, topk
from faceflow.kernels.knn import tile_search as cpu
from faceflow.kernels.threshold import valley
from faceflow.logs import event
from faceflow.stages.artifacts.candidates import candidates_batch, gather, read_candidates, that_probe, write_candidates
from faceflow.stages.artifacts.faces import read_quantizer, read_vectors
from faceflow.stages.base import Context, LastNight, Outcome, Stage, merge_sizes
from faceflow.stages.search import incremental, near_identical, recall_estimate
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import CANDIDATES_SCHEMA, NEIGHBORS_SCHEMA, NeighborTable, Parts

log = logging.getLogger("faceflow")

EXACT_BLOCKS = 16
SMALLEST_BLOCK, LARGEST_BLOCK = 1_024, 65_536
"""Faces of one block of the exact plan: about EXACT_BLOCKS shards, within what a product and its buffers may weigh."""

Block = tuple[int, int, int]
"""(part, first row within it, end) of one block of the exact plan."""


def run(context: Context) -> Outcome:
    """Search every shard, or tonight's faces in every shard, then merge every part."""
    config, parts = context.config, context.parts
    plan = context.done["quantize"].counts
    run, on_gpu = context.stores.run, config.gpus_per_worker > 0
    resources = Resources(gpus=config.gpus_per_worker, custom=config.search_resource)
    limits = (config.neighbors, context.thresholds[1], on_gpu, config.gpu_float16)
    night = bool(plan["incremental"])
    if on_gpu and not night:
        context.executor.call(check_gpu, config.neighbors, label="gpu", resources=resources)
    past = context.last_night if night else None
    if past is not None:
        shards = incremental.search_night(context)
    elif plan["index"] == "exact":
        blocks = exact_blocks(parts)
        shards = len(blocks)
        context.executor.map(
            search_exact_shard,
            [(run, parts, context.dim, shard, blocks, *limits) for shard in range(shards)],
            "search",
            sizes=[end - begin for _, begin, end in blocks],
            resources=resources,
        )
    else:
        shards = plan["shards"]
        context.executor.map(
            search_cells_shard,
            [(run, parts, context.dim, shard, *limits, 1) for shard in range(shards)],
            "search",
            resources=resources,
            smaller=in_smaller_steps,
        )
    begun = time.perf_counter()
    sampled = recall_estimate.draw(context)
    drawn = time.perf_counter() - begun
    levels = (context.thresholds[0], near_identical.near_level(context))
    results = context.executor.map(
        merge_part,
        [(run, parts, part, context.dim, shards, config.neighbors, past, levels) for part in range(len(parts))],
        "merge",
        sizes=[parts.rows(part) for part in range(len(parts))],
    )
    repeated, written = near_identical.settle(context)
    begun = time.perf_counter()
    counts, pieces = recall_estimate.certify(context, sampled)
    counts |= {
        "neighbors": sum(collected for _, collected, _ in results),
        "full": sum(full for _, _, full in results),
    } | repeated
    counts["certificate_seconds"] = round(drawn + time.perf_counter() - begun, 3)
    if counts["full"]:
        log.warning(
            "%s faces have %d neighbors above the threshold, as many as --neighbors keeps: parts of larger clusters are joined "
            "where no gap separates them", f"{counts['full']:,}", config.neighbors,
            extra=event("full_lists", faces=counts["full"]),
        )  # fmt: skip
    return Outcome(counts, merge_sizes([pieces, written, *(pieces for pieces, _, _ in results)]))


STAGE = Stage(
    name="search",
    reads=("vectors", "quantizer", "cells", "homes", "before"),
    writes=("fresh", "candidates", "certificate", "truth", "neighbors", "state", "near", "copies"),
    scratch=("before", "fresh", "candidates", "certificate", "near"),
    settings=("neighbors", "min_similarity", "edges", "recall_sample", "seed", "gpu_float16"),
    after=("ingest", "quantize"),
    packages=("faceflow", "numpy", "numba"),
    run=run,
)


def warm_up() -> None:
    """Load a worker's compiled kernels by one tiny search and its edges, with arrays as they come from files (read-only)."""
    vectors = np.eye(16, dtype=np.float32)
    quantizer.train(vectors, 2, 0, 1)
    probing.choose_rule(vectors, 16, vectors[:2].copy(), 2, 0.0, 2, 0.9, 0.9)
    rows = np.arange(16, dtype=np.int32)
    offsets, cells = probing.probe(vectors, vectors[:2].copy(), probing.ProbeRule(1.0, 2))
    buffers = cpu.search_cells(vectors, rows, (offsets, cells), range(2), 2, 0.0)
    arrow = [pa.array(a).to_numpy() for a in (rows, *buffers.take(np.arange(16)))]
    topk.merge([(arrow[0], arrow[1], arrow[2])], 16, 2)
    recall.search_part(vectors, rows, vectors, 0, 2, 0.0)
    valley.count_pairs(vectors, rows, vectors, rows)
    *block, _ = csr.compress([(np.array([0, 1, 2]), np.array([1, 0], np.int32), np.ones(2, np.float32))])
    edge_recipes.auto((block[0], block[1], block[2]), 0.5, 0.4)


def check_gpu(neighbors: int) -> None:
    from faceflow.errors import SettingsError
    from faceflow.kernels.knn import gpu_search

    gpu_search.check_device()
    if neighbors > gpu_search.MAX_NEIGHBORS:
        raise SettingsError(f"neighbors is {neighbors}: a GPU search keeps at most {gpu_search.MAX_NEIGHBORS}")


def exact_blocks(parts: Parts) -> list[Block]:
    """The cut of all rows into blocks of about equal size that do not straddle parts; depends on the parts alone."""
    wanted = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, -(-parts.faces // EXACT_BLOCKS)))
    return [(part, *block) for part in range(len(parts)) for block in cpu.blocks_of(parts.rows(part), wanted)]


def search_exact_shard(
    run: Store, parts: Parts, dim: int, shard: int, blocks: Sequence[Block],
    neighbors: int, threshold: float | None, on_gpu: bool,
    float16: bool,
) -> None:  # fmt: skip
    """Compare block `shard` with the blocks that the ring gives it, and write the candidates of every part."""
    if is_whole(run, layout.candidates(shard)):
        return

    def load(block: Block) -> tuple[int, np.ndarray]:
        part, begin, end = block
        return parts.starts[part] + begin, np.ascontiguousarray(read_vectors(run, part, dim)[begin:end])

    collected: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}

    def take(first_row: int, offsets: np.ndarray, keys: np.ndarray) -> None:
        part = int(np.searchsorted(parts.starts, first_row, side="right")) - 1
        collected.setdefault(part, []).append((first_row - parts.starts[part], offsets, keys))

    first_row, members = load(blocks[shard])
    if on_gpu:
        from faceflow.kernels.knn import gpu_search

        others = [b for b in range(len(blocks)) if b != shard]
        gpu_search.search_blocks(members, first_row, (load(blocks[b]) for b in others), neighbors, threshold, take, float16)
    else:
        others = cpu.ring(shard, len(blocks))[1:]
        cpu.search_blocks(members, first_row, (load(blocks[b]) for b in others), neighbors, threshold, take)

    def batches() -> Iterator[pa.RecordBatch]:
        for part in range(len(parts)):
            pieces = sorted(collected.pop(part, []), key=lambda piece: piece[0])
            rows = [np.arange(first, first + len(offsets) - 1) for first, offsets, _ in pieces]
            counts = [np.diff(offsets) for _, offsets, _ in pieces]
            offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.empty(0, np.int64), *counts]))])
            keys = np.concatenate([np.empty(0, np.uint64), *(keys for _, _, keys in pieces)])
            yield candidates_batch(np.concatenate([np.empty(0, np.int64), *rows]), offsets, keys)

    run.write_arrow(layout.candidates(shard), CANDIDATES_SCHEMA, batches())


def in_smaller_steps(piece: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `search_cells_shard` for the same shard in twice as many steps."""
    return (*piece[:-1], 2 * piece[-1])


def search_cells_shard(
    run: Store,
    parts: Parts,
    dim: int,
    shard: int,
    neighbors: int,
    threshold: float | None,
    on_gpu: bool,
    float16: bool,
    steps: int,
) -> None:
    """Search one shard and write the candidates of every part; its cells one after the other in `steps` groups, of which
    only one is in memory."""
    name = layout.candidates(shard)
    if is_whole(run, name):
        return
    starts = read_quantizer(run, dim)[1]
    begin, end = int(starts[shard]), int(starts[shard + 1])
    steps = min(steps, end - begin)
    if steps == 1:
        _search_cells(run, parts, dim, shard, range(begin, end), name, neighbors, threshold, on_gpu, float16)
        return
    collected = [layout.candidates_step(shard, steps, step) for step in range(steps)]
    for step, path in enumerate(collected):
        span = range(begin + (end - begin) * step // steps, begin + (end - begin) * (step + 1) // steps)
        if not is_whole(run, path):
            _search_cells(run, parts, dim, shard, span, path, neighbors, threshold, on_gpu, float16)

    def batches() -> Iterator[pa.RecordBatch]:
        for part in range(len(parts)):
            offsets, rows, similarities = topk.merge(read_candidates(run, collected, part), parts.rows(part), neighbors)
            selected = np.flatnonzero(np.diff(offsets))
            yield candidates_batch(selected, np.append(offsets[selected], offsets[-1]), topk.encode(similarities, rows))

    run.write_arrow(name, CANDIDATES_SCHEMA, batches())
    for path in collected:
        run.delete(path)


def _search_cells(
    run: Store, parts: Parts, dim: int, shard: int, cells: range, name: str,
    neighbors: int, threshold: float | None, on_gpu: bool, float16: bool,
) -> None:  # fmt: skip
    """Gather the faces that probe these cells of a shard, search them, and write the candidates of every part."""
    batches = [that_probe(run.read_batch(layout.part("cells", part), shard), cells) for part in range(len(parts))]
    collected = gather(run, parts, dim, batches)
    if on_gpu:
        from faceflow.kernels.knn import gpu_search

        buffers = gpu_search.search_cells(
            collected.vectors, collected.rows, collected.probes, cells, neighbors, threshold, float16
        )
    else:
        keys = scratch.array("keys", (len(collected.rows) * topk.room_for(neighbors),), np.uint64)
        buffers = cpu.search_cells(collected.vectors, collected.rows, collected.probes, cells, neighbors, threshold, keys)
    rows, bounds = collected.rows, collected.bounds
    del batches, collected  # the vectors are most of the memory
    write_candidates(run, name, parts, rows, bounds, buffers)


def merge_part(
    run: Store,
    parts: Parts,
    part: int,
    dim: int,
    shards: int,
    neighbors: int,
    past: LastNight | None,
    levels: tuple[float | None, float | None],
) -> tuple[dict[str, int], int, int]:
    """Write one part's neighbor table, and beside it its sampled faces and near-identical pairs; returns its bytes, its number
    of neighbors, and how many lists are full with neighbors above the threshold. levels: the threshold, and from where faces
    are near-identical (None: none)."""
    scratch.forget()  # of the search before
    name, first_row = layout.part("neighbors", part), parts.starts[part]
    names = [name, *([layout.part("state", part)] if past is not None else [])]
    if all(is_whole(run, item) for item in names):
        table = NeighborTable.from_batch(run.read_batch(name), first_row)
    else:
        if past is not None:
            table = incremental.merge_night(run, past, parts, part, shards, neighbors)
        else:
            lists = read_candidates(run, [layout.candidates(shard) for shard in range(shards)], part)
            table = NeighborTable(first_row, *topk.merge(lists, parts.rows(part), neighbors))
            del lists
        run.write_arrow(name, NEIGHBORS_SCHEMA, [table.to_batch()])
    recall_estimate.write_queries(run, parts, part, dim, table)
    threshold, near = levels
    if near is not None:
        near_identical.write_near(run, part, table, near)
    full = np.flatnonzero(np.diff(table.offsets) >= neighbors)
    above = table.values[table.offsets[full + 1] - 1] >= np.float32(threshold if threshold is not None else -np.inf)
    return {item: run.size(item) or 0 for item in names}, len(table.rows), int(above.sum())
