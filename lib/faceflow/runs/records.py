"""The record of a run, run.json: its settings, and how far it came."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace

from faceflow.config import ClusterConfig
from faceflow.storage import layout
from faceflow.storage.json_records import decode
from faceflow.storage.object_store import Store

BEGUN, PUBLISHED, REFUSED, SUPERSEDED = "begun", "published", "refused", "superseded"
"""States of a run: it can be continued; it was the current one once; its input was bad; another run was published first."""


@dataclass(frozen=True)
class IncrementalKey:
    """What an unfinished incremental run must have in common with one that continues it: the base run, and a digest of the
    input's files."""

    base: str | None
    files: str


@dataclass(frozen=True)
class RunRecord:
    """What run.json says. updated: when (ISO 8601); output, runs: where OUTPUT and the run directories were; incremental: None
    in a `cluster` run; attempt: how often the search was redone; seconds: wall time; ray_start_seconds: of it, to start Ray."""

    state: str
    settings: Mapping[str, object]
    updated: str
    output: str | None = None
    runs: str | None = None
    incremental: IncrementalKey | None = None
    attempt: int = 0
    seconds: float | None = None
    ray_start_seconds: float = 0.0

    @classmethod
    def begin(cls, config: ClusterConfig, incremental: IncrementalKey | None) -> RunRecord:
        output, runs = layout.stores(config.output, config.work_dir, config.storage_options)
        return cls(BEGUN, config.public(), _stamp(), output.root, runs.root, incremental)

    def now(self, state: str) -> RunRecord:
        """The same run in this state, as of now."""
        return replace(self, state=state, updated=_stamp())

    def is_of(self, output: Store, runs: Store) -> bool:
        """Whether the run is one of OUTPUT: several may share a folder of run directories.

        An OUTPUT that was moved together with its `_runs` keeps its runs.
        """
        if self.output is None or self.output == output.root:
            return True
        moved = self.runs == f"{self.output.rstrip('/')}/{layout.RUNS}"
        return moved and runs.root == output.address(layout.RUNS)


@dataclass(frozen=True)
class KnownRun:
    """A run directory with its record."""

    run_id: str
    record: RunRecord = field(repr=False)


def read_record(run: Store) -> RunRecord | None:
    """The record in a run directory; None where there is none."""
    return decode(RunRecord, run.read_json(layout.RUN_RECORD))


def write_record(run: Store, record: RunRecord) -> None:
    run.write_json(layout.RUN_RECORD, asdict(record))


def runs_of(output: Store, runs: Store) -> Iterator[KnownRun]:
    """Every run of OUTPUT, by name."""
    for name in runs.names(""):
        record = read_record(runs.child(name))
        if record is not None and record.is_of(output, runs):
            yield KnownRun(name, record)


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _stamp() -> str:
    return utc_now().isoformat(timespec="milliseconds")
