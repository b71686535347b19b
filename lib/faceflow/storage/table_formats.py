"""Delta and Iceberg tables: the data files of one snapshot, and labels as a Delta commit. The only module that imports
deltalake and pyiceberg."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from faceflow.errors import InputError, PublishError, RunError, SettingsError, one_line
from faceflow.storage import column_types
from faceflow.storage.file_info import FileInfo
from faceflow.storage.object_store import Store, explain

INSTALL = "it takes the lakes extra: pip install 'faceflow[lakes]'"


COMMITS_READ = 50
"""Of a table of labels, in search of the newest that a run made."""

COMMIT_TRIES = 5
"""Times the labels are written where commits of others to their table come between."""


@dataclass(frozen=True)
class Snapshot:
    """One state of a table. kind: delta or iceberg; version: Delta's version or Iceberg's snapshot id; files: data files."""

    kind: str
    version: int
    files: list[FileInfo]


def table_kind(store: Store) -> str | None:
    """delta or iceberg, where the address is such a table; else None."""
    if store.root.endswith(".metadata.json"):
        return "iceberg"
    # A folder may be named like a file or a glob, so its name decides nothing.
    if store.names("_delta_log"):
        return "delta"
    return "iceberg" if any(name.endswith(".metadata.json") for name in store.names("metadata")) else None


def open_snapshot(store: Store, kind: str, version: int | None) -> Snapshot:
    """The data files of a table, sorted by path; version: which snapshot (None: the newest).

    Raises InputError for a snapshot that is not there, or one whose rows are not those of its files.
    """
    results = (_delta if kind == "delta" else _iceberg)(store, version)
    if not results.files:
        raise InputError(f"{one_line(store.root)}: snapshot {results.version} of this {kind} table holds no data file")
    return Snapshot(kind, results.version, sorted(results.files, key=lambda file: file.path))


def _delta(store: Store, version: int | None) -> Snapshot:
    try:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError
    except ImportError:
        raise SettingsError(f"{one_line(store.root)} is a Delta table, and to read one {INSTALL}") from None
    try:
        table = DeltaTable(store.root, version=version, storage_options=_object_store(store))
        features = set(table.protocol().reader_features or ())
        if "columnMapping" in features:
            raise InputError(f"{one_line(store.root)} maps its columns to other names in its files, which is not supported")
        if "deletionVectors" in features and any(batch.num_rows for batch in table.deletion_vectors()):
            raise InputError(
                f"{one_line(store.root)} has deletion vectors: files hold rows that are deleted; purge them first "
                "(REORG TABLE … APPLY (PURGE))"
            )
        actions = pa.table(table.get_add_actions(flatten=True))
        paths, sizes, times = (actions.column(name).to_pylist() for name in ("path", "size_bytes", "modification_time"))
        files = [
            FileInfo(_data_file(path, store), int(size), str(time))
            for path, size, time in zip(paths, sizes, times, strict=True)
        ]
        return Snapshot("delta", table.version(), files)
    except (DeltaError, OSError) as error:
        if version is not None:
            newest = _delta(store, None).version  # says itself if the table cannot be read at all
            if version > newest:
                raise InputError(
                    f"Delta table {one_line(store.root)} has no version {version}: the newest is {newest}"
                ) from None
        raise InputError(f"cannot read Delta table {one_line(store.root)}: {explain(error)}") from None


def _iceberg(store: Store, version: int | None) -> Snapshot:
    try:
        from pyiceberg.exceptions import NoSuchTableError
        from pyiceberg.table import StaticTable
    except ImportError:
        raise SettingsError(f"{one_line(store.root)} is an Iceberg table, and to read one {INSTALL}") from None
    try:
        table = StaticTable.from_metadata(_metadata_of(store), _iceberg_io(store))
        snapshot = table.current_snapshot() if version is None else table.snapshot_by_id(version)
        if snapshot is None:
            what = "has no snapshot yet" if version is None else f"has no snapshot {version}"
            raise InputError(f"Iceberg table {one_line(store.root)} {what}")
        files = []
        for task in table.scan(snapshot_id=snapshot.snapshot_id).plan_files():
            if task.delete_files:
                raise InputError(
                    f"{one_line(store.root)} has delete files: files hold rows that are deleted; rewrite its data files first "
                    "(rewrite_data_files)"
                )
            files.append(FileInfo(_address(task.file.file_path, store), int(task.file.file_size_in_bytes), ""))
        return Snapshot("iceberg", snapshot.snapshot_id, files)
    except (OSError, ValueError, NoSuchTableError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read Iceberg table {one_line(store.root)}: {explain(error)}") from None


def _metadata_of(store: Store) -> str:
    """The metadata file named, or a table folder's newest: what its version hint names, else that of the highest number."""
    if store.root.endswith(".metadata.json"):
        return store.root
    names = [name for name in store.names("metadata") if name.endswith(".metadata.json")]
    if store.exists("metadata/version-hint.text"):
        hint = store.read_bytes("metadata/version-hint.text").decode().strip()
        named = [name for name in (hint, f"v{hint}.metadata.json", f"{hint}.metadata.json") if name in names]
        if named:
            return store.address(f"metadata/{named[0]}")
    return store.address(f"metadata/{max(names, key=lambda name: (_number(name), name))}")


def _number(name: str) -> int:
    results = re.match(r"v?(\d+)", name)
    return int(results[1]) if results else -1


def _data_file(path: str, table: Store) -> str:
    """The address of a data file that Delta's log names: a URI, relative to the table or (of a shallow clone) whole, that is
    percent-encoded once; names of partition folders are encoded a second time, as part of the name."""
    decoded = unquote(path)
    return _address(decoded, table) if "://" in path or path.startswith("/") else table.address(decoded)


def _address(path: str, table: Store) -> str:
    """A data file's address as a Store has it. A file elsewhere than the table's own kind of store cannot be read with it."""
    results = Store.at(path)
    if results.is_local != table.is_local:
        raise InputError(f"{one_line(table.root)} names {one_line(path)}, which lies on another kind of storage")
    return results.root


def _options(store: Store) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in store.options}


def _s3_settings(store: Store) -> dict[str, str | None]:
    given = _options(store)
    client = given.get("client_kwargs") or {}
    return {
        "key": given.get("key"),
        "secret": given.get("secret"),
        "token": given.get("token"),
        "endpoint": given.get("endpoint_url") or client.get("endpoint_url"),
        "region": client.get("region_name"),
    }


def _object_store(store: Store) -> dict[str, str] | None:
    """The options of s3fs, for deltalake; what they leave out, both find in the environment."""
    if store.is_local:
        return None
    names = {
        "key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY", "token": "AWS_SESSION_TOKEN",
        "endpoint": "AWS_ENDPOINT_URL", "region": "AWS_REGION",
    }  # fmt: skip
    results = {names[key]: value for key, value in _s3_settings(store).items() if value}
    # A commit is a put that must not replace another's.
    results["aws_conditional_put"] = "etag"
    if results.get("AWS_ENDPOINT_URL", "").startswith("http:"):
        results["AWS_ALLOW_HTTP"] = "true"
    if "AWS_ENDPOINT_URL" in results and "AWS_REGION" not in results:
        results["AWS_REGION"] = "us-east-1"
    return results


def _iceberg_io(store: Store) -> dict[str, str]:
    names = {
        "key": "s3.access-key-id", "secret": "s3.secret-access-key", "token": "s3.session-token", "endpoint": "s3.endpoint",
        "region": "s3.region",
    }  # fmt: skip
    return {names[key]: value for key, value in _s3_settings(store).items() if value} if not store.is_local else {}


def _why(error: BaseException) -> str:
    """What deltalake says, which puts the cause into the last of several lines."""
    return one_line(" ".join(str(error).split()))[:300] or explain(error)


def _version(store: Store) -> int:
    from deltalake import DeltaTable

    return int(DeltaTable(store.root, storage_options=_object_store(store)).version())


LABEL_COLUMNS = ["id", "cluster"]
"""What a table of labels begins with."""


def check_labels_table(store: Store) -> None:
    """Raise SettingsError where a Delta table holds something else than labels: a commit would replace it. One that cannot be
    read is none of this check's business."""
    check_can_commit()
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    options = _object_store(store)
    try:
        if not DeltaTable.is_deltatable(store.root, storage_options=options):
            return
        names = pa.schema(DeltaTable(store.root, storage_options=options).schema()).names
    except (DeltaError, OSError):
        return
    if names[: len(LABEL_COLUMNS)] != LABEL_COLUMNS:
        raise SettingsError(
            f"labels_table {one_line(store.root)} is a table of {', '.join(names[:5])}, not of labels: its content would be "
            "replaced; name another table"
        )


_SIGNED = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.uint64(): pa.int64()}


def as_delta(labels: pa.Table) -> pa.Table:
    """Labels with ids of a type that Delta has: unsigned integers as signed ones, UUIDs and fixed-size values as binary.

    Raises RunError for an id above 2**63 - 1.
    """
    given = labels["id"]
    ids = pa.chunked_array([column_types.unwrapped(chunk) for chunk in given.chunks], column_types.plain(given.type))
    kind = pa.binary() if pa.types.is_fixed_size_binary(ids.type) else _SIGNED.get(ids.type, ids.type)
    try:
        return labels.set_column(0, "id", ids.cast(kind))
    except pa.ArrowInvalid:
        raise RunError(
            f"the labels are published, but a Delta table cannot hold some ids: they do not fit into {kind}"
        ) from None


def check_can_commit() -> None:
    """Raise SettingsError where labels cannot be put into a Delta table, as what that takes is not installed."""
    if importlib.util.find_spec("deltalake") is None:
        raise SettingsError(f"--labels-table writes a Delta table, and for that {INSTALL}")


def committed(store: Store) -> str | None:
    """The run that last put its labels into a Delta table, if any of the newest commits did (upkeep of the table may have come
    after). Raises RunError where it cannot be read."""
    check_can_commit()
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    options = _object_store(store)
    try:
        if not DeltaTable.is_deltatable(store.root, storage_options=options):
            return None
        commits = DeltaTable(store.root, storage_options=options).history(COMMITS_READ)
        return next((commit["faceflow_run_id"] for commit in commits if "faceflow_run_id" in commit), None)
    except (DeltaError, OSError) as error:
        raise RunError(
            f"the labels are current, but their Delta table {one_line(store.root)} cannot be read: {_why(error)}; "
            "the same command tries again"
        ) from error


@dataclass(frozen=True)
class Fence:
    """What keeps a run that was stalled from replacing the labels of a later one. output: address of the OUTPUT; sequence: of
    the run's publication there, which rises; is_current: whether OUTPUT still names the run."""

    output: str
    sequence: int
    is_current: Callable[[], bool]

    @property
    def application(self) -> str:
        """The name under which the table notes the sequence of its last commit (Delta's application transactions)."""
        return f"faceflow {self.output}"


def commit_labels(
    store: Store, run_id: str, schema: pa.Schema, batches: Callable[[], Iterable[pa.RecordBatch]], fence: Fence
) -> int:
    """Replace the content of a Delta table by these labels, in one commit; returns its version. A run that has committed before
    does not commit again.

    batches: read one at a time. The commit succeeds only upon the very version of the table that was looked at before it was
    asked whether the run is current, so no later run's commit can come between. Raises PublishError where a later run was
    published or has committed, RunError where the commit fails: the table then is as it was.
    """
    check_can_commit()
    from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
    from deltalake.exceptions import CommitFailedError, DeltaError

    options = _object_store(store)
    try:
        for left in reversed(range(COMMIT_TRIES)):
            exists = DeltaTable.is_deltatable(store.root, storage_options=options)
            table = DeltaTable(store.root, storage_options=options) if exists else None
            if table is not None and committed(store) == run_id:
                return int(table.version())
            newest = table.transaction_version(fence.application) if table is not None else None
            if table is not None and newest == fence.sequence:
                return int(table.version())  # upkeep of the table has pushed the commit out of what `committed` reads
            if (newest is not None and newest > fence.sequence) or not fence.is_current():
                raise PublishError(
                    f"a later run was published while run {run_id} was stalled: the Delta table {one_line(store.root)} "
                    "stays as it is"
                )
            if store.is_local:
                store.check_writable()
            properties = CommitProperties(
                custom_metadata={"faceflow_run_id": run_id}, max_commit_retries=0,
                app_transactions=[Transaction(fence.application, fence.sequence)],
            )  # fmt: skip
            try:
                write_deltalake(
                    table if table is not None else store.root, pa.RecordBatchReader.from_batches(schema, batches()),
                    mode="overwrite" if table is not None else "error", schema_mode="overwrite" if table is not None else None,
                    storage_options=options, commit_properties=properties,
                )  # fmt: skip
            except (CommitFailedError, DeltaError):
                # Another commit (upkeep of the table, say) came between: look again.
                if not left or (table is not None and _version(store) == table.version()):
                    raise
                continue
            return _version(store)
        raise AssertionError
    except (DeltaError, OSError) as error:
        raise RunError(
            f"the labels are current, but their Delta table {one_line(store.root)} was not written: {_why(error)}; "
            "the same command tries again"
        ) from error
