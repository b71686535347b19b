"""A night's search: only pairs with an active face are compared, and merged into last night's tables."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from faceflow.kernels import incremental, topk
from faceflow.stages import cells
from faceflow.stages.base import Context, Past
from faceflow.stages.candidates import candidates_batch, probes_of, read_candidates
from faceflow.stages.reading import matrix, read_quantizer, read_vectors, rows_tonight
from faceflow.storage import layout
from faceflow.storage.files import Store
from faceflow.storage.manifests import is_whole
from faceflow.tables import ACTIVE, CANDIDATES_SCHEMA, CHANGED, NEIGHBORS_SCHEMA, SAME, STATE_SCHEMA, NeighborTable, Parts

QUERY_FACES = 16_384
"""Active faces that the exact plan compares with a part at once."""


def search_night(context: Context, past: Past) -> int:
    """Carry over last night's tables, and search for the active faces; returns the number of candidate files."""
    config, parts, run, executor = context.config, context.parts, context.stores.run, context.executor
    every = range(len(parts))
    executor.map(
        carry_rows,
        [(run, past.run, past.parts, parts, part, config.neighbors) for part in every],
        "carry",
        sizes=[parts.rows(part) for part in every],
    )
    if context.done["quantize"].counts["index"] == "exact":
        executor.map(
            search_exact_part,
            [(run, parts, part, context.dim, config.neighbors, config.min_similarity) for part in every],
            "search",
            sizes=[parts.rows(part) for part in every],
        )
        return len(parts)
    shards: int = context.done["quantize"].counts["shards"]
    executor.map(assign_active, [(run, part, context.dim) for part in every], "probe")
    executor.map(
        search_cells_shard,
        [(run, parts, context.dim, shard, config.neighbors, config.min_similarity) for shard in range(shards)],
        "search",
    )
    return shards


def carry_rows(run: Store, past: Store, past_parts: Parts, parts: Parts, part: int, neighbors: int) -> None:
    """Write what last night knew of one part's faces, by tonight's rows, and the state of each."""
    name = layout.part("carried", part)
    if is_whole(run, name):
        return
    before = run.read_batch(layout.part("past", part)).column(0).to_numpy()
    if part < len(past_parts):
        table = NeighborTable.from_batch(past.read_batch(layout.part("neighbors", part)), 0)
        now = rows_tonight(run, past_parts.faces, parts)
        *carried, state = incremental.carry_table(
            table.offsets, table.rows, table.values, before - past_parts.starts[part], now, neighbors
        )
    else:
        carried = [np.zeros(len(before) + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)]
        state = np.full(len(before), ACTIVE, np.uint8)
    run.write_arrow(
        layout.part("before", part), STATE_SCHEMA, [pa.record_batch([pa.array(state, pa.uint8())], schema=STATE_SCHEMA)]
    )
    run.write_arrow(name, NEIGHBORS_SCHEMA, [NeighborTable(parts.starts[part], *carried).to_batch()])


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
    rows, lists, vectors, active = [], [], [], []
    for part, batch in enumerate(fresh):
        old = _others(run.read_batch(layout.part("cells", part), shard), _active(run, part), touched, here)
        for found, is_active in ((old, False), (batch, True)):
            rows.append(found.column(0).to_numpy() + parts.starts[part])
            lists.append(found.column(1))
            active.append(np.full(found.num_rows, is_active))
            if "vector" in found.schema.names:
                vectors.append(matrix(found.column(2), dim))
            else:
                vectors.append(read_vectors(run, part, dim)[found.column(0).to_numpy()])
    order = np.argsort(np.concatenate(rows), kind="stable")
    every = np.concatenate(rows)[order].astype(np.int32)
    probes = probes_of([pa.concat_arrays(lists).take(pa.array(order))])
    x = np.concatenate(vectors)[order]
    del vectors
    buffers = incremental.search_cells(x, every, probes, here, np.concatenate(active)[order], neighbors, floor)
    bounds = np.searchsorted(every, parts.starts)
    run.write_arrow(
        name,
        CANDIDATES_SCHEMA,
        (
            candidates_batch(every[b:e] - first, *buffers.take(np.arange(b, e)))
            for b, e, first in zip(bounds[:-1], bounds[1:], parts.starts, strict=False)
        ),
    )


def _others(batch: pa.RecordBatch, active: np.ndarray, touched: np.ndarray, cells: range) -> pa.RecordBatch:
    """The faces of a shard's batch that are not active and probe a cell that an active one probes."""
    flat, offsets = batch.column(1).flatten().to_numpy(), batch.column(1).offsets.to_numpy()
    meets = touched[flat] & (flat >= cells.start) & (flat < cells.stop)
    ends = np.concatenate([[0], np.cumsum(meets)])[offsets - offsets[0]]
    wanted = (np.diff(ends) > 0) & ~active[batch.column(0).to_numpy()]
    return batch if wanted.all() else batch.filter(pa.array(wanted))


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


def merge_night(run: Store, parts: Parts, part: int, files: int, neighbors: int) -> NeighborTable:
    """One part's neighbor table: what was carried over, and the new candidates. Writes the faces' states."""
    state = run.read_batch(layout.part("before", part)).column(0).to_numpy()
    carried = NeighborTable.from_batch(run.read_batch(layout.part("carried", part)), parts.starts[part])
    here = np.arange(len(carried), dtype=np.int32)
    lists = [(here, carried.offsets, topk.encode(carried.values, carried.rows))]
    new = np.concatenate([run.read_batch(layout.part("past", p)).column(0).to_numpy() < 0 for p in range(len(parts))])
    names = [layout.candidates(index) for index in range(files)]
    lists += [_unknown(found, state, new) for found in read_candidates(run, names, part)]
    table = NeighborTable(parts.starts[part], *topk.merge(lists, len(carried), neighbors))
    changed = incremental.changed_rows((carried.offsets, carried.rows), (table.offsets, table.rows))
    after = np.where(state == ACTIVE, ACTIVE, np.where(changed | (state == CHANGED), CHANGED, SAME)).astype(np.uint8)
    run.write_arrow(layout.part("state", part), STATE_SCHEMA, [pa.record_batch([pa.array(after)], schema=STATE_SCHEMA)])
    return table


def _unknown(found: topk.CandidateList, state: np.ndarray, new: np.ndarray) -> topk.CandidateList:
    """Candidates without those that the carried table holds already, or was right to leave out: a face that is not active
    itself knows all others but the new ones."""
    rows, offsets, keys = found
    owner = np.repeat(rows, np.diff(offsets))
    kept = (state[owner] == ACTIVE) | new[topk.decode(keys)[1]]
    return rows, np.concatenate([[0], np.cumsum(kept)])[offsets - offsets[0]], keys[kept]
