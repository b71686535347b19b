"""Has numba keep compiled kernels in `caches.kernel_folder`.

By itself numba keeps a kernel beside its module and looks at that module's source alone. A kernel that has others inlined, as
nearly all here have, then goes on with what these were before an upgrade; and every copy of the package compiles for itself."""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any

import llvmlite
import llvmlite.binding
import numba
import numpy as np
from numba.core import caching

from faceflow import kernel_cache


@functools.lru_cache(maxsize=1)
def versions() -> tuple[str, ...]:
    """What compiled kernels depend on beside their sources: numba, llvmlite, NumPy, Python and the processor."""
    features = ""
    with contextlib.suppress(RuntimeError):  # of a processor that LLVM does not know
        features = llvmlite.binding.get_host_cpu_features().flatten()
    processor = llvmlite.binding.get_host_cpu_name()
    return numba.__version__, llvmlite.__version__, np.__version__, sys.version, processor, features


def folder() -> str:
    """Where the compiled kernels lie."""
    return kernel_cache.kernel_folder(versions())


class KernelLocator(caching._CacheLocator):
    """Tells numba where the kernels of this package lie; functions of others are none of its business."""

    def __init__(self, function: Any) -> None:
        self._module, self._line = function.__module__, function.__code__.co_firstlineno

    def get_cache_path(self) -> str:
        return folder()

    def get_source_stamp(self) -> str:
        return kernel_cache.key(versions())

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
