"""How often everything is looked at again, and which configuration is the one to be used."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from ctrport import reconcile
from ctrport.account import NOT_CONNECTED
from ctrport.config import Config, parse
from ctrport.containerd import Unresponsive
from ctrport.firewall import FirewallError
from ctrport.reconcile import TICK, Reconciler, ticks_to_resync
from ctrport.tasks import end

ONE, OTHER = (parse(f"publish: [{{match: {{container: {name}}}, ports: ['80']}}]", name) for name in ("one", "other"))


@pytest.mark.parametrize(
    ("took", "seconds"),
    [(0.0, 60), (0.01, 60), (0.03, 60), (0.05, 100), (0.2, 400), (1.0, 600), (60.0, 600)],
)
def test_what_costs_much_is_done_seldomer_and_not_never(took: float, seconds: float) -> None:
    assert ticks_to_resync(took) * TICK == seconds


class Unusable:
    """A reconciler whose node cannot take up any configuration but the first, and is not quick to say so."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answer = asyncio.Event()
        survey: Any = SimpleNamespace(config=ONE, publications=Nothing(), warnings=(), amiss={})
        nothing: Any = None
        self.reconciler = Reconciler(nothing, survey, nothing, self._prepare, lambda: None, lambda: None)

    def next(self) -> Config | None:
        return self.reconciler._next_config

    async def _prepare(self, config: Config) -> Any:
        self.asked.set()
        await self.answer.wait()
        raise FirewallError("not on this node")


class Nothing(list[Any]):
    """No publications."""

    def count(self, state: object) -> int:
        return 0


@pytest.mark.asyncio
async def test_a_configuration_that_comes_back_while_another_is_taken_up_is_used() -> None:
    its = Unusable()
    taking_up = asyncio.ensure_future(its.reconciler._change_config(OTHER))
    await its.asked.wait()
    its.reconciler.use(OTHER)  # announced twice
    assert its.next() is None
    its.reconciler.use(ONE)  # which is still in use now, and not then, if all goes well
    assert its.next() == ONE
    its.answer.set()
    await taking_up
    assert its.next() == ONE
    assert its.reconciler._account.stale == "not on this node"
    await its.reconciler._change_config(ONE)
    assert its.reconciler._account.stale == ""


class Mute:
    """A containerd that tells its version and takes subscriptions at once, and has yet to list anything."""

    address = "/run/containerd/containerd.sock"

    async def connected(self, tried: object) -> None:
        pass

    async def version(self) -> str:
        return "1.6.20"

    @contextlib.asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[Any]]:
        async def none() -> AsyncIterator[Any]:
            await asyncio.Event().wait()
            yield

        yield none()


@pytest.mark.asyncio
async def test_a_containerd_that_lists_nothing_is_not_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "RETRY", 0.0)
    while_listing: list[str] = []
    told: list[str] = []
    listed = asyncio.Event()

    async def everything() -> None:
        while_listing.append(reconciler._account.containerd)
        if len(while_listing) < 3:
            raise Unresponsive("containerd did not answer within 5 s")

    async def settle(**_: object) -> None:
        listed.set()
        await asyncio.Event().wait()

    survey: Any = SimpleNamespace(config=ONE, publications=Nothing(), everything=everything)
    containerd: Any = Mute()
    nothing: Any = None

    def on_change() -> None:
        told.append(reconciler._account.containerd)

    reconciler = Reconciler(containerd, survey, nothing, nothing, on_change, lambda: None)
    monkeypatch.setattr(reconciler, "_settle", settle)
    running = asyncio.ensure_future(reconciler._run())
    await asyncio.wait_for(listed.wait(), 10)
    await end(running)
    lost = "lost: containerd did not answer within 5 s"
    assert while_listing == [NOT_CONNECTED, lost, lost]
    assert set(told) == {NOT_CONNECTED, lost}
    assert reconciler._account.containerd == "connected, version 1.6.20"
