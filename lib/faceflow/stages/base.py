"""What a stage is: a name, what it depends on, and a function that writes its parts."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from faceflow import __version__
from faceflow.cluster.executor import Executor
from faceflow.config import ClusterConfig
from faceflow.kernels.mapequation.flow import use_threads
from faceflow.stages.artifacts.faces import RunData
from faceflow.stages.changes import Changes
from faceflow.stages.results import Results, StageResult
from faceflow.storage.inputs import Listing
from faceflow.storage.layout import RunStores
from faceflow.storage.manifests import Fingerprint
from faceflow.storage.object_store import Store
from faceflow.storage.traffic import moved
from faceflow.tables import Parts

R = TypeVar("R", bound=StageResult, covariant=True)


def open_executor(
    address: str | None, workers: int | None, progress: bool, warm_up: Callable[[], Any] | None = None
) -> Executor:
    """An executor whose tasks use no more threads than the CPUs they ask for, and whose bytes are counted."""
    return Executor(address, workers, progress, warm_up=warm_up, moved=moved, limit=use_threads)


def version_of(package: str) -> str:
    """The installed version of a package whose results may differ from one to the next."""
    if package == "faceflow":
        return __version__
    # One import name, several wheels.
    for name in (package, f"{package}-cpu", f"{package}-gpu-cu12", f"{package}-gpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "absent"


@dataclass(frozen=True)
class BaseRun:
    """The published run that an incremental run starts from: its directory, and the results of its stages."""

    run_id: str
    store: Store
    results: Results


@dataclass(frozen=True)
class Context:
    """What a stage may use: settings, stores, the executor, and the results of the stages before it.

    attempt: how often the search was redone because its recall was too low; base: the run that an incremental run starts from;
    first_id: the first cluster id that was never given; listing: the input as this command found it, once.
    """

    config: ClusterConfig
    stores: RunStores
    executor: Executor
    results: Results
    attempt: int = 0
    base: BaseRun | None = None
    first_id: int = 0
    listing: Listing | None = None

    def with_results(self, results: Results) -> Context:
        return replace(self, results=results)

    @property
    def data(self) -> RunData:
        """The parts of this run, once ingest is done."""
        return RunData(self.stores.run, self.parts, self.results.ingest.dim)

    @property
    def parts(self) -> Parts:
        return self.results.parts

    @property
    def changes(self) -> Changes | None:
        """What differs from the base run, once ingest is done; None: there is no base run."""
        rows = self.results.ingest.changes
        if self.base is None or rows is None:
            return None
        return Changes.of(self.base.store, self.base.results.parts, rows)

    @property
    def carried(self) -> Changes | None:
        """The same where the base run's tables are carried over, once quantize has decided; None in a full run."""
        return self.changes if self.results.quantize.incremental else None


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """What a stage made: its result, and the bytes of each file by path in the run directory."""

    result: R
    files: Mapping[str, int]


@dataclass(frozen=True)
class Redo:
    """A stage finds that an earlier one must be done again. stage: that one; keep: folders that it goes on with."""

    stage: str
    reason: str
    keep: tuple[str, ...] = ()


def _nothing_more(context: Context) -> Fingerprint:
    return {}


def _always(context: Context) -> bool:
    return True


def _no_gate(context: Context) -> Redo | None:
    return None


@dataclass(frozen=True)
class Stage(Generic[R]):
    """One step of a run.

    reads, writes: folders of the run directory; settings: names of the settings its result depends on; after: stages that it
    depends on; packages: those whose version matters; scratch: folders of no use once the stage is done; inputs: whatever else
    the result depends on (the input files). run: does the work. whole: whether what it wrote outside the run directory is still
    there. gate: asked whenever the stage is finished, now or before, with its own result in the context: lets the run go on
    (None), has an earlier stage done again, or raises QualityError.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    settings: tuple[str, ...]
    run: Callable[[Context], Outcome[R]]
    after: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    inputs: Callable[[Context], Fingerprint] = field(default=_nothing_more)
    whole: Callable[[Context], bool] = field(default=_always)
    gate: Callable[[Context], Redo | None] = field(default=_no_gate)


def merge_sizes(results: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The files of a stage, from what each task returned."""
    return {path: size for result in results for path, size in result.items()}
