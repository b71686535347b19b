"""A run's labels as one commit to a Delta table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from faceflow.storage import layout, table_formats
from faceflow.storage.object_store import Store
from faceflow.storage.pointer import current_run_id


@dataclass(frozen=True)
class CommitLabels:
    """Request: the labels of a run into a Delta table; sequence: of their publication."""

    table: Store
    output: Store
    run_id: str
    sequence: int


def commit_labels(request: CommitLabels) -> int:
    """Put the run's labels into the table, file by file, in one commit; returns its version.

    Raises PublishError where another run was published since.
    """
    output, run_id = request.output, request.run_id
    folder = layout.label_folder(run_id)
    names = output.names(folder)

    def batches() -> Iterator[pa.RecordBatch]:
        for name in names:
            yield from labels_of(name).to_batches()

    def labels_of(name: str) -> pa.Table:
        return table_formats.as_delta(pq.read_table(pa.BufferReader(output.read_bytes(f"{folder}/{name}"))))

    def is_current() -> bool:
        return current_run_id(output) == run_id

    fence = table_formats.Fence(output.root, request.sequence, is_current)
    return table_formats.commit_labels(request.table, run_id, labels_of(names[0]).schema, batches, fence)
