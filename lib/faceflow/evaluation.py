"""Scores labels against known identities: reads both Parquet tables, joins them on the id, and calls `kernels.metrics`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from faceflow.errors import InputError, did_you_mean
from faceflow.kernels.metrics import Scores, score
from faceflow.storage import layout
from faceflow.storage.files import Store, explain
from faceflow.storage.inputs import list_parquet, open_input


def evaluate(
    labels: str,
    truth: str,
    *,
    label_column: str = "label",
    id_column: str = "id",
    storage_options: Mapping[str, Any] | None = None,
) -> Scores:
    """Scores of published labels against true identities.

    labels: an OUTPUT folder (its latest.json is followed) or label Parquet with `id` and `cluster`; truth: Parquet with
    id_column and label_column. A face whose cluster is null (a row set aside) counts as a cluster of its own;
    one that was set aside for a null or repeated id does not count.
    Raises InputError for missing columns, repeated ids, a null label, or ids that only one side has (how many, and a few).
    """
    store = Store.at(labels, storage_options)
    if not labels.lower().endswith((".parquet", ".pq", ".parq")):
        pointer = store.read_json(layout.LATEST)
        if pointer is not None:
            labels = store.address(pointer["labels"])
    ours = _without_unusable(read_labels(labels, "id", "cluster", storage_options))
    real = read_identities(truth, id_column, label_column, storage_options)
    ours, real = same_id_type(ours, real, labels, truth)
    _refuse_repeats(ours, labels)
    _refuse_repeats(real, truth)
    position = pc.index_in(real["id"], value_set=ours["id"])
    missing = real.filter(pc.is_null(position))
    extra = ours.filter(pc.is_null(pc.index_in(ours["id"], value_set=real["id"])))
    for rows, here, there in ((missing, truth, labels), (extra, labels, truth)):
        if rows.num_rows:
            few = ", ".join(map(repr, rows["id"].slice(0, 5).to_pylist()))
            raise InputError(f"{rows.num_rows} id(s) of {here} are not in {there}, for example {few}")
    clusters = (
        ours["value"].combine_chunks().take(position.combine_chunks() if isinstance(position, pa.ChunkedArray) else position)
    )
    return score(_codes(clusters), _codes(real["value"].combine_chunks()))


def read_identities(truth: str, id_column: str, label_column: str, options: Mapping[str, Any] | None) -> pa.Table:
    """`read_labels` of known identities. Raises InputError for a null, too."""
    real = read_labels(truth, id_column, label_column, options)
    if real["value"].null_count:
        raise InputError(f"{truth}: column {label_column!r} holds {real['value'].null_count} null(s); every face needs a label")
    return real


def read_labels(address: str, id_column: str, value_column: str, options: Mapping[str, Any] | None) -> pa.Table:
    """Columns `id` and `value` of Parquet files. Raises InputError for missing columns and files of different types."""
    store, files = list_parquet(address, options)
    tables = []
    for info in files:
        try:
            with open_input(store, info.path) as source:
                parquet = pq.ParquetFile(source)
                for column in (id_column, value_column):
                    if column not in parquet.schema_arrow.names:
                        raise InputError(
                            f"{info.path} has no column {column!r}{did_you_mean(column, parquet.schema_arrow.names)}"
                        )
                tables.append(parquet.read(columns=[id_column, value_column]).select([id_column, value_column]))
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"cannot read {info.path}: {explain(error)}") from None
    try:
        return pa.concat_tables(tables).rename_columns(["id", "value"])
    except pa.ArrowException as error:
        raise InputError(f"the files of {address} do not have one type: {explain(error)}") from None


def same_id_type(a: pa.Table, b: pa.Table, a_name: str, b_name: str) -> tuple[pa.Table, pa.Table]:
    """Both tables with ids of one type. Raises InputError where there is none that fits."""
    types = [t["id"].type for t in (a, b)]
    if all(pa.types.is_integer(t) for t in types):
        target = pa.int64() if pa.types.is_signed_integer(types[0]) or pa.types.is_signed_integer(types[1]) else pa.uint64()
    elif all(pa.types.is_string(t) or pa.types.is_large_string(t) for t in types):
        target = pa.large_string()
    else:
        raise InputError(f"ids are {types[0]} in {a_name} but {types[1]} in {b_name}: they cannot be matched")
    try:
        a, b = (t.set_column(0, "id", t["id"].cast(target)) for t in (a, b))
    except pa.ArrowException as error:
        raise InputError(f"ids of {a_name} and {b_name} cannot be matched: {explain(error)}") from None
    return a, b


def _without_unusable(table: pa.Table) -> pa.Table:
    """Leave out rows without a cluster whose id is null, or stands in a row that has one."""
    if table["value"].null_count == 0:
        return table
    clustered = pc.is_valid(table["value"])
    taken = pc.is_in(table["id"], value_set=table.filter(clustered)["id"])
    return table.filter(pc.or_(clustered, pc.and_(pc.is_valid(table["id"]), pc.invert(taken))))


def _refuse_repeats(table: pa.Table, name: str) -> None:
    if table["id"].null_count:
        raise InputError(f"{name}: {table['id'].null_count} id(s) are null")
    repeats = table.num_rows - pc.count_distinct(table["id"]).as_py()
    if repeats:
        counts = table["id"].value_counts()
        few = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").slice(0, 5).to_pylist()
        raise InputError(f"{name}: {repeats} row(s) repeat an id, for example {', '.join(map(repr, few))}")


def _codes(values: pa.Array) -> np.ndarray:
    """Dense codes int64[n]; each null is a value of its own."""
    codes = values.dictionary_encode().indices
    found = codes.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    alone = found < 0
    found[alone] = found.max(initial=-1) + 1 + np.arange(int(alone.sum()))
    return found
