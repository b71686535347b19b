"""Projections: seconds of a whole run with other numbers of workers and faces, simulated from measured runs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from faceflow.kernels.ivf import plan as plans
from faceflow.runs.stages import STAGES
from faceflow.storage.manifests import StepRecord
from faceflow.tools.plan import costs
from faceflow.tools.scaling import laws

CENTRAL = ("link", "detect")
"""Stages that run in one task on one machine: more workers do not make them faster (link does for the threshold recipe)."""

TRIALS = 400
"""Resamplings of the repeats, from which an interval of a prediction comes."""


@dataclass(frozen=True)
class Run:
    """One run of the grid. seconds: of each stage and `total`; steps: what its stages' tasks did (`StepRecord`); load:
    how much there was to do."""

    faces: int
    workers: int
    repeat: int
    seconds: Mapping[str, float]
    steps: Mapping[str, Sequence[StepRecord]]
    worker_peak_memory_bytes: int
    load: costs.Workload


@dataclass(frozen=True)
class Prediction:
    """Seconds of a whole run, projected: expected, and the range in which 90 % of the resampled projections lie."""

    faces: int
    workers: int
    seconds: float
    low: float
    high: float


def _grown(load: costs.Workload, faces: int) -> costs.Workload:
    """The same kind of set with so many faces: more people, of as many photos each."""
    if load.cells:
        plan = plans.choose(faces, load.dim, "cells", None, None, load.iterations, load.per_cell, joined=True)
        now, then = (
            float(plans.expected_probes(count, np.array([float(cells)]), True)[0])
            for count, cells in ((load.faces, load.cells), (faces, plan.cells))
        )
        load = dataclasses.replace(load, cells=plan.cells, probes=1 + (load.probes - 1) * (then - 1) / max(now - 1, 1e-9))
    sampled = plans.pairs_counted(faces) if load.sampled else 0
    people = load.people * faces / load.faces
    return dataclasses.replace(load, faces=faces, people=people, sampled=sampled, held_out=plans.held_out_faces(faces))


def beyond(workers: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The default projections: more workers, and more faces."""
    most, largest = max(workers), max(sizes)
    grid = [(most * times, faces) for faces in (largest, 5 * largest) for times in (1, 2, 4, 8)]
    return [item for item in grid if item != (most, largest)]


def _project(runs: Sequence[Run], workers: int, faces: int) -> float:
    """Seconds of a whole run with so many workers and faces, simulated from the tasks of the runs with most of both.

    A step takes as many rounds as its tasks need, and beside that what it took beside them when it was measured; a stage that
    runs in one task takes what it took. With more faces each stage takes longer as its work grows (`tools.plan.costs`): a power
    fitted to smaller sizes would miss what only begins to count later.
    """
    largest, most = max(run.faces for run in runs), max(run.workers for run in runs)
    selected = [run for run in runs if (run.faces, run.workers) == (largest, most)]
    total = 0.0
    load = selected[0].load
    grown, now = (costs.stage_seconds(_grown(load, count)) for count in (faces, load.faces))
    for stage in STAGES:
        name = stage.name
        measured = statistics.median(run.seconds[name] for run in selected)
        simulated = statistics.median(_stage_at(run, name, most, workers) for run in selected)
        total += max(0.0, measured if name in CENTRAL else simulated) * grown[name] / now[name]
    outside = statistics.median(run.seconds["total"] - sum(run.seconds[stage.name] for stage in STAGES) for run in selected)
    return total + max(0.0, outside)


def _stage_at(run: Run, stage: str, measured: int, workers: int) -> float:
    steps = run.steps.get(stage, [])
    seconds = run.seconds[stage]
    for step in steps:
        if step.tasks > 1:
            before, after = (
                laws.makespan(step.tasks, step.busy_seconds, step.longest_seconds, count) for count in (measured, workers)
            )
            seconds += after - min(before, step.seconds)
    return seconds


def predict(runs: Sequence[Run], wanted: Sequence[tuple[int, int]], seed: int = 0) -> list[Prediction]:
    """Projected seconds for each (workers, faces), with a 90 % interval from resampling the repeats."""
    rng = np.random.default_rng(seed)
    cells: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        cells.setdefault((run.workers, run.faces), []).append(run)
    resampled = [
        [cell[i] for cell in cells.values() for i in rng.integers(0, len(cell), len(cell))] for _ in range(TRIALS)
    ]  # fmt: skip
    results = []
    for workers, faces in wanted:
        expected = _project(runs, workers, faces)
        spread = np.array([_project(trial, workers, faces) for trial in resampled])
        low, high = np.quantile(spread, [0.05, 0.95])
        results.append(Prediction(faces, workers, round(expected, 1), round(float(low), 1), round(float(high), 1)))
    return results
