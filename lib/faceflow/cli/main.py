"""Runs one command: errors become exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence

from faceflow import logs
from faceflow.cli.commands import COMMANDS
from faceflow.cli.parser import build_parser
from faceflow.errors import FaceflowError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments, unknown = build_parser().parse_known_args(argv)
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    quiet = getattr(arguments, "quiet", False)
    logs.set_up(getattr(arguments, "log_format", "text"), quiet)
    try:
        with _termination_as_interrupt():
            with logs.results_alone():
                COMMANDS[arguments.command](arguments)
            sys.stdout.flush()
        return 0
    except FaceflowError as error:
        return logs.failed(f"error: {error}", error.exit_code)
    except BrokenPipeError:
        # Who reads the output wants no more of it; what the command did is done.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, SystemExit):  # the latter from Ray, while it starts
        return logs.failed("interrupted; the same command continues", 3)
    except Exception as error:
        traceback.print_exc()
        return logs.failed(f"error: unexpected {type(error).__name__}: {error}; please report it with the lines above", 3)


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """A command that gets SIGTERM (a scheduler's time limit) ends as at Ctrl-C."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
