"""Which run a command works on: a named one, an unfinished one that it continues, or a new one; and what becomes of the
others."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping

from faceflow.config import ClusterConfig
from faceflow.errors import SettingsError
from faceflow.runs import lease
from faceflow.runs.lease import FencedStore, Lease
from faceflow.runs.records import (
    BEGUN,
    PUBLISHED,
    SUPERSEDED,
    IncrementalKey,
    RunRecord,
    read_record,
    runs_of,
    utc_now,
    write_record,
)
from faceflow.storage import layout
from faceflow.storage.object_store import Store
from faceflow.storage.pointer import current_run_id

log = logging.getLogger("faceflow")

NOT_IDENTITY = (
    "workers", "address", "run_id", "work_dir", "gpus_per_worker", "search_resource", "detect_resource", "memory_limit",
    "min_recall", "raise_probes", "verify_codelength", "max_bad_fraction", "restart", "thumbnails", "labels_table",
)  # fmt: skip
"""Settings that do not change the labels: a run may be continued with others."""


def choose_run(
    config: ClusterConfig, output: Store, runs: Store, incremental: IncrementalKey | None
) -> tuple[str, Lease]:  # fmt: skip
    """The run to work on, and its lease: the named one, the newest unfinished one of this OUTPUT with these settings (an
    incremental one: also of the same input and base run), or a new one.

    Raises RunError where another process holds its lease, SettingsError where the named run is another OUTPUT's.
    """
    run_id = config.run_id
    if run_id is None:
        wanted = _identity(config.public())
        fitting = [
            run.run_id for run in runs_of(output, runs)
            if run.record.state == BEGUN and run.record.incremental == incremental
            and _identity(run.record.settings) == wanted
        ]  # fmt: skip
        run_id = fitting[-1] if fitting else None
    elif (record := read_record(runs.child(run_id))) is not None and not record.is_of(output, runs):
        raise SettingsError(f"run {run_id} of {runs.root} is of another OUTPUT, {record.output}: choose another --run-id")
    if run_id is None:
        run_id = f"{utc_now().strftime('%Y%m%dT%H%M%SZ')}-{secrets.token_hex(2)}"
    elif config.run_id is None and not config.restart:
        log.info("run %s is unfinished and has the same settings: continuing it", run_id)
    taken = lease.claim(runs.child(run_id), run_id)
    try:
        _begin(config, FencedStore.of(output, taken), FencedStore.of(runs, taken), run_id, incremental)
    except BaseException:
        taken.release()
        raise
    return run_id, taken


def _begin(
    config: ClusterConfig, output: Store, runs: Store, run_id: str, incremental: IncrementalKey | None
) -> None:  # fmt: skip
    """Record that a run is begun, or continued; with `restart`, remove what it has done, its record last."""
    # The lease stays, and so does what guards it on a disk.
    kept = (layout.RUN_RECORD, layout.PROGRESS, f".{layout.PROGRESS}.lock")
    done = [name for name in runs.names(run_id) if name not in kept]
    known = read_record(runs.child(run_id))
    if config.restart and (done or known is not None):
        # Read now: another process may have published the run while this one waited for its lease.
        if run_id == current_run_id(output):
            raise SettingsError(f"run {run_id} is published: it cannot be begun again; choose another --run-id")
        log.info("run %s is restarted: its files are removed", run_id)
        for name in done:
            runs.delete(f"{run_id}/{name}")
        for folder in (*layout.PUBLISHED, layout.events_folder):
            output.delete(folder(run_id))
        runs.delete(f"{run_id}/{layout.RUN_RECORD}")
        known = None
    if known is None:
        write_record(runs.child(run_id), RunRecord.begin(config, incremental))
    elif known.state != PUBLISHED:
        write_record(runs.child(run_id), known.now(BEGUN))  # also one that was refused, or superseded


def settle(runs: Store, run_id: str) -> None:
    """Record of the current run that it is published: an interruption may have come between the two."""
    record = read_record(runs.child(run_id))
    if record is not None and record.state == BEGUN:
        write_record(runs.child(run_id), record.now(PUBLISHED))


def give_up(output: Store, runs: Store, run_id: str) -> None:
    """Give up an incremental run before which another was published: deletes its output, so that its events are not mistaken
    for a published run's."""
    for folder in (*layout.PUBLISHED, layout.events_folder):
        output.delete(folder(run_id))
    record = read_record(runs.child(run_id))
    if record is not None:
        write_record(runs.child(run_id), record.now(SUPERSEDED))


def give_up_superseded(output: Store, runs: Store, incremental: IncrementalKey) -> None:
    """Give up unfinished incremental runs of another input or base run than this one, unless they may be running."""
    for run in runs_of(output, runs):
        name, record = run.run_id, run.record
        if record.state != BEGUN or record.incremental in (None, incremental) or name == incremental.base:
            continue
        if lease.is_silent(runs.child(name)) and lease.fence_off(runs.child(name), name, SUPERSEDED):
            if name == current_run_id(output):
                continue  # it was published since this command looked
            log.info("run %s is unfinished and given up: its input, or the current run, has changed", name)
            give_up(output, runs, name)


def _identity(settings: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in settings.items() if key not in NOT_IDENTITY}
