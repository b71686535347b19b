"""What became of the clusters: events between two runs, and the faces that moved."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

EVENTS_SCHEMA = pa.schema(
    [
        ("event", pa.string()), ("cluster", pa.int64()), ("faces_before", pa.int64()), ("faces_after", pa.int64()),
        ("joined", pa.int64()), ("left", pa.int64()), ("from", pa.list_(pa.int64())), ("into", pa.list_(pa.int64())),
    ]
)  # fmt: skip
"""One row an event: created, grown, shrunk, changed (as many faces, but others), vanished; beside these merged (clusters that
vanished gave it faces) and split (clusters that were created took faces of it). joined, left: faces that came and went."""


def events(before: np.ndarray, after: np.ndarray, faces: np.ndarray) -> pa.Table:
    """What became of every cluster that did not stay as it was, by rising cluster.

    before, after, faces: int64[p], pairs of clusters that share faces (`cluster_ids.transitions`), -1 for none.
    """
    top = int(max(before.max(initial=-1), after.max(initial=-1))) + 1
    size_before = np.bincount(before[before >= 0], faces[before >= 0], top).astype(np.int64)
    size_after = np.bincount(after[after >= 0], faces[after >= 0], top).astype(np.int64)
    came, went = _by(after, before, faces), _by(before, after, faces)
    rows = []
    for cluster in sorted({*came, *went}):
        sources, takers = came.get(cluster, []), went.get(cluster, [])
        old, new = int(size_before[cluster]), int(size_after[cluster])
        given, taken = sorted(c for c, _ in sources if c >= 0), sorted(c for c, _ in takers if c >= 0)
        joined, left = sum(n for _, n in sources), sum(n for _, n in takers)
        numbers = (cluster, old, new, joined, left)
        kind = "created" if old == 0 else "vanished" if new == 0 else "grown" if new > old else "shrunk"
        kind = "changed" if new == old else kind
        rows.append((kind, *numbers, given, taken))
        if new and (swallowed := [c for c in given if size_after[c] == 0]):
            rows.append(("merged", *numbers, swallowed, []))
        if old and (parts := [c for c in taken if size_before[c] == 0]):
            rows.append(("split", *numbers, [], parts))
    columns: Iterable[tuple[object, ...]] = zip(*rows, strict=True) if rows else [() for _ in EVENTS_SCHEMA]
    arrays = [pa.array(list(column), field.type) for column, field in zip(columns, EVENTS_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=EVENTS_SCHEMA)


def _by(key: np.ndarray, other: np.ndarray, faces: np.ndarray) -> dict[int, list[tuple[int, int]]]:
    """Of the pairs of two different clusters: for each `key` the others and the faces they share."""
    results: dict[int, list[tuple[int, int]]] = {}
    moved = (key != other) & (key >= 0)
    for a, b, n in zip(key[moved].tolist(), other[moved].tolist(), faces[moved].tolist(), strict=True):
        results.setdefault(a, []).append((b, n))
    return results


def moves_schema(id_type: pa.DataType) -> pa.Schema:
    """Faces whose cluster is another: null where the face was not there before, or is no longer."""
    return pa.schema([("id", id_type), ("from", pa.int64()), ("to", pa.int64())])
