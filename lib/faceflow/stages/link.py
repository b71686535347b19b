"""Stage 4, link: neighbor tables -> the pruned graph, by an edge recipe."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from faceflow.cluster.executor import Resources
from faceflow.kernels import edges, graphs
from faceflow.stages.base import Context, Outcome, Stage, merge_pieces
from faceflow.storage import layout
from faceflow.storage.files import Store
from faceflow.storage.manifests import is_whole
from faceflow.tables import EDGES_SCHEMA, EdgeList, NeighborTable, Parts


def run(context: Context) -> Outcome:
    """Apply the recipe: part by part where an edge depends on its row alone, else in one task beside the data."""
    config, parts, run = context.config, context.parts, context.stores.run
    floor, weak = context.floors
    if config.edges == "threshold":
        results = context.executor.map(
            link_part,
            [(run, p, parts.starts[p], config.neighbors, floor) for p in range(len(parts))],
            "link",
            sizes=[parts.rows(part) for part in range(len(parts))],
        )
        return Outcome({"edges": sum(count for _, count in results)}, merge_pieces([pieces for pieces, _ in results]))
    pieces, count = context.executor.call(
        link_all, run, parts, config.edges, floor, weak, context.executor.machine_cpus(config.detect_resource),
        label="link", resources=Resources(cpus=0, custom=config.detect_resource),
    )  # fmt: skip
    return Outcome({"edges": count}, pieces)


STAGE = Stage(
    name="link",
    reads=("neighbors",),
    writes=("edges",),
    settings=("neighbors", "min_similarity", "edges"),
    after=("ingest", "quantize", "search"),
    packages=("faceflow",),
    run=run,
)


def link_part(run: Store, part: int, first_row: int, neighbors: int, floor: float | None) -> tuple[dict[str, int], int]:
    """Write one part's edges by the threshold recipe; returns the file's bytes and the number of edges."""
    name = layout.part("edges", part)
    if is_whole(run, name):
        return {name: run.size(name) or 0}, len(run.read_batch(name).column(0).flatten())
    table = NeighborTable.from_batch(run.read_batch(layout.part("neighbors", part)), first_row)
    found = edges.threshold(table, neighbors, floor)
    return {name: run.write_arrow(name, EDGES_SCHEMA, [found.to_batch()])}, len(found.rows)


class _Tables:
    """The neighbor tables of all parts, one at a time, each time it is iterated. A similarity of zero or less makes no edge."""

    def __init__(self, run: Store, parts: Parts) -> None:
        self._run, self._parts = run, parts

    def __iter__(self) -> Iterator[graphs.Part]:
        for part in range(len(self._parts)):
            table = NeighborTable.from_batch(self._run.read_batch(layout.part("neighbors", part)), self._parts.starts[part])
            yield table.offsets, table.rows, np.maximum(table.values, 0)


def link_all(
    run: Store, parts: Parts, recipe: str, floor: float | None, weak: float | None, threads: int
) -> tuple[dict[str, int], int]:
    """Write the edges of all parts by a recipe that compares the neighbors of two rows; returns the files' bytes and how many
    edges there are."""
    *block, order = graphs.compress(_Tables(run, parts), threads)
    strong, low = (each if each is not None else 0.0 for each in (floor, weak))
    offsets, rows, weights = edges.weighted(recipe, (block[0], block[1], block[2]), strong, low)
    del block
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    pieces = {}
    for part in range(len(parts)):
        here = range(parts.starts[part], parts.starts[part + 1])
        found = EdgeList(here.start, *graphs.taken_back((offsets, rows, weights), order, number, here))
        name = layout.part("edges", part)
        pieces[name] = run.write_arrow(name, EDGES_SCHEMA, [found.to_batch()])
    return pieces, len(rows)
