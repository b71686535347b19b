"""Compiles kernels: one decorator sets numba's options, and keeps what is compiled in `kernel_cache.kernel_folder`.

By itself numba keeps a kernel beside its module and looks at that module's source alone. A kernel that has others inlined, as
nearly all here have, then goes on with what these were before an upgrade; and every copy of the package compiles for itself."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, overload

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


Function = TypeVar("Function", bound=Callable[..., Any])


@overload
def kernel(function: Function) -> Function: ...
@overload
def kernel(*, parallel: bool = False, inline: bool = False, allocates: bool = True) -> Callable[[Function], Function]: ...
def kernel(function: Any = None, *, parallel: bool = False, inline: bool = False, allocates: bool = True) -> Any:
    """Compile a function of arrays and numbers by numba, without Python's lock; kept on disk.

    Parameters
    ----------
    parallel : bool
        Run `numba.prange` loops on the threads that `kernels.mapequation.flow.use_threads` allows. Results must not depend on
        their number.
    inline : bool
        Compile it into each of its callers.
    allocates : bool
        Whether it makes arrays. One that does not needs none of numba's runtime, which counts references at every call.
    """
    if function is None:
        return functools.partial(kernel, parallel=parallel, inline=inline, allocates=allocates)
    options: dict[str, Any] = {} if allocates else {"_nrt": False}
    compiler = numba.njit(cache=True, nogil=True, parallel=parallel, inline="always" if inline else "never", **options)
    return compiler(function)


def _install() -> None:
    """Have numba ask `KernelLocator` first."""
    implementation = getattr(caching, "CacheImpl", None) or caching._CacheImpl  # the name of older ones
    if KernelLocator not in implementation._locator_classes:
        implementation._locator_classes.insert(0, KernelLocator)


_install()
