"""Which faces go to which shard: writes and carries over the `cells/` files, one record batch a shard."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from faceflow.kernels import probing
from faceflow.kernels.topk import decode
from faceflow.stages.reading import read_quantizer, read_vectors
from faceflow.storage import layout
from faceflow.storage.files import Store
from faceflow.storage.manifests import is_whole
from faceflow.tables import QUANTIZER_METADATA, cells_schema


@dataclass(frozen=True)
class Assigned:
    """What one part's file of cells holds: (face, cell) pairs, (face, shard) pairs that travel, the sum of the faces'
    similarities to their nearest centroid, and the faces at home in each cell."""

    probes: int
    sent: int
    near: float
    homes: tuple[int, ...]


def read_rules(run: Store) -> tuple[probing.ProbeRule, probing.ProbeRule, float | None]:
    """How faces probe where visitors meet, how where they do not, and the predicted recall."""
    with run.open_arrow(layout.CENTROIDS) as reader:
        trained = json.loads(reader.schema.metadata[QUANTIZER_METADATA])
    return probing.ProbeRule(**trained["rule"]), probing.ProbeRule(**trained["alone"]), trained["recall"]


def assign_part(run: Store, part: int, dim: int, rule: probing.ProbeRule) -> tuple[dict[str, int], Assigned]:
    """Write one part's cells: one record batch per shard with the faces that probe a cell of it.

    Returns the file's bytes and what it holds. On a disk shards gather the vectors from the part itself; on S3 the vectors
    travel in the batch, so that a shard reads what it needs by range.
    """
    name = layout.part("cells", part)
    if not is_whole(run, name):
        vectors = read_vectors(run, part, dim)
        write_cells(run, name, vectors, np.arange(len(vectors), dtype=np.int32), dim, rule)
    return _written(run, name)


def write_cells(run: Store, name: str, vectors: np.ndarray, rows: np.ndarray, dim: int, rule: probing.ProbeRule) -> None:
    """Write the cells that these faces probe; rows: int32[n], ascending, theirs within the part."""
    centroids, starts = read_quantizer(run, dim)
    offsets, keys = probing.probe_keys(vectors, centroids, rule)
    similarities, cells = decode(keys)
    # One entry per (shard, face) that meet, in that order; a face may probe several cells of one shard.
    owner = np.repeat(np.arange(len(vectors)), np.diff(offsets))
    n = max(1, len(vectors))
    travel = np.unique((np.searchsorted(starts, cells, side="right") - 1) * n + owner)
    bounds = np.searchsorted(travel, np.arange(len(starts)) * n)
    homes = np.bincount(cells[offsets[:-1]], minlength=len(centroids))
    assigned = Assigned(len(cells), len(travel), float(similarities[offsets[:-1]].sum(dtype=float)), tuple(homes.tolist()))
    schema = cells_schema(None if run.is_local else dim)
    lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(cells), type=schema.field(1).type)

    def batches() -> Iterator[pa.RecordBatch]:
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            here = travel[begin:end] % n
            columns = [pa.array(rows[here]), lists.take(pa.array(here))]
            if not run.is_local:
                column = pa.FixedSizeListArray.from_arrays(pa.array(vectors[here].ravel()), dim)
                columns.append(column.cast(schema.field(2).type))
            yield pa.record_batch(columns, schema=schema)

    _write(run, name, schema, batches(), assigned)


def carry_cells(run: Store, past: Store, part: int, dim: int, first_row: int, rows: int) -> tuple[dict[str, int], Assigned]:
    """Carry over one part of last night, which had `rows` rows from first_row: its file is shared where all of them are still
    there."""
    name = layout.part("cells", part)
    if not is_whole(run, name):
        kept = run.read_batch(layout.part("past", part)).column(0).to_numpy() - first_row
        if len(kept) == rows:
            run.share(past, name, name)
        else:
            _carry_some(run, past, name, dim, kept, rows)
    return _written(run, name)


def _carry_some(run: Store, past: Store, name: str, dim: int, kept: np.ndarray, rows: int) -> None:
    now = np.full(rows, -1, np.int32)
    now[kept] = np.arange(len(kept))
    starts = read_quantizer(run, dim)[1]
    before = _written(past, name)[1]
    probes, sent, homes = 0, 0, np.zeros(int(starts[-1]), np.int64)
    batches = []
    for shard in range(len(starts) - 1):
        batch = past.read_batch(name, shard)
        there = now[batch.column(0).to_numpy()] >= 0
        batch = batch if there.all() else batch.filter(pa.array(there))
        moved = pa.array(now[batch.column(0).to_numpy()])
        batches.append(pa.record_batch([moved, *batch.columns[1:]], schema=batch.schema))
        offsets, cells = batch.column(1).offsets.to_numpy(), batch.column(1).flatten().to_numpy()
        first = cells[(offsets[:-1] - offsets[0])] if len(offsets) > 1 else cells
        homes += np.bincount(first[(first >= starts[shard]) & (first < starts[shard + 1])], minlength=len(homes))
        probes += int(((cells >= starts[shard]) & (cells < starts[shard + 1])).sum())
        sent += batch.num_rows
    near = before.near * len(kept) / max(1, rows)
    _write(run, name, batches[0].schema, batches, Assigned(probes, sent, near, tuple(homes.tolist())))


def _write(run: Store, name: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch], assigned: Assigned) -> None:
    run.write_arrow(name, schema.with_metadata({QUANTIZER_METADATA: json.dumps(asdict(assigned))}), batches)


def _written(run: Store, name: str) -> tuple[dict[str, int], Assigned]:
    with run.open_arrow(name) as reader:
        record = json.loads(reader.schema.metadata[QUANTIZER_METADATA])
    return {name: run.size(name) or 0}, Assigned(record["probes"], record["sent"], record["near"], tuple(record["homes"]))
