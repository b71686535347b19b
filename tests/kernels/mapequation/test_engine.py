"""Our engine against the infomap package, against exhaustive search, and on degenerate graphs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from faceflow.errors import InputError
from faceflow.kernels.graph import csr
from faceflow.kernels.mapequation import flow as flows
from faceflow.kernels.mapequation import greedy, infomap_package
from faceflow.kernels.mapequation import two_level as mapequation
from faceflow.tables import EdgeList

Links = list[tuple[int, int, float]]


def compressed(links: Links, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    s, t, w = (np.array([link[i] for link in links]) for i in range(3)) if links else (np.empty(0, int),) * 3
    order = np.argsort(s, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(s.astype(int), minlength=n))]).astype(np.int64)
    return offsets, t[order].astype(np.int32), w[order].astype(np.float32)


def edge_list(links: Links, n: int) -> EdgeList:
    return EdgeList(0, *compressed(links, n))


def random_links(n: int, m: int, seed: int, dangling: bool = True) -> Links:
    rng = np.random.default_rng(seed)
    s, t = rng.integers(n // 8 if dangling else 0, n, m), rng.integers(0, n, m)
    w = np.float32(rng.random(m) + 0.01)
    return [(int(a), int(b), float(c)) for a, b, c in zip(s, t, w, strict=True) if a != b]


def planted(groups: int, size: int, seed: int) -> Links:
    rng = np.random.default_rng(seed)
    n = groups * size
    inside = [
        (a, g * size + int(rng.integers(size)))
        for g in range(groups)
        for a in range(g * size, g * size + size)
        for _ in range(6)
    ]
    across = [(int(a), int(b)) for a, b in rng.integers(0, n, (n, 2))]
    return [(a, b, float(np.float32(rng.random() + 0.1))) for a, b in {*inside, *across} if a != b]


GRAPHS = {
    "random": (random_links(60, 300, 1), 60),
    "random without dangling rows": (random_links(300, 3000, 2, False), 300),
    "sparse": (random_links(500, 700, 3), 500),
    "planted": (planted(30, 12, 4), 360),
    "two cliques": ([(a, b, 1.0) for g in (range(5), range(5, 10)) for a in g for b in g if a != b] + [(0, 5, 0.2)], 10),
    "star": ([(0, i, 1.0) for i in range(1, 12)] + [(i, 0, 1.0) for i in range(1, 12)], 12),
    "outward star": ([(0, i, 1.0) for i in range(1, 12)], 12),
    "disconnected": (planted(3, 8, 5) + [(a + 40, b + 40, w) for a, b, w in planted(3, 8, 6)], 70),
    "ring": ([(i, (i + 1) % 20, 1.0) for i in range(20)], 20),
    "equal weights": ([(a, b, 1.0) for a, b, _ in random_links(80, 400, 7)], 80),
    "tiny weights": ([(a, b, float(np.float32(w * 1e-12))) for a, b, w in random_links(80, 400, 8)], 80),
    "one edge": ([(0, 1, 0.5)], 3),
    "self loops": ([*random_links(40, 150, 9), (3, 3, 2.0), (17, 17, 0.5)], 40),
}


REFERENCE = """
import json, sys
import infomap, numpy as np
out = {}
for name, links in json.load(sys.stdin).items():
    network = infomap.Network()
    network.add_links(np.array(links, float))
    for directed in (True, False):
        result = infomap.run(network, two_level=True, directed=directed, num_trials=1, seed=1)
        flow = {node.node_id: node.flow for node in result.nodes()}
        found = {"codelength": result.codelength, "flow": flow, "modules": result.modules()}
        out[name if directed else "undirected " + name] = found
json.dump(out, sys.stdout)
"""


@pytest.fixture(scope="module")
def package() -> dict[str, Any]:
    """The package's flow, codelength (one trial) and modules of every graph, from a process of its own: where faiss is
    imported, infomap's node iterator crashes, as both are SWIG modules that share one table of iterator types."""
    given = json.dumps({name: links for name, (links, _) in GRAPHS.items()})
    done = subprocess.run([sys.executable, "-c", REFERENCE], input=given, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("directed", [True, False], ids=["directed", "undirected"])
@pytest.mark.parametrize("name", GRAPHS)
def test_flow_and_codelength_equal_the_package(name: str, directed: bool, package: dict[str, Any]) -> None:
    (links, n), reference = GRAPHS[name], package[name if directed else "undirected " + name]
    theirs = np.zeros(n)
    for row, visits in reference["flow"].items():
        theirs[int(row)] = visits
    graph = csr.build_graph([compressed(links, n)])
    if not directed:
        graph = csr.symmetric(graph)
    ours = flows.directed_flow(graph) if directed else flows.undirected_flow(graph)
    np.testing.assert_allclose(ours.rows, theirs, atol=1e-9)
    modules = n + np.arange(n)
    for row, module in reference["modules"].items():
        modules[int(row)] = module
    assert mapequation.codelength(graph, ours, modules) == pytest.approx(reference["codelength"], abs=1e-9)
    results = mapequation.detect([compressed(links, n)], directed=directed)
    assert results.codelength <= reference["codelength"] * 1.0001 + 1e-12
    score = infomap_package.score([edge_list(links, n)], results.modules, directed=directed)
    assert score == pytest.approx(results.codelength, abs=1e-9)


def test_many_blocks_and_threads_make_the_same_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    links = planted(80, 15, 6)
    parts = [compressed(links, 1200)]
    reference = mapequation.detect(parts).codelength
    monkeypatch.setattr(greedy, "BLOCK_UNITS", 100)  # eleven blocks, whose borders cut through clusters
    one, two = mapequation.detect(parts, threads=1), mapequation.detect(parts, threads=2)
    np.testing.assert_array_equal(one.modules, two.modules)
    assert one.codelength == two.codelength <= reference * 1.0001


def test_transposed_twice_is_the_graph_itself() -> None:
    offsets, targets, weights = compressed(random_links(200, 3000, 3), 200)
    back = csr.transpose(*csr.transpose(offsets, targets, weights))
    matrix = [sparse.csr_matrix((w, t, o), shape=(200, 200)) for o, t, w in ((offsets, targets, weights), back)]
    assert (matrix[0] != matrix[1]).nnz == 0
    in_offsets, sources, _ = csr.transpose(offsets, targets, weights)
    assert all((np.diff(sources[a:b]) >= 0).all() for a, b in zip(in_offsets[:-1], in_offsets[1:], strict=True))


def partitions(n: int) -> list[list[int]]:
    out = [[0]]
    for _ in range(n - 1):
        out = [[*p, m] for p in out for m in range(max(p) + 2)]
    return out


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(0, 10_000))
def test_small_graphs_reach_the_exhaustive_optimum(n: int, seed: int) -> None:
    links = random_links(n, 3 * n, seed, dangling=False)
    if not links:
        return
    graph = csr.build_graph([compressed(links, n)])
    flow = flows.directed_flow(graph)
    best = min(mapequation.codelength(graph, flow, np.array(p)) for p in partitions(n))
    assert mapequation.optimize(graph, flow)[1] == pytest.approx(best, abs=1e-6)


def test_threads_seeds_and_trials() -> None:
    parts = [compressed(planted(60, 15, 1), 900)]
    one, two = mapequation.detect(parts, threads=1), mapequation.detect(parts, threads=2)
    np.testing.assert_array_equal(one.modules, two.modules)
    assert one.codelength == two.codelength
    assert mapequation.detect(parts, trials=4).codelength <= one.codelength


def test_blocks_of_rows_are_one_graph() -> None:
    offsets, targets, weights = compressed(planted(10, 10, 2), 100)
    cut = [
        (offsets[a : b + 1] - offsets[a], targets[offsets[a] : offsets[b]], weights[offsets[a] : offsets[b]])
        for a, b in ((0, 30), (30, 100))
    ]
    np.testing.assert_array_equal(mapequation.detect(cut).modules, mapequation.detect([(offsets, targets, weights)]).modules)


def test_warm_start_repairs_what_changed() -> None:
    links, n = planted(40, 15, 3), 600
    graph = csr.build_graph([compressed(links, n)])
    flow = flows.directed_flow(graph)
    best, length = mapequation.optimize(graph, flow)
    disturbed = best.copy()
    moved = np.arange(0, 600, 50)
    disturbed[moved] = disturbed[moved - 20]
    again, repaired = mapequation.optimize(graph, flow, start=disturbed, active=moved)
    assert repaired <= length * (1 + 1e-4)
    unchanged, same = mapequation.optimize(graph, flow, start=best, active=np.empty(0, int))
    np.testing.assert_array_equal(unchanged, best)
    assert same == length
    warm = flows.directed_flow(graph, start=flow.rows)
    assert warm.iterations <= flow.iterations
    np.testing.assert_allclose(warm.rows, flow.rows, atol=1e-10)
    assert len(again) == n


def test_no_edges_zero_weights_and_no_rows() -> None:
    nothing = mapequation.detect([compressed([], 4)])
    assert sorted(nothing.modules) == [0, 1, 2, 3]
    assert nothing.codelength == 0
    zero = mapequation.detect([compressed([(0, 1, 0.0), (1, 2, 1.0), (2, 1, 1.0)], 4)])
    assert zero.modules[1] == zero.modules[2]
    assert len(set(zero.modules)) == 3
    assert len(mapequation.detect([(np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))]).modules) == 0


@pytest.mark.parametrize(
    ("link", "message"), [((0, 9, 1.0), "only 3 rows"), ((0, 1, -1.0), "not negative"), ((0, 1, np.nan), "finite")]
)
def test_bad_edges(link: tuple[int, int, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mapequation.detect([compressed([link], 3)])


def test_library_call_takes_matrices_and_arrays() -> None:
    from faceflow import map_equation

    links = planted(12, 8, 4)
    sources, targets, weights = (np.array([link[i] for link in links]) for i in range(3))
    matrix = sparse.coo_matrix((weights, (sources, targets)), shape=(96, 96))
    a, b = map_equation(matrix), map_equation((sources, targets), weights, rows=96)
    assert a.codelength == pytest.approx(b.codelength, abs=1e-9)
    assert len(set(zip(a.modules, b.modules, strict=True))) == a.modules.max() + 1 == b.modules.max() + 1
    assert map_equation((np.array([0, 1, 2, 3]), np.array([1, 0, 3, 2]))).modules.tolist() == [0, 0, 1, 1]
    with pytest.raises(InputError, match="square"):
        map_equation(sparse.csr_matrix((2, 3)))
    with pytest.raises(InputError, match="one of each per edge"):
        map_equation((sources, targets[:-1]))
    with pytest.raises(InputError, match="rows 0"):
        map_equation((np.array([0, 5]), np.array([1, 1])), rows=3)


def dense_flow(links: list[tuple[int, int, float]], n: int) -> np.ndarray:
    matrix = np.zeros((n, n))
    for source, target, weight in links:
        matrix[source, target] += np.float32(weight)
    strength = matrix.sum(axis=1)
    walk = np.divide(matrix, strength[:, None], out=np.zeros_like(matrix), where=strength[:, None] > 0)
    jump = strength / strength.sum()
    visits = np.linalg.solve(np.eye(n) - 0.85 * (walk.T + np.outer(jump, strength == 0)), 0.15 * jump)
    rows = walk.T @ visits
    return rows / rows.sum()


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.floats(0.5, 8))
def test_flow_is_the_stationary_one_and_continues_from_itself(seed: int, n: int, degree: float) -> None:
    """Also with rows that lead nowhere, rows that nothing leads to, and clusters that hardly touch."""
    rng = np.random.default_rng(seed)
    links = [
        (i, int(j), float(rng.uniform(1e-3, 1) ** 3))
        for i in range(n)
        for j in rng.choice(n, min(n - 1, rng.poisson(degree)), replace=False)
        if i != j and (i % 2 == int(j) % 2 or rng.uniform() < 0.1)
    ]
    if not links:
        return
    graph = csr.build_graph([compressed(links, n)])
    flow = flows.directed_flow(graph)
    np.testing.assert_allclose(flow.rows, dense_flow(links, n), atol=1e-10)
    again = flows.directed_flow(graph, start=flow.rows)
    assert again.iterations <= 5
    np.testing.assert_allclose(again.rows, flow.rows, atol=1e-10)


def test_flow_of_many_pairs_converges() -> None:
    """The walk alternates between two rows that have only each other: a mode of eigenvalue -1, which extrapolation
    would blow up."""
    rng = np.random.default_rng(0)
    rows, sources, targets, weights = 120, [], [], []
    for i in range(0, 100, 2):
        sources += [i, i + 1]
        targets += [i + 1, i]
        weights += [1.0, 1.0]
    for i in range(100, 120):
        for j in rng.choice(np.delete(np.arange(100, 120), i - 100), 5, replace=False):
            sources.append(i)
            targets.append(int(j))
            weights.append(float(rng.uniform(0.001, 1)) ** 3)
    weights[0] = 0.2  # an uneven pair
    matrix = np.zeros((rows, rows))
    matrix[sources, targets] = np.array(weights, np.float32)
    strength = matrix.sum(axis=1)
    walk = matrix / strength[:, None]
    visits = np.linalg.solve(np.eye(rows) - 0.85 * walk.T, 0.15 * strength / strength.sum())
    expected = walk.T @ visits
    offsets = np.concatenate([[0], np.cumsum((matrix > 0).sum(axis=1))])
    ends = np.nonzero(matrix)
    results = flows.directed_flow(csr.build_graph([(offsets, ends[1].astype(np.int32), matrix[ends].astype(np.float32))]))
    assert results.iterations < 180
    np.testing.assert_allclose(results.rows, expected / expected.sum(), atol=1e-11)
