"""What the report says: every figure and sentence of the page, from the results of a run's stages. No HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from faceflow.runs.records import RunRecord
from faceflow.stages.results import Example, Results, ThresholdResult
from faceflow.storage.manifests import StepRecord
from faceflow.tools.report.pictures import picture

LONGEST_PAUSE = 30.0
"""Seconds between two stages from which on the run was interrupted, and the pause is left out of the timeline."""

EVENTS = ("created", "grown", "shrunk", "changed", "merged", "split", "vanished")


@dataclass(frozen=True)
class Bar:
    """A step on the timeline: seconds from the run's begin, wall and busy seconds."""

    label: str
    start: float
    seconds: float
    busy_seconds: float
    tasks: int


@dataclass(frozen=True)
class StageRow:
    """A stage on the timeline and in the table: start and seconds from the run's begin; busy, available: CPU seconds; the
    others as text."""

    name: str
    start: float
    seconds: float
    steps: tuple[Bar, ...] = ()
    busy: float = 0.0
    available: float = 0.0
    rate: str = ""
    used: str = ""
    read: str = ""
    written: str = ""
    peak: str = ""
    retries: str = ""

    @property
    def shown_seconds(self) -> str:
        return f"{self.seconds:,.1f}"


@dataclass(frozen=True)
class Face:
    """A face that is shown. image: an address, or the picture itself; None: there is none."""

    id: str
    image: str | None


@dataclass(frozen=True)
class Card:
    """A cluster that is shown: some of its faces, and the nearest pair across, with its similarity."""

    example: Example
    sentence: str
    near: str
    faces: tuple[Face, ...]
    pair: tuple[Face, ...]


@dataclass(frozen=True)
class Changes:
    """What an incremental run changed: a sentence, and how many events of each kind."""

    sentence: str
    events: Mapping[str, str]


@dataclass(frozen=True)
class ReportData:
    """The page of a run. tiles: (value, name); parent: the base run."""

    run_id: str
    created: str
    settings: Mapping[str, object]
    versions: Mapping[str, object]
    parent: str | None
    tiles: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    changes: Changes | None
    least_certain: tuple[Card, ...]
    largest: tuple[Card, ...]
    sizes_sentence: str
    threshold_sentence: str
    recall_sentence: str
    time_sentence: str
    stages: tuple[StageRow, ...]

    @property
    def faces(self) -> list[Face]:
        """Every face that is shown, as often as it is."""
        cards = {card.example.cluster: card for card in (*self.least_certain, *self.largest)}.values()
        return [face for card in cards for face in (*card.faces, *card.pair)]


def report_data(run_id: str, results: Results, record: RunRecord, thumbnails: str | None) -> ReportData:
    """What the report of a finished run says; thumbnails: URL or path with {id}, where a face's picture is."""
    stages = timeline(results, record.ray_start_seconds)
    seconds = sum(manifest.seconds for manifest in results.manifests.values())
    cards = [_card(example, thumbnails) for example in results.publish.examples]
    parent = record.incremental.base if record.incremental is not None else None
    recall = results.search.recall
    by_size = sorted(cards, key=lambda card: (-card.example.faces, card.example.cluster))
    return ReportData(
        run_id=run_id,
        created=record.updated.replace("T", " ")[:16] + " UTC",
        settings={name: value for name, value in record.settings.items() if value is not None},
        versions=_versions(results),
        parent=parent,
        tiles=_tiles(results, record.seconds if record.seconds is not None else seconds),
        warnings=tuple(_warnings(results, record)),
        changes=_changes(results) if parent is not None else None,
        least_certain=tuple(card for card in cards if card.example.doubtful),
        largest=tuple(card for card in by_size if card.example.largest),
        sizes_sentence=_sizes_sentence(results),
        threshold_sentence=_threshold_sentence(results.quantize.threshold, results.ingest.faces),
        recall_sentence=f"The search found {recall.estimate:.2%} of the true neighbors of {recall.faces:,} sampled faces "
        f"({recall.edges:,} edges, searched exactly; 95 % interval {recall.low:.4f} to {recall.high:.4f}).",
        time_sentence=_time_sentence(stages, seconds),
        stages=stages,
    )


def _tiles(results: Results, seconds: float) -> tuple[tuple[str, str], ...]:
    publish, threshold = results.publish, results.quantize.threshold.similarity
    return (
        (f"{results.ingest.faces:,}", "faces"),
        (f"{publish.clusters:,}", "clusters"),
        (f"{publish.singletons:,}", "singletons"),
        (f"{results.link.edges:,}", "edges"),
        (_number(threshold, 3), "similarity threshold (cosine)"),
        (f"{results.search.recall.estimate:.4f}", "recall of the search"),
        (f"{publish.quality.doubtful_share:.2%}", "doubtful faces"),
        (f"{seconds:,.0f} s" if seconds < 180 else f"{seconds / 60:,.0f} min", "from Parquet to labels"),
    )


def timeline(results: Results, ray_start: float) -> tuple[StageRow, ...]:
    """Stages on one time axis, Ray's start first: where a run was interrupted, the pause is left out."""
    rows: list[StageRow] = []
    at, end = 0.0, None
    faces = results.ingest.faces
    for name, manifest in results.manifests.items():
        # The first stage that needs Ray waits for it.
        start = ray_start if name == "ingest" and manifest.seconds > ray_start else 0.0
        if start:
            rows.append(StageRow("start of Ray", 0.0, start))
        seconds = manifest.seconds - start
        pause = manifest.begun - end if end is not None else 0.0
        at += pause if 0 <= pause < LONGEST_PAUSE else 0.0
        steps = manifest.steps
        bars = tuple(
            Bar(step.label, at + max(0.0, step.begun - manifest.begun), step.seconds, step.busy_seconds, step.tasks)
            for step in steps
        )
        busy = sum(step.busy_seconds for step in steps)
        available = max([1, *(step.cpus for step in steps)]) * max(seconds, 1e-9)
        rows.append(
            StageRow(
                name, at + start, seconds, bars, busy, available, f"{faces / max(seconds, 1e-3):,.0f}",
                f"{min(1.0, busy / available):.0%}" if steps else "", _bytes(sum(step.read_bytes for step in steps)),
                _bytes(sum(step.written_bytes for step in steps)), _bytes(max([0, *(step.peak_bytes for step in steps)])),
                _retries(steps),
            )
        )  # fmt: skip
        at += manifest.seconds
        end = manifest.begun + manifest.seconds
    return tuple(rows)


def _retries(steps: Sequence[StepRecord]) -> str:
    return ", ".join(f"{n} x {cause}" for step in steps for cause, n in step.retries.items()) or "0"


def _warnings(results: Results, record: RunRecord) -> list[str]:
    warnings = []
    if results.ingest.quarantined:
        warnings.append(
            f"{results.ingest.quarantined:,} rows are quarantined and have no cluster: see quarantined/ for reasons."
        )
    threshold = results.quantize.threshold
    if threshold.automatic and threshold.valley is None:
        warnings.append(
            "No valley between genuine and impostor similarities, so the similarity threshold is a guess: look at the "
            "clusters, "
            "and set --min-similarity if you know a better one."
        )
    if results.search.recall.estimate < float(str(record.settings["min_recall"])):
        warnings.append("The measured recall is below --min-recall.")
    if results.detect.exclusive_left:
        warnings.append(f"{results.detect.exclusive_left:,} faces share a cluster with another face of the same photo.")
    return warnings


def _changes(results: Results) -> Changes | None:
    rows, publish = results.ingest.changes, results.publish
    if rows is None:
        return None
    counts = f"{rows.added:,} faces new, {rows.changed:,} changed, {rows.removed:,} removed"
    events = publish.events or {}
    return Changes(
        f"{counts}; {publish.moved_known or 0:,} faces of both runs changed their cluster.",
        {kind: f"{events.get(kind, 0):,}" for kind in EVENTS},
    )


def _sizes_sentence(results: Results) -> str:
    publish = results.publish
    grouped = publish.clusters - publish.singletons
    mean = (results.ingest.faces - publish.singletons) / grouped if grouped else 0
    return f"{grouped:,} clusters of two faces and more, {mean:,.1f} faces on average; {publish.singletons:,} singletons."


def _threshold_sentence(threshold: ThresholdResult, faces: int) -> str:
    if threshold.similarity is None:
        return "No similarity threshold: each face has its nearest neighbors, however far (--min-similarity none)."
    if not threshold.automatic:
        return f"Faces are neighbors from a cosine of {threshold.similarity:.3f}, as given (--min-similarity)."
    return (
        f"Faces are neighbors from a cosine of {threshold.similarity:.3f}, found without labels: by the fitted flanks one pair "
        f"in ten there is an impostor pair. Among {faces:,} faces a face has at most {threshold.impostors_per_face:.3g} "
        f"impostor "
        "neighbors on average."
    )


def _time_sentence(stages: Sequence[StageRow], seconds: float) -> str:
    slowest = max(stages, key=lambda stage: stage.seconds)
    busy, available = sum(stage.busy for stage in stages), sum(stage.available for stage in stages)
    text = f"Most of it is {slowest.name} ({slowest.seconds / max(seconds, 1e-9):.0%})."
    if available and busy:
        text += f" The CPUs were busy {min(1.0, busy / available):.0%} of the time."
    return text


def _versions(results: Results) -> dict[str, object]:
    versions: dict[str, object] = {}
    for manifest in results.manifests.values():
        versions |= {key: value for key, value in manifest.fingerprint.items() if key.startswith("version of ")}
    return versions


def _card(example: Example, thumbnails: str | None) -> Card:
    sentence = f"{example.faces:,} faces"
    if example.within is not None:
        sentence += f"; mean similarity {example.within:.3f}"
    if example.doubtful_share:
        sentence += f"; {example.doubtful_share:.0%} of the faces doubtful"
    if example.stability is not None:
        sentence += f"; stability {example.stability:.2f}"
    faces, pair = (tuple(Face(i, picture(i, thumbnails)) for i in ids) for ids in (example.ids, example.pair))
    return Card(example, sentence, _number(example.nearest_outside, 3), faces, pair)


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} B" if count else ""
