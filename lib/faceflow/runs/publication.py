"""Makes a run's labels current: the pointer, the labels table, the report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from faceflow.cluster.executor import Executor
from faceflow.cluster.worker import peak_memory
from faceflow.config import ClusterConfig
from faceflow.errors import FaceflowError, PublishError, SettingsError
from faceflow.logs import event
from faceflow.runs.active_run import Job
from faceflow.runs.records import utc_now
from faceflow.runs.registry import give_up
from faceflow.runs.result import RunResult
from faceflow.setting_types import StorageOptions
from faceflow.stages.publish.delta_labels import CommitLabels, commit_labels
from faceflow.stages.results import Results
from faceflow.storage import layout, table_formats
from faceflow.storage.inputs import contains
from faceflow.storage.layout import RunStores
from faceflow.storage.object_store import Store
from faceflow.storage.pointer import Pointer, current_run_id, set_pointer

log = logging.getLogger("faceflow")


@dataclass(frozen=True)
class ReportRequest:
    """Request: the report of a run. thumbnails: URL or path with {id}, where its faces' pictures are; to: the folder (None:
    below OUTPUT)."""

    output: Store
    run: Store
    run_id: str
    thumbnails: str | None = None
    to: Store | None = None


class WrittenReport(Protocol):
    """Where a report is, and what to say of pictures that are missing."""

    @property
    def page(self) -> str: ...

    def complaint(self, thumbnails: str | None) -> str | None: ...


WriteReport = Callable[[ReportRequest], WrittenReport]
"""What writes the report of a published run; the run itself does not depend on it."""


def check_labels_table(config: ClusterConfig) -> None:
    """Raise SettingsError where the labels table overlaps what a run reads or writes, InputError where it is no labels
    table."""
    table = config.labels_table
    if table is None:
        return
    options = config.storage_options
    for name, place in (("INPUT", config.input), ("OUTPUT", config.output), ("work_dir", config.work_dir)):
        if place is not None and (contains(place, table, options) or contains(table, place, options)):
            raise SettingsError(
                f"labels_table {table} and {name} {place} overlap, and a commit replaces what is there: name another table"
            )
    table_formats.check_labels_table(Store.at(table, options))


def result_of(
    stores: RunStores, results: Results, executor: Executor, seconds: Mapping[str, float], options: StorageOptions | None
) -> RunResult:
    """What a run returns, from the results of its stages."""
    ingest, threshold, publish = results.ingest, results.quantize.threshold, results.publish
    return RunResult(
        run_id=stores.run_id, labels=stores.output.address(layout.label_folder(stores.run_id)), faces=ingest.faces,
        quarantined=ingest.quarantined, clusters=publish.clusters, singletons=publish.singletons, edges=results.link.edges,
        codelength=results.detect.codelength, similarity_threshold=threshold.similarity,
        impostors_per_face=threshold.impostors_per_face, recall=results.search.recall, quality=publish.quality,
        seconds=seconds, peak_memory_bytes=peak_memory(), worker_peak_memory_bytes=executor.usage.peak_worker_bytes,
        storage_options=options,
    )  # fmt: skip


def make_current(job: Job, results: Results, result: RunResult) -> int:
    """Set the pointer to the run's labels, unless it is there already; returns the sequence of their publication.

    Raises PublishError, naming the winner, when another run came first.
    """
    parent, run_id = job.parent, job.stores.run_id
    if parent is not None and parent.run_id == run_id:
        return parent.sequence
    next_id = max(results.publish.next_id, parent.next_id if parent is not None else 0)
    # Rises from run to run, and after an OUTPUT that was emptied: what fences the commits to a labels table.
    sequence = max((parent.sequence if parent is not None else 0) + 1, int(time.time() * 1000))
    pointer = Pointer(
        run_id=run_id, labels=layout.label_folder(run_id), faces=result.faces, quarantined=result.quarantined,
        clusters=result.clusters, singletons=result.singletons, edges=result.edges,
        similarity_threshold=result.similarity_threshold, impostors_per_face=result.impostors_per_face,
        parent_run_id=parent.run_id if parent is not None else None, next_id=next_id, sequence=sequence,
        settings=job.config.public(), seconds=result.seconds, recall=result.recall.estimate,
        recall_interval=(result.recall.low, result.recall.high), quality=asdict(result.quality),
        input_snapshot=results.ingest.input_snapshot, created=utc_now().isoformat(timespec="seconds"),
    )  # fmt: skip
    set_current(job, pointer)
    return sequence


def set_current(job: Job, pointer: Pointer) -> None:
    """Replace the pointer. Raises PublishError, naming the winner, when another run came first."""
    output, run_id = job.stores.output, job.stores.run_id
    try:
        set_pointer(output, pointer, job.parent_version)
    except PublishError:
        winner = current_run_id(output)
        if winner == run_id:
            raise PublishError(f"run {run_id} was published by another process meanwhile: its labels are current") from None
        if job.incremental is not None:
            give_up(output, job.runs, run_id)
            raise PublishError(
                f"run {winner} published to {output.root} while the incremental run {run_id} was running: the labels of "
                f"{winner} are current, and those of {run_id} are removed. The next `nightly` (with another --run-id, if "
                f"you name one) "
                "builds on them"
            ) from None
        raise PublishError(
            f"run {winner} published to {output.root} while run {run_id} was running: the labels of {winner} are current. "
            f"The labels of {run_id} are complete in {pointer.labels}; the same command again makes them current"
        ) from None


def fill_table(config: ClusterConfig, executor: Executor, stores: RunStores, sequence: int) -> None:
    """Put the current labels into the Delta table that the user named, unless it has them; sequence: of their publication."""
    if config.labels_table is None:
        return
    table = Store.at(config.labels_table, config.storage_options)
    if table_formats.committed(table) != stores.run_id:
        version = executor.call(commit_labels, CommitLabels(table, stores.output, stores.run_id, sequence), "table")
        log.info("table    %s is at version %d", table.root, version, extra=event("table", table=table.root, version=version))


def write_report(job: Job, write: WriteReport) -> None:
    """Write the report. The labels are current: whatever becomes of the report changes nothing about them."""
    stores, thumbnails = job.stores, job.config.thumbnails
    begun = time.perf_counter()
    try:
        made = job.executor.call(write, ReportRequest(stores.output, stores.run, stores.run_id, thumbnails), "report")
    except FaceflowError as error:
        log.warning("no report was written: %s", error)
        return
    seconds = round(time.perf_counter() - begun, 3)
    log.info("report   %s; %.1f s", made.page, seconds, extra=event("report", report=made.page, seconds=seconds))
    if complaint := made.complaint(thumbnails):
        log.warning("%s", complaint)
