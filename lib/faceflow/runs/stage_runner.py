"""One stage of a run: skipped where it is finished, refused where it was made from something else, else run."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any

from faceflow.logs import event
from faceflow.runs.status import Watcher, record_of
from faceflow.stages.base import Context, Redo, Stage, version_of
from faceflow.stages.results import CLASSES, Results, StageResult
from faceflow.storage import manifests
from faceflow.storage.manifests import Fingerprint, Manifest
from faceflow.storage.object_store import Store

log = logging.getLogger("faceflow")


def advance(stage: Stage[Any], context: Context, watcher: Watcher) -> Results | Redo:
    """The results of the run with this stage finished: skipped, refused, or run; or what its gate wants done again."""
    manifest = _finished(stage, context, watcher) or _run(stage, context, watcher)
    _tidy(stage, context.stores.run)
    results = context.results.with_stage(manifest)
    return stage.gate(context.with_results(results)) or results


def _finished(stage: Stage[Any], context: Context, watcher: Watcher) -> Manifest[StageResult] | None:
    """The manifest of a stage that was finished before; None where it is not, or not wholly."""
    manifest = manifests.load(context.stores.run, stage.name, _fingerprint(stage, context), CLASSES[stage.name])
    if manifest is None or not stage.whole(context):
        return None
    log.info(
        "%-8s skipped: finished before, saves %.1f s", stage.name, manifest.seconds,
        extra=event("stage_skipped", stage=stage.name, seconds=manifest.seconds),
    )  # fmt: skip
    watcher.finished(stage.name, manifest.seconds)
    return manifest


def _run(stage: Stage[Any], context: Context, watcher: Watcher) -> Manifest[StageResult]:
    run, executor, fingerprint = context.stores.run, context.executor, _fingerprint(stage, context)
    manifests.begin(run, stage.name, fingerprint)
    log.info("%-8s begins", stage.name, extra=event("stage_begins", stage=stage.name))
    watcher.stage(stage.name)
    executor.working_on(context.stores.run_id, stage.name)
    begun, clock, steps = time.time(), time.perf_counter(), len(executor.usage.steps)
    outcome = stage.run(context)
    seconds = round(time.perf_counter() - clock, 3)
    made = tuple(record_of(step) for step in executor.usage.steps[steps:])
    manifest = Manifest(stage.name, fingerprint, outcome.result, outcome.files, seconds, round(begun, 3), made)
    manifests.finish(run, manifest)
    watcher.finished(stage.name, seconds)
    faces = context.results.with_stage(manifest).ingest.faces
    rate = faces / max(seconds, 1e-3)
    log.info(
        "%-8s %s; %.1f s, %s rows/s", stage.name, outcome.result.summary, seconds, f"{rate:,.0f}",
        extra=event("stage_done", stage=stage.name, seconds=seconds, rows_per_second=round(rate), **_plain(outcome.result)),
    )  # fmt: skip
    return manifest


def _plain(result: StageResult) -> dict[str, object]:
    """The numbers and words of a result, and of what it holds, for the JSON log."""
    plain: dict[str, object] = {}
    for key, value in asdict(result).items():
        if isinstance(value, dict):
            plain |= {f"{key}_{name}": inner for name, inner in value.items() if isinstance(inner, (bool, int, float, str))}
        elif isinstance(value, (bool, int, float, str)):
            plain[key] = value
    return plain


def _tidy(stage: Stage[Any], run: Store) -> None:
    """Remove what is of no use once the stage is done; an interruption may have come before."""
    for folder in stage.scratch:
        run.delete(folder)


def _fingerprint(stage: Stage[Any], context: Context) -> Fingerprint:
    fingerprint = dict(context.config.fingerprint(stage.settings))
    fingerprint |= {f"version of {package}": version_of(package) for package in stage.packages}
    if stage.name == "quantize":
        fingerprint["attempt"] = context.attempt
    fingerprint |= {f"result of {name}": context.results.manifests[name].digest for name in stage.after}
    return {**fingerprint, **stage.inputs(context)}
