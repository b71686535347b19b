"""Runs functions on a Ray cluster: bounded work in flight, retries, progress. Only this folder imports Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from tqdm.auto import tqdm

from faceflow.cluster import worker
from faceflow.cluster.connection import LOCAL, connect
from faceflow.cluster.metrics import Metrics
from faceflow.cluster.retries import KEPT, Attempts, Cause
from faceflow.cluster.step_records import Done, Step, Usage
from faceflow.errors import FaceflowError, RunError
from faceflow.logs import in_notebook

log = logging.getLogger("faceflow")

Request = TypeVar("Request")
Result = TypeVar("Result")

HEARTBEAT = 5.0
"""Seconds after which a step that goes on is looked at although nothing happened."""


@dataclass(frozen=True)
class Resources:
    """What one task asks Ray for. cpus 0 stands for all CPUs of the smallest machine that has the most of them; apart: a
    worker process that has run nothing else, for packages that crash in one process; custom: a resource of the
    cluster's own naming, which only some of its machines have (of it a task takes next to nothing)."""

    cpus: float = 1
    gpus: float = 0
    apart: bool = False
    custom: str | None = None


class _Again(Exception):  # noqa: N818 - not an error of its own
    """A task failed in a way that may pass."""

    def __init__(self, cause: Cause, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class Executor:
    """A connection to a Ray cluster, or a private local one that ends with this object.

    address: a Ray address; None: RAY_ADDRESS if set, else private. workers: most tasks at once (None: one
    per CPU of the cluster). warm_up: a function that loads what tasks will need. moved: counts the bytes that a process reads
    and writes; limit: called before each task with the threads it may use, one for each CPU that it asked for. `watch`, if
    set, is called with the running step whenever something happens, and every few seconds; `guard`, if set, before a task is
    sent, to raise where this process may no longer do so. Raises SettingsError when the cluster cannot be reached.
    """

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        progress: bool = True,
        *,
        warm_up: Callable[[], Any] | None = None,
        moved: worker.Moved = worker.nothing_moved,
        limit: worker.Limit = worker.nothing_limited,
    ) -> None:
        self.address, self.workers = address, workers
        self._warm_up, self._moved, self._limit = warm_up, moved, limit
        self._task: Any = None  # what Ray runs tasks by: made once, as Ray sends each new one to every worker
        self.usage = Usage()
        self.watch: Callable[[Step], None] | None = None
        self.guard: Callable[[], None] | None = None
        self._metrics: Any = None  # Metrics, once connected
        self._names = ("", "")
        self._progress = progress
        self._connected: Any = None
        self._owned = False

    @property
    def _ray(self) -> Any:
        # Connected on first use: a run whose input is refused, or whose stages are all finished, starts no cluster.
        if self._connected is None:
            import ray

            if not ray.is_initialized():
                begun = time.perf_counter()
                connect(ray, self._wanted_address, self.workers)
                self._owned = True
                self.usage.start_seconds = round(time.perf_counter() - begun, 3)
            self._connected = ray
            self._metrics = Metrics()
            self.working_on(*self._names)
            self._warm()
        return self._connected

    def working_on(self, run_id: str, stage: str) -> None:
        """Which stage of which run the next steps belong to, for the metrics."""
        self._names = (run_id, stage)
        if self._metrics is not None:
            self._metrics.run = run_id
            self._metrics.stage(stage)

    def _warm(self) -> None:
        if self._warm_up is not None:
            # Nothing waits for these: they start every worker process and load its modules while the first stage reads.
            task = self._connected.remote(worker.hold).options(num_cpus=1, scheduling_strategy="SPREAD", name="warm-up")
            for _ in range(min(self.cpus, self.workers or self.cpus)):
                task.remote(self._warm_up)

    @property
    def _wanted_address(self) -> str:
        return self.address or os.environ.get("RAY_ADDRESS") or LOCAL

    @property
    def is_private(self) -> bool:
        """Whether Ray is one that this machine starts for itself."""
        return self._wanted_address == LOCAL

    def _start_anew(self) -> None:
        """After the death of this machine's raylet, without which Ray runs nothing for this process."""
        if not self._owned or not self.is_private:
            raise RunError(f"the raylet of this machine died, so this process has lost its cluster; {KEPT}")
        log.warning("the raylet of this command's own Ray died: starting Ray again")
        self._connected.shutdown()
        self._task = None
        connect(self._connected, self._wanted_address, self.workers)
        self._warm()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._owned:
            self._connected.shutdown()

    @property
    def cpus(self) -> int:
        """CPUs of the whole cluster, as of now."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    @property
    def nodes(self) -> int:
        """Machines of the cluster, as of now."""
        return sum(1 for node in self._ray.nodes() if node["Alive"])

    @property
    def largest_machine_cpus(self) -> int:
        """CPUs of the machine with the most of them."""
        return self.machine_cpus(None)

    def machine_cpus(self, custom: str | None) -> int:
        """CPUs of the machine with the most of them, of those with this resource (of all, where none has it yet)."""
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        chosen = [item for item in alive if custom is None or custom in item] or alive
        return max([1, *(int(item.get("CPU", 0)) for item in chosen)])

    def machine_memory(self, custom: str | None) -> int:
        """Bytes that Ray has for tasks on the machine with the most of them, chosen as `machine_cpus`."""
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        chosen = [item for item in alive if custom is None or custom in item] or alive
        return int(max([0, *(item.get("memory", 0) for item in chosen)]))

    @property
    def smallest_machine_cpus(self) -> int:
        """CPUs of the machine with the fewest that runs tasks at all: what a task may ask for and still fit everywhere."""
        counts = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]
        return min([count for count in counts if count], default=1)

    @property
    def worker_memory(self) -> int:
        """Bytes that Ray has for one CPU of its tightest machine."""
        shares = [
            node["Resources"]["memory"] / node["Resources"]["CPU"]
            for node in self._ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU", 0) >= 1 and "memory" in node["Resources"]
        ]
        return int(min(shares, default=2 * 2**30))

    def map(
        self,
        function: Callable[[Request], Result],
        requests: Sequence[Request],
        label: str,
        *,
        sizes: Sequence[int] | None = None,
        resources: Resources = Resources(),
        smaller: Callable[[Request], Request] | None = None,
    ) -> list[Result]:
        """`function(request)` for every request, each in a task of its own; results in the order of `requests`.

        function must be importable by name and give the same result when run again. sizes: rows of each task, for the
        progress bar. At most `workers` tasks (else two per CPU, so that an autoscaler sees the demand) are in flight,
        and results should be small: data travels through files. A task that fails is tried again as `retries` says, with
        a `smaller` request where it ran out of memory.
        Raises the task's own FaceflowError, or RunError when a task keeps failing.
        """
        ray = self._ray
        cpus = resources.cpus or min(self.machine_cpus(resources.custom), self.workers or sys.maxsize)
        results: list[Any] = [None] * len(requests)
        attempts = [Attempts(request, label, smaller) for request in requests]
        queue, again = iter(range(len(requests))), list[int]()
        flying: dict[Any, int] = {}
        step = Step(label, len(requests), sum(sizes) if sizes else 0, self.cpus)
        self.usage.steps.append(step)
        started = time.perf_counter()
        with self._bar(label, sizes, len(requests)) as bar:
            try:
                while True:
                    room = self.workers or max(1, int(2 * self.cpus / max(cpus, 1)))
                    while len(flying) < room and (index := self._next(queue, again, attempts)) is not None:
                        flying[self._submit(function, attempts[index], cpus, resources)] = index
                    step.in_flight, step.seconds = len(flying), time.perf_counter() - started
                    step.finished = not flying and not again
                    self._tell(step)
                    if not flying and not again:
                        break
                    if not flying:
                        time.sleep(0.1)
                        continue
                    done, _ = ray.wait(list(flying), num_returns=1, timeout=0.2 if again else HEARTBEAT)
                    for reference in done:
                        index = flying.pop(reference)
                        try:
                            results[index], finished = self._collect(reference, label)
                        except _Again as failure:
                            log.warning("%s", attempts[index].failed(failure.cause, str(failure), time.monotonic()))
                            again.append(index)
                            step.retries[failure.cause.value] += 1
                            self._metrics.failed(step, failure.cause.value)
                            if failure.cause is Cause.RAY:
                                # With it went all that was in flight.
                                again.extend(flying.values())
                                flying.clear()
                                self._start_anew()
                                break
                        else:
                            rows = sizes[index] if sizes else 0
                            self._account(step, rows, finished)
                            bar.update(rows if sizes else 1)
            except BaseException:
                for reference in flying:
                    with contextlib.suppress(Exception):
                        ray.cancel(reference, force=True)
                raise
        return results

    @staticmethod
    def _next(queue: Iterator[int], again: list[int], attempts: Sequence[Attempts[Any]]) -> int | None:
        """The next task to try: one that failed and has waited long enough, else a new one."""
        now = time.monotonic()
        ready = next((index for index in again if attempts[index].not_before <= now), None)
        if ready is None:
            return next(queue, None)
        again.remove(ready)
        return ready

    def _submit(self, function: Callable[[Any], Any], attempt: Attempts[Any], cpus: float, resources: Resources) -> Any:
        if self.guard is not None:
            self.guard()
        # Ray's own retries neither wait nor make a task smaller.
        asked = max(cpus, self.smallest_machine_cpus) if attempt.alone else cpus
        options: dict[str, Any] = {
            "num_cpus": asked, "num_gpus": resources.gpus, "max_retries": 0, "name": attempt.label,
            "scheduling_strategy": "SPREAD",
        }  # fmt: skip
        if resources.custom is not None:
            options["resources"] = {resources.custom: 0.001}
        if resources.apart:
            options["runtime_env"] = {"env_vars": {"FACEFLOW_TASK": attempt.label}}
        threads = max(1, int(cpus))
        if self._task is None:
            self._task = self._ray.remote(worker.run_task)
        return self._task.options(**options).remote(function, attempt.request, threads, self._moved, self._limit)

    def _account(self, step: Step, rows: int, done: Done) -> None:
        step.tasks_done += 1
        step.rows_done += rows
        step.busy_seconds += done.seconds
        step.longest_seconds = max(step.longest_seconds, done.seconds)
        step.read_bytes += done.read_bytes
        step.written_bytes += done.written_bytes
        step.peak_bytes = max(step.peak_bytes, done.peak_bytes)
        self._metrics.finished(step, rows, done)

    def _tell(self, step: Step) -> None:
        self._metrics.now(step)
        if self.watch is not None:
            self.watch(step)

    def call(
        self, function: Callable[[Request], Result], request: Request, label: str, *, resources: Resources = Resources()
    ) -> Result:
        """`function(request)` in one task, as `map`."""
        return self.map(function, [request], label, resources=resources)[0]

    def _collect(self, reference: Any, label: str) -> tuple[Any, Done]:
        from ray import exceptions

        try:
            result: tuple[Any, Done] = self._ray.get(reference)
            return result
        except exceptions.RayTaskError as error:
            cause = error.cause
            first_line = (str(cause).splitlines() or [""])[0]
            if isinstance(cause, FaceflowError):
                raise cause from None
            if isinstance(cause, MemoryError):
                raise _Again(Cause.MEMORY, first_line or "no memory was left") from error
            if isinstance(cause, PermissionError):
                raise RunError(f"{label}: {cause}; {KEPT}") from error
            if isinstance(cause, OSError):
                raise _Again(Cause.IO, first_line) from error
            log.error("%s", error)
            raise RunError(f"{label}: a worker failed with {type(cause).__name__}: {first_line}") from error
        except exceptions.OutOfMemoryError as error:
            raise _Again(Cause.MEMORY, "Ray ended its worker, as the machine ran short of memory") from error
        except exceptions.LocalRayletDiedError as error:
            raise _Again(Cause.RAY, str(error).splitlines()[0]) from error
        except exceptions.NodeDiedError as error:
            raise _Again(Cause.MACHINE, str(error).splitlines()[0]) from error
        except exceptions.RayError as error:
            raise _Again(Cause.DEATH, str(error).splitlines()[0]) from error

    @contextlib.contextmanager
    def _bar(self, label: str, sizes: Sequence[int] | None, tasks: int) -> Iterator[Any]:
        with tqdm(
            total=sum(sizes) if sizes else tasks,
            desc=f"{label:>9}",
            unit=" rows" if sizes else " tasks",
            unit_scale=True,
            disable=(False if in_notebook() else None) if self._progress else True,  # None: where there is no terminal
            leave=False,
            file=sys.stderr,
        ) as bar:
            yield bar
