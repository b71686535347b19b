"""What this process may use of its machine: CPUs within affinity and container quota, and a temporary folder for Ray."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from pathlib import Path

from faceflow.errors import SettingsError

LONGEST_TEMPORARY = 40
"""Characters of a temporary folder up to which Ray's sockets below it fit into the 107 that a Unix socket may have: `ray/`, a
session of 50 characters and `sockets/plasma_store` follow."""


def cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use: those of its affinity, and no more than the CPU quota of its container (a control
    group's, of version 2 or 1; a broken one counts as the next whole number). root: where /proc and /sys lie."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """The CPU quotas of this process's control groups and of all above them, in CPUs."""
    results: list[float] = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            unified = not controllers
            if not unified and "cpu" not in controllers.split(","):
                continue
            base = root / "sys/fs/cgroup" if unified else root / "sys/fs/cgroup" / "cpu"
            # In a container the path may be the host's, and its group lie at the base.
            group = base / path.lstrip("/")
            for folder in {group, *group.parents, base}:
                if folder == base or base in folder.parents:
                    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                        results.append(_quota(folder, unified))
    return [quota for quota in results if quota > 0]


def _quota(group: Path, unified: bool) -> float:
    if unified:
        quota, period = (group / "cpu.max").read_text().split()
        return 0.0 if quota == "max" else int(quota) / int(period)
    quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    return int(quota) / int(period)


def temporary_for_ray() -> str | None:
    """The folder that a private Ray keeps its sockets in; None: its own choice.

    Raises SettingsError where TMPDIR is too long for them, and no other folder will do.
    """
    if os.environ.get("RAY_TMPDIR") or len(tempfile.gettempdir()) <= LONGEST_TEMPORARY:
        return None
    if os.path.isdir("/tmp") and os.access("/tmp", os.W_OK | os.X_OK):
        return "/tmp/ray"
    raise SettingsError(
        f"the temporary folder {tempfile.gettempdir()} has too long a name for Ray's sockets, and /tmp cannot be written: set "
        f"TMPDIR to a folder of at most {LONGEST_TEMPORARY} characters"
    )
