"""Stage 4, link: neighbor tables -> the pruned graph, by an edge recipe, part by part."""

from __future__ import annotations

from faceflow.kernels import edges
from faceflow.stages.base import Context, Outcome, Stage, merge_pieces
from faceflow.storage import layout
from faceflow.storage.files import Store
from faceflow.storage.manifests import is_whole
from faceflow.tables import EDGES_SCHEMA, NeighborTable


def run(context: Context) -> Outcome:
    """Apply the threshold recipe to every part."""
    config, parts = context.config, context.parts
    results = context.executor.map(
        link_part,
        [(context.stores.run, p, parts.starts[p], config.neighbors, config.min_similarity) for p in range(len(parts))],
        "link",
        sizes=[parts.rows(part) for part in range(len(parts))],
    )
    return Outcome({"edges": sum(count for _, count in results)}, merge_pieces([pieces for pieces, _ in results]))


STAGE = Stage(
    name="link",
    reads=("neighbors",),
    writes=("edges",),
    settings=("neighbors", "min_similarity"),
    after=("ingest", "search"),
    packages=("faceflow",),
    run=run,
)


def link_part(run: Store, part: int, first_row: int, neighbors: int, floor: float | None) -> tuple[dict[str, int], int]:
    """Write one part's edges; returns the file's bytes and the number of edges."""
    name = layout.part("edges", part)
    if is_whole(run, name):
        return {name: run.size(name) or 0}, len(run.read_batch(name).column(0).flatten())
    table = NeighborTable.from_batch(run.read_batch(layout.part("neighbors", part)), first_row)
    found = edges.threshold(table, neighbors, floor)
    return {name: run.write_arrow(name, EDGES_SCHEMA, [found.to_batch()])}, len(found.rows)
