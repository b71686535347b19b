"""Stage 4, link: neighbor tables -> the pruned graph, by an edge recipe."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from faceflow.cluster.executor import Resources
from faceflow.kernels.graph import csr, edge_recipes, near_identical
from faceflow.stages.artifacts.faces import read_groups
from faceflow.stages.base import Context, Outcome, Stage, merge_sizes
from faceflow.storage import layout
from faceflow.storage.manifests import is_whole
from faceflow.storage.object_store import Store
from faceflow.tables import EDGES_SCHEMA, EdgeList, NeighborTable, Parts


def run(context: Context) -> Outcome:
    """Apply the recipe: part by part where an edge depends on its row alone, else in one task beside the data."""
    config, parts, run = context.config, context.parts, context.stores.run
    threshold, weak = context.thresholds
    if config.edges == "threshold":
        results = context.executor.map(
            link_part,
            [(run, p, parts.starts[p], config.neighbors, threshold) for p in range(len(parts))],
            "link",
            sizes=[parts.rows(part) for part in range(len(parts))],
        )
        return Outcome({"edges": sum(count for _, count in results)}, merge_sizes([pieces for pieces, _ in results]))
    pieces, count = context.executor.call(
        link_all, run, parts, config.edges, threshold, weak, context.executor.machine_cpus(config.detect_resource),
        label="link", resources=Resources(cpus=0, custom=config.detect_resource),
    )  # fmt: skip
    return Outcome({"edges": count}, pieces)


STAGE = Stage(
    name="link",
    reads=("neighbors", "copies"),
    writes=("edges",),
    settings=("neighbors", "min_similarity", "edges"),
    after=("ingest", "quantize", "search"),
    packages=("faceflow", "numba"),
    run=run,
)


def link_part(run: Store, part: int, first_row: int, neighbors: int, threshold: float | None) -> tuple[dict[str, int], int]:
    """Write one part's edges by the threshold recipe; returns the file's bytes and the number of edges."""
    name = layout.part("edges", part)
    if is_whole(run, name):
        return {name: run.size(name) or 0}, len(run.read_batch(name).column(0).flatten())
    table = NeighborTable.from_batch(run.read_batch(layout.part("neighbors", part)), first_row)
    collected = edge_recipes.threshold(table, neighbors, threshold)
    return {name: run.write_arrow(name, EDGES_SCHEMA, [collected.to_batch()])}, len(collected.rows)


class _Tables:
    """The neighbor tables of all parts, one at a time, each time it is iterated, with the lists that were searched again in
    place of the first ones. A similarity of zero or less makes no edge."""

    def __init__(self, run: Store, parts: Parts, wider: pa.RecordBatch | None) -> None:
        self._run, self._parts = run, parts
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


def link_all(
    run: Store, parts: Parts, recipe: str, threshold: float | None, weak: float | None, threads: int
) -> tuple[dict[str, int], int]:
    """Write the edges of all parts by a recipe that compares the neighbors of two rows; returns the files' bytes and how many
    edges there are."""
    collapses = recipe == "auto"
    wider = run.read_batch(layout.WIDER) if collapses and run.exists(layout.WIDER) else None
    *arrays, order = csr.compress(_Tables(run, parts, wider), threads)
    block = arrays[0], arrays[1], arrays[2]
    del arrays
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    if collapses:
        block = near_identical.collapse(block, number[read_groups(run, parts.faces)[order]])
    strong, low = (item if item is not None else 0.0 for item in (threshold, weak))
    offsets, rows, weights = edge_recipes.weighted(recipe, block, strong, low)
    del block
    pieces = {}
    for part in range(len(parts)):
        selected = range(parts.starts[part], parts.starts[part + 1])
        collected = EdgeList(selected.start, *csr.taken_back((offsets, rows, weights), order, number, selected))
        name = layout.part("edges", part)
        pieces[name] = run.write_arrow(name, EDGES_SCHEMA, [collected.to_batch()])
    return pieces, len(rows)
