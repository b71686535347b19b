"""Writes synthetic face data sets as Parquet, with their true identities."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from faceflow.errors import InputError, SettingsError, did_you_mean
from faceflow.setting_types import StorageOptions
from faceflow.storage.inputs import list_parquet, open_input
from faceflow.storage.object_store import Store, explain
from faceflow.tools.datasets import synthetic_faces

FILE_FACES = 131_072
CHUNK_FACES = 16_384
"""Faces drawn at once; a row group. Part of a set's definition, as each chunk has its own random stream."""


def synthesize(
    output: str,
    faces: int,
    *,
    dim: int = 256,
    mean_size: float = 68.5,
    sizes: str | None = None,
    look: str = "plain",
    seed: int = 0,
    storage_options: StorageOptions | None = None,
) -> dict[str, int]:
    """Write `faces` synthetic faces (columns id int64, embedding float32[dim], label int32) as Parquet files below `output`.

    look: plain (well separated people) or ms1m (calibrated on MS-Celeb-1M: nearer strangers, poor photos, wrong labels);
    sizes: Parquet with columns cluster_size and clusters, a real distribution of identity sizes, in place of mean_size.
    Returns {"faces", "identities", "files"}. The same arguments give the same bytes of data.
    Raises SettingsError for a bad number or a folder that already holds Parquet, InputError for a bad sizes file.
    """
    if faces < 1 or dim < 2 or mean_size < 1:
        raise SettingsError("--faces must be at least 1, --dim at least 2 and --mean-size at least 1")
    if look not in synthetic_faces.LOOKS:
        raise SettingsError(f"--look is {look!r}{did_you_mean(look, synthetic_faces.LOOKS)}")
    store = empty_folder(output, storage_options)
    rng = np.random.default_rng([seed, 0])
    if sizes is None:
        drawn = synthetic_faces.draw_sizes(faces, mean_size, rng)
    else:
        drawn = synthetic_faces.sizes_like(*_read_sizes(sizes, storage_options), faces, rng)
    world = synthetic_faces.make_world(drawn, dim, seed, synthetic_faces.LOOKS[look])
    files = write_files(
        store, faces, dim, lambda begin, end: (synthetic_faces.make_faces(world, begin, end), world.labels[begin:end])
    )
    return {"faces": faces, "identities": len(drawn), "files": files}


def empty_folder(output: str, options: StorageOptions | None) -> Store:
    """The store of a folder to write a data set to. Raises SettingsError where it holds Parquet, or cannot be written."""
    store = Store.at(output, options)
    if any(name.endswith(".parquet") for name in store.names("")):
        raise SettingsError(f"{output} already holds Parquet files: choose an empty folder")
    store.check_writable()
    return store


def write_files(store: Store, faces: int, dim: int, block: Callable[[int, int], tuple[np.ndarray, np.ndarray | None]]) -> int:
    """Write faces 0..faces-1 as Parquet files (id int64: their number, embedding float32[dim], label int32 where there is one);
    block(begin, end) gives embeddings and labels of some of them. Returns the number of files."""
    fields = [("id", pa.int64()), ("embedding", pa.list_(pa.float32(), dim)), ("label", pa.int32())]
    count = -(-faces // FILE_FACES)
    for index in range(count):
        first, last = index * FILE_FACES, min(faces, (index + 1) * FILE_FACES)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(store.open_write(f"faces-{index:05d}.parquet"))
            writer: pq.ParquetWriter | None = None
            for begin in range(first, last, CHUNK_FACES):
                end = min(begin + CHUNK_FACES, last)
                embeddings, labels = block(begin, end)
                columns = [
                    pa.array(np.arange(begin, end)),
                    pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), dim),
                ]
                columns += [pa.array(labels, pa.int32())] if labels is not None else []
                schema = pa.schema(fields[: len(columns)])
                if writer is None:
                    # Random floats do not compress and have no repeats: plain pages are the fastest to write and to read.
                    writer = stack.enter_context(
                        pq.ParquetWriter(file, schema, compression="none", use_dictionary=False, write_statistics=["id"])
                    )
                writer.write_table(pa.table(columns, schema=schema), row_group_size=CHUNK_FACES)
    return count


def _read_sizes(path: str, options: StorageOptions | None) -> tuple[np.ndarray, np.ndarray]:
    store, files = list_parquet(path, options)
    try:
        with open_input(store, files[0].path) as source:
            table = pq.read_table(source, columns=["cluster_size", "clusters"])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"cannot read {path} as a table of cluster_size and clusters: {explain(error)}") from None
    size, clusters = (table[name].to_numpy().astype(np.int64) for name in ("cluster_size", "clusters"))
    if len(size) == 0 or size.min() < 1 or clusters.min() < 0 or clusters.sum() == 0:
        raise InputError(f"{path}: cluster_size must be at least 1 and clusters at least 0, with at least one cluster")
    return size, clusters
