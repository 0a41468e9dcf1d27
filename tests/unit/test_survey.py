"""What an event hints at is looked up ahead, and believed only as far as containerd confirms it."""

from __future__ import annotations

import asyncio
import os
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ctrport import config, nodeports, ports
from ctrport.containerd import Listed
from ctrport.firewall import FirewallError
from ctrport.model import Attachment, ContainerKey, Endpoint, Family, Holder
from ctrport.survey import Survey

WEB = ContainerKey("default", "web")
CONFIG = config.parse('publish: [{match: {container: web}, ports: ["8080:80"]}]', "config.yaml")


class Finder:
    """Gives each process an address that tells it; ``asked`` says for whom and when it was asked."""

    def __init__(self, asked: list[str]) -> None:
        self._asked = asked

    def find(self, pid: int) -> Endpoint:
        self._asked.append(f"find {pid}")
        address = ip_address(f"10.{pid >> 16 & 255}.{pid >> 8 & 255}.{pid & 255}")
        return Endpoint((Attachment(address, "docker0", ip_network(f"{address}/32")),))


class Answers:
    """A containerd that takes its time, and then says that ``web`` is the process ``pid``."""

    def __init__(self, asked: list[str], pid: int | None) -> None:
        self._asked, self._pid = asked, pid

    async def container(self, key: ContainerKey, *, annotations: bool) -> Listed | None:
        self._asked.append("ask containerd")
        await asyncio.sleep(0.01)
        self._asked.append("answer")
        return None if self._pid is None else Listed(key, self._pid)


def looked(pid: int | None, hint: int | None) -> tuple[list[str], list[str]]:
    """Return what was asked in which order, and the address that ``web`` got, if it did."""
    asked: list[str] = []
    containerd: Any = Answers(asked, pid)
    finder: Any = Finder(asked)
    survey = Survey(CONFIG, containerd, finder, {})
    asyncio.run(survey.look({WEB: hint}))
    endpoints = (candidate.endpoint for candidate in survey.publications.candidates)
    return asked, [str(a.address) for e in endpoints if isinstance(e, Endpoint) for a in e.attachments]


def address(pid: int) -> str:
    return f"10.{pid >> 16 & 255}.{pid >> 8 & 255}.{pid & 255}"


def test_the_process_that_an_event_names_is_looked_at_while_containerd_answers() -> None:
    pid = os.getpid()
    asked, found = looked(pid, hint=pid)
    assert asked == ["ask containerd", f"find {pid}", "answer"]
    assert found == [address(pid)]


@pytest.mark.parametrize("hint", [os.getppid(), (1 << 22) + 1, None])
def test_a_hint_that_containerd_does_not_confirm_counts_for_nothing(hint: int | None) -> None:
    pid = os.getpid()
    asked, found = looked(pid, hint)
    assert asked[-2:] == ["answer", f"find {pid}"]
    assert found == [address(pid)]


def test_a_hint_for_what_containerd_does_not_have_publishes_nothing() -> None:
    assert looked(None, hint=os.getpid())[1] == []


class Chains:
    """Tables in which a host port is held, as long as they can be read."""

    def __init__(self) -> None:
        self.readable = True

    async def holders(self) -> list[Holder]:
        if not self.readable:
            raise FirewallError("the chain could not be listed")
        return [Holder("CNI-HOSTPORT-DNAT", ports.parse("8080:8080"))]


def test_what_cannot_be_seen_in_one_place_stands_and_hides_nothing_in_another(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] | None = []

    async def asked(family: Family) -> list[Holder]:
        if found is None:
            raise nodeports.Unknown("nft did not end")
        return [Holder(name, ports.parse("30080:30080")) for name in found]

    monkeypatch.setattr(nodeports, "holders", asked)
    nobody: Any = None
    chains: Any = Chains()
    survey = Survey(CONFIG, nobody, nobody, {Family.IPV4: chains})

    def seen() -> list[str]:
        asyncio.run(survey.node())
        return [holder.name for holder in survey.facts.holders]

    assert seen() == ["CNI-HOSTPORT-DNAT"]
    chains.readable, found = False, ["kube-proxy"]
    assert seen() == ["CNI-HOSTPORT-DNAT", "kube-proxy"]
    found = None
    assert seen() == ["CNI-HOSTPORT-DNAT", "kube-proxy"]
    chains.readable, found = True, []
    assert seen() == ["CNI-HOSTPORT-DNAT"]
