"""Settings from flags and TOML files."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from faceflow.config import HINTS, SETTINGS, ClusterConfig, wrong_setting
from faceflow.errors import SettingsError, did_you_mean


def parse_setting(name: str, value: Any) -> Any:
    """A value from the command line (text) or from TOML (typed) as the setting's own type.

    Raises SettingsError for an unknown name (with "did you mean") or a value of the wrong type.
    """
    if name not in SETTINGS:
        raise SettingsError(f"unknown setting {name!r}{did_you_mean(name, SETTINGS)}")
    try:
        return TypeAdapter(HINTS[name]).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise wrong_setting(name, first["type"], first["msg"], first["input"]) from None


def load_config(flags: Mapping[str, object], toml_path: str | None = None) -> ClusterConfig:
    """Flags over TOML over defaults. `flags` holds only what was given; keys of the file may use '-' or '_'.

    Raises SettingsError for an unreadable file, an unknown key or a bad value.
    """
    values: dict[str, Any] = {}
    if toml_path is not None:
        try:
            text = tomllib.loads(Path(toml_path).read_text(encoding="utf-8"))
        except OSError as error:
            raise SettingsError(f"cannot read config {toml_path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"config {toml_path} is not valid TOML: {error}") from None
        for key, value in text.items():
            try:
                values[key.replace("-", "_")] = parse_setting(key.replace("-", "_"), value)
            except SettingsError as error:
                raise SettingsError(f"config {toml_path}: {error}") from None
    for key, value in flags.items():
        values[key] = parse_setting(key, value)
    for name in ("input", "output"):
        if name not in values:
            raise SettingsError(f"{name} is missing: give it on the command line or in the config file")
    return ClusterConfig(**values)
