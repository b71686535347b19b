"""The report of a run: one page that opens from a disk, and its charts as PNG."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from faceflow.errors import InputError
from faceflow.kernels.threshold import valley
from faceflow.runs.publication import ReportRequest
from faceflow.runs.records import RunRecord, read_record
from faceflow.setting_types import StorageOptions
from faceflow.stages.results import Results
from faceflow.storage import layout
from faceflow.storage.object_store import Store
from faceflow.storage.pointer import current_run_id
from faceflow.tools import figures
from faceflow.tools.report.data import ReportData, report_data
from faceflow.tools.report.pictures import image_sources

PAGE = "report.html"


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
        return f"--thumbnails {thumbnails}: {self.pictures:,} of {self.faces:,} pictures found; the others show their ids"


def write_report(request: ReportRequest) -> Written:
    """Write report.html and its charts for a published run; pictures on a disk become part of the page.

    Raises InputError where the run is not finished.
    """
    results, run_id = Results.read(request.run), request.run_id
    record = read_record(request.run)
    if results.missing or record is None:
        raise InputError(
            f"run {run_id} is not finished ({', '.join(results.missing) or 'no record'}): nothing to report on yet"
        )
    folder = request.to if request.to is not None else request.output.child(layout.report_folder(run_id))
    data = report_data(run_id, results, record, request.thumbnails)
    drawn = _figures(results, record, data)
    for name, figure in drawn.items():
        folder.write_bytes(f"{name}.png", figures.png(figure))
    folder.write_bytes(PAGE, _render(data, drawn, request.thumbnails).encode())
    shown = data.faces
    return Written(folder.address(PAGE), len(shown), sum(face.image is not None for face in shown))


def _render(data: ReportData, drawn: dict[str, figures.Figure], thumbnails: str | None) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        files(__package__).joinpath(PAGE).read_text(encoding="utf-8")
    )
    page: str = template.render(
        data=data,
        figures={name: Markup(figures.svg(figure)) for name, figure in drawn.items()},
        image_sources=image_sources(thumbnails),
    )
    return page


def _figures(results: Results, record: RunRecord, data: ReportData) -> dict[str, figures.Figure]:
    threshold, search, publish = results.quantize.threshold, results.search, results.publish
    cpus = max([1, *(step.cpus for manifest in results.manifests.values() for step in manifest.steps)])
    pairs = np.array(threshold.pairs) if threshold.pairs else None
    least = float(str(record.settings["min_recall"]))
    return {
        "sizes": figures.sizes(publish.quality.sizes or {}),
        "similarities": figures.similarities(pairs, np.array(publish.similarities), threshold, valley.BINS),
        "recall": figures.recall(search.recall, np.array(search.recall_bands), threshold.similarity, least),
        "timeline": figures.timeline(data.stages, cpus),
    }


def report_run(
    output: str,
    run_id: str | None = None,
    thumbnails: str | None = None,
    to: str | None = None,
    work_dir: str | None = None,
    options: StorageOptions | None = None,
) -> Written:
    """Write the report of a run of OUTPUT again (default: of the current one). Raises InputError where there is no such run."""
    out, runs = layout.stores(output, work_dir, options)
    name = run_id or current_run_id(out)
    if name is None or read_record(runs.child(name)) is None:
        raise InputError(
            f"{output} has no {f'run {name}' if name else 'published run'}: `faceflow runs {output}` lists its runs"
        )
    folder = Store.at(to, options) if to else None
    (folder or out).check_writable()
    return write_report(ReportRequest(out, runs.child(name), name, thumbnails, folder))
