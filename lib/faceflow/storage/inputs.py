"""Finding and opening the Parquet files of an input."""

from __future__ import annotations

import glob
import os
import re
import socket
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from faceflow.errors import InputError, SettingsError, one_line
from faceflow.setting_types import StorageOptions
from faceflow.storage import table_formats
from faceflow.storage.file_info import FileInfo, TableSnapshot
from faceflow.storage.object_store import Store, explain
from faceflow.storage.s3_options import endpoint_of

FOOTERS_AT_ONCE = 8


class Listing(NamedTuple):
    """The Parquet files of an input as they were when it was listed, by path; snapshot: of which table's, if it is one."""

    store: Store
    files: list[FileInfo]
    snapshot: TableSnapshot | None


def list_faces(address: str, options: StorageOptions | None, snapshot: int | None = None) -> Listing:
    """The Parquet files of a file, folder or glob (`list_parquet`), or of a snapshot of a Delta or Iceberg table, and then also
    which one.

    Rows of files on a disk are counted (their footers are read), as a modification time says less than an ETag does; a table's
    files are never written again.
    """
    store = Store.at(address, options)
    if not store.is_local:
        check_endpoint(address, options)
    try:
        kind = table_formats.table_kind(store)
    except OSError:
        kind = None  # whatever is wrong, a plain listing says best
    if kind is not None:
        results = table_formats.open_snapshot(store, kind, snapshot)
        return Listing(store, results.files, TableSnapshot(kind, results.version))
    if snapshot is not None:
        raise SettingsError(f"snapshot is {snapshot}, but {address} is neither a Delta nor an Iceberg table")
    store, listed = list_parquet(address, options)
    if store.is_local:
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            listed = [replace(file, rows=rows) for file, rows in zip(listed, pool.map(_rows_of, listed), strict=True)]
    return Listing(store, listed, None)


def _rows_of(file: FileInfo) -> int | None:
    try:
        return int(pq.read_metadata(file.path).num_rows)
    except (OSError, pa.ArrowException):
        return None  # who reads it says what is wrong with it


def list_parquet(address: str, options: StorageOptions | None) -> tuple[Store, list[FileInfo]]:
    """The Parquet files of a file, folder (nested) or glob of files and folders, sorted by path.

    Hidden files (their name or a folder's begins with '.' or '_', as Spark's markers do) and Hadoop's `*_$folder$` and `*.crc`
    are passed over. Raises InputError where there is nothing to read, where a folder holds a visible file that is not Parquet,
    and where files belong to a Delta or Iceberg table that is not named itself: those that it has deleted would be read too.
    """
    store = Store.at(address, options)
    if not store.is_local:
        check_endpoint(address, options)
    fs, root = store.fs, store.root
    prefix = "" if store.is_local else "s3://"
    try:
        if not store.is_local:
            fs.invalidate_cache()
        if glob.has_magic(root) and not fs.exists(root):
            chosen: dict[str, Mapping[str, Any]] = {}
            fixed = root[: re.search(r"[*?\[]", root).start()].rpartition("/")[0]  # type: ignore[union-attr]
            hidden = any(part[:1] in ("_", ".") for part in root[len(fixed) :].split("/") if part)
            for path, info in fs.glob(root, detail=True).items():
                full = prefix + path if prefix and not path.startswith(prefix) else path
                entry = _followed(full, info) if store.is_local else info
                if not hidden and any(_is_marker(part) for part in full[len(fixed) :].strip("/").split("/")):
                    continue
                if entry["type"] == "directory":
                    chosen |= _files_below(store, full.rstrip("/"))
                elif entry["type"] == "file":
                    chosen[full] = entry
            _refuse_inside_table(store, fixed)
            _refuse_tables(store, _folders_between(fixed, chosen))
        elif fs.isfile(root):
            _refuse_inside_table(store, root.rpartition("/")[0])
            chosen = {root: _followed(root, fs.info(root)) if store.is_local else fs.info(root)}
        else:
            if not fs.exists(root):
                raise InputError(f"input {address} does not exist: name a Parquet file, a folder of them or a glob")
            _refuse_inside_table(store, root)
            chosen = _files_below(store, root)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot read input {address}: {_reason(store, error)}") from None
    if not chosen:
        raise InputError(f"input {address} holds no Parquet file")
    return store, [_file_info(path, chosen[path]) for path in sorted(chosen)]


def _is_marker(name: str) -> bool:
    """Whether a file is hidden, or one that Hadoop and Spark leave beside data."""
    return name[:1] in "._" or name.endswith(("_$folder$", ".crc"))


def _files_below(store: Store, folder: str) -> dict[str, Mapping[str, Any]]:
    """Every Parquet file below a folder, by address."""
    prefix = "" if store.is_local else "s3://"
    chosen: dict[str, Mapping[str, Any]] = {}
    for path, info in store.fs.find(folder, detail=True).items():
        full = prefix + path if prefix and not path.startswith(prefix) else path
        relative = full[len(folder) :].lstrip("/")
        parts = relative.split("/")
        if "_delta_log" in parts[:-1] or (full.endswith(".metadata.json") and parts[-2:-1] == ["metadata"]):
            cut = len(parts) - 2 if "_delta_log" not in parts else parts.index("_delta_log")
            table = "/".join([folder, *parts[:cut]])
            raise InputError(_name_the_table(table, "Delta" if "_delta_log" in parts else "Iceberg"))
        if any(_is_marker(part) for part in parts):
            continue
        entry = _followed(full, info) if store.is_local else info
        if entry["type"] == "directory":
            raise InputError(
                f"{one_line(full)} is a link to a folder, and those are not followed: name the folder itself as input, "
                "or put the files, or links to them, in its place"
            )
        if entry["type"] != "file":
            continue
        if not relative.lower().endswith((".parquet", ".pq", ".parq")):
            raise InputError(
                f"{one_line(full)} is not a Parquet file (its name does not end in .parquet, .pq or .parq): "
                "move it away, or name the files with a glob"
            )
        chosen[full] = entry
    return chosen


def _folders_between(top: str, paths: Iterable[str]) -> list[str]:
    """Every folder below `top` that one of these files is in, at any depth."""
    results: set[str] = set()
    for path in paths:
        folder = path.rpartition("/")[0]
        while len(folder) > len(top) and folder not in results:
            results.add(folder)
            folder = folder.rpartition("/")[0]
    return sorted(results)


def _refuse_tables(store: Store, folders: Sequence[str]) -> None:
    """Raise InputError where one of these folders is a Delta or Iceberg table."""
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        kinds = pool.map(lambda folder: table_formats.table_kind(Store(folder, store.options)), folders)
        for folder, kind in zip(folders, kinds, strict=True):
            if kind is not None:
                raise InputError(_name_the_table(folder, kind.capitalize()))


def _refuse_inside_table(store: Store, folder: str) -> None:
    """Raise InputError where a folder, or one above it, is a Delta or Iceberg table."""
    while folder.strip("/") not in ("", "s3:"):
        try:
            kind = table_formats.table_kind(Store(folder, store.options))
        except OSError:
            return  # a folder above, which these credentials may not list
        if kind is not None:
            raise InputError(_name_the_table(folder, kind.capitalize()))
        folder = folder.rpartition("/")[0]


def _name_the_table(table: str, kind: str) -> str:
    return (
        f"{one_line(table)} is {'an' if kind == 'Iceberg' else 'a'} {kind} table, and its folders also hold files that it has "
        "deleted: name the table itself as INPUT"
    )


def _followed(path: str, info: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a file system says of a local path, or, where that is a link, of what it leads to.

    Raises InputError where that is not there.
    """
    if not os.path.islink(path):
        return info
    try:
        results = os.stat(path)
    except FileNotFoundError:
        raise InputError(f"{one_line(path)} is a link to a file that is not there: restore it or remove the link") from None
    kind = "directory" if stat.S_ISDIR(results.st_mode) else "file" if stat.S_ISREG(results.st_mode) else "other"
    return {"type": kind, "size": results.st_size, "mtime": results.st_mtime}


def list_file(address: str, options: StorageOptions | None) -> tuple[Store, FileInfo]:
    """One file, whatever its kind. Raises InputError where it is not there."""
    store = Store.at(address, options)
    if not store.is_local:
        check_endpoint(address, options)
    try:
        store.fs.invalidate_cache()
        if not store.fs.isfile(store.root):
            raise InputError(f"{one_line(address)} is not a file that is there")
        info = store.fs.info(store.root)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot read {one_line(address)}: {_reason(store, error)}") from None
    return store, _file_info(store.root, info)


def _file_info(path: str, info: Mapping[str, Any]) -> FileInfo:
    version = info.get("ETag") or info.get("mtime") or info.get("LastModified") or ""
    return FileInfo(path, int(info["size"]), str(version).strip('"'))


def check_endpoint(address: str, options: StorageOptions | None) -> None:
    """Raise InputError within seconds where the S3 server that was named does not answer; its client would try for longer."""
    given = endpoint_of(options or {})
    if given is None:
        return
    parts = urlsplit(given)
    error: OSError | None = None
    for wait in (1, 3, 0):
        try:
            socket.create_connection((parts.hostname, parts.port or (80 if parts.scheme == "http" else 443)), 10).close()
            return
        except OSError as caught:
            error = caught
            time.sleep(wait)
    assert error is not None
    raise InputError(f"cannot read {address}: the S3 endpoint {given} does not answer ({explain(error)}); check endpoint_url")


def _reason(store: Store, error: Exception) -> str:
    """What went wrong and what to do. S3 answers some requests without a reason; a listing always gets one."""
    if not store.is_local and isinstance(error, OSError):
        try:
            store.fs.call_s3("list_objects_v2", Bucket=store.root.removeprefix("s3://").split("/")[0], MaxKeys=1)
        except Exception as found:
            error = found
    advice = "; check the credentials (AWS_* environment, profile, instance role or --storage-options) and what they allow"
    return explain(error) + (advice if isinstance(error, PermissionError) and not store.is_local else "")


def open_input(store: Store, path: str) -> Any:
    """A readable file object for pyarrow: memory-mapped on a disk, with read-ahead by range on S3."""
    if store.is_local:
        return pa.memory_map(path)
    try:
        return pa.PythonFile(store.fs.open(path, "rb", cache_type="readahead", block_size=8 * 2**20))
    except Exception as error:
        if type(error).__name__ != "NoCredentialsError":
            raise
        # The driver could list the files: it has credentials that this machine lacks.
        raise PermissionError(
            f"no credentials on {socket.gethostname()}: give every machine of the cluster the same (an instance role, or the "
            "AWS_* environment where Ray is started), or use --storage-options"
        ) from None


def contains(outer: str, inner: str, options: StorageOptions | None = None) -> bool:
    """Whether address `inner` is `outer` or lies below it."""
    a, b = Store.at(outer, options), Store.at(inner, options)
    if a.is_local != b.is_local:
        return False
    first, second = (os.path.realpath(a.root), os.path.realpath(b.root)) if a.is_local else (a.root, b.root)
    return second == first or second.startswith(first.rstrip("/") + "/")
