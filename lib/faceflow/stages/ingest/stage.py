"""Stage 1, ingest: Parquet -> checked, unit-length vectors and ids, in parts of about 128k faces. Row order is fixed here."""

from __future__ import annotations

import logging
from typing import Any

from faceflow.config import ClusterConfig
from faceflow.errors import InputError
from faceflow.stages.base import Context, Outcome, Stage
from faceflow.stages.ingest import incremental
from faceflow.stages.ingest.parquet_input import read_footers
from faceflow.stages.ingest.reading import id_bytes_of, judge, take_in
from faceflow.storage import columns
from faceflow.storage.inputs import Listing, contains, list_faces

log = logging.getLogger("faceflow")


def list_input(config: ClusterConfig) -> Listing:
    """The files to read. Raises InputError where there are none, or where OUTPUT lies among them."""
    if contains(config.input, config.output, config.storage_options):
        raise InputError(
            f"OUTPUT {config.output} lies inside INPUT {config.input}: labels would become input; choose another place"
        )
    return list_faces(config.input, config.storage_options, config.snapshot)


def _listing(context: Context) -> Listing:
    return context.listing or list_input(context.config)


def inputs(context: Context) -> dict[str, Any]:
    """The exact files this run is made from."""
    past = {"past run": context.past.run_id} if context.past is not None else {}
    listing = _listing(context)
    known = {"input_snapshot": listing.snapshot} if listing.snapshot is not None else {}
    return {"input_files": {f.path: f.state for f in listing.files}} | known | past


def check_first_file(config: ClusterConfig, listing: Listing) -> None:
    """Refuse columns that are not there, or not of a fitting type, before a cluster starts and a run is begun."""
    read_footers(listing.store, [listing.files[0].path], config.id_column, config.embedding_column, config.exclusive_column)


def run(context: Context) -> Outcome:
    """Read every footer, cut the rows into parts, then read, check and write the parts in parallel."""
    store, files, snapshot = listing = _listing(context)
    if context.past is not None:
        return incremental.run(context, listing)
    taken = take_in(context, store, {f.path: i for i, f in enumerate(files)}, context.stores.run)
    judge(context, taken.bad, taken.entries[-1])
    counts = {
        "faces": taken.starts[-1], "quarantined": taken.bad.total, "dim": taken.dim, "files": len(files), "starts":
        taken.starts, "entries": taken.entries, "input_snapshot": snapshot, "id_type": columns.name_of(taken.ids.published),
        "id_bytes": id_bytes_of(taken.sizes),
    }  # fmt: skip
    return Outcome(counts, taken.sizes)


STAGE = Stage(
    name="ingest",
    reads=(),
    writes=("idcheck", "arrivals", "matches", "vectors", "ids", "quarantined", "origins", "past"),
    scratch=("idcheck", "arrivals", "matches"),
    settings=("input", "id_column", "embedding_column", "bad_rows", "verify_content", "exclusive_column"),
    packages=("faceflow",),
    inputs=inputs,
    run=run,
)
