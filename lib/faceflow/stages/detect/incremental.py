"""Incremental detect: the map equation continues from the base run's modules where edges are the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from faceflow.kernels.knn import incremental_search
from faceflow.kernels.mapequation.two_level import Earlier
from faceflow.stages.artifacts.faces import RunData, read_column, read_groups
from faceflow.stages.base import Context
from faceflow.stages.changes import Changes
from faceflow.tables import SAME, EdgeList

CHECK_EVERY = 5
"""Incremental runs after which one round of coarse-tuning shows what continuing from earlier modules has cost so far."""


@dataclass(frozen=True)
class Continued:
    """The base run's modules as a start. check: whether to measure what continuing has cost; spread: whether an edge's weight
    depends on the neighbors of both its ends."""

    changes: Changes
    check: bool
    spread: bool


def continued(context: Context) -> Continued | None:
    """What to continue from: the base run's modules, where this run's edges differ from its edges in part only."""
    base, config, changes = context.base, context.config, context.carried
    if base is None or changes is None or config.engine != "native" or config.method != "infomap" or config.trials > 1:
        return None
    before = base.results.manifests["detect"].fingerprint
    if any(before.get(key) != getattr(config, key) for key in ("method", "engine", "flow")):
        return None
    check = context.results.quantize.since_full % CHECK_EVERY == 0
    return Continued(changes, check, config.edges != "threshold")


def start_of(data: RunData, edges: Iterable[EdgeList], continued: Continued) -> Earlier:
    """Each face's module in the base run, one of its own for a new one; whether its edges differ now; and its visit rate there,
    0 for a new one.

    Where weights spread, one step from a changed face is followed; what lies farther is found as rows move.
    """
    run, parts, changes = data.store, data.parts, continued.changes
    base_parts = range(len(changes.base_parts))
    modules, flow = (read_column(changes.base, "modules", base_parts, column) for column in (2, 1))
    kept = read_column(run, "base_rows", range(len(parts)))
    changed = read_column(run, "state", range(len(parts))) != SAME
    # Near-identical faces count as one: what changes of any changes its leader, and so does one that comes, goes or leads.
    leader, led = read_groups(run, parts.faces), read_groups(changes.base, changes.base_parts.faces)
    now, before = np.bincount(leader, minlength=len(leader)), np.bincount(led, minlength=len(led))
    changed |= np.where(kept >= 0, before[kept], 0) != now
    changed[leader[changed]] = True
    active = changed
    if continued.spread:
        active = changed.copy()
        for part in edges:
            rows = slice(part.first_row, part.first_row + len(part.offsets) - 1)
            active[rows] |= incremental_search.leads_to(part.offsets, part.rows, changed)
    start = np.where(kept >= 0, modules[kept], int(modules.max(initial=-1)) + 1 + np.arange(len(kept)))
    return Earlier(start, active, np.where(kept >= 0, flow[kept], 0.0), continued.check)
