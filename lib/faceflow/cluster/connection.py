"""Starts a private Ray, or joins a running one."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faceflow.cluster import machine_limits
from faceflow.cluster.retries import KEPT
from faceflow.errors import RunError, SettingsError

log = logging.getLogger("faceflow")

LOCAL = "local"
"""The address that stands for a private Ray."""

OBJECT_STORE_BYTES = 128 * 2**20
"""Of a private local Ray: tasks exchange files, so objects are small dictionaries."""

SILENT_MACHINE = {"RAY_grpc_client_keepalive_time_ms": "30000", "RAY_grpc_client_keepalive_timeout_ms": "30000"}
"""How soon the driver asks a machine that has a task of it and says nothing, and how long it waits for the answer."""

PRIVATE_STARTS = 2
"""Times a private Ray is started before the run gives up: one of its dozen processes may have died."""


def connect(ray: Any, address: str, workers: int | None) -> None:
    """Connect this process to the Ray at `address`, or to a private one with a CPU for each of `workers` at least.

    Raises SettingsError when the cluster cannot be used, RunError when a private one does not start.
    """
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == LOCAL:
        # More workers than CPUs is the caller's wish.
        cpus = max(machine_limits.cpus(), workers or 1)
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        if (temporary := machine_limits.temporary_for_ray()) is not None:
            options["_temp_dir"] = temporary
    else:
        # Workers of another machine run the very code that the driver runs.
        _check_reachable(address)
        options["runtime_env"] = {"py_modules": [str(Path(__file__).resolve().parents[1])]}
    tries = PRIVATE_STARTS if address == LOCAL else 1
    with _environment_for_ray(address == LOCAL):
        for left in reversed(range(tries)):
            try:
                terminate = signal.getsignal(signal.SIGTERM)
                ray.init(address=address, **options)
                if callable(terminate) and threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, terminate)  # Ray's own prints a trace and ends with a code of its own
                return
            except Exception as error:  # what Ray raises here is of many types, some of them plain
                ray.shutdown()
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                if address != LOCAL:
                    raise SettingsError(f"cannot use Ray at {address}: {reason}") from None
                if not left:
                    raise RunError(f"a private Ray did not start on this machine: {reason}; {KEPT}") from error
                log.warning("a private Ray did not start: %s; trying again", reason)


def _check_reachable(address: str) -> None:
    """Ray waits for minutes for a cluster that is not there; a port that is closed can be known at once."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # "auto" and other words are for Ray to resolve
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise SettingsError(f"cannot use Ray at {address}: {error.strerror or error}") from None


@functools.cache
def _process_token() -> str:
    """Token of this process's private Rays: Ray (2.60) keeps the first that a process reads, whatever its next cluster has."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _environment_for_ray(private: bool) -> Iterator[None]:
    """What Ray reads once, when it starts, and hands on to its workers."""
    package = str(Path(__file__).resolve().parents[2])
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",  # no usage report leaves the machine
        # Else a worker that dies before the driver is registered leaves the driver waiting for ever (Ray 2.60).
        "RAY_prestart_worker_first_driver": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; set, so that Ray does not warn of it
        # Ray ends a worker that idles for a second (beside one that trains, links or detects), and a new one takes two of
        # both CPUs' seconds to start; ours end with the run.
        "RAY_idle_worker_killing_time_threshold_ms": "3600000",
        # A job script finds the package beside itself; workers must find the same one.
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    # A machine that falls silent (a pulled cable, a dead hypervisor) is waited for until these pings fail, by default seven
    # minutes (Ray 2.60); what the user has set stays.
    wanted |= {name: os.environ.get(name, value) for name, value in SILENT_MACHINE.items()}
    # Without a token Ray makes one and leaves it in the user's home, which may not exist; Ray may have read one that lies there
    # in this process already.
    known = any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if private and not known and not os.path.exists(os.path.expanduser("~/.ray/auth_token")):
        wanted["RAY_AUTH_TOKEN"] = _process_token()
    # The mode is restored because Ray sets it itself, and would take it for the user's at the next start.
    before = {key: os.environ.get(key) for key in [*wanted, "RAY_AUTH_MODE"]}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, old in before.items():
            if old is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = old
