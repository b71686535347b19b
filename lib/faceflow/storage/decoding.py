"""JSON records read back as the dataclasses that they were written from."""

from __future__ import annotations

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
