"""The order of the stages; for each: skip it, run it, or refuse. Ends by setting the pointer to the new labels."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from faceflow.cluster.executor import Executor, peak_memory
from faceflow.config import ClusterConfig, digest
from faceflow.errors import FaceflowError, InputError, PublishError, QualityError, RunError, SettingsError
from faceflow.logs import bind, event
from faceflow.runs.lease import FencedStore
from faceflow.runs.registry import choose_run, give_up, give_up_superseded, now, record, settle
from faceflow.runs.stage_runner import advance
from faceflow.runs.status import Watcher
from faceflow.stages import constraints_file
from faceflow.stages.base import Context, Past, Stage, open_executor
from faceflow.stages.detect import stage as detect
from faceflow.stages.ingest import stage as ingest
from faceflow.stages.link import stage as link
from faceflow.stages.publish import stage as publish
from faceflow.stages.quantize import stage as quantize
from faceflow.stages.search import stage as search
from faceflow.storage import layout, manifests, table_formats
from faceflow.storage.inputs import Listing, contains
from faceflow.storage.layout import RunStores
from faceflow.storage.manifests import Manifest
from faceflow.storage.object_store import Store

log = logging.getLogger("faceflow")

STAGES: tuple[Stage, ...] = (ingest.STAGE, quantize.STAGE, search.STAGE, link.STAGE, detect.STAGE, publish.STAGE)
assert tuple(stage.name for stage in STAGES) == layout.STAGES


@dataclass(frozen=True)
class RunResult:
    """What a finished run reports; the fields are those of `--json`.

    labels: address of the label folder; faces: those with a cluster; quarantined: rows set aside; threshold: cosine from which
    faces are neighbors (None: none); impostors_per_face: expected number of a face's neighbors above it that are other people,
    at most (None: the threshold was given, so nothing was estimated); recall: edge recall of the search, `estimate`, `low`,
    `high` (a 95 % interval), from `faces` sampled faces with `edges` true neighbors; quality: of the clusters, without labels:
    `within`, mean similarity of a face to its neighbors in its cluster; `between`, of those that have one outside, to the
    nearest; `outside_share`, how many have; `doubtful_share`, faces nearer to one outside than to those inside on average;
    `stability`, how alike clusters come back from resampled edges (0 to 1, of `stability_clusters` tried); `sizes`, clusters by
    size; seconds: wall time of each stage and `total`; peak_memory_bytes: largest resident memory of the driver;
    worker_peak_memory_bytes: of any one worker, mapped files included (0: none ran).
    """

    run_id: str
    labels: str
    faces: int
    quarantined: int
    clusters: int
    singletons: int
    edges: int
    codelength: float
    similarity_threshold: float | None
    impostors_per_face: float | None
    recall: dict[str, float]
    quality: dict[str, Any]
    seconds: dict[str, float]
    peak_memory_bytes: int
    worker_peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Written(Protocol):
    """Where a report is, and what to say of pictures that are missing."""

    @property
    def page(self) -> str: ...

    def complaint(self, thumbnails: str | None) -> str | None: ...


class Report(Protocol):
    """What writes the report of a published run; the run itself does not depend on it."""

    def __call__(self, output: Store, run: Store, run_id: str, thumbnails: str | None) -> Written: ...


def execute(config: ClusterConfig, *, incremental: bool, progress: bool = True, report: Report | None = None) -> RunResult:
    """Run the stages on `config.input` and publish the labels under `config.output` (`faceflow.run_clustering`,
    `faceflow.run_nightly`).

    report: called in a worker once the labels are current.
    """
    begun = time.perf_counter()
    output, runs = layout.stores(config.output, config.work_dir, config.storage_options)
    try:
        with open_executor(config.address, config.workers, progress, search.warm_up) as executor:
            return _run(config, output, runs, executor, begun, incremental, report)
    except OSError as error:
        raise RunError(f"{error}; what is finished is kept, and the same command continues") from error


@dataclass(frozen=True)
class _Job:
    """One run at work: what does not change from stage to stage. runs, stores: write only while the lease holds; night: what an
    unfinished night must have in common with this one to be continued."""

    config: ClusterConfig
    runs: Store
    stores: RunStores
    executor: Executor
    begun: float
    parent: dict[str, Any]
    parent_version: str | None
    watcher: Watcher
    listing: Listing
    past: Past | None = None
    night: dict[str, Any] | None = None

    def context(self, done: dict[str, Manifest], effort: int) -> Context:
        first_id = int(self.parent.get("next_id", 0)) if self.night is not None else 0
        return Context(self.config, self.stores, self.executor, done, effort, self.past, first_id, self.listing)

    def record(self, state: str, **more: Any) -> None:
        self.stores.run.write_json(layout.RUN_RECORD, record(self.config, state, self.night) | more)


def _run(
    config: ClusterConfig, output: Store, runs: Store, executor: Executor, begun: float, nightly: bool, report: Report | None
) -> RunResult:
    # Listed once: what is read, and what the next night takes for read, must be the same.
    listing = ingest.list_input(config)
    files = {file.path: file.state for file in listing.files}
    ingest.check_first_file(config, listing)
    if config.constraints is not None:
        constraints_file.read(config.constraints, config.storage_options)  # a contradiction is said now, not after the search
    if config.labels_table is not None:
        for name, place in (("INPUT", config.input), ("OUTPUT", config.output), ("work_dir", config.work_dir)):
            if place is not None and (
                contains(place, config.labels_table, config.storage_options)
                or contains(config.labels_table, place, config.storage_options)
            ):
                raise SettingsError(
                    f"labels_table {config.labels_table} and {name} {place} overlap, and a commit replaces what is there: name "
                    "another table"
                )
        table_formats.check_labels_table(Store.at(config.labels_table, config.storage_options))
    with contextlib.suppress(OSError):  # what cannot be read there, the next check says
        layout.read_latest(output)  # refused before anything is written
    for store in (output, runs):
        store.check_writable()
        store.check_conditional_writes()
    parent_version = output.version(layout.LATEST)
    parent = layout.read_latest(output) or {}
    past, night = None, None
    if nightly:
        past = _past_of(runs, parent.get("run_id"))
        night = {"past": past.run_id if past is not None else None, "files": digest(files)}
        if past is not None and _nothing_new(config, past, files):
            log.info("nothing has changed since run %s: its labels stay in force", past.run_id)
            _fill_table(config, executor, RunStores.of(output, runs, past.run_id), parent.get("sequence", 0))
            settle(runs, past.run_id)
            return _result(past.run_id, output, past.done, executor, {"total": round(time.perf_counter() - begun, 3)})
    if past is not None and past.run_id == config.run_id:
        raise SettingsError(f"run {config.run_id} is published: a night needs another --run-id")
    run_id, lease = choose_run(config, output, runs, night)
    try:
        if parent and parent["run_id"] != run_id:
            settle(runs, parent["run_id"])
        if night is not None:
            give_up_superseded(output, runs, night)
        if past is not None:
            _warn_of_decisions(config, past)
        runs, output = FencedStore.of(runs, lease), FencedStore.of(output, lease)
        stores = RunStores.of(output, runs, run_id)
        watcher = Watcher(lease)
        executor.watch, executor.guard = watcher.step, lease.check
        job = _Job(config, runs, stores, executor, begun, parent, parent_version, watcher, listing, past, night)
        return _carry_out(job, report)
    finally:
        executor.watch = executor.guard = None
        lease.release()


def _carry_out(job: _Job, report: Report | None) -> RunResult:
    """Run the stages, and note how the run ended."""
    run_id, files, past, watcher = job.stores.run_id, job.listing.files, job.past, job.watcher
    bind(run=run_id)
    log.info(
        "run %s: %d input file(s)%s", run_id, len(files), f", after run {past.run_id}" if past is not None else "",
        extra=event("run_begins", files=len(files), parent=past.run_id if past is not None else None),
    )  # fmt: skip
    try:
        return _advance_all(job, report)
    except InputError as error:
        # Not to be continued: once the input is mended, this run's tasks are of no use.
        job.record("refused")
        watcher.stopped(str(error))
        raise
    except BaseException as error:
        with contextlib.suppress(RunError):  # where another process has taken the run over, its word stands
            watcher.stopped("interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else str(error))
        raise


def _past_of(runs: Store, run_id: str | None) -> Past | None:
    """The published run, if it can be built on."""
    if run_id is None:
        return None
    run = runs.child(run_id)
    done = {stage.name: manifests.read(run, stage.name) for stage in STAGES}
    whole = {name: manifest for name, manifest in done.items() if manifest is not None}
    lost = "" if len(whole) == len(STAGES) else "a manifest"
    for stage in STAGES if not lost else ():
        lost = lost or manifests.missing(run, whole[stage.name], stage.scratch) or ""
    if lost or "entries" not in whole["ingest"].counts:
        log.warning(
            "the directory of the published run %s is not whole (it lacks %s): everything is computed again, with new ids",
            run_id, lost or "what an incremental run needs",
        )  # fmt: skip
        return None
    return Past(run_id, run, whole)


def _nothing_new(config: ClusterConfig, past: Past, files: dict[str, Any]) -> bool:
    made_from: dict[str, Any] = {}
    for manifest in past.done.values():
        made_from |= manifest.fingerprint
    now = config.public()
    same = all(made_from[key] == now[key] for stage in STAGES for key in stage.settings if key in made_from)
    same &= made_from.get("constraints_file") == constraints_file.fingerprint(config).get("constraints_file")
    return same and not config.verify_content and made_from["input_files"] == files and config.run_id is None


def _result(
    run_id: str, output: Store, done: Mapping[str, Manifest], executor: Executor, seconds: dict[str, float]
) -> RunResult:
    return RunResult(
        run_id=run_id,
        labels=output.address(layout.label_folder(run_id)),
        faces=done["ingest"].counts["faces"],
        quarantined=done["ingest"].counts["quarantined"],
        clusters=done["publish"].counts["clusters"],
        singletons=done["publish"].counts["singletons"],
        edges=done["link"].counts["edges"],
        codelength=done["detect"].counts["codelength"],
        similarity_threshold=done["quantize"].counts["threshold"],
        impostors_per_face=done["quantize"].counts.get("impostors_per_face"),
        recall=done["search"].counts["recall"],
        quality=done["publish"].counts.get("quality", {}),
        seconds=seconds,
        peak_memory_bytes=peak_memory(),
        worker_peak_memory_bytes=executor.usage.peak_worker_bytes,
    )


def _advance_all(job: _Job, report: Report | None) -> RunResult:
    config, stores = job.config, job.stores
    done: dict[str, Manifest] = {}
    effort = int((stores.run.read_json(layout.RUN_RECORD) or {}).get("effort", 0))
    for stage in STAGES:
        done[stage.name] = advance(stage, job.context(done, effort), job.watcher)
        while stage.name == "search" and not _recall_holds(config, done):
            effort += 1
            _search_again(job, effort, bool(done["quantize"].counts["incremental"]))
            for again in (quantize.STAGE, search.STAGE):
                done[again.name] = advance(again, job.context(done, effort), job.watcher)
    seconds = {name: manifest.seconds for name, manifest in done.items()}
    seconds["total"] = round(time.perf_counter() - job.begun, 3)
    result = _result(stores.run_id, stores.output, done, job.executor, seconds)
    sequence = int(job.parent.get("sequence", 0))
    if job.parent.get("run_id") != stores.run_id:
        # Rises from run to run, and after an OUTPUT that was emptied: what fences the commits to a labels table.
        sequence = max(sequence + 1, int(time.time() * 1000))
        pointer = {
            "run_id": result.run_id,
            "labels": layout.label_folder(stores.run_id),
            "faces": result.faces,
            "quarantined": result.quarantined,
            "clusters": result.clusters,
            "singletons": result.singletons,
            "edges": result.edges,
            "similarity_threshold": result.similarity_threshold,
            "impostors_per_face": result.impostors_per_face,
            "parent_run_id": job.parent.get("run_id"),
            "next_id": max(done["publish"].counts["next_id"], job.parent.get("next_id", 0)),
            "sequence": sequence,
            "settings": config.public(),
            "seconds": seconds,
            "recall": result.recall["estimate"],
            "recall_interval": [result.recall["low"], result.recall["high"]],
            "quality": result.quality,
            "input_snapshot": done["ingest"].counts.get("input_snapshot"),
            "created": now().isoformat(timespec="seconds"),
        }
        _publish(job, pointer)
    facts = {"effort": effort, "seconds": seconds["total"], "ray_start_seconds": job.executor.usage.start_seconds}
    if config.labels_table is not None:
        job.record("begun", **facts)
        try:
            _fill_table(config, job.executor, stores, sequence)
        except RunError:
            if report is not None:
                _report(job, report)
            raise
    job.record("published", **facts)
    job.executor.at_work(stores.run_id, "")
    log.info(
        "run %s: %s faces in %s clusters (%s singletons), %.1f s; labels in %s",
        result.run_id, f"{result.faces:,}", f"{result.clusters:,}", f"{result.singletons:,}", seconds["total"], result.labels,
        extra=event("run_done", **result.as_dict()),
    )  # fmt: skip
    if report is not None:
        _report(job, report)
    return result


def _fill_table(config: ClusterConfig, executor: Executor, stores: RunStores, sequence: int) -> None:
    """Put the labels in force into the Delta table that the user named, unless it has them; sequence: of their publication."""
    if config.labels_table is None:
        return
    table = Store.at(config.labels_table, config.storage_options)
    if table_formats.committed(table) != stores.run_id:
        version = executor.call(publish.commit_table, table, stores.output, stores.run_id, sequence, label="table")
        log.info("table    %s is at version %d", table.root, version, extra=event("table", table=table.root, version=version))


def _warn_of_decisions(config: ClusterConfig, past: Past) -> None:
    before = past.done["detect"].fingerprint
    if before.get("constraints") and config.constraints is None:
        log.warning("run %s honoured decisions, tonight names none (--constraints): they no longer hold", past.run_id)
    if before.get("exclusive_column") and config.exclusive_column is None:
        log.warning(
            "run %s kept faces apart by column %r, tonight does not (--exclusive-column)",
            past.run_id,
            before["exclusive_column"],
        )


def _report(job: _Job, report: Report) -> None:
    """The labels are in force: whatever becomes of the report changes nothing about them."""
    stores = job.stores
    begun = time.perf_counter()
    try:
        made = job.executor.call(report, stores.output, stores.run, stores.run_id, job.config.thumbnails, label="report")
    except FaceflowError as error:
        log.warning("no report was written: %s", error)
        return
    seconds = round(time.perf_counter() - begun, 3)
    log.info("report   %s (%.1f s)", made.page, seconds, extra=event("report", report=made.page, seconds=seconds))
    if complaint := made.complaint(job.config.thumbnails):
        log.warning("%s", complaint)


def _publish(job: _Job, pointer: dict[str, Any]) -> None:
    """Set the pointer. Raises PublishError, naming the winner, when another run came first."""
    output, run_id = job.stores.output, job.stores.run_id
    try:
        output.replace_json(layout.LATEST, pointer, job.parent_version)
    except PublishError:
        winner = (layout.read_latest(output) or {}).get("run_id")
        if winner == run_id:
            raise PublishError(f"run {run_id} was published by another process meanwhile: its labels are in force") from None
        if job.night is not None:
            give_up(output, job.runs, run_id)
            raise PublishError(
                f"run {winner} published to {output.root} while the night {run_id} was at work: its labels stay in force, and "
                "those of the night are removed. A night that begins now (with another --run-id, if you name one) builds on it"
            ) from None
        raise PublishError(
            f"run {winner} published to {output.root} while run {run_id} was at work: its labels stay in force. "
            f"The labels of {run_id} are complete in {pointer['labels']}; the same command again puts them in force"
        ) from None


def _recall_holds(config: ClusterConfig, done: dict[str, Manifest]) -> bool:
    """Whether the measured recall is as wanted, or nothing more can be done.

    Raises QualityError where it is not and may not, or cannot, be raised.
    """
    recall, plan = done["search"].counts["recall"], done["quantize"].counts
    shown = f"edge recall {recall['estimate']:.4f} (95 % interval {recall['low']:.4f} to {recall['high']:.4f})"
    log.info(
        "recall   %s from %s faces, %s true neighbors",
        shown,
        f"{recall['faces']:,}",
        f"{recall['edges']:,}",
        extra=event("recall", **recall),
    )
    if recall["estimate"] >= config.min_recall:
        return True
    if plan["incremental"]:
        return False  # what a night saved was too dear
    hopeless = plan["index"] == "exact" or plan["exhausted"]
    if config.raise_probes and not hopeless:
        return False
    advice = "lower --min-recall" if hopeless else "use --raise-probes, more --probes or --index exact, or lower --min-recall"
    raise QualityError(f"{shown} is below --min-recall {config.min_recall}: {advice}; nothing was published")


def _search_again(job: _Job, effort: int, night: bool) -> None:
    """Forget the assignment and the tables; the quantizer stays, unless it is a night's, who had it from the past.

    The new effort is recorded last: a run that is interrupted on the way finds its recall too low once more.
    """
    stores = job.stores
    log.info("recall   too low: searching again with more probes (attempt %d)", effort + 1)
    for stage in (search.STAGE, quantize.STAGE):
        stores.run.delete(layout.manifest(stage.name))
        stores.run.delete(layout.plan(stage.name))
    for folder in ("cells", "homes", "before", *search.STAGE.writes, *(["quantizer"] if night else [])):
        stores.run.delete(folder)
    job.record("begun", effort=effort)
