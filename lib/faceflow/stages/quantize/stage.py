"""Stage 2, quantize: choose the search plan; train the quantizer and send each face to the shards it probes."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from faceflow import __version__
from faceflow.cluster.executor import Executor, Resources
from faceflow.config import ClusterConfig
from faceflow.errors import SettingsError
from faceflow.kernels.ivf import plan as plans
from faceflow.kernels.ivf import probing, quantizer
from faceflow.kernels.knn import tiles
from faceflow.stages.artifacts import cells
from faceflow.stages.artifacts.faces import read_quantizer, read_vectors
from faceflow.stages.base import Context, Outcome, Past, Stage, merge_sizes
from faceflow.stages.changes import count_active
from faceflow.stages.quantize import threshold
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import QUANTIZER_METADATA

log = logging.getLogger("faceflow")

MOST_ACTIVE, MOST_MOVED_IN_CELLS = 0.25, 0.07
"""Share of faces that may have to be searched in a night for it to be searched as one: past that, all pairs are less work. With
cells fewer may come, change or go, as who must find its neighbors alone probes far more of them (measured at 500,000: level at
7 %)."""

MOST_GROWN = 1.5
"""Growth of the data set since the quantizer was trained, past which its cells are too few."""

THRESHOLDS = ("threshold", "support_threshold", "valley", "impostors_per_face", "pairs", "flank", "near_identical")
"""What a night takes over from the one before: other thresholds would make other graphs."""

FAREST, MOST_UNEVEN = 0.9, 1.5
"""Drift of the quantizer: how near new faces are to their centroids, on average, relative to the faces it was trained on, and
how uneven the cells have become (the mean size of the cell that a face lives in) relative to then."""


def run(context: Context) -> Outcome:
    """Fix the plan; train, order and cut the cells; assign every part. A night keeps last night's, unless `why_anew`."""
    if context.past is not None:
        decided = context.stores.run.read_json(layout.ANEW)
        reason = why_anew(context) if decided is None else str(decided["because"])
        if reason is None:
            outcome, reason = carry(context, context.past)
            if reason is None:
                return outcome
        if decided is not None and not decided.get("cleared"):
            _clear(context.stores.run, reason)
        log.info("plan     every pair is searched again: %s", reason)
        return _run_in_full(context, {"incremental": False, "because": reason, "nights": 0})
    return _run_in_full(context, {"incremental": False, "nights": 0})


def _choose(context: Context) -> plans.Plan:
    config, parts = context.config, context.parts
    if config.cells and config.cells > parts.faces:
        raise SettingsError(f"cells is {config.cells}, but there are only {parts.faces} faces: give fewer cells")
    return plans.choose(
        parts.faces,
        context.dim,
        config.index,
        config.cells,
        config.probes,
        quantizer.ITERATIONS,
        quantizer.SAMPLE_PER_CELL,
        joined=config.min_similarity is not None,
        on_gpu=config.gpus_per_worker > 0,
    )


def why_anew(context: Context) -> str | None:
    """Why this night cannot build on last night's tables, or None where it can: known before anything is computed."""
    config, past = context.config, context.past
    assert past is not None
    if context.effort:
        return "the measured recall was too low"
    before, counts = past.done["quantize"].counts, context.done["ingest"].counts
    settings = {**past.done["quantize"].fingerprint, **past.done["search"].fingerprint}
    for key in (
        "neighbors",
        "min_similarity",
        "edges",
        "index",
        "cells",
        "probes",
        "seed",
        "gpu_float16",
        "version of faceflow",
    ):
        now = __version__ if key.startswith("version") else getattr(config, key)
        if settings.get(key) != now:
            return f"{key.removeprefix('version of ')} was {settings.get(key)}, is {now}"
    if before["nights"] + 1 >= config.full_every:
        return f"the last {config.full_every - 1} nights built on each other (--full-every)"
    moved = counts["added"] + counts["changed"] + counts["removed"]
    if moved > (MOST_ACTIVE if before["index"] == "exact" else MOST_MOVED_IN_CELLS) * counts["faces"]:
        return f"{moved:,} of {counts['faces']:,} faces are new, changed or gone"
    if counts["faces"] > MOST_GROWN * before["trained_faces"]:
        return f"{counts['faces']:,} faces, but the plan was made for {before['trained_faces']:,}"
    plan = _choose(context)
    if plan.index != before["index"]:
        return f"the plan was {before['index']}, and {plan.index} is less work now"
    return None


def carry(context: Context, past: Past) -> tuple[Outcome, str | None]:
    """Keep last night's quantizer and cells and assign the new parts; and why that will not do, if the quantizer drifted."""
    executor, parts, dim, run = context.executor, context.parts, context.dim, context.stores.run
    before = past.done["quantize"].counts
    counts: dict[str, Any] = {"incremental": True, "nights": before["nights"] + 1, "trained_faces": before["trained_faces"]}
    counts |= {key: before[key] for key in (*THRESHOLDS, "index") if key in before}
    last_night = context.last_night
    assert last_night is not None
    counts["active"] = count_active(context, last_night)
    if sum(counts["active"]) > MOST_ACTIVE * parts.faces:
        too_many = f"{sum(counts['active']):,} of {parts.faces:,} faces are new, or lost neighbors out of full tables"
        _clear(run, too_many)
        return Outcome(counts, {}), too_many
    if before["index"] == "exact":
        return Outcome(counts, {}), None
    pieces = {layout.CENTROIDS: run.share(past.run, layout.CENTROIDS, layout.CENTROIDS)}
    old = len(last_night.sources)
    results = executor.map(cells.carry_homes, [(run, last_night, part, dim) for part in range(old)], "carry")
    results += executor.map(cells.settle_part, [(run, part, dim) for part in range(old, len(parts))], "quantize")
    pieces |= merge_sizes([piece for piece, _ in results])
    new_faces = parts.faces - parts.starts[old]
    near = sum(assigned.near for _, assigned in results[old:]) / max(1, new_faces)
    counts |= _tell([assigned for _, assigned in results], parts.faces)
    counts |= {
        key: before[key] for key in ("cells", "shards", "predicted_recall", "exhausted", "trained_near", "trained_uneven")
    }
    counts["new_near"] = round(near, 4)
    reason = None
    if new_faces and near < FAREST * before["trained_near"]:
        reason = f"new faces are {near:.3f} near their centroids, those it was trained on {before['trained_near']:.3f}"
    if counts["uneven"] > MOST_UNEVEN * before["trained_uneven"]:
        reason = f"cells are {counts['uneven']:.2f} uneven, and were {before['trained_uneven']:.2f}"
    if reason is not None:
        _clear(run, reason)
    return Outcome(counts, pieces), reason


def _clear(run: Store, reason: str) -> None:
    """Forget what was carried over. First it is said, then done: whoever continues an interrupted run must not take the cells
    of one quantizer for those of another."""
    run.write_json(layout.ANEW, {"because": reason, "cleared": False})
    for folder in STAGE.writes:
        run.delete(folder)
    run.write_json(layout.ANEW, {"because": reason, "cleared": True})


def _tell(results: Sequence[cells.Assigned], faces: int) -> dict[str, Any]:
    homes = np.sum([np.array(assigned.homes) for assigned in results], axis=0)
    return {
        "near": round(sum(assigned.near for assigned in results) / faces, 4),
        "uneven": round(float((homes.astype(float) ** 2).sum() * len(homes) / faces**2), 3),
    }


def _run_in_full(context: Context, counts: dict[str, Any]) -> Outcome:
    config, parts, dim = context.config, context.parts, context.dim
    run, executor = context.stores.run, context.executor
    plan = _choose(context)
    settled = threshold.settle(context)
    workers = min(executor.cpus, config.workers or executor.cpus)
    flops = executor.call(measure_flops, dim, label="measure") * workers
    log.info("plan     %s (measured: %.0f GFLOP/s with %d workers)", plan.reason(flops), flops / 1e9, workers)
    if settled.get("valley"):
        log.info(
            "threshold %.4f: the similarities of pairs have a valley at %.4f; expected impostor edges a face: %.3g",
            settled["threshold"], settled["valley"], settled["impostors_per_face"],
        )  # fmt: skip
    elif "valley" in settled:
        log.warning(
            "threshold %.4f: no valley between genuine and impostor similarities, so the impostors alone decide; "
            "set --min-similarity if you know a better one",
            settled["threshold"],
        )
    counts = counts | settled | {"index": plan.index, "gflops": round(flops / 1e9, 1), "trained_faces": parts.faces}
    counts |= {"exact_seconds": round(plan.exact_work / flops, 1), "cells_seconds": round(plan.cells_work / flops, 1)}
    if plan.index == "exact":
        return Outcome(counts, {})
    training = Training(
        plan.cells, config.probes, config.neighbors, settled["threshold"], config.seed, workers_of(config, executor),
    )  # fmt: skip
    if not is_whole(run, layout.CENTROIDS):
        executor.call(
            train, run, parts.starts, dim, training, executor.largest_machine_cpus, label="train", resources=Resources(cpus=0)
        )
    rule, _, recall = cells.read_rules(run)
    rule = rule.widened(context.effort, plan.cells)
    results = executor.map(
        cells.assign_part,
        [(run, part, dim, rule) for part in range(len(parts))],
        "quantize",
        sizes=[parts.rows(part) for part in range(len(parts))],
    )
    pieces = merge_sizes([pieces for pieces, _ in results])
    pieces[layout.CENTROIDS] = run.size(layout.CENTROIDS) or 0
    every = [assigned for _, assigned in results]
    travelled = sum(assigned.sent for assigned in every)
    counts |= _tell(every, parts.faces)
    counts |= {
        "mean_probes": round(sum(assigned.probes for assigned in every) / parts.faces, 3),
        "travelled": travelled,
        "bytes_moved": travelled * 4 * dim,
        "cells": plan.cells,
        "shards": len(read_quantizer(run, dim)[1]) - 1,
        "predicted_recall": None if context.effort else recall,
        "exhausted": rule.margin is None and rule.most >= plan.cells,
        "trained_near": counts["near"],
        "trained_uneven": counts["uneven"],
    }
    return Outcome(counts, pieces)


STAGE = Stage(
    name="quantize",
    reads=("vectors",),
    writes=("quantizer", "cells", "homes", "before"),
    settings=("index", "cells", "probes", "neighbors", "min_similarity", "edges", "seed", "full_every"),
    after=("ingest",),
    packages=("faceflow", "numpy", "numba"),
    run=run,
)


def workers_of(config: ClusterConfig, executor: Executor) -> plans.Workers:
    """The workers that the search's shards are cut for; to a Ray that this command did not start, machines may come later."""
    return plans.Workers.of(
        config.workers, config.memory_limit, executor.cpus, executor.worker_memory, fixed=executor.is_private
    )


def measure_flops(dim: int) -> float:
    """Operations a second of one worker's tiles at this dimension; for the predictions only, never for a choice."""
    return tiles.measure_flops(dim)


@dataclass(frozen=True)
class Training:
    """How to make the quantizer; probes None: as many as the predicted recall asks for."""

    cells: int
    probes: int | None
    neighbors: int
    threshold: float | None
    seed: int
    workers: plans.Workers


def sample_rows(faces: int, training: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two seeded uniform samples of the rows 0..faces-1, ascending int64: for training, and for predicting recall.

    They are disjoint where there are faces enough.
    """
    rng = np.random.default_rng([seed, 3])
    drawn = rng.choice(faces, size=min(training + held_out, faces), replace=False)
    return np.sort(drawn[:training]), np.sort(drawn[-held_out:])


def _gather(run: Store, starts: tuple[int, ...], dim: int, rows: np.ndarray) -> np.ndarray:
    out = np.empty((len(rows), dim), np.float32)
    bounds = np.searchsorted(rows, starts)
    for part, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if end > begin:
            np.take(read_vectors(run, part, dim), rows[begin:end] - starts[part], axis=0, out=out[begin:end], mode="clip")
    return out


def train(run: Store, starts: tuple[int, ...], dim: int, training: Training, threads: int) -> None:
    """Train on a seeded sample and choose the probes; write the centroids in locality order, cut into shards."""
    cells = training.cells
    rows, held_out = sample_rows(
        starts[-1],
        cells * quantizer.SAMPLE_PER_CELL,
        plans.held_out_faces(starts[-1]),
        training.seed,
    )
    sample = _gather(run, starts, dim, rows)
    centroids, sizes = quantizer.train(sample, cells, training.seed, threads)
    del sample
    # A cell's share of the tiles' work grows with the square of its size, which the sample estimates.
    load = sizes + 1.0
    order = quantizer.locality_order(centroids, load**2)
    if training.probes is None:
        held = _gather(run, starts, dim, held_out)
        most = min(plans.MAX_PROBES, cells)
        choice = probing.choose_rule(
            held, starts[-1], centroids, training.neighbors, training.threshold, most, *plans.target_recall(starts[-1])
        )
    else:
        rule = probing.ProbeRule(None, min(training.probes, cells))
        choice = probing.Choice(rule, rule.widened(1, cells), float(training.probes), None)
    shards = plans.shard_count(starts[-1], dim, training.neighbors, cells, choice.mean_probes, training.workers)
    cuts = quantizer.shard_starts(load[order] ** 2, shards)
    record = json.dumps(
        {"shard_starts": cuts.tolist(), "recall": choice.recall, "rule": asdict(choice.rule), "alone": asdict(choice.alone)}
    )
    schema = pa.schema([pa.field("centroid", pa.list_(pa.float32(), dim))], metadata={QUANTIZER_METADATA: record})
    column = pa.FixedSizeListArray.from_arrays(pa.array(centroids[order].ravel()), dim)
    run.write_arrow(layout.CENTROIDS, schema, [pa.record_batch([column], schema=schema)])
