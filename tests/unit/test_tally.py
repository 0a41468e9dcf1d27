"""What is counted: numbers that only grow, whoever looks at them."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrport.tally import CAUSES, DAMAGE, OPENING, WORK, Histogram, Tally


@given(st.lists(st.floats(0, 400)))
def test_each_observation_counts_up_to_every_bound_that_it_is_not_beyond(seconds: list[float]) -> None:
    histogram = Histogram(WORK)
    for each in seconds:
        histogram.observe(each)
    up_to = [sum(each <= bound for each in seconds) for bound in WORK]
    assert list(accumulate(histogram.counts)) == [*up_to, len(seconds)]
    assert histogram.sum == pytest.approx(math.fsum(seconds))
    assert histogram.count == len(seconds)


def test_bounds_rise() -> None:
    for bounds in (WORK, OPENING, DAMAGE):
        assert sorted(set(bounds)) == list(bounds)


def test_a_copy_stays_as_it_was() -> None:
    tally = Tally()
    tally.expect(["/tasks/start"])
    before = tally.copy()
    tally.events["/tasks/start"] += 1
    tally.turns[CAUSES[0]].observe(1.0)
    assert before.events == {"/tasks/start": 0}
    assert before.turns[CAUSES[0]].count == 0
    tally.expect(["/tasks/start", "/tasks/exit"])
    assert tally.events == {"/tasks/start": 1, "/tasks/exit": 0}
