"""Which input rows can be used and why others cannot: bad embeddings, missing and repeated ids. Reads no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from faceflow.kernels.knn.vectors import FINE, NOT_FINITE, normalize_rows

GOOD, NULL_ID, NULL_EMBEDDING, EMPTY, DIMENSION, NULL_VALUE, INFINITE, ZEROS, REPEATED, NOT_TEXT = range(10)
"""Verdicts on a row; where several fit, that on the id, then the lowest."""

REASONS = {
    NULL_ID: "the id is null: every face needs one",
    NULL_EMBEDDING: "the embedding is null",
    EMPTY: "the embedding is empty",
    DIMENSION: "the embedding has dimension {length}, but the first one has {dim}",
    NULL_VALUE: "the embedding contains a null",
    INFINITE: "the embedding contains a NaN or an infinity",
    ZEROS: "the embedding contains only zeros: it has no direction",
    REPEATED: "the id occurred before: ids must be unique",
    NOT_TEXT: "the id is not valid UTF-8: write it as text, or as a binary column",
}

SHOWN = 3
"""Places shown for each reason."""


@dataclass
class Tally:
    """Bad rows by reason: how many, and the first places with their full texts, in input order."""

    counts: dict[int, int] = field(default_factory=dict)
    places: dict[int, list[str]] = field(default_factory=dict)

    def add(self, verdict: int, count: int, places: Sequence[str]) -> None:
        self.counts[verdict] = self.counts.get(verdict, 0) + count
        self.places[verdict] = [*self.places.get(verdict, []), *places][:SHOWN]

    def include(self, other: Tally) -> None:
        """Add the tally of rows that come after."""
        for verdict, count in other.counts.items():
            self.add(verdict, count, other.places[verdict])

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def text(self) -> str:
        """One line a reason, the most frequent first."""
        lines = []
        for verdict, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            more = f"; and {count - SHOWN:,} more like it" if count > SHOWN else ""
            lines.append("; ".join(self.places[verdict]) + more)
        return "\n  ".join(lines)


def check_batch(
    ids: pa.Array, not_text: np.ndarray, embeddings: pa.Array, dim: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(verdicts uint8[n], lengths of the embeddings int64[n], unit vectors float32[good rows, dim]) of one batch.

    ids, not_text: as `storage.column_types.readable` gives them; embeddings: a list column of floats. A repeated id cannot be
    seen by this function.
    """
    n = len(embeddings)
    verdict = np.zeros(n, np.uint8)
    if pa.types.is_fixed_size_list(embeddings.type):
        lengths = np.full(n, embeddings.type.list_size, np.int64)
    else:
        lengths = np.diff(embeddings.offsets.to_numpy()).astype(np.int64)
    verdict[lengths != dim] = DIMENSION
    verdict[lengths == 0] = EMPTY
    if embeddings.null_count:
        verdict[embeddings.is_null().to_numpy(zero_copy_only=False)] = NULL_EMBEDDING
    candidates = np.flatnonzero(verdict == GOOD)
    if len(candidates) < n:
        embeddings = embeddings.take(pa.array(candidates))
    values = embeddings.flatten()
    if values.null_count:
        holes = np.unique(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False)) // dim)
        verdict[candidates[holes]] = NULL_VALUE
        whole = np.delete(np.arange(len(candidates)), holes)
        candidates, values = candidates[whole], embeddings.take(pa.array(whole)).flatten()
    raw = values.to_numpy(zero_copy_only=False).reshape(-1, dim)
    # float64 is normalised before it is rounded, so that no value over- or underflows on the way.
    x = np.array(raw, dtype=np.float64 if raw.dtype == np.float64 else np.float32, order="C")
    results = normalize_rows(x)
    verdict[candidates[results != FINE]] = np.where(results[results != FINE] == NOT_FINITE, INFINITE, ZEROS)
    if ids.null_count:
        verdict[ids.is_null().to_numpy(zero_copy_only=False)] = NULL_ID
        verdict[not_text] = NOT_TEXT
    good = verdict[candidates] == GOOD
    return verdict, lengths, (x if good.all() else x[good]).astype(np.float32, copy=False)


def repeated(ids: pa.Array) -> np.ndarray:
    """Indices int64[...] of ids that stand earlier in the array already; nulls are not compared."""
    codes = ids.dictionary_encode().indices
    present = np.flatnonzero(codes.is_valid().to_numpy(zero_copy_only=False))
    values = codes.drop_null().to_numpy()
    first = np.unique(values, return_index=True)[1]
    again = np.ones(len(values), bool)
    again[first] = False
    return present[again]
