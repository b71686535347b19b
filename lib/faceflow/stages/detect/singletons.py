"""Singletons that are significantly near to a cluster are assigned to it (`kernels.clusters.singletons`); strangers stay
single."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from faceflow.kernels.clusters import singletons
from faceflow.kernels.mapequation.flow import use_threads
from faceflow.stages.artifacts.faces import RunData, read_vectors

FEWEST_FACES = 5
"""Of a module that singletons may be assigned to: the mean of fewer says little."""

MOST_MEMBERS = 32
"""Faces of a module that its mean is taken from; more change it little, and would have to be read."""

TRIED_FIRST = 4_096
"""Of more singletons, as many are tried first; if hardly any is assigned, they are strangers, and it ends there."""

HARDLY_ANY = 0.01

BLOCK_FACES = 1_024
"""Compared with all modules at once. Blocks are cut by data and multiplied by one thread each, so that the result does not
depend on the number of threads."""


def assign(data: RunData, modules: np.ndarray, seed: int, threads: int) -> tuple[np.ndarray, int, int]:
    """(modules int64[N] with singletons assigned, singletons before, assigned)."""
    sizes = np.bincount(modules)
    heads = np.flatnonzero(sizes >= FEWEST_FACES)
    single = np.flatnonzero(sizes[modules] == 1)
    if len(heads) < singletons.SPACINGS + 2 or len(single) == 0:
        return modules, len(single), 0
    use_threads(threads)
    means = _means(data, modules, heads, len(sizes))
    nearest, p = np.empty(len(single), np.int64), np.ones(len(single))
    left = np.ones(len(single), bool)
    if len(single) > 2 * TRIED_FIRST:
        tried = np.sort(np.random.default_rng([seed, 9]).choice(len(single), TRIED_FIRST, replace=False))
        nearest[tried], p[tried] = _compare(data, single[tried], means, threads)
        if singletons.accepted(p[tried]).mean() < HARDLY_ANY:
            return modules, len(single), 0
        left[tried] = False
    nearest[left], p[left] = _compare(data, single[left], means, threads)
    taken = singletons.accepted(p)
    modules = modules.copy()
    modules[single[taken]] = heads[nearest[taken]]
    return modules, len(single), int(taken.sum())


def _means(data: RunData, modules: np.ndarray, heads: np.ndarray, count: int) -> np.ndarray:
    """Unit mean float32[h, d] of each of these modules; parts are read until all have members enough."""
    run, parts, dim = data.store, data.parts, data.dim
    number = np.full(count, -1)
    number[heads] = np.arange(len(heads))
    wanted = np.minimum(np.bincount(modules, minlength=count)[heads], MOST_MEMBERS)
    sums, seen = np.zeros((len(heads), dim)), np.zeros(len(heads), np.int64)
    for part in range(len(parts)):
        owner = number[modules[parts.starts[part] : parts.starts[part + 1]]]
        if (seen[owner[owner >= 0]] < wanted[owner[owner >= 0]]).any():
            singletons.add_members(sums, seen, read_vectors(run, part, dim), owner, MOST_MEMBERS)
    return np.asarray(sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12), np.float32)


def _compare(
    data: RunData, rows: np.ndarray, means: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """`kernels.clusters.singletons.margins` of these rows int64[n], ascending."""
    run, parts, dim = data.store, data.parts, data.dim

    def blocks() -> Iterator[np.ndarray]:
        cuts = np.searchsorted(rows, parts.starts)
        for part in np.flatnonzero(np.diff(cuts)).tolist():
            selected = rows[cuts[part] : cuts[part + 1]] - parts.starts[part]
            vectors = read_vectors(run, part, dim)
            for begin in range(0, len(selected), BLOCK_FACES):
                yield vectors[selected[begin : begin + BLOCK_FACES]]

    results: list[tuple[np.ndarray, np.ndarray]] = []
    with threadpool_limits(limits=1), ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
        for block in blocks():  # a few at a time: each holds its vectors
            waiting.append(pool.submit(singletons.margins, block, means))
            if len(waiting) > 2 * threads:
                results.append(waiting.popleft().result())
        results += [item.result() for item in waiting]
    return tuple(np.concatenate(columns) for columns in zip(*results, strict=True))  # type: ignore[return-value]
