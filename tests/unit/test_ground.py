"""What is made ready for a configuration counts when that is in use, and is given up where it cannot be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from ctrport import run
from ctrport.config import parse
from ctrport.firewall import FirewallError
from ctrport.firewall.detect import Choice
from ctrport.hostports import Reservations
from ctrport.tally import Tally

CONFIG = parse("firewall: {backend: iptables-legacy, reserve_limit: 7}", "config.yaml")


class Alarm:
    """Tells nothing, and is closed or not."""

    how = "none"
    closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def alarm(monkeypatch: pytest.MonkeyPatch) -> Alarm:
    alarm = Alarm()

    async def choose(asked: str) -> Choice:
        return Choice(asked, "firewall.backend says so")

    monkeypatch.setattr(run, "choose", choose)
    monkeypatch.setattr(run, "_alarm", lambda *_: alarm)
    monkeypatch.setattr(run, "others_than", answering(list))
    monkeypatch.setattr(run, "firewalls", answering(dict))
    return alarm


def answering(answer: Callable[[], Any]) -> Callable[..., Any]:
    async def asked(*_: object) -> Any:
        return answer()

    return asked


def test_the_limit_of_a_configuration_that_is_not_in_use_yet_does_not_count(alarm: Alarm) -> None:
    reservations = Reservations(100)
    ground, _ = asyncio.run(run._ground(CONFIG, reservations, Tally()))
    assert reservations.limit == 100
    ground.dataplane.hold_at_most(ground.reserve_limit)
    assert reservations.limit == 7
    assert not alarm.closed


@pytest.mark.parametrize("asked", ["firewalls", "others_than"])
def test_nothing_stays_open_of_what_cannot_be_made_ready(
    alarm: Alarm, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    def cannot() -> None:
        raise FirewallError("whether IPv6 can be served cannot be told")

    monkeypatch.setattr(run, asked, answering(cannot))
    with pytest.raises(FirewallError):
        asyncio.run(run._ground(CONFIG, Reservations(0), Tally()))
    assert alarm.closed
