"""The pointer of an OUTPUT, latest.json: which run's labels are current."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from faceflow.errors import InputError, RunError
from faceflow.storage import layout
from faceflow.storage.file_info import TableSnapshot
from faceflow.storage.json_records import decode
from faceflow.storage.object_store import Store


@dataclass(frozen=True)
class Pointer:
    """What latest.json says. run_id, labels: the current run and its label folder below OUTPUT; next_id: the first cluster id
    that was never given; sequence: rises from run to run, whatever becomes of OUTPUT; recall_interval: 95 %; the rest are the
    run's own figures."""

    run_id: str
    labels: str
    faces: int = 0
    quarantined: int = 0
    clusters: int = 0
    singletons: int = 0
    edges: int = 0
    similarity_threshold: float | None = None
    impostors_per_face: float | None = None
    parent_run_id: str | None = None
    next_id: int = 0
    sequence: int = 0
    settings: Mapping[str, object] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    recall: float | None = None
    recall_interval: tuple[float, float] | None = None
    quality: Mapping[str, object] = field(default_factory=dict)
    input_snapshot: TableSnapshot | None = None
    created: str = ""


def read_pointer(output: Store) -> Pointer | None:
    """The pointer of an OUTPUT; None where there is none.

    Raises InputError for a latest.json that is not faceflow's.
    """
    pointer = None
    try:
        record = output.read_json(layout.LATEST)
        if record is None:
            return None
        pointer = decode(Pointer, record)
    except (RunError, UnicodeDecodeError):
        pass
    if pointer is None:
        raise InputError(
            f"{output.address(layout.LATEST)} was not written by faceflow: it has no run_id and labels. Move it away, or name "
            "another OUTPUT"
        )
    return pointer


def current_run_id(output: Store) -> str | None:
    """The run whose labels are current; None where none was published."""
    pointer = read_pointer(output)
    return pointer.run_id if pointer is not None else None


def set_pointer(output: Store, pointer: Pointer, expected: str | None) -> None:
    """Replace latest.json. expected: the version that it must still have (`Store.version`).

    Raises PublishError where it has another one.
    """
    output.replace_json(layout.LATEST, asdict(pointer), expected)
