"""Stage 2, quantize: choose the search plan and the similarity threshold; train the quantizer and assign faces to its cells."""

from __future__ import annotations

import logging

from faceflow.stages.base import Context, Outcome, Stage
from faceflow.stages.quantize import full, incremental
from faceflow.stages.results import QuantizeResult

log = logging.getLogger("faceflow")


def run(context: Context) -> Outcome[QuantizeResult]:
    """Carry over what the base run has, where that will do, else fix the plan and make everything for it."""
    changes, base = context.changes, context.base
    if changes is None or base is None:
        return full.run(context)
    outcome = incremental.run(context, base, changes)
    if isinstance(outcome, Outcome):
        return outcome
    log.info("plan     full run: %s", outcome)
    return full.run(context, outcome)


STAGE = Stage(
    name="quantize",
    reads=("vectors",),
    writes=incremental.WRITES,
    scratch=("sample",),
    settings=("index", "cells", "probes", "neighbors", "min_similarity", "edges", "seed", "full_every"),
    after=("ingest",),
    packages=("faceflow", "numpy", "numba"),
    run=run,
)
