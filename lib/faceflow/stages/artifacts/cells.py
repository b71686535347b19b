"""Which cells faces probe and which they live in: the `cells/` files, one record batch a shard, and the `homes/` files, which
are all that a night takes over."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from faceflow.kernels.ivf import probing
from faceflow.kernels.knn.topk import decode
from faceflow.stages.artifacts.faces import read_quantizer, read_vectors
from faceflow.stages.base import LastNight
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import HOMES_SCHEMA, QUANTIZER_METADATA, cells_schema


@dataclass(frozen=True)
class Assigned:
    """Of one part's faces: the sum of their similarities to their nearest centroid, and how many live in each cell; where they
    were sent to shards, also (face, cell) pairs, and (face, shard) pairs that travel."""

    near: float
    homes: tuple[int, ...]
    probes: int = 0
    sent: int = 0


def read_rules(run: Store) -> tuple[probing.ProbeRule, probing.ProbeRule, float | None]:
    """How faces probe where visitors meet, how where they do not, and the predicted recall."""
    with run.open_arrow(layout.CENTROIDS) as reader:
        trained = json.loads(reader.schema.metadata[QUANTIZER_METADATA])
    return probing.ProbeRule(**trained["rule"]), probing.ProbeRule(**trained["alone"]), trained["recall"]


def assign_part(run: Store, part: int, dim: int, rule: probing.ProbeRule) -> tuple[dict[str, int], Assigned]:
    """Write one part's homes and cells: one record batch per shard with the faces that probe a cell of it.

    Returns the files' bytes and what they hold. On a disk shards gather the vectors from the part itself; on S3 the vectors
    travel in the batch, so that a shard reads what it needs by range.
    """
    name = layout.part("cells", part)
    if not (is_whole(run, name) and is_whole(run, layout.part("homes", part))):
        vectors, starts = read_vectors(run, part, dim), read_quantizer(run, dim)[1]
        rows = np.arange(len(vectors), dtype=np.int32)
        near, homes = write_cells(run, name, vectors, rows, dim, rule, starts, carry_vectors=not run.is_local)
        _write_homes(run, part, homes, near)
    with run.open_arrow(name) as reader:
        sent = json.loads(reader.schema.metadata[QUANTIZER_METADATA])
    pieces, settled = _settled(run, part, dim)
    return pieces | {name: run.size(name) or 0}, Assigned(settled.near, settled.homes, sent["probes"], sent["sent"])


def write_cells(
    run: Store, name: str, vectors: np.ndarray, rows: np.ndarray, dim: int, rule: probing.ProbeRule,
    starts: Sequence[int] | np.ndarray, carry_vectors: bool,
) -> tuple[float, np.ndarray]:  # fmt: skip
    """Write the cells that these faces probe, one record batch for each range of cells from one of starts to the next. rows:
    int32[n], ascending, the faces' within the part. Returns the sum of similarities to the nearest centroids, and whose these
    are, int32[n]."""
    offsets, keys = probing.probe_keys(vectors, read_quantizer(run, dim)[0], rule)
    similarities, cells = decode(keys)
    # One entry per (range, face) that meet, in that order; a face may probe several cells of one range.
    owner = np.repeat(np.arange(len(vectors)), np.diff(offsets))
    n = max(1, len(vectors))
    travel = np.unique((np.searchsorted(starts, cells, side="right") - 1) * n + owner)
    bounds = np.searchsorted(travel, np.arange(len(starts)) * n)
    schema = cells_schema(dim if carry_vectors else None)
    lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(cells), type=schema.field(1).type)

    def batches() -> Iterator[pa.RecordBatch]:
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            selected = travel[begin:end] % n
            columns = [pa.array(rows[selected]), lists.take(pa.array(selected))]
            if carry_vectors:
                column = pa.FixedSizeListArray.from_arrays(pa.array(vectors[selected].ravel()), dim)
                columns.append(column.cast(schema.field(2).type))
            yield pa.record_batch(columns, schema=schema)

    record = json.dumps({"probes": len(cells), "sent": len(travel)})
    run.write_arrow(name, schema.with_metadata({QUANTIZER_METADATA: record}), batches())
    return float(similarities[offsets[:-1]].sum(dtype=float)), cells[offsets[:-1]]


def settle_part(run: Store, part: int, dim: int) -> tuple[dict[str, int], Assigned]:
    """Write one part's homes alone."""
    if not is_whole(run, layout.part("homes", part)):
        keys = probing.probe_keys(read_vectors(run, part, dim), read_quantizer(run, dim)[0], probing.ProbeRule(0.0, 1))[1]
        similarities, homes = decode(keys)
        _write_homes(run, part, homes, float(similarities.sum(dtype=float)))
    return _settled(run, part, dim)


def carry_homes(run: Store, past: LastNight, part: int, dim: int) -> tuple[dict[str, int], Assigned]:
    """Carry over the homes of one part from those of last night that it is made of: the file of a single one is shared where
    all of its faces are still there."""
    name, source = layout.part("homes", part), past.sources[part]
    if not is_whole(run, name):
        first, rows = past.parts.starts[source.start], past.parts.starts[source.stop] - past.parts.starts[source.start]
        kept = run.read_batch(layout.part("past", part)).column(0).to_numpy() - first
        if len(kept) == rows and len(source) == 1:
            run.share(past.run, layout.part("homes", source.start), name)
        else:
            near = sum(_settled(past.run, item, dim)[1].near for item in source) * len(kept) / max(1, rows)
            homes = np.concatenate([read_homes(past.run, item) for item in source])
            _write_homes(run, part, homes[kept], near)
    return _settled(run, part, dim)


def read_homes(run: Store, part: int) -> np.ndarray:
    """The cells in which one part's faces live, int32[n]."""
    return np.asarray(run.read_batch(layout.part("homes", part)).column(0).to_numpy())


def _write_homes(run: Store, part: int, homes: np.ndarray, near: float) -> None:
    schema = HOMES_SCHEMA.with_metadata({QUANTIZER_METADATA: json.dumps({"near": near})})
    run.write_arrow(layout.part("homes", part), schema, [pa.record_batch([pa.array(homes)], schema=schema)])


def _settled(run: Store, part: int, dim: int) -> tuple[dict[str, int], Assigned]:
    name = layout.part("homes", part)
    batch = run.read_batch(name)
    near = float(json.loads(batch.schema.metadata[QUANTIZER_METADATA])["near"])
    counts = np.bincount(batch.column(0).to_numpy(), minlength=int(read_quantizer(run, dim)[1][-1]))
    return {name: run.size(name) or 0}, Assigned(near, tuple(counts.tolist()))
