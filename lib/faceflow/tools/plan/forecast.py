"""Before a run: what it will take on this cluster, and whether it fits."""

from __future__ import annotations

import os
import shutil
import statistics
from dataclasses import dataclass

from faceflow.cluster.executor import Resources
from faceflow.config import ClusterConfig
from faceflow.errors import SettingsError
from faceflow.kernels.ivf import plan as plans
from faceflow.kernels.ivf import quantizer
from faceflow.stages.base import open_executor
from faceflow.stages.detect.stage import assigns_singletons
from faceflow.stages.ingest.parquet_input import common_id_types
from faceflow.stages.ingest.reading import all_footers, columns_of, dimension_of
from faceflow.stages.quantize import full as quantize
from faceflow.storage.inputs import list_faces
from faceflow.storage.object_store import Store
from faceflow.tables import MAX_FACES
from faceflow.tools.plan import costs, preview


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to take. seconds: of each stage (`start`: of a private Ray) and `total`; bytes: of the driver, of
    one worker of the search, of the worker that holds the graph (central), of the run directory; memory: of the machine that is
    to hold the graph; disk_free: None where OUTPUT is not a local disk; problems: why it cannot fit, and what to change."""

    faces: int
    dim: int
    files: int
    sampled: int
    similarity_threshold: float | None
    neighbors: float
    edges: int
    index: str
    cells: int
    probes: float
    seconds: dict[str, float]
    driver_bytes: int
    worker_bytes: int
    central_bytes: int
    disk_bytes: int
    cpus: int
    memory: int
    disk_free: int | None
    problems: list[str]


def plan_run(config: ClusterConfig) -> Forecast:
    """Look at a sample of the input and at the cluster; nothing is written.

    Raises InputError and SettingsError as a run would, as far as footers and a sample can tell.
    """
    store, files, _ = list_faces(config.input, config.storage_options, config.snapshot)
    with open_executor(config.address, config.workers, progress=False) as executor:
        private = executor.is_private
        footers = all_footers(executor, store, [file.path for file in files], columns_of(config))
        common_id_types(footers, None)
        faces = sum(sum(footer.group_rows) for footer in footers)
        if not 0 < faces <= MAX_FACES:
            raise SettingsError(f"input {config.input} has {faces:,} rows: a run takes 1 to {MAX_FACES:,}")
        dim = dimension_of(executor, store, footers, config.embedding_column)
        threads = executor.machine_cpus(config.detect_resource)
        outlook = executor.call(
            preview.look, preview.Look(config, store, tuple(footers), dim, threads), "look",
            resources=Resources(cpus=0, custom=config.detect_resource),
        )  # fmt: skip
        cpus = executor.cpus
        workers = min(cpus, config.workers or cpus)
        flops = statistics.median(executor.call(quantize.measure_flops, dim, "measure") for _ in range(3))
        memory = executor.machine_memory(config.detect_resource)
        cut_for = quantize.workers_of(config, executor)
    load = costs.Workload(
        faces, dim, outlook.neighbors, outlook.edges, outlook.single, outlook.people if assigns_singletons(config) else 0.0,
        outlook.plan.cells, outlook.probes,
        plans.pairs_counted(faces) if config.min_similarity == "auto" else 0,
        min(faces, config.recall_sample), quantizer.ITERATIONS, quantizer.SAMPLE_PER_CELL, plans.held_out_faces(faces),
        config.edges != "threshold", config.engine == "native", outlook.id_bytes, workers, threads, flops,
    )  # fmt: skip
    start = {"start": costs.START_SECONDS} if private else {}
    seconds = start | costs.stage_seconds(load)
    seconds["total"] = sum(seconds.values())
    central, disk = costs.central_bytes(load), costs.disk_bytes(load)
    free = _disk_free(config)
    return Forecast(
        faces, dim, len(files), outlook.sampled, outlook.threshold, round(outlook.neighbors, 1), round(outlook.edges * faces),
        outlook.plan.index, outlook.plan.cells, round(outlook.probes, 2),
        {name: round(value, 1) for name, value in seconds.items()}, costs.DRIVER_BYTES,
        costs.worker_bytes(load, config.neighbors, cut_for), central, disk, cpus, memory, free,
        _problems(config, load, central, disk, memory, free),
    )  # fmt: skip


def _disk_free(config: ClusterConfig) -> int | None:
    store = Store.at(config.work_dir or config.output, config.storage_options)
    if not store.is_local:
        return None
    folder = store.root
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def _problems(
    config: ClusterConfig, load: costs.Workload, central: int, disk: int, memory: int, free: int | None
) -> list[str]:  # fmt: skip
    results = []
    if central > memory:
        room = (memory - costs.BASE_BYTES) / load.faces - costs.FACE_BYTES
        fits = int(room / costs.GRAPH_BYTES)
        advice = f", or --neighbors {fits} (which may split people with more photos)" if 1 <= fits < config.neighbors else ""
        results.append(
            f"link and detect hold the graph in {central / 2**30:,.1f} GiB, and their machine has {memory / 2**30:,.1f} GiB: "
            f"take a larger one (and name it by --detect-resource), a higher --min-similarity{advice}"
        )
    if free is not None and disk > free:
        results.append(
            f"the run directory grows to {disk / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free there: make room, or "
            "give another --work-dir"
        )
    return results


def lines(results: Forecast) -> list[str]:
    """The forecast as a person reads it."""
    gib = 2**30
    threshold = "none" if results.similarity_threshold is None else f"{results.similarity_threshold:.3f}"
    plan = "all pairs" if results.index == "exact" else f"{results.cells:,} cells, {results.probes:.1f} probes a face"
    shown = [
        f"{results.faces:,} faces x {results.dim} in {results.files:,} file(s); {results.sampled:,} looked at",
        f"threshold {threshold}; about {results.neighbors:,.1f} neighbors a face, {results.edges:,} edges; search: {plan}",
        f"on {results.cpus} CPUs, about {results.seconds['total']:,.0f} s:",
    ]
    shown += [f"  {stage:9} {seconds:9,.1f} s" for stage, seconds in results.seconds.items() if stage != "total"]
    shown += [
        f"memory: driver {results.driver_bytes / gib:.2f} GiB; each worker of the search {results.worker_bytes / gib:.1f} GiB; "
        f"link and detect {results.central_bytes / gib:.1f} GiB of {results.memory / gib:.1f} GiB there",
        f"disk: {results.disk_bytes / gib:.2f} GiB at the peak"
        + (f" of {results.disk_free / gib:.1f} GiB free" if results.disk_free is not None else ""),
    ]
    return shown
