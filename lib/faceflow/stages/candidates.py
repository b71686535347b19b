"""Candidate files: what one shard, or one part, found for the rows of every part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from faceflow.kernels import topk
from faceflow.kernels.search import Probes
from faceflow.storage.files import Store
from faceflow.tables import CANDIDATES_SCHEMA


def probes_of(columns: Sequence[pa.ListArray]) -> Probes:
    counts = np.concatenate([np.diff(column.offsets.to_numpy()) for column in columns])
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets, np.concatenate([column.flatten().to_numpy() for column in columns])


def candidates_batch(rows: np.ndarray, offsets: np.ndarray, keys: np.ndarray) -> pa.RecordBatch:
    lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(keys, pa.uint64()))
    return pa.record_batch([pa.array(rows.astype(np.int32)), lists], schema=CANDIDATES_SCHEMA)


def read_candidates(run: Store, names: Sequence[str], part: int) -> list[topk.CandidateList]:
    """What each of these files holds for one part."""
    batches = [run.read_batch(name, part) for name in names]
    columns = [(batch.column(0).to_numpy(), batch.column(1)) for batch in batches if batch.num_rows]
    return [(rows, keys.offsets.to_numpy(), keys.values.to_numpy()) for rows, keys in columns]
