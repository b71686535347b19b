"""Every setting of a clustering run: one frozen, validated type from which the CLI, TOML files and fingerprints follow."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import numbers
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faceflow.errors import SettingsError, did_you_mean

StorageOptions = Mapping[str, Any]
"""Options of the s3fs file system, passed on as they are."""

METHODS = (
    "infomap", "components", "hac-single", "hac-average", "chinese-whispers", "label-propagation", "leiden", "knn-dbscan",
    "hdbscan", "rank-order", "cdp", "dpc", "lce", "spectral", "minibatch-kmeans",
)  # fmt: skip


def _setting(
    default: Any, help: str, *, metavar: str | None = None, choices: tuple[str, ...] | None = None, nightly: bool = False
) -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar, "choices": choices, "nightly": nightly})


@dataclass(frozen=True)
class ClusterConfig:
    """Settings of one run. Every field but `input` and `output` has a default; values are checked on construction.

    Raises SettingsError, naming the setting and what it accepts.
    """

    input: str
    output: str
    id_column: str = _setting("id", "column with each face's id: a string or any integer type")
    embedding_column: str = _setting("embedding", "column with the embedding: a (large, fixed-size) list of floats")
    bad_rows: str = _setting(
        "fail",
        "rows that cannot be used (null, NaN, zero or repeated id, …). fail: refuse the input; quarantine: set them aside "
        "under OUTPUT/quarantined, without a cluster",
        choices=("fail", "quarantine"),
    )
    max_bad_fraction: float = _setting(0.01, "share of rows that may be set aside; more are refused", metavar="X")
    neighbors: int = _setting(
        200,
        "maximum neighbors per face (k)",
        metavar="K",
    )
    min_similarity: float | str | None = _setting(
        "auto",
        "cosine similarity below which two faces are not neighbors. auto: found from the similarities of a sample of pairs, "
        "without labels; 'none' keeps the plain K nearest",
        metavar="COS",
    )
    edges: str = _setting(
        "auto",
        "how neighbors become weighted edges. threshold: the cosine; shared: cosine x overlap of the two faces' neighbors; "
        "nep, facemap, tpdi: as published; auto: our own, which also keeps pairs below the threshold that neighbors vouch for",
        choices=("auto", "threshold", "shared", "nep", "facemap", "tpdi"),
    )
    index: str = _setting(
        "auto",
        "search plan. exact: every pair is compared; cells: only pairs in nearby cells of a coarse quantizer; "
        "auto: whichever is predicted to be faster",
        choices=("auto", "exact", "cells"),
    )
    cells: int | None = _setting(
        None, "number of cells of the coarse quantizer (default: from the number of faces)", metavar="N"
    )
    probes: int | None = _setting(
        None,
        "nearest cells that each face is compared with (default: per face, what a predicted recall of 0.998 takes)",
        metavar="N",
    )
    memory_limit: int | None = _setting(
        None,
        "resident memory of one worker, as 8GiB, 500MB or bytes (default: its share of what Ray says is there)",
        metavar="BYTES",
    )
    min_recall: float = _setting(
        0.99, "edge recall below which the run fails (exit code 4), measured on a sample of faces; 0 accepts any", metavar="X"
    )
    raise_probes: bool = _setting(False, "instead of failing, search again with more probes until min-recall holds")
    recall_sample: int = _setting(1_000, "faces searched exactly to measure the edge recall", metavar="N")
    method: str = _setting(
        "infomap",
        "how the graph becomes clusters. infomap: the map equation; the others are those of `faceflow compare` (they need the "
        "methods extra)",
        choices=METHODS,
    )
    clusters: int | None = _setting(None, "clusters to make, for methods that must be told (minibatch-kmeans)", metavar="N")
    assign_singletons: str = _setting(
        "auto",
        "assign singletons to the nearest cluster when significant (false discovery rate 5 %). auto: where min-similarity, "
        "edges and method are the defaults",
        choices=("auto", "always", "never"),
    )
    engine: str = _setting(
        "native",
        "community detection: native is our own map-equation engine, infomap the package",
        choices=("native", "infomap"),
    )
    flow: str = _setting(
        "directed",
        "the random walk that is described: directed follows edges their way, undirected either way",
        choices=("directed", "undirected"),
    )
    trials: int = _setting(1, "community detection from this many seeds; the shortest codelength wins", metavar="N")
    verify_codelength: bool = _setting(False, "have the infomap package score the final modules, and fail if it disagrees")
    seed: int = _setting(0, "seed of everything random; same input, settings and seed: same labels", metavar="N")
    workers: int | None = _setting(None, "tasks at work at once, at most (default: every CPU of the Ray cluster)", metavar="N")
    gpus_per_worker: float = _setting(0.0, "GPUs a search task asks Ray for; above 0 searches on the GPU", metavar="X")
    search_resource: str | None = _setting(
        None, "custom Ray resource that search tasks ask for, which only the machines meant for them have", metavar="NAME"
    )
    detect_resource: str | None = _setting(
        None,
        "custom Ray resource that the tasks that hold the whole graph ask for (link, detect): a machine of large memory",
        metavar="NAME",
    )
    gpu_float16: bool = _setting(False, "hold vectors on the GPU as float16 (half the memory; products add up in float32)")
    run_id: str | None = _setting(
        None, "name of the run (default: the unfinished run with these settings, else a new one from the time)", metavar="ID"
    )
    restart: bool = _setting(
        False, "throw away what the unfinished run with these settings, or RUN_ID, has done, and begin again"
    )
    work_dir: str | None = _setting(
        None, "where run directories lie (default: OUTPUT/_runs): a fast shared disk, or another bucket", metavar="DIR"
    )
    constraints: str | None = _setting(
        None, "Parquet or CSV file with id_a, id_b and kind: 'must' share a cluster, or 'cannot'", metavar="FILE"
    )
    exclusive_column: str | None = _setting(
        None, "column whose value (a photo's id, say) two faces of one cluster should not share; a string or an integer",
        metavar="TEXT",
    )  # fmt: skip
    full_every: int = _setting(
        30, "nights after which everything is searched and detected anew; those between build on each other", metavar="N",
        nightly=True,
    )  # fmt: skip
    verify_content: bool = _setting(
        False, "read every file again and compare its rows, instead of trusting sizes and ETags or modification times",
        nightly=True,
    )  # fmt: skip
    snapshot: int | None = _setting(
        None, "of a Delta or Iceberg table as INPUT: its version, or snapshot id (default: the newest)", metavar="N"
    )
    labels_table: str | None = _setting(
        None,
        "Delta table, a folder or s3:// address, that gets the labels too, by one commit that replaces all",
        metavar="TABLE",
    )
    thumbnails: str | None = _setting(
        None,
        "where the report finds a face's picture: a URL or path with {id}, https://photos.example/{id}.jpg say; pictures on a "
        "disk become part of the page",
        metavar="TEMPLATE",
    )
    storage_options: StorageOptions | None = _setting(
        None, 'options of the s3fs file system, as JSON: {"endpoint_url": …, "key": …, "secret": …}', metavar="JSON"
    )
    address: str | None = _setting(
        None,
        "Ray cluster to use (default: RAY_ADDRESS if set, as under `ray job submit`; else a private local one)",
        metavar="RAY",
    )

    def __post_init__(self) -> None:
        for name in ("input", "output"):
            if not getattr(self, name):
                raise SettingsError(f"{name} is empty: name a folder, a file or an s3:// address")
        for name in ("id_column", "embedding_column"):
            if not getattr(self, name):
                raise SettingsError(f"{name} is empty: name a column")
        if self.id_column == self.embedding_column:
            raise SettingsError(f"id_column and embedding_column are both {self.id_column!r}: they must differ")
        self._range("neighbors", 1, 10_000)
        self._range("cells", 1, 2**24)
        self._range("probes", 1, 1024)
        self._range("workers", 1, 100_000)
        self._range("seed", 0, 2**31 - 1)
        self._range("gpus_per_worker", 0, 64)
        if self.memory_limit is not None and not 512 * 2**20 <= self.memory_limit <= 2**50:
            raise SettingsError(
                f"memory_limit is {self.memory_limit} bytes: it must be at least 512MiB; write its unit too, as in 8GiB"
            )
        self._range("min_recall", 0, 1)
        self._range("max_bad_fraction", 0, 1)
        self._range("recall_sample", 1, 100_000)
        self._range("trials", 1, 1000)
        self._range("full_every", 1, 10_000)
        self._range("snapshot", 0, 2**63 - 1)
        threshold = self.min_similarity
        if threshold not in (None, "auto") and not (isinstance(threshold, numbers.Real) and -1 <= threshold <= 1):
            raise SettingsError(f"min_similarity is {threshold}: a cosine lies between -1 and 1; or 'auto', or 'none'")
        if self.clusters is not None and self.clusters < 1:
            raise SettingsError(f"clusters is {self.clusters}: it must be 1 or more")
        if self.method == "minibatch-kmeans" and self.clusters is None:
            raise SettingsError("method minibatch-kmeans must be told how many clusters to make: set clusters")
        for name, setting in SETTINGS.items():
            choices = setting.metadata.get("choices")
            if choices and getattr(self, name) not in choices:
                raise SettingsError(f"{name} is {getattr(self, name)!r}{did_you_mean(str(getattr(self, name)), choices)}")
        if self.thumbnails is not None:
            check_thumbnails(self.thumbnails)
        if self.run_id is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.run_id):
            raise SettingsError(
                f"run_id is {self.run_id!r}: use 1 to 100 letters, digits, '.', '_' or '-', the first a letter or digit"
            )

    def _range(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if value is not None and not low <= value <= high:
            raise SettingsError(f"{name} is {value}: it must lie between {low} and {high}")

    def public(self) -> Mapping[str, object]:
        """The settings as plain JSON values, without anything that could hold a credential."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["storage_options"]
        return values

    def fingerprint(self, names: tuple[str, ...]) -> Mapping[str, object]:
        """The named settings as plain values: what a stage compares before it reuses earlier work."""
        return {name: getattr(self, name) for name in names}


def check_thumbnails(template: str) -> None:
    """Raise SettingsError where a template for pictures has no {id}, or is an address of a kind that no report may hold."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", template)
    if "{id}" not in template:
        raise SettingsError(f"thumbnails is {template!r}: it must have {{id}} where a face's id stands")
    if scheme and scheme[0].lower() not in ("http:", "https:", "file:"):
        raise SettingsError(
            f"thumbnails is {template!r}: it must be a path, or an address that begins with http, https or file"
        )


SETTINGS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(ClusterConfig)}

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def _parse_bytes(name: str, value: Any) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", str(value).strip().lower())
    if match is None or match[2] not in _UNITS:
        raise SettingsError(f"{name} is {value!r}: it must be a size like 8GiB, 500MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


_CONVERT: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "int | None": int,
    "float | None": float,
    "float | str | None": float,
    "str | None": str,
}


def parse_setting(name: str, value: Any) -> Any:
    """A value from the command line (text) or from TOML (typed) as the setting's own type.

    Raises SettingsError for an unknown name (with "did you mean") or a value of the wrong type.
    """
    if name not in SETTINGS:
        raise SettingsError(f"unknown setting {name!r}{did_you_mean(name, SETTINGS)}")
    kind = str(SETTINGS[name].type)
    if kind.startswith("Mapping"):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                # The text may hold a secret: say where it is wrong, not what it says.
                raise SettingsError(f"{name} is not valid JSON (line {error.lineno}, column {error.colno})") from None
        if value is not None and not isinstance(value, dict):
            raise SettingsError(f"{name} must be a JSON object")
        return value
    if "None" in kind and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    if name == "memory_limit":
        return _parse_bytes(name, value)
    if name == "min_similarity" and str(value).lower() == "auto":
        return "auto"
    if kind == "bool":
        if isinstance(value, bool) or str(value).lower() in ("true", "false"):
            return value if isinstance(value, bool) else value.lower() == "true"
        raise SettingsError(f"{name} is {value!r}: it must be true or false")
    convert = _CONVERT[kind]
    wrong = isinstance(value, bool) or (convert is str and not isinstance(value, str))
    if convert is int and isinstance(value, float):
        wrong = True
    if not wrong:
        try:
            return convert(value)
        except (TypeError, ValueError):
            pass
    noun = {str: "a text", int: "a whole number", float: "a number"}[convert]
    if name == "min_similarity":
        noun = "a cosine, 'auto' or 'none'"
    raise SettingsError(f"{name} is {value!r}: it must be {noun}")


def load_config(flags: Mapping[str, Any], toml_path: str | None = None) -> ClusterConfig:
    """Flags over TOML over defaults. `flags` holds only what was given; keys may use '-' or '_'.

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


def digest(value: Any) -> str:
    """Stable short hash of a JSON-like value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
