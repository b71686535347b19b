"""The run that an incremental run builds on: whether it is whole, and whether anything has changed since."""

from __future__ import annotations

import logging

from faceflow.config import ClusterConfig
from faceflow.runs.stages import STAGES
from faceflow.stages import constraints_file
from faceflow.stages.base import BaseRun
from faceflow.stages.results import Results
from faceflow.storage import manifests
from faceflow.storage.object_store import Store

log = logging.getLogger("faceflow")


def find_base(runs: Store, run_id: str | None) -> BaseRun | None:
    """The current run, if an incremental run can build on it."""
    if run_id is None:
        return None
    run = runs.child(run_id)
    results = Results.read(run)
    lost = "a manifest" if results.missing else None
    for stage in STAGES if lost is None else ():
        lost = lost or manifests.missing(run, results.manifests[stage.name], stage.scratch)
    if lost is not None:
        log.warning(
            "the directory of the current run %s is not complete (%s is missing): full run, with new cluster ids", run_id, lost
        )  # fmt: skip
        return None
    return BaseRun(run_id, run, results)


def nothing_new(config: ClusterConfig, base: BaseRun, files: object) -> bool:
    """Whether a run with these settings on these files would be the base run again."""
    made_from: dict[str, object] = {}
    for manifest in base.results.manifests.values():
        made_from |= manifest.fingerprint
    now = config.public()
    same = all(made_from[key] == now[key] for stage in STAGES for key in stage.settings if key in made_from)
    same &= made_from.get("constraints_file") == constraints_file.fingerprint(config).get("constraints_file")
    return same and not config.verify_content and made_from["input_files"] == files and config.run_id is None


def warn_of_dropped_constraints(config: ClusterConfig, base: BaseRun) -> None:
    """Say which constraints of the base run this one does not name: they no longer hold."""
    before = base.results.manifests["detect"].fingerprint
    if before.get("constraints") and config.constraints is None:
        log.warning("run %s had constraints, and this run has none (--constraints): they no longer hold", base.run_id)
    if before.get("exclusive_column") and config.exclusive_column is None:
        log.warning(
            "run %s kept faces apart by column %r, and this run does not (--exclusive-column)",
            base.run_id, before["exclusive_column"],
        )  # fmt: skip
