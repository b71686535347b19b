"""Where numba keeps compiled kernels: one folder for all checkouts, jobs and workers of a user on a machine, by what they were
compiled from.

By itself numba keeps a kernel beside its module and looks at that module's source alone. A kernel that has others inlined, as
nearly all here have, then goes on with what these were before an upgrade; and every copy of the package compiles anew."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
import numpy as np
from numba.core import caching

FOLDER = "FACEFLOW_KERNEL_CACHE"
"""Environment variable that names another folder than `faceflow/` in the user's cache folder."""

KEPT_DAYS = 30
"""Days after their last use that kernels of other sources, versions or processors are removed."""


@functools.lru_cache(maxsize=1)
def key() -> str:
    """What compiled kernels depend on: the source of every kernel and of the tables' constants, numba, llvmlite, NumPy, Python
    and the processor."""
    found = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in (*sorted(Path(__file__).parent.rglob("*.py")), package / "tables.py"):
        found.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    with contextlib.suppress(RuntimeError):  # of a processor that LLVM does not know
        found.update(llvmlite.binding.get_host_cpu_features().flatten().encode())
    versions = (numba.__version__, llvmlite.__version__, np.__version__, sys.version, llvmlite.binding.get_host_cpu_name())
    found.update("\0".join(versions).encode())
    return found.hexdigest()[:20]


@functools.lru_cache(maxsize=1)
def folder() -> str:
    """The folder of the kernels with this `key`, made if need be: in the user's cache folder, else (no home, or a read-only
    one) in one of the user's own in the temporary folder, else in one that only this process has."""
    temporary = Path(tempfile.gettempdir()) / f"faceflow-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    makers: tuple[Callable[[], Path], ...] = (lambda: _users_folder(), lambda: _private(temporary))
    for make in makers:
        with contextlib.suppress(OSError, RuntimeError):
            base = make()
            found = base / f"kernels-{key()}"
            found.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=found).close()
            os.utime(found)
            _remove_old(base, found)
            return str(found)
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
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022 or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
        raise OSError(f"{path} is not this user's own")
    return path


def _remove_old(base: Path, current: Path) -> None:
    for other in base.glob("kernels-*"):
        with contextlib.suppress(OSError):
            if other != current and time.time() - other.stat().st_mtime > KEPT_DAYS * 86_400:
                shutil.rmtree(other)


class KernelLocator(caching._CacheLocator):
    """Tells numba where the kernels of this package lie; functions of others are none of its business."""

    def __init__(self, function: Any) -> None:
        self._module, self._line = function.__module__, function.__code__.co_firstlineno

    def get_cache_path(self) -> str:
        return folder()

    def get_source_stamp(self) -> str:
        return key()

    def get_disambiguator(self) -> str:
        return f"{self._module}-{self._line}"

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> KernelLocator | None:
        return cls(py_func) if py_func.__module__.startswith(f"{__package__}.") else None


def install() -> None:
    """Have numba ask `KernelLocator` first."""
    implementation = getattr(caching, "CacheImpl", None) or caching._CacheImpl  # the name of older ones
    if KernelLocator not in implementation._locator_classes:
        implementation._locator_classes.insert(0, KernelLocator)
