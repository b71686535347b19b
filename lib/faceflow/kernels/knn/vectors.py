"""Row-wise checks and normalisation of embeddings."""

from __future__ import annotations

import numpy as np

from faceflow.kernels.compiled import kernel

FINE, NOT_FINITE, ZERO = 0, 1, 2
"""Verdicts of `normalize_rows`, per row."""


@kernel
def _normalize(x: np.ndarray, verdict: np.ndarray) -> None:
    n, d = x.shape
    for i in range(n):
        largest = 0.0
        bad = False
        for j in range(d):
            a = abs(x[i, j])
            bad |= not (a < np.inf)
            largest = max(largest, a)
        if bad:
            verdict[i] = 1
            continue
        if largest == 0.0:
            verdict[i] = 2
            continue
        # Scaling by the largest entry first keeps the squares of huge and tiny embeddings in range.
        total = 0.0
        scale = 1.0 / float(largest)
        for j in range(d):
            v = float(x[i, j]) * scale
            total += v * v
        factor = scale / np.sqrt(total)
        for j in range(d):
            x[i, j] = x[i, j] * factor


def normalize_rows(x: np.ndarray) -> np.ndarray:
    """Scale each row of `x` to length 1, in place, and say which rows cannot be scaled.

    x: float32 or float64 [n, d], C-contiguous, overwritten; rows that cannot be scaled stay as they are.
    Returns uint8[n]: FINE, NOT_FINITE (a NaN or an infinity) or ZERO (no direction).
    Sums run in float64 in index order, so a row's result does not depend on the rows around it.
    """
    verdict = np.zeros(len(x), np.uint8)
    if x.size:
        _normalize(x, verdict)
    return verdict


def hash_rows(x: np.ndarray) -> np.ndarray:
    """uint64[n]: a hash of each row's bits, to tell whether an embedding is the one that was there before.

    x: float32[n, d]. A random odd multiplier for each dimension (from a fixed seed), summed modulo 2**64.
    """
    multipliers = np.random.default_rng(20261123).integers(0, 2**63, x.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    out = np.empty(len(x), np.uint64)
    for begin in range(0, len(x), 4096):
        out[begin : begin + 4096] = (x[begin : begin + 4096].view(np.uint32) * multipliers).sum(axis=1, dtype=np.uint64)
    return out
