"""The lease on a run directory: who may write it, how the holder shows that it lives, what makes a stale holder's write fail.

The lease is `progress.json`. Taking it and every heartbeat are conditional writes (Kleppmann, How to do distributed locking,
2016): a new holder raises the fencing token, and the next write of the old one fails.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, BinaryIO

from faceflow.errors import PublishError, RunError
from faceflow.storage import layout
from faceflow.storage.json_records import decode
from faceflow.storage.manifests import StepRecord
from faceflow.storage.object_store import Store

log = logging.getLogger("faceflow")

HEARTBEAT = 5.0
"""Seconds between two heartbeats; on S3 each is a request."""

SILENT_AFTER = 60.0
"""Seconds without a heartbeat after which a lease may be taken over."""

RENEW_BEFORE_WRITE = 20.0
"""Seconds since the last heartbeat from which the holder renews its lease before it writes: long before it can be lost."""

CLOCKS_DIFFER = 600.0
"""Seconds by which the clocks of two machines may differ."""


@dataclass(frozen=True)
class LeaseState:
    """What progress.json says. token: the fencing token; stage: running, or next; stage_seconds: it has taken so far; seconds:
    of each finished stage; step: what the stage does; stopped: why the holder stopped, empty while it runs; host, machine, pid:
    where the holder runs; holder: its random name; updated: its last heartbeat (ISO 8601)."""

    run_id: str = ""
    token: int = 0
    stage: str = ""
    stage_seconds: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    step: StepRecord | None = None
    stopped: str = ""
    host: str = ""
    machine: str = ""
    pid: int = 0
    holder: str = ""
    updated: str = ""


def read_state(run: Store) -> LeaseState | None:
    """The lease on a run directory; None where there was none."""
    return decode(LeaseState, run.read_json(layout.PROGRESS))


class Lease:
    """A lease that this process holds; made by `claim`. A thread of it sends heartbeats until `release`.

    token: the fencing token, one more than that of the holder before.
    """

    def __init__(self, run: Store, state: LeaseState, version: str) -> None:
        self.run_id, self.token, self.run = state.run_id, state.token, run
        self._state, self._version = state, version
        self._renewed, self._lost = _now(), ""
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {state.run_id}", daemon=True)
        self._thread.start()

    def write(self, **changes: Any) -> None:
        """Change fields of the lease's state (`LeaseState`), which renews it. An I/O error is logged: this much may be missed.

        Raises RunError where another process has taken the run over.
        """
        with self._lock:
            self._state = replace(self._state, **changes)
            try:
                self._renew()
            except OSError as error:
                log.warning("run %s: the heartbeat was not written: %s", self.run_id, error)

    def check(self) -> None:
        """Raise RunError unless this process still holds the lease: known from its last heartbeat, or by a new one."""
        with self._lock:
            if self._lost:
                raise RunError(self._lost)
            if _now() - self._renewed >= RENEW_BEFORE_WRITE:
                self._renew()

    def release(self) -> None:
        """Send no more heartbeats. What the holder said last (`stopped`, if it ended early) stays."""
        self._ended.set()
        self._thread.join()

    def _renew(self) -> None:
        if self._lost:
            raise RunError(self._lost)
        state = asdict(replace(self._state, updated=_timestamp()))
        sent = _now()  # others count from here, whenever the answer comes
        try:
            self._version = self.run.replace_json(layout.PROGRESS, state, self._version)
        except PublishError:
            with contextlib.suppress(OSError):
                data, version = self.run.read_versioned(layout.PROGRESS)
                other = json.loads(data or b"{}")
                if version and other.get("token") == self.token and other.get("holder") == self._state.holder:
                    # Our own heartbeat, of which the store lost the answer; when it was sent is not known any more.
                    self._version = version
                    return
                holder = f"process {other['pid']} on {other['host']}" if "pid" in other else "another process"
                self._lost = (
                    f"run {self.run_id} was taken over by {holder}, as this process had sent no heartbeat for "
                    f"{SILENT_AFTER:.0f} s: it writes nothing more. `faceflow status` shows how far the run is"
                )
            self._lost = self._lost or f"run {self.run_id} was taken over by another process: this one writes nothing more"
            raise RunError(self._lost) from None
        self._renewed = sent

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with self._lock:
                if self._lost or _now() - self._renewed < HEARTBEAT / 2:
                    continue
                with contextlib.suppress(OSError, RunError):
                    self._renew()


@dataclass(frozen=True)
class _CheckedStore(Store):
    """A store that looks before each write whether its writer may still write."""

    def __repr__(self) -> str:
        return super().__repr__()

    def _check(self) -> None:
        """Raise RunError where another process holds the lease."""
        raise NotImplementedError

    @contextlib.contextmanager
    def open_write(self, relative: str, durable: bool = False) -> Iterator[BinaryIO]:
        with super().open_write(relative, durable) as file:
            yield file
            self._check()  # before the file appears

    def replace_json(self, relative: str, value: Any, expected: str | None) -> str:
        self._check()
        return super().replace_json(relative, value, expected)

    def delete(self, relative: str) -> None:
        self._check()
        super().delete(relative)

    def share(self, source: Store, relative: str, target: str) -> int:
        self._check()
        return super().share(source, relative, target)


@dataclass(frozen=True, repr=False)
class FencedStore(_CheckedStore):
    """A store that writes only while its lease holds. Sent to a worker it becomes a `TaskStore`."""

    lease: Lease | None = None

    @classmethod
    def of(cls, store: Store, lease: Lease) -> FencedStore:
        return cls(store.root, store.options, lease)

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.lease is not None
        return TaskStore, (self.root, self.options, self.lease.run, self.lease.token)

    def child(self, relative: str) -> Store:
        return FencedStore(self.address(relative), self.options, self.lease)

    def _check(self) -> None:
        if self.lease is not None:
            self.lease.check()

    @contextlib.contextmanager
    def open_write(self, relative: str, durable: bool = False) -> Iterator[BinaryIO]:
        self._check()  # known without a request, and nothing is begun
        with super().open_write(relative, durable) as file:
            yield file


@dataclass(frozen=True, repr=False)
class TaskStore(_CheckedStore):
    """A store of a task, which writes nothing once another process holds the lease under which it was sent: what a task of a
    stale holder finishes must not be taken for the new holder's. run: the run's directory; token: the fencing token."""

    run: Store | None = None
    token: int = 0

    def child(self, relative: str) -> Store:
        return TaskStore(self.address(relative), self.options, self.run, self.token)

    def _check(self) -> None:
        assert self.run is not None
        state = self.run.read_json(layout.PROGRESS) or {}
        if state.get("token") != self.token:
            raise RunError(f"run {state.get('run_id', '')} was taken over by another process: this task writes nothing more")


def claim(run: Store, run_id: str) -> Lease:
    """Take the lease of a run: of two processes that try at once, one gets it.

    Raises RunError where another holds it.
    """
    while True:
        version = run.version(layout.PROGRESS)
        if (other := holder(run)) is not None:
            raise RunError(
                f"run {run_id} is already running ({other}). Wait for it (`faceflow status` shows how far it is), or "
                "give another --run-id"
            )
        try:
            state, version = _take(run, run_id, version, "")
        except PublishError:
            log.info("run %s: another process has just taken it", run_id)
            continue
        return Lease(run, state, version)


def fence_off(run: Store, run_id: str, why: str) -> bool:
    """Take the lease of a run that is not running, and leave it stopped; False where another process was faster."""
    try:
        _take(run, run_id, run.version(layout.PROGRESS), why)
    except PublishError:
        return False
    return True


def _take(run: Store, run_id: str, version: str | None, stopped: str) -> tuple[LeaseState, str]:
    before = read_state(run)
    state = LeaseState(
        run_id, before.token + 1 if before is not None else 1, stopped=stopped, host=socket.gethostname(), machine=machine(),
        pid=os.getpid(), holder=uuid.uuid4().hex, updated=_timestamp(),
    )  # fmt: skip
    return state, run.replace_json(layout.PROGRESS, asdict(state), version)


def _timestamp() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def _now() -> float:
    """Seconds of a clock that goes on while this process, or its machine, is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.time()


def holder(run: Store) -> str | None:
    """Which other process holds the lease of a run, in words; None where there is none.

    Of a process on this machine that is known at once. One elsewhere, whose clock may differ, is waited for until its next
    heartbeat, or for SILENT_AFTER.
    """
    first, begun = None, time.monotonic()
    while True:
        state = read_state(run)
        if state is None or state.stopped:
            return None
        named = f"pid {state.pid} on {state.host}"
        updated = datetime.datetime.fromisoformat(state.updated)
        age = (datetime.datetime.now(datetime.UTC) - updated).total_seconds()
        if state.machine == machine():
            known = age < SILENT_AFTER and state.pid != os.getpid() and is_alive(state.pid)
            return named if known else None
        if first is None:
            if age >= SILENT_AFTER + CLOCKS_DIFFER:
                return None
            first = updated
            log.info("run %s: waiting for the next heartbeat of %s", state.run_id, named)
        elif updated != first:
            return named
        elif time.monotonic() - begun >= SILENT_AFTER:
            return None
        time.sleep(min(HEARTBEAT, SILENT_AFTER) / 5)


def is_silent(run: Store) -> bool:
    """Whether a run cannot be running, known without waiting."""
    state = read_state(run)
    if state is None or state.stopped:
        return True
    if state.machine == machine():
        return state.pid != os.getpid() and not is_alive(state.pid)
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(state.updated)
    return age.total_seconds() >= SILENT_AFTER + CLOCKS_DIFFER


@functools.lru_cache(maxsize=1)
def machine() -> str:
    """What processes that can ask the kernel for each other by number have in common; two containers may share a host name."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
            return f"{boot.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode():x}"


def is_alive(pid: int) -> bool:
    """Whether a process of this machine lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"  # ended, and not waited for
    except OSError:
        return True
