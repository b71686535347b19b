"""Stage 3, search: the neighbor table of every part, its recall estimate, and the groups of near-identical faces."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from faceflow.errors import QualityError
from faceflow.kernels.graph import csr, edge_recipes
from faceflow.kernels.ivf import probing, quantizer
from faceflow.kernels.knn import recall, scratch, topk
from faceflow.kernels.knn import tile_search as cpu
from faceflow.kernels.threshold import valley
from faceflow.logs import event
from faceflow.stages.artifacts.candidates import read_candidates
from faceflow.stages.artifacts.faces import RunData
from faceflow.stages.base import Context, Outcome, Redo, Stage, merge_sizes
from faceflow.stages.changes import Changes
from faceflow.stages.results import SearchResult
from faceflow.stages.search import full, incremental, near_identical, recall_estimate
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.tables import NEIGHBORS_SCHEMA, NeighborTable

log = logging.getLogger("faceflow")


def run(context: Context) -> Outcome[SearchResult]:
    """Search every shard, or for the active faces only, then merge every part."""
    config, data, changes = context.config, context.data, context.carried
    files = incremental.search(context, changes) if changes is not None else full.search(context)
    begun = time.perf_counter()
    sampled = recall_estimate.draw(context)
    drawn = time.perf_counter() - begun
    near = near_identical.near_level(context)
    merged = context.executor.map(
        merge_part,
        [
            MergePart(data, part, files, config.neighbors, changes, context.results.quantize.threshold.similarity, near)
            for part in range(len(data.parts))
        ],
        "merge",
        sizes=[data.parts.rows(part) for part in range(len(data.parts))],
    )
    groups = near_identical.group_all(context)
    begun = time.perf_counter()
    measured = recall_estimate.measure(context, sampled)
    seconds = round(drawn + time.perf_counter() - begun, 3)
    result = SearchResult(
        sum(part.neighbors for part in merged), sum(part.full_lists for part in merged), measured.recall, measured.bands,
        seconds, groups.followers, groups.searched_again,
    )  # fmt: skip
    if result.full_lists:
        log.warning(
            "%s faces have %d neighbors above the threshold, as many as --neighbors keeps: parts of larger clusters are joined "
            "where no gap separates them", f"{result.full_lists:,}", config.neighbors,
            extra=event("full_lists", faces=result.full_lists),
        )  # fmt: skip
    return Outcome(result, merge_sizes([measured.files, groups.files, *(part.files for part in merged)]))


def gate(context: Context) -> Redo | None:
    """Whether the measured recall is as wanted, or what to do about it.

    Raises QualityError where it is not and may not, or cannot, be raised.
    """
    config, measured, plan = context.config, context.results.search.recall, context.results.quantize
    text = f"edge recall {measured.estimate:.4f} (95 % interval {measured.low:.4f} to {measured.high:.4f})"
    log.info(
        "recall   %s from %s faces, %s true neighbors", text, f"{measured.faces:,}", f"{measured.edges:,}",
        extra=event("recall", **asdict(measured)),
    )  # fmt: skip
    if measured.estimate >= config.min_recall:
        return None
    reason = f"recall too low: searching again with more probes (attempt {context.attempt + 2})"
    if plan.incremental:  # what it saved was too dear
        return Redo("quantize", reason)
    hopeless = plan.cells is None or plan.cells.exhausted
    if config.raise_probes and not hopeless:
        return Redo("quantize", reason, keep=("quantizer",))
    advice = "lower --min-recall" if hopeless else "use --raise-probes, more --probes or --index exact, or lower --min-recall"
    raise QualityError(f"{text} is below --min-recall {config.min_recall}: {advice}; nothing was published")


STAGE = Stage(
    name="search",
    reads=("vectors", "quantizer", "probed_cells", "assigned_cells", "active"),
    writes=("active_cells", "candidates", "recall", "truth", "neighbors", "state", "near_identical", "groups"),
    scratch=("active", "active_cells", "candidates", "recall", "near_identical"),
    settings=("neighbors", "min_similarity", "edges", "recall_sample", "seed", "gpu_float16"),
    after=("ingest", "quantize"),
    packages=("faceflow", "numpy", "numba"),
    run=run,
    gate=gate,
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


@dataclass(frozen=True)
class MergePart:
    """Request: the neighbor table of one part. files: of candidates; changes: in an incremental run; threshold: similarity from
    which faces are neighbors; near: from which they are near-identical (None: none)."""

    data: RunData
    part: int
    files: int
    neighbors: int
    changes: Changes | None
    threshold: float | None
    near: float | None


@dataclass(frozen=True)
class MergedPart:
    """Bytes of one part's files, its neighbors, and how many lists are full with neighbors above the threshold."""

    files: dict[str, int]
    neighbors: int
    full_lists: int


def merge_part(request: MergePart) -> MergedPart:
    """Write one part's neighbor table, and beside it its sampled faces and near-identical pairs."""
    scratch.forget()  # of the search before
    data, part, changes, neighbors = request.data, request.part, request.changes, request.neighbors
    run, parts = data.store, data.parts
    name, first_row = layout.part("neighbors", part), parts.starts[part]
    names = [name, *([layout.part("state", part)] if changes is not None else [])]
    if all(is_whole(run, path) for path in names):
        table = NeighborTable.from_batch(run.read_batch(name), first_row)
    else:
        if changes is not None:
            table = incremental.merge(data, changes, part, request.files, neighbors)
        else:
            lists = read_candidates(run, [layout.candidates(shard) for shard in range(request.files)], part)
            table = NeighborTable(first_row, *topk.merge(lists, parts.rows(part), neighbors))
            del lists
        run.write_arrow(name, NEIGHBORS_SCHEMA, [table.to_batch()])
    recall_estimate.write_queries(data, part, table)
    if request.near is not None:
        near_identical.write_near(run, part, table, request.near)
    full_lists = np.flatnonzero(np.diff(table.offsets) >= neighbors)
    least = np.float32(request.threshold if request.threshold is not None else -np.inf)
    above = table.values[table.offsets[full_lists + 1] - 1] >= least
    return MergedPart({path: run.size(path) or 0 for path in names}, len(table.rows), int(above.sum()))
