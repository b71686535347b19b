"""What lies under an OUTPUT: its runs, and removing those that are no longer of use."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from faceflow.errors import InputError, SettingsError
from faceflow.runs.lease import read_state
from faceflow.runs.records import runs_of
from faceflow.setting_types import StorageOptions
from faceflow.storage import layout
from faceflow.storage.object_store import Store
from faceflow.storage.pointer import current_run_id

log = logging.getLogger("faceflow")

MAY_RUN_HOURS = 24
"""An unfinished run that was begun, continued or sent a heartbeat within this time may be running, and is never removed."""


@dataclass(frozen=True)
class RunInfo:
    """One run directory. state: published (it was the current one once), begun (can be continued) or refused (bad input);
    current: latest.json names it; stage: the furthest stage begun; updated: its last heartbeat;
    size: bytes of the run directory; label_size: of its labels and quarantined rows under OUTPUT."""

    run_id: str
    state: str
    current: bool
    stage: str
    updated: datetime.datetime
    size: int
    label_size: int

    def age(self, now: datetime.datetime) -> str:
        seconds = int((now - self.updated).total_seconds())
        for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
            if seconds >= 2 * length:
                return f"{seconds // length} {unit}"
        return f"{max(0, seconds)} s"


def list_runs(output: str, work_dir: str | None = None, options: StorageOptions | None = None) -> list[RunInfo]:
    """Every run of OUTPUT, the newest first. Raises InputError where there is no OUTPUT of faceflow."""
    out, runs = layout.stores(output, work_dir, options)
    current = current_run_id(out)
    found = []
    for run in runs_of(out, runs):
        name = run.run_id
        begun = {file.split(".")[0] for file in runs.names(f"{name}/manifests")}
        labels = out.total_size(layout.label_folder(name)) + out.total_size(layout.quarantined_folder(name))
        state = read_state(runs.child(name))
        heartbeat = state.updated if state is not None else ""
        found.append(
            RunInfo(
                name, run.record.state, name == current,
                next((stage for stage in reversed(layout.STAGES) if stage in begun), "none"),
                datetime.datetime.fromisoformat(max(run.record.updated, heartbeat)), runs.total_size(name), labels,
            )
        )  # fmt: skip
    if current is None and not found:
        raise InputError(f"{output} holds no run and no {layout.LATEST}: name the OUTPUT of a cluster command")
    return sorted(found, key=lambda run: (run.updated, run.run_id), reverse=True)


def clean(
    output: str, keep: int, work_dir: str | None = None, options: StorageOptions | None = None, dry_run: bool = False
) -> list[RunInfo]:
    """Remove all but the `keep` newest runs, with their labels; returns those removed (with dry_run: that would be). What
    killed writers left behind a day ago or earlier goes too.

    The current run is never removed and not counted, and neither is one that may be running. The record of a run goes last,
    so that an interrupted removal shows up as a run and is taken up again.
    """
    if keep < 0:
        raise SettingsError(f"keep is {keep}: it must be 0 or more")
    out, runs = layout.stores(output, work_dir, options)
    now = datetime.datetime.now(datetime.UTC)
    safe = now - datetime.timedelta(hours=MAY_RUN_HOURS)
    every = list_runs(output, work_dir, options)
    old = [run for run in every if not run.current][keep:]
    removed = [run for run in old if run.state != "begun" or run.updated < safe]
    if not dry_run:
        _remove_leftovers([out.child(folder) for folder in layout.OUTPUT_FOLDERS], safe)
        _remove_leftovers([runs.child(run.run_id) for run in every], safe)
    for run in removed if not dry_run else []:
        for folder in (*layout.PUBLISHED, layout.compare_folder):
            out.delete(folder(run.run_id))
        for name in runs.names(run.run_id):
            if name != layout.RUN_RECORD:
                runs.delete(f"{run.run_id}/{name}")
        runs.delete(run.run_id)
    return removed


def _remove_leftovers(stores: Sequence[Store], before: datetime.datetime) -> None:
    """Remove what killed writers left behind. Where that is not allowed, the runs can be removed all the same."""
    for store in stores:
        try:
            store.remove_leftovers(before.timestamp())
        except OSError as error:
            log.warning("what killed writers left below %s stays: %s", store.root, error)
            return
