"""Stage manifests: what a stage was made from, what it made, and whether that can be used again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from faceflow.errors import FingerprintError
from faceflow.storage import layout
from faceflow.storage.json_records import decode, digest
from faceflow.storage.object_store import Store

R = TypeVar("R")

Fingerprint = Mapping[str, object]
"""Everything that a stage's result depends on, by name: plain JSON values that are compared, never looked into."""


@dataclass(frozen=True)
class StepRecord:
    """What like tasks of a stage did (`cluster.step_records.Step`). waiting: tasks not handed out; share: done, 0 to 1."""

    label: str
    tasks: int
    rows: int
    cpus: int
    begun: float
    seconds: float
    tasks_done: int
    rows_done: int
    in_flight: int
    busy_seconds: float
    longest_seconds: float
    read_bytes: int
    written_bytes: int
    peak_bytes: int
    retries: Mapping[str, int]
    finished: bool
    waiting: int
    share: float


@dataclass(frozen=True)
class Manifest(Generic[R]):
    """The record a stage ends with.

    fingerprint: everything the stage's result depends on; result: what later stages and the report need to know; files: bytes
    of each file that it consists of, by path in the run directory; seconds: wall time of the stage; begun: Unix time.
    """

    stage: str
    fingerprint: Fingerprint
    result: R
    files: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    begun: float = 0.0
    steps: tuple[StepRecord, ...] = ()

    @property
    def digest(self) -> str:
        """What a downstream stage's fingerprint holds of this one."""
        return digest(self.fingerprint)


def load(run: Store, stage: str, fingerprint: Fingerprint, kind: type[R]) -> Manifest[R] | None:
    """The stage's manifest if it is finished and whole, else None. kind: of its result.

    Raises FingerprintError, naming every differing key with both values, when the stage was begun or finished with
    another fingerprint.
    """
    for name in (layout.manifest(stage), layout.plan(stage)):
        record = run.read_json(name)
        if record is not None:
            _compare(run, stage, record["fingerprint"], json.loads(json.dumps(fingerprint)))
    manifest = read(run, stage, kind)
    if manifest is None:
        return None
    if run.is_local and any(run.size(path) != size for path, size in manifest.files.items()):
        return None  # a power cut after the stage: its files are made again
    return manifest


def read(run: Store, stage: str, kind: type[R]) -> Manifest[R] | None:
    """The manifest of a finished stage, whatever it was made from; None where there is none, or one of another version of
    faceflow whose result is no such `kind`."""
    record = run.read_json(layout.manifest(stage))
    if record is None or "result" not in record:
        return None
    result, steps = decode(kind, record["result"]), [decode(StepRecord, step) for step in record["steps"]]
    if result is None or None in steps:
        return None
    made = tuple(step for step in steps if step is not None)
    files, seconds, begun = record["files"], record["seconds"], record["begun"]
    return Manifest(record["stage"], record["fingerprint"], result, files, seconds, begun, made)


def missing(run: Store, manifest: Manifest[Any], scratch: Sequence[str]) -> str | None:
    """The first file of a finished stage that is not there, or on a disk has another size; None where all are. scratch: folders
    that the stage has removed itself."""
    folders: dict[str, set[str]] = {}
    for path, size in manifest.files.items():
        folder, _, name = path.rpartition("/")
        if folder.split("/")[0] in scratch:
            continue
        if folder not in folders:
            folders[folder] = set(run.names(folder))
        if name not in folders[folder] or (run.is_local and run.size(path) != size):
            return path
    return None


def begin(run: Store, stage: str, fingerprint: Fingerprint) -> None:
    """Note what the stage is being made from, before its first file."""
    run.write_json(layout.plan(stage), {"stage": stage, "fingerprint": dict(fingerprint)})


def finish(run: Store, manifest: Manifest[Any]) -> None:
    run.write_json(layout.manifest(manifest.stage), asdict(manifest))


def _compare(run: Store, stage: str, before: Fingerprint, now: Fingerprint) -> None:
    differences = []
    for key in sorted(set(before) | set(now)):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            inner = [k for k in sorted(set(old) | set(new)) if old.get(k) != new.get(k)]
            shown = "; ".join(f"{k}: was {_short(old.get(k))}, is {_short(new.get(k))}" for k in inner[:3])
            differences.append(f"{key}: {shown}" + (f"; and {len(inner) - 3} more" if len(inner) > 3 else ""))
        else:
            differences.append(f"{key}: was {_short(old)}, is {_short(new)}")
    if differences:
        raise FingerprintError(
            f"run {run.root} holds a {stage} stage made from something else ({' | '.join(differences)}): "
            "use another --run-id, --restart to begin it again, or the settings and input that it was begun with"
        )


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_whole(run: Store, relative: str) -> bool:
    """Whether a finished Arrow file lies there (a power cut can leave a short file on a disk)."""
    try:
        with run.open_arrow(relative):
            return True
    except OSError:
        return False
