"""One stage of a run: skipped where it is finished, refused where it was made from something else, else run."""

from __future__ import annotations

import logging
import time
from typing import Any

from faceflow.logs import event
from faceflow.runs.status import Watcher
from faceflow.stages.base import Context, Stage, version_of
from faceflow.storage import manifests
from faceflow.storage.manifests import Manifest
from faceflow.storage.object_store import Store

log = logging.getLogger("faceflow")


def advance(stage: Stage, context: Context, watcher: Watcher) -> Manifest:
    """Skip a finished stage, refuse one made from something else, or run it."""
    run = context.stores.run
    fingerprint = _fingerprint(stage, context)
    finished = manifests.load(run, stage.name, fingerprint)
    if finished is not None and stage.whole(context):
        log.info(
            "%-8s skipped: finished before, saves %.1f s", stage.name, finished.seconds,
            extra=event("stage_skipped", stage=stage.name, seconds=finished.seconds),
        )  # fmt: skip
        watcher.finished(stage.name, finished.seconds)
        _tidy(stage, run)
        return finished
    manifests.begin(run, stage.name, fingerprint)
    log.info("%-8s begins", stage.name, extra=event("stage_begins", stage=stage.name))
    watcher.stage(stage.name)
    executor = context.executor
    executor.at_work(context.stores.run_id, stage.name)
    begun, clock, steps = time.time(), time.perf_counter(), len(executor.usage.steps)
    outcome = stage.run(context)
    seconds = round(time.perf_counter() - clock, 3)
    made = [step.as_dict() for step in executor.usage.steps[steps:]]
    manifest = Manifest(stage.name, fingerprint, outcome.counts, outcome.files, seconds, round(begun, 3), made)
    manifests.finish(run, manifest)
    watcher.finished(stage.name, seconds)
    _tidy(stage, run)
    faces = context.parts.faces if "ingest" in context.done else outcome.counts["faces"]
    plain = {
        key: value for key, value in outcome.counts.items() if value is not None and not isinstance(value, (list, tuple, dict))
    }
    shown = ", ".join(
        f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in plain.items()
    )
    rate = faces / max(seconds, 1e-3)
    log.info(
        "%-8s done in %.1f s, %s rows/s (%s)", stage.name, seconds, f"{rate:,.0f}", shown,
        extra=event("stage_done", stage=stage.name, seconds=seconds, rows_per_second=round(rate), **plain),
    )  # fmt: skip
    return manifest


def _tidy(stage: Stage, run: Store) -> None:
    """Remove what is of no use once the stage is done; an interruption may have come before."""
    for folder in stage.scratch:
        run.delete(folder)


def _fingerprint(stage: Stage, context: Context) -> dict[str, Any]:
    fingerprint: dict[str, Any] = dict(context.config.fingerprint(stage.settings))
    fingerprint |= {f"version of {package}": version_of(package) for package in stage.packages}
    if stage.name == "quantize":
        fingerprint["effort"] = context.effort
    fingerprint |= {f"result of {name}": context.done[name].digest for name in stage.after}
    return fingerprint | stage.inputs(context)
