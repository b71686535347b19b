"""The report of a run: one page that opens from a disk, and its charts as PNG, made from what the stages' manifests tell."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from faceflow.errors import InputError
from faceflow.kernels.clusters import quality
from faceflow.kernels.threshold import valley
from faceflow.storage import layout, manifests
from faceflow.storage.manifests import Manifest
from faceflow.storage.object_store import Store
from faceflow.tools import figures

log = logging.getLogger("faceflow")

PAGE = "report.html"
THUMBNAIL_PIXELS = 132
"""Twice what the page shows, for screens of two pixels a point."""

LARGEST_IMAGE_BYTES = 64 * 2**20
"""A larger file is no photo; it is not opened."""

LONGEST_PAUSE = 30.0
"""Seconds between two stages from which on the run was interrupted, and the pause is left out of the timeline."""


@dataclass(frozen=True)
class Written:
    """Where the page is, how many faces it shows, and of how many of them there is a picture."""

    page: str
    faces: int
    pictures: int

    def complaint(self, thumbnails: str | None) -> str | None:
        """What to say of pictures that are missing."""
        if thumbnails is None or self.pictures == self.faces:
            return None
        return (
            f"--thumbnails {thumbnails}: {self.pictures:,} of {self.faces:,} pictures found; the others are shown by their ids"
        )


def write_report(output: Store, run: Store, run_id: str, thumbnails: str | None, to: Store | None = None) -> Written:
    """Write report.html and its charts for a published run.

    thumbnails: a URL or path with {id}, which is where a face's picture is; pictures on a disk become part of the page.
    Raises InputError where the run has not been finished.
    """
    done = {stage: manifests.read(run, stage) for stage in ("ingest", "quantize", "search", "link", "detect", "publish")}
    missing = [stage for stage, manifest in done.items() if manifest is None]
    record = run.read_json(layout.RUN_RECORD)
    if missing or record is None:
        raise InputError(
            f"run {run_id} is not finished ({', '.join(missing) or 'no record'}): there is nothing to report on yet"
        )
    whole = {stage: manifest for stage, manifest in done.items() if manifest is not None}
    folder = to if to is not None else output.child(layout.report_folder(run_id))
    stages = _stages(whole, float(record.get("ray_start_seconds", 0.0)))
    drawn = _figures(whole, record, stages)
    for name, figure in drawn.items():
        folder.write_bytes(f"{name}.png", figures.png(figure))
    page, shown = _page(run_id, whole, record, stages, drawn, thumbnails)
    folder.write_bytes(PAGE, page.encode())
    return Written(folder.address(PAGE), len(shown), sum(face["image"] is not None for face in shown))


def _page(
    run_id: str,
    done: Mapping[str, Manifest],
    record: Mapping[str, Any],
    stages: list[dict[str, Any]],
    drawn: Mapping[str, Any],
    thumbnails: str | None,
) -> tuple[str, list[dict[str, str | None]]]:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        files(__package__).joinpath(PAGE).read_text(encoding="utf-8")
    )
    counts = {stage: manifest.counts for stage, manifest in done.items()}
    ingest, publish, quality = counts["ingest"], counts["publish"], counts["publish"].get("quality", {})
    recall = counts["search"]["recall"]
    examples = [_card(item, thumbnails) for item in publish.get("examples", [])]
    seconds = sum(manifest.seconds for manifest in done.values())
    tiles = [
        (f"{ingest['faces']:,}", "faces"),
        (f"{publish['clusters']:,}", "clusters"),
        (f"{publish['singletons']:,}", "of one face"),
        (f"{counts['link']['edges']:,}", "edges"),
        (_number(counts["quantize"]["threshold"], 3), "threshold (cosine)"),
        (f"{recall['estimate']:.4f}", "recall of the search"),
        (f"{quality.get('doubtful_share', 0):.2%}", "doubtful faces"),
        (_duration(record.get("seconds", seconds)), "from Parquet to labels"),
    ]
    parent = (record.get("night") or {}).get("past")
    shown = [face for item in examples for face in (*item["faces_shown"], *item["pair_shown"])]
    page = template.render(
        run_id=run_id,
        created=record["updated"].replace("T", " ")[:16] + " UTC",
        settings={name: value for name, value in record["settings"].items() if value is not None},
        versions=_versions(done),
        parent=parent,
        tiles=tiles,
        warnings=_warnings(counts, recall, record),
        changes=_changes(counts) if parent else None,
        doubtful=[item for item in examples if item["doubtful"]],
        largest=sorted((e for e in examples if e["largest"]), key=lambda item: (-item["faces"], item["cluster"])),
        sizes_sentence=_sizes_sentence(publish, ingest["faces"]),
        threshold_sentence=_threshold_sentence(counts["quantize"], ingest["faces"]),
        recall_sentence=f"{recall['estimate']:.2%} of the true neighbors of {recall['faces']:,} sampled faces were found "
        f"({recall['edges']:,} edges, searched exactly; 95 % interval {recall['low']:.4f} to {recall['high']:.4f}).",
        time_sentence=_time_sentence(stages, seconds),
        stages=stages,
        figures={name: Markup(figures.svg(figure)) for name, figure in drawn.items()},
        image_sources=_image_sources(thumbnails),
    )
    return page, shown


def _figures(done: Mapping[str, Manifest], record: Mapping[str, Any], stages: list[dict[str, Any]]) -> dict[str, Any]:
    plan, search, publish = done["quantize"].counts, done["search"].counts, done["publish"].counts
    cpus = max([1, *(int(step.get("cpus", 1)) for manifest in done.values() for step in manifest.steps)])
    pairs, threshold = plan.get("pairs"), plan["threshold"]
    bands = np.array(search.get("recall_bands") or [[0], [0]])
    results = np.array(publish.get("similarities") or np.zeros((2, quality.BINS), int))
    return {
        "sizes": figures.sizes(publish.get("quality", {}).get("sizes", {})),
        "similarities": figures.similarities(
            np.array(pairs) if pairs else None, results, threshold,
            plan["support_threshold"], plan.get("valley"), plan.get("flank"), valley.BINS,
        ),
        "recall": figures.recall(search["recall"], bands, threshold, float(record["settings"]["min_recall"])),
        "timeline": figures.timeline(stages, cpus),
    }  # fmt: skip


def _stages(done: Mapping[str, Manifest], ray_start: float) -> list[dict[str, Any]]:
    """Stages on one time axis, Ray's start first: where a run was interrupted, the pause is left out."""
    results: list[dict[str, Any]] = []
    at, end = 0.0, None
    faces = done["ingest"].counts["faces"]
    for name, manifest in done.items():
        # The first stage that needs Ray waits for it.
        start = ray_start if name == "ingest" and manifest.seconds > ray_start else 0.0
        if start:
            blank = {
                "steps": [],
                "busy": 0.0,
                "available": 0.0,
                "rate": "",
                "used": "",
                "read": "",
                "written": "",
                "peak": "",
                "retries": "",
            }
            results.append({"name": "start of Ray", "start": 0.0, "seconds": start, "shown_seconds": f"{start:,.1f}"} | blank)
        seconds = manifest.seconds - start
        pause = manifest.begun - end if end is not None else 0.0
        at += pause if 0 <= pause < LONGEST_PAUSE else 0.0
        steps = [dict(step) | {"start": at + max(0.0, step["begun"] - manifest.begun)} for step in manifest.steps]
        busy, available = (
            sum(step["busy_seconds"] for step in steps),
            max([1, *(step.get("cpus", 1) for step in steps)]) * max(seconds, 1e-9),
        )
        results.append(
            {
                "name": name, "start": at + start, "seconds": seconds, "steps": steps, "busy": busy, "available": available,
                "shown_seconds": f"{seconds:,.1f}", "rate": f"{faces / max(seconds, 1e-3):,.0f}",
                "used": f"{min(1.0, busy / available):.0%}" if steps else "",
                "read": _bytes(sum(step["read_bytes"] for step in steps)),
                "written": _bytes(sum(step["written_bytes"] for step in steps)),
                "peak": _bytes(max([0, *(step["peak_bytes"] for step in steps)])),
                "retries": ", ".join(f"{n} x {cause}" for step in steps for cause, n in step["retries"].items()) or "0",
            }
        )  # fmt: skip
        at += manifest.seconds
        end = manifest.begun + manifest.seconds
    return results


def _warnings(counts: Mapping[str, Mapping[str, Any]], recall: Mapping[str, float], record: Mapping[str, Any]) -> list[str]:
    results = []
    if counts["ingest"]["quarantined"]:
        results.append(
            f"{counts['ingest']['quarantined']:,} rows were set aside and have no cluster: quarantined/ says which and why."
        )
    if "valley" in counts["quantize"] and counts["quantize"]["valley"] is None:
        results.append(
            "The similarities of pairs show no valley between different people and one person, so the threshold is a guess: "
            "look at the clusters, and give --min-similarity if you know better."
        )
    if recall["estimate"] < float(record["settings"]["min_recall"]):
        results.append("The measured recall is below --min-recall.")
    if counts["detect"].get("exclusive_left"):
        results.append(f"{counts['detect']['exclusive_left']:,} faces share a cluster with another face of the same photo.")
    return results


def _changes(counts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    ingest, publish = counts["ingest"], counts["publish"]
    kinds = ("created", "grown", "shrunk", "changed", "merged", "split", "vanished")
    parts = [f"{ingest[key]:,} faces {text}" for key, text in (("added", "new"), ("changed", "changed"), ("removed", "gone"))]
    sentence = (
        f"{', '.join(parts)}; {publish.get('untouched_moved', 0):,} faces that were there before are in another cluster now."
    )
    return {"sentence": sentence, "events": {kind: f"{publish.get('events', {}).get(kind, 0):,}" for kind in kinds}}


def _sizes_sentence(publish: Mapping[str, Any], faces: int) -> str:
    grouped = publish["clusters"] - publish["singletons"]
    mean = (faces - publish["singletons"]) / grouped if grouped else 0
    alone = f"{publish['singletons']:,} faces stand alone"
    return f"{grouped:,} clusters of two faces and more, of {mean:,.1f} faces on average; {alone}."


def _threshold_sentence(plan: Mapping[str, Any], faces: int) -> str:
    threshold = plan["threshold"]
    if threshold is None:
        return "No threshold: each face has its nearest neighbors, however far (--min-similarity none)."
    if "impostors_per_face" not in plan:
        return f"Faces are neighbors from a cosine of {threshold:.3f} on, as given (--min-similarity)."
    return (
        f"Faces are neighbors from a cosine of {threshold:.3f} on, found without labels: there one pair in ten is of different "
        f"people by the fitted flanks. Among {faces:,} faces that lets expect at most "
        f"{plan['impostors_per_face']:.3g} neighbors per face that are other people."
    )


def _time_sentence(stages: Sequence[Mapping[str, Any]], seconds: float) -> str:
    slowest = max(stages, key=lambda stage: stage["seconds"])
    busy, available = (sum(stage[key] for stage in stages) for key in ("busy", "available"))
    text = f"Most of it is {slowest['name']} ({slowest['seconds'] / max(seconds, 1e-9):.0%})."
    if available and busy:
        text += f" The CPUs were at work {min(1.0, busy / available):.0%} of the time."
    return text


def _versions(done: Mapping[str, Manifest]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for manifest in done.values():
        results |= {key: value for key, value in manifest.fingerprint.items() if key.startswith("version of ")}
    return results


def _card(example: Mapping[str, Any], thumbnails: str | None) -> dict[str, Any]:
    sentence = f"{example['faces']:,} faces"
    if example["within"] is not None:
        sentence += f"; mean similarity {example['within']:.3f}"
    if example["doubtful_share"]:
        sentence += f"; {example['doubtful_share']:.0%} of the faces doubtful"
    if example.get("stability") is not None:
        sentence += f"; stability {example['stability']:.2f}"
    shown = {
        "sentence": sentence,
        "near": _number(example["nearest_outside"], 3),
        "faces_shown": [_face(item, thumbnails) for item in example["ids"]],
        "pair_shown": [_face(item, thumbnails) for item in example["pair"]],
    }
    return dict(example) | shown


def _face(face_id: str, thumbnails: str | None) -> dict[str, str | None]:
    return {"id": face_id, "image": _image(face_id, thumbnails)}


def _image(face_id: str, thumbnails: str | None) -> str | None:
    """What the page shows of a face: an address, or the picture itself where it lies on a disk; None where there is none."""
    if thumbnails is None:
        return None
    if urlsplit(thumbnails).scheme in ("http", "https"):
        return thumbnails.replace("{id}", quote(face_id, safe=""))
    # An id comes from outside: it may name a file below the folder, and none elsewhere.
    if ".." in face_id.split("/") or face_id.startswith("/") or "\0" in face_id:
        return None
    return _embedded(thumbnails.removeprefix("file://").replace("{id}", face_id))


def _embedded(path: str) -> str | None:
    from PIL import Image, ImageOps

    try:
        store = Store.at(path)
        if (store.size("") or LARGEST_IMAGE_BYTES) >= LARGEST_IMAGE_BYTES:
            return None
        with Image.open(io.BytesIO(store.read_bytes(""))) as image:
            small = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _image_sources(thumbnails: str | None) -> str:
    """The one origin that pictures may come from."""
    parts = urlsplit(thumbnails or "")
    return f" {parts.scheme}://{parts.netloc}" if parts.scheme in ("http", "https") else ""


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _duration(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 180 else f"{seconds / 60:,.0f} min"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} B" if count else ""


def report_run(
    output: str,
    run_id: str | None = None,
    thumbnails: str | None = None,
    to: str | None = None,
    work_dir: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Written:
    """The report of a run of OUTPUT, anew (default: of the one in force). Raises InputError where there is no such run."""
    out, runs = layout.stores(output, work_dir, options)
    name = run_id or (layout.read_latest(out) or {}).get("run_id")
    if name is None or runs.read_json(f"{name}/{layout.RUN_RECORD}") is None:
        raise InputError(
            f"{output} has no {f'run {name}' if name else 'published run'}: `faceflow runs {output}` lists its runs"
        )
    folder = Store.at(to, options) if to else None
    (folder or out).check_writable()
    return write_report(out, runs.child(name), name, thumbnails, folder)
