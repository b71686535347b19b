"""How the base run's parts become those of an incremental run."""

from __future__ import annotations

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from faceflow.stages.ingest import incremental

WANTED = 1_000


@given(st.lists(st.integers(0, 1_500), max_size=60))
@example([])
@example([0] * 20)
@example([499] * 20)
@example([500] * 20)
def test_merged_parts_are_neighbors_in_the_base_run(rows: list[int]) -> None:
    bounds = incremental.compact(rows, WANTED)
    assert (bounds[0], bounds[-1]) == (0, len(rows))
    assert all(a < b for a, b in itertools.pairwise(bounds))
    made = [rows[a:b] for a, b in itertools.pairwise(bounds)]
    assert all(len(part) == 1 or (sum(part) <= WANTED and 2 * max(part) < WANTED) for part in made)
    if len(made) < len(rows):  # then everywhere as few as can be
        for first, second in itertools.pairwise(made):
            assert sum(first + second) > WANTED or 2 * max(first + second) >= WANTED


@given(st.lists(st.integers(0, 700), min_size=8, max_size=8), st.integers(1, 20))
@example([0, 0, 0, 0, 0, 0, 0, 700], 20)
@example([5] * 8, 20)
def test_over_many_runs_the_parts_stay_few_and_faces_are_seldom_copied(week: list[int], weeks: int) -> None:
    rows, copied = [WANTED] * 5, 0
    for added in week * weeks:
        bounds = incremental.compact(rows, WANTED)
        made = [rows[a:b] for a, b in itertools.pairwise(bounds)]
        copied += sum(sum(part) for part in made if len(part) > 1)
        rows = [*map(sum, made), added]
    assert len(rows) <= 4 * sum(rows) / WANTED + incremental.MOST_SMALL + 2
    assert copied <= sum(week) * weeks + len(week) * weeks * WANTED / 4
