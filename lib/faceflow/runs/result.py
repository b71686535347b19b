"""What a finished run returns to its caller."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from faceflow.kernels.knn.recall import RecallEstimate
from faceflow.setting_types import StorageOptions
from faceflow.stages.results import QualityResult
from faceflow.storage.object_store import Store


@dataclass(frozen=True)
class RunResult:
    """What a finished run reports; the fields are those of `--json`.

    Attributes
    ----------
    run_id : str
    labels : str
        Address of the label folder.
    faces, quarantined : int
        Rows with a cluster, and rows that could not be used.
    clusters, singletons : int
        All clusters, and those of one face.
    edges : int
        Of the pruned graph.
    codelength : float
        Bits per step of the random walk, of the graph's modules.
    similarity_threshold : float or None
        Cosine from which faces are neighbors; None: the plain nearest neighbors.
    impostors_per_face : float or None
        Expected impostor neighbors of a face, at most; None: the threshold was given.
    recall : RecallEstimate
        Edge recall of the search: `estimate`, `low` and `high` (95 % interval), `faces` sampled, `edges` true neighbors.
    quality : QualityResult
        Of the clusters, without labels: `within`, `between`, `outside_share`, `doubtful_share`, `stability`, `sizes`.
    seconds : mapping of str to float
        Wall time of each stage, and `total`.
    peak_memory_bytes, worker_peak_memory_bytes : int
        Largest resident memory of the driver, and of any one worker, mapped files included (0: none ran).
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
    recall: RecallEstimate
    quality: QualityResult
    seconds: Mapping[str, float]
    peak_memory_bytes: int
    worker_peak_memory_bytes: int
    storage_options: StorageOptions | None = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, object]:
        """The fields as plain JSON values, without anything that could hold a credential."""
        values = asdict(self)
        del values["storage_options"]
        return values

    def labels_table(self) -> pa.Table:
        """The labels of all input rows, in their order: `id` in the input's type, `cluster` int64, null for quarantined rows.

        Read whole into memory. Raises OSError where the labels were removed since.
        """
        store = Store.at(self.labels, self.storage_options)
        parts = [pq.read_table(pa.BufferReader(store.read_bytes(name))) for name in store.names("")]
        return pa.concat_tables(parts)

    def _repr_html_(self) -> str:
        rows = {
            "run": self.run_id,
            "faces": f"{self.faces:,}" + (f" ({self.quarantined:,} rows quarantined)" if self.quarantined else ""),
            "clusters": f"{self.clusters:,} ({self.singletons:,} singletons)",
            "edges": f"{self.edges:,}",
            "similarity threshold": "none" if self.similarity_threshold is None else f"{self.similarity_threshold:.4f}",
            "recall": f"{self.recall.estimate:.4f} ({self.recall.low:.4f} to {self.recall.high:.4f})",
            "seconds": f"{self.seconds.get('total', 0.0):,.1f}",
            "labels": self.labels,
        }
        cells = "".join(f"<tr><th style='text-align:left'>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
        return f"<table>{cells}</table>"
