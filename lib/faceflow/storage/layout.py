"""Every path name inside OUTPUT, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from faceflow.setting_types import StorageOptions
from faceflow.storage.object_store import Store

LATEST = "latest.json"

STAGES = ("ingest", "quantize", "search", "link", "detect", "publish")
"""The stages of a run, in their order."""

OUTPUT_FOLDERS = ("labels", "quarantined", "events", "moves", "quality", "reports", "compare", "diffs")
"""What lies in an OUTPUT beside its runs."""

RUNS = "_runs"
"""Run directories of an OUTPUT, unless a work directory is named."""

RUN_RECORD = "run.json"
PROGRESS = "progress.json"
"""How far the run is, and who holds its lease."""


def part(kind: str, index: int) -> str:
    """`vectors/part-00000.arrow` and its siblings, one per part."""
    return f"{kind}/part-{index:05d}.arrow"


def gathered_ids(task: int) -> str:
    """The ids of one ingest task, by bucket."""
    return f"id_check/ids-{task:05d}.arrow"


def repeated_ids(bucket: int) -> str:
    """Input rows of one bucket whose id occurred before."""
    return f"id_check/repeated-{bucket:05d}.arrow"


def candidates(shard: int) -> str:
    return f"candidates/shard-{shard:05d}.arrow"


def candidates_step(shard: int, steps: int, step: int) -> str:
    """What one of several steps found of a shard that was too large for the memory there is."""
    return f"candidates/shard-{shard:05d}-step-{step:03d}-of-{steps:03d}.arrow"


SAMPLE = "recall/sample.arrow"
"""The sampled faces, and what is known of their true neighbors before the search for them."""


def queries(part: int) -> str:
    """The sampled faces of one part, with the neighbors that the search found for them."""
    return f"recall/queries-{part:05d}.arrow"


ALL_QUERIES = "recall/queries.arrow"
"""The same of all parts."""


def truth(part: int) -> str:
    """What exact search finds in one part for the sampled faces."""
    return f"recall/truth-{part:05d}.arrow"


TRUTH = "truth/sampled.arrow"
"""The sampled faces and their true neighbors, which the next incremental run starts from."""


def manifest(stage: str) -> str:
    return f"manifests/{stage}.json"


def plan(stage: str) -> str:
    """What a stage was begun with: its fingerprint, before its first task is written."""
    return f"manifests/{stage}.begun.json"


FULL_REASON = "manifests/quantize.full.json"
"""Why an incremental run, although it began to carry tables over, computes everything: decided once."""


def near(part: int) -> str:
    """The near-identical pairs of one part's rows."""
    return f"near_identical/pairs-{part:05d}.arrow"


def thin(part: int) -> str:
    """The faces of one part whose lists near-identical ones fill."""
    return f"near_identical/thin-{part:05d}.arrow"


THIN = "near_identical/thin.arrow"
"""Those of all parts that are searched again."""


def wider(part: int) -> str:
    """What that search finds in one part."""
    return f"near_identical/wider-{part:05d}.arrow"


GROUPS_AT_FIRST = "near_identical/groups.arrow"
GROUPS = "groups/groups.arrow"
"""Which faces count as one with another: before and after that search."""

WIDER = "groups/lists.arrow"
"""The lists that it gives."""

CENTROIDS = "quantizer/centroids.arrow"
CLUSTERS = "clusters/clusters.arrow"
CLUSTERS_OF_FACES = "clusters/faces.arrow"


ROWS_NOW = "base_rows/now.arrow"
"""Of every face of the base run, its row in this one."""

NEW_FILES = "new_files"
"""What an incremental run reads of new and changed files, laid out like a run directory of its own."""


def matches(bucket: int) -> str:
    """Which faces of one bucket of ids were there before, and which of those that were are gone."""
    return f"matches/bucket-{bucket:05d}.arrow"


def events_folder(run_id: str) -> str:
    """What became of each cluster in this run, one row an event."""
    return f"events/run={run_id}"


def events_part(run_id: str) -> str:
    return f"{events_folder(run_id)}/part-00000.parquet"


def moves_folder(run_id: str) -> str:
    """Each face whose cluster this run changed."""
    return f"moves/run={run_id}"


def moves_part(run_id: str, index: int) -> str:
    return f"{moves_folder(run_id)}/part-{index:05d}.parquet"


def quality_folder(run_id: str) -> str:
    return f"quality/run={run_id}"


def quality_table(run_id: str) -> str:
    """One row a cluster of two faces and more, the most doubtful first."""
    return f"{quality_folder(run_id)}/clusters.parquet"


def report_folder(run_id: str) -> str:
    """The page and the charts of a run."""
    return f"reports/run={run_id}"


def compare_folder(run_id: str) -> str:
    """What every method made of this run's neighbor table."""
    return f"compare/run={run_id}"


def label_folder(run_id: str) -> str:
    return f"labels/run={run_id}"


def label_part(run_id: str, index: int) -> str:
    return f"{label_folder(run_id)}/part-{index:05d}.parquet"


def quarantined_folder(run_id: str) -> str:
    return f"quarantined/run={run_id}"


def quarantined_part(run_id: str, index: int) -> str:
    """Quarantined rows; only parts with such rows have one."""
    return f"{quarantined_folder(run_id)}/part-{index:05d}.parquet"


PUBLISHED = (label_folder, quarantined_folder, moves_folder, quality_folder, report_folder)
"""Folders of OUTPUT that are of no use without the run that wrote them."""


@dataclass(frozen=True)
class RunStores:
    """Where one run reads and writes: the published OUTPUT and the run's own directory."""

    output: Store
    run: Store
    run_id: str

    @classmethod
    def of(cls, output: Store, runs: Store, run_id: str) -> RunStores:
        return cls(output, runs.child(run_id), run_id)


def stores(output: str, work_dir: str | None = None, options: StorageOptions | None = None) -> tuple[Store, Store]:
    """OUTPUT, and the folder of run directories: OUTPUT/_runs, or WORK_DIR."""
    out = Store.at(output, options)
    return out, Store.at(work_dir, options) if work_dir else out.child(RUNS)
