"""A run in progress: what does not change from stage to stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from faceflow.cluster.executor import Executor
from faceflow.config import ClusterConfig
from faceflow.runs.records import IncrementalKey, RunRecord, read_record, write_record
from faceflow.runs.status import Watcher
from faceflow.stages.base import BaseRun, Context
from faceflow.stages.results import Results
from faceflow.storage.inputs import Listing
from faceflow.storage.layout import RunStores
from faceflow.storage.object_store import Store
from faceflow.storage.pointer import Pointer


@dataclass(frozen=True)
class Job:
    """A run in progress. runs, stores: write only while the lease holds; begun: time of the clock; parent, parent_version: of
    the pointer when the command began; incremental: None in a `cluster` run."""

    config: ClusterConfig
    runs: Store
    stores: RunStores
    executor: Executor
    begun: float
    parent: Pointer | None
    parent_version: str | None
    watcher: Watcher
    listing: Listing
    base: BaseRun | None = None
    incremental: IncrementalKey | None = None

    def context(self, results: Results, attempt: int) -> Context:
        first_id = self.parent.next_id if self.parent is not None and self.incremental is not None else 0
        return Context(self.config, self.stores, self.executor, results, attempt, self.base, first_id, self.listing)

    @property
    def attempt(self) -> int:
        """How often the search was redone so far, as the run's record says."""
        record = read_record(self.stores.run)
        return record.attempt if record is not None else 0

    def write_state(self, state: str, **facts: Any) -> None:
        """Replace the run's record: this state, the settings of this command, and these fields of `RunRecord`."""
        record = replace(RunRecord.begin(self.config, self.incremental), state=state, attempt=self.attempt)
        write_record(self.stores.run, replace(record, **facts))
