"""What a stage is: a name, what it depends on, and a function that writes its parts."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from faceflow import __version__
from faceflow.cluster.executor import Executor
from faceflow.config import ClusterConfig
from faceflow.kernels.mapequation.flow import use_threads
from faceflow.storage.inputs import Listing
from faceflow.storage.layout import RunStores
from faceflow.storage.manifests import Manifest
from faceflow.storage.object_store import Store, moved
from faceflow.tables import Parts


def open_executor(
    address: str | None, workers: int | None, progress: bool, warm_up: Callable[[], Any] | None = None
) -> Executor:
    """An executor whose tasks use no more threads than the CPUs they ask for, and whose bytes are counted."""
    return Executor(address, workers, progress, warm_up, moved, use_threads)


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
class Past:
    """The published run that a night starts from: its run directory, and the manifests of its stages."""

    run_id: str
    run: Store
    done: Mapping[str, Manifest]

    @property
    def parts(self) -> Parts:
        return Parts(tuple(self.done["ingest"].counts["starts"]))


@dataclass(frozen=True)
class LastNight:
    """The run that a night builds on, as its tasks need it: its directory, its parts, and which of them (one after the other)
    each of tonight's first parts is made of; the parts after those are new."""

    run: Store
    parts: Parts
    sources: tuple[range, ...]


@dataclass(frozen=True)
class Context:
    """What a stage may use: settings, stores, the executor, and the manifests of the stages before it.

    effort: how often the search was found to miss too much and is widened; past: the run that a night starts from; first_id:
    the first cluster id that was never given, of a night; listing: the input as this command found it, once.
    """

    config: ClusterConfig
    stores: RunStores
    executor: Executor
    done: Mapping[str, Manifest]
    effort: int = 0
    past: Past | None = None
    first_id: int = 0
    listing: Listing | None = None

    @property
    def parts(self) -> Parts:
        """The cut of all rows into parts, from the ingest manifest."""
        return Parts(tuple(self.done["ingest"].counts["starts"]))

    @property
    def last_night(self) -> LastNight | None:
        """What of the past run's parts has become of which part, once ingest is done; None: there is no past."""
        if self.past is None:
            return None
        sources = tuple(range(*pair) for pair in itertools.pairwise(self.done["ingest"].counts["sources"]))
        return LastNight(self.past.run, self.past.parts, sources)

    @property
    def thresholds(self) -> tuple[float | None, float | None]:
        """Similarity from which faces are neighbors, and from which a table holds them in case others bear witness: both from
        the quantize manifest; None: no threshold."""
        counts = self.done["quantize"].counts
        return counts["threshold"], counts["support_threshold"]

    @property
    def dim(self) -> int:
        return int(self.done["ingest"].counts["dim"])


@dataclass(frozen=True)
class Outcome:
    """What a stage made: counts for the manifest, and the bytes of each file by path in the run directory."""

    counts: dict[str, Any]
    files: dict[str, int]


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    reads, writes: folders of the run directory; settings: names of the settings its result depends on; packages: those
    whose version matters; run: does the work; scratch: folders of no use once the stage is done; whole: whether
    what it wrote outside the run directory is still there; inputs: whatever else the
    result depends on (the input files).
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    settings: tuple[str, ...]
    run: Callable[[Context], Outcome]
    after: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    whole: Callable[[Context], bool] = field(default=lambda context: True)
    inputs: Callable[[Context], dict[str, Any]] = field(default=lambda context: {})


def merge_sizes(results: list[dict[str, int]]) -> dict[str, int]:
    """The files of a stage, from what each task returned."""
    return {path: size for result in results for path, size in result.items()}
