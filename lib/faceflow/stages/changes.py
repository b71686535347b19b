"""Which faces an incremental run must search for: the new ones, and those that lost neighbors out of a full table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from faceflow.kernels.knn import incremental_search
from faceflow.stages.artifacts.faces import rows_tonight
from faceflow.stages.base import Context, LastNight
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import ACTIVE, SAME, STATE_SCHEMA, NeighborTable, Parts


def count_active(context: Context, past: LastNight) -> list[int]:
    """How many faces of each part must be searched: the new ones, and those who lost neighbors out of a full table."""
    counts, run, parts = context.done["ingest"].counts, context.stores.run, context.parts
    gone = counts["removed"] + counts["changed"] > 0
    pieces = [(run, past, parts, part, context.config.neighbors, gone) for part in range(len(parts))]
    return context.executor.map(find_active, pieces, "active")


def find_active(run: Store, past: LastNight, parts: Parts, part: int, neighbors: int, gone: bool) -> int:
    """Write the state of each of one part's faces before the search: new ones, and those that lost neighbors out of a full
    table, are active. gone: whether any face is gone. Returns how many are active."""
    name = layout.part("before", part)
    if is_whole(run, name):
        return int(read_active(run, part).sum())
    if gone or part >= len(past.sources):
        state = carried_table(run, past, parts, part, neighbors)[1]
    else:
        state = np.full(parts.rows(part), SAME, np.uint8)
    run.write_arrow(name, STATE_SCHEMA, [pa.record_batch([pa.array(state, pa.uint8())], schema=STATE_SCHEMA)])
    return int((state == ACTIVE).sum())


def carried_table(run: Store, past: LastNight, parts: Parts, part: int, neighbors: int) -> tuple[NeighborTable, np.ndarray]:
    """What last night knew of one part's faces, by tonight's rows, and the faces' states."""
    before = run.read_batch(layout.part("past", part)).column(0).to_numpy()
    first = parts.starts[part]
    if part >= len(past.sources):
        nothing = np.zeros(len(before) + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
        return NeighborTable(first, *nothing), np.full(len(before), ACTIVE, np.uint8)
    source = past.sources[part]
    table = NeighborTable.joined([past.run.read_batch(layout.part("neighbors", item)) for item in source])
    now = rows_tonight(run)
    kept = before - past.parts.starts[source.start]
    if np.array_equal(now, np.arange(past.parts.faces)):
        return NeighborTable(first, table.offsets, table.rows, table.values), np.zeros(len(kept), np.uint8)
    *carried, state = incremental_search.carry_table(table.offsets, table.rows, table.values, kept, now, neighbors)
    return NeighborTable(first, *carried), state


def read_active(run: Store, part: int) -> np.ndarray:
    return np.asarray(run.read_batch(layout.part("before", part)).column(0).to_numpy() == ACTIVE)
