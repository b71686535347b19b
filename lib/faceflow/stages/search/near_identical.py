"""Near-identical faces (`kernels.graph.near_identical`): found in the neighbor tables; and more neighbors for those whose lists
they fill.

Written under `copies/`: each follower with its leader, and the lists that were searched again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from faceflow.cluster.executor import Resources
from faceflow.kernels.graph import near_identical
from faceflow.kernels.knn import recall, topk
from faceflow.stages.artifacts.candidates import candidates_batch, read_candidates
from faceflow.stages.artifacts.faces import leaders_of, matrix, read_followers, read_groups, read_vectors
from faceflow.stages.base import Context
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import CANDIDATES_SCHEMA, GROUPS_SCHEMA, NEAR_SCHEMA, WIDER_SCHEMA, NeighborTable, Parts, sample_schema

log = logging.getLogger("faceflow")

THIN = 0.5
"""Share of its k neighbors up to which a full list is searched again, where it has that many groups or fewer in it."""

MOST_PAIRS = 2 * 10**11
"""Pairs compared for that at most: some minutes of one core. Of more faces, those whose lists have fewest groups are taken."""

QUERIES = 8_192
"""Faces searched at once."""


def near_level(context: Context) -> float | None:
    """The cosine from which faces count as one; None where the recipe takes every face for itself."""
    near = context.done["quantize"].counts.get("near_identical")
    if near is None or context.config.edges != "auto":
        return None
    # A threshold near 1 leaves only pairs that the level would call near-identical: at most the upper half of them are.
    strong = context.thresholds[0]
    return max(near, (1 + strong) / 2) if strong is not None else near


def settle(context: Context) -> tuple[dict[str, Any], dict[str, int]]:
    """Write the groups of near-identical faces, and the lists searched again; returns counts and bytes for the manifest."""
    if near_level(context) is None:
        return {}, {}
    run, parts, executor = context.stores.run, context.parts, context.executor
    k, weak, dim = context.config.neighbors, context.thresholds[1], context.dim
    central = Resources(custom=context.config.detect_resource)
    followers = executor.call(group, run, parts, label="copies", resources=central)
    counts = {"followers": followers, "searched_again": 0}
    if followers:
        results = executor.map(write_thin, [(run, parts, part, dim, k) for part in range(len(parts))], "copies")
        if sum(results):
            chosen = executor.call(choose_thin, run, parts, dim, followers, label="copies", resources=central)
            counts["searched_again"] = chosen
            if chosen < sum(results):
                log.warning(
                    "%s faces have lists full of near-identical ones; only %s are searched again",
                    f"{sum(results):,}",
                    f"{chosen:,}",
                )
            executor.map(
                search_wider, [(run, parts, part, dim, k, weak) for part in range(len(parts))], "copies",
                resources=Resources(custom=context.config.search_resource),
            )  # fmt: skip
            near = near_level(context)
            counts["followers"] = executor.call(join_wider, run, parts, k, near, label="copies", resources=central)
    names = [layout.GROUPS, *([layout.WIDER] if counts["searched_again"] else [])]
    return counts, {name: run.size(name) or 0 for name in names}


def write_near(run: Store, part: int, table: NeighborTable, near: float) -> None:
    """Write the rows of one part that have near-identical neighbors, and these."""
    counts, targets = _near_targets(table, near)
    selected = np.flatnonzero(counts)
    _write_lists(run, layout.near(part), table.first_row + selected, counts[selected], targets)


def _near_targets(table: NeighborTable, near: float) -> tuple[np.ndarray, np.ndarray]:
    """(how many near-identical neighbors each row has int64[n], these int32[...], row after row, the nearest first)."""
    counts = near_identical.near_prefix(table.offsets, table.values, near)
    starts = table.offsets[:-1]
    places = [np.arange(starts[i], starts[i] + counts[i]) for i in np.flatnonzero(counts).tolist()]
    return counts, table.rows[np.concatenate([np.empty(0, np.int64), *places])]


def _write_lists(run: Store, name: str, rows: np.ndarray, counts: np.ndarray, targets: np.ndarray) -> None:
    offsets = np.concatenate([[0], np.cumsum(counts)])
    lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(targets, pa.int32()))
    columns = [pa.array(rows.astype(np.int32)), lists]
    run.write_arrow(name, NEAR_SCHEMA, [pa.record_batch(columns, schema=NEAR_SCHEMA)])


def group(run: Store, parts: Parts) -> int:
    """Write each follower and its leader, from the near pairs of all parts; returns how many there are."""
    batches = [run.read_batch(layout.near(part)) for part in range(len(parts))]
    rows = np.concatenate([batch.column(0).to_numpy() for batch in batches]).astype(np.int64)
    counts = np.concatenate([batch.column(1).value_lengths().to_numpy() for batch in batches])
    targets = np.concatenate([batch.column(1).flatten().to_numpy() for batch in batches])
    leader = near_identical.lead(rows, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), targets, parts.faces)
    return _write_groups(run, layout.GROUPS_AT_FIRST, leader, also=layout.GROUPS)


def _write_groups(run: Store, name: str, leader: np.ndarray, also: str | None = None) -> int:
    followers = np.flatnonzero(leader != np.arange(len(leader)))
    columns = [pa.array(followers.astype(np.int32)), pa.array(leader[followers])]
    for item in filter(None, (name, also)):
        run.write_arrow(item, GROUPS_SCHEMA, [pa.record_batch(columns, schema=GROUPS_SCHEMA)])
    return len(followers)


def write_thin(run: Store, parts: Parts, part: int, dim: int, k: int) -> int:
    """Write the faces of one part, with their vectors, whose lists are full but hold few groups; returns how many."""
    groups = read_followers(run, layout.GROUPS_AT_FIRST)
    first = parts.starts[part]
    table = NeighborTable.from_batch(run.read_batch(layout.part("neighbors", part)), first)
    full = np.flatnonzero(np.diff(table.offsets) >= k)
    full = full[leaders_of(first + full, *groups) == first + full]
    offsets = np.concatenate([[0], np.cumsum(np.diff(table.offsets)[full])])
    thin, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    if len(full):
        entries = np.concatenate([table.rows[table.offsets[i] : table.offsets[i + 1]] for i in full.tolist()])
        counts = near_identical.distinct_neighbors(first + full, offsets, leaders_of(entries, *groups))
        thin, counts = full[counts <= THIN * k], counts[counts <= THIN * k]
    vectors = read_vectors(run, part, dim)[thin]
    _write_faces(run, layout.thin(part), first + thin, vectors, {"groups": counts})
    return len(thin)


def _write_faces(run: Store, name: str, rows: np.ndarray, vectors: np.ndarray, more: dict[str, np.ndarray]) -> None:
    dim = vectors.shape[1]
    columns: Sequence[Any] = [
        pa.array(rows.astype(np.int32)),
        pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).ravel()), dim),
        *(pa.array(values.astype(np.int64)) for values in more.values()),
    ]
    schema = sample_schema(dim)
    for column in more:
        schema = schema.append(pa.field(column, pa.int64()))
    run.write_arrow(name, schema, [pa.record_batch(columns, schema=schema)])


def choose_thin(run: Store, parts: Parts, dim: int, followers: int) -> int:
    """Write the faces that are searched again, as one file: all, or so many of those with fewest groups as MOST_PAIRS
    allows."""
    batches = [run.read_batch(layout.thin(part)) for part in range(len(parts))]
    rows = np.concatenate([batch.column(0).to_numpy() for batch in batches])
    groups = np.concatenate([batch.column(2).to_numpy() for batch in batches])
    most = max(1, MOST_PAIRS // max(1, parts.faces - followers))
    chosen = np.sort(np.lexsort((rows, groups))[:most])
    vectors = np.concatenate([matrix(batch.column(1), dim) for batch in batches])
    _write_faces(run, layout.THIN, rows[chosen], vectors[chosen], {})
    return len(chosen)


def search_wider(run: Store, parts: Parts, part: int, dim: int, k: int, threshold: float | None) -> None:
    """Search the chosen faces exactly among the leaders, and faces without a group, of one part."""
    if is_whole(run, layout.wider(part)):
        return
    batch = run.read_batch(layout.THIN)
    rows, vectors = batch.column(0).to_numpy(), matrix(batch.column(1), dim)
    first, selected = parts.starts[part], np.arange(parts.starts[part], parts.starts[part + 1])
    mine = np.flatnonzero(leaders_of(selected, *read_followers(run, layout.GROUPS_AT_FIRST)) == selected)
    members = np.ascontiguousarray(read_vectors(run, part, dim)[mine])
    offsets, keys = [np.zeros(1, np.int64)], []
    for begin in range(0, len(rows), QUERIES):
        block = slice(begin, begin + QUERIES)
        results, best = recall.search_part(vectors[block], rows[block], members, 0, k, threshold)
        similarities, member = topk.decode(best)
        offsets.append(results[1:] + offsets[-1][-1])
        keys.append(topk.encode(similarities, (first + mine[member]).astype(np.int32)))
    ends = np.concatenate(offsets)
    run.write_arrow(layout.wider(part), CANDIDATES_SCHEMA, [candidates_batch(np.arange(len(rows)), ends, np.concatenate(keys))])


def join_wider(run: Store, parts: Parts, k: int, near: float) -> int:
    """Write the lists of the faces that were searched again, and the groups once more: leaders that turned out to be
    near-identical become one. Returns how many faces follow another."""
    rows = run.read_batch(layout.THIN).column(0).to_numpy()
    lists = read_candidates(run, [layout.wider(part) for part in range(len(parts))], 0)
    offsets, targets, values = topk.merge(lists, len(rows), k + 1)
    other = targets != np.repeat(rows, np.diff(offsets))  # a face is among those that it is compared with
    offsets = np.concatenate([[0], np.cumsum(other)])[offsets]
    table = NeighborTable(0, offsets, targets[other], values[other])
    columns = [pa.array(rows), table.to_batch().column(0)]
    run.write_arrow(layout.WIDER, WIDER_SCHEMA, [pa.record_batch(columns, schema=WIDER_SCHEMA)])
    counts, near_rows = _near_targets(table, near)
    joined = near_identical.lead(rows.astype(np.int64), np.concatenate([[0], np.cumsum(counts)]), near_rows, parts.faces)
    return _write_groups(run, layout.GROUPS, joined[read_groups(run, parts.faces, layout.GROUPS_AT_FIRST)])
