"""Every error that faceflow raises on purpose, and the exit code each one ends the command with.

FaceflowError
├── InputError             2  the data cannot be used: names the file, row or column, and what to do
├── SettingsError          2  a flag, key or value is wrong, or does not fit the run it is used on
│   └── FingerprintError   2  a finished stage was made from other input or settings; names the differing keys
├── RunError               3  the run could not finish; the same command continues it
├── QualityError           4  the result misses a quality gate that was asked for
└── PublishError           5  another run published first
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FaceflowError(Exception):
    """Base of all expected errors; the command prints its message, without a traceback, and exits with `exit_code`."""

    exit_code = 3


class InputError(FaceflowError):
    """The input data cannot be used."""

    exit_code = 2


class SettingsError(FaceflowError):
    """A setting is unknown, malformed or contradictory."""

    exit_code = 2


class FingerprintError(SettingsError):
    """A stage of this run was made from other input, settings or versions."""


class RunError(FaceflowError):
    """The run could not finish; what it has finished is kept, and the same command continues."""

    exit_code = 3


class QualityError(FaceflowError):
    """The result misses a quality gate."""

    exit_code = 4


class PublishError(FaceflowError):
    """Another run published to the same OUTPUT while this one was running."""

    exit_code = 5


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or the list of known names when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def one_line(name: str) -> str:
    """A name from outside, in one line and without control characters, for messages and logs."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
