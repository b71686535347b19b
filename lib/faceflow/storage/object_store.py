"""One file store over local disks and S3: whole-file writes, conditional replacement, memory-mapped or ranged Arrow reads."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa

from faceflow.errors import FaceflowError, PublishError, RunError, SettingsError
from faceflow.setting_types import StorageOptions
from faceflow.storage import local_files, s3_requests
from faceflow.storage.s3_options import check_options, endpoint_of
from faceflow.storage.traffic import count_read, count_written


@dataclass(frozen=True)
class Store:
    """A folder on a local or shared disk, or a prefix of a bucket. Cheap to send to a worker.

    root: absolute local folder or `s3://bucket/prefix`; options: of the s3fs file system, never logged or stored.
    """

    root: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def at(cls, address: str, options: StorageOptions | None = None) -> Store:
        check_options(options or {})
        if "://" not in address:
            return cls(os.path.abspath(os.path.expanduser(address)))
        scheme = address.split("://", 1)[0]
        if scheme == "file":
            return cls(os.path.abspath(address.split("://", 1)[1]))
        if scheme not in ("s3", "s3a"):
            raise SettingsError(f"{address}: only local paths and s3:// addresses are supported")
        endpoint_of(options or {})
        frozen = tuple(sorted((k, json.dumps(v, sort_keys=True)) for k, v in (options or {}).items()))
        return cls("s3://" + address.split("://", 1)[1].rstrip("/"), frozen)

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    @property
    def is_local(self) -> bool:
        return not self.root.startswith("s3://")

    @property
    def fs(self) -> Any:
        return _file_system(self.is_local, self.options)

    def child(self, relative: str) -> Store:
        return Store(self.address(relative), self.options)

    def address(self, relative: str = "") -> str:
        """Full local path or s3:// address."""
        return f"{self.root.rstrip('/')}/{relative}" if relative else self.root

    # -- reading ------------------------------------------------------------------------------------------------------

    def exists(self, relative: str) -> bool:
        with self._explained(relative):
            self.fs.invalidate_cache()
            return bool(self.fs.exists(self.address(relative)))

    def size(self, relative: str) -> int | None:
        """Bytes of a file, or None where there is none."""
        with self._explained(relative):
            try:
                self.fs.invalidate_cache()
                return int(self.fs.size(self.address(relative)))
            except FileNotFoundError:
                return None

    def read_bytes(self, relative: str) -> bytes:
        with self._explained(relative):
            return bytes(self.fs.cat_file(self.address(relative)))

    def read_json(self, relative: str) -> Any:
        """The object in a JSON file, or None where there is no such file."""
        try:
            with self._explained(relative):
                return json.loads(self.fs.cat_file(self.address(relative)))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise RunError(f"{self.address(relative)} is not valid JSON ({error}): it was not written by faceflow") from None

    def names(self, relative: str) -> list[str]:
        """Names directly below a folder, sorted; none where there is no such folder."""
        with self._explained(relative):
            try:
                self.fs.invalidate_cache()
                results = self.fs.ls(self.address(relative), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(name for name in (p.rstrip("/").rsplit("/", 1)[-1] for p in results) if local_files.TEMPORARY not in name)

    def total_size(self, relative: str) -> int:
        """Bytes of all files below a folder; 0 where there is none."""
        with self._explained(relative):
            try:
                self.fs.invalidate_cache()
                return int(self.fs.du(self.address(relative)))
            except FileNotFoundError:
                return 0

    @contextlib.contextmanager
    def open_arrow(self, relative: str) -> Iterator[pa.RecordBatchFileReader]:
        """An Arrow IPC file: memory-mapped on a disk, read by range on S3, so that one batch costs that batch alone."""
        with self._explained(relative):
            source = (
                pa.memory_map(self.address(relative))
                if self.is_local
                else self.fs.open(self.address(relative), "rb", cache_type="none")
            )
            with source:
                yield pa.ipc.open_file(source)

    def read_batch(self, relative: str, index: int = 0) -> pa.RecordBatch:
        """One record batch of an Arrow IPC file; a memory map stays alive as long as the batch."""
        with self._explained(relative):
            if self.is_local:
                return count_read(pa.ipc.open_file(pa.memory_map(self.address(relative))).get_batch(index))
            with self.fs.open(self.address(relative), "rb", cache_type="none") as source:
                return count_read(pa.ipc.open_file(pa.PythonFile(source)).get_batch(index))

    # -- writing ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def open_write(self, relative: str, durable: bool = False) -> Iterator[Any]:
        """A new file that appears under its name when the block ends without an error, whole, or not at all.

        durable: also flush it to the disk before it appears (S3 always does).
        """
        with self._explained(relative):
            if self.is_local:
                with local_files.write_whole(self.address(relative), durable) as file:
                    yield file
                return
            # One put, or a multipart upload that completes on close: nothing is visible before.
            handle = self.fs.open(self.address(relative), "wb", block_size=16 * 2**20)
            try:
                yield handle
                count_written(handle.tell())
            except BaseException:
                handle.discard()
                handle.closed = True
                raise
            handle.close()

    def write_bytes(self, relative: str, data: bytes, durable: bool = False) -> None:
        with self.open_write(relative, durable) as file:
            file.write(data)

    def write_json(self, relative: str, value: Any, durable: bool = True) -> None:
        """Durable by default: manifests and run records say what else can be trusted."""
        self.write_bytes(relative, _json_bytes(value), durable)

    def write_arrow(self, relative: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
        """Arrow IPC file of uncompressed batches (so that reads can be memory maps); returns its bytes.

        Not flushed: after a power cut a task may be gone or short, which its size in the manifest reveals.
        """
        with self.open_write(relative) as file:
            with pa.ipc.new_file(file, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            return int(file.tell())

    def replace_json(self, relative: str, value: Any, expected: str | None) -> str:
        """Replace a JSON file only if its version is still `expected` (None: it must not exist); returns its new version.

        S3: a conditional put (If-Match, If-None-Match); a put repeated because its answer was lost is recognised. Disk: an
        exclusive lock file, compare, fsync, rename.
        Raises PublishError when another writer came first; the file then is that writer's, untouched.
        """
        data = _json_bytes(value)
        lost = PublishError(f"{self.address(relative)} was replaced by another run meanwhile; it stays as that run left it")
        with self._explained(relative):
            if self.is_local:
                if not local_files.replace_if(self.address(relative), data, expected):
                    raise lost
                return hashlib.sha256(data).hexdigest()
            version = s3_requests.put_if(self.fs, self.address(relative), data, expected)
            if version is None:
                # A put whose answer was lost on the way is sent again, and then finds itself there.
                content, version = self.read_versioned(relative)
                if content != data or version is None:
                    raise lost
            return version

    def read_versioned(self, relative: str) -> tuple[bytes | None, str | None]:
        """(content, version) of a file, which belong together; None where there is no file."""
        while True:
            version = self.version(relative)
            try:
                data = self.read_bytes(relative) if version is not None else None
            except FileNotFoundError:
                data = None
            if self.version(relative) == version and (data is None) == (version is None):
                return data, version

    def version(self, relative: str) -> str | None:
        """What `replace_json` compares: the ETag on S3, a hash of the content on a disk; None where there is no file."""
        with self._explained(relative):
            if self.is_local:
                return local_files.version_of(self.address(relative))
            try:
                return s3_requests.etag(self.fs, self.address(relative))
            except FileNotFoundError:
                return None

    def share(self, source: Store, relative: str, target: str) -> int:
        """Put a file of another store on the same disk or S3 at `target`, without moving its bytes; returns their number.

        A disk: a second name of the same file (a copy where the disk has no such names); S3: copied by the server. The file
        outlives the removal of its first name. Whole files are never written to again.
        """
        with self._explained(target):
            if self.is_local and source.is_local:
                if not local_files.link(source.address(relative), self.address(target)):
                    with self.open_write(target) as file, open(source.address(relative), "rb") as original:
                        shutil.copyfileobj(original, file, 16 * 2**20)
            elif not self.is_local and not source.is_local and self.options == source.options:
                self.fs.copy(source.address(relative), self.address(target))
            else:
                with self.open_write(target) as file:
                    file.write(source.read_bytes(relative))
        return self.size(target) or 0

    def delete(self, relative: str) -> None:
        """Remove a file or a folder with all below it; nothing happens where there is none."""
        with self._explained(relative), contextlib.suppress(FileNotFoundError):
            self.fs.invalidate_cache()
            self.fs.rm(self.address(relative), recursive=True)

    def remove_leftovers(self, older_than: float) -> int:
        """Remove what writers that were killed have left below this folder: temporary files, and parts of uploads that were
        never completed, begun before `older_than` (Unix time); returns how many."""
        with self._explained(""):
            if self.is_local:
                return local_files.remove_temporaries(self.root, older_than)
            return s3_requests.abort_uploads(self.fs, f"{self.root}/", older_than)

    def check_writable(self) -> None:
        """Write and remove a small file. Raises SettingsError with the cause."""
        probe = f"{local_files.TEMPORARY}check-{secrets.token_hex(6)}"
        try:
            if self.is_local:
                os.makedirs(self.root, exist_ok=True)
                with open(self.address(probe), "xb"):
                    pass
                os.unlink(self.address(probe))
            else:
                self.fs.pipe_file(self.address(probe), b"")
                self.fs.rm_file(self.address(probe))
        except Exception as error:
            raise SettingsError(f"cannot write to {self.root}: {explain(error)}") from None

    def check_conditional_writes(self) -> None:
        """Write a small file twice, on conditions of which the second does not hold, and remove it: leases and the pointer to
        the published labels rest on a store's refusal. Raises SettingsError where it does not refuse."""
        name = f"{local_files.TEMPORARY}condition-{secrets.token_hex(6)}"
        try:
            if self.is_local:
                os.makedirs(self.root, exist_ok=True)
                honoured = local_files.locks_exclude(self.address(name))
            else:
                honoured = self._refuses_stale_puts(name)
        except Exception as error:
            raise SettingsError(f"cannot use {self.root}: a conditional write failed ({explain(error)})") from None
        if not honoured:
            what = "file locks (flock)" if self.is_local else "conditional writes (If-None-Match, If-Match)"
            raise SettingsError(
                f"{self.root} ignores {what}: two runs could overwrite each other's work; use a store that honours them"
            )

    def _refuses_stale_puts(self, name: str) -> bool:
        stale: dict[str, str | None] = {}
        try:
            stale["IfMatch"] = self.replace_json(name, {"n": 1}, None)
            self.replace_json(name, {"n": 2}, stale["IfMatch"])
            for expected in (None, stale["IfMatch"]):
                try:
                    self.replace_json(name, {"n": 3}, expected)
                except PublishError:
                    continue
                return False
            return True
        finally:
            self.delete(name)

    @contextlib.contextmanager
    def _explained(self, relative: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except FaceflowError:
            raise
        except PermissionError as error:
            raise PermissionError(f"{self.address(relative)}: {explain(error)}") from error
        except (OSError, pa.ArrowInvalid) as error:
            raise OSError(f"{self.address(relative)}: {explain(error)}") from error
        except Exception as error:
            if type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
                raise OSError(f"{self.address(relative)}: {explain(error)}") from error
            raise


@functools.lru_cache(maxsize=8)
def _file_system(local: bool, options: tuple[tuple[str, Any], ...]) -> Any:
    if local:
        return fsspec.filesystem("file")
    decoded = {key: json.loads(value) for key, value in options}
    config = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 5, "mode": "standard"}}
    config.update(decoded.pop("config_kwargs", {}))
    return fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=config, **decoded)


def explain(error: BaseException) -> str:
    """One line on what went wrong, without a traceback."""
    text = str(getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    # What S3 says where an answer has no body, as to a HEAD request.
    return "Bad Request (without a reason: expired credentials are a usual one)" if text == "Bad Request" else text


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
