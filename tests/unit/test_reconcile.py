"""How often everything is looked at again, and which configuration is the one to be used."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ctrport import conntrack, nftports, nodeports, survey
from ctrport.config import Config, parse
from ctrport.containerd import Listed
from ctrport.dataplane import Dataplane
from ctrport.firewall import FirewallError
from ctrport.firewall.fake import MemoryKernel
from ctrport.firewall.tables import Tables
from ctrport.model import ContainerKey, Endpoint, Family
from ctrport.node import look
from ctrport.reconcile import TICK, Ground, Reconciler, ticks_to_resync
from ctrport.rules import Layout, Table
from ctrport.survey import Survey
from tests.unit import worlds

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


LAYOUT = Layout(localhost=False)


class Node:
    """A node whose containers are all this process, with one address, and its tables in memory.

    ``files`` are how many more containers can be looked at until this process may open no more files.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: Config, *names: str) -> None:
        async def nobody(family: Family) -> list[Any]:
            return []

        async def nothing(*_: object) -> int:
            return 0

        facts = replace(look(), facts=replace(look().facts, forwarding=frozenset(Family)), amiss={})
        monkeypatch.setattr(survey, "look", lambda networks: facts)
        monkeypatch.setattr(nodeports, "holders", nobody)
        monkeypatch.setattr(nftports, "holders", lambda family: [])
        monkeypatch.setattr(conntrack, "drop_stale", nothing)
        self.names = names
        self.files = 1000
        self.kernel = MemoryKernel()
        its: Any = self
        ground = self._ground()
        self.survey = Survey(config, its, its, ground.firewalls)
        self.reconciler = Reconciler(its, self.survey, ground, self._prepare, lambda: None, lambda: None)
        self.addresses = ["172.17.0.2"]

    address = "unix:///run/containerd/containerd.sock"

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
        return Ground(firewalls, Dataplane(firewalls, LAYOUT), None)

    async def _prepare(self, config: Config) -> Ground:
        return self._ground()

    async def start(self) -> None:
        await self.reconciler._dataplane.start()
        await self.resync()

    async def resync(self) -> None:
        await self.survey.everything()
        await self.reconciler._settle(mend=True)

    def ports(self) -> list[int]:
        """The host ports that there are rules for."""
        rules = "\n".join(self.kernel.tables[Table.NAT]["DOCKER"])
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
