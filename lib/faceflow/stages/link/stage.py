"""Stage 4, link: neighbor tables -> the pruned graph, by an edge recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from faceflow.cluster.executor import Resources
from faceflow.kernels.graph import csr, edge_recipes, near_identical
from faceflow.stages.artifacts.faces import RunData, read_groups
from faceflow.stages.base import Context, Outcome, Stage, merge_sizes
from faceflow.stages.results import LinkResult
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.tables import EDGES_SCHEMA, EdgeList, NeighborTable


def run(context: Context) -> Outcome[LinkResult]:
    """Apply the recipe: part by part where an edge depends on its row alone, else in one task beside the data."""
    config, data, threshold = context.config, context.data, context.results.quantize.threshold
    if config.edges == "threshold":
        linked = context.executor.map(
            link_part,
            [LinkPart(data, part, config.neighbors, threshold.similarity) for part in range(len(data.parts))],
            "link",
            sizes=[data.parts.rows(part) for part in range(len(data.parts))],
        )
    else:
        threads = context.executor.machine_cpus(config.detect_resource)
        request = LinkAll(data, config.edges, threshold.similarity, threshold.support, threads)
        resources = Resources(cpus=0, custom=config.detect_resource)
        linked = [context.executor.call(link_all, request, "link", resources=resources)]
    return Outcome(LinkResult(sum(part.edges for part in linked)), merge_sizes([part.files for part in linked]))


STAGE = Stage(
    name="link",
    reads=("neighbors", "groups"),
    writes=("edges",),
    settings=("neighbors", "min_similarity", "edges"),
    after=("ingest", "quantize", "search"),
    packages=("faceflow", "numba"),
    run=run,
)


@dataclass(frozen=True)
class Linked:
    """Edges that were written, and the bytes of their files."""

    edges: int
    files: dict[str, int]


@dataclass(frozen=True)
class LinkPart:
    """Request: the edges of one part by the threshold recipe."""

    data: RunData
    part: int
    neighbors: int
    threshold: float | None


def link_part(request: LinkPart) -> Linked:
    """Write one part's edges by the threshold recipe."""
    run, part = request.data.store, request.part
    name = layout.part("edges", part)
    if is_whole(run, name):
        return Linked(len(run.read_batch(name).column(0).flatten()), {name: run.size(name) or 0})
    table = NeighborTable.from_batch(run.read_batch(layout.part("neighbors", part)), request.data.parts.starts[part])
    edges = edge_recipes.threshold(table, request.neighbors, request.threshold)
    return Linked(len(edges.rows), {name: run.write_arrow(name, EDGES_SCHEMA, [edges.to_batch()])})


class _Tables:
    """The neighbor tables of all parts, one at a time, each time it is iterated, with the lists that were searched again in
    place of the first ones. A similarity of zero or less makes no edge."""

    def __init__(self, data: RunData, wider: pa.RecordBatch | None) -> None:
        self._run, self._parts = data.store, data.parts
        self._rows = wider.column(0).to_numpy() if wider is not None else np.empty(0, np.int32)
        self._lists = NeighborTable.from_batch(wider.select([1]), 0) if wider is not None else None

    def __iter__(self) -> Iterator[csr.Part]:
        for part in range(len(self._parts)):
            first, end = self._parts.starts[part], self._parts.starts[part + 1]
            table = NeighborTable.from_batch(self._run.read_batch(layout.part("neighbors", part)), first)
            selected = range(*np.searchsorted(self._rows, [first, end]).tolist())
            if self._lists is not None and len(selected):
                table = _replaced(table, self._rows[selected.start : selected.stop] - first, self._lists, selected)
            yield table.offsets, table.rows, np.maximum(table.values, 0)


def _replaced(table: NeighborTable, rows: np.ndarray, lists: NeighborTable, selected: range) -> NeighborTable:
    """A table in which these rows int64[n], ascending, have the lists `here` of `lists`."""
    old = np.diff(table.offsets)
    new = old.copy()
    new[rows] = np.diff(lists.offsets)[selected.start : selected.stop]
    stays = np.ones(len(table), bool)
    stays[rows] = False
    from_old, into_new = np.repeat(stays, old), np.repeat(stays, new)
    span = slice(lists.offsets[selected.start], lists.offsets[selected.stop])
    collected = []
    for before, wider in ((table.rows, lists.rows), (table.values, lists.values)):
        column = np.empty(len(into_new), before.dtype)
        column[into_new], column[~into_new] = before[from_old], wider[span]
        collected.append(column)
    return NeighborTable(table.first_row, np.concatenate([[0], np.cumsum(new)]), collected[0], collected[1])


@dataclass(frozen=True)
class LinkAll:
    """Request: the edges of all parts by a recipe that compares the neighbors of two rows; threshold, support: similarity from
    which pairs are edges, and from which supported ones are (None: 0)."""

    data: RunData
    recipe: str
    threshold: float | None
    support: float | None
    threads: int


def link_all(request: LinkAll) -> Linked:
    """Write the edges of all parts."""
    run, parts = request.data.store, request.data.parts
    collapses = request.recipe == "auto"
    wider = run.read_batch(layout.WIDER) if collapses and run.exists(layout.WIDER) else None
    *arrays, order = csr.compress(_Tables(request.data, wider), request.threads)
    block = arrays[0], arrays[1], arrays[2]
    del arrays
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    if collapses:
        block = near_identical.collapse(block, number[read_groups(run, parts.faces)[order]])
    strong, low = (value if value is not None else 0.0 for value in (request.threshold, request.support))
    offsets, rows, weights = edge_recipes.weighted(request.recipe, block, strong, low)
    del block
    files = {}
    for part in range(len(parts)):
        span = range(parts.starts[part], parts.starts[part + 1])
        edges = EdgeList(span.start, *csr.taken_back((offsets, rows, weights), order, number, span))
        name = layout.part("edges", part)
        files[name] = run.write_arrow(name, EDGES_SCHEMA, [edges.to_batch()])
    return Linked(len(rows), files)
