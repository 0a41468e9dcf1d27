"""When flows are looked at: at once, and in a busy time not all the time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence

import pytest

from ctrport import conntrack, flows
from ctrport.conntrack import Closed, Opened
from ctrport.flows import StaleFlows
from ctrport.model import Address
from ctrport.ports import parse
from ctrport.tally import Tally
from tests.unit import worlds


class Looks:
    """What was looked for, and when; each look takes its time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, takes: float) -> None:
        self.begun: list[float] = []
        self.looked_for: list[Opened | Closed] = []
        self.takes = takes
        monkeypatch.setattr(conntrack, "drop_stale", self._look)

    async def _look(self, touched: Sequence[Opened | Closed], node: Collection[Address]) -> int:
        self.begun.append(time.monotonic())
        self.looked_for += touched
        await asyncio.sleep(self.takes)
        return 0


def touched(port: int) -> Opened:
    return Opened(parse(f"{port}:80"), worlds.attachment())


def test_what_comes_in_a_row_is_looked_for_with_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch, 0.02)

    async def busy() -> None:
        stale = StaleFlows(lambda why: None, Tally())
        began = time.monotonic()
        port = 1000
        while time.monotonic() < began + 0.5:
            port += 1
            stale.touch([touched(port)])
            done = stale.drop(frozenset)
            await asyncio.sleep(0.005)
        await done
        assert looks.looked_for == [touched(each) for each in range(1001, port + 1)]
        # The first at once, and then one in a tenth of a second.
        assert looks.begun[0] - began < 0.1
        assert all(later - earlier >= 0.1 for earlier, later in zip(looks.begun, looks.begun[1:], strict=False))
        assert len(looks.begun) >= 3

    asyncio.run(busy())


def test_a_long_look_is_not_followed_by_a_long_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "LONGEST_REST", 0.05)
    looks = Looks(monkeypatch, 0.1)

    async def two() -> None:
        stale = StaleFlows(lambda why: None, Tally())
        for port in (1000, 1001):
            stale.touch([touched(port)])
            await stale.drop(frozenset)
        first, second = looks.begun
        assert 0.15 <= second - first < 0.45  # without the limit: half a second

    asyncio.run(two())


def test_what_is_closed_in_its_rest_leaves_what_was_to_be_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch, 0.02)

    async def closed() -> None:
        before, after = StaleFlows(lambda why: None, Tally()), StaleFlows(lambda why: None, Tally())
        before.touch([touched(1000)])
        await before.drop(frozenset)
        before.touch([touched(1001)])
        before.drop(frozenset)
        await asyncio.sleep(0.01)
        await before.close()
        after.succeed(before)
        await after.drop(frozenset)
        assert looks.looked_for == [touched(1000), touched(1001)]

    asyncio.run(closed())


def test_who_ends_for_good_looks_for_what_is_left_without_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "LONGEST_REST", 60.0)
    monkeypatch.setattr(flows, "REST", 1000)
    looks = Looks(monkeypatch, 0.02)

    async def ended() -> None:
        stale = StaleFlows(lambda why: None, Tally())
        stale.touch([touched(1000)])
        await stale.drop(frozenset)
        stale.touch([touched(1001)])
        stale.drop(frozenset)
        await asyncio.sleep(0.01)
        await asyncio.wait_for(stale.finish(frozenset), 5)
        assert looks.looked_for == [touched(1000), touched(1001)]

    asyncio.run(ended())


def test_who_ends_for_good_does_not_wait_long_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "LONGEST_REST", 0.05)
    looks = Looks(monkeypatch, 60)

    async def ended() -> None:
        stale = StaleFlows(lambda why: None, Tally())
        stale.touch([touched(1000)])
        stale.drop(frozenset)
        await asyncio.sleep(0.01)
        await asyncio.wait_for(stale.finish(frozenset), 5)
        assert len(looks.begun) == 2

    asyncio.run(ended())
