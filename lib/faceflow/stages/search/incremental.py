"""A night's search: only pairs with an active face are compared, and merged into last night's tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from faceflow.cluster.executor import Resources
from faceflow.kernels.knn import incremental_search, scratch, topk
from faceflow.stages.artifacts import cells
from faceflow.stages.artifacts.candidates import candidates_batch, gather, read_candidates, that_probe
from faceflow.stages.artifacts.faces import read_vectors, rows_tonight
from faceflow.stages.base import Context, LastNight
from faceflow.stages.changes import carried_table, read_active
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
alone: whoever continues an interrupted night takes over what some of them have found."""


def search_night(context: Context) -> int:
    """Search for the active faces; returns the number of candidate files."""
    config, parts, run, executor = context.config, context.parts, context.stores.run, context.executor
    support_threshold = context.thresholds[1]
    every = range(len(parts))
    resources = Resources(custom=config.search_resource)
    results = context.done["quantize"].counts["active"]
    if context.done["quantize"].counts["index"] == "exact":
        executor.map(
            search_exact_part,
            [(run, parts, part, context.dim, config.neighbors, support_threshold) for part in every],
            "search",
            sizes=[parts.rows(part) for part in every],
            resources=resources,
        )
        return len(parts)
    count = context.done["quantize"].counts["cells"]
    ranges = min(count, 1 if sum(results) <= ACTIVE_FACES else -(-RANGES * sum(results) // ACTIVE_FACES))
    starts = tuple(count * i // ranges for i in range(ranges + 1))
    from_parts = tuple(part for part in every if results[part])
    executor.map(assign_active, [(run, part, context.dim, starts) for part in from_parts], "probe", resources=resources)
    most = MOST_PARTS
    if not run.is_local:
        largest = 4 * context.dim * max(parts.rows(part) for part in every)
        most = max(1, min(most, RESIDENT_BYTES // max(1, largest)))
    tasks = -(-len(parts) // min(most, max(1, len(parts) // FEWEST_TASKS)))
    groups = [range(len(parts) * task // tasks, len(parts) * (task + 1) // tasks) for task in range(tasks)]
    executor.map(
        search_parts,
        [
            (run, parts, selected, i, tasks, from_parts, context.dim, starts, config.neighbors, support_threshold, 1)
            for i, selected in enumerate(groups)
        ],
        "search",
        sizes=[parts.starts[selected.stop] - parts.starts[selected.start] for selected in groups],
        resources=resources,
        smaller=in_smaller_steps,
    )
    return tasks


def in_smaller_steps(piece: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `search_parts` for the same parts in twice as many steps."""
    return (*piece[:-1], 2 * piece[-1])


def assign_active(run: Store, part: int, dim: int, starts: tuple[int, ...]) -> None:
    """Write the cells that one part's active faces probe, so many that nobody needs to introduce them, and their vectors; one
    record batch for each range of cells."""
    name = layout.part("fresh", part)
    if not is_whole(run, name):
        rows = np.flatnonzero(read_active(run, part)).astype(np.int32)
        vectors = read_vectors(run, part, dim)[rows]
        cells.write_cells(run, name, vectors, rows, dim, cells.read_rules(run)[1], starts, carry_vectors=True)


def search_parts(
    run: Store, parts: Parts, selected: range, task: int, tasks: int, from_parts: Sequence[int], dim: int,
    starts: tuple[int, ...], neighbors: int, threshold: float | None, steps: int,
) -> None:  # fmt: skip
    """Compare the active faces, which are in from_parts, with all others of these parts that live in a cell they probe, and
    with each other in the task's share of the cells; write the candidates of every part, which may name a face several times.
    The cells between two starts one after the other in `steps` groups, so that fewer active faces are in memory at once."""
    name = layout.candidates(task)
    if is_whole(run, name):
        return
    residents = _residents(run, parts, selected, dim, starts[-1])
    own = range(starts[-1] * task // tasks, starts[-1] * (task + 1) // tasks)
    lists: list[topk.CandidateList] = []
    for index, (begin, end) in enumerate(itertools.pairwise(starts)):
        batches = [run.read_batch(layout.part("fresh", part), index) for part in from_parts]
        cuts = sorted({begin + (end - begin) * step // steps for step in range(steps + 1)})
        for span in itertools.starmap(range, itertools.pairwise(cuts)):
            fresh = gather(run, parts, dim, [that_probe(batch, span) for batch in batches], from_parts)
            keys = scratch.array(
                "keys", ((len(fresh.rows) + incremental_search.MOST_RESIDENTS) * topk.room_for(neighbors),), np.uint64
            )
            lists += incremental_search.search_cells(
                fresh.vectors, fresh.rows, fresh.probes, span, own, residents, neighbors, threshold, keys
            )
    _write_lists(run, name, parts, incremental_search.joined(lists))


def _residents(run: Store, parts: Parts, selected: range, dim: int, count: int) -> incremental_search.Residents:
    """The faces of these parts that are not active, by the cell of `count` that they live in."""
    others = [np.flatnonzero(~read_active(run, part)) for part in selected]
    homes = np.concatenate([cells.read_homes(run, part)[rows] for part, rows in zip(selected, others, strict=True)])
    rows = np.concatenate([parts.starts[part] + rows for part, rows in zip(selected, others, strict=True)])
    rows = rows[np.argsort(homes, kind="stable")]
    begin = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(homes, minlength=count), out=begin[1:])
    vectors = [read_vectors(run, part, dim) for part in selected]
    firsts = np.array([parts.starts[part] for part in selected] + [parts.starts[selected.stop]])
    block = np.empty((incremental_search.MOST_RESIDENTS, dim), np.float32)

    def of(cell: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(begin[cell], begin[cell + 1], incremental_search.MOST_RESIDENTS):
            chosen = rows[first : min(first + incremental_search.MOST_RESIDENTS, begin[cell + 1])]
            cuts = np.searchsorted(chosen, firsts).tolist()
            for source, start, (low, high) in zip(vectors, firsts, itertools.pairwise(cuts), strict=False):
                np.take(source, chosen[low:high] - start, axis=0, out=block[low:high], mode="clip")
            yield chosen, block[: len(chosen)]

    return of


def _write_lists(run: Store, name: str, parts: Parts, results: topk.CandidateList) -> None:
    """Write candidates of rows of all parts, in any order, one record batch a part."""
    rows, offsets, keys = results
    order = np.argsort(rows, kind="stable")
    bounds = np.searchsorted(rows[order], parts.starts)
    lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(keys, pa.uint64()))

    def batches() -> Iterator[pa.RecordBatch]:
        for begin, end, first in zip(bounds[:-1], bounds[1:], parts.starts, strict=False):
            mine = order[begin:end]
            columns = [pa.array((rows[mine] - first).astype(np.int32)), lists.take(pa.array(mine))]
            yield pa.record_batch(columns, schema=CANDIDATES_SCHEMA)

    run.write_arrow(name, CANDIDATES_SCHEMA, batches())


def search_exact_part(run: Store, parts: Parts, part: int, dim: int, neighbors: int, threshold: float | None) -> None:
    """Compare every active face with one part, and write the candidates of every part."""
    name = layout.candidates(part)
    if is_whole(run, name):
        return
    members, active = read_vectors(run, part, dim), read_active(run, part)
    results: list[list[topk.CandidateList]] = []
    own: list[topk.CandidateList] = []
    selected = np.arange(len(members))
    for other in range(len(parts)):
        rows = np.flatnonzero(read_active(run, other))
        queries = read_vectors(run, other, dim)[rows]
        results.append([])
        for begin in range(0, len(rows), QUERY_FACES):
            chunk = slice(begin, begin + QUERY_FACES)
            theirs, mine = incremental_search.search_part(
                np.ascontiguousarray(queries[chunk]), (parts.starts[other] + rows[chunk]).astype(np.int32),
                np.ascontiguousarray(members), parts.starts[part], active, neighbors, threshold,
            )  # fmt: skip
            results[-1].append((rows[chunk].astype(np.int32), *theirs))
            own.append((selected.astype(np.int32), *mine))
    results[part] += own

    def batches() -> Iterator[pa.RecordBatch]:
        for other, lists in enumerate(results):
            offsets, rows, similarities = topk.merge(lists, parts.rows(other), neighbors + 1)
            yield candidates_batch(np.arange(parts.rows(other)), offsets, topk.encode(similarities, rows))

    run.write_arrow(name, CANDIDATES_SCHEMA, batches())


def merge_night(run: Store, past: LastNight, parts: Parts, part: int, files: int, neighbors: int) -> NeighborTable:
    """One part's neighbor table: what was carried over, and the new candidates. Writes the faces' states."""
    carried, state = carried_table(run, past, parts, part, neighbors)
    new = np.ones(parts.faces, bool)
    target = rows_tonight(run)
    new[target[target >= 0]] = False
    lists = read_candidates(run, [layout.candidates(index) for index in range(files)], part)
    *table, changed = incremental_search.merge_into(
        (carried.offsets, carried.rows, carried.values), lists, state == ACTIVE, new, neighbors
    )
    after = np.where(state == ACTIVE, ACTIVE, np.where(changed | (state == CHANGED), CHANGED, SAME)).astype(np.uint8)
    run.write_arrow(layout.part("state", part), STATE_SCHEMA, [pa.record_batch([pa.array(after)], schema=STATE_SCHEMA)])
    return NeighborTable(carried.first_row, *table)
