"""Keep the k best neighbors of each row: sortable keys, bounded buffers, one merge. No similarity is computed here."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from faceflow.kernels.compiled import kernel

# A candidate (similarity s, row r) is one uint64 that sorts as (s falling, r rising): IEEE-754 bits of a positive float
# rise with its value, those of a negative one fall, so flip all bits of a negative and the sign bit of a positive float;
# then invert for falling order. The row fills the low half, which breaks ties by row for free.


@kernel(inline=True)
def key_of(bits: np.uint32, row: np.int32) -> np.uint64:
    """Sortable key of a candidate from the similarity's float32 bits and its row."""
    high = bits if bits & np.uint32(0x80000000) else bits ^ np.uint32(0x7FFFFFFF)
    return (np.uint64(high) << np.uint64(32)) | np.uint64(np.uint32(row))


@kernel(inline=True)
def similarity_of(key: np.uint64) -> np.float32:
    """The similarity in a key."""
    high = np.uint32(key >> np.uint64(32))
    bits = high if high & np.uint32(0x80000000) else high ^ np.uint32(0x7FFFFFFF)
    return np.uint32(bits).view(np.float32)


def encode(similarities: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """uint64 keys of (float32 similarities, int32 rows): ascending keys are falling similarity, ties by rising row."""
    bits = (np.ascontiguousarray(similarities, np.float32) + np.float32(0)).view(np.uint32)
    high = np.where(bits & 0x80000000, bits, bits ^ np.uint32(0x7FFFFFFF))
    return (high.astype(np.uint64) << np.uint64(32)) | np.asarray(rows, np.int32).view(np.uint32).astype(np.uint64)


def decode(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float32 similarities, int32 rows) of `encode`d keys."""
    high = (keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(high & 0x80000000, high, high ^ np.uint32(0x7FFFFFFF)).astype(np.uint32)
    return bits.view(np.float32), keys.astype(np.uint32).view(np.int32)


@kernel(inline=True)
def room_for(k: int) -> int:
    """Candidates that a slot holds before it falls back to its k best. A half more than k: memory that is touched for the first
    time can cost a second a gigabyte (in a virtual machine that gives back what is free), and with twice k the buffers are
    most of a search's; where every row is full, with half of k a search takes a tenth longer than with twice k."""
    return k + k // 2 + 1


@kernel(allocates=False)
def select_smallest(a: np.ndarray, first: int, n: int, k: int) -> None:
    """Reorder a[first:first + n] so that its k smallest come first, the k-th of them at a[first + k - 1].

    Quickselect with Lomuto's partition, whose loop has no branch to guess wrong (2.5 times as fast as Hoare's on 100 keys);
    meant for distinct keys: many equal ones cost it quadratic time. `allocates=False`: numba counts no references here; these
    atomic additions, one a push, were half of a tile's time beside its product.
    """
    low, high, want = first, first + n - 1, first + k - 1
    while low < high:
        middle = (low + high) >> 1
        x, y, z = a[low], a[middle], a[high]
        at = high
        if (x < y) != (x < z):
            at = low
        elif (y < x) != (y < z):
            at = middle
        pivot = a[at]
        a[at] = a[high]
        a[high] = pivot
        i = low
        for j in range(low, high):
            v = a[j]
            a[j] = a[i]
            a[i] = v
            i += int(v < pivot)
        a[high] = a[i]
        a[i] = pivot
        if want < i:
            high = i - 1
        elif want > i:
            low = i + 1
        else:
            return


class Buffers(NamedTuple):
    """Bounded candidate lists of n rows, one slot a row.

    keys: uint64[n * r], r = `room_for(k)` a row, of which counts[i] are in use; counts: int32[n]; thresholds: float32[n], the
    similarity below which a candidate cannot enter row i any more: the given threshold at first, the running k-th best later.
    The memory is reserved here but touched only as candidates arrive.
    """

    keys: np.ndarray
    counts: np.ndarray
    thresholds: np.ndarray
    k: int

    @classmethod
    def empty(cls, n: int, k: int, threshold: float | None, keys: np.ndarray | None = None) -> Buffers:
        """Without a candidate; keys: memory for them, uint64[n * room_for(k)], if it is not to be new."""
        lowest = np.float32(-np.inf if threshold is None else threshold)
        keys = keys if keys is not None else np.empty(n * room_for(k), np.uint64)
        return cls(keys, np.zeros(n, np.int32), np.full(n, lowest), k)

    def resized(self, n: int) -> Buffers:
        """The same lists with room for n rows; the contents of new ones are undefined until `clear`ed."""
        more = Buffers.empty(n - len(self.counts), self.k, None)
        return Buffers(
            np.concatenate([self.keys, more.keys]),
            np.concatenate([self.counts, more.counts]),
            np.concatenate([self.thresholds, more.thresholds]),
            self.k,
        )

    def clear(self, first: int, threshold: float | None) -> None:
        """Empty the lists from slot `first` on."""
        self.counts[first:] = 0
        self.thresholds[first:] = np.float32(-np.inf if threshold is None else threshold)

    def extend(self, slots: np.ndarray, offsets: np.ndarray, keys: np.ndarray) -> None:
        """Add candidates: `keys[offsets[i]:offsets[i + 1]]` to slot slots[i]."""
        _extend(self, slots, offsets, keys)

    def take(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(offsets int64[len(slots) + 1], keys uint64[...]) of the slots' at most k best candidates, unsorted."""
        counts = np.minimum(self.counts[slots], self.k)
        offsets = np.zeros(len(slots) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        out = np.empty(offsets[-1], np.uint64)
        _take(self, slots, offsets, out)
        return offsets, out


@kernel(allocates=False)
def push(buffers: Buffers, slot: int, key: np.uint64) -> None:
    """Add a candidate to a slot; a full slot falls back to its k best and raises its threshold to the k-th of them."""
    keys, counts, k = buffers.keys, buffers.counts, buffers.k
    c = counts[slot]
    first = slot * room_for(k)
    keys[first + c] = key
    c += 1
    if c == room_for(k):
        select_smallest(keys, first, c, k)
        c = k
        buffers.thresholds[slot] = similarity_of(keys[first + k - 1])
    counts[slot] = c


@kernel(allocates=False)
def push_new(buffers: Buffers, slot: int, key: np.uint64) -> None:
    """`push`, unless the slot holds this very key. One that it held and dropped ranks behind the k best: it may come again."""
    first = slot * room_for(buffers.k)
    for i in range(buffers.counts[slot]):
        if buffers.keys[first + i] == key:
            return
    push(buffers, slot, key)


@kernel(allocates=False)
def _extend(buffers: Buffers, slots: np.ndarray, offsets: np.ndarray, new: np.ndarray) -> None:
    for i in range(len(slots)):
        for j in range(offsets[i], offsets[i + 1]):
            push(buffers, slots[i], new[j])


@kernel(allocates=False)
def _take(buffers: Buffers, slots: np.ndarray, offsets: np.ndarray, out: np.ndarray) -> None:
    keys, k = buffers.keys, buffers.k
    for i in range(len(slots)):
        slot = slots[i]
        n = buffers.counts[slot]
        if n > k:
            select_smallest(keys, slot * room_for(k), n, k)
        begin = offsets[i]
        for j in range(offsets[i + 1] - begin):
            out[begin + j] = keys[slot * room_for(k) + j]


@kernel(allocates=False)
def _scatter(rows: np.ndarray, offsets: np.ndarray, keys: np.ndarray, cursor: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(rows)):
        at = cursor[rows[i]]
        for j in range(offsets[i], offsets[i + 1]):
            out[at] = keys[j]
            at += 1
        cursor[rows[i]] = at


@kernel
def _finish(
    begin: np.ndarray, pool: np.ndarray, k: int, counts: np.ndarray, neighbors: np.ndarray, similarities: np.ndarray
) -> int:
    # They fill from the front: what duplicates leave free is given to the next row.
    at = 0
    for i in range(len(begin) - 1):
        mine = pool[begin[i] : begin[i + 1]]
        mine.sort()
        first = at
        for j in range(len(mine)):
            if at - first == k:
                break
            if j == 0 or mine[j] != mine[j - 1]:
                neighbors[at] = np.int32(np.uint32(mine[j] & np.uint64(0xFFFFFFFF)))
                similarities[at] = similarity_of(mine[j])
                at += 1
        counts[i] = at - first
    return at


CandidateList = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(rows int32[r], offsets int64[r + 1], keys uint64[...]): candidates `keys[offsets[i]:offsets[i + 1]]` of row rows[i]."""


def merge(lists: list[CandidateList], n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k best candidates of each of the rows 0..n-1 over several candidate lists, in order.

    lists: unsorted within a row, no row twice in one list. The same candidate may come from several lists; it must then have
    the same similarity, to the bit.
    Returns (offsets int64[n + 1], rows int32[m], similarities float32[m]), by falling similarity, ties by row.
    """
    counts = np.zeros(n, np.int64)
    for rows, offsets, _ in lists:
        counts[rows] += np.diff(offsets)
    begin = np.zeros(n + 1, np.int64)
    np.cumsum(counts, out=begin[1:])
    pool = np.empty(begin[-1], np.uint64)
    cursor = begin[:-1].copy()
    for rows, offsets, keys in lists:
        _scatter(rows, offsets, keys, cursor, pool)
    most = int(np.minimum(counts, k).sum())
    neighbors, similarities = np.empty(most, np.int32), np.empty(most, np.float32)
    used = _finish(begin, pool, k, counts, neighbors, similarities)
    out_offsets = np.zeros(n + 1, np.int64)
    np.cumsum(counts, out=out_offsets[1:])
    return out_offsets, neighbors[:used], similarities[:used]
