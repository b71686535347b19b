"""Fits give back the laws that times were made from, and promise nothing that they cannot know."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceflow.tools.scaling import laws

WORKERS = np.array([1.0, 2, 4, 8])


@given(serial=st.floats(0.1, 100), parallel=st.floats(0.1, 1000))
@settings(max_examples=50, deadline=None)
def test_amdahl_is_recovered(serial: float, parallel: float) -> None:
    results = laws.fit_amdahl(WORKERS, serial + parallel / WORKERS)
    assert results.serial == pytest.approx(serial, rel=1e-6, abs=1e-6)
    assert results.seconds(16) == pytest.approx(serial + parallel / 16, rel=1e-6)
    assert results.serial_share == pytest.approx(serial / (serial + parallel), rel=1e-6)


def test_amdahl_never_promises_what_was_not_seen() -> None:
    assert laws.fit_amdahl(np.array([2.0, 2.0]), np.array([10.0, 12.0])) == laws.Amdahl(11.0, 0.0)
    slower = laws.fit_amdahl(np.array([1.0, 2.0]), np.array([10.0, 12.0]))
    assert (slower.serial, slower.parallel) == (11.0, 0.0)
    faster_than_ideal = laws.fit_amdahl(np.array([1.0, 2.0]), np.array([10.0, 4.0]))
    assert faster_than_ideal.serial == 0.0
    assert faster_than_ideal.parallel > 0


@given(first=st.floats(1, 1000), contention=st.floats(0, 0.5), coherence=st.floats(0, 0.05))
@settings(max_examples=50, deadline=None)
def test_usl_is_recovered(first: float, contention: float, coherence: float) -> None:
    results = laws.fit_usl(WORKERS, np.array([laws.Usl(first, contention, coherence).seconds(w) for w in WORKERS]))
    assert results is not None
    assert (results.first, results.contention, results.coherence) == pytest.approx((first, contention, coherence), abs=1e-6)
    if coherence > 1e-3:
        best = results.best_workers
        assert results.seconds(best) <= min(results.seconds(best * 1.1), results.seconds(best / 1.1))


def test_usl_needs_three_numbers_of_workers() -> None:
    assert laws.fit_usl(np.array([1.0, 2.0]), np.array([10.0, 6.0])) is None
    assert laws.fit_usl(np.array([2.0, 4.0, 8.0]), np.array([10.0, 6.0, 4.0])) is None
    linear = laws.fit_usl(WORKERS, 10 / WORKERS)
    assert linear is not None
    assert math.isinf(linear.best_workers)


def test_exponent_is_the_slope_of_the_logarithms() -> None:
    faces = np.array([1e5, 3e5, 1e6])
    assert laws.exponent(faces, 1e-6 * faces**1.4) == pytest.approx(1.4)
    assert laws.exponent(faces[:1], faces[:1]) is None


def test_makespan_by_hand() -> None:
    assert laws.makespan(8, 80.0, 12.0, 1) == 80.0
    assert laws.makespan(8, 80.0, 12.0, 3) == 30.0  # three rounds of ten seconds
    assert laws.makespan(8, 80.0, 12.0, 100) == 12.0  # the longest task
    assert laws.makespan(0, 0.0, 0.0, 4) == 0.0
