"""How often everything is looked at again, and which configuration is the one to be used."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Hashable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ctrport import conntrack, nftports, nodeports, reconcile, survey
from ctrport.account import NOT_CONNECTED
from ctrport.config import Config, parse
from ctrport.containerd import Unresponsive
from ctrport.dataplane import Dataplane
from ctrport.firewall import FirewallError, ForeignChain, ForeignTable
from ctrport.firewall import Unusable as Unusable_
from ctrport.firewall.fake import MemoryKernel
from ctrport.firewall.tables import Tables
from ctrport.ground import Ground
from ctrport.hostports import Claim, Reservations
from ctrport.listed import Listed
from ctrport.model import ContainerKey, Endpoint, Family
from ctrport.node import look
from ctrport.reconcile import TICK, Reconciler, ticks_to_resync
from ctrport.reload import WAITS
from ctrport.rules import Layout, Table
from ctrport.status import PublicationStatus
from ctrport.survey import Survey
from ctrport.tasks import end
from tests.unit import worlds

ONE, OTHER = (parse(f"publish: [{{match: {{container: {name}}}, ports: ['80']}}]", name) for name in ("one", "other"))


@pytest.mark.parametrize(
    ("took", "seconds"),
    [(0.0, 60), (0.01, 60), (0.0149, 60), (0.0249, 100), (0.0999, 400), (1.0, 600), (60.0, 600)],
)
def test_what_costs_much_is_done_seldomer_and_not_never(took: float, seconds: float) -> None:
    assert ticks_to_resync(took) * TICK == seconds


class Unusable:
    """A reconciler whose node cannot take up any configuration but the first, and is not quick to say so."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error or FirewallError("not on this node")
        self.asked = asyncio.Event()
        self.answer = asyncio.Event()
        survey: Any = SimpleNamespace(config=ONE, publications=Nothing(), warnings=(), amiss={})
        nothing: Any = None
        self.reconciler = Reconciler(nothing, survey, nothing, self._prepare, lambda: None, lambda: None)

    def next(self) -> Config | None:
        return self.reconciler._reload.next

    async def _prepare(self, config: Config) -> Any:
        self.asked.set()
        await self.answer.wait()
        raise self.error

    async def refuse(self, config: Config) -> None:
        self.answer.set()
        self.reconciler._reload.next = None  # as the loop takes it
        await self.reconciler._change_config(config)

    @property
    def stale(self) -> str:
        return self.reconciler._account.stale


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


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [FirewallError("it changes all the time"), OSError(errno.EMFILE, "Too many")])
async def test_what_is_refused_for_what_may_pass_is_tried_again_and_told_once(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    its = Unusable(error)
    pauses = []
    for _ in range(8):
        began = time.monotonic()
        await its.refuse(OTHER)
        assert its.next() == OTHER
        pauses.append(round(its.reconciler._reload.due - began))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert its.stale == str(error)
    assert sum("not-reloaded" in message for message in caplog.messages) == 1
    its.reconciler.use(OTHER)  # asked for: at once
    assert its.reconciler._reload.due == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [ForeignChain("theirs"), ForeignTable("theirs"), Unusable_("not installed")])
async def test_what_is_refused_for_good_is_not_tried_again(error: Exception) -> None:
    its = Unusable(error)
    await its.refuse(OTHER)
    assert its.next() is None
    assert its.stale == str(error)


@pytest.mark.asyncio
async def test_what_is_not_in_the_files_any_more_is_not_tried_again() -> None:
    its = Unusable()
    taking_up = asyncio.ensure_future(its.reconciler._change_config(OTHER))
    await its.asked.wait()
    its.reconciler.stay("config.yaml:1:1: not YAML")
    its.answer.set()
    await taking_up
    assert its.next() is None
    assert its.stale == "config.yaml:1:1: not YAML"


@pytest.mark.asyncio
async def test_while_nothing_is_followed_a_configuration_that_came_is_said_to_wait() -> None:
    its = Unusable()
    its.reconciler.stay("config.yaml:1:1: not YAML")
    its.reconciler.use(OTHER)
    assert its.stale == WAITS
    its.reconciler.use(ONE)
    assert its.stale == ""
    its.reconciler._reload.follow()
    its.reconciler.use(OTHER)
    assert its.stale == ""
    its.reconciler._reload.wait()
    assert its.stale == WAITS


LAYOUT = Layout(localhost=False)


class Sockets(Reservations):
    """Holds nothing, and says that it does, or the ``remark`` why not."""

    remark = ""

    def take(self, key: Hashable, claim: Claim) -> str:
        return self.remark


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


class Node(Mute):
    """A node whose containers are all this process, with one address, and its tables in memory.

    ``trouble`` is why another configuration cannot be taken up. ``files`` are how many more containers can be looked at
    until this process may open no more files.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: Config, *names: str) -> None:
        async def nobody(family: Family) -> list[Any]:
            return []

        async def nothing(*_: object) -> int:
            return 0

        facts = replace(look(), facts=replace(look().facts, forwarding=frozenset(Family)), amiss={})
        monkeypatch.setattr(survey, "look", lambda networks, known=None: facts)
        monkeypatch.setattr(nodeports, "holders", nobody)
        monkeypatch.setattr(nftports, "holders", lambda family: [])
        monkeypatch.setattr(conntrack, "drop_stale", nothing)
        self.names = names
        self.files = 1000
        self.trouble: FirewallError | None = None
        self.reservations, self.reserve_limit = Sockets(0), 0
        self.kernel = MemoryKernel()
        its: Any = self
        ground = self._ground()
        self.survey = Survey(config, its, its, ground.firewalls)
        self.reconciler = Reconciler(its, self.survey, ground, self._prepare, lambda: None, lambda: None)
        self.addresses = ["172.17.0.2"]

    async def namespaces(self) -> list[str]:
        return ["default"]

    async def containers(self, namespace: str, *, annotations: bool) -> list[Listed]:
        return [Listed(ContainerKey(namespace, name), os.getpid()) for name in self.names]

    def find(self, pid: int) -> Endpoint:
        if not self.files:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self.files -= 1
        return worlds.endpoint(*self.addresses)

    def _ground(self) -> Ground:
        firewalls = {Family.IPV4: Tables(self.kernel, LAYOUT)}
        return Ground(firewalls, Dataplane(firewalls, LAYOUT, self.reservations), None, self.reserve_limit)

    async def _prepare(self, config: Config) -> Ground:
        self.reserve_limit = config.firewall.reserve_limit
        ground = self._ground()
        if self.trouble is not None:
            dataplane: Any = ground.dataplane
            dataplane.start = self._start
        return ground

    async def _start(self) -> None:
        assert self.trouble is not None
        raise self.trouble

    async def start(self) -> None:
        await self.reconciler._dataplane.start()
        await self.resync()

    async def resync(self) -> None:
        await self.survey.everything()
        await self.reconciler._settle(mend=True)

    def ports(self) -> list[int]:
        """The host ports that there are rules for."""
        rules = "\n".join(self.kernel.tables[Table.NAT].get("DOCKER", []))
        return sorted(int(port) for port in re.findall(r"--dport (\d+)", rules))


def published(*names: str) -> Config:
    entries = (f"{{match: {{container: {name}}}, ports: ['{8000 + at}:80']}}" for at, name in enumerate(names))
    return parse(f"firewall: {{localhost: false}}\npublish: [{', '.join(entries)}]", "config.yaml")


@pytest.mark.asyncio
@pytest.mark.parametrize("files", [0, 1])
async def test_a_reload_without_a_free_file_closes_no_port(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, files: int
) -> None:
    caplog.set_level("INFO")
    node = Node(monkeypatch, published("a", "b"), "a", "b", "c")
    await node.start()
    assert node.ports() == [8000, 8001]
    node.files = files
    caplog.clear()
    with pytest.raises(OSError, match="Too many open files"):
        await node.reconciler._change_config(published("a", "b", "c"))
    assert node.ports() == [8000, 8001]
    node.files = 1000
    await node.resync()
    assert node.ports() == [8000, 8001, 8002]
    assert node.reconciler.config == published("a", "b", "c")
    assert [message for message in caplog.messages if "container=default/a" in message] == []  # it is as it was


@pytest.mark.asyncio
async def test_host_ports_that_are_not_held_are_tried_again_with_all_else_and_what_is_said_of_others_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = Node(monkeypatch, published("a"), "a")
    node.reservations.remark, node.reservations.limit = "not reserved: it is Monday", 10
    await node.start()

    def shown() -> list[PublicationStatus]:
        return node.reconciler.status(running=True).publications

    assert [each.reason for each in shown()] == ["not reserved: it is Monday"]
    node.reservations.remark = ""
    await node.reconciler._tick(everything=False)
    assert [each.reason for each in shown()] == ["not reserved: it is Monday"]
    await node.reconciler._tick(everything=True)
    before = shown()
    assert [each.reason for each in before] == [""]
    await node.reconciler._tick(everything=True)
    assert shown()[0] is before[0]


@pytest.mark.asyncio
async def test_a_configuration_that_was_refused_is_taken_up_when_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "RETRY", 0.01)
    node = Node(monkeypatch, published("a"), "a", "b")
    running = asyncio.ensure_future(node.reconciler.run())
    account = node.reconciler._account
    try:
        await until(lambda: node.ports() == [8000])
        node.trouble = FirewallError("it changes all the time")
        node.reconciler.use(published("a", "b"))
        await until(lambda: account.stale == "it changes all the time")
        assert node.ports() == [8000]
        assert node.reservations.limit == 0  # which that configuration has otherwise
        node.trouble = None
        await until(lambda: node.ports() == [8000, 8001])
        assert account.stale == ""
        assert node.reservations.limit == 4096
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within 10 s")


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
