"""How far a run is: the driver keeps a small file of it up to date, which `faceflow status` reads from anywhere."""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from faceflow.cluster.step_records import Step
from faceflow.errors import InputError
from faceflow.logs import event
from faceflow.runs.lease import HEARTBEAT, SILENT_AFTER, Lease, LeaseState, is_alive, machine, read_state
from faceflow.runs.records import BEGUN, PUBLISHED, REFUSED, runs_of
from faceflow.setting_types import StorageOptions
from faceflow.storage import layout
from faceflow.storage.manifests import StepRecord
from faceflow.storage.pointer import current_run_id

log = logging.getLogger("faceflow")

TELL_EVERY = 60.0
"""Seconds between two log lines on a running step, where no bar shows it."""


def record_of(step: Step) -> StepRecord:
    """A step as manifests and the lease hold it."""
    return StepRecord(
        step.label, step.tasks, step.rows, step.cpus, round(step.begun, 3), round(step.seconds, 3), step.tasks_done,
        step.rows_done, step.in_flight, round(step.busy_seconds, 3), round(step.longest_seconds, 3), step.read_bytes,
        step.written_bytes, step.peak_bytes, dict(step.retries), step.finished, step.waiting, round(step.share, 4),
    )  # fmt: skip


class Watcher:
    """Records how far a running run is, through its lease."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._stage, self._why = "", ""
        self._step: Step | None = None
        self._seconds: dict[str, float] = {}
        self._began = self._written = self._told = time.monotonic()

    def stage(self, name: str) -> None:
        """A stage begins."""
        self._stage, self._began, self._step = name, time.monotonic(), None
        self._write()

    def finished(self, name: str, seconds: float) -> None:
        """A stage is done, now or before this command."""
        self._seconds[name], self._step = seconds, None
        self._write()

    def stopped(self, why: str) -> None:
        """The run ends before its last stage."""
        self._why = why
        self._write()

    def step(self, step: Step) -> None:
        """Something happened, or a few seconds have passed (`Executor.watch`)."""
        now, self._step = time.monotonic(), step
        if now - self._written >= HEARTBEAT:
            self._write()
        if now - self._told >= TELL_EVERY and not step.finished and not sys.stderr.isatty():
            self._told = now
            rate = step.rows_done / max(step.seconds, 1e-3)
            log.info(
                "%-8s %s: %d of %d tasks, %.0f s%s", self._stage, step.label, step.tasks_done, step.tasks, step.seconds,
                f", {rate:,.0f} rows/s" if step.rows_done else "",
                extra=event("progress", stage=self._stage, **asdict(record_of(step))),
            )  # fmt: skip

    def _write(self) -> None:
        self._written = time.monotonic()
        self._lease.write(
            stage=self._stage, stage_seconds=round(time.monotonic() - self._began, 1), seconds=self._seconds,
            step=record_of(self._step) if self._step is not None else None, stopped=self._why,
        )  # fmt: skip


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    state: `running`, `stopped` (unfinished, and ended or silent for a minute: it can be continued), `published`, `refused` (bad
    input), `superseded` (another run was published first) or `current` (published, and what latest.json names); stage: running
    or next; step: what the stage does, if known; seconds: of each finished stage; left: seconds that the step still takes at
    its pace so far, if known; age: seconds since the last heartbeat; host, pid: the driver's; why: it stopped, if it said so.
    """

    run_id: str
    state: str
    stage: str
    stage_seconds: float
    step: StepRecord | None
    seconds: Mapping[str, float]
    left: float | None
    age: float
    host: str
    pid: int
    why: str


def status(
    output: str, run_id: str | None = None, work_dir: str | None = None, options: StorageOptions | None = None
) -> Status:
    """The state of a run of OUTPUT: the named one, else the one with the last heartbeat.

    Raises InputError where there is no such run.
    """
    out, runs = layout.stores(output, work_dir, options)
    records = {run.run_id: run.record for run in runs_of(out, runs)}
    if run_id is not None and run_id not in records:
        raise InputError(f"{output} has no run {run_id}: `faceflow runs {output}` lists them")
    if not records:
        raise InputError(f"{output} holds no run: name the OUTPUT of a cluster command (and its --work-dir)")
    states = {name: read_state(runs.child(name)) or LeaseState() for name in ([run_id] if run_id else records)}
    name = max(states, key=lambda item: (max(records[item].updated, states[item].updated), item))
    record, state = records[name], states[name]
    updated = datetime.datetime.fromisoformat(max(record.updated, state.updated))
    age = max(0.0, (datetime.datetime.now(datetime.UTC) - updated).total_seconds())
    kind, why = record.state, state.stopped
    if kind == BEGUN:
        if not why and state.machine == machine() and not is_alive(state.pid):
            why = "its process was killed"
        kind = "stopped" if why or age >= SILENT_AFTER else "running"
    elif kind == PUBLISHED and current_run_id(out) == name:
        kind = "current"
    unfinished = kind in ("running", "stopped")
    step, left = state.step if unfinished else None, None
    if kind == "running" and step is not None and not step.finished and step.share:
        left = round(step.seconds * (1 / step.share - 1), 1)
    stage_seconds = state.stage_seconds + (age if kind == "running" else 0.0)
    return Status(
        name, kind, state.stage if unfinished else "", round(stage_seconds, 1), step, state.seconds, left, round(age, 1),
        state.host, state.pid, why,
    )  # fmt: skip


def lines(found: Status) -> list[str]:
    """The status as a person reads it."""
    unfinished = found.state in ("running", "stopped")
    if unfinished:
        shown = [f"run {found.run_id}: {found.state}, last heartbeat {found.age:.0f} s ago"]
        if found.host:
            shown[0] += f" (pid {found.pid} on {found.host})"
    else:
        shown = [f"run {found.run_id}: {found.state}; ended {found.age:.0f} s ago"]
    shown += [f"  {name:9} done in {seconds:,.1f} s" for name, seconds in found.seconds.items()]
    if unfinished and found.stage and found.stage not in found.seconds:
        shown.append(f"  {found.stage:9} running for {found.stage_seconds:,.0f} s")
        if found.step is not None and not found.step.finished:
            shown.append(_step_line(found.step) + (f"; about {found.left:,.0f} s left" if found.left is not None else ""))
    if found.state == "stopped":
        why = found.why or f"No heartbeat for {SILENT_AFTER:.0f} s"
        shown.append(f"  {why}{'' if 'the same command' in why else '; the same command continues it'}")
    elif found.state == REFUSED and found.why:
        shown += [f"  {line}" for line in found.why.splitlines()]
    return shown


def _step_line(step: StepRecord) -> str:
    text = f"    {step.label}: {step.tasks_done:,} of {step.tasks:,} tasks"
    if step.rows:
        rate = step.rows_done / max(step.seconds, 1e-3)
        text += f", {step.rows_done:,} of {step.rows:,} rows, {rate:,.0f} rows/s"
    text += f"; {step.in_flight} in flight, {step.waiting} waiting"
    if step.retries:
        text += f"; retried: {', '.join(f'{count} x {cause}' for cause, count in step.retries.items())}"
    return text
