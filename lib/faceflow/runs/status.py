"""How far a run is: the driver keeps a small file of it up to date, which `faceflow status` reads from anywhere."""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from faceflow.cluster.usage import Step
from faceflow.errors import InputError
from faceflow.logs import event
from faceflow.runs.lease import HEARTBEAT, SILENT_AFTER, Lease, is_alive, machine
from faceflow.storage import layout

log = logging.getLogger("faceflow")

TELL_EVERY = 60.0
"""Seconds between two log lines on a step at work, where no bar shows it."""


class Watcher:
    """Says where a run is while it is at work, through the lease on it."""

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
                extra=event("progress", stage=self._stage, **step.as_dict()),
            )  # fmt: skip

    def _write(self) -> None:
        self._written = time.monotonic()
        self._lease.write(
            stage=self._stage, stage_seconds=round(time.monotonic() - self._began, 1), seconds=self._seconds,
            step=self._step.as_dict() if self._step is not None else None, stopped=self._why,
        )  # fmt: skip


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    state: `at work`, `stopped` (unfinished, and ended or silent for a minute: it can be continued), `published`, `refused` (bad
    input), `superseded` (a night before which another run was published) or `in force` (published, and what latest.json names);
    stage: at work or next; step: what the stage does (`cluster.usage.Step`, as a dictionary), if known; seconds: of each
    finished stage; left: seconds that the step still takes at its pace so far, if known; age: seconds since it last spoke;
    host, pid: the driver's; why: it stopped, if it said so.
    """

    run_id: str
    state: str
    stage: str
    stage_seconds: float
    step: Mapping[str, Any] | None
    seconds: Mapping[str, float]
    left: float | None
    age: float
    host: str
    pid: int
    why: str


def status(
    output: str, run_id: str | None = None, work_dir: str | None = None, options: Mapping[str, Any] | None = None
) -> Status:
    """The state of a run of OUTPUT: the named one, else the one that spoke last.

    Raises InputError where there is no such run.
    """
    out, runs = layout.stores(output, work_dir, options)
    records = {name: runs.read_json(f"{name}/{layout.RUN_RECORD}") for name in runs.names("")}
    results = {name: record for name, record in records.items() if record and layout.is_run_of(record, out, runs)}
    if run_id is not None and run_id not in results:
        raise InputError(f"{output} has no run {run_id}: `faceflow runs {output}` lists them")
    if not results:
        raise InputError(f"{output} holds no run: name the OUTPUT of a cluster command (and its --work-dir)")
    spoken = {name: runs.read_json(f"{name}/{layout.PROGRESS}") or {} for name in ([run_id] if run_id else results)}
    name = max(spoken, key=lambda item: (str(max(results[item]["updated"], spoken[item].get("updated", ""))), item))
    record, state = results[name], spoken[name]
    updated = datetime.datetime.fromisoformat(max(record["updated"], state.get("updated", "")))
    age = max(0.0, (datetime.datetime.now(datetime.UTC) - updated).total_seconds())
    kind = record["state"]
    if kind == "begun":
        if not state.get("stopped") and state.get("machine") == machine() and not is_alive(state["pid"]):
            state["stopped"] = "its process was killed"
        kind = "stopped" if state.get("stopped") or age >= SILENT_AFTER else "at work"
    elif kind == "published" and (layout.read_latest(out) or {}).get("run_id") == name:
        kind = "in force"
    step, stage = state.get("step"), state.get("stage", "")
    if kind not in ("at work", "stopped"):
        step, stage = None, ""
    left = None
    if kind == "at work" and step and not step["finished"] and step["share"]:
        left = round(step["seconds"] * (1 / step["share"] - 1), 1)
    stage_seconds = state.get("stage_seconds", 0.0) + (age if kind == "at work" else 0.0)
    return Status(
        name, kind, stage, round(stage_seconds, 1), step, state.get("seconds", {}), left,
        round(age, 1), state.get("host", ""), state.get("pid", 0), state.get("stopped", ""),
    )  # fmt: skip


def lines(results: Status) -> list[str]:
    """The status as a person reads it."""
    if results.state in ("at work", "stopped"):
        shown = [f"run {results.run_id}: {results.state}, last heard of {results.age:.0f} s ago"]
        if results.host:
            shown[0] += f" (process {results.pid} on {results.host})"
    else:
        state = "published, its labels are in force" if results.state == "in force" else results.state
        shown = [f"run {results.run_id}: {state}; ended {results.age:.0f} s ago"]
    shown += [f"  {name:9} done in {seconds:,.1f} s" for name, seconds in results.seconds.items()]
    if results.state in ("at work", "stopped") and results.stage and results.stage not in results.seconds:
        shown.append(f"  {results.stage:9} at work for {results.stage_seconds:,.0f} s")
        if results.step is not None and not results.step["finished"]:
            step = results.step
            text = f"    {step['label']}: {step['tasks_done']:,} of {step['tasks']:,} tasks"
            if step["rows"]:
                rate = step["rows_done"] / max(step["seconds"], 1e-3)
                text += f", {step['rows_done']:,} of {step['rows']:,} rows, {rate:,.0f} rows/s"
            text += f"; {step['in_flight']} in flight, {step['waiting']} waiting"
            if step["retries"]:
                text += f"; tried again: {', '.join(f'{count} x {cause}' for cause, count in step['retries'].items())}"
            shown.append(text + (f"; about {results.left:,.0f} s left" if results.left is not None else ""))
    if results.state == "stopped":
        why = results.why or "it fell silent"
        shown.append(f"  {why}{'' if 'the same command' in why else '; the same command continues it'}")
    elif results.state == "refused" and results.why:
        shown += [f"  {line}" for line in results.why.splitlines()]
    return shown
