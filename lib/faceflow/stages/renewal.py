"""A night's search: only pairs with an active face are compared, and merged into last night's tables."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from faceflow.kernels import incremental, scratch, topk
from faceflow.stages import cells
from faceflow.stages.base import Context, Past
from faceflow.stages.candidates import candidates_batch, gather, read_candidates
from faceflow.stages.reading import read_column, read_quantizer, read_vectors, rows_tonight
from faceflow.storage import layout
from faceflow.storage.files import Store
from faceflow.storage.manifests import is_whole
from faceflow.tables import ACTIVE, CANDIDATES_SCHEMA, CHANGED, SAME, STATE_SCHEMA, NeighborTable, Parts

QUERY_FACES = 16_384
"""Active faces that the exact plan compares with a part at once."""


def search_night(context: Context, past: Past) -> int:
    """Carry over last night's tables, and search for the active faces; returns the number of candidate files."""
    config, parts, run, executor = context.config, context.parts, context.stores.run, context.executor
    weak_floor = context.floors[1]
    every = range(len(parts))
    counts = context.done["ingest"].counts
    gone = counts["removed"] + counts["changed"] > 0
    executor.map(find_active, [(run, past.run, past.parts, parts, p, config.neighbors, gone) for p in every], "active")
    if context.done["quantize"].counts["index"] == "exact":
        executor.map(
            search_exact_part,
            [(run, parts, part, context.dim, config.neighbors, weak_floor) for part in every],
            "search",
            sizes=[parts.rows(part) for part in every],
        )
        return len(parts)
    shards: int = context.done["quantize"].counts["shards"]
    executor.map(assign_active, [(run, part, context.dim) for part in every], "probe")
    executor.map(
        search_cells_shard,
        [(run, parts, context.dim, shard, config.neighbors, weak_floor) for shard in range(shards)],
        "search",
    )
    return shards


def find_active(run: Store, past: Store, past_parts: Parts, parts: Parts, part: int, neighbors: int, gone: bool) -> None:
    """Write the state of each of one part's faces before the search: new ones, and those that lost neighbors out of a full
    table, are active. gone: whether any face is gone."""
    name = layout.part("before", part)
    if is_whole(run, name):
        return
    if gone or part >= len(past_parts):
        state = _carried(run, past, past_parts, parts, part, neighbors)[1]
    else:
        state = np.full(parts.rows(part), SAME, np.uint8)
    run.write_arrow(name, STATE_SCHEMA, [pa.record_batch([pa.array(state, pa.uint8())], schema=STATE_SCHEMA)])


def _carried(
    run: Store, past: Store, past_parts: Parts, parts: Parts, part: int, neighbors: int
) -> tuple[NeighborTable, np.ndarray]:
    """What last night knew of one part's faces, by tonight's rows, and the faces' states."""
    before = run.read_batch(layout.part("past", part)).column(0).to_numpy()
    first = parts.starts[part]
    if part >= len(past_parts):
        nothing = np.zeros(len(before) + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
        return NeighborTable(first, *nothing), np.full(len(before), ACTIVE, np.uint8)
    table = NeighborTable.from_batch(past.read_batch(layout.part("neighbors", part)), 0)
    now = rows_tonight(run, past_parts.faces, parts)
    kept = before - past_parts.starts[part]
    if np.array_equal(now, np.arange(past_parts.faces)):
        return NeighborTable(first, table.offsets, table.rows, table.values), np.zeros(len(kept), np.uint8)
    *carried, state = incremental.carry_table(table.offsets, table.rows, table.values, kept, now, neighbors)
    return NeighborTable(first, *carried), state


def _active(run: Store, part: int) -> np.ndarray:
    return np.asarray(run.read_batch(layout.part("before", part)).column(0).to_numpy() == ACTIVE)


def assign_active(run: Store, part: int, dim: int) -> None:
    """Write the cells that one part's active faces probe, so many that nobody needs to introduce them."""
    name = layout.part("fresh", part)
    if not is_whole(run, name):
        rows = np.flatnonzero(_active(run, part)).astype(np.int32)
        cells.write_cells(run, name, read_vectors(run, part, dim)[rows], rows, dim, cells.read_rules(run)[1])


def search_cells_shard(run: Store, parts: Parts, dim: int, shard: int, neighbors: int, floor: float | None) -> None:
    """Search the cells of one shard that an active face probes, and write the candidates of every part."""
    name = layout.candidates(shard)
    if is_whole(run, name):
        return
    starts = read_quantizer(run, dim)[1]
    here = range(int(starts[shard]), int(starts[shard + 1]))
    fresh = [run.read_batch(layout.part("fresh", part), shard) for part in range(len(parts))]
    touched = np.zeros(int(starts[-1]), bool)
    for batch in fresh:
        touched[batch.column(1).flatten().to_numpy()] = True
    active = gather(run, parts, dim, fresh, "active")
    residents = _residents(run, parts, dim, shard, touched, here)
    keys = scratch.array("keys", ((len(active.rows) + incremental.MOST_RESIDENTS) * topk.room_for(neighbors),), np.uint64)
    lists = incremental.search_cells(active.vectors, active.rows, active.probes, here, residents, neighbors, floor, keys)
    rows, offsets, keys = incremental.joined(list(lists))
    order = np.argsort(rows, kind="stable")
    bounds = np.searchsorted(rows[order], parts.starts)
    lists_of = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(keys, pa.uint64()))

    def batches() -> Iterator[pa.RecordBatch]:
        for begin, end, first in zip(bounds[:-1], bounds[1:], parts.starts, strict=False):
            mine = order[begin:end]
            columns = [pa.array((rows[mine] - first).astype(np.int32)), lists_of.take(pa.array(mine))]
            yield pa.record_batch(columns, schema=CANDIDATES_SCHEMA)

    run.write_arrow(name, CANDIDATES_SCHEMA, batches())


def _residents(run: Store, parts: Parts, dim: int, shard: int, touched: np.ndarray, cells: range) -> incremental.Residents:
    """The faces of a shard that are not active, of cells that are touched, bool[cells]; read at once, part by part."""
    batches, homes = [], []
    for part in range(len(parts)):
        batch = run.read_batch(layout.part("cells", part), shard)
        offsets = batch.column(1).offsets.to_numpy()
        home = batch.column(1).flatten().to_numpy()[offsets[:-1] - offsets[0]]
        wanted = touched[home] & (home >= cells.start) & (home < cells.stop) & ~_active(run, part)[batch.column(0).to_numpy()]
        batches.append(batch.filter(pa.array(wanted)))
        homes.append(home[wanted])
    found, home = gather(run, parts, dim, batches), np.concatenate(homes)
    order = np.argsort(home, kind="stable")
    begin = np.searchsorted(home[order], np.arange(cells.start, cells.stop + 1))
    vectors = np.empty((min(len(home), incremental.MOST_RESIDENTS), dim), np.float32)

    def of(cell: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        here = order[begin[cell - cells.start] : begin[cell - cells.start + 1]]
        for first in range(0, len(here), incremental.MOST_RESIDENTS):
            chunk = here[first : first + incremental.MOST_RESIDENTS]
            yield found.rows[chunk], np.take(found.vectors, chunk, axis=0, out=vectors[: len(chunk)], mode="clip")

    return of


def search_exact_part(run: Store, parts: Parts, part: int, dim: int, neighbors: int, floor: float | None) -> None:
    """Compare every active face with one part, and write the candidates of every part."""
    name = layout.candidates(part)
    if is_whole(run, name):
        return
    members, active = read_vectors(run, part, dim), _active(run, part)
    found: list[list[topk.CandidateList]] = []
    own: list[topk.CandidateList] = []
    here = np.arange(len(members))
    for other in range(len(parts)):
        rows = np.flatnonzero(_active(run, other))
        queries = read_vectors(run, other, dim)[rows]
        found.append([])
        for begin in range(0, len(rows), QUERY_FACES):
            chunk = slice(begin, begin + QUERY_FACES)
            theirs, mine = incremental.search_part(
                np.ascontiguousarray(queries[chunk]), (parts.starts[other] + rows[chunk]).astype(np.int32),
                np.ascontiguousarray(members), parts.starts[part], active, neighbors, floor,
            )  # fmt: skip
            found[-1].append((rows[chunk].astype(np.int32), *theirs))
            own.append((here.astype(np.int32), *mine))
    found[part] += own

    def batches() -> Iterator[pa.RecordBatch]:
        for other, lists in enumerate(found):
            offsets, rows, similarities = topk.merge(lists, parts.rows(other), neighbors + 1)
            yield candidates_batch(np.arange(parts.rows(other)), offsets, topk.encode(similarities, rows))

    run.write_arrow(name, CANDIDATES_SCHEMA, batches())


def merge_night(run: Store, past: Past, parts: Parts, part: int, files: int, neighbors: int) -> NeighborTable:
    """One part's neighbor table: what was carried over, and the new candidates. Writes the faces' states."""
    carried, state = _carried(run, past.run, past.parts, parts, part, neighbors)
    new = read_column(run, "past", range(len(parts))) < 0
    lists = read_candidates(run, [layout.candidates(index) for index in range(files)], part)
    *table, changed = incremental.merge_into(
        (carried.offsets, carried.rows, carried.values), lists, state == ACTIVE, new, neighbors
    )
    after = np.where(state == ACTIVE, ACTIVE, np.where(changed | (state == CHANGED), CHANGED, SAME)).astype(np.uint8)
    run.write_arrow(layout.part("state", part), STATE_SCHEMA, [pa.record_batch([pa.array(after)], schema=STATE_SCHEMA)])
    return NeighborTable(carried.first_row, *table)
