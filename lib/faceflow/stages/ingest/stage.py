"""Stage 1, ingest: Parquet -> checked, unit-length vectors and ids, in parts of about 128k faces. Row order is fixed here."""

from __future__ import annotations

from faceflow.config import ClusterConfig
from faceflow.errors import InputError
from faceflow.stages.base import Context, Outcome, Stage
from faceflow.stages.ingest import incremental
from faceflow.stages.ingest.parquet_input import ReadFooters, read_footers
from faceflow.stages.ingest.reading import check_bad_rows, columns_of, id_bytes_of, read_files
from faceflow.stages.results import IngestResult
from faceflow.storage import column_types
from faceflow.storage.inputs import Listing, contains, list_faces
from faceflow.storage.manifests import Fingerprint


def list_input(config: ClusterConfig) -> Listing:
    """The files to read. Raises InputError where there are none, or where OUTPUT lies among them."""
    if contains(config.input, config.output, config.storage_options):
        raise InputError(
            f"OUTPUT {config.output} lies inside INPUT {config.input}: labels would become input; choose another place"
        )
    return list_faces(config.input, config.storage_options, config.snapshot)


def _listing(context: Context) -> Listing:
    return context.listing or list_input(context.config)


def inputs(context: Context) -> Fingerprint:
    """The exact files this run is made from."""
    listing = _listing(context)
    fingerprint: dict[str, object] = {"input_files": {f.path: f.state for f in listing.files}}
    if listing.snapshot is not None:
        fingerprint["input_snapshot"] = [listing.snapshot.format, listing.snapshot.snapshot]
    if context.base is not None:
        fingerprint["base run"] = context.base.run_id
    return fingerprint


def check_first_file(config: ClusterConfig, listing: Listing) -> None:
    """Refuse columns that are not there, or not of a fitting type, before a cluster starts and a run is begun."""
    read_footers(ReadFooters(listing.store, (listing.files[0].path,), columns_of(config)))


def run(context: Context) -> Outcome[IngestResult]:
    """Read every footer, cut the rows into parts, then read, check and write the parts in parallel."""
    listing = _listing(context)
    if context.base is not None:
        return incremental.run(context, context.base, listing)
    files = {f.path: i for i, f in enumerate(listing.files)}
    read = read_files(context, listing.store, files, context.stores.run)
    check_bad_rows(context, read.bad, read.entries[-1])
    result = IngestResult(
        faces=read.starts[-1], quarantined=read.bad.total, dim=read.dim, files=len(listing.files), starts=read.starts,
        entries=read.entries, id_type=column_types.name_of(read.ids.published), id_bytes=id_bytes_of(read.sizes),
        input_snapshot=listing.snapshot,
    )  # fmt: skip
    return Outcome(result, read.sizes)


STAGE = Stage(
    name="ingest",
    reads=(),
    writes=("id_check", "new_files", "matches", "vectors", "ids", "quarantined", "origins", "base_rows"),
    scratch=("id_check", "new_files", "matches"),
    settings=("input", "id_column", "embedding_column", "bad_rows", "verify_content", "exclusive_column"),
    packages=("faceflow",),
    inputs=inputs,
    run=run,
)
