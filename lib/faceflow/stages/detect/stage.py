"""Stage 5, detect: the pruned graph -> one module per row, by the two-level map equation, in one task beside the data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from faceflow.cluster.executor import Resources
from faceflow.config import ClusterConfig
from faceflow.errors import QualityError
from faceflow.stages import constraints_file
from faceflow.stages.artifacts.faces import RunData, read_groups
from faceflow.stages.base import Context, Outcome, Stage, version_of
from faceflow.stages.detect import constraints as imposed
from faceflow.stages.detect import incremental, method_input, rejoining, singletons
from faceflow.stages.results import DetectResult
from faceflow.storage import layout
from faceflow.storage.manifests import Fingerprint
from faceflow.tables import MODULES_SCHEMA, EdgeList, Partition


def run(context: Context) -> Outcome[DetectResult]:
    """Detect modules over the whole graph; the driver sees only the counts."""
    config, executor = context.config, context.executor
    native = config.engine == "native"
    threads = executor.machine_cpus(config.detect_resource) if native else 1
    threshold = context.results.quantize.threshold.similarity
    request = Detect(context.data, config, threshold, threads, incremental.continued(context))
    # infomap crashes where faiss, which GPU search loads, was imported after it.
    resources = Resources(
        cpus=0 if native else 1, apart=not native or config.verify_codelength, custom=config.detect_resource
    )  # fmt: skip
    result, files = executor.call(detect, request, "detect", resources=resources)
    return Outcome(result, files)


def assigns_singletons(config: ClusterConfig) -> bool:
    """Whether singletons are given to the nearest cluster where that is significant."""
    if config.assign_singletons != "auto":
        return config.assign_singletons == "always"
    return config.min_similarity == "auto" and config.edges == "auto" and config.method == "infomap"


def inputs(context: Context) -> Fingerprint:
    """The constraints that are imposed, and the package whose modules they are."""
    return {**constraints_file.fingerprint(context.config), **_packages(context.config)}


def _packages(config: ClusterConfig) -> dict[str, str]:
    return {"version of infomap": version_of("infomap")} if config.engine == "infomap" else {}


STAGE = Stage(
    name="detect",
    reads=("edges", "neighbors", "groups", "vectors"),
    writes=("modules",),
    settings=(
        "method", "clusters", "assign_singletons", "engine", "flow", "seed", "trials", "constraints", "exclusive_column",
    ),
    after=("ingest", "link"),
    packages=("faceflow", "numpy", "numba"),
    inputs=inputs,
    run=run,
)  # fmt: skip


class _Again:
    """Iterates from the start each time: parts are read one at a time, and none stays mapped for longer."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return self._make()


@dataclass(frozen=True)
class Detect:
    """Request: the modules of the whole graph. threshold: similarity from which faces are neighbors; continued: what to start
    from (None: each face by itself)."""

    data: RunData
    config: ClusterConfig
    threshold: float | None
    threads: int
    continued: incremental.Continued | None


def detect(request: Detect) -> tuple[DetectResult, dict[str, int]]:
    """Run the method over all edge parts and write one module per row, part by part; returns the result and the files' bytes.

    Raises QualityError when the codelength is to be verified and the package's differs by more than 1e-6 of it.
    """
    data, config = request.data, request.config
    run, parts = data.store, data.parts
    edges = _Again(
        lambda: (EdgeList.from_batch(run.read_batch(layout.part("edges", p)), parts.starts[p]) for p in range(len(parts)))
    )
    partition = _partition(request, edges)
    verified = _verified(request, edges, partition) if config.verify_codelength else None
    # The codelength is that of the graph's modules, before what follows.
    leader = read_groups(run, parts.faces)
    modules, fixed = partition.modules[leader], np.zeros(parts.faces, bool)
    joined, tried, assigned, bound, absent, moved, left = 0, 0, 0, 0, 0, 0, 0
    if config.method == "infomap":
        modules, joined = rejoining.join_capped(data, config.neighbors, modules, edges)
    if assigns_singletons(config):
        modules, tried, assigned = singletons.assign(data, modules, config.seed, request.threads)
    if config.constraints is not None:
        within = functools.partial(_edges_of, edges, leader, np.logical_and)
        modules, fixed, bound, absent = imposed.impose(data, config.constraints, config.storage_options, modules, within)
    if config.exclusive_column is not None:
        touching = functools.partial(_edges_of, edges, leader, np.logical_or)
        modules, moved, left = imposed.keep_apart(data, modules, fixed, touching)
    result = DetectResult(
        len(np.unique(modules)), partition.codelength, verified, joined, tried, assigned, bound, absent, moved, left
    )  # fmt: skip
    return result, _write(data, modules, partition)


def _partition(request: Detect, edges: Iterable[EdgeList]) -> Partition:
    """The modules of the graph alone, by the method and engine that the settings name."""
    from faceflow.kernels.mapequation import infomap_package
    from faceflow.kernels.mapequation import two_level as mapequation
    from faceflow.kernels.methods import registry

    data, config, threads = request.data, request.config, request.threads
    directed = config.flow == "directed"
    arrays = _Again(lambda: ((e.offsets, e.rows, e.values) for e in edges))
    if config.method != "infomap":
        given = method_input.read(data, request.threshold, config.clusters, config.seed, threads)
        return mapequation.measure(arrays, registry.cluster(config.method, given), threads, directed)
    if config.engine == "native":
        earlier = incremental.start_of(data, edges, request.continued) if request.continued is not None else None
        return mapequation.detect(arrays, config.seed, config.trials, threads, directed, earlier)
    return infomap_package.detect(edges, data.parts.faces, config.seed, config.trials, directed)


def _verified(request: Detect, edges: Iterable[EdgeList], partition: Partition) -> float:
    """The infomap package's codelength of the modules."""
    from faceflow.kernels.mapequation import infomap_package

    theirs = infomap_package.score(edges, partition.modules, request.config.flow == "directed")
    if abs(theirs - partition.codelength) > 1e-6 * max(1.0, abs(theirs)):
        raise QualityError(
            f"the modules' codelength is {partition.codelength}, but the infomap package computes {theirs}: "
            "please report it; --engine infomap avoids it"
        )
    return theirs


def _write(data: RunData, modules: np.ndarray, partition: Partition) -> dict[str, int]:
    run, parts = data.store, data.parts
    files = {}
    flow = partition.flow if partition.flow is not None else np.zeros(parts.faces)
    for part in range(len(parts)):
        rows = slice(parts.starts[part], parts.starts[part + 1])
        columns = [modules[rows], flow[rows], partition.modules[rows]]
        name = layout.part("modules", part)
        files[name] = run.write_arrow(name, MODULES_SCHEMA, [pa.record_batch(columns, schema=MODULES_SCHEMA)])
    return files


def _edges_of(
    edges: Iterable[EdgeList], leader: np.ndarray, ends: np.ufunc, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sources, targets, weights) of the edges with both ends, or either, at a row that the mask bool[N] holds; near-identical
    faces have one of weight 1 to their leader int[N], as they have no other."""
    followers = np.flatnonzero(leader != np.arange(len(leader)))
    followers = followers[ends(mask[followers], mask[leader[followers]])]
    results: list[tuple[np.ndarray, ...]] = [
        (followers, leader[followers].astype(np.int64), np.ones(len(followers), np.float32))
    ]
    for part in edges:
        sources = part.sources()
        kept = ends(mask[sources], mask[part.rows])
        results.append((sources[kept].astype(np.int64), part.rows[kept].astype(np.int64), part.values[kept]))
    return tuple(np.concatenate(columns) for columns in zip(*results, strict=True))  # type: ignore[return-value]
