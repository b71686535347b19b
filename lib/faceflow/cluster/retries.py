"""What becomes of a task that failed: tried again, tried again in smaller steps, or given up. Knows no Ray."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from faceflow.errors import RunError

RETRIES = 5
"""Times a task is tried again after its worker died, or after an I/O error."""

MACHINE_RETRIES = 10
"""The same after its machine died: not the task's fault, and Ray goes on for a while to send work to a machine it has lost."""

MEMORY_RETRIES = 7
"""Times a task is tried again in smaller steps, each half as large as before, after it ran out of memory."""

FIRST_DELAY, LONGEST_DELAY = 0.5, 20.0
"""Seconds before the first retry, doubled each time: together half a minute after I/O errors, on top of what the S3 client
itself waits, and two minutes after a machine died."""

CRASHES_LIKE_MEMORY = 2
"""Deaths of a worker after which the kernel, which gives no reason, is taken to have killed it for its memory."""

KEPT = "what is finished is kept, and the same command continues"

Request = TypeVar("Request")


class Cause(enum.Enum):
    """Why a task failed."""

    IO = "an I/O error"
    DEATH = "its worker died"
    MACHINE = "its machine died"
    RAY = "the Ray of this command died"
    MEMORY = "it ran out of memory"


@dataclass
class Attempts(Generic[Request]):
    """One task, how often it failed, and how it is to be tried next.

    smaller: from a request, one that does the same work in steps of half the size; alone: whether it asks for a whole machine,
    so that no other task shares its memory; not_before: time of the clock before which it is not tried again.
    """

    request: Request
    label: str
    smaller: Callable[[Request], Request] | None = None
    alone: bool = False
    not_before: float = 0.0
    failures: dict[Cause, int] = field(default_factory=dict)

    def failed(self, cause: Cause, text: str, now: float) -> str:
        """Prepare the next attempt and say what it will be. Raises RunError when there have been enough."""
        count = self.failures[cause] = self.failures.get(cause, 0) + 1
        if cause is Cause.DEATH and self.smaller is not None and count >= CRASHES_LIKE_MEMORY and count <= RETRIES:
            return self._shrink(f"{cause.value} {count} times: {text}")
        if cause is Cause.MEMORY:
            if count > MEMORY_RETRIES or (self.alone and self.smaller is None):
                tried = "alone on its machine" if self.smaller is None else "even in small steps"
                raise RunError(
                    f"{self.label}: {text}; {tried} it needs more memory than there is: use machines with more; {KEPT}"
                )
            return self._shrink(f"{cause.value}: {text}")
        most = MACHINE_RETRIES if cause is Cause.MACHINE else RETRIES
        if count > most:
            raise RunError(f"{self.label}: gave up after {most} retries: {text}; {KEPT}")
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (count - 1)) * random.uniform(0.75, 1.25)
        self.not_before = now + delay
        return f"{self.label}: {cause.value}: {text}; trying again in {delay:.1f} s"

    def _shrink(self, text: str) -> str:
        self.alone = True
        if self.smaller is None:
            return f"{self.label}: {text}; trying again alone on its machine"
        self.request = self.smaller(self.request)
        return f"{self.label}: {text}; trying again in smaller steps"
