"""Bytes that this process has read and written, for the metrics."""

from __future__ import annotations

import pyarrow as pa

_moved = [0, 0]


def moved() -> tuple[int, int]:
    """(bytes of the record batches that this process has read, bytes of the files that it has written) so far."""
    return _moved[0], _moved[1]


def count_read(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, counted as read."""
    _moved[0] += batch.nbytes
    return batch


def count_written(size: int) -> None:
    _moved[1] += size
