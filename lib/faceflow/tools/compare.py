"""Every clustering method on one neighbor table, scored against known identities: the literature's table on the user's data."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from faceflow.cluster.executor import Executor, Resources
from faceflow.cluster.worker import peak_memory
from faceflow.config import ClusterConfig
from faceflow.errors import FaceflowError, InputError, SettingsError, did_you_mean
from faceflow.kernels.graph import edge_recipes
from faceflow.kernels.methods import registry
from faceflow.runs.pipeline import execute
from faceflow.stages.artifacts.faces import RunData, good_entries, label_table, read_ids, read_quarantined
from faceflow.stages.base import open_executor
from faceflow.stages.detect import method_input
from faceflow.stages.results import Results
from faceflow.storage import column_types, layout
from faceflow.storage.object_store import Store
from faceflow.tools.datasets.convert import import_neighbors
from faceflow.tools.evaluate import evaluate, read_identities

log = logging.getLogger("faceflow")


@dataclass(frozen=True)
class Row:
    """One method's line. Scores as `evaluation.evaluate` gives them; seconds: of the method alone, the table being there;
    peak_memory_bytes: of its process, the table included; skipped: why there are no scores (empty: there are)."""

    method: str
    pairwise_precision: float | None = None
    pairwise_recall: float | None = None
    pairwise_f: float | None = None
    bcubed_precision: float | None = None
    bcubed_recall: float | None = None
    bcubed_f: float | None = None
    nmi: float | None = None
    clusters: int | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Comparison:
    """rows: in the order asked for; run_id: of the run whose table it was (None: a table from a file); folder: where table.txt,
    table.csv, plot.png and each method's labels are."""

    run_id: str | None
    rows: list[Row]
    folder: str


@dataclass(frozen=True)
class _Run:
    """The neighbor table and the graph of a finished run."""

    data: RunData
    threshold: float | None
    ids: pa.DataType

    @property
    def faces(self) -> int:
        return self.data.parts.faces

    def read(self, clusters: int, seed: int, threads: int) -> registry.Given:
        return method_input.read(self.data, self.threshold, clusters, seed, threads)

    def labeled(self, labels: np.ndarray) -> Iterator[pa.Table]:
        run, starts = self.data.store, self.data.parts.starts
        for part in range(len(self.data.parts)):
            ids = read_ids(run, part)
            good = good_entries(read_quarantined(run, part), len(ids))
            yield label_table(ids, self.ids, good, labels[starts[part] : starts[part + 1]])


@dataclass(frozen=True)
class _File:
    """A published neighbor table: ids are row numbers, and there are no embeddings."""

    path: str
    faces: int
    threshold: float
    recipe: str

    def read(self, clusters: int, seed: int, threads: int) -> registry.Given:
        block = import_neighbors(self.path)
        block = edge_recipes.kept(block, (block[2] >= np.float32(self.threshold)) & (block[2] > 0))
        graph = (
            block if self.recipe == "threshold" else edge_recipes.weighted(self.recipe, block, self.threshold, self.threshold)
        )

        def vectors(rows: np.ndarray) -> np.ndarray:
            raise InputError("needs the embeddings, and a neighbor table has none")

        return registry.Given(block, graph, vectors, self.threshold, clusters, seed, threads)

    def labeled(self, labels: np.ndarray) -> Iterator[pa.Table]:
        yield pa.table([pa.array(np.arange(len(labels))), pa.array(labels)], names=["id", "cluster"])


def compare_methods(
    config: ClusterConfig,
    truth: str,
    wanted: Sequence[str] | None = None,
    *,
    label_column: str = "label",
    progress: bool = True,
) -> Comparison:
    """Cluster `config.input` once, then run every method on its neighbor table and score all against `truth`.

    An input `.npz` is a neighbor table itself (`importing.import_neighbors`) on this machine's disk; the threshold must be
    given. wanted: names of methods (None: all but those that need the number of clusters). Those that need it
    get the true one. A method that cannot be run here (a package is missing, the set or a component is
    too large) is a row that says why. Raises SettingsError for an unknown method, InputError for a truth that cannot be used,
    before anything is computed.
    """
    names = (
        list(wanted) if wanted is not None else [name for name, method in registry.METHODS.items() if not method.needs_clusters]
    )
    for name in names:
        if name not in registry.METHODS:
            raise SettingsError(f"unknown method {name!r}{did_you_mean(name, registry.METHODS)}")
    identities = read_identities(truth, config.id_column, label_column, config.storage_options)
    people = pc.count_distinct(identities["value"]).as_py()
    (output, runs), file = layout.stores(config.output, config.work_dir, config.storage_options), _table_of(config)
    if file is not None and file.faces != len(identities):
        raise InputError(f"{config.input} has {file.faces:,} faces, but {truth} has {len(identities):,}")
    run_id, source = (None, file) if file is not None else _clustered(config, runs, progress)
    del identities
    folder, rows = output.child(layout.compare_folder(run_id or Path(config.input).stem)), []
    with open_executor(config.address, config.workers, progress) as executor:
        for name in names:
            threads = executor.largest_machine_cpus
            row = _run(executor, RunMethod(name, source, folder, people, threads, truth, label_column, config))
            log.info("%s", _line(row))
            rows.append(row)
    text = table(rows)
    folder.write_bytes("table.txt", (text + "\n").encode())
    folder.write_bytes("table.csv", _csv(rows).encode())
    plot = _plot(rows)
    if plot is not None:
        folder.write_bytes("plot.png", plot)
    return Comparison(run_id, rows, folder.root)


def _table_of(config: ClusterConfig) -> _File | None:
    if not config.input.endswith(".npz") or Path(config.input).is_dir():
        return None
    threshold = config.min_similarity
    if not isinstance(threshold, (int, float)):
        raise SettingsError(
            "a neighbor table has no impostor pairs to find a threshold from: give --min-similarity as a cosine"
        )
    return _File(config.input, len(import_neighbors(config.input)[0]) - 1, float(threshold), config.edges)


def _clustered(config: ClusterConfig, runs: Store, progress: bool) -> tuple[str, _Run]:
    run_id = execute(config, incremental=False, progress=progress).run_id
    run = runs.child(run_id)
    results = Results.read(run)
    data = RunData(run, results.parts, results.ingest.dim)
    kind = column_types.type_of(results.ingest.id_type)
    return run_id, _Run(data, results.quantize.threshold.similarity, kind)


@dataclass(frozen=True)
class RunMethod:
    """Request: one method on one neighbor table, and its scores. clusters: how many to make, if it needs the number; threads:
    that it may use; truth, label_column: where the identities are."""

    name: str
    source: _Run | _File
    folder: Store
    clusters: int
    threads: int
    truth: str
    label_column: str
    config: ClusterConfig


def _run(executor: Executor, request: RunMethod) -> Row:
    name, method = request.name, registry.METHODS[request.name]
    if request.source.faces > method.most_faces:
        return Row(name, skipped=f"does not scale: not run above {method.most_faces:,} faces")
    try:
        return executor.call(run_method, request, name, resources=Resources(cpus=0, apart=True))
    except FaceflowError as error:
        return Row(name, skipped=str(error))


def run_method(request: RunMethod) -> Row:
    """In a worker of its own: one method's labels, written as Parquet, and its scores."""
    name, source, folder, config = request.name, request.source, request.folder, request.config
    given = source.read(request.clusters, config.seed, request.threads)
    begun = time.perf_counter()
    labels = registry.cluster(name, given)
    seconds, peak = time.perf_counter() - begun, peak_memory()
    file_name = f"labels-{name}.parquet"
    with folder.open_write(file_name) as file:
        writer = None
        for content in source.labeled(labels):
            writer = writer or pq.ParquetWriter(file, content.schema, compression="zstd")
            writer.write_table(content)
        if writer is not None:
            writer.close()
    scores = asdict(
        evaluate(
            folder.address(file_name), request.truth, label_column=request.label_column, id_column=config.id_column,
            storage_options=config.storage_options,
        )
    )  # fmt: skip
    results = {field.name: scores[field.name] for field in fields(Row) if field.name in scores}
    return Row(name, **results, seconds=round(seconds, 3), peak_memory_bytes=peak)


_HEAD = ("method", "pairwise P", "R", "F", "BCubed P", "R", "F", "NMI", "clusters", "seconds", "MiB")
_WIDTHS = (18, 11, 8, 8, 10, 8, 8, 8, 10, 9, 8)


def table(rows: Sequence[Row]) -> str:
    """The table as text; methods that were skipped say why."""
    head = "".join(f"{title:>{width}}" for title, width in zip(_HEAD[1:], _WIDTHS[1:], strict=True))
    return "\n".join([f"{_HEAD[0]:{_WIDTHS[0]}}{head}", *map(_line, rows)])


def _line(row: Row) -> str:
    if row.skipped:
        return f"{row.method:{_WIDTHS[0]}}{row.skipped}"
    scores = [
        row.pairwise_precision,
        row.pairwise_recall,
        row.pairwise_f,
        row.bcubed_precision,
        row.bcubed_recall,
        row.bcubed_f,
    ]
    cells = [f"{value:.4f}" for value in [*scores, row.nmi]]
    cells += [f"{row.clusters:,}", f"{row.seconds:,.1f}", f"{(row.peak_memory_bytes or 0) / 2**20:,.0f}"]
    return f"{row.method:{_WIDTHS[0]}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS[1:], strict=True))


def _csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, [*(field.name for field in fields(Row)), "what"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) | {"what": registry.METHODS[row.method].text} for row in rows)
    return out.getvalue()


def _plot(rows: Sequence[Row]) -> bytes | None:
    """A PNG of the methods that have a score; None where none has."""
    from faceflow.tools import figures

    scored = sorted((row for row in rows if not row.skipped), key=lambda row: (row.pairwise_f or 0) + (row.bcubed_f or 0))
    return figures.png(figures.methods(scored)) if scored else None
