"""Which cells faces probe and which they are assigned to: the `probed_cells/` files, one record batch a shard, and the
`assigned_cells/` files, which are all that an incremental run carries over."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from faceflow.kernels.ivf import probing
from faceflow.kernels.knn.topk import decode
from faceflow.stages.artifacts.faces import RunData, read_quantizer, read_vectors
from faceflow.stages.changes import Changes, kept_rows
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import ASSIGNED_CELLS_SCHEMA, QUANTIZER_METADATA, cells_schema


@dataclass(frozen=True)
class Assigned:
    """Of one part's faces: similarity, the sum of their similarities to their nearest centroids; faces: how many are assigned
    to each cell; where they were sent to shards, also probes, (face, cell) pairs, and sent, (face, shard) pairs; files: bytes
    of each file."""

    similarity: float
    faces: tuple[int, ...]
    files: dict[str, int]
    probes: int = 0
    sent: int = 0


def read_rules(run: Store) -> tuple[probing.ProbeRule, probing.ProbeRule, float | None]:
    """How faces probe where neighbors join (`kernels.ivf.neighbor_join`), how where they do not, and the predicted recall."""
    with run.open_arrow(layout.CENTROIDS) as reader:
        trained = json.loads(reader.schema.metadata[QUANTIZER_METADATA])
    return probing.ProbeRule(**trained["rule"]), probing.ProbeRule(**trained["alone"]), trained["recall"]


@dataclass(frozen=True)
class AssignPart:
    """Request: one part's assigned cells; rule: how its faces probe cells (None: they are assigned only)."""

    data: RunData
    part: int
    rule: probing.ProbeRule | None


def assign_part(request: AssignPart) -> Assigned:
    """Write one part's assigned cells and, with a rule, its probed cells: one record batch per shard with the faces that probe
    a cell of it.

    On a disk shards gather the vectors from the part itself; on S3 the vectors travel in the batch, so that a shard reads what
    it needs by range.
    """
    data, part = request.data, request.part
    run, dim, name = data.store, data.dim, layout.part("probed_cells", part)
    if request.rule is None:
        if not is_whole(run, layout.part("assigned_cells", part)):
            centroids = read_quantizer(run, dim)[0]
            keys = probing.probe_keys(read_vectors(run, part, dim), centroids, probing.ProbeRule(0.0, 1))[1]
            similarities, cells = decode(keys)
            _write_assigned(run, part, cells, float(similarities.sum(dtype=float)))
        return _assigned(run, part, dim)
    if not (is_whole(run, name) and is_whole(run, layout.part("assigned_cells", part))):
        vectors, starts = read_vectors(run, part, dim), read_quantizer(run, dim)[1]
        rows = np.arange(len(vectors), dtype=np.int32)
        similarity, cells = write_probes(run, name, vectors, rows, request.rule, starts, carry_vectors=not run.is_local)
        _write_assigned(run, part, cells, similarity)
    with run.open_arrow(name) as reader:
        sent = json.loads(reader.schema.metadata[QUANTIZER_METADATA])
    assigned = _assigned(run, part, dim)
    files = assigned.files | {name: run.size(name) or 0}
    return Assigned(assigned.similarity, assigned.faces, files, sent["probes"], sent["sent"])


def write_probes(
    run: Store, name: str, vectors: np.ndarray, rows: np.ndarray, rule: probing.ProbeRule,
    starts: Sequence[int] | np.ndarray, *, carry_vectors: bool,
) -> tuple[float, np.ndarray]:  # fmt: skip
    """Write the cells that these faces probe, one record batch for each range of cells from one of starts to the next. rows:
    int32[n], ascending, the faces' within the part. Returns the sum of similarities to the nearest centroids, and whose these
    are, int32[n]."""
    offsets, keys = probing.probe_keys(vectors, read_quantizer(run, vectors.shape[1])[0], rule)
    similarities, cells = decode(keys)
    # One entry per (range, face) that meet, in that order; a face may probe several cells of one range.
    owner = np.repeat(np.arange(len(vectors)), np.diff(offsets))
    n = max(1, len(vectors))
    travel = np.unique((np.searchsorted(starts, cells, side="right") - 1) * n + owner)
    bounds = np.searchsorted(travel, np.arange(len(starts)) * n)
    schema = cells_schema(vectors.shape[1] if carry_vectors else None)
    lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(cells), type=schema.field(1).type)

    def batches() -> Iterator[pa.RecordBatch]:
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            selected = travel[begin:end] % n
            columns = [pa.array(rows[selected]), lists.take(pa.array(selected))]
            if carry_vectors:
                column = pa.FixedSizeListArray.from_arrays(pa.array(vectors[selected].ravel()), vectors.shape[1])
                columns.append(column.cast(schema.field(2).type))
            yield pa.record_batch(columns, schema=schema)

    record = json.dumps({"probes": len(cells), "sent": len(travel)})
    run.write_arrow(name, schema.with_metadata({QUANTIZER_METADATA: record}), batches())
    return float(similarities[offsets[:-1]].sum(dtype=float)), cells[offsets[:-1]]


@dataclass(frozen=True)
class CarryCells:
    """Request: the assigned cells of one carried part."""

    data: RunData
    changes: Changes
    part: int


def carry_cells(request: CarryCells) -> Assigned:
    """Carry over the assigned cells of one part from those of the base parts that it consists of: the file of a single one is
    shared where all of its faces are still there."""
    data, changes, part = request.data, request.changes, request.part
    run, name, source = data.store, layout.part("assigned_cells", part), changes.sources[part]
    if not is_whole(run, name):
        rows = changes.base_parts.starts[source.stop] - changes.base_parts.starts[source.start]
        kept = kept_rows(run, part) - changes.first_row(part)
        if len(kept) == rows and len(source) == 1:
            run.share(changes.base, layout.part("assigned_cells", source.start), name)
        else:
            similarity = sum(_assigned(changes.base, item, data.dim).similarity for item in source) * len(kept) / max(1, rows)
            cells = np.concatenate([read_assigned_cells(changes.base, item) for item in source])
            _write_assigned(run, part, cells[kept], similarity)
    return _assigned(run, part, data.dim)


def read_assigned_cells(run: Store, part: int) -> np.ndarray:
    """The assigned cell of each of one part's faces, int32[n]."""
    return np.asarray(run.read_batch(layout.part("assigned_cells", part)).column(0).to_numpy())


def _write_assigned(run: Store, part: int, cells: np.ndarray, similarity: float) -> None:
    schema = ASSIGNED_CELLS_SCHEMA.with_metadata({QUANTIZER_METADATA: json.dumps({"similarity": similarity})})
    run.write_arrow(layout.part("assigned_cells", part), schema, [pa.record_batch([pa.array(cells)], schema=schema)])


def _assigned(run: Store, part: int, dim: int) -> Assigned:
    name = layout.part("assigned_cells", part)
    batch = run.read_batch(name)
    similarity = float(json.loads(batch.schema.metadata[QUANTIZER_METADATA])["similarity"])
    counts = np.bincount(batch.column(0).to_numpy(), minlength=int(read_quantizer(run, dim)[1][-1]))
    return Assigned(similarity, tuple(counts.tolist()), {name: run.size(name) or 0})
