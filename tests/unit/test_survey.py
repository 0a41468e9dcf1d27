"""What an event hints at is looked up ahead, and believed only as far as containerd confirms it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any, cast

import pytest

from ctrport import config, endpoints, nodeports, ports
from ctrport.config import Config
from ctrport.endpoints import LOOPBACK_ONLY
from ctrport.expected import _Known
from ctrport.firewall import FirewallError
from ctrport.listed import Listed
from ctrport.model import (
    Attachment,
    Candidate,
    ContainerKey,
    Endpoint,
    Family,
    Holder,
    NodeFacts,
    Obstacle,
    State,
)
from ctrport.survey import LOOKS_FOR_MORE, Survey
from tests.unit import worlds

WEB = ContainerKey("default", "web")
CONFIG = config.parse('publish: [{match: {container: web}, ports: ["8080:80"]}]', "config.yaml")


class Finder:
    """Gives each process an address that tells it; ``asked`` says for whom and when it was asked."""

    def __init__(self, asked: list[str]) -> None:
        self._asked = asked
        self.there = True

    def heard_of(self, pid: int) -> int:
        return 7

    def find(self, pid: int, nsid: int | None = None) -> Endpoint | Obstacle:
        self._asked.append(f"find {pid}")
        if not self.there:
            return Obstacle(State.WAITING, "it has no address")
        address = ip_address(f"10.{pid >> 16 & 255}.{pid >> 8 & 255}.{pid & 255}")
        return Endpoint((Attachment(address, "docker0", ip_network(f"{address}/32")),))


class Answers:
    """A containerd that takes its time, and then says that ``web`` is the process ``pid``."""

    def __init__(self, asked: list[str], pid: int | None) -> None:
        self._asked, self._pid = asked, pid

    async def container(self, key: ContainerKey, *, annotations: bool, stored: Listed | None) -> Listed | None:
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


class Foreseen:
    """A survey to which containerd has said what is stored of ``web``, and a process of this machine with a cgroup."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, cgroup: str = "/default/web") -> None:
        self.pid = os.getpid()
        self._shown = f"0::{cgroup}\n"
        read = endpoints.read
        monkeypatch.setattr(endpoints, "read", lambda path: self._shown if path.endswith("/cgroup") else read(path))
        self.asked: list[str] = []
        containerd: Any = Answers(self.asked, self.pid)
        self.finder = Finder(self.asked)
        finder: Any = self.finder
        self.survey = Survey(CONFIG, containerd, finder, {})

    def stored(self) -> None:
        stored = Listed(WEB, None, cgroup="/default/web", runs=False)
        self.survey._expected._known[WEB] = _Known(stored)
        self.survey._expected._made_at = time.monotonic()

    def addresses(self) -> list[str]:
        endpoints = (candidate.endpoint for candidate in self.survey.publications.candidates)
        return [str(a.address) for e in endpoints if isinstance(e, Endpoint) for a in e.attachments]


def test_what_the_kernel_bears_out_is_published_before_containerd_has_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Foreseen(monkeypatch)
    assert world.survey.foresee({WEB: world.pid}) == set()  # nothing is stored of it, as far as is known
    world.stored()
    assert world.survey.foresee({WEB: None}) == set()
    assert world.survey.foresee({WEB: world.pid}) == {WEB}
    assert world.addresses() == [address(world.pid)]
    assert world.asked == [f"find {world.pid}"]
    asyncio.run(world.survey.look({WEB: world.pid}, foreseen={WEB}))
    assert world.asked == [f"find {world.pid}", "ask containerd", "answer"]  # and is not looked for again
    assert world.addresses() == [address(world.pid)]
    assert world.survey._expected.stored(WEB) is None


@pytest.mark.parametrize("cgroup", ["/default/other", "/default/web/below", "/"])
def test_a_process_in_another_cgroup_is_not_believed_to_be_the_containers(
    monkeypatch: pytest.MonkeyPatch, cgroup: str
) -> None:
    world = Foreseen(monkeypatch, cgroup=cgroup)
    world.stored()
    assert world.survey.foresee({WEB: world.pid}) == set()
    assert world.addresses() == []


def test_a_process_that_is_gone_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Foreseen(monkeypatch)
    world.stored()
    assert world.survey.foresee({WEB: (1 << 22) + 1}) == set()
    assert world.addresses() == []


def test_what_was_foreseen_and_containerd_does_not_confirm_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Foreseen(monkeypatch)
    world.stored()
    world.survey.foresee({WEB: world.pid})
    containerd: Any = Answers(world.asked, None)
    world.survey._containerd = containerd
    asyncio.run(world.survey.look({WEB: world.pid}, foreseen={WEB}))
    assert world.addresses() == []


def test_what_is_listed_again_as_it_was_is_not_looked_at_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Foreseen(monkeypatch)
    told: list[ContainerKey] = []
    update = world.survey.publications.update

    def telling(key: ContainerKey, candidate: Candidate | None) -> None:
        told.append(key)
        update(key, candidate)

    monkeypatch.setattr(world.survey.publications, "update", telling)
    for _ in range(3):
        asyncio.run(world.survey.look({WEB: None}))
    assert told == [WEB]
    monkeypatch.setattr(world.survey.publications, "candidate", lambda key: None)  # it is not known where it is
    asyncio.run(world.survey.look({WEB: None}))
    assert told == [WEB, WEB]


def test_a_container_whose_process_is_gone_is_withdrawn_before_containerd_has_said_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = Foreseen(monkeypatch)
    asyncio.run(world.survey.look({WEB: world.pid}))
    assert world.survey.foresee({WEB: None}) == set()  # it is there yet
    assert world.addresses() == [address(world.pid)]
    monkeypatch.setattr(endpoints, "started", lambda pid: 0)  # another process has its number by now
    assert world.survey.foresee({WEB: None}) == {WEB}
    assert world.addresses() == []


def test_what_was_found_before_the_start_is_looked_for_again_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Foreseen(monkeypatch)
    world.stored()
    known = world.survey._expected._known[WEB]
    known.pid = world.pid
    known.nsid = 7
    world.survey.network_changed(7)
    earlier = Endpoint((Attachment(ip_address("10.9.9.9"), "docker0", ip_network("10.9.9.9/32")),))
    known.endpoint = earlier  # which it has left meanwhile
    world.asked.clear()
    assert world.survey.foresee({WEB: world.pid}) == {WEB}
    assert (world.addresses(), world.asked) == (["10.9.9.9"], [])
    asyncio.run(world.survey.look({WEB: world.pid}, foreseen={WEB}))
    assert (world.addresses(), world.asked) == (
        [address(world.pid)],
        ["ask containerd", "answer", f"find {world.pid}"],
    )
    asyncio.run(world.survey.look({WEB: None}))
    assert world.asked[3:] == ["ask containerd", "answer"]


def test_what_is_to_start_is_published_when_its_network_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Foreseen(monkeypatch)
    told: list[float | None] = []
    world.survey.on_foreseen = lambda: told.append(world.survey.foreseen_since)
    world.stored()
    known = world.survey._expected._known[WEB]
    known.pid, known.nsid = world.pid, 7

    async def work() -> None:
        world.finder.there = False
        world.survey.network_changed(7)
        assert (world.survey.foreseen_since, world.survey.foresee({}), told) == (None, set(), [])
        world.finder.there = True
        world.survey.network_changed(7)

    asyncio.run(work())
    assert len(told) == 1
    assert told[0] is not None
    assert world.survey.foresee({}) == {WEB}
    assert world.addresses() == [address(world.pid)]
    assert world.survey.foresee({}) == set()
    assert world.survey.foreseen_since is None
    world.survey.foresee({WEB: world.pid})
    asyncio.run(world.survey.look({WEB: world.pid}, foreseen={WEB}))
    assert world.addresses() == [address(world.pid)]


@pytest.mark.parametrize("starts", [True, False])
def test_that_a_container_has_no_network_is_said_when_it_has_started(
    monkeypatch: pytest.MonkeyPatch, starts: bool
) -> None:
    world = Foreseen(monkeypatch)
    world.finder.there = False

    async def containers(*_: object, **__: object) -> Listed:
        return Listed(WEB, world.pid, starts=starts)

    monkeypatch.setattr(world.survey._containerd, "container", containers)
    asyncio.run(world.survey.look({WEB: None}))
    assert [candidate.container.key for candidate in world.survey.publications.candidates] == ([] if starts else [WEB])
    world.finder.there = True
    asyncio.run(world.survey.look({WEB: None}))
    assert world.addresses() == [address(world.pid)]


def test_where_it_was_before_its_start_does_not_stand_whatever_came_between(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Foreseen(monkeypatch)
    starts = True

    async def container(*_: object, **__: object) -> Listed:
        return Listed(WEB, world.pid, starts=starts)

    monkeypatch.setattr(world.survey._containerd, "container", container)
    asyncio.run(world.survey.look({WEB: None}))
    assert world.addresses() == [address(world.pid)]
    asyncio.run(world.survey.look({}))  # a mere change of the node's own addresses
    world.survey._expected.forget_all()  # as when everything is looked at
    there = Endpoint((Attachment(ip_address("10.99.0.9"), "docker0", ip_network("10.99.0.9/32")),))
    monkeypatch.setattr(world.finder, "find", lambda pid, nsid=None: there)
    starts = False
    world.survey.foresee({WEB: world.pid})
    asyncio.run(world.survey.look({WEB: world.pid}))
    assert world.addresses() == ["10.99.0.9"]
    assert WEB not in world.survey._early


def test_what_is_known_ahead_of_a_container_stays_until_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Foreseen(monkeypatch)
    world.stored()
    starts = True

    async def container(*_: object, **__: object) -> Listed:
        return Listed(WEB, world.pid, starts=starts)

    monkeypatch.setattr(world.survey._containerd, "container", container)
    asyncio.run(world.survey.look({WEB: None}))
    assert world.survey._expected.stored(WEB) is not None
    starts = False
    asyncio.run(world.survey.look({WEB: None}))
    assert world.survey._expected.stored(WEB) is None


def test_who_is_gone_is_not_looked_for_in_another_family(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Foreseen(monkeypatch)
    asyncio.run(world.survey.look({WEB: None}))
    assert list(world.survey._young) == [WEB]
    world.survey._containerd = cast("Any", Answers(world.asked, None))
    asyncio.run(world.survey.look({WEB: None}))
    assert list(world.survey._young) == []


class Growing:
    """A survey of ``web``, which gets its second address when it runs already. ``finds`` counts the looks at it."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        config: Config = CONFIG,
        served: Collection[Family] = tuple(Family),
        forwarded: Collection[Family] = tuple(Family),
    ) -> None:
        async def node(*, others: bool = True) -> None:
            pass

        self.at = ["172.17.0.2"]
        self.finds = self.glances = 0
        its: Any = self
        self.survey = Survey(config, its, its, dict.fromkeys(served, its))
        self.survey.facts = replace(self.survey.facts, forwarding=frozenset(forwarded))
        monkeypatch.setattr(self.survey, "node", node)
        self.resync()

    def find(self, pid: int, nsid: int | None = None) -> Endpoint | Obstacle:
        self.finds += 1
        return worlds.endpoint(*self.at) if self.at else LOOPBACK_ONLY

    def has_address(self, pid: int, family: Family) -> bool:
        self.glances += 1
        return family in {Family.of(ip_address(one)) for one in self.at}

    async def namespaces(self) -> list[str]:
        return ["default"]

    async def containers(self, namespace: str, *, annotations: bool) -> list[Listed]:
        return [Listed(WEB, os.getpid())]

    def resync(self) -> None:
        asyncio.run(self.survey.everything())

    def addresses(self) -> list[str]:
        endpoints = (candidate.endpoint for candidate in self.survey.publications.candidates)
        return [str(a.address) for e in endpoints if isinstance(e, Endpoint) for a in e.attachments]


@pytest.mark.parametrize("first", ["172.17.0.2", "fd00::2"])
@pytest.mark.parametrize("ticks", [0, 100])
def test_an_address_of_the_other_family_that_comes_later_is_taken_in(
    monkeypatch: pytest.MonkeyPatch, first: str, ticks: int
) -> None:
    world = Growing(monkeypatch)
    world.survey.publications.update(WEB, None)
    world.at = [first]
    world.resync()
    assert world.addresses() == [first]
    for _ in range(ticks):
        world.survey.what_may_heal()
    world.at = ["172.17.0.2", "fd00::2"]
    if ticks:
        world.survey.what_may_heal()
        assert world.addresses() == [first]  # it has had its time: only with all else it is looked at again
        world.resync()
    else:
        world.survey.what_may_heal()
    assert world.addresses() == ["172.17.0.2", "fd00::2"]


def test_what_is_known_stands_when_the_other_family_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Growing(monkeypatch)
    world.at = ["172.17.0.9", "fd00::2"]
    world.survey.what_may_heal()
    assert world.addresses() == ["172.17.0.2", "fd00::2"]
    world.at = []
    world.resync()
    assert world.addresses() == ["172.17.0.2", "fd00::2"]


def test_the_other_family_is_looked_for_a_few_times_after_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Growing(monkeypatch)
    before = world.finds
    for _ in range(100):
        world.survey.what_may_heal()
    assert world.glances == LOOKS_FOR_MORE
    assert world.finds == before  # as long as it has no such address, nothing else is looked at


def test_of_many_a_few_are_looked_at_at_a_time_and_with_all_else_those_that_had_their_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ctrport.survey.MORE_AT_A_TIME", 1)
    world = Growing(monkeypatch)
    other = ContainerKey("default", "other")
    world.survey.publications.update(other, worlds.candidate("other", "172.17.0.3"))
    world.survey._young[other] = LOOKS_FOR_MORE
    looked: list[ContainerKey] = []

    def completing(key: ContainerKey) -> bool:
        looked.append(key)
        return True

    monkeypatch.setattr(world.survey, "_complete", completing)
    for _ in range(4):
        world.survey.what_may_heal()
    assert looked == [WEB, other] * 2
    monkeypatch.setattr(world.survey, "_take_in", lambda found: None)
    world.resync()
    assert looked == [WEB, other] * 2  # each has its turns yet
    for _ in range(100):
        world.survey.what_may_heal()
    assert looked == [WEB, other] * 3
    world.resync()
    assert sorted(looked[6:]) == [other, WEB]


def test_a_container_whose_minute_is_over_waits_for_no_turn_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrport.survey.MORE_AT_A_TIME", 1)
    world = Growing(monkeypatch)
    world.survey._young = {ContainerKey("default", f"gone{n}"): 100 for n in range(20)} | world.survey._young
    for _ in range(LOOKS_FOR_MORE):
        world.survey.what_may_heal()
    assert (WEB in world.survey._young, world.glances) == (True, 0)
    world.at = ["172.17.0.2", "fd00::2"]
    world.resync()
    assert world.addresses() == world.at


@pytest.mark.parametrize(
    "asked",
    [
        {"served": [Family.IPV4]},
        {"forwarded": [Family.IPV4]},
        {"config": config.parse('publish: [{match: {container: web}, ports: ["0.0.0.0:8080:80"]}]', "config.yaml")},
    ],
    ids=str,
)
def test_a_family_that_nobody_asks_for_is_not_looked_for(monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    world = Growing(monkeypatch, **asked)
    before = world.finds, world.glances
    world.survey.what_may_heal()
    world.resync()
    assert (world.finds, world.glances) == before


def test_a_container_without_an_address_is_looked_at_until_it_has_one_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = Growing(monkeypatch, served=[Family.IPV4])
    world.survey.publications.update(WEB, None)
    world.at = []
    world.resync()
    before = world.finds
    world.survey.what_may_heal()
    world.survey.what_may_heal()
    assert (world.finds - before, world.addresses()) == (2, [])
    world.at = ["172.17.0.2"]
    world.survey.what_may_heal()
    assert world.addresses() == ["172.17.0.2"]
    world.survey.what_may_heal()
    assert world.finds - before == 3
    assert world.survey._waiting == set()


def test_those_that_wait_are_looked_at_under_another_configuration_too(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Growing(monkeypatch, served=[Family.IPV4])
    world.survey.publications.update(WEB, None)
    world.at = []
    world.resync()
    asyncio.run(world.survey.use(config.parse("publish: []", "config.yaml"), {}))
    before = world.finds
    world.survey.what_may_heal()
    assert world.finds == before  # nobody publishes it
    asyncio.run(world.survey.use(CONFIG, {}))
    world.at = ["172.17.0.2"]
    world.survey.what_may_heal()
    assert world.addresses() == ["172.17.0.2"]


def test_a_node_that_is_as_it_was_has_the_same_facts_and_nobody_compares_them(monkeypatch: pytest.MonkeyPatch) -> None:
    its: Any = object()
    survey = Survey(CONFIG, its, its, {})
    learnt: list[NodeFacts] = []
    monkeypatch.setattr(survey.publications, "learn", learnt.append)
    before = survey.facts
    asyncio.run(survey.node(others=False))
    assert (survey.facts is before, learnt) == (True, [])
    asyncio.run(survey.node())
    assert learnt == [survey.facts] == [before]
    monkeypatch.setattr("ctrport.survey.look", lambda *given: replace(survey._node))
    asyncio.run(survey.node(others=False))
    assert len(learnt) == 2


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


class Lists:
    """A containerd with the containers of dockerd and others; ``listed`` are the namespaces that were asked for."""

    def __init__(self) -> None:
        self.listed: list[str] = []

    async def namespaces(self) -> list[str]:
        return ["default", "moby"]

    async def containers(self, namespace: str, *, annotations: bool) -> list[Listed]:
        self.listed.append(namespace)
        return []


def test_a_configuration_that_begins_or_ceases_to_name_dockerds_namespace_has_it_looked_at_or_not() -> None:
    naming = config.parse('publish: [{match: {namespace: moby, container: web}, ports: ["8080:80"]}]', "config.yaml")
    containerd: Any = Lists()
    nothing: Any = None

    async def listed_for(next: config.Config) -> list[str]:
        containerd.listed.clear()
        await survey.use(next, {})
        return list(containerd.listed)

    async def listed() -> list[list[str]]:
        return [await listed_for(each) for each in (naming, naming, CONFIG, CONFIG)]

    survey = Survey(CONFIG, containerd, nothing, {})
    assert asyncio.run(listed()) == [["default", "moby"], [], ["default"], []]
