"""Incremental search: only pairs with an active face are compared, and merged into the base run's tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from faceflow.cluster.executor import Resources
from faceflow.kernels.knn import incremental_search, scratch, topk
from faceflow.stages.artifacts import cell_assignments
from faceflow.stages.artifacts.candidates import candidates_batch, gather, read_candidates, that_probe
from faceflow.stages.artifacts.faces import RunData, read_vectors
from faceflow.stages.base import Context
from faceflow.stages.changes import Changes, carried_table, read_active, rows_now
from faceflow.stages.search.full import Limits
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import ACTIVE, CANDIDATES_SCHEMA, CHANGED, SAME, STATE_SCHEMA, NeighborTable, Parts

QUERY_FACES = 16_384
"""Active faces that the exact plan compares with a part at once."""

MOST_PARTS, FEWEST_TASKS = 4, 4
"""Parts that one task compares with the active faces, whose vectors it then gathers once for all of them; fewer parts where
there would be too few tasks."""

ACTIVE_FACES = 65_536
"""Where more are active, the cells are searched in several ranges, so that fewer need buffers at once: RANGES for each so many,
as a face probes cells of several."""

RANGES = 4

RESIDENT_BYTES = 768 * 2**20
"""Of the vectors of a task's parts, where they have to be fetched. How faces are dealt to tasks must follow from the data
alone: a run that continues an interrupted one takes over what some of them have found."""


def search(context: Context, changes: Changes) -> int:
    """Search for the active faces; returns the number of candidate files."""
    config, data, executor, plan = context.config, context.data, context.executor, context.results.quantize
    run, parts, limits = data.store, data.parts, Limits(config.neighbors, plan.threshold.support)
    resources = Resources(custom=config.search_resource)
    if plan.cells is None:
        executor.map(
            search_exact_part,
            [SearchExactPart(data, limits, part) for part in range(len(parts))],
            "search",
            sizes=[parts.rows(part) for part in range(len(parts))],
            resources=resources,
        )
        return len(parts)
    count, active = plan.cells.cells, sum(plan.active)
    ranges = min(count, 1 if active <= ACTIVE_FACES else -(-RANGES * active // ACTIVE_FACES))
    starts = tuple(count * i // ranges for i in range(ranges + 1))
    from_parts = tuple(part for part in range(len(parts)) if plan.active[part])
    requests = [ProbeActive(data, part, starts) for part in from_parts]
    executor.map(probe_active, requests, "probe", resources=resources)
    most = MOST_PARTS
    if not run.is_local:
        largest = 4 * data.dim * max(parts.rows(part) for part in range(len(parts)))
        most = max(1, min(most, RESIDENT_BYTES // max(1, largest)))
    tasks = -(-len(parts) // min(most, max(1, len(parts) // FEWEST_TASKS)))
    groups = [range(len(parts) * task // tasks, len(parts) * (task + 1) // tasks) for task in range(tasks)]
    executor.map(
        search_parts,
        [SearchParts(data, limits, group, i, tasks, from_parts, starts) for i, group in enumerate(groups)],
        "search",
        sizes=[parts.starts[group.stop] - parts.starts[group.start] for group in groups],
        resources=resources,
        smaller=in_smaller_steps,
    )
    return tasks


@dataclass(frozen=True)
class ProbeActive:
    """Request: the cells that one part's active faces probe; starts: of the ranges of cells, and the end."""

    data: RunData
    part: int
    starts: tuple[int, ...]


def probe_active(request: ProbeActive) -> None:
    """Write the cells that one part's active faces probe, so many that no neighbor join is needed, and their vectors; one
    record batch for each range of cells."""
    data, part = request.data, request.part
    name = layout.part("active_cells", part)
    if not is_whole(data.store, name):
        rows = np.flatnonzero(read_active(data.store, part)).astype(np.int32)
        vectors = read_vectors(data.store, part, data.dim)[rows]
        rule = cell_assignments.read_rules(data.store)[1]
        cell_assignments.write_probes(data.store, name, vectors, rows, rule, request.starts, carry_vectors=True)


@dataclass(frozen=True)
class SearchParts:
    """Request: the active faces against all others of these parts. task, tasks: which one of how many; from_parts: that have
    active faces; starts: of the ranges of cells, and the end; the cells of a range one after the other in `steps` groups, so
    that fewer active faces are in memory at once."""

    data: RunData
    limits: Limits
    parts: range
    task: int
    tasks: int
    from_parts: tuple[int, ...]
    starts: tuple[int, ...]
    steps: int = 1


def in_smaller_steps(request: SearchParts) -> SearchParts:
    """The same parts in twice as many steps."""
    return replace(request, steps=2 * request.steps)


def search_parts(request: SearchParts) -> None:
    """Compare the active faces with all others of these parts whose assigned cell they probe, and with each other in the task's
    share of the cells; write the candidates of every part, which may name a face several times."""
    data, starts, steps, k = request.data, request.starts, request.steps, request.limits.neighbors
    name = layout.candidates(request.task)
    if is_whole(data.store, name):
        return
    residents = _residents(data, request.parts, starts[-1])
    own = range(starts[-1] * request.task // request.tasks, starts[-1] * (request.task + 1) // request.tasks)
    lists: list[topk.CandidateList] = []
    for index, (begin, end) in enumerate(itertools.pairwise(starts)):
        batches = [data.store.read_batch(layout.part("active_cells", part), index) for part in request.from_parts]
        cuts = sorted({begin + (end - begin) * step // steps for step in range(steps + 1)})
        for span in itertools.starmap(range, itertools.pairwise(cuts)):
            active = gather(data, [that_probe(batch, span) for batch in batches], request.from_parts)
            room = (len(active.rows) + incremental_search.MOST_RESIDENTS) * topk.room_for(k)
            keys = scratch.array("keys", (room,), np.uint64)
            lists += incremental_search.search_cells(
                active.vectors, active.rows, active.probes, span, own, residents, k, request.limits.threshold, keys
            )
    _write_lists(data.store, name, data.parts, incremental_search.joined(lists))


def _residents(data: RunData, group: range, count: int) -> incremental_search.Residents:
    """The faces of these parts that are not active, by the cell of `count` that they are assigned to."""
    run, parts, dim = data.store, data.parts, data.dim
    others = [np.flatnonzero(~read_active(run, part)) for part in group]
    assigned = np.concatenate(
        [cell_assignments.read_assigned_cells(run, part)[rows] for part, rows in zip(group, others, strict=True)]
    )  # fmt: skip
    rows = np.concatenate([parts.starts[part] + rows for part, rows in zip(group, others, strict=True)])
    rows = rows[np.argsort(assigned, kind="stable")]
    begin = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(assigned, minlength=count), out=begin[1:])
    vectors = [read_vectors(run, part, dim) for part in group]
    firsts = np.array([parts.starts[part] for part in group] + [parts.starts[group.stop]])
    block = np.empty((incremental_search.MOST_RESIDENTS, dim), np.float32)

    def of(cell: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(begin[cell], begin[cell + 1], incremental_search.MOST_RESIDENTS):
            chosen = rows[first : min(first + incremental_search.MOST_RESIDENTS, begin[cell + 1])]
            cuts = np.searchsorted(chosen, firsts).tolist()
            for source, start, (low, high) in zip(vectors, firsts, itertools.pairwise(cuts), strict=False):
                np.take(source, chosen[low:high] - start, axis=0, out=block[low:high], mode="clip")
            yield chosen, block[: len(chosen)]

    return of


def _write_lists(run: Store, name: str, parts: Parts, lists: topk.CandidateList) -> None:
    """Write candidates of rows of all parts, in any order, one record batch a part."""
    rows, offsets, keys = lists
    order = np.argsort(rows, kind="stable")
    bounds = np.searchsorted(rows[order], parts.starts)
    column = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(keys, pa.uint64()))

    def batches() -> Iterator[pa.RecordBatch]:
        for begin, end, first in zip(bounds[:-1], bounds[1:], parts.starts, strict=False):
            mine = order[begin:end]
            columns = [pa.array((rows[mine] - first).astype(np.int32)), column.take(pa.array(mine))]
            yield pa.record_batch(columns, schema=CANDIDATES_SCHEMA)

    run.write_arrow(name, CANDIDATES_SCHEMA, batches())


@dataclass(frozen=True)
class SearchExactPart:
    """Request: every active face against one part."""

    data: RunData
    limits: Limits
    part: int


def search_exact_part(request: SearchExactPart) -> None:
    """Compare every active face with one part, and write the candidates of every part."""
    data, part, limits = request.data, request.part, request.limits
    run, parts, dim = data.store, data.parts, data.dim
    name = layout.candidates(part)
    if is_whole(run, name):
        return
    members, active = read_vectors(run, part, dim), read_active(run, part)
    lists: list[list[topk.CandidateList]] = []
    own: list[topk.CandidateList] = []
    own_rows = np.arange(len(members)).astype(np.int32)
    for other in range(len(parts)):
        rows = np.flatnonzero(read_active(run, other))
        queries = read_vectors(run, other, dim)[rows]
        lists.append([])
        for begin in range(0, len(rows), QUERY_FACES):
            chunk = slice(begin, begin + QUERY_FACES)
            theirs, mine = incremental_search.search_part(
                np.ascontiguousarray(queries[chunk]), (parts.starts[other] + rows[chunk]).astype(np.int32),
                np.ascontiguousarray(members), parts.starts[part], active, limits.neighbors, limits.threshold,
            )  # fmt: skip
            lists[-1].append((rows[chunk].astype(np.int32), *theirs))
            own.append((own_rows, *mine))
    lists[part] += own

    def batches() -> Iterator[pa.RecordBatch]:
        for other, part_lists in enumerate(lists):
            offsets, rows, similarities = topk.merge(part_lists, parts.rows(other), limits.neighbors + 1)
            yield candidates_batch(np.arange(parts.rows(other)), offsets, topk.encode(similarities, rows))

    run.write_arrow(name, CANDIDATES_SCHEMA, batches())


def merge(data: RunData, changes: Changes, part: int, files: int, neighbors: int) -> NeighborTable:
    """One part's neighbor table: what was carried over, and the new candidates. Writes the faces' states."""
    run, parts = data.store, data.parts
    carried, state = carried_table(run, changes, parts, part, neighbors)
    new = np.ones(parts.faces, bool)
    now = rows_now(run)
    new[now[now >= 0]] = False
    lists = read_candidates(run, [layout.candidates(index) for index in range(files)], part)
    *table, changed = incremental_search.merge_into(
        (carried.offsets, carried.rows, carried.values), lists, state == ACTIVE, new, neighbors
    )
    after = np.where(state == ACTIVE, ACTIVE, np.where(changed | (state == CHANGED), CHANGED, SAME)).astype(np.uint8)
    run.write_arrow(layout.part("state", part), STATE_SCHEMA, [pa.record_batch([pa.array(after)], schema=STATE_SCHEMA)])
    return NeighborTable(carried.first_row, *table)
