"""Hosts in network namespaces of their own, on one bridge: each with its own address, and a cable that can be pulled."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.integration.clusters import clean_environment

SUBNET = "10.231.77"


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@dataclass
class Hosts:
    """A bridge in a namespace of its own, to which hosts and this process are connected. Number 1 is this process."""

    tag: str = field(default_factory=lambda: secrets.token_hex(2))
    numbers: dict[str, int] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def hub(self) -> str:
        return f"ff{self.tag}-hub"

    def namespace(self, host: str) -> str:
        return f"ff{self.tag}-{host}"

    def address(self, host: str) -> str:
        return f"{SUBNET}.{self.numbers[host]}"

    def prefix(self, host: str) -> list[str]:
        """What makes a command run on that host."""
        return ["ip", "netns", "exec", self.namespace(host)]

    def begin(self) -> None:
        _ip("netns", "add", self.hub)
        _ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.hub, "link", "set", "bridge", "up")
        self._cable("me", 1, None)

    def add(self, host: str) -> None:
        self.numbers[host] = len(self.numbers) + 2
        _ip("netns", "add", self.namespace(host))
        _ip("-n", self.namespace(host), "link", "set", "lo", "up")
        self._cable(host, self.numbers[host], self.namespace(host))

    def _cable(self, host: str, number: int, namespace: str | None) -> None:
        near = f"ff{self.tag}{number}"
        inside = ["-n", namespace] if namespace else []
        _ip("-n", self.hub, "link", "add", f"port-{host}", "type", "veth", "peer", "name", near)
        # The one end moves to the host, or to this process's own namespace.
        _ip("-n", self.hub, "link", "set", near, "netns", *([namespace] if namespace else [str(os.getpid())]))
        _ip(*inside, "addr", "add", f"{SUBNET}.{number}/24", "dev", near)
        _ip(*inside, "link", "set", near, "up")
        _ip("-n", self.hub, "link", "set", f"port-{host}", "master", "bridge", "up")

    def pull(self, host: str) -> None:
        """Cut the host off, from one moment to the next: nothing tells the others."""
        _ip("-n", self.hub, "link", "set", f"port-{host}", "down")

    def ray(self, host: str, *arguments: str, **env: str) -> None:
        """A raylet of that host, in the foreground of a process that ends with the test."""
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", *arguments]
        where = f"--node-ip-address={self.address(host)}"
        self.processes.append(
            subprocess.Popen(
                [*self.prefix(host), *command, where, "--object-store-memory=100000000", "--disable-usage-stats"],
                env=clean_environment(**env), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )
        )  # fmt: skip

    def wait_for(self, host: str, port: int) -> None:
        for _ in range(120):
            with contextlib.suppress(OSError):
                socket.create_connection((self.address(host), port), timeout=1).close()
                return
            time.sleep(0.5)
        pytest.fail(f"nothing answers on port {port} of {host}")

    def end(self) -> None:
        for host in self.numbers:
            pids = subprocess.run(["ip", "netns", "pids", self.namespace(host)], capture_output=True, text=True, check=False)
            for pid in pids.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
        for process in self.processes:
            process.kill()
            process.wait()
        for name in (*map(self.namespace, self.numbers), self.hub):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextlib.contextmanager
def hosts(names: Sequence[str]) -> Iterator[Hosts]:
    """These hosts. Skips the test, with the reason, where namespaces cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces cannot be made here: there is no `ip` (Debian: iproute2)")
    made = Hosts()
    try:
        try:
            made.begin()
            for name in names:
                made.add(name)
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield made
    finally:
        made.end()
