"""Stage 5, detect: the pruned graph -> one module per row, by the two-level map equation, in one task beside the data."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from faceflow.cluster.executor import Resources
from faceflow.stages.base import Context, Outcome, Stage
from faceflow.storage import layout
from faceflow.storage.files import Store
from faceflow.tables import MODULES_SCHEMA, EdgeList, Parts


def run(context: Context) -> Outcome:
    """Detect modules over the whole graph; the driver sees only the counts."""
    counts, pieces = context.executor.call(
        detect, context.stores.run, context.parts, context.config.seed, label="detect", resources=Resources(cpus=1)
    )
    return Outcome(counts, pieces)


STAGE = Stage(
    name="detect",
    reads=("edges",),
    writes=("modules",),
    settings=("engine", "seed"),
    after=("ingest", "link"),
    packages=("faceflow", "infomap"),
    run=run,
)


def detect(run: Store, parts: Parts, seed: int) -> tuple[dict[str, float], dict[str, int]]:
    """Run the engine over all edge parts and write one module per row, part by part."""
    from faceflow.kernels import infomap_engine

    edges = (EdgeList.from_batch(run.read_batch(layout.part("edges", p)), parts.starts[p]) for p in range(len(parts)))
    partition = infomap_engine.detect(edges, parts.faces, seed)
    pieces = {}
    for part in range(len(parts)):
        modules = partition.modules[parts.starts[part] : parts.starts[part + 1]]
        name = layout.part("modules", part)
        pieces[name] = run.write_arrow(name, MODULES_SCHEMA, [pa.record_batch([modules], schema=MODULES_SCHEMA)])
    return {"codelength": partition.codelength, "modules": len(np.unique(partition.modules))}, pieces
