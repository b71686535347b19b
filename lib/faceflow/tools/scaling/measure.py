"""Time against workers and faces: runs the job over a grid, checks that all answers agree, and reads the figures."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from faceflow.cluster.worker import peak_memory
from faceflow.config import ClusterConfig
from faceflow.errors import QualityError, SettingsError
from faceflow.kernels.ivf import plan as plans
from faceflow.kernels.ivf import quantizer
from faceflow.runs.pipeline import execute
from faceflow.runs.stages import STAGES
from faceflow.stages.base import open_executor
from faceflow.stages.ingest.parquet_input import ReadFooters, read_footers, readable
from faceflow.stages.ingest.reading import columns_of
from faceflow.stages.results import Results
from faceflow.storage import layout
from faceflow.storage.inputs import list_faces
from faceflow.storage.manifests import StepRecord
from faceflow.storage.object_store import Store
from faceflow.tools import figures
from faceflow.tools.plan import costs
from faceflow.tools.scaling import laws

log = logging.getLogger("faceflow")

CENTRAL = ("link", "detect")
"""Stages that run in one task on one machine: more workers do not make them faster (link does for the threshold recipe)."""

TRIALS = 400
"""Resamplings of the repeats, from which an interval of a prediction comes."""

SHORTEST_SECONDS = 1.0
"""A stage that takes less says more about the machine's mood than about scaling."""

GROUP_FACES = 16_384
"""Rows of a row group of the subsets that are written."""


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


@dataclass(frozen=True)
class Scaling:
    """The grid and what it says. folder: where scaling.json, scaling.csv, scaling.png and reading.txt are."""

    runs: list[Run]
    cpus: int
    nodes: int
    predictions: list[Prediction]
    reading: list[str]
    folder: str

    @property
    def stages(self) -> list[str]:
        return [stage.name for stage in STAGES]

    def median(self, stage: str, workers: int, faces: int) -> float:
        return statistics.median(run.seconds[stage] for run in self.runs if (run.workers, run.faces) == (workers, faces))


def measure_scaling(
    config: ClusterConfig, workers: Sequence[int], faces: Sequence[int] | None, repeats: int,
    wanted: Sequence[tuple[int, int]] | None = None, progress: bool = True,
) -> Scaling:  # fmt: skip
    """Run the job over all numbers of workers and faces on the Ray cluster of `config`, `repeats` times, interleaved.

    faces: sizes to cut from the input, from its first row on (None: all of it); wanted: (workers, faces) to predict. Labels of
    one size must be the same for every number of workers, else QualityError. Raises SettingsError for a grid that the input
    or the cluster cannot give.
    """
    output = Store.at(config.output, config.storage_options)
    output.check_writable()
    total, sizes = _sizes(config, faces)
    if repeats < 1 or not workers or min(workers) < 1:
        raise SettingsError("--repeats and every number of --workers must be 1 or more")
    inputs = {size: _subset(config, output, size, total) for size in sizes}
    runs: list[Run] = []
    answers: dict[int, str] = {}
    # One connection for all: what a private Ray takes to start is not part of any run.
    with open_executor(config.address, None, progress=False) as executor:
        cpus, nodes = executor.cpus, executor.nodes
        if cpus < max(workers):
            raise SettingsError(f"workers: {max(workers)} tasks at once need as many CPUs, and the cluster has {cpus}")
        warm = ClusterConfig(**_settings(config, inputs[sizes[0]], output.address("warm-up"), max(workers)))
        execute(warm, incremental=False, progress=False)
        output.delete("warm-up")
        grid = list(itertools.product(range(repeats), sizes, workers))
        for number, (repeat, size, count) in enumerate(grid):
            place, records = layout.stores(output.address(f"run-{size}-{count}-{repeat}"), None, config.storage_options)
            settings = ClusterConfig(**_settings(config, inputs[size], place.root, count))
            result = execute(settings, incremental=False, progress=progress)
            answer = _digest(place, layout.label_folder(result.run_id))
            if answers.setdefault(size, answer) != answer:
                raise QualityError(f"{size:,} faces with {count} workers got other labels than before: please report it")
            run = records.child(result.run_id)
            done = Results.read(run)
            steps = {name: manifest.steps for name, manifest in done.manifests.items()}
            load = _load(settings, done, executor.largest_machine_cpus)
            runs.append(Run(size, count, repeat, result.seconds, steps, result.worker_peak_memory_bytes, load))
            log.info(
                "scaling  %d of %d: %s faces, %d %s: %.1f s", number + 1, len(grid), f"{size:,}", count, _workers(count),
                result.seconds["total"],
            )  # fmt: skip
            place.delete("")
    results = Scaling(runs, cpus, nodes, predict(runs, wanted or _beyond(workers, sizes)), [], output.root)
    results = dataclasses.replace(results, reading=read(results))
    _write(results, output, config)
    return results


def _settings(config: ClusterConfig, source: str, output: str, workers: int) -> dict[str, Any]:
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    own |= {"input": source, "output": output, "workers": workers}
    snapshot = config.snapshot if source == config.input else None
    return own | {"snapshot": snapshot, "work_dir": None, "run_id": None, "restart": False, "labels_table": None}


def _load(config: ClusterConfig, done: Results, threads: int) -> costs.Workload:
    """What the run had to do, as the results of its stages tell."""
    faces, plan, cells = done.ingest.faces, done.quantize, done.quantize.cells
    workers = config.workers or 1
    return costs.Workload(
        faces, done.ingest.dim, done.search.neighbors / faces, done.link.edges / faces, done.detect.singletons / faces,
        done.publish.clusters - done.publish.singletons, cells.cells if cells is not None else 0,
        (cells.mean_probes or 0.0) if cells is not None else 0.0,
        plans.pairs_counted(faces) if plan.threshold.automatic else 0, min(faces, config.recall_sample),
        quantizer.ITERATIONS, quantizer.SAMPLE_PER_CELL, plans.held_out_faces(faces), config.edges != "threshold",
        config.engine == "native", 0.0, workers, threads, (plan.gflops or 0.0) * 1e9 / workers,
    )  # fmt: skip


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


def _sizes(config: ClusterConfig, faces: Sequence[int] | None) -> tuple[int, list[int]]:
    store, results, _ = list_faces(config.input, config.storage_options, config.snapshot)
    footers = read_footers(ReadFooters(store, tuple(file.path for file in results), columns_of(config)))
    total = sum(sum(footer.group_rows) for footer in footers)
    sizes = sorted(set(faces)) if faces else [total]
    if sizes[0] < 1 or sizes[-1] > total:
        raise SettingsError(f"--faces: {config.input} holds {total:,} rows, so a size must lie between 1 and that")
    return total, sizes


def _subset(config: ClusterConfig, output: Store, size: int, total: int) -> str:
    """The input, or a file of its first `size` rows, written once."""
    if size == total:
        return config.input
    name = f"inputs/first-{size}.parquet"
    if output.exists(name):
        return output.address(name)
    store, results, _ = list_faces(config.input, config.storage_options, config.snapshot)
    columns = [config.id_column, config.embedding_column, *([config.exclusive_column] if config.exclusive_column else [])]
    left = size
    with output.open_write(name) as target:
        writer = None
        for file in results:
            with readable(store, file.path) as parquet:
                for batch in parquet.iter_batches(batch_size=GROUP_FACES, columns=columns):
                    writer = writer or pq.ParquetWriter(target, batch.schema)
                    writer.write_batch(batch.slice(0, left))
                    left -= min(left, batch.num_rows)
                    if not left:
                        break
            if not left:
                break
        if writer is not None:
            writer.close()
    return output.address(name)


def _digest(store: Store, folder: str) -> str:
    results = hashlib.sha256()
    for name in store.names(folder):
        results.update(store.read_bytes(f"{folder}/{name}"))
    return results.hexdigest()


def _beyond(workers: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
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


def read(results: Scaling) -> list[str]:
    """What the figures say, in plain sentences."""
    workers, sizes = sorted({run.workers for run in results.runs}), sorted({run.faces for run in results.runs})
    most, largest = workers[-1], sizes[-1]
    seconds = {stage: results.median(stage, most, largest) for stage in results.stages}
    total = results.median("total", most, largest)
    slowest = max(seconds, key=lambda stage: seconds[stage])
    lines = [
        f"{largest:,} faces, {most} {_workers(most)} ({results.cpus} CPUs, {results.nodes} node(s)): {total:.1f} s; "
        f"the labels of each size were the same in all runs.",
        f"The longest stage is {slowest}: {seconds[slowest]:.1f} s, {seconds[slowest] / total:.0%} of it.",
    ]
    if len(workers) > 1:
        base = workers[0]
        for stage in (*results.stages, "total"):
            first, last = results.median(stage, base, largest), results.median(stage, most, largest)
            gain = first / max(last, 1e-3)
            read = f"{gain:.2f} times as fast, efficiency {gain * base / most:.2f}"
            if first < SHORTEST_SECONDS:
                read = "too short to tell"
            lines.append(f"{stage}: {first:.1f} s with {base}, {last:.1f} s with {most}: {read}.")
        pairs = [(count, results.median("total", count, largest)) for count in workers]
        counts, times = (np.array(column, float) for column in zip(*pairs, strict=True))
        amdahl = laws.fit_amdahl(counts, times)
        if amdahl.parallel == 0:
            lines.append("Amdahl: more workers did not make it faster, so there is nothing to fit.")
        else:
            lines.append(
                f"Amdahl: {amdahl.serial_share:.0%} of one worker's time is serial; never below {amdahl.serial:.1f} s."
            )
        usl = laws.fit_usl(counts, times)
        if usl is None:
            lines.append("Universal scalability law: it takes three numbers of workers, 1 among them, to fit.")
        else:
            best = f"fastest with {usl.best_workers:.0f} workers" if np.isfinite(usl.best_workers) else "no turning point"
            lines.append(f"Universal scalability law: contention {usl.contention:.3f}, coherence {usl.coherence:.5f}; {best}.")
    if len(sizes) > 1:
        powers = []
        for stage in (*results.stages, "total"):
            value = laws.exponent(np.array(sizes, float), np.array([results.median(stage, most, size) for size in sizes]))
            if results.median(stage, most, largest) >= SHORTEST_SECONDS:
                powers.append(f"{stage} {value:.2f}")
        if powers:
            lines.append(f"Seconds grow with the faces to the power of: {', '.join(powers)} ({sizes[0]:,} to {largest:,}).")
    repeated = max(run.repeat for run in results.runs) > 0
    for item in results.predictions:
        spread = (
            f"{item.low:,.0f} to {item.high:,.0f} by the spread of the repeats" if repeated else "one run each: no spread known"
        )
        where = f"{item.faces:,} faces, {item.workers} {_workers(item.workers)}"
        lines.append(f"Projected, not measured: {where}: {item.seconds:,.0f} s ({spread}).")
    return lines


def _workers(count: int) -> str:
    return "worker" if count == 1 else "workers"


def _write(results: Scaling, output: Store, config: ClusterConfig) -> None:
    record = {
        "input": config.input,
        "settings": config.public(),
        "cpus": results.cpus,
        "nodes": results.nodes,
        "driver_peak_memory_bytes": peak_memory(),
        "runs": [dataclasses.asdict(run) for run in results.runs],
        "predictions": [dataclasses.asdict(item) for item in results.predictions],
        "reading": results.reading,
    }
    output.write_json("scaling.json", record)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["faces", "workers", "repeat", *results.stages, "total", "worker_peak_memory_bytes"])
    for run in results.runs:
        times = [run.seconds[stage] for stage in (*results.stages, "total")]
        writer.writerow([run.faces, run.workers, run.repeat, *times, run.worker_peak_memory_bytes])
    output.write_bytes("scaling.csv", text.getvalue().encode())
    output.write_bytes("reading.txt", ("\n".join(results.reading) + "\n").encode())
    medians = {
        (stage, count, size): results.median(stage, count, size)
        for stage in (*results.stages, "total")
        for count, size in {(run.workers, run.faces) for run in results.runs}
    }
    output.write_bytes("scaling.png", figures.png(figures.scaling(medians, results.stages, results.predictions)))
