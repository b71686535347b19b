"""How an incremental run differs from its base run: which rows were kept, changed, removed, and which must be searched for.

Computed once, when ingest has compared the inputs; each stage's `incremental.py` works from it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from faceflow.kernels.knn import incremental_search
from faceflow.stages.artifacts.faces import read_column
from faceflow.stages.results import RowChanges
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import ACTIVE, SAME, STATE_SCHEMA, NeighborTable, Parts


@dataclass(frozen=True)
class Changes:
    """What tasks of an incremental run need to know of its base run.

    base, base_parts: its directory and parts; sources: which of them (one after the other) each of the first parts of this run
    consists of; the parts after those hold the new and changed faces. added, changed, removed: faces.
    """

    base: Store
    base_parts: Parts
    sources: tuple[range, ...]
    added: int
    changed: int
    removed: int

    @classmethod
    def of(cls, base: Store, base_parts: Parts, rows: RowChanges) -> Changes:
        sources = tuple(itertools.starmap(range, itertools.pairwise(rows.sources)))
        return cls(base, base_parts, sources, rows.added, rows.changed, rows.removed)

    @property
    def carried_parts(self) -> int:
        """How many of this run's parts were carried over; the others are new."""
        return len(self.sources)

    def is_new(self, part: int) -> bool:
        return part >= len(self.sources)

    @property
    def moved(self) -> int:
        """Faces that are new, changed or removed."""
        return self.added + self.changed + self.removed

    def first_row(self, part: int) -> int:
        """The base row of the first face that a carried part may hold."""
        return self.base_parts.starts[self.sources[part].start]


def kept_rows(run: Store, part: int) -> np.ndarray:
    """The base row of each face of one part with the same embedding, int32[n]; -1 for a new or changed one."""
    return np.asarray(run.read_batch(layout.part("base_rows", part)).column(0).to_numpy())


def same_ids(run: Store, parts: range | list[int]) -> np.ndarray:
    """The base row of the same id, whatever its embedding was, of each face of these parts, int32[n]; -1 for a new one."""
    return read_column(run, "base_rows", parts, 1)


def rows_now(run: Store) -> np.ndarray:
    """This run's row of each face of the base run, int32[...]; -1 for removed and changed ones."""
    return np.asarray(run.read_batch(layout.ROWS_NOW).column(0).to_numpy())


@dataclass(frozen=True)
class FindActive:
    """Request: which faces of one part must be searched for, with this many neighbors kept."""

    run: Store
    changes: Changes
    parts: Parts
    part: int
    neighbors: int


def find_active(request: FindActive) -> int:
    """Write the state of each of one part's faces before the search: new ones, and those that lost neighbors out of a full
    table, are active. Returns how many are active."""
    run, changes, part = request.run, request.changes, request.part
    name = layout.part("active", part)
    if is_whole(run, name):
        return int(read_active(run, part).sum())
    if changes.removed + changes.changed > 0 or changes.is_new(part):
        state = carried_table(run, changes, request.parts, part, request.neighbors)[1]
    else:
        state = np.full(request.parts.rows(part), SAME, np.uint8)
    run.write_arrow(name, STATE_SCHEMA, [pa.record_batch([pa.array(state, pa.uint8())], schema=STATE_SCHEMA)])
    return int((state == ACTIVE).sum())


def read_active(run: Store, part: int) -> np.ndarray:
    """bool[n]: which faces of one part must be searched for."""
    return np.asarray(run.read_batch(layout.part("active", part)).column(0).to_numpy() == ACTIVE)


def carried_table(
    run: Store, changes: Changes, parts: Parts, part: int, neighbors: int
) -> tuple[NeighborTable, np.ndarray]:  # fmt: skip
    """What the base run's neighbor table says of one part's faces, by this run's rows, and the faces' states uint8[n]."""
    kept, first = kept_rows(run, part), parts.starts[part]
    if changes.is_new(part):
        nothing = np.zeros(len(kept) + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
        return NeighborTable(first, *nothing), np.full(len(kept), ACTIVE, np.uint8)
    table = NeighborTable.joined(
        [changes.base.read_batch(layout.part("neighbors", source)) for source in changes.sources[part]]
    )
    now = rows_now(run)
    kept = kept - changes.first_row(part)
    if np.array_equal(now, np.arange(changes.base_parts.faces)):
        return NeighborTable(first, table.offsets, table.rows, table.values), np.zeros(len(kept), np.uint8)
    *carried, state = incremental_search.carry_table(table.offsets, table.rows, table.values, kept, now, neighbors)
    return NeighborTable(first, *carried), state
