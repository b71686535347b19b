"""The searches on a GPU: a real one where there is one, and always a stand-in with the signatures of faiss's GPU classes."""

from __future__ import annotations

import importlib
import itertools
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from faceflow.kernels.ivf import probing, quantizer
from faceflow.kernels.knn import tile_search, topk
from faceflow.kernels.knn.topk import Buffers


class _Resources:
    made = 0

    def __init__(self) -> None:
        _Resources.made += 1


class _Config:
    useFloat16 = False  # noqa: N815 - faiss's name


class _Index:
    """`faiss.GpuIndexFlatIP(resources, dim, config)`: as on a device, each query gets its k best, -1 where there are fewer."""

    def __init__(self, resources: _Resources, dim: int, config: _Config) -> None:
        assert isinstance(resources, _Resources)
        self._members = np.empty((0, dim), np.float32)

    def add(self, members: np.ndarray) -> None:
        assert members.dtype == np.float32
        assert members.flags.c_contiguous
        self._members = np.concatenate([self._members, members])

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        assert 1 <= k <= 2048
        product = queries @ self._members.T
        best = np.argsort(-product, axis=1, kind="stable")[:, :k]
        results = np.full((len(queries), k), -1, np.int64)
        similarities = np.full((len(queries), k), -np.inf, np.float32)
        results[:, : best.shape[1]] = best
        similarities[:, : best.shape[1]] = np.take_along_axis(product, best, axis=1)
        return similarities, results


def _knn(resources: _Resources, queries: np.ndarray, members: np.ndarray, k: int, metric: int) -> Any:
    index = _Index(resources, members.shape[1], _Config())
    index.add(members)
    return index.search(queries, k)


@pytest.fixture(params=["stand-in", pytest.param("device", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """faceflow's GPU kernels, and how often faiss's GPU resources are made, for the stand-in."""
    name = "faceflow.kernels.knn.gpu_search"
    if request.param == "device":
        module = pytest.importorskip(name)
        module.check_device()
        yield module
        return
    faiss = types.ModuleType("faiss")
    members = {
        "StandardGpuResources": _Resources, "GpuIndexFlatConfig": _Config, "GpuIndexFlatIP": _Index, "knn_gpu": _knn,
        "METRIC_INNER_PRODUCT": 0,
    }  # fmt: skip
    faiss.__dict__.update(members)
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    monkeypatch.delitem(sys.modules, name, raising=False)
    _Resources.made = 0
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def faces(count: int, dim: int, people: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((people, dim))
    x = centers[np.sort(rng.integers(0, people, count))] + 0.8 * rng.standard_normal((count, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def sets_of(table: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[dict[int, float]]:
    offsets, rows, values = table
    results = [dict(zip(rows[a:b].tolist(), values[a:b].tolist(), strict=True)) for a, b in itertools.pairwise(offsets)]
    assert all(len(item) == b - a for item, (a, b) in zip(results, itertools.pairwise(offsets), strict=True))  # no pair twice
    return results


def same(x: np.ndarray, ours: Any, theirs: Any, k: int, threshold: float | None) -> None:
    """Two tables hold the same neighbors, but for ties with the threshold, or with the last of a full list."""
    for i, (mine, other) in enumerate(zip(sets_of(ours), sets_of(theirs), strict=True)):
        last = min(mine.values(), default=0.0) if len(mine) >= k else (threshold if threshold is not None else -2.0)
        odd = set(mine) ^ set(other)
        assert all(abs(float(x[i] @ x[j]) - last) < 2e-6 for j in odd), (i, odd)


@pytest.mark.parametrize("threshold", [0.3, None])
def test_the_exact_plan_finds_what_the_cpu_finds(gpu: Any, threshold: float | None) -> None:
    x, k = faces(2_000, 32, 60, seed=9), 9
    blocks = list(tile_search.blocks_of(len(x), 300))
    assert len(blocks) > 5
    tables = []
    for engine in (tile_search, gpu):
        lists: list[Any] = []

        def take(first: int, offsets: np.ndarray, keys: np.ndarray, lists: list[Any] = lists) -> None:
            lists.append((np.arange(first, first + len(offsets) - 1, dtype=np.int32), offsets, keys))

        for i, (begin, end) in enumerate(blocks):
            ring = tile_search.ring(i, len(blocks))[1:] if engine is tile_search else [j for j in range(len(blocks)) if j != i]
            others = [(blocks[j][0], x[slice(*blocks[j])]) for j in ring]
            engine.search_blocks(x[begin:end], begin, others, k, threshold, take)
        tables.append(topk.merge(lists, len(x), k))
    same(x, *tables, k, threshold)
    assert _Resources.made <= 1


@pytest.mark.parametrize(("k", "threshold"), [(9, 0.3), (200, 0.3), (9, None)])
def test_the_cells_plan_finds_what_the_cpu_finds(gpu: Any, k: int, threshold: float | None) -> None:
    """Many cells, and faces that probe different numbers of them: a pair that one side's probes find serves both."""
    x = faces(3_000, 32, 90, seed=8)
    centroids, _ = quantizer.train(x, 60, seed=0, threads=1)
    probes = probing.probe(x, centroids, probing.ProbeRule(0.15, 6))
    counts = np.diff(probes[0])
    assert counts.min() == 1
    assert counts.max() > 2
    rows = np.arange(len(x), dtype=np.int32)
    tables = []
    for engine in (tile_search, gpu):
        lists = []
        for cells in (range(25), range(25, 60)):
            selected = np.flatnonzero(_probe_any(probes, cells))
            mine = _of(probes, selected)
            buffers: Buffers = engine.search_cells(np.ascontiguousarray(x[selected]), rows[selected], mine, cells, k, threshold)
            lists.append((selected.astype(np.int32), *buffers.take(np.arange(len(selected)))))
        tables.append(topk.merge(lists, len(x), k))
    if threshold is not None:
        same(x, *tables, k, threshold)
    # Without a threshold no visitors are joined, and both engines find exactly the pairs of which one side probes the other's
    # home.
    homes = probes[1][probes[0][:-1]]
    probed = [set(probes[1][a:b].tolist()) for a, b in itertools.pairwise(probes[0])]
    results = sets_of(tables[1])
    product = x @ x.T
    for i in range(0, len(x), 37):
        near = np.argsort(-product[i])
        met = [j for j in near.tolist() if j != i and (homes[j] in probed[i] or homes[i] in probed[j])]
        met = [j for j in met if threshold is None or product[i, j] >= threshold + 2e-6][: k - 1]
        missed = [j for j in met if j not in results[i]]
        assert not missed, (i, missed)
    assert _Resources.made <= 1


def _probe_any(probes: tile_search.Probes, cells: range) -> np.ndarray:
    inside = np.concatenate([[0], np.cumsum((probes[1] >= cells.start) & (probes[1] < cells.stop))])
    return np.diff(inside[probes[0]]) > 0


def _of(probes: tile_search.Probes, rows: np.ndarray) -> tile_search.Probes:
    lists = [probes[1][probes[0][i] : probes[0][i + 1]] for i in rows.tolist()]
    return np.concatenate([[0], np.cumsum([len(item) for item in lists])]), np.concatenate(lists)
