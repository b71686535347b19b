"""Scores labels against known identities: reads both Parquet tables, joins them on the id, and calls
`kernels.clusters.scores`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from faceflow.errors import InputError, did_you_mean, one_line
from faceflow.kernels.clusters.scores import Scores, score
from faceflow.setting_types import StorageOptions
from faceflow.storage import column_types, layout
from faceflow.storage.inputs import list_faces, list_parquet, open_input
from faceflow.storage.object_store import Store, explain
from faceflow.storage.pointer import read_pointer


def evaluate(
    labels: str,
    truth: str,
    *,
    label_column: str = "label",
    id_column: str = "id",
    partial: bool = False,
    storage_options: StorageOptions | None = None,
) -> Scores:
    """Scores of published labels against true identities.

    labels: an OUTPUT folder (its latest.json is followed) or label Parquet with `id` and `cluster`; truth: Parquet with
    id_column and label_column. A face whose cluster is null (a quarantined row) counts as a cluster of its own;
    one that was quarantined for a null or repeated id does not count. partial: score the faces that TRUTH names, and leave out
    the others.
    Raises InputError for missing columns, repeated ids, a null label, or ids that only one side has (how many, and a few).
    """
    store = Store.at(labels, storage_options)
    # An OUTPUT may be named like a file, and a file has nothing in it.
    if layout.LATEST in store.names("") and (pointer := read_pointer(store)) is not None:
        labels = store.address(pointer.labels)
    ours = _without_unusable(read_labels(labels, "id", "cluster", storage_options))
    real = read_identities(truth, id_column, label_column, storage_options)
    ours, real = same_id_type(ours, real, labels, truth)
    _refuse_repeats(ours, labels)
    _refuse_repeats(real, truth)
    position = pc.index_in(real["id"], value_set=ours["id"])
    missing = real.filter(pc.is_null(position))
    extra = ours.filter(pc.is_null(pc.index_in(ours["id"], value_set=real["id"])))
    if partial and real.num_rows == 0:
        raise InputError(f"{truth} names no face: there is nothing to score")
    for rows, selected, matched, advice in (
        (missing, truth, labels, ""),  # whatever part of the faces TRUTH names, it names no others
        (extra, labels, truth, ": use --partial to score only the faces that TRUTH names"),
    ):
        if rows.num_rows and not (partial and advice):
            few = ", ".join(_quoted(item) for item in rows["id"].slice(0, 5).to_pylist())
            raise InputError(f"{rows.num_rows} id(s) of {selected} are not in {matched}, for example {few}{advice}")
    clusters = (
        ours["value"].combine_chunks().take(position.combine_chunks() if isinstance(position, pa.ChunkedArray) else position)
    )
    return score(_codes(clusters), _codes(real["value"].combine_chunks()))


def read_identities(truth: str, id_column: str, label_column: str, options: StorageOptions | None) -> pa.Table:
    """`read_labels` of known identities. Raises InputError for a null, too."""
    real = read_labels(truth, id_column, label_column, options)
    if real["value"].null_count:
        raise InputError(f"{truth}: column {label_column!r} holds {real['value'].null_count} null(s); every face needs a label")
    return real


def read_labels(address: str, id_column: str, value_column: str, options: StorageOptions | None) -> pa.Table:
    """Columns `id` and `value` of Parquet files. Raises InputError for missing columns and files of different types."""
    store, files, _ = list_faces(address, options)
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
                if parquet.metadata.num_rows:
                    table = parquet.read(columns=[id_column, value_column])
                    results = [_stored(table[name], name, info.path) for name in (id_column, value_column)]
                    tables.append(pa.table(results, names=["id", "value"]))
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"cannot read {one_line(info.path)}: {explain(error)}") from None
    if not tables:
        raise InputError(f"{address} has no rows")
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"the files of {address} do not have one type: {explain(error)}") from None


def published_ids(address: str, options: StorageOptions | None) -> pa.DataType:
    """The type of the ids in label files."""
    store, files = list_parquet(address, options)
    with open_input(store, files[0].path) as source:
        return pq.read_schema(source).field("id").type


def _stored(values: pa.ChunkedArray, name: str, path: str) -> pa.ChunkedArray:
    """A column in its storage type, or the plain type of what cannot be an id (floats, say). Raises InputError for nested ones,
    and for text that is not valid UTF-8."""
    kind = column_types.id_storage(values.type) or column_types.plain(values.type)
    if pa.types.is_nested(kind):
        raise InputError(f"{one_line(path)}: column {name!r} is {values.type}; it must hold a string or a number a face")
    chunks = [column_types.cast(chunk, kind) for chunk in values.chunks]
    for chunk in chunks:
        if len(column_types.readable(chunk)[1]):
            raise InputError(f"{one_line(path)}: column {name!r} holds text that is not valid UTF-8")
    return pa.chunked_array(chunks, kind)


def _quoted(value: Any) -> str:
    return column_types.shown(value) if isinstance(value, bytes) else repr(value)


def same_id_type(a: pa.Table, b: pa.Table, a_name: str, b_name: str) -> tuple[pa.Table, pa.Table]:
    """Both tables with ids of one type. Raises InputError where there is none that fits."""
    types = [t["id"].type for t in (a, b)]
    stored = [column_types.id_storage(t) for t in types]
    integers = {column_types.INTEGER, column_types.UNSIGNED}
    if None in stored or (stored[0] != stored[1] and not integers >= set(stored)):
        raise InputError(f"ids are {types[0]} in {a_name} but {types[1]} in {b_name}: they cannot be matched")
    target = column_types.INTEGER if stored[0] != stored[1] else stored[0]
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
        raise InputError(f"{name}: {repeats} row(s) repeat an id, for example {', '.join(map(_quoted, few))}")


def _codes(values: pa.Array) -> np.ndarray:
    """Dense codes int64[n]; each null is a value of its own."""
    codes = values.dictionary_encode().indices
    results = codes.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    alone = results < 0
    results[alone] = results.max(initial=-1) + 1 + np.arange(int(alone.sum()))
    return results
