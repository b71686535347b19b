"""Records of runs: which one a command works on. What a run computes is the pipeline's."""

from __future__ import annotations

import datetime
import logging
import secrets
from typing import Any

from faceflow.config import ClusterConfig
from faceflow.errors import SettingsError
from faceflow.runs import lease
from faceflow.runs.lease import FencedStore, Lease
from faceflow.storage import layout
from faceflow.storage.object_store import Store

log = logging.getLogger("faceflow")

NOT_IDENTITY = (
    "workers",
    "address",
    "run_id",
    "work_dir",
    "gpus_per_worker",
    "search_resource",
    "detect_resource",
    "memory_limit",
    "min_recall",
    "raise_probes",
    "verify_codelength",
    "max_bad_fraction",
    "restart",
    "thumbnails",
    "labels_table",
)
"""Settings that do not change the labels: a run may be continued with others."""


def record(config: ClusterConfig, state: str, night: dict[str, Any] | None) -> dict[str, Any]:
    """What run.json says of a run in this state; night: what an unfinished night must have in common with one that goes on."""
    output, runs = layout.stores(config.output, config.work_dir, config.storage_options)
    results = {
        "state": state, "settings": config.public(), "updated": now().isoformat(timespec="milliseconds"),
        "output": output.root, "runs": runs.root,
    }  # fmt: skip
    return results | ({"night": night} if night is not None else {})


def choose_run(config: ClusterConfig, output: Store, runs: Store, night: dict[str, Any] | None) -> tuple[str, Lease]:
    """The run to work on, and its lease: the named one, the newest unfinished one of this OUTPUT with these settings (a
    night's: also of the same input, after the same run, as last night's failure must not stand in tonight's way), or a new one.

    Raises RunError where another process holds its lease, SettingsError where the named run is another OUTPUT's.
    """
    wanted = _identity(config.public())
    run_id = config.run_id
    if run_id is None:
        for name in reversed(runs.names("")):
            results = runs.read_json(f"{name}/{layout.RUN_RECORD}")
            if not (results and results["state"] == "begun" and results.get("night") == night):
                continue
            if not layout.is_run_of(results, output, runs):
                continue
            if _identity(results["settings"]) == wanted:
                run_id = name
                break
    elif (results := runs.read_json(f"{run_id}/{layout.RUN_RECORD}")) and not layout.is_run_of(results, output, runs):
        raise SettingsError(
            f"run {run_id} of {runs.root} is of another OUTPUT, {results.get('output')}: choose another --run-id"
        )
    if run_id is None:
        run_id = f"{now().strftime('%Y%m%dT%H%M%SZ')}-{secrets.token_hex(2)}"
    elif config.run_id is None and not config.restart:
        log.info("run %s is unfinished and has the same settings: continuing it", run_id)
    taken = lease.claim(runs.child(run_id), run_id)
    try:
        _begin(config, FencedStore.of(output, taken), FencedStore.of(runs, taken), run_id, night)
    except BaseException:
        taken.release()
        raise
    return run_id, taken


def _begin(config: ClusterConfig, output: Store, runs: Store, run_id: str, night: dict[str, Any] | None) -> None:
    """Note that a run is begun, or continued; with `restart`, remove what it has done, its record last."""
    named = f"{run_id}/{layout.RUN_RECORD}"
    # The lease stays, and so does what guards it on a disk.
    kept = (layout.RUN_RECORD, layout.PROGRESS, f".{layout.PROGRESS}.lock")
    done = [name for name in runs.names(run_id) if name not in kept]
    known = runs.read_json(named)
    if config.restart and (done or known is not None):
        # Read now: another process may have published the run while this one waited for its lease.
        if run_id == (layout.read_latest(output) or {}).get("run_id"):
            raise SettingsError(f"run {run_id} is published: it cannot be begun again; choose another --run-id")
        log.info("run %s is begun again: what it had done is removed", run_id)
        for name in done:
            runs.delete(f"{run_id}/{name}")
        for folder in (*layout.PUBLISHED, layout.events_folder):
            output.delete(folder(run_id))
        runs.delete(named)
        known = None
    if known is None:
        runs.write_json(named, record(config, "begun", night))
    elif known["state"] != "published":
        _note(runs, run_id, known, "begun")  # also one that was refused, or superseded: it is at work again


def settle(runs: Store, run_id: str) -> None:
    """Note of a run whose labels are in force that it is published: an interruption may have come between the two."""
    results = runs.read_json(f"{run_id}/{layout.RUN_RECORD}") or {}
    if results.get("state") == "begun":
        _note(runs, run_id, results, "published")


def give_up(output: Store, runs: Store, run_id: str) -> None:
    """A night that can no longer publish, as another run came first: what it has put under OUTPUT goes, lest its events be
    taken for those of a run that was in force."""
    for folder in (*layout.PUBLISHED, layout.events_folder):
        output.delete(folder(run_id))
    _note(runs, run_id, runs.read_json(f"{run_id}/{layout.RUN_RECORD}") or {}, "superseded")


def give_up_superseded(output: Store, runs: Store, night: dict[str, Any]) -> None:
    """Give up unfinished nights of another input or after another run than this one, unless somebody may be at work on them."""
    for name in runs.names(""):
        results = runs.read_json(f"{name}/{layout.RUN_RECORD}") or {}
        if results.get("state") != "begun" or results.get("night") in (None, night) or name == night["past"]:
            continue
        if not layout.is_run_of(results, output, runs):
            continue
        if lease.is_silent(runs.child(name)) and lease.fence_off(runs.child(name), name, "superseded"):
            if name == (layout.read_latest(output) or {}).get("run_id"):
                continue  # it was published since this command looked
            log.info("run %s, which was not finished, is given up: its input, or the run in force, is another now", name)
            give_up(output, runs, name)


def _note(runs: Store, run_id: str, results: dict[str, Any], state: str) -> None:
    runs.write_json(
        f"{run_id}/{layout.RUN_RECORD}", results | {"state": state, "updated": now().isoformat(timespec="milliseconds")}
    )


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in NOT_IDENTITY}


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
