"""Stage 5, detect: the pruned graph -> one module per row, by the two-level map equation, in one task beside the data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from faceflow.cluster.executor import Resources
from faceflow.config import ClusterConfig
from faceflow.errors import QualityError
from faceflow.kernels.knn import incremental_search
from faceflow.stages import constraints_file
from faceflow.stages.artifacts.faces import read_column, read_groups
from faceflow.stages.base import Context, Outcome, Stage, version_of
from faceflow.stages.detect import capped_modules, method_input, singletons
from faceflow.stages.detect import constraints as imposed
from faceflow.storage import layout
from faceflow.storage.object_store import Store
from faceflow.tables import MODULES_SCHEMA, SAME, EdgeList, Parts

CHECK_EVERY = 5
"""Nights after which one round of coarse-tuning shows what continuing from last night's modules has cost so far."""


def run(context: Context) -> Outcome:
    """Detect modules over the whole graph; the driver sees only the counts."""
    config, executor = context.config, context.executor
    native = config.engine == "native"
    threads = executor.machine_cpus(config.detect_resource) if native else 1
    counts, pieces = executor.call(
        detect, context.stores.run, context.parts, config.engine, config.flow == "directed", config.seed, config.trials,
        config.verify_codelength, threads, _past_of(context), config.constraints, config.storage_options,
        config.exclusive_column is not None, _other_method(context), context.dim, config.neighbors, assigns_singletons(config),
        label="detect",
        # infomap crashes where faiss, which GPU search loads, was imported after it.
        resources=Resources(
            cpus=0 if native else 1, apart=not native or config.verify_codelength, custom=config.detect_resource
        ),
    )  # fmt: skip
    return Outcome(counts, pieces)


def _other_method(context: Context) -> tuple[str, int, float | None, int | None] | None:
    config = context.config
    if config.method == "infomap":
        return None
    return config.method, context.dim, context.thresholds[0], config.clusters


def assigns_singletons(config: ClusterConfig) -> bool:
    """Whether singletons are given to the nearest cluster where that is significant."""
    if config.adopt != "auto":
        return config.adopt == "always"
    return config.min_similarity == "auto" and config.edges == "auto" and config.method == "infomap"


def _past_of(context: Context) -> tuple[Store, Parts, bool, bool] | None:
    """The run to continue from: last night's, where this night's edges are known to differ from its edges in part only."""
    past, config = context.past, context.config
    if (
        past is None
        or config.engine != "native"
        or config.method != "infomap"
        or not context.done["quantize"].counts["incremental"]
    ):
        return None
    before = past.done["detect"].fingerprint
    if (before.get("method"), before["engine"], before["flow"]) != (
        config.method,
        config.engine,
        config.flow,
    ) or config.trials > 1:
        return None
    return past.run, past.parts, context.done["quantize"].counts["nights"] % CHECK_EVERY == 0, config.edges != "threshold"


STAGE = Stage(
    name="detect",
    reads=("edges", "neighbors", "copies", "vectors"),
    writes=("modules",),
    settings=("method", "clusters", "adopt", "engine", "flow", "seed", "trials", "constraints", "exclusive_column"),
    after=("ingest", "link"),
    packages=("faceflow", "numpy", "numba"),
    inputs=lambda context: constraints_file.fingerprint(context.config) | _package(context.config),
    run=run,
)


def _package(config: ClusterConfig) -> dict[str, Any]:
    return {"version of infomap": version_of("infomap")} if config.engine == "infomap" else {}


class _Again:
    """Iterates anew each time: parts are read one at a time, and none is held, or stays mapped, for longer."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return self._make()


def detect(
    run: Store,
    parts: Parts,
    engine: str,
    directed: bool,
    seed: int,
    trials: int,
    verify: bool,
    threads: int,
    past: tuple[Store, Parts, bool, bool] | None = None,
    constraints: str | None = None,
    options: Mapping[str, Any] | None = None,
    exclusive: bool = False,
    other: tuple[str, int, float | None, int | None] | None = None,
    dim: int = 0,
    neighbors: int = 0,
    adopting: bool = False,
) -> tuple[dict[str, float], dict[str, int]]:
    """Run the engine over all edge parts and write one module per row, part by part; past: the run to continue from;
    constraints: the file of constraints on them, and options of its store; exclusive: whether to keep faces of one photo apart;
    other: the method to use in place of the map equation, the embeddings' dimension, the threshold, how many clusters it is
    told; dim, neighbors: of the embeddings, and of each face at most; adopting: whether faces that stand alone may be adopted.

    Raises QualityError when the codelength is to be verified and the package's differs by more than 1e-6 of it.
    """
    from faceflow.kernels.baselines import registry
    from faceflow.kernels.mapequation import engine as mapequation
    from faceflow.kernels.mapequation import infomap_package

    edges = _Again(
        lambda: (EdgeList.from_batch(run.read_batch(layout.part("edges", p)), parts.starts[p]) for p in range(len(parts)))
    )
    arrays = _Again(lambda: ((e.offsets, e.rows, e.values) for e in edges))
    if other is not None:
        name, _, threshold, clusters = other
        results = registry.cluster(name, method_input.given(run, parts, dim, threshold, clusters, seed, threads))
        partition = mapequation.measure(arrays, results, threads, directed)
    elif engine == "native":
        earlier = mapequation.Earlier(*_earlier(run, parts, edges, *past)) if past is not None else None
        partition = mapequation.detect(arrays, seed, trials, threads, directed, earlier)
    else:
        partition = infomap_package.detect(edges, parts.faces, seed, trials, directed)
    counts: dict[str, float] = {"codelength": partition.codelength}
    if verify:
        theirs = infomap_package.score(edges, partition.modules, directed)
        counts["verified_codelength"] = theirs
        if abs(theirs - partition.codelength) > 1e-6 * max(1.0, abs(theirs)):
            raise QualityError(
                f"the modules' codelength is {partition.codelength}, but the infomap package computes {theirs}: "
                "please report it; --engine infomap avoids it"
            )
    # The codelength is that of the graph's modules, before what follows.
    leader = read_groups(run, parts.faces)
    modules, fixed = partition.modules[leader], np.zeros(parts.faces, bool)
    if other is None:
        modules, joined = capped_modules.join_capped(run, parts, dim, neighbors, modules, edges)
        counts |= joined
    if adopting:
        modules, adopted = singletons.adopt(run, parts, dim, modules, seed, threads)
        counts |= adopted
    if constraints is not None:
        within = functools.partial(_edges_of, edges, leader, np.logical_and)
        modules, fixed, bound = imposed.apply(constraints, options, run, parts, modules, within)
        counts |= bound
    if exclusive:
        touching = functools.partial(_edges_of, edges, leader, np.logical_or)
        modules, moved = imposed.keep_apart(run, parts, modules, fixed, touching)
        counts |= moved
    counts["modules"] = len(np.unique(modules))
    pieces = {}
    flow = partition.flow if partition.flow is not None else np.zeros(parts.faces)
    for part in range(len(parts)):
        selected = slice(parts.starts[part], parts.starts[part + 1])
        columns = [modules[selected], flow[selected], partition.modules[selected]]
        name = layout.part("modules", part)
        pieces[name] = run.write_arrow(name, MODULES_SCHEMA, [pa.record_batch(columns, schema=MODULES_SCHEMA)])
    return counts, pieces


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


def _earlier(
    run: Store, parts: Parts, edges: Iterable[EdgeList], past: Store, past_parts: Parts, check: bool, spread: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Each face's module of last night, one of its own for a new one; whether its edges are others now; its visit rate of
    last night, 0 for a new one; and whether to check what was lost. spread: whether an edge's weight depends on the neighbors
    of both its ends (one step from a changed one is followed; what lies farther is found as rows move)."""
    modules, flow = (read_column(past, "modules", range(len(past_parts)), column) for column in (2, 1))
    before = read_column(run, "past", range(len(parts)))
    changed = read_column(run, "state", range(len(parts))) != SAME
    # Near-identical faces count as one: what changes of any changes its leader, and so does one that comes, goes or leads.
    leader, led = read_groups(run, parts.faces), read_groups(past, past_parts.faces)
    now, was = np.bincount(leader, minlength=len(leader)), np.bincount(led, minlength=len(led))
    changed |= np.where(before >= 0, was[before], 0) != now
    changed[leader[changed]] = True
    active = changed
    if spread:
        active = changed.copy()
        for part in edges:
            selected = slice(part.first_row, part.first_row + len(part.offsets) - 1)
            active[selected] |= incremental_search.leads_to(part.offsets, part.rows, changed)
    start = np.where(before >= 0, modules[before], int(modules.max(initial=-1)) + 1 + np.arange(len(before)))
    return start, active, np.where(before >= 0, flow[before], 0.0), check
