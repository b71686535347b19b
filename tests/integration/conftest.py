"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.clusters import TwoMachines


@pytest.fixture(scope="module")
def two_machines() -> Iterator[TwoMachines]:
    """A Ray cluster of two raylets."""
    machines = TwoMachines()
    yield machines
    machines.stop()
