"""What the tasks of a run do and have used: one record a step, of which progress, metrics and the report are made."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Step:
    """One set of like tasks, running or done. begun: Unix time, seconds; seconds: wall time so far; rows: of all tasks (0:
    they are not counted in rows); cpus: of the cluster; busy_seconds: of all its tasks, as their workers measured;
    longest_seconds: of the longest; read_bytes, written_bytes: what its tasks read and wrote (`storage.traffic.moved`);
    peak_bytes: largest resident memory of a worker; retries: by cause."""

    label: str
    tasks: int
    rows: int = 0
    cpus: int = 1
    begun: float = field(default_factory=time.time)
    seconds: float = 0.0
    tasks_done: int = 0
    rows_done: int = 0
    in_flight: int = 0
    busy_seconds: float = 0.0
    longest_seconds: float = 0.0
    read_bytes: int = 0
    written_bytes: int = 0
    peak_bytes: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    finished: bool = False

    @property
    def waiting(self) -> int:
        """Tasks that have not been handed out, or wait to be tried again."""
        return self.tasks - self.tasks_done - self.in_flight

    @property
    def share(self) -> float:
        """How much of it is done, 0 to 1."""
        done, all_ = (self.rows_done, self.rows) if self.rows else (self.tasks_done, self.tasks)
        return done / all_ if all_ else 1.0


@dataclass(frozen=True)
class Done:
    """What a worker reports of one finished task: busy seconds, largest resident memory of its process, bytes moved."""

    seconds: float
    peak_bytes: int
    read_bytes: int
    written_bytes: int


@dataclass
class Usage:
    """The steps of a run so far, and how long connecting to Ray took."""

    steps: list[Step] = field(default_factory=list)
    start_seconds: float = 0.0

    @property
    def peak_worker_bytes(self) -> int:
        return max([0, *(step.peak_bytes for step in self.steps)])

    @property
    def by_label(self) -> dict[str, float]:
        """Busy seconds by label."""
        results: dict[str, float] = {}
        for step in self.steps:
            results[step.label] = results.get(step.label, 0.0) + step.busy_seconds
        return results
