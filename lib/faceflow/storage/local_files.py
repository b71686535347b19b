"""Local files that appear whole or not at all, locks, and second names of one file."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from typing import BinaryIO

from faceflow.errors import RunError
from faceflow.storage.traffic import count_written

TEMPORARY = ".tmp-"
"""What names of files begin with that are being written."""

LOCK_SECONDS = 30.0
"""How long a lock is waited for, which is held for milliseconds."""


def temporary_beside(path: str) -> str:
    """The name under which a file is written before it appears as `path`; its folder is made."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, f"{TEMPORARY}{name}-{secrets.token_hex(6)}")


@contextlib.contextmanager
def write_whole(path: str, durable: bool) -> Iterator[BinaryIO]:
    """A new file that appears as `path` when the block ends without an error. durable: also flush it to the disk before.

    Raises RunError where the disk is full.
    """
    folder, temporary = os.path.dirname(path), temporary_beside(path)
    try:
        # No other user reads a half-written file; whole, it gets the mode that any new file would have.
        with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            yield file
            count_written(file.tell())
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        reached = os.path.getsize(temporary) if os.path.exists(temporary) else 0
        _unlink(temporary)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(folder).free
            raise RunError(
                f"the disk is full: {path} needs more than {reached + free:,} bytes, and {free:,} are free there; make room or "
                "give another --work-dir; what is finished is kept, and the same command continues"
            ) from None
        raise
    if durable:
        sync_folder(folder)


def replace_if(path: str, data: bytes, expected: str | None) -> bool:
    """Replace a file if its version is still `expected` (None: it must not exist): lock, compare, fsync, rename; whether it
    was."""
    temporary = temporary_beside(path)
    try:
        # Written and flushed before the lock, which is held for a look and a rename: a process may be suspended there.
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with exclusive(path):
            if version_of(path) != expected:
                return False
            os.replace(temporary, path)
    finally:
        _unlink(temporary)
    sync_folder(os.path.dirname(path))
    return True


def version_of(path: str) -> str | None:
    """A hash of a file's content; None where there is no file."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except FileNotFoundError:
        return None


def link(source: str, target: str) -> bool:
    """Make `target` a second name of a file; False where the disk has no such names."""
    temporary = temporary_beside(target)
    try:
        os.link(source, temporary)
    except OSError:
        return False
    try:
        os.replace(temporary, target)
    finally:
        # Of two names of one file nothing becomes of a rename: the first stays.
        _unlink(temporary)
    return True


def remove_temporaries(root: str, older_than: float) -> int:
    """Remove what killed writers have left below a folder before `older_than` (Unix time); returns how many files."""
    removed = 0
    for folder, _, names in os.walk(root):
        for path in (os.path.join(folder, name) for name in names if name.startswith(TEMPORARY)):
            with contextlib.suppress(FileNotFoundError):
                if os.path.getmtime(path) < older_than:
                    os.unlink(path)
                    removed += 1
    return removed


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@functools.lru_cache(maxsize=1)
def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(path: str) -> Iterator[None]:
    import fcntl

    # A kernel lock ends with its process, so a killed run never leaves the output locked; a suspended one may.
    name = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.lock")
    deadline = time.monotonic() + LOCK_SECONDS
    with open(name, "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(
                        f"another process has held the lock {name} for {LOCK_SECONDS:.0f} s: it may be suspended; end it "
                        "(`fuser` names it)"
                    ) from None
                time.sleep(0.01)
        yield


def locks_exclude(path: str) -> bool:
    """Whether a lock on a file that one handle holds keeps out another."""
    import fcntl

    try:
        with open(path, "w") as first, open(path, "w") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
