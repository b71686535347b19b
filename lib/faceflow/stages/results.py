"""What each stage returns: one frozen dataclass a stage, written to its manifest and read back as that class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from faceflow.kernels.knn.recall import RecallEstimate
from faceflow.storage import manifests
from faceflow.storage.file_info import TableSnapshot
from faceflow.storage.layout import STAGES
from faceflow.storage.manifests import Manifest
from faceflow.storage.object_store import Store
from faceflow.tables import Parts

R = TypeVar("R")


@dataclass(frozen=True)
class RowChanges:
    """How the rows of an incremental run differ from those of its base run.

    added, changed, removed: faces; sources: bounds in the base run's parts, from 0 to their number: the first parts of this run
    each consist of the base parts between two bounds.
    """

    added: int
    changed: int
    removed: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class IngestResult:
    """faces: rows that can be clustered; quarantined: rows that cannot; dim: of the embeddings; starts, entries: where each
    part begins, by faces and by input rows, and the end; id_type: of the published ids (`storage.column_types`);
    id_bytes: of all ids; input_snapshot: of the table that the input is; changes: None in a full run."""

    faces: int
    quarantined: int
    dim: int
    files: int
    starts: tuple[int, ...]
    entries: tuple[int, ...]
    id_type: str
    id_bytes: int
    input_snapshot: TableSnapshot | None = None
    changes: RowChanges | None = None

    @property
    def parts(self) -> Parts:
        return Parts(self.starts)

    @property
    def summary(self) -> str:
        text = f"{self.faces:,} faces"
        if self.changes is not None:
            text += f" ({self.changes.added:,} new, {self.changes.changed:,} changed, {self.changes.removed:,} removed)"
        return text + (f", {self.quarantined:,} rows quarantined" if self.quarantined else "")


@dataclass(frozen=True)
class ThresholdResult:
    """similarity: cosine from which faces are neighbors; support: the lower one from which supported pairs are (both None: the
    plain nearest neighbors); automatic: found from a sample of pairs; valley: of their histogram (None: there is none);
    impostors_per_face: expected impostor neighbors of a face, at most; near_identical: cosine from which faces count as one;
    pairs: histogram of the sampled pairs; flank: fit of the impostors (`kernels.threshold.valley.Thresholds`)."""

    similarity: float | None
    support: float | None
    automatic: bool = False
    valley: float | None = None
    impostors_per_face: float | None = None
    near_identical: float | None = None
    pairs: tuple[int, ...] | None = None
    flank: tuple[float, float] | None = None


@dataclass(frozen=True)
class CellsResult:
    """The coarse quantizer and how faces lie in its cells.

    similarity: mean similarity of a face to the centroid of its assigned cell; unevenness: mean size of the cell that a face is
    in, relative to equal cells; trained_similarity, trained_unevenness: the same when the quantizer was trained;
    new_similarity: of the new faces of an incremental run; mean_probes: cells that a face probes; sent: (face, shard) pairs;
    bytes_moved: of their vectors; exhausted: whether faces probe all cells already.
    """

    cells: int
    shards: int
    similarity: float
    unevenness: float
    trained_similarity: float
    trained_unevenness: float
    new_similarity: float | None = None
    mean_probes: float | None = None
    sent: int = 0
    bytes_moved: int = 0
    predicted_recall: float | None = None
    exhausted: bool = False


@dataclass(frozen=True)
class QuantizeResult:
    """index: the search plan, `exact` or `cells`; incremental: whether the base run's neighbor tables are carried over;
    reason: why they are not, in a run that could have been incremental; since_full: incremental runs since the last full one;
    trained_faces: faces that the plan was made for; active: of each part, faces that must be searched for; gflops: measured,
    of all workers; exact_seconds, cells_seconds: predicted for either plan."""

    index: str
    threshold: ThresholdResult
    trained_faces: int
    incremental: bool = False
    reason: str | None = None
    since_full: int = 0
    cells: CellsResult | None = None
    active: tuple[int, ...] = ()
    gflops: float | None = None
    exact_seconds: float | None = None
    cells_seconds: float | None = None

    @property
    def summary(self) -> str:
        text = "exact search"
        if self.cells is not None:
            text = f"{self.cells.cells:,} cells"
            text += f", {self.cells.mean_probes:.1f} probes per face" if self.cells.mean_probes else ""
        return text + (f", {sum(self.active):,} faces to search for" if self.incremental else "")


@dataclass(frozen=True)
class SearchResult:
    """neighbors: entries of the neighbor table; full_lists: faces with as many neighbors as the table keeps; followers: faces
    that count as one with another; searched_again: faces whose lists near-identical ones filled; recall_bands: true neighbors
    and those found, by similarity (`kernels.knn.recall.add_bands`); recall_seconds: what measuring it took."""

    neighbors: int
    full_lists: int
    recall: RecallEstimate
    recall_bands: tuple[tuple[int, ...], tuple[int, ...]]
    recall_seconds: float
    followers: int = 0
    searched_again: int = 0

    @property
    def summary(self) -> str:
        return f"{self.neighbors:,} neighbors" + (f", {self.full_lists:,} full lists" if self.full_lists else "")


@dataclass(frozen=True)
class LinkResult:
    """edges: of the pruned graph."""

    edges: int

    @property
    def summary(self) -> str:
        return f"{self.edges:,} edges"


@dataclass(frozen=True)
class DetectResult:
    """modules: after all that follows the map equation; codelength: in bits, of the graph's own modules; verified_codelength:
    the infomap package's, if asked for; joined: modules that the cap on neighbors had cut off; singletons: tried for
    assignment; assigned: of these; constraints: imposed; absent_constraints: that name an id which is not in the input;
    exclusive_moved, exclusive_left: faces parted from, and left with, another of their photo."""

    modules: int
    codelength: float
    verified_codelength: float | None = None
    joined: int = 0
    singletons: int = 0
    assigned: int = 0
    constraints: int = 0
    absent_constraints: int = 0
    exclusive_moved: int = 0
    exclusive_left: int = 0

    @property
    def summary(self) -> str:
        text = f"{self.modules:,} modules, codelength {self.codelength:.6g} bits"
        text += f", {self.assigned:,} singletons assigned" if self.assigned else ""
        return text + (f", {self.constraints:,} constraints" if self.constraints else "")


@dataclass(frozen=True)
class QualityResult:
    """Quality of the clusters, without labels.

    within: mean similarity of a face to its neighbors in its cluster; between: of those with one outside, to the nearest;
    outside_share: how many have one; doubtful_share: faces nearer to one outside than to those inside on average; stability:
    how alike clusters come back from resampled edges, 0 to 1, of `stability_clusters` tried; sizes: clusters by size.
    """

    within: float | None = None
    between: float | None = None
    outside_share: float = 0.0
    doubtful_share: float = 0.0
    stability: float | None = None
    stability_clusters: int = 0
    sizes: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Example:
    """A cluster that the report shows. within, nearest_outside: similarities; ids: of some of its faces; pair: of the nearest
    pair across; largest, doubtful: which list it is in."""

    cluster: int
    faces: int
    doubtful_share: float
    within: float | None
    nearest_outside: float | None
    nearest_cluster: int | None
    stability: float | None
    largest: bool
    doubtful: bool
    ids: tuple[str, ...]
    pair: tuple[str, ...]


@dataclass(frozen=True)
class PublishResult:
    """next_id: the first cluster id that was never given; label_bytes: of the label files; similarities: histograms of the
    neighbors inside clusters and between; moved: faces in another cluster than in the base run, or new, or gone;
    moved_known: of these, faces that are in both runs; events: how many of each (`stages.publish.events`)."""

    clusters: int
    singletons: int
    next_id: int
    label_bytes: int
    quality: QualityResult
    similarities: tuple[tuple[int, ...], tuple[int, ...]]
    examples: tuple[Example, ...] = ()
    moved: int | None = None
    moved_known: int | None = None
    events: Mapping[str, int] | None = None

    @property
    def summary(self) -> str:
        text = f"{self.clusters:,} clusters, {self.singletons:,} singletons"
        return text + (f", {self.moved_known:,} faces moved" if self.moved_known is not None else "")


StageResult = IngestResult | QuantizeResult | SearchResult | LinkResult | DetectResult | PublishResult

CLASSES: dict[str, type[StageResult]] = dict(
    zip(STAGES, (IngestResult, QuantizeResult, SearchResult, LinkResult, DetectResult, PublishResult), strict=True)
)


@dataclass(frozen=True)
class Results:
    """The results of the stages of a run that are finished, each as its own class; one that is not is a KeyError."""

    manifests: Mapping[str, Manifest[StageResult]]

    @property
    def ingest(self) -> IngestResult:
        return _as(IngestResult, self.manifests["ingest"])

    @property
    def quantize(self) -> QuantizeResult:
        return _as(QuantizeResult, self.manifests["quantize"])

    @property
    def search(self) -> SearchResult:
        return _as(SearchResult, self.manifests["search"])

    @property
    def link(self) -> LinkResult:
        return _as(LinkResult, self.manifests["link"])

    @property
    def detect(self) -> DetectResult:
        return _as(DetectResult, self.manifests["detect"])

    @property
    def publish(self) -> PublishResult:
        return _as(PublishResult, self.manifests["publish"])

    @property
    def missing(self) -> list[str]:
        """Stages that are not finished, in their order."""
        return [stage for stage in STAGES if stage not in self.manifests]

    @property
    def parts(self) -> Parts:
        return self.ingest.parts

    def with_stage(self, manifest: Manifest[StageResult]) -> Results:
        return Results({**self.manifests, manifest.stage: manifest})

    @classmethod
    def read(cls, run: Store) -> Results:
        """Of a run directory, as far as its stages are finished."""
        found = {stage: manifests.read(run, stage, kind) for stage, kind in CLASSES.items()}
        return cls({stage: manifest for stage, manifest in found.items() if manifest is not None})


def _as(kind: type[R], manifest: Manifest[StageResult]) -> R:
    assert isinstance(manifest.result, kind)
    return manifest.result
