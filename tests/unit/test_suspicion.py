"""When to look after others wrote, and whom to name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrport.suspicion import AHEAD, NAMED, PATIENCE, PATIENCE_WITH_MANY, SHARE, Grounds, Suspicion


def test_nothing_told_is_nothing_to_look_for() -> None:
    suspicion = Suspicion()
    assert suspicion.due() is None
    assert suspicion.begin() == Grounds()


def test_a_look_is_due_a_little_after_the_last_write_and_not_for_ever_later() -> None:
    suspicion = Suspicion()
    suspicion.tell("nft (pid 7)", 100.0)
    assert suspicion.due() == pytest.approx(100.0 + PATIENCE)
    suspicion.tell("nft (pid 7)", 100.05)
    suspicion.tell("", 100.06)
    assert suspicion.due() == pytest.approx(100.06 + PATIENCE)
    suspicion.tell("iptables (pid 8)", 100.5)
    assert suspicion.due() == pytest.approx(100.0 + PATIENCE_WITH_MANY)
    assert suspicion.begin() == Grounds(100.0, ("nft (pid 7)", "iptables (pid 8)"))
    assert suspicion.due() is None


def test_a_look_waits_for_what_is_more_urgent_but_not_for_ever() -> None:
    suspicion = Suspicion()
    assert suspicion.due(busy=True) is None
    suspicion.tell("nft (pid 7)", 100.0)
    assert suspicion.due(busy=True) == pytest.approx(100.0 + PATIENCE_WITH_MANY)
    assert suspicion.due() == pytest.approx(100.0 + PATIENCE)


def test_what_is_told_during_a_look_is_for_the_next() -> None:
    suspicion = Suspicion()
    suspicion.tell("one", 100.0)
    suspicion.begin()
    suspicion.tell("other", 100.001)
    suspicion.end(0.001, 100.001)
    assert suspicion.due() == pytest.approx(100.001 + PATIENCE)
    assert suspicion.begin().writers == ("other",)


def test_no_more_are_named_than_fit_a_line() -> None:
    suspicion = Suspicion()
    for number in range(50):
        suspicion.tell(f"nft (pid {number})", 1.0)
    assert len(suspicion.begin().writers) == NAMED


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 0.3)), max_size=60))
def test_looking_takes_no_more_than_its_share_of_the_time(looks: list[tuple[float, float]]) -> None:
    """However often others write: what looks took until any of them began is earned by then, but for what is ahead."""
    suspicion, start = Suspicion(), 1_000.0
    now, spent = start, 0.0
    for pause, took in looks:
        now += pause
        suspicion.tell("kube-proxy", now)
        due = suspicion.due()
        assert due is not None
        now = max(now, due)
        assert spent <= AHEAD + SHARE * (now - start) + 1e-6
        suspicion.begin()
        suspicion.end(took, now + took)
        now, spent = now + took, spent + took
