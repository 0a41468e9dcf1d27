"""Turns at once while they are rare, and at a steady pace in a flood."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrport.pace import Backoff, Pace


def test_a_burst_passes_at_once_and_the_next_waits() -> None:
    pace = Pace(3, 0.5)
    for _ in range(3):
        assert pace.wait(100.0) == 0
        pace.take(100.0)
    assert pace.wait(100.0) == pytest.approx(0.5)
    assert pace.wait(100.5) == pytest.approx(0)


def test_what_was_not_used_is_there_again_after_a_while_and_no_more_than_a_burst() -> None:
    pace = Pace(2, 1.0)
    pace.take(0.0)
    pace.take(0.0)
    assert pace.wait(1_000.0) == 0
    pace.take(1_000.0)
    assert pace.wait(1_000.0) == 0
    pace.take(1_000.0)
    assert pace.wait(1_000.0) == pytest.approx(1.0)


@given(st.lists(st.floats(0, 2), max_size=60), st.integers(1, 10))
def test_in_any_time_no_more_turns_pass_than_the_burst_and_the_pace_allow(pauses: list[float], burst: int) -> None:
    pace, now, taken = Pace(burst, 0.25), 50.0, []
    for pause in pauses:
        now += pause
        now += pace.wait(now)
        assert pace.wait(now) <= 1e-9
        pace.take(now)
        taken.append(now)
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + (taken[last] - taken[first]) / 0.25 + 1e-6


def test_each_failure_doubles_the_wait_up_to_the_most_and_success_begins_anew() -> None:
    backoff = Backoff(1.0, 10.0)
    assert [backoff.pause() for _ in range(6)] == [1, 2, 4, 8, 10, 10]
    backoff.reset()
    assert backoff.pause() == 1
