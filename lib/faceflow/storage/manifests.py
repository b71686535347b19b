"""Stage manifests: what a stage was made from, what it made, and whether that can be used again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from faceflow.config import digest
from faceflow.errors import FingerprintError
from faceflow.storage import layout
from faceflow.storage.object_store import Store


@dataclass(frozen=True)
class Manifest:
    """The record a stage ends with.

    fingerprint: everything the stage's result depends on; files: bytes of each file it wrote, by path in the run
    directory; counts: what later stages and the report need to know; seconds: wall time of the stage; begun: Unix time; steps:
    what its tasks did (`cluster.usage.Step`, as dictionaries).
    """

    stage: str
    fingerprint: dict[str, Any]
    counts: dict[str, Any]
    files: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    begun: float = 0.0
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """What a downstream stage's fingerprint holds of this one."""
        return digest(self.fingerprint)


def load(run: Store, stage: str, fingerprint: Mapping[str, Any]) -> Manifest | None:
    """The stage's manifest if it is finished and whole, else None.

    Raises FingerprintError, naming every differing key with both values, when the stage was begun or finished with
    another fingerprint.
    """
    for name in (layout.manifest(stage), layout.plan(stage)):
        record = run.read_json(name)
        if record is not None:
            _compare(run, stage, record["fingerprint"], json.loads(json.dumps(fingerprint)))
    manifest = read(run, stage)
    if manifest is None:
        return None
    if run.is_local and any(run.size(path) != size for path, size in manifest.files.items()):
        return None  # a power cut after the stage: its files are made again
    return manifest


def read(run: Store, stage: str) -> Manifest | None:
    """The manifest of a finished stage, whatever it was made from; None where there is none."""
    record = run.read_json(layout.manifest(stage))
    return Manifest(**record) if record is not None else None


def missing(run: Store, manifest: Manifest, scratch: Sequence[str]) -> str | None:
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


def begin(run: Store, stage: str, fingerprint: Mapping[str, Any]) -> None:
    """Note what the stage is being made from, before its first file."""
    run.write_json(layout.plan(stage), {"stage": stage, "fingerprint": dict(fingerprint)})


def finish(run: Store, manifest: Manifest) -> None:
    run.write_json(layout.manifest(manifest.stage), asdict(manifest))


def _compare(run: Store, stage: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
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
