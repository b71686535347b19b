"""The constraints file: pairs of ids that must, or cannot, share a cluster; read and checked."""

from __future__ import annotations

import csv
import itertools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from faceflow.config import ClusterConfig
from faceflow.errors import InputError, did_you_mean, one_line
from faceflow.kernels.clusters import constraints
from faceflow.setting_types import StorageOptions
from faceflow.storage import column_types
from faceflow.storage.inputs import list_file, open_input
from faceflow.storage.manifests import Fingerprint
from faceflow.storage.object_store import Store, explain

COLUMNS = ("id_a", "id_b", "kind")
MUST, CANNOT = "must-link", "cannot-link"


@dataclass(frozen=True)
class Constraints:
    """Constraints by id: the distinct ids, and pairs of indices into them, int64[m, 2]."""

    ids: pa.Array
    must: np.ndarray
    cannot: np.ndarray


def fingerprint(config: ClusterConfig) -> Fingerprint:
    """What the constraints' file is, for the manifest of the stage that imposes them."""
    if config.constraints is None:
        return {}
    info = list_file(config.constraints, config.storage_options)[1]
    return {"constraints_file": [info.path, info.size, info.version]}


def read(address: str, options: StorageOptions | None, id_type: pa.DataType | None = None) -> Constraints:
    """The constraints of a Parquet or CSV file with the columns id_a, id_b and kind (must-link or cannot-link); their ids as
    id_type, if that is known.

    Raises InputError for what cannot be read, and for constraints that contradict each other.
    """
    store, info = list_file(address, options)
    name = one_line(address)
    lines = address.lower().endswith(".csv")

    def place(row: int) -> str:
        return f"line {_line_of(store, info.path, row)}" if lines else f"row {row}"

    try:
        with open_input(store, info.path) as source:
            if lines:
                text = pyarrow.csv.ConvertOptions(column_types={column: pa.string() for column in COLUMNS})
                table = pyarrow.csv.read_csv(source, convert_options=text)
            else:
                table = pq.read_table(source)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"cannot read constraints {name}: {explain(error)}") from None
    for column in COLUMNS:
        if column not in table.column_names:
            raise InputError(f"constraints {name}: no column {column!r}{did_you_mean(column, table.column_names)}")
        if table[column].null_count:
            row = pc.index(table[column].is_null(), True).as_py()
            raise InputError(f"constraints {name}, {place(row)}: {column} is null")
    kinds = [str(kind).strip().lower() for kind in table["kind"].to_pylist()]
    wrong = next((i for i, kind in enumerate(kinds) if kind not in (MUST, CANNOT)), None)
    if wrong is not None:
        raise InputError(f"constraints {name}, {place(wrong)}: kind is {kinds[wrong]!r}; it must be {MUST!r} or {CANNOT!r}")
    stored = [column_types.id_storage(table[column].type) for column in COLUMNS[:2]]
    if None in stored or stored[0] != stored[1]:
        raise InputError(f"constraints {name}: id_a is {table['id_a'].type}, but id_b is {table['id_b'].type}")
    chunks = [column_types.cast(chunk, stored[0]) for column in COLUMNS[:2] for chunk in table[column].chunks]
    both = pa.concat_arrays(chunks) if chunks else pa.array([], column_types.TEXT)
    if id_type is not None:
        both = _as(both, id_type, address)
    coded = both.dictionary_encode()
    codes = coded.indices.to_numpy().astype(np.int64)
    pairs = np.stack([codes[: len(kinds)], codes[len(kinds) :]], axis=1)
    must, cannot = (pairs[np.array([k == kind for k in kinds], bool)] for kind in (MUST, CANNOT))
    ids = coded.dictionary
    constraints.check(must, cannot, len(ids), lambda i: repr(column_types.shown(ids[i].as_py())))
    return Constraints(ids, must, cannot)


def _line_of(store: Store, path: str, row: int) -> int:
    """The line of a CSV file, as an editor counts them, on which its data row `row` ends."""
    text = bytes(store.fs.cat_file(path)).decode("utf-8", errors="replace")
    reader = csv.reader(text.splitlines(keepends=True))
    filled = (reader.line_num for fields in reader if fields)
    return next(itertools.islice(filled, row + 1, None))


def _as(ids: pa.Array, kind: pa.DataType, address: str) -> pa.Array:
    try:
        return column_types.parsed(ids, kind)
    except pa.ArrowException as error:
        raise InputError(f"constraints {one_line(address)}: ids are not {kind}, as the faces' are: {explain(error)}") from None
