"""Turns the files that face-clustering papers publish into Parquet: raw float32 features with text labels, or NumPy arrays."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from faceflow.errors import InputError, SettingsError
from faceflow.kernels.graph.shared_neighbors import Block
from faceflow.setting_types import StorageOptions
from faceflow.tools.datasets.synthesize import empty_folder, write_files


def import_faces(
    features: str,
    output: str,
    *,
    labels: str | None = None,
    dim: int | None = None,
    storage_options: StorageOptions | None = None,
) -> dict[str, int]:
    """Write features as Parquet files (id int64: the row, embedding float32[dim], label int32 where given) below `output`.

    features: a local `.bin` of float32 rows of `dim` (MS1M, DeepFashion, YTF), or a `.npy` array [n, dim] (IJB-B); labels: a
    `.meta` text file with one integer a line, or a `.npy` vector. Only a chunk of the features is in memory at a time.
    Returns {"faces", "identities", "files"}; identities 0 without labels. Raises InputError where sizes do not fit,
    SettingsError for a missing --dim or a folder that is not empty.
    """
    rows = _features(features, dim)
    names = _labels(labels, len(rows)) if labels is not None else None
    store = empty_folder(output, storage_options)

    def block(begin: int, end: int) -> tuple[np.ndarray, np.ndarray | None]:
        return np.ascontiguousarray(rows[begin:end], np.float32), names[begin:end] if names is not None else None

    files = write_files(store, len(rows), rows.shape[1], block)
    return {"faces": len(rows), "identities": len(np.unique(names)) if names is not None else 0, "files": files}


def import_neighbors(path: str) -> Block:
    """A published neighbor table (`faiss_k_80.npz`) as a block: each face's neighbors by falling cosine, without itself.

    path: a local .npz whose array `data` is float[n, 2, k]: row numbers of the k nearest, and their distances 1 - cosine.
    Repeated and negative (absent) neighbors are left out. Raises InputError for anything else, naming the face.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "data" not in archive:
                raise InputError(f"{path} has no array 'data', only {', '.join(archive.files) or 'nothing'}")
            results = archive["data"]
    except (OSError, ValueError, EOFError, AttributeError, TypeError, BadZipFile) as error:
        raise InputError(f"cannot read {path} as a NumPy archive: {error}") from None
    if results.ndim != 3 or results.shape[1] != 2 or results.dtype.kind != "f":
        raise InputError(f"{path}: data is {results.dtype}{list(results.shape)}: a neighbor table is floats [faces, 2, k]")
    n, k = results.shape[0], results.shape[2]
    if results.dtype.itemsize < 8 and n > 2 ** (11 if results.dtype.itemsize == 2 else 24):
        raise InputError(f"{path}: {results.dtype} cannot number {n:,} faces")
    numbers, cosines = results[:, 0, :], 1 - results[:, 1, :].astype(np.float32)
    bad = ~((numbers >= -1) & (numbers < n) & (numbers == np.floor(numbers)) & (cosines >= -1.01) & (cosines <= 1.01))
    if bad.any():
        face, rank = np.argwhere(bad)[0]
        raise InputError(
            f"{path}: neighbor {rank} of face {face} is {numbers[face, rank]} at distance {results[face, 1, rank]}: rows are "
            f"0 to {n - 1} and distances 0 to 2"
        )
    rows = numbers.astype(np.int32)
    order = np.lexsort((rows, -cosines), axis=1)
    rows, cosines = np.take_along_axis(rows, order, 1), np.clip(np.take_along_axis(cosines, order, 1), -1, 1)
    by_row = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, by_row, 1)
    again = np.zeros(rows.shape, bool)
    np.put_along_axis(again, by_row[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
    kept = (rows >= 0) & (rows != np.arange(n)[:, None]) & ~again
    offsets = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]) if k else np.zeros(n + 1, np.int64)
    return offsets.astype(np.int64), rows[kept], cosines[kept]


def _load(path: str) -> np.ndarray:
    try:
        results = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read {path} as a NumPy array: {error}") from None
    if not isinstance(results, np.ndarray):
        raise InputError(f"{path} is an archive of several arrays: give one .npy array")
    return results


def _features(path: str, dim: int | None) -> np.ndarray:
    if path.endswith(".npy"):
        results = _load(path)
        if results.ndim != 2 or results.dtype.kind != "f" or 0 in results.shape:
            raise InputError(f"{path} is an array {results.dtype}{list(results.shape)}: features are floats [faces, dim]")
        if dim not in (None, results.shape[1]):
            raise InputError(f"{path} has features of dimension {results.shape[1]}, not {dim} as --dim says")
        return results
    if not path.endswith(".bin"):
        raise InputError(f"{path}: features are a .bin file of float32, or a .npy array")
    if dim is None or dim < 1:
        raise SettingsError(f"--dim is missing: {path} does not say of what dimension its features are")
    try:
        size = Path(path).stat().st_size
        if size == 0 or size % (4 * dim):
            raise InputError(
                f"{path} has {size:,} bytes: not a multiple of {4 * dim:,}, the bytes of one face of dimension {dim}"
            )
        return np.memmap(path, np.float32, "r").reshape(-1, dim)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _labels(path: str, faces: int) -> np.ndarray:
    if path.endswith(".npy"):
        results = _load(path)
        if results.ndim != 1 or results.dtype.kind not in "iu":
            raise InputError(f"{path} is an array {results.dtype}{list(results.shape)}: labels are integers [faces]")
    else:
        lines: list[int] = []
        try:
            with open(path, encoding="ascii") as file:
                for number, line in enumerate(file, 1):
                    try:
                        lines.append(int(line))
                    except ValueError:
                        raise InputError(f"{path}, line {number}: {line.strip()[:40]!r} is no integer") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is no text'}") from None
        results = np.array(lines, np.int64)
    if len(results) != faces:
        raise InputError(f"{path} has {len(results):,} labels, but there are {faces:,} faces")
    if len(results) and not -(2**31) <= int(results.min()) <= int(results.max()) < 2**31:
        raise InputError(f"{path}: labels must fit 32 bits")
    return np.asarray(results, np.int32)
