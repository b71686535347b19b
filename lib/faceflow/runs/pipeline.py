"""Runs the stages of a run in their order, under its lease, and ends by making its labels current."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass

from faceflow.cluster.executor import Executor
from faceflow.config import ClusterConfig
from faceflow.errors import InputError, RunError, SettingsError
from faceflow.logs import bind, event
from faceflow.runs import publication
from faceflow.runs.active_run import Job
from faceflow.runs.base_run import find_base, nothing_new, warn_of_dropped_constraints
from faceflow.runs.lease import FencedStore
from faceflow.runs.publication import WriteReport
from faceflow.runs.records import BEGUN, PUBLISHED, REFUSED, IncrementalKey
from faceflow.runs.registry import choose_run, give_up_superseded, settle
from faceflow.runs.result import RunResult
from faceflow.runs.stage_runner import advance
from faceflow.runs.stages import STAGES
from faceflow.runs.status import Watcher
from faceflow.stages import constraints_file
from faceflow.stages.base import BaseRun, Redo, open_executor
from faceflow.stages.ingest import stage as ingest
from faceflow.stages.results import Results
from faceflow.stages.search.stage import warm_up
from faceflow.storage import layout
from faceflow.storage.inputs import Listing
from faceflow.storage.json_records import digest
from faceflow.storage.layout import RunStores
from faceflow.storage.object_store import Store
from faceflow.storage.pointer import Pointer, read_pointer

log = logging.getLogger("faceflow")


def execute(config: ClusterConfig, *, incremental: bool, progress: bool = True, report: WriteReport | None = None) -> RunResult:
    """Run the stages on `config.input` and publish the labels under `config.output` (`faceflow.run_clustering`,
    `faceflow.run_nightly`).

    report: called in a worker once the labels are current.
    """
    begun = time.perf_counter()
    output, runs = layout.stores(config.output, config.work_dir, config.storage_options)
    try:
        with open_executor(config.address, config.workers, progress, warm_up) as executor:
            return _Command(config, output, runs, executor, begun, report).run(incremental)
    except OSError as error:
        raise RunError(f"{error}; what is finished is kept, and the same command continues") from error


@dataclass(frozen=True)
class _Command:
    """One command before it has chosen its run. begun: time of the clock."""

    config: ClusterConfig
    output: Store
    runs: Store
    executor: Executor
    begun: float
    report: WriteReport | None

    def run(self, incremental: bool) -> RunResult:
        # Listed once: what is read, and what the next incremental run takes for read, must be the same.
        listing = ingest.list_input(self.config)
        self._check(listing)
        parent_version = self.output.version(layout.LATEST)
        parent = read_pointer(self.output)
        base, key = None, None
        if incremental:
            files = {file.path: file.state for file in listing.files}
            base = find_base(self.runs, parent.run_id if parent is not None else None)
            key = IncrementalKey(base.run_id if base is not None else None, digest(files))
            if base is not None and parent is not None and nothing_new(self.config, base, files):
                return self._nothing_to_do(base, parent)
            if base is not None and base.run_id == self.config.run_id:
                raise SettingsError(f"run {base.run_id} is published: an incremental run needs another --run-id")
        return self._in_a_run(listing, parent, parent_version, base, key)

    def _check(self, listing: Listing) -> None:
        """Refuse what can be refused before a cluster starts and anything is written."""
        config = self.config
        ingest.check_first_file(config, listing)
        if config.constraints is not None:
            constraints_file.read(config.constraints, config.storage_options)  # a contradiction is said before the search
        publication.check_labels_table(config)
        with contextlib.suppress(OSError):  # what cannot be read there, the next check says
            read_pointer(self.output)
        for store in (self.output, self.runs):
            store.check_writable()
            store.check_conditional_writes()

    def _nothing_to_do(self, base: BaseRun, parent: Pointer) -> RunResult:
        log.info("nothing has changed since run %s: its labels stay current", base.run_id)
        stores = RunStores.of(self.output, self.runs, base.run_id)
        publication.fill_table(self.config, self.executor, stores, parent.sequence)
        settle(self.runs, base.run_id)
        seconds = {"total": round(time.perf_counter() - self.begun, 3)}
        return publication.result_of(stores, base.results, self.executor, seconds, self.config.storage_options)

    def _in_a_run(
        self, listing: Listing, parent: Pointer | None, parent_version: str | None, base: BaseRun | None,
        key: IncrementalKey | None,
    ) -> RunResult:  # fmt: skip
        """Choose the run, and carry it out under its lease."""
        config, executor = self.config, self.executor
        run_id, lease = choose_run(config, self.output, self.runs, key)
        try:
            if parent is not None and parent.run_id != run_id:
                settle(self.runs, parent.run_id)
            if key is not None:
                give_up_superseded(self.output, self.runs, key)
            if base is not None:
                warn_of_dropped_constraints(config, base)
            runs, output = FencedStore.of(self.runs, lease), FencedStore.of(self.output, lease)
            watcher = Watcher(lease)
            executor.watch, executor.guard = watcher.step, lease.check
            job = Job(
                config, runs, RunStores.of(output, runs, run_id), executor, self.begun, parent, parent_version, watcher,
                listing, base, key,
            )  # fmt: skip
            return _carry_out(job, self.report)
        finally:
            executor.watch = executor.guard = None
            lease.release()


def _carry_out(job: Job, report: WriteReport | None) -> RunResult:
    """Run the stages, make the labels current, and record how the run ended."""
    run_id, files, base = job.stores.run_id, job.listing.files, job.base
    bind(run=run_id)
    log.info(
        "run %s: %d input file(s)%s", run_id, len(files), f", base run {base.run_id}" if base is not None else "",
        extra=event("run_begins", files=len(files), base=base.run_id if base is not None else None),
    )  # fmt: skip
    try:
        return _publish(job, _run_stages(job), report)
    except InputError as error:
        # Not to be continued: once the input is fixed, what this run has done is of no use.
        job.write_state(REFUSED)
        job.watcher.stopped(str(error))
        raise
    except BaseException as error:
        with contextlib.suppress(RunError):  # where another process has taken the run over, its word stands
            job.watcher.stopped("interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else str(error))
        raise


def _run_stages(job: Job) -> Results:
    """Run every stage; where one has an earlier one done again, go back to it."""
    results, attempt, position = Results({}), job.attempt, 0
    while position < len(STAGES):
        made = advance(STAGES[position], job.context(results, attempt), job.watcher)
        if isinstance(made, Redo):
            log.info("%s", made.reason)
            attempt += 1
            results, position = _back_to(job, made, position, results, attempt)
        else:
            results, position = made, position + 1
    return results


def _back_to(job: Job, redo: Redo, position: int, results: Results, attempt: int) -> tuple[Results, int]:
    """Forget what a stage and all after it have made. The attempt is recorded last: a run that is interrupted on the way comes
    to the same decision again."""
    first = next(i for i, stage in enumerate(STAGES) if stage.name == redo.stage)
    run = job.stores.run
    for stage in reversed(STAGES[first : position + 1]):
        run.delete(layout.manifest(stage.name))
        run.delete(layout.plan(stage.name))
    for stage in STAGES[first : position + 1]:
        for folder in stage.writes:
            if folder not in redo.keep:
                run.delete(folder)
    job.write_state(BEGUN, attempt=attempt)
    kept = {stage.name: results.manifests[stage.name] for stage in STAGES[:first]}
    return Results(kept), first


def _publish(job: Job, results: Results, report: WriteReport | None) -> RunResult:
    config, stores = job.config, job.stores
    seconds = {name: manifest.seconds for name, manifest in results.manifests.items()}
    seconds["total"] = round(time.perf_counter() - job.begun, 3)
    result = publication.result_of(stores, results, job.executor, seconds, config.storage_options)
    sequence = publication.make_current(job, results, result)
    facts = {"seconds": seconds["total"], "ray_start_seconds": job.executor.usage.start_seconds}
    if config.labels_table is not None:
        job.write_state(BEGUN, **facts)
        try:
            publication.fill_table(config, job.executor, stores, sequence)
        except RunError:
            if report is not None:
                publication.write_report(job, report)
            raise
    job.write_state(PUBLISHED, **facts)
    job.executor.working_on(stores.run_id, "")
    log.info(
        "run %s: %s faces in %s clusters (%s singletons), %.1f s; labels in %s",
        result.run_id, f"{result.faces:,}", f"{result.clusters:,}", f"{result.singletons:,}", seconds["total"], result.labels,
        extra=event("run_done", **result.as_dict()),
    )  # fmt: skip
    if report is not None:
        publication.write_report(job, report)
    return result
