"""The types of settings: how text, TOML and Python values become them, and what the command line says of each."""

from __future__ import annotations

import json
import numbers
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from faceflow.errors import SettingsError

StorageOptions = Mapping[str, Any]
"""Options of the s3fs file system, passed on as they are."""

INPUT, SEARCH, GRAPH, CONSTRAINTS, RUN, RESOURCES, OUTPUT = (
    "input", "search", "graph and clusters", "constraints", "run", "resources", "output and storage",
)  # fmt: skip
"""Groups of settings, in the order in which `--help` shows them."""

CLUSTER, NIGHTLY, COMPARE, SCALING, PLAN = COMMANDS = ("cluster", "nightly", "compare", "scaling", "plan")
"""Commands that take settings."""

RUNS = (CLUSTER, NIGHTLY)
JOBS = (CLUSTER, NIGHTLY, COMPARE, SCALING)


@dataclass(frozen=True)
class Setting:
    """What the command line says of a setting. commands: those that obey it."""

    help: str
    group: str
    metavar: str | None = None
    commands: tuple[str, ...] = COMMANDS


def none_from_text(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() == "none" else value


def whole_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "")
    return int(value) if isinstance(value, numbers.Integral) else value


def number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "")
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, int) else value


def text_from_path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def between(low: float, high: float) -> AfterValidator:
    def check(value: float) -> float:
        if not low <= value <= high:
            raise PydanticCustomError("stated", "it must lie between {low} and {high}", {"low": low, "high": high})
        return value

    return AfterValidator(check)


def cosine(value: Any) -> Any:
    value = none_from_text(value)
    if value is None or value == "auto":
        return value
    try:
        found = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError):
        found = None
    if found is None:
        raise PydanticCustomError("stated", "it must be a cosine, 'auto' or 'none'")
    if not -1 <= found <= 1:
        raise PydanticCustomError("stated", "a cosine lies between -1 and 1; or 'auto', or 'none'")
    return found


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def byte_count(value: Any) -> Any:
    value = none_from_text(value)
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", str(value).strip().lower())
    if match is None or match[2] not in _UNITS:
        raise PydanticCustomError("stated", "it must be a size like 8GiB, 500MB or a number of bytes")
    count = int(float(match[1]) * _UNITS[match[2]])
    if not 512 * 2**20 <= count <= 2**50:
        raise PydanticCustomError("stated", "it must be at least 512MiB; write its unit too, as in 8GiB")
    return count


def json_object(value: Any) -> Any:
    # The text may hold a secret: errors say where it is wrong, not what it says.
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise SettingsError(f"storage_options is not valid JSON (line {error.lineno}, column {error.colno})") from None
    if value is not None and not isinstance(value, Mapping):
        raise SettingsError("storage_options must be a JSON object")
    return value


def run_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        raise PydanticCustomError(
            "stated", "use 1 to 100 letters, digits, '.', '_' or '-', the first a letter or digit"
        )  # fmt: skip
    return value


def check_thumbnails(template: str) -> str:
    """A template for pictures. Raises SettingsError where it has no {id}, or is an address of a kind that no report may
    hold."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", template)
    if "{id}" not in template:
        raise SettingsError(f"thumbnails is {template!r}: it must have {{id}} where a face's id stands")
    if scheme and scheme[0].lower() not in ("http:", "https:", "file:"):
        raise SettingsError(
            f"thumbnails is {template!r}: it must be a path, or an address that begins with http, https or file"
        )
    return template


Text = Annotated[str, BeforeValidator(text_from_path)]
Whole = Annotated[int, BeforeValidator(whole_number)]
Number = Annotated[float, BeforeValidator(number)]
Share = Annotated[float, BeforeValidator(number), between(0, 1)]
MaybeText = Annotated[str | None, BeforeValidator(none_from_text), BeforeValidator(text_from_path)]
Method = Literal[
    "infomap", "components", "hac-single", "hac-average", "chinese-whispers", "label-propagation", "leiden", "knn-dbscan",
    "hdbscan", "rank-order", "cdp", "dpc", "lce", "spectral", "minibatch-kmeans",
]  # fmt: skip
"""Clustering methods: the map equation, and those of `kernels.methods`."""
