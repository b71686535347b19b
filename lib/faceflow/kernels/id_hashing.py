"""Hashes of face ids, and the bucket that each falls into: how repeated ids are found across files."""

from __future__ import annotations

import numpy as np

from faceflow.kernels.compiled import kernel


@kernel
def _hash_texts(offsets: np.ndarray, data: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(out)):
        h = np.uint64(14695981039346656037)
        for j in range(offsets[i], offsets[i + 1]):
            h = (h ^ np.uint64(data[j])) * np.uint64(1099511628211)
        out[i] = h ^ (h >> np.uint64(32))


def hash_integers(values: np.ndarray) -> np.ndarray:
    """uint64[n]: a hash of each integer, never 0. Multiplication by 2**64 over the golden ratio (Knuth)."""
    return (values.astype(np.int64).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)


def buckets_of_integers(values: np.ndarray, buckets: int) -> np.ndarray:
    """int64[n]: a bucket 0..buckets-1 for each integer, equal ones in one, whatever stride they have (snowflake ids).

    The finalizer of splitmix64 (Steele, Lea & Flood, Fast splittable pseudorandom number generators, 2014), in which every bit
    of the result depends on every bit of the value.
    """
    h = values.astype(np.int64).view(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)
    return ((h ^ (h >> np.uint64(31))) % np.uint64(buckets)).astype(np.int64)


def hash_texts(offsets: np.ndarray, data: np.ndarray) -> np.ndarray:
    """uint64[n]: a hash, never 0, of each text data[offsets[i]:offsets[i + 1]] (as `buckets_of_texts`)."""
    out = np.empty(len(offsets) - 1, np.uint64)
    _hash_texts(offsets, data, out)
    return out | np.uint64(1)


def buckets_of_texts(offsets: np.ndarray, data: np.ndarray, buckets: int) -> np.ndarray:
    """int64[n]: a bucket 0..buckets-1 for each text data[offsets[i]:offsets[i + 1]], equal texts in one.

    offsets: int32 or int64[n + 1]; data: uint8[...]. The hash is 64-bit FNV-1a (Fowler, Noll & Vo).
    """
    out = np.empty(len(offsets) - 1, np.uint64)
    _hash_texts(offsets, data, out)
    return (out % np.uint64(buckets)).astype(np.int64)
