"""Where compiled kernels are kept: one folder for all checkouts, jobs and workers of a user on a machine, by what they were
made from. Knows no numba."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

FOLDER = "FACEFLOW_KERNEL_CACHE"
"""Environment variable that names another folder than `faceflow/` in the user's cache folder."""

KEPT_DAYS = 30
"""Days after their last use that kernels of other sources, versions or processors are removed."""


@functools.lru_cache(maxsize=1)
def key(versions: tuple[str, ...]) -> str:
    """A hash of the source of every kernel, of the tables' constants, and of these versions."""
    results = hashlib.sha256("\0".join(versions).encode())
    package = Path(__file__).parent
    for path in (*sorted((package / "kernels").rglob("*.py")), package / "tables.py"):
        results.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return results.hexdigest()[:20]


@functools.lru_cache(maxsize=1)
def kernel_folder(versions: tuple[str, ...]) -> str:
    """The folder of the kernels with this `key`, made if need be: in the user's cache folder, else (no home, or a read-only
    one) in one of the user's own in the temporary folder, else in one that only this process has."""
    temporary = Path(tempfile.gettempdir()) / f"faceflow-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    makers: tuple[Callable[[], Path], ...] = (_users_folder, functools.partial(_private, temporary))
    for make in makers:
        with contextlib.suppress(OSError, RuntimeError):
            base = make()
            results = base / f"kernels-{key(versions)}"
            results.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=results).close()
            os.utime(results)
            _remove_old(base, results)
            return str(results)
    return tempfile.mkdtemp(prefix="faceflow-kernels-")


def _users_folder() -> Path:
    if named := os.environ.get(FOLDER):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise OSError("this user has no home")
    return Path(base) / "faceflow"


def _private(path: Path) -> Path:
    """A folder that is this user's alone: compiled code that others could put there would be run."""
    path.mkdir(mode=0o700, exist_ok=True)
    results = path.lstat()
    if (
        not stat.S_ISDIR(results.st_mode)
        or results.st_mode & 0o022
        or (hasattr(os, "getuid") and results.st_uid != os.getuid())
    ):
        raise OSError(f"{path} is not this user's own")
    return path


def _remove_old(base: Path, current: Path) -> None:
    for other in base.glob("kernels-*"):
        with contextlib.suppress(OSError):
            if other != current and time.time() - other.stat().st_mtime > KEPT_DAYS * 86_400:
                shutil.rmtree(other)
