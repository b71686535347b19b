"""How log lines look: plain text, or one JSON object a line for log collectors."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

FORMATS = ("text", "json")

_bound: dict[str, Any] = {}
_results: TextIO | None = None


def bind(**fields: Any) -> None:
    """Fields that every JSON line from now on carries, such as the run."""
    _bound.update(fields)


def event(name: str, /, **fields: Any) -> Mapping[str, object]:
    """`extra` of a log call: what the line says, as an event's name and fields for the JSON format."""
    return {"faceflow": {"event": name} | fields}


class JsonFormatter(logging.Formatter):
    """One object a line: `time` (UTC), `level`, `message`, what is bound, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= _bound | getattr(record, "faceflow", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


@contextlib.contextmanager
def results_alone() -> Iterator[None]:
    """Keep stdout for what `say` prints: whatever else writes there, as Ray does of its raylet's warnings, goes to stderr."""
    global _results
    _results = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results = None


def say(text: str) -> None:
    """Print a line of a command's result."""
    print(text, file=_results or sys.stdout)


def failed(message: str, exit_code: int) -> int:
    """Say on stderr why a command fails, as a log line where these are JSON; returns the exit code."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        logging.getLogger("faceflow").error("%s", message, extra=event("failed", exit_code=exit_code))
    else:
        print(message, file=sys.stderr)
    return exit_code


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


@contextlib.contextmanager
def lines_in_notebook(wanted: bool) -> Iterator[None]:
    """In a notebook, print each log line below its cell, unless the user handles log records already."""
    log = logging.getLogger("faceflow")
    if not (wanted and in_notebook()) or log.hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(sys.stdout), log.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def set_up(form: str, quiet: bool) -> None:
    """Log to stderr in one of FORMATS; quiet: warnings and errors only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[handler])
    for noisy in ("botocore", "aiobotocore", "s3fs", "numba", "faiss", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Without a home it says at length where it keeps its fonts.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
