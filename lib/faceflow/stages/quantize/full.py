"""Full quantize: the plan, the threshold, and for the cells plan a trained quantizer with every face assigned to its cells."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from faceflow.cluster.executor import Executor, Resources
from faceflow.config import ClusterConfig
from faceflow.errors import SettingsError
from faceflow.kernels.ivf import plan as plans
from faceflow.kernels.ivf import quantizer
from faceflow.kernels.knn import tile_kernel
from faceflow.stages.artifacts import cell_assignments
from faceflow.stages.artifacts.faces import read_quantizer
from faceflow.stages.base import Context, Outcome, merge_sizes
from faceflow.stages.quantize import threshold
from faceflow.stages.quantize.training import TrainQuantizer, train
from faceflow.stages.results import CellsResult, QuantizeResult, ThresholdResult
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole

log = logging.getLogger("faceflow")


def choose_plan(context: Context) -> plans.Plan:
    """The search plan that is predicted to be less work, or the one that the settings name."""
    config, parts = context.config, context.parts
    if config.cells and config.cells > parts.faces:
        raise SettingsError(f"cells is {config.cells}, but there are only {parts.faces} faces: give fewer cells")
    return plans.choose(
        parts.faces, context.data.dim, config.index, config.cells, config.probes, quantizer.ITERATIONS,
        quantizer.SAMPLE_PER_CELL, joined=config.min_similarity is not None, on_gpu=config.gpus_per_worker > 0,
    )  # fmt: skip


def spread_of(assigned: Sequence[cell_assignments.Assigned], faces: int) -> tuple[float, float]:
    """(mean similarity to the centroids, unevenness of the cells) of all parts (`results.CellsResult`)."""
    sizes = np.sum([np.array(part.faces) for part in assigned], axis=0)
    similarity = sum(part.similarity for part in assigned) / faces
    return round(similarity, 4), round(float((sizes.astype(float) ** 2).sum() * len(sizes) / faces**2), 3)


def run(context: Context, reason: str | None = None) -> Outcome[QuantizeResult]:
    """Choose the plan and the threshold; train, order and cut the cells; assign every part. reason: why not incremental."""
    config, parts, executor = context.config, context.parts, context.executor
    plan = choose_plan(context)
    chosen = threshold.choose(context)
    workers = min(executor.cpus, config.workers or executor.cpus)
    flops = executor.call(measure_flops, context.data.dim, "measure") * workers
    log.info("plan     %s (measured: %.0f GFLOP/s with %d workers)", plan.reason(flops), flops / 1e9, workers)
    _log_threshold(chosen)
    made, files = None, dict[str, int]()
    if plan.index == "cells":
        made, files = _make_cells(context, plan.cells, chosen)
    result = QuantizeResult(
        plan.index, chosen, parts.faces, reason=reason, cells=made, gflops=round(flops / 1e9, 1),
        exact_seconds=round(plan.exact_work / flops, 1), cells_seconds=round(plan.cells_work / flops, 1),
    )  # fmt: skip
    return Outcome(result, files)


def _log_threshold(chosen: ThresholdResult) -> None:
    if not chosen.automatic:
        return
    if chosen.valley is not None:
        log.info(
            "threshold %.4f: similarities of genuine and impostor pairs part at %.4f; expected impostors per face: %.3g",
            chosen.similarity, chosen.valley, chosen.impostors_per_face,
        )  # fmt: skip
    else:
        log.warning(
            "threshold %.4f: no valley between genuine and impostor similarities, so the impostors alone decide; "
            "set --min-similarity if you know a better one",
            chosen.similarity,
        )


def _make_cells(context: Context, count: int, chosen: ThresholdResult) -> tuple[CellsResult, dict[str, int]]:
    config, executor, data = context.config, context.executor, context.data
    if not is_whole(data.store, layout.CENTROIDS):
        training = TrainQuantizer(
            data, count, config.probes, config.neighbors, chosen.similarity, config.seed, workers_of(config, executor),
            executor.largest_machine_cpus,
        )  # fmt: skip
        executor.call(train, training, "train", resources=Resources(cpus=0))
    rule, _, recall = cell_assignments.read_rules(data.store)
    rule = rule.widened(context.attempt, count)
    assigned = executor.map(
        cell_assignments.assign_part,
        [cell_assignments.AssignPart(data, part, rule) for part in range(len(data.parts))],
        "quantize",
        sizes=[data.parts.rows(part) for part in range(len(data.parts))],
    )
    files = merge_sizes([part.files for part in assigned])
    files[layout.CENTROIDS] = data.store.size(layout.CENTROIDS) or 0
    similarity, unevenness = spread_of(assigned, data.parts.faces)
    sent = sum(part.sent for part in assigned)
    made = CellsResult(
        count, len(read_quantizer(data.store, data.dim)[1]) - 1, similarity, unevenness, similarity, unevenness,
        mean_probes=round(sum(part.probes for part in assigned) / data.parts.faces, 3), sent=sent,
        bytes_moved=sent * 4 * data.dim, predicted_recall=None if context.attempt else recall,
        exhausted=rule.margin is None and rule.most >= count,
    )  # fmt: skip
    return made, files


def workers_of(config: ClusterConfig, executor: Executor) -> plans.Workers:
    """The workers that the search's shards are cut for; to a Ray that this command did not start, machines may come later."""
    return plans.Workers.of(
        config.workers, config.memory_limit, executor.cpus, executor.worker_memory, fixed=executor.is_private
    )


def measure_flops(dim: int) -> float:
    """Operations a second of one worker's tiles at this dimension; for the predictions only, never for a choice."""
    return tile_kernel.measure_flops(dim)
