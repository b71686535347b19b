"""Adoption: strangers' p-values are uniform, poor photos find their person, and the false discovery rate holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceflow.kernels.clusters import singletons


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def people() -> np.ndarray:
    return unit(np.random.default_rng(0).standard_normal((400, 64)))


@pytest.mark.parametrize("squeezed", [0.0, 3.0])
def test_p_values_of_strangers_promise_no_more_than_they_hold(people: np.ndarray, squeezed: float) -> None:
    """Whatever the scale: added to all, a common direction squeezes all cosines together."""
    rng = np.random.default_rng(1)
    common = squeezed * np.eye(1, 64, dtype=np.float32)
    _, p = singletons.margins(unit(unit(rng.standard_normal((6_000, 64))) + common), unit(people + common))
    for level in (0.01, 0.05, 0.1, 0.25):
        assert (p <= level).mean() <= level * 1.25 + 0.003
    assert (p <= 0.25).mean() > 0.1
    assert singletons.accepted(p).mean() < 0.001


def test_poor_photos_find_their_person_and_strangers_stay(people: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    own = rng.integers(0, len(people), 500)
    poor = unit(1.5 * people[own] + unit(rng.standard_normal((500, 64))))
    strangers = unit(rng.standard_normal((1_500, 64)))
    nearest, p = singletons.margins(np.concatenate([poor, strangers]), people)
    taken = singletons.accepted(p)
    assert taken[:500].mean() > 0.9
    assert (nearest[:500][taken[:500]] == own[taken[:500]]).mean() > 0.98
    assert taken[500:].sum() <= 1.6 * singletons.RATE * taken.sum()


@given(seed=st.integers(0, 10_000), n=st.integers(1, 80), real=st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_accepted_by_brute_force(seed: int, n: int, real: float) -> None:
    rng = np.random.default_rng(seed)
    p = np.where(rng.random(n) < real, rng.random(n) ** 8, rng.random(n)).round(3)
    strangers = min(1.0, (1 + sum(p > 0.5)) / (0.5 * n))
    best = max([0, *(k for k in range(1, n + 1) if sorted(p)[k - 1] * n * strangers <= 0.05 * k)])
    expected = p <= min(0.25, sorted(p)[best - 1]) if best else np.zeros(n, bool)
    np.testing.assert_array_equal(singletons.accepted(p), expected)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 20), h=st.integers(3, 150), block=st.sampled_from([1, 40, 2_048]))
@settings(max_examples=60, deadline=None)
def test_nearest_people_by_brute_force(seed: int, n: int, h: int, block: int) -> None:
    """Of equal similarities, which coarse coordinates make many, the first."""
    rng = np.random.default_rng(seed)
    faces, people = (rng.integers(-2, 3, (count, 4)).astype(np.float32) for count in (n, h))
    k = min(h, 18)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(singletons, "PEOPLE_BLOCK", block)
        values, top = singletons.nearest(faces, people, k)
    product = faces @ people.T
    expected = np.argsort(-product, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(top, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(product, expected, axis=1))


def test_members_are_summed_up_to_the_most(people: np.ndarray) -> None:
    owner = np.array([0, -1, 1, 0, 0, 1])
    sums, counts = np.zeros((2, 64)), np.zeros(2, np.int64)
    singletons.add_members(sums, counts, people[:6], owner, 2)
    np.testing.assert_allclose(sums, [people[[0, 3]].sum(axis=0), people[[2, 5]].sum(axis=0)], rtol=1e-5)
    assert counts.tolist() == [2, 2]
    assert singletons.accepted(np.empty(0)).tolist() == []
