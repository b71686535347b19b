"""What changed between two published runs: joins their labels on the id, as events and moves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from faceflow.errors import InputError, did_you_mean
from faceflow.kernels.clusters.cluster_ids import transitions
from faceflow.setting_types import StorageOptions
from faceflow.stages.publish.events import events, moves_schema
from faceflow.storage import column_types, layout
from faceflow.storage.object_store import Store
from faceflow.storage.pointer import read_pointer
from faceflow.tools.evaluate import published_ids, read_labels, same_id_type


@dataclass(frozen=True)
class Difference:
    """What one run changed of another. faces: in both; moved: of these, those with another cluster; new, gone: faces that only
    the second, or the first, has; events: how many of each; events_file, moves_file: where they are listed."""

    faces: int
    moved: int
    new: int
    gone: int
    events: dict[str, int]
    events_file: str
    moves_file: str


def compare_runs(
    output: str, first: str, second: str, to: str | None = None, storage_options: StorageOptions | None = None
) -> Difference:
    """Compare the labels of two runs of OUTPUT and write events.parquet and moves.parquet.

    to: the folder for them (default: OUTPUT/diffs/FIRST..SECOND). The files are laid out as an incremental run's `events/` and
    `moves/`. Rows without a cluster are left out. Raises InputError for a run that OUTPUT has no labels of.
    """
    store = Store.at(output, storage_options)
    known = [name.removeprefix("run=") for name in store.names("labels")]
    latest = read_pointer(store)
    words = {"latest": None, "previous": None} if latest is None else {
        "latest": latest.run_id, "previous": latest.parent_run_id,
    }  # fmt: skip
    for word in {first, second} & set(words):
        if words[word] is None:
            raise InputError(f"{output} has no {word} run: name a run, as `faceflow runs {output}` lists them")
    first, second = (words.get(run_id) or run_id for run_id in (first, second))
    tables = []
    for run_id in (first, second):
        if run_id not in known:
            raise InputError(f"{output} has no labels of a run {run_id!r}{did_you_mean(run_id, known)}")
        table = read_labels(store.address(layout.label_folder(run_id)), "id", "cluster", storage_options)
        tables.append(table.filter(pc.is_valid(table["value"])))
    a, b = same_id_type(tables[0], tables[1], first, second)
    at = pc.index_in(b["id"], value_set=a["id"]).fill_null(-1).to_numpy().astype(np.int64)
    ours, theirs = a["value"].to_numpy(), b["value"].to_numpy()
    was = np.where(at >= 0, ours[at] if len(ours) else -1, -1)
    gone = np.ones(len(ours), bool)
    gone[at[at >= 0]] = False
    table = events(*transitions(np.concatenate([was, ours[gone]]), np.concatenate([theirs, np.full(int(gone.sum()), -1)])))
    moved = np.flatnonzero(was != theirs)
    ids = pa.concat_arrays([*b["id"].take(pa.array(moved)).chunks, *a["id"].filter(pa.array(gone)).chunks])
    before = pa.array(np.concatenate([was[moved], ours[gone]]))
    before = pc.if_else(pc.less(before, 0), pa.scalar(None, pa.int64()), before)
    after = pa.concat_arrays([pa.array(theirs[moved]), pa.nulls(int(gone.sum()), pa.int64())])
    folder = Store.at(to, storage_options) if to else store.child(f"diffs/{first}..{second}")
    kind = published_ids(store.address(layout.label_folder(second)), storage_options)
    moves = pa.table([column_types.as_published(ids, kind), before, after], schema=moves_schema(kind))
    for name, content in (("events.parquet", table), ("moves.parquet", moves)):
        with folder.open_write(name, durable=True) as file:
            pq.write_table(content, file, compression="zstd")
    return Difference(
        int((at >= 0).sum()), int((was[moved] >= 0).sum()), int((at < 0).sum()), int(gone.sum()),
        dict(sorted(Counter(table["event"].to_pylist()).items())),
        folder.address("events.parquet"), folder.address("moves.parquet"),
    )  # fmt: skip
