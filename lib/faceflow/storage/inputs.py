"""Finding and opening the Parquet files of an input."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from faceflow.errors import InputError
from faceflow.storage.files import FileInfo, Store, explain


def list_parquet(address: str, options: Mapping[str, Any] | None) -> tuple[Store, list[FileInfo]]:
    """The Parquet files of a file, folder (nested) or glob, sorted by path.

    Hidden files (their name or a folder's begins with '.' or '_', as Spark's markers do) are passed over.
    Raises InputError where there is nothing to read, or where a folder holds a visible file that is not Parquet.
    """
    store = Store.at(address, options)
    fs, root = store.fs, store.root
    prefix = "" if store.is_local else "s3://"
    try:
        if not store.is_local:
            fs.invalidate_cache()
        if glob.has_magic(root) and not fs.exists(root):
            found = {prefix + p if prefix and not p.startswith(prefix) else p: i for p, i in fs.glob(root, detail=True).items()}
            chosen = {p: i for p, i in found.items() if i["type"] == "file"}
        elif fs.isfile(root):
            chosen = {root: fs.info(root)}
        else:
            if not fs.exists(root):
                raise InputError(f"input {address} does not exist: name a Parquet file, a folder of them or a glob")
            listing = fs.find(root, detail=True)
            chosen = {}
            for path, info in listing.items():
                full = prefix + path if prefix and not path.startswith(prefix) else path
                relative = full[len(root) :].lstrip("/")
                if info.get("type") != "file" or any(part[:1] in "._" for part in relative.split("/")):
                    continue
                if not relative.lower().endswith((".parquet", ".pq", ".parq")):
                    raise InputError(
                        f"{full} is not a Parquet file (its name does not end in .parquet, .pq or .parq): "
                        "move it away, or name the files with a glob"
                    )
                chosen[full] = info
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot read input {address}: {explain(error)}") from None
    if not chosen:
        raise InputError(f"input {address} holds no Parquet file")
    files = []
    for path in sorted(chosen):
        info = chosen[path]
        version = info.get("ETag") or info.get("mtime") or info.get("LastModified") or ""
        files.append(FileInfo(path, int(info["size"]), str(version).strip('"')))
    return store, files


def open_input(store: Store, path: str) -> Any:
    """A readable file object for pyarrow: memory-mapped on a disk, with read-ahead by range on S3."""
    if store.is_local:
        return pa.memory_map(path)
    return pa.PythonFile(store.fs.open(path, "rb", cache_type="readahead", block_size=8 * 2**20))


def contains(outer: str, inner: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether address `inner` is `outer` or lies below it."""
    a, b = Store.at(outer, options), Store.at(inner, options)
    if a.is_local != b.is_local:
        return False
    first, second = (os.path.realpath(a.root), os.path.realpath(b.root)) if a.is_local else (a.root, b.root)
    return second == first or second.startswith(first.rstrip("/") + "/")
