"""Both search plans against a float64 oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceflow.kernels.ivf import neighbor_join, probing, quantizer
from faceflow.kernels.knn import incremental_search, tile_kernel, tile_search, topk

THRESHOLDS = [None, 0.3, -0.2]


def unit(n: int, dim: int, seed: int, spread: float = 0.7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((max(1, n // 12), dim))
    x = centers[rng.integers(0, len(centers), n)] + spread * rng.standard_normal((n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def oracle(x: np.ndarray, k: int, threshold: float | None) -> list[set[int]]:
    s = x.astype(np.float64) @ x.astype(np.float64).T
    np.fill_diagonal(s, -np.inf)
    out = []
    for i in range(len(x)):
        order = np.lexsort((np.arange(len(x)), -s[i]))[:k]
        out.append({int(j) for j in order if j != i and (threshold is None or s[i, j] >= threshold)})
    return out


def exact(x: np.ndarray, k: int, threshold: float | None, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blocks = list(tile_search.blocks_of(len(x), block))
    lists = []
    for i, (begin, end) in enumerate(blocks):
        others = ((blocks[b][0], x[slice(*blocks[b])]) for b in tile_search.ring(i, len(blocks))[1:])

        def take(first: int, offsets: np.ndarray, keys: np.ndarray) -> None:
            rows = np.arange(first, first + len(offsets) - 1, dtype=np.int32)
            lists.append((rows, offsets, keys))

        tile_search.search_blocks(x[begin:end], begin, others, k, threshold, take)
    return topk.merge(lists, len(x), k)


def check_table(x: np.ndarray, table: tuple[np.ndarray, np.ndarray, np.ndarray], k: int, threshold: float | None) -> None:
    offsets, rows, similarities = table
    for i, want in enumerate(oracle(x, k, threshold)):
        selected = slice(offsets[i], offsets[i + 1])
        got, s = rows[selected].tolist(), similarities[selected]
        assert i not in got
        assert len(set(got)) == len(got)
        assert (np.diff(s) <= 0).all()
        exact_s = x[got].astype(np.float64) @ x[i].astype(np.float64)
        np.testing.assert_allclose(s, exact_s, atol=1e-5)
        # The same set, but for faces tied at the cut to within rounding.
        edge = min(exact_s, default=-2.0) if len(got) == k else (threshold if threshold is not None else -2.0)
        for j in set(got) ^ want:
            assert abs(float(x[j].astype(np.float64) @ x[i].astype(np.float64)) - edge) < 1e-5


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize(("n", "block"), [(1, 10), (2, 1), (300, 300), (300, 70), (301, 43), (700, 300)])
def test_exact_plan_finds_what_float64_finds(n: int, block: int, threshold: float | None) -> None:
    x = unit(n, 24, seed=n)
    check_table(x, exact(x, 9, threshold, block), 9, threshold)


@pytest.mark.parametrize("blocks", range(1, 12))
def test_ring_meets_every_pair_of_blocks_once(blocks: int) -> None:
    pairs = [frozenset((i, j)) for i in range(blocks) for j in tile_search.ring(i, blocks)]
    assert len(pairs) == len(set(pairs)) == blocks * (blocks + 1) // 2


def cells_tables(  # type: ignore[no-untyped-def]
    x: np.ndarray, probes: tile_search.Probes, cells: int, shards: int, k: int, threshold: float | None
):
    lists = []
    offsets, flat = probes
    owner = np.repeat(np.arange(len(x)), np.diff(offsets))
    for shard in range(shards):
        span = range(cells * shard // shards, cells * (shard + 1) // shards)
        selected = np.unique(owner[(flat >= span.start) & (flat < span.stop)])
        counts = np.diff(offsets)[selected]
        mine = (
            np.concatenate([[0], np.cumsum(counts)]),
            np.concatenate([flat[offsets[i] : offsets[i + 1]] for i in selected] or [flat[:0]]),
        )
        results = tile_search.search_cells(
            np.ascontiguousarray(x[selected]), selected.astype(np.int32), mine, span, k, threshold
        )
        lists.append((selected.astype(np.int32), *results.take(np.arange(len(selected)))))
    return topk.merge(lists, len(x), k)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_probing_every_cell_is_exact(threshold: float | None) -> None:
    x = unit(400, 16, seed=3)
    centroids, _ = quantizer.train(x, 12, seed=0, threads=1)
    probes = probing.probe(x, centroids, probing.ProbeRule(None, 12))
    check_table(x, cells_tables(x, probes, 12, 3, 9, threshold), 9, threshold)


def probed(
    n: int, cells: int, seed: int, margin: float, most: int
) -> tuple[np.ndarray, tile_search.Probes, np.ndarray, np.ndarray]:
    """(faces, probes, home cell of each, whether face i probes cell c) of a small random set."""
    x = unit(n, 8, seed)
    centroids, _ = quantizer.train(x, cells, seed=seed, threads=1)
    offsets, flat = probing.probe(x, centroids, probing.ProbeRule(margin, most))
    visits = np.zeros((n, cells), bool)
    visits[np.repeat(np.arange(n), np.diff(offsets)), flat] = True
    return x, (offsets, flat), flat[offsets[:-1]], visits


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 120), st.integers(1, 8), st.integers(1, 4), st.integers(0, 1000), st.floats(0, 0.5))
def test_cells_find_exactly_the_pairs_that_meet(n: int, cells: int, k: int, seed: int, margin: float) -> None:
    """A pair is found, once, exactly when one face probes the other's home cell; shards do not matter."""
    cells = min(cells, n)
    x, probes, home, visits = probed(n, cells, seed, margin, 3)
    meet = visits[:, home] | visits[:, home].T
    np.fill_diagonal(meet, False)
    one = cells_tables(x, probes, cells, 1, n, None)
    for i in range(n):
        assert sorted(one[1][one[0][i] : one[0][i + 1]]) == np.flatnonzero(meet[i]).tolist()
    small = cells_tables(x, probes, cells, 1, k, 0.1)
    for shards in (2, cells):
        for a, b in zip(small, cells_tables(x, probes, cells, shards, k, 0.1), strict=True):
            np.testing.assert_array_equal(a, b)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(2, 6), st.integers(0, 1000), st.floats(0, 0.5), st.floats(0.0, 0.6))
def test_visitors_that_share_a_neighbor_at_home_meet(n: int, cells: int, seed: int, margin: float, threshold: float) -> None:
    """With a threshold, two visitors of a cell are compared when one member is among the nearest of both; no pair twice."""
    cells = min(cells, n)
    x, probes, home, visits = probed(n, cells, seed, margin, 4)
    s = x.astype(np.float64) @ x.astype(np.float64).T
    meet = visits[:, home] | visits[:, home].T
    for cell in range(cells):
        links: dict[int, set[int]] = {}
        for v in np.flatnonzero(visits[:, cell] & (home != cell)):
            near = [m for m in np.argsort(-s[v], kind="stable") if home[m] == cell and s[v, m] >= threshold][
                : neighbor_join.LINKS
            ]
            for m in near:
                links.setdefault(int(m), set()).add(int(v))
        for introduced in links.values():
            for v in introduced:
                meet[v, list(introduced)] = True
    np.fill_diagonal(meet, False)
    meet &= s >= threshold
    offsets_found, rows, _ = cells_tables(x, probes, cells, 1, n, threshold)
    for i in range(n):
        assert sorted(rows[offsets_found[i] : offsets_found[i + 1]]) == np.flatnonzero(meet[i]).tolist()


def test_a_member_introduces_only_so_many() -> None:
    n = 4 * neighbor_join.MOST_MET
    x = np.zeros((n + 1, 4), np.float32)
    x[0, 0] = 1  # at home in cell 0; everybody else visits it from a cell of their own
    angles = np.linspace(0.2, 0.4, n)
    x[1:, 0], x[1:, 1] = np.cos(angles), np.sin(angles)
    cells = [np.array([0], np.int32)] + [np.array([i, 0], np.int32) for i in range(1, n + 1)]
    probes = np.concatenate([[0], np.cumsum([len(c) for c in cells])]), np.concatenate(cells)
    offsets, rows, _ = cells_tables(x, probes, n + 1, 3, n, 0.5)
    counts = np.diff(offsets)
    nearest = np.arange(1, neighbor_join.MOST_MET + 1)
    for i in nearest:  # face 0 is most like these: they all meet
        assert set(rows[offsets[i] : offsets[i + 1]]) >= set(nearest) - {i}
    assert counts[0] == n
    assert counts[1:].sum() < n * (n - 1) / 2


def test_crowded_cell_crosses_every_block_boundary() -> None:
    n = tile_kernel.MEMBER_BLOCK + tile_kernel.QUERY_BLOCK + 37
    x = unit(n, 8, seed=5)
    probes = np.arange(n + 1), np.zeros(n, np.int32)
    check_table(x, cells_tables(x, probes, 1, 1, 4, 0.5), 4, 0.5)


def test_ties_break_by_row() -> None:
    x = np.zeros((50, 4), np.float32)
    x[:, 0] = 1  # every face is the same
    offsets, rows, _ = exact(x, 3, 0.5, 16)
    for i in range(50):
        assert rows[offsets[i] : offsets[i + 1]].tolist() == [j for j in range(5) if j != i][:3]


def test_quantizer_does_not_depend_on_threads() -> None:
    x = unit(4000, 16, seed=1)
    one, two = (quantizer.train(x, 50, seed=4, threads=t)[0] for t in (1, 2))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5)
    cells, similarities = quantizer.nearest_cell(x, one, 1)
    for a, b in zip((cells, similarities), quantizer.nearest_cell(x, one, 2), strict=True):
        np.testing.assert_array_equal(a, b)
    exact = x.astype(np.float64) @ one.T.astype(np.float64)
    np.testing.assert_allclose(similarities, exact.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(exact[np.arange(len(x)), cells], exact.max(axis=1), atol=1e-6)


def test_margin_probing_against_a_direct_computation() -> None:
    x = unit(500, 16, seed=2)
    centroids, _ = quantizer.train(x, 20, seed=0, threads=1)
    offsets, cells = probing.probe(x, centroids, probing.ProbeRule(0.1, 6))
    s = x @ centroids.T
    for i in range(len(x)):
        near = np.argsort(-s[i], kind="stable")
        want = [c for c in near if s[i, c] >= s[i].max() - 0.1][:6]
        assert cells[offsets[i] : offsets[i + 1]].tolist() == want


def test_predicted_recall_is_what_the_rule_reaches() -> None:
    x = unit(3000, 32, seed=8)
    centroids, _ = quantizer.train(x, 60, seed=0, threads=1)
    choice = probing.choose_rule(x, len(x), centroids, 50, 0.6, 60, 0.95, 0.0)
    rule, mean_probes, predicted = choice.rule, choice.mean_probes, choice.recall
    assert predicted is not None
    assert 0.95 <= predicted < 0.97
    probes = probing.probe(x, centroids, rule)
    assert mean_probes == pytest.approx(len(probes[1]) / len(x), rel=0.01)
    results = len(cells_tables(x, probes, 60, 2, 50, 0.6)[1])
    assert results / len(exact(x, 50, 0.6, 1000)[1]) == pytest.approx(predicted, abs=0.01)


def test_who_must_find_its_neighbors_alone_probes_their_homes() -> None:
    """What an incremental run rests on: a new face is not found by others, only by probing where they live."""
    x = unit(3000, 32, seed=8)
    centroids, _ = quantizer.train(x, 60, seed=0, threads=1)
    rule = probing.choose_rule(x, len(x), centroids, 50, 0.6, 60, 0.95, 0.0).alone
    offsets, cells = probing.probe(x, centroids, rule)
    probes = [set(cells[a:b].tolist()) for a, b in itertools.pairwise(offsets)]
    homes = cells[offsets[:-1]]
    ends, neighbors, _ = exact(x, 50, 0.6, 1000)
    results = [homes[j] in probes[i] for i in range(len(x)) for j in neighbors[ends[i] : ends[i + 1]]]
    assert 0.95 <= np.mean(results) < 0.98


def test_no_pair_to_find_a_threshold_from() -> None:
    x = np.eye(16, dtype=np.float32)
    rule = probing.ProbeRule(None, 4)
    assert probing.choose_rule(x, 16, x[:4].copy(), 5, 0.5, 4, 0.99, 0.99) == probing.Choice(rule, rule, 4.0, None)


def test_locality_order_and_shards() -> None:
    rng = np.random.default_rng(0)
    centroids = unit(64, 8, 0)
    weights = rng.uniform(1, 5, 64)
    order = quantizer.locality_order(centroids, weights)
    assert sorted(order) == list(range(64))
    starts = quantizer.shard_starts(weights[order], 5)
    assert starts[0] == 0
    assert starts[-1] == 64
    shares = [weights[order][a:b].sum() for a, b in zip(starts[:-1], starts[1:], strict=True)]
    assert max(shares) < 2 * sum(shares) / 5
    one = centroids[:1]
    assert quantizer.locality_order(one, np.ones(1)).tolist() == [0]


@given(
    n=st.integers(2, 200), share=st.floats(0, 1), cells=st.integers(1, 12), parts=st.integers(1, 4), ranges=st.integers(1, 3),
    threshold=st.sampled_from(THRESHOLDS), seed=st.integers(0, 10_000), most=st.sampled_from([3, 2_048]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_active_faces_meet_everybody_in_the_cells_they_probe(
    n: int, share: float, cells: int, parts: int, ranges: int, threshold: float | None, seed: int, most: int
) -> None:
    """However the others are cut into parts, and the cells into ranges: each pair with an active face once a side."""
    rng = np.random.default_rng(seed)
    x, k = unit(n, 16, seed), 300
    active = np.flatnonzero(rng.random(n) < share)
    home = rng.integers(0, cells, n)
    probed = [[home[i], *np.setdiff1d(rng.permutation(cells)[: rng.integers(0, cells + 1)], home[i])] for i in active]
    part = rng.integers(0, parts, n)
    met: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incremental_search, "MOST_RESIDENTS", most)
        for p, (low, high) in itertools.product(range(parts), itertools.pairwise(np.arange(ranges + 1) * cells // ranges)):
            selected = [a for a, probes in enumerate(probed) if any(low <= c < high for c in probes)]
            offsets = np.concatenate([[0], np.cumsum([len(probed[a]) for a in selected])]).astype(np.int64)
            flat = np.array([c for a in selected for c in probed[a]], np.int32)

            def residents(cell: int, p: int = p) -> Iterator[tuple[np.ndarray, np.ndarray]]:
                rows = np.setdiff1d(np.flatnonzero((home == cell) & (part == p)), active)
                for begin in range(0, len(rows), most):
                    yield rows[begin : begin + most], x[rows[begin : begin + most]]

            own = range(cells * p // parts, cells * (p + 1) // parts)
            lists = incremental_search.search_cells(
                np.ascontiguousarray(x[active[selected]]), active[selected].astype(np.int32), (offsets, flat), range(low, high),
                own, residents, k, threshold,
            )  # fmt: skip
            rows, ends, keys = incremental_search.joined(list(lists))
            similarities, others = topk.decode(keys)
            owner = np.repeat(rows, np.diff(ends))
            np.testing.assert_allclose(similarities, (x[owner] * x[others]).sum(axis=1), atol=1e-5)
            met += zip(owner.tolist(), others.tolist(), strict=True)
    probes_of = {int(i): set(map(int, probes)) for i, probes in zip(active, probed, strict=True)}
    s = x.astype(float) @ x.T.astype(float)
    near = s >= (-2 if threshold is None else threshold)
    expected = {
        (i, j) for i in range(n) for j in range(n)
        if i != j and near[i, j] and (home[j] in probes_of.get(i, ()) or home[i] in probes_of.get(j, ()))
    }  # fmt: skip
    assert len(met) == len(set(met))
    assert all(abs(s[i, j] - (threshold or 0)) < 1e-5 for i, j in set(met) ^ expected)


def test_lists_of_nobody_are_one_of_nobody() -> None:
    rows, offsets, keys = incremental_search.joined([])
    assert (len(rows), offsets.tolist(), len(keys)) == (0, [0], 0)
