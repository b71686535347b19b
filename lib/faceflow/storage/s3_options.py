"""Options of the S3 file system: their names, their types, and the endpoint that they or the environment name."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from faceflow.errors import SettingsError, did_you_mean
from faceflow.setting_types import StorageOptions

S3_OPTIONS: dict[str, type] = {
    "anon": bool, "endpoint_url": str, "key": str, "secret": str, "token": str, "username": str, "password": str,
    "profile": str, "use_ssl": bool, "client_kwargs": dict, "config_kwargs": dict,
    "s3_additional_kwargs": dict, "requester_pays": bool,
    "default_block_size": int, "default_fill_cache": bool, "default_cache_type": str, "version_aware": bool,
    "cache_regions": bool, "max_concurrency": int, "fixed_upload_size": bool,
}  # fmt: skip
"""Options of an s3fs file system that can be written as JSON, and their types."""


def endpoint_of(options: StorageOptions) -> str | None:
    """The S3 endpoint that options, else the environment, name, if any. Raises SettingsError where it is no address."""
    named = options.get("endpoint_url") or (options.get("client_kwargs") or {}).get("endpoint_url")
    places = [("endpoint_url", named), *((name, os.environ.get(name)) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))]
    where, results = next(((where, value) for where, value in places if value), ("", None))
    if results is None:
        return None
    try:
        parts = urlsplit(str(results))
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        whole = False
    if not whole:
        raise SettingsError(f"{where} is {str(results)!r}: it must be an address like https://minio:9000")
    return str(results)


def check_options(options: StorageOptions) -> None:
    """Raise SettingsError for a name that s3fs does not know, or a value of the wrong type. Values may be secrets: unnamed."""
    for name, value in options.items():
        if name not in S3_OPTIONS:
            raise SettingsError(f"storage_options: unknown option {name!r}{did_you_mean(name, S3_OPTIONS)}")
        kind = S3_OPTIONS[name]
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            wanted = {str: "a text", bool: "true or false", int: "a whole number", dict: "an object"}[kind]
            raise SettingsError(f"storage_options: {name} must be {wanted}")
