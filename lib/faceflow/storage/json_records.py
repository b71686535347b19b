"""JSON records: read back as the dataclasses that they were written from, and hashed."""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar

T = TypeVar("T")

_ADAPTERS: dict[Any, Any] = {}


def decode(kind: type[T], record: object) -> T | None:
    """A record as this dataclass; None where it is none, as another version of faceflow may have written it. Keys that the
    class does not know are left out."""
    from pydantic import TypeAdapter, ValidationError

    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    try:
        value: T = _ADAPTERS[kind].validate_python(record)
    except ValidationError:
        return None
    return value


def digest(value: Any) -> str:
    """Stable short hash of a JSON-like value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
