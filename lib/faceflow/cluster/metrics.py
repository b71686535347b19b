"""Prometheus metrics of a run, through Ray: each node's metrics agent exports them as `ray_faceflow_…`."""

from __future__ import annotations

from typing import Any

from faceflow.cluster.step_records import Done, Step


class Metrics:
    """The metrics of one connection to Ray. Counters only rise, over all stages; gauges say how it is now."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        def counter(name: str, description: str, *tags: str) -> Any:
            return Counter(f"faceflow_{name}", description, tag_keys=("run", "step", *tags))

        def gauge(name: str, description: str) -> Any:
            return Gauge(f"faceflow_{name}", description, tag_keys=("run", "step"))

        self.run = ""
        self._rows = counter("rows", "Rows of finished tasks")
        self._tasks = counter("tasks", "Finished tasks (tiles of the search come by the shard)")
        self._busy = counter("busy_seconds", "Seconds that tasks were busy")
        self._read = counter("read_bytes", "Bytes of the batches that tasks read")
        self._written = counter("written_bytes", "Bytes of the files that tasks wrote")
        self._retries = counter("retries", "Tasks that failed and are tried again", "cause")
        self._in_flight = gauge("tasks_in_flight", "Tasks handed to Ray and not finished")
        self._waiting = gauge("tasks_waiting", "Tasks not handed to Ray yet")
        self._rate = gauge("rows_per_second", "Rows of the step by its wall time so far")
        self._stage = Gauge("faceflow_stage", "1 for the running stage, 0 for the others", tag_keys=("run", "stage"))
        self._at_work = ""

    def stage(self, name: str) -> None:
        """name: of the running stage; empty: none."""
        if self._at_work:
            self._stage.set(0, {"run": self.run, "stage": self._at_work})
        self._at_work = name
        self._say_stage()

    def _say_stage(self) -> None:
        if self._at_work:
            self._stage.set(1, {"run": self.run, "stage": self._at_work})

    def finished(self, step: Step, rows: int, done: Done) -> None:
        tags = {"run": self.run, "step": step.label}
        amounts = (
            (self._rows, rows), (self._tasks, 1), (self._busy, done.seconds), (self._read, done.read_bytes),
            (self._written, done.written_bytes),
        )  # fmt: skip
        for metric, amount in amounts:
            if amount > 0:
                metric.inc(amount, tags)

    def failed(self, step: Step, cause: str) -> None:
        self._retries.inc(1, {"run": self.run, "step": step.label, "cause": cause})

    def now(self, step: Step) -> None:
        """What the gauges say, which Ray forgets unless they say it again."""
        self._say_stage()
        tags = {"run": self.run, "step": step.label}
        self._in_flight.set(step.in_flight, tags)
        self._waiting.set(step.waiting, tags)
        self._rate.set(step.rows_done / max(step.seconds, 1e-3), tags)
