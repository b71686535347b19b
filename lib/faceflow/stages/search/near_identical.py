"""Near-identical faces (`kernels.graph.near_identical`): found in the neighbor tables; and more neighbors for those whose lists
they fill.

Written under `groups/`: each follower with its leader, and the lists that were searched again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from faceflow.cluster.executor import Resources
from faceflow.kernels.graph import near_identical
from faceflow.kernels.knn import recall, topk
from faceflow.stages.artifacts.candidates import candidates_batch, read_candidates
from faceflow.stages.artifacts.faces import RunData, leaders_of, matrix, read_followers, read_groups, read_vectors
from faceflow.stages.base import Context
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import CANDIDATES_SCHEMA, GROUPS_SCHEMA, NEAR_SCHEMA, WIDER_SCHEMA, NeighborTable, sample_schema

log = logging.getLogger("faceflow")

THIN = 0.5
"""Share of its k neighbors up to which a full list is searched again, where it has that many groups or fewer in it."""

MOST_PAIRS = 2 * 10**11
"""Pairs compared for that at most: some minutes of one core. Of more faces, those whose lists have fewest groups are taken."""

QUERIES = 8_192
"""Faces searched at once."""


@dataclass(frozen=True)
class Groups:
    """Near-identical faces of a run: how many follow another, faces whose lists were searched again, bytes of each file."""

    followers: int = 0
    searched_again: int = 0
    files: Mapping[str, int] = field(default_factory=dict)


def near_level(context: Context) -> float | None:
    """The cosine from which faces count as one; None where the recipe takes every face for itself."""
    threshold = context.results.quantize.threshold
    near = threshold.near_identical
    if near is None or context.config.edges != "auto":
        return None
    # A threshold near 1 leaves only pairs that the level would call near-identical: at most the upper half of them are.
    return max(near, (1 + threshold.similarity) / 2) if threshold.similarity is not None else near


def group_all(context: Context) -> Groups:
    """Write the groups of near-identical faces, and the lists searched again."""
    near = near_level(context)
    if near is None:
        return Groups()
    data, executor, k = context.data, context.executor, context.config.neighbors
    parts = range(len(data.parts))
    central = Resources(custom=context.config.detect_resource)
    followers, searched = executor.call(group, data, "near", resources=central), 0
    if followers:
        thin = sum(executor.map(write_thin, [WriteThin(data, part, k) for part in parts], "near"))
        if thin:
            searched = executor.call(choose_thin, ChooseThin(data, followers), "near", resources=central)
            if searched < thin:
                log.warning(
                    "%s faces have lists full of near-identical ones; only %s are searched again", f"{thin:,}", f"{searched:,}"
                )
            support = context.results.quantize.threshold.support
            executor.map(
                search_wider, [SearchWider(data, part, k, support) for part in parts], "near",
                resources=Resources(custom=context.config.search_resource),
            )  # fmt: skip
            followers = executor.call(join_wider, JoinWider(data, k, near), "near", resources=central)
    names = [layout.GROUPS, *([layout.WIDER] if searched else [])]
    return Groups(followers, searched, {name: data.store.size(name) or 0 for name in names})


def write_near(run: Store, part: int, table: NeighborTable, near: float) -> None:
    """Write the rows of one part that have near-identical neighbors, and these."""
    counts, targets = _near_targets(table, near)
    rows = np.flatnonzero(counts)
    _write_lists(run, layout.near(part), table.first_row + rows, counts[rows], targets)


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


def group(data: RunData) -> int:
    """Write each follower and its leader, from the near pairs of all parts; returns how many there are."""
    run, parts = data.store, data.parts
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


@dataclass(frozen=True)
class WriteThin:
    """Request: one part's faces whose lists of k near-identical ones fill."""

    data: RunData
    part: int
    k: int


def write_thin(request: WriteThin) -> int:
    """Write the faces of one part, with their vectors, whose lists are full but hold few groups; returns how many."""
    data, part, k = request.data, request.part, request.k
    run, first = data.store, data.parts.starts[part]
    groups = read_followers(run, layout.GROUPS_AT_FIRST)
    table = NeighborTable.from_batch(run.read_batch(layout.part("neighbors", part)), first)
    full = np.flatnonzero(np.diff(table.offsets) >= k)
    full = full[leaders_of(first + full, *groups) == first + full]
    offsets = np.concatenate([[0], np.cumsum(np.diff(table.offsets)[full])])
    thin, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    if len(full):
        entries = np.concatenate([table.rows[table.offsets[i] : table.offsets[i + 1]] for i in full.tolist()])
        counts = near_identical.distinct_neighbors(first + full, offsets, leaders_of(entries, *groups))
        thin, counts = full[counts <= THIN * k], counts[counts <= THIN * k]
    vectors = read_vectors(run, part, data.dim)[thin]
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


@dataclass(frozen=True)
class ChooseThin:
    """Request: which faces are searched again; followers: faces that they need not be compared with."""

    data: RunData
    followers: int


def choose_thin(request: ChooseThin) -> int:
    """Write the faces that are searched again, as one file: all, or so many of those with fewest groups as MOST_PAIRS
    allows."""
    run, parts, dim = request.data.store, request.data.parts, request.data.dim
    batches = [run.read_batch(layout.thin(part)) for part in range(len(parts))]
    rows = np.concatenate([batch.column(0).to_numpy() for batch in batches])
    groups = np.concatenate([batch.column(2).to_numpy() for batch in batches])
    most = max(1, MOST_PAIRS // max(1, parts.faces - request.followers))
    chosen = np.sort(np.lexsort((rows, groups))[:most])
    vectors = np.concatenate([matrix(batch.column(1), dim) for batch in batches])
    _write_faces(run, layout.THIN, rows[chosen], vectors[chosen], {})
    return len(chosen)


@dataclass(frozen=True)
class SearchWider:
    """Request: the chosen faces against one part, for their k best from this similarity on."""

    data: RunData
    part: int
    k: int
    threshold: float | None


def search_wider(request: SearchWider) -> None:
    """Search the chosen faces exactly among the leaders, and faces without a group, of one part."""
    data, part, k = request.data, request.part, request.k
    run, parts, dim = data.store, data.parts, data.dim
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
        results, best = recall.search_part(vectors[block], rows[block], members, 0, k, request.threshold)
        similarities, member = topk.decode(best)
        offsets.append(results[1:] + offsets[-1][-1])
        keys.append(topk.encode(similarities, (first + mine[member]).astype(np.int32)))
    ends = np.concatenate(offsets)
    run.write_arrow(layout.wider(part), CANDIDATES_SCHEMA, [candidates_batch(np.arange(len(rows)), ends, np.concatenate(keys))])


@dataclass(frozen=True)
class JoinWider:
    """Request: the lists that were searched again, k long; near: cosine from which faces are near-identical."""

    data: RunData
    k: int
    near: float


def join_wider(request: JoinWider) -> int:
    """Write the lists of the faces that were searched again, and the groups once more: leaders that turned out to be
    near-identical become one. Returns how many faces follow another."""
    run, parts, k = request.data.store, request.data.parts, request.k
    rows = run.read_batch(layout.THIN).column(0).to_numpy()
    lists = read_candidates(run, [layout.wider(part) for part in range(len(parts))], 0)
    offsets, targets, values = topk.merge(lists, len(rows), k + 1)
    other = targets != np.repeat(rows, np.diff(offsets))  # a face is among those that it is compared with
    offsets = np.concatenate([[0], np.cumsum(other)])[offsets]
    table = NeighborTable(0, offsets, targets[other], values[other])
    columns = [pa.array(rows), table.to_batch().column(0)]
    run.write_arrow(layout.WIDER, WIDER_SCHEMA, [pa.record_batch(columns, schema=WIDER_SCHEMA)])
    counts, near_rows = _near_targets(table, request.near)
    joined = near_identical.lead(rows.astype(np.int64), np.concatenate([[0], np.cumsum(counts)]), near_rows, parts.faces)
    return _write_groups(run, layout.GROUPS, joined[read_groups(run, parts.faces, layout.GROUPS_AT_FIRST)])
