"""Every setting of a clustering run: one frozen, validated type from which the CLI, TOML files and fingerprints follow."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from faceflow.errors import SettingsError, did_you_mean
from faceflow.setting_types import (
    CLUSTER,
    COMPARE,
    CONSTRAINTS,
    GRAPH,
    INPUT,
    JOBS,
    NIGHTLY,
    OUTPUT,
    PLAN,
    RESOURCES,
    RUN,
    RUNS,
    SCALING,
    SEARCH,
    MaybeText,
    Method,
    Number,
    Setting,
    Share,
    StorageOptions,
    Text,
    Whole,
    between,
    byte_count,
    check_thumbnails,
    cosine,
    json_object,
    none_from_text,
    run_name,
)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ClusterConfig:
    """Settings of one run. Every field but `input` and `output` has a default; values are checked on construction.

    Raises SettingsError, naming the setting and what it accepts.
    """

    input: Annotated[Text, Setting("Parquet file, folder (nested) or glob, Delta or Iceberg table; local or s3://", INPUT)]
    output: Annotated[Text, Setting("folder or s3:// prefix for labels, pointer and runs", OUTPUT)]
    id_column: Annotated[Text, Setting("column with each face's id: a string, an integer or binary; unique", INPUT)] = "id"
    embedding_column: Annotated[
        Text, Setting("column with the embedding: a (large, fixed-size) list of floats", INPUT)
    ] = "embedding"  # fmt: skip
    bad_rows: Annotated[
        Literal["fail", "quarantine"],
        Setting(
            "rows that cannot be used (null, NaN, zero or repeated id, …). fail: refuse the input; quarantine: list them under "
            "OUTPUT/quarantined, without a cluster", INPUT, commands=JOBS,
        ),
    ] = "fail"  # fmt: skip
    max_bad_fraction: Annotated[
        Share, Setting("share of rows that may be quarantined; more are refused", INPUT, "X", JOBS)
    ] = 0.01  # fmt: skip
    neighbors: Annotated[Whole, between(1, 10_000), Setting("maximum neighbors per face (k)", SEARCH, "K")] = 200
    min_similarity: Annotated[
        float | str | None, BeforeValidator(cosine),
        Setting(
            "cosine similarity below which two faces are not neighbors. auto: found from the similarities of a sample of "
            "pairs, "
            "without labels; 'none' keeps the plain K nearest", GRAPH, "COS",
        ),
    ] = "auto"  # fmt: skip
    edges: Annotated[
        Literal["auto", "threshold", "shared", "nep", "facemap", "tpdi"],
        Setting(
            "how neighbors become weighted edges. threshold: the cosine; shared: cosine x overlap of the two faces' neighbors; "
            "nep, facemap, tpdi: as published; auto: our own, which also keeps pairs below the threshold that common neighbors "
            "support", GRAPH,
        ),
    ] = "auto"  # fmt: skip
    index: Annotated[
        Literal["auto", "exact", "cells"],
        Setting(
            "search plan. exact: every pair is compared; cells: only pairs in nearby cells of a coarse quantizer; auto: "
            "the one "
            "that is predicted to be faster", SEARCH,
        ),
    ] = "auto"  # fmt: skip
    cells: Annotated[
        Annotated[Whole, between(1, 2**24)] | None, BeforeValidator(none_from_text),
        Setting("number of cells of the coarse quantizer (default: from the number of faces)", SEARCH, "N"),
    ] = None  # fmt: skip
    probes: Annotated[
        Annotated[Whole, between(1, 1024)] | None, BeforeValidator(none_from_text),
        Setting(
            "nearest cells that each face is compared with (default: per face, for a predicted recall of 0.998)", SEARCH, "N"
        ),
    ] = None  # fmt: skip
    memory_limit: Annotated[
        int | None, BeforeValidator(byte_count),
        Setting("resident memory of one worker, as 8GiB, 500MB or bytes (default: its share of Ray's)", RESOURCES, "BYTES"),
    ] = None  # fmt: skip
    min_recall: Annotated[
        Share,
        Setting(
            "edge recall below which the run fails (exit code 4), measured on a sample of faces; 0 accepts "
            "any", SEARCH, "X", JOBS
        ),
    ] = 0.99  # fmt: skip
    raise_probes: Annotated[
        bool, Setting("instead of failing, search again with more probes until min-recall holds", SEARCH, commands=JOBS)
    ] = False  # fmt: skip
    recall_sample: Annotated[
        Whole, between(1, 100_000), Setting("faces searched exactly to measure the edge recall", SEARCH, "N")
    ] = 1_000  # fmt: skip
    method: Annotated[
        Method,
        Setting(
            "how the graph becomes clusters. infomap: the map equation; the others are those of `faceflow compare` (they "
            "need the "
            "methods extra)", GRAPH, commands=(CLUSTER, NIGHTLY, SCALING, PLAN),
        ),
    ] = "infomap"  # fmt: skip
    clusters: Annotated[
        Annotated[Whole, between(1, 2**31 - 1)] | None, BeforeValidator(none_from_text),
        Setting("clusters to make, for a method that needs the number (minibatch-kmeans)", GRAPH, "N", (*RUNS, SCALING)),
    ] = None  # fmt: skip
    assign_singletons: Annotated[
        Literal["auto", "always", "never"],
        Setting(
            "assign singletons to the nearest cluster when significant (false discovery rate 5 %). auto: where min-similarity, "
            "edges and method are the defaults", GRAPH,
        ),
    ] = "auto"  # fmt: skip
    engine: Annotated[
        Literal["native", "infomap"],
        Setting("community detection: native is our own map-equation engine, infomap the package", GRAPH),
    ] = "native"  # fmt: skip
    flow: Annotated[
        Literal["directed", "undirected"],
        Setting("the random walk: directed follows edges their way, undirected either way", GRAPH, commands=JOBS),
    ] = "directed"  # fmt: skip
    trials: Annotated[
        Whole, between(1, 1000),
        Setting("community detection from this many seeds; the shortest codelength wins", GRAPH, "N", JOBS),
    ] = 1  # fmt: skip
    verify_codelength: Annotated[
        bool, Setting("have the infomap package score the final modules, and fail if it disagrees", GRAPH, commands=JOBS)
    ] = False  # fmt: skip
    seed: Annotated[
        Whole, between(0, 2**31 - 1),
        Setting("seed of everything random; same input, settings and seed: same labels", RUN, "N"),
    ] = 0  # fmt: skip
    workers: Annotated[
        Annotated[Whole, between(1, 100_000)] | None, BeforeValidator(none_from_text),
        Setting(
            "most tasks at once (default: one per CPU of the Ray cluster)", RESOURCES, "N", (CLUSTER, NIGHTLY, COMPARE, PLAN)
        ),
    ] = None  # fmt: skip
    gpus_per_worker: Annotated[
        Number, between(0, 64), Setting("GPUs a search task asks Ray for; above 0 searches on the GPU", RESOURCES, "X")
    ] = 0.0  # fmt: skip
    search_resource: Annotated[
        MaybeText,
        Setting("custom Ray resource that search tasks ask for: only the machines meant for them have "
                "it", RESOURCES, "NAME", JOBS),
    ] = None  # fmt: skip
    detect_resource: Annotated[
        MaybeText,
        Setting(
            "custom Ray resource that tasks with the whole graph ask for (link, detect): a machine with much memory", RESOURCES,
            "NAME",
        ),
    ] = None  # fmt: skip
    gpu_float16: Annotated[
        bool,
        Setting("hold vectors on the GPU as float16 (half the memory; products add up in float32)", RESOURCES, commands=JOBS),
    ] = False  # fmt: skip
    run_id: Annotated[
        Annotated[str, AfterValidator(run_name)] | None, BeforeValidator(none_from_text),
        Setting(
            "name of the run (default: the unfinished run with these settings, else a new one from the time)", RUN, "ID",
            (CLUSTER, NIGHTLY, COMPARE),
        ),
    ] = None  # fmt: skip
    restart: Annotated[
        bool,
        Setting(
            "delete what the unfinished run with these settings, or RUN_ID, has done, and begin again", RUN,
            commands=(CLUSTER, NIGHTLY, COMPARE),
        ),
    ] = False  # fmt: skip
    work_dir: Annotated[
        MaybeText,
        Setting(
            "folder of run directories (default: OUTPUT/_runs): a fast shared disk, or another bucket", OUTPUT, "DIR",
            (CLUSTER, NIGHTLY, COMPARE, PLAN),
        ),
    ] = None  # fmt: skip
    constraints: Annotated[
        MaybeText,
        Setting(
            "Parquet or CSV file with id_a, id_b and kind: 'must-link' or 'cannot-link'", CONSTRAINTS, "FILE", JOBS
        ),
    ] = None  # fmt: skip
    exclusive_column: Annotated[
        MaybeText,
        Setting(
            "column whose value (a photo's id, say) two faces of one cluster should not share; a string or an integer",
            CONSTRAINTS, "TEXT",
        ),
    ] = None  # fmt: skip
    full_every: Annotated[
        Whole, between(1, 10_000), Setting("full run every N runs; those between are incremental", RUN, "N", (NIGHTLY,))
    ] = 30  # fmt: skip
    verify_content: Annotated[
        bool,
        Setting(
            "read every file again and compare its rows, instead of trusting sizes and ETags or modification times", RUN,
            commands=(NIGHTLY,),
        ),
    ] = False  # fmt: skip
    snapshot: Annotated[
        Annotated[Whole, between(0, 2**63 - 1)] | None, BeforeValidator(none_from_text),
        Setting("of a Delta or Iceberg table as INPUT: its version, or snapshot id (default: the newest)", INPUT, "N"),
    ] = None  # fmt: skip
    labels_table: Annotated[
        MaybeText,
        Setting(
            "Delta table, a folder or s3:// address, that gets the labels too, by one commit that replaces "
            "all", OUTPUT, "TABLE",
            RUNS,
        ),
    ] = None  # fmt: skip
    thumbnails: Annotated[
        Annotated[str, AfterValidator(check_thumbnails)] | None, BeforeValidator(none_from_text),
        Setting(
            "where the report finds a face's picture: a URL or path with {id}, https://photos.example/{id}.jpg say; "
            "pictures on a "
            "disk become part of the page", OUTPUT, "TEMPLATE", RUNS,
        ),
    ] = None  # fmt: skip
    storage_options: Annotated[
        StorageOptions | None, BeforeValidator(json_object),
        Setting('options of the s3fs file system, as JSON: {"endpoint_url": …, "key": …, "secret": …}', OUTPUT, "JSON"),
    ] = None  # fmt: skip
    address: Annotated[
        MaybeText,
        Setting(
            "Ray cluster to use (default: RAY_ADDRESS if set, as under `ray job submit`; else a private local one)", RESOURCES,
            "RAY",
        ),
    ] = None  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("input", "output"):
            if not getattr(self, name):
                raise SettingsError(f"{name} is empty: name a folder, a file or an s3:// address")
        for name in ("id_column", "embedding_column"):
            if not getattr(self, name):
                raise SettingsError(f"{name} is empty: name a column")
        if self.id_column == self.embedding_column:
            raise SettingsError(f"id_column and embedding_column are both {self.id_column!r}: they must differ")
        if self.method == "minibatch-kmeans" and self.clusters is None:
            raise SettingsError("method minibatch-kmeans needs the number of clusters: set clusters")

    def public(self) -> Mapping[str, object]:
        """The settings as plain JSON values, without anything that could hold a credential."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["storage_options"]
        return values

    def fingerprint(self, names: tuple[str, ...]) -> Mapping[str, object]:
        """The named settings as plain values: what a stage compares before it reuses earlier work."""
        return {name: getattr(self, name) for name in names}


HINTS = get_type_hints(ClusterConfig, include_extras=True)
"""The annotated type of every setting."""

SETTINGS: dict[str, Setting] = {
    name: next(item for item in hint.__metadata__ if isinstance(item, Setting)) for name, hint in HINTS.items()
}
"""Every setting by its name."""

DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(ClusterConfig)}


def choices_of(name: str) -> tuple[str, ...]:
    """The values that a setting may have, if these are named; else none."""
    kind = get_args(HINTS[name])[0]
    return get_args(kind) if "Literal" in str(kind) else ()


METHODS = choices_of("method")
"""Names of the clustering methods."""


def is_switch(name: str) -> bool:
    """Whether a setting is true or false."""
    return get_args(HINTS[name])[0] is bool


_init = ClusterConfig.__init__


@functools.wraps(_init)
def _checked_init(self: ClusterConfig, *args: Any, **settings: Any) -> None:
    try:
        _init(self, *args, **settings)
    except ValidationError as error:
        raise _explained(error) from None


ClusterConfig.__init__ = _checked_init  # type: ignore[method-assign]
ClusterConfig.__doc__ = (ClusterConfig.__doc__ or "").rstrip() + "\n\n    Attributes\n    ----------\n" + "\n".join(
    f"    {name} : default {DEFAULTS[name]!r}\n        {setting.help}" if DEFAULTS[name] is not dataclasses.MISSING
    else f"    {name} : str\n        {setting.help}" for name, setting in SETTINGS.items()
)  # fmt: skip

_NOUNS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text"}


def _explained(error: ValidationError) -> SettingsError:
    """The first thing that is wrong, in our words."""
    first = error.errors()[0]
    return wrong_setting(str(first["loc"][0]), first["type"], first["msg"], first["input"])


def wrong_setting(name: str, kind: str, message: str, value: Any) -> SettingsError:
    """What to say of a value that pydantic refuses, by the kind of its error."""
    if kind == "unexpected_keyword_argument":
        return SettingsError(f"unknown setting {name!r}{did_you_mean(name, SETTINGS)}")
    if kind.startswith("missing"):
        return SettingsError(f"{name} is missing: give it on the command line or in the config file")
    if kind == "literal_error":
        return SettingsError(f"{name} is {value!r}{did_you_mean(str(value), choices_of(name))}")
    if kind != "stated":
        message = f"it must be {_NOUNS.get(kind.split('_')[0], 'something else')}"
    return SettingsError(f"{name} is {value!r}: {message}")
