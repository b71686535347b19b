"""Two raylets on this machine, started as the README says: a real cluster of two nodes, one of which can be killed."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from pathlib import Path

import psutil

from tests.conftest import free_port

TOKEN = secrets.token_hex(32)


def clean_environment(**extra: str) -> dict[str, str]:
    # As on a machine where faceflow was never installed: the jobs find it beside themselves.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    # As with an activated virtual environment: the `python` of a job's entry point is this one.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    # Token authentication as the README describes it: one token, the same on every machine.
    return env | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN} | extra


def ray(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ray")), *arguments],
        env=clean_environment(**env), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


class TwoMachines:
    """A head and a second raylet, one CPU each."""

    def __init__(self) -> None:
        port, board = free_port(), free_port()
        self.address, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{board}"
        ray(
            "start", "--head", f"--port={port}", "--num-cpus=1", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={board}", f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=100000000",
        )  # fmt: skip
        self._first = {process.pid for process in self._raylets()}
        assert len(self._first) == 1
        self.heal()
        assert len(self._raylets()) == 2

    def _raylets(self) -> list[psutil.Process]:
        results = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                alive = process.status() != psutil.STATUS_ZOMBIE
                port = self.address.split(":")[1]
                if "raylet/raylet" in line.split(" --")[0] and f":{port} " in f"{line} " and alive:
                    results.append(process)
        return results

    def second(self) -> psutil.Process:
        """The raylet that is not the head's. Raises psutil.NoSuchProcess where it is dead."""
        return next((p for p in self._raylets() if p.pid not in self._first), None) or psutil.Process(2**31 - 1)

    def heal(self) -> None:
        """Start a second raylet where there is none."""
        if len(self._raylets()) < 2:
            ray(
                "start", f"--address={self.address}", "--num-cpus=1", f"--dashboard-agent-listen-port={free_port()}",
                "--object-store-memory=100000000",
            )  # fmt: skip

    def stop(self) -> None:
        """Kill what belongs to this cluster. `ray stop` would also end the Ray that other tests share."""
        port = self.address.split(":")[1]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if f":{port} " in f"{line} " or f"gcs_server_port={port}" in line:
                    for child in [*process.children(recursive=True), process]:
                        child.kill()
