"""Columns as other writers store them, each brought to one storage type: ids, embeddings, exclusive values. Reads no files."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

TEXT, INTEGER, UNSIGNED, BINARY = pa.large_string(), pa.int64(), pa.uint64(), pa.large_binary()
"""The types that ids have between ingest and publish. Large ones: a join of long ids passes the 2 GiB of 32-bit offsets."""

SLICE_ROWS = 8_192
"""Rows cast at once: 2 GiB hold them at any length of an id below 256 KiB."""

CASTS = "cast it to a string or an integer"


def plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values, without what only says how they are held: dictionaries, run ends, extension types."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        else:
            return kind


def id_storage(kind: pa.DataType) -> pa.DataType | None:
    """The storage type of ids of this type; null where every value is null; None where it cannot be an id."""
    kind = plain(kind)
    if pa.types.is_null(kind):
        return kind
    if pa.types.is_integer(kind):
        return UNSIGNED if kind == pa.uint64() else INTEGER
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return TEXT
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return BINARY
    return BINARY if pa.types.is_binary_view(kind) else None


def published(kind: pa.DataType) -> pa.DataType:
    """The type that labels give ids which came as this one: the same, but for dictionaries and run ends, which have no use for
    unique values, and extension types that say nothing about an id (JSON, opaque): these give their storage."""
    return kind if kind == pa.uuid() else plain(kind)


def embedding_storage(kind: pa.DataType) -> pa.DataType | None:
    """The list type that embeddings of this type are read as; null where every one is null; None where it holds no floats."""
    kind = plain(kind)
    if pa.types.is_null(kind):
        return kind
    large = pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind)
    fixed = pa.types.is_fixed_size_list(kind)
    if not (large or fixed or pa.types.is_list(kind) or pa.types.is_list_view(kind)):
        return None
    value = pa.float32() if pa.types.is_null(kind.value_type) else kind.value_type
    if not pa.types.is_floating(value):
        return None
    return pa.list_(value, kind.list_size) if fixed else pa.large_list(value) if large else pa.list_(value)


def unwrapped(values: pa.Array) -> pa.Array:
    """The values in their `plain` type."""
    while True:
        if isinstance(values.type, pa.BaseExtensionType):
            values = values.storage
        elif pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        elif pa.types.is_run_end_encoded(values.type):
            values = pc.run_end_decode(values)
        else:
            return values


def cast(values: pa.Array, target: pa.DataType) -> pa.Array:
    """The values as `target`, one of the types above. Raises ArrowInvalid for an integer that does not fit."""
    values = unwrapped(values)
    return values if values.type == target else values.cast(target)


def readable(ids: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """(ids with null for each text that is not valid UTF-8, where these stood, int64[...])."""
    if ids.type != TEXT:
        return ids, np.empty(0, np.int64)
    try:
        ids.validate(full=True)
    except pa.ArrowInvalid:
        raw = ids.cast(BINARY)
        wrong = np.array([not _is_utf8(item.as_py()) for item in raw], bool)
        return pc.if_else(pa.array(wrong), pa.scalar(None, BINARY), raw).cast(TEXT), np.flatnonzero(wrong)
    return ids, np.empty(0, np.int64)


def _is_utf8(text: bytes | None) -> bool:
    try:
        return text is None or bool(text.decode("utf-8") or True)
    except UnicodeDecodeError:
        return False


def as_published(ids: pa.Array, kind: pa.DataType) -> pa.Array:
    """Stored ids as the type that labels give them."""
    if ids.type == kind:
        return ids
    storage = plain(kind)
    slices = [ids.slice(begin, SLICE_ROWS).cast(storage) for begin in range(0, len(ids), SLICE_ROWS)]
    if isinstance(kind, pa.BaseExtensionType):
        slices = [pa.ExtensionArray.from_storage(kind, item) for item in slices]
    return pa.chunked_array(slices, kind)


def name_of(kind: pa.DataType) -> str:
    """What `type_of` reads back."""
    return str(kind)


def type_of(name: str) -> pa.DataType:
    """The type of published ids that has this name."""
    if name == str(pa.uuid()):
        return pa.uuid()
    fixed = re.fullmatch(r"fixed_size_binary\[(\d+)\]", name)
    return pa.binary(int(fixed[1])) if fixed else pa.type_for_alias(name)


def shown(value: Any) -> str:
    """An id as text for a message or a report: bytes as hexadecimal digits."""
    return value.hex() if isinstance(value, bytes) else str(value)


def parsed(values: pa.Array, target: pa.DataType) -> pa.Array:
    """Ids that a person wrote, as text say, as the storage type `target`. Raises ArrowInvalid where one cannot be."""
    values = unwrapped(values)
    if target == BINARY and id_storage(values.type) == TEXT:
        try:
            return pa.array([None if v is None else bytes.fromhex(v.replace("-", "")) for v in values.to_pylist()], BINARY)
        except ValueError:
            raise pa.ArrowInvalid("binary ids are written as hexadecimal digits, or as a UUID") from None
    return cast(values, target)
