"""What happens in a worker: one task runs with its share of threads, and is measured. Imports no Ray."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from faceflow.cluster.step_records import Done

Request = TypeVar("Request")
Result = TypeVar("Result")

Moved = Callable[[], tuple[int, int]]
"""Bytes that this process has read and written so far."""

Limit = Callable[[int], Any]
"""Lets the compiled loops of a process use so many threads."""


def nothing_limited(threads: int) -> None:
    pass


def nothing_moved() -> tuple[int, int]:
    return 0, 0


def run_task(
    function: Callable[[Request], Result], request: Request, threads: int, moved: Moved, limit: Limit
) -> tuple[Result, Done]:
    """`function(request)` with `threads` threads of BLAS and compiled loops, and what it used."""
    from threadpoolctl import threadpool_limits

    begun, before = time.perf_counter(), moved()
    limit(threads)
    with threadpool_limits(limits=threads):
        result = function(request)
    read, written = (now - then for now, then in zip(moved(), before, strict=True))
    return result, Done(time.perf_counter() - begun, peak_memory(), read, written)


def hold(warm_up: Callable[[], Any]) -> None:
    """Warm a worker process up."""
    warm_up()
    # Holds its CPU a moment longer, so that the next warm-up needs, and starts, another process.
    time.sleep(0.3)


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes, resident pages of mapped files included."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
