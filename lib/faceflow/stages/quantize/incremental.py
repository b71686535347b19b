"""Incremental quantize: keeps the base run's threshold, quantizer and cells, unless there is a reason not to."""

from __future__ import annotations

from dataclasses import replace

from faceflow import __version__
from faceflow.stages.artifacts import cell_assignments
from faceflow.stages.base import BaseRun, Context, Outcome, merge_sizes
from faceflow.stages.changes import Changes, FindActive, find_active
from faceflow.stages.quantize.full import choose_plan, spread_of
from faceflow.stages.results import CellsResult, QuantizeResult
from faceflow.storage import layout
from faceflow.storage.object_store import Store

WRITES = ("quantizer", "probed_cells", "assigned_cells", "active")
"""Folders of the run directory that this stage writes."""

MOST_ACTIVE, MOST_MOVED_IN_CELLS = 0.25, 0.07
"""Share of faces that an incremental run may have to search for: past that, all pairs are less work. With cells fewer may come,
change or go, as a face that must find its neighbors alone probes far more of them (measured at 500,000: level at 7 %)."""

MOST_GROWN = 1.5
"""Growth of the data set since the quantizer was trained, past which its cells are too few."""

LEAST_SIMILAR, MOST_UNEVEN = 0.9, 1.5
"""Drift of the quantizer: similarity of new faces to their centroids, on average, relative to the faces it was trained on, and
how uneven the cells have become (the mean size of the cell that a face is in) relative to then."""

DEPENDS_ON = (
    "neighbors", "min_similarity", "edges", "index", "cells", "probes", "seed", "gpu_float16", "version of faceflow",
)  # fmt: skip
"""Settings without which the base run's tables would be other ones."""


def run(context: Context, base: BaseRun, changes: Changes) -> Outcome[QuantizeResult] | str:
    """Carry over the base run's quantizer and cells; or why a full run is needed."""
    run = context.stores.run
    decided = run.read_json(layout.FULL_REASON)
    reason = _why_full(context, base, changes) if decided is None else str(decided["because"])
    if reason is None:
        outcome = _carry(context, base, changes)
        if isinstance(outcome, Outcome):
            return outcome
        reason = outcome
    if decided is not None and not decided.get("cleared"):
        _clear(run, reason)
    return reason


def _why_full(context: Context, base: BaseRun, changes: Changes) -> str | None:
    """Why this run cannot build on the base run's tables, None where it can: known before anything is computed."""
    config, faces = context.config, context.parts.faces
    if context.attempt:
        return "the measured recall was too low"
    before = base.results.quantize
    settings = {**base.results.manifests["quantize"].fingerprint, **base.results.manifests["search"].fingerprint}
    for key in DEPENDS_ON:
        now = __version__ if key.startswith("version") else getattr(config, key)
        if settings.get(key) != now:
            return f"{key.removeprefix('version of ')} was {settings.get(key)}, is {now}"
    if before.since_full + 1 >= config.full_every:
        return f"{config.full_every - 1} incremental runs since the last full one (--full-every)"
    if changes.moved > (MOST_ACTIVE if before.index == "exact" else MOST_MOVED_IN_CELLS) * faces:
        return f"{changes.moved:,} of {faces:,} faces are new, changed or gone"
    if faces > MOST_GROWN * before.trained_faces:
        return f"{faces:,} faces, but the plan was made for {before.trained_faces:,}"
    plan = choose_plan(context)
    if plan.index != before.index:
        return f"the plan was {before.index}, and {plan.index} is less work now"
    return None


def _carry(context: Context, base: BaseRun, changes: Changes) -> Outcome[QuantizeResult] | str:
    """Keep the base run's quantizer and cells and assign the new parts; or why that will not do."""
    executor, parts, data = context.executor, context.parts, context.data
    before = base.results.quantize
    requests = [FindActive(data.store, changes, parts, part, context.config.neighbors) for part in range(len(parts))]
    active = tuple(executor.map(find_active, requests, "active"))
    if sum(active) > MOST_ACTIVE * parts.faces:
        reason = f"{sum(active):,} of {parts.faces:,} faces are new, or lost neighbors out of full tables"
        _clear(data.store, reason)
        return reason
    result = QuantizeResult(
        before.index, before.threshold, before.trained_faces, incremental=True, since_full=before.since_full + 1, active=active
    )
    if before.cells is None:
        return Outcome(result, {})
    carried = changes.carried_parts
    files = {layout.CENTROIDS: data.store.share(changes.base, layout.CENTROIDS, layout.CENTROIDS)}
    assigned = executor.map(
        cell_assignments.carry_cells, [cell_assignments.CarryCells(data, changes, part) for part in range(carried)], "carry"
    )  # fmt: skip
    assigned += executor.map(
        cell_assignments.assign_part,
        [cell_assignments.AssignPart(data, part, None) for part in range(carried, len(parts))],
        "quantize",
    )
    new_faces = parts.faces - parts.starts[carried]
    new_similarity = sum(part.similarity for part in assigned[carried:]) / max(1, new_faces)
    similarity, unevenness = spread_of(assigned, parts.faces)
    made = CellsResult(
        before.cells.cells, before.cells.shards, similarity, unevenness, before.cells.trained_similarity,
        before.cells.trained_unevenness, new_similarity=round(new_similarity, 4),
        predicted_recall=before.cells.predicted_recall, exhausted=before.cells.exhausted,
    )  # fmt: skip
    drifted = _drift(made, new_faces, new_similarity)
    if drifted is not None:
        _clear(data.store, drifted)
        return drifted
    files |= merge_sizes([part.files for part in assigned])
    return Outcome(replace(result, cells=made), files)


def _drift(made: CellsResult, new_faces: int, new_similarity: float) -> str | None:
    """Why the quantizer no longer fits; None where it does."""
    if made.unevenness > MOST_UNEVEN * made.trained_unevenness:
        return f"cells are {made.unevenness:.2f} uneven, and were {made.trained_unevenness:.2f}"
    if new_faces and new_similarity < LEAST_SIMILAR * made.trained_similarity:
        return f"new faces are {new_similarity:.3f} near their centroids, the first ones {made.trained_similarity:.3f}"
    return None


def _clear(run: Store, reason: str) -> None:
    """Forget what was carried over. The decision is recorded first: a run that is interrupted and continued must not take the
    cells of one quantizer for those of another."""
    run.write_json(layout.FULL_REASON, {"because": reason, "cleared": False})
    for folder in WRITES:
        run.delete(folder)
    run.write_json(layout.FULL_REASON, {"because": reason, "cleared": True})
