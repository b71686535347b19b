"""Time against workers and faces: runs the job over a grid, checks that all answers agree, and reads the figures."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import logging
import statistics
from collections.abc import Sequence
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
from faceflow.storage.object_store import Store
from faceflow.tools import figures
from faceflow.tools.plan import costs
from faceflow.tools.scaling import laws
from faceflow.tools.scaling.predict import Prediction, Run, beyond, predict

log = logging.getLogger("faceflow")

SHORTEST_SECONDS = 1.0
"""A stage that takes less says more about the machine's mood than about scaling."""

GROUP_FACES = 16_384
"""Rows of a row group of the subsets that are written."""


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
    results = Scaling(runs, cpus, nodes, predict(runs, wanted or beyond(workers, sizes)), [], output.root)
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
