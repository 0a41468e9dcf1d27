"""Host ports are reserved before they are published, and let go in time, over a stand-in for the sockets."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from ctrport import conntrack, hairpin, hostports, localnet, ports
from ctrport.dataplane import Dataplane
from ctrport.firewall import FirewallError
from ctrport.firewall.fake import MemoryKernel
from ctrport.firewall.tables import Tables
from ctrport.hostports import Claim, Held, NotOnNode, Reservations
from ctrport.listeners import Bound, Entry
from ctrport.model import Address, Family, Holder, NodeFacts, PortRange, Protocol, Publication, State
from ctrport.publish import Change, Publications
from ctrport.rules import Layout
from tests.unit import worlds
from tests.unit.worlds import active, candidate, declaration, key

NODE = NodeFacts(frozenset(Family), frozenset[Address]({worlds.NODE4}))


class Sockets(Reservations):
    """Takes what nobody has. ``others`` are the ports of other processes, ``used`` those of connections."""

    def __init__(self, limit: int = 100) -> None:
        super().__init__(limit)
        self.taken: dict[Hashable, Claim] = {}
        self.others: set[int] = set()
        self.used: set[int] = set()
        self.absent = False
        self.remark = ""
        self.takes = 0

    def __len__(self) -> int:
        return len(self.taken)

    def is_full(self) -> bool:
        return len(self) >= self.limit

    def take(self, key: Hashable, claim: Claim) -> str:
        self.takes += 1
        for port in claim.ports:
            if port in self.others:
                raise Held(claim.protocol, claim.addresses[0], port, "nginx (pid 7)")
        if self.absent:
            raise NotOnNode(claim.addresses[0])
        self.taken[key] = claim
        return self.remark

    def release(self, key: Hashable) -> None:
        self.taken.pop(key, None)

    def in_use(self, claim: Claim) -> list[tuple[Address, int]]:
        ours = {port for its in self.taken.values() for port in its.ports}
        return [(claim.addresses[0], p) for p in claim.ports if p in (self.others | self.used) - ours]

    @property
    def held(self) -> dict[str, str]:
        """The ports that are held, by who wants them."""
        return {str(key): str(claim.ports) for key, claim in self.taken.items()}


@pytest.fixture(autouse=True)
def _no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def drop_stale(*_: object) -> int:
        return 0

    (tmp_path / "docker0").mkdir()
    (tmp_path / "docker0" / "route_localnet").write_text("0")
    monkeypatch.setattr(localnet, "_CONF", tmp_path)
    monkeypatch.setattr(conntrack, "drop_stale", drop_stale)


class Node:
    """A daemon's dataplane on tables in memory, driven as the loop drives it."""

    def __init__(self, publications: Publications | None = None, kernel: MemoryKernel | None = None) -> None:
        self.sockets = Sockets()
        self.kernel = kernel or MemoryKernel()
        self.dataplane = self._dataplane()
        self.publications = publications or Publications([], worlds.FACTS)
        asyncio.run(self.dataplane.start())

    def follow(self, changes: Sequence[Change]) -> None:
        asyncio.run(self.dataplane.follow(changes, NODE))

    def reload(self) -> None:
        """Go on with another dataplane, as for another configuration."""
        before, self.dataplane = self.dataplane, self._dataplane()
        asyncio.run(self.dataplane.start())
        self.dataplane.succeed(before)

    def _dataplane(self) -> Dataplane:
        return Dataplane({Family.IPV4: Tables(self.kernel, Layout())}, Layout(), self.sockets)

    def settle(self) -> dict[str, str]:
        while (held := self.dataplane.reserve(self.publications.decide())) and self.publications.meet_also(held):
            pass
        self.follow(self.publications.settle())
        return {p.container.id if p.container else "-": str(p.bound or p.state) for p in self.publications}


def came(*publications: Publication) -> list[Change]:
    return [Change(None, publication) for publication in publications]


def start(publications: Publications, *names: str) -> None:
    for started, name in enumerate(names):
        publications.update(key(name), candidate(name, started=started))


WEB = active("8080:80")
OWNER = "default/web 8080:80/tcp"


def test_reservations_that_hold_nothing_yet_are_used_all_the_same() -> None:
    node = Node()
    assert node.dataplane.reserve(came(WEB)) == []
    assert node.sockets.held == {OWNER: "8080"}


def test_a_port_is_let_go_when_its_rules_are_gone_and_not_before() -> None:
    node = Node()
    node.dataplane.reserve(came(WEB))
    node.follow(came(WEB))
    node.kernel.fail_next_restore = lambda _: True
    with pytest.raises(FirewallError):
        node.follow([Change(WEB, None)])
    assert node.sockets.held == {OWNER: "8080"}
    node.follow([])
    assert node.sockets.held == {}


def test_a_port_whose_rules_could_not_be_taken_away_is_let_go_after_a_reload() -> None:
    node = Node()
    node.dataplane.reserve(came(WEB))
    node.follow(came(WEB))
    node.kernel.fail_next_restore = lambda _: True
    with pytest.raises(FirewallError):
        node.follow([Change(WEB, None)])
    for _ in range(2):
        node.reload()
        assert node.sockets.held == {OWNER: "8080"}
    node.follow([])
    assert node.sockets.held == {}
    assert node.dataplane.remark(WEB) == ""


def test_a_port_that_was_had_for_what_was_never_followed_is_let_go_after_a_reload() -> None:
    node = Node()
    node.dataplane.reserve(came(WEB))
    node.reload()
    node.follow([])
    assert node.sockets.held == {}


def test_what_was_never_written_is_let_go_with_what_is_withdrawn() -> None:
    node = Node()
    node.dataplane.reserve(came(WEB))
    node.kernel.fail_next_restore = lambda _: True
    with pytest.raises(FirewallError):
        node.follow(came(WEB))
    node.follow([Change(WEB, None)])
    assert node.sockets.held == {}
    assert node.dataplane.remark(WEB) == ""


def test_what_was_reserved_and_then_denied_is_let_go() -> None:
    wanted = [declaration("api", "8000-8001:80-81"), declaration("db", "8001-8002:80-81", line=2)]
    node = Node(Publications([*wanted, declaration("web", "8002:80", line=3)], worlds.FACTS))
    start(node.publications, "api", "db", "web")
    node.sockets.others = {8000}
    # At first web has 8002, until api turns out to be without its ports, and db has them.
    assert node.settle() == {"api": "conflict", "db": "8001-8002:80-81/tcp", "web": "conflict"}
    assert node.sockets.held == {"default/db 8001-8002:80-81/tcp": "8001-8002"}


def test_a_port_goes_from_one_container_to_the_next_without_a_gap() -> None:
    node = Node(Publications([declaration("*", "8080:80")], worlds.FACTS))
    start(node.publications, "api", "web")
    node.settle()
    node.publications.update(key("api"), None)
    node.dataplane.reserve(node.publications.decide())
    assert node.sockets.held == {"default/api 8080:80/tcp": "8080", OWNER: "8080"}
    node.settle()
    assert node.sockets.held == {OWNER: "8080"}


def test_an_address_that_is_just_coming_is_tried_again() -> None:
    node = Node()
    web = active("192.0.2.1:8080:80")
    node.sockets.absent = True
    assert node.dataplane.reserve(came(web)) == []
    node.follow(came(web))
    assert node.dataplane.remark(web) == "not reserved: 192.0.2.1 is not an address of this node"
    node.sockets.absent = False
    assert node.dataplane.reserve_again() == []
    assert node.dataplane.remark(web) == ""
    assert list(node.sockets.held.values()) == ["8080"]


def test_trying_again_ends_where_no_more_can_be_held() -> None:
    node = Node()
    both = came(WEB, active("8081:81"), active("8082:82"))
    node.sockets.remark = "not reserved, only looked at: firewall.reserve_limit (100) is reached"
    node.dataplane.reserve(both)
    node.follow(both)
    node.sockets.limit, node.sockets.takes = 3, 0
    assert node.dataplane.reserve_again() == []
    assert node.sockets.takes == 0


def test_who_takes_a_port_that_was_not_reserved_is_told() -> None:
    node = Node()
    node.sockets.remark = "not reserved: connections that have ended are still on port 8080"
    node.dataplane.reserve(came(WEB))
    node.follow(came(WEB))
    node.sockets.others = {8080}
    [holder] = node.dataplane.reserve_again()
    assert holder == Holder("nginx (pid 7)", ports.parse("0.0.0.0:8080:8080"))
    assert node.dataplane.still_held([holder]) == [holder]
    node.sockets.others = set()
    assert node.dataplane.still_held([holder]) == []
    node.sockets.absent = True
    assert node.dataplane.still_held([holder]) == []


FREE = replace(worlds.FACTS, free_ports=(PortRange(100, 600),))


@pytest.mark.parametrize("limit", [0, 100])
def test_a_port_is_chosen_that_nobody_uses_however_many_are_in_use(limit: int) -> None:
    node = Node(Publications([declaration("*", "80")], FREE))
    node.sockets.limit = limit
    node.sockets.others, node.sockets.used = set(range(100, 350)), set(range(350, 500))
    start(node.publications, "web")
    assert node.settle() == {"web": "500:80/tcp"}
    assert node.sockets.takes == 1  # no other was looked at closely
    assert node.publications.met == []  # nobody wants those
    assert node.settle() == {"web": "500:80/tcp"}


def test_a_chosen_port_of_an_earlier_run_is_had_again_though_a_connection_uses_it() -> None:
    first = Node(Publications([declaration("*", "80")], FREE))
    start(first.publications, "web")
    assert first.settle() == {"web": "100:80/tcp"}
    second = Node(Publications([declaration("*", "80")], FREE), first.kernel)
    second.publications.recover(second.dataplane.chosen)
    second.sockets.used = {100}
    start(second.publications, "web")
    assert second.settle() == {"web": "100:80/tcp"}


def test_two_who_differ_in_access_have_two_ports_also_after_a_restart() -> None:
    near = replace(declaration("web", "80"), access=replace(worlds.ANYONE, interface="eth0"))
    declared = [near, declaration("web", "80", line=2)]

    def bound(node: Node) -> dict[str, str]:
        start(node.publications, "web")
        node.settle()
        return {p.source: str(p.bound) for p in node.publications if p.state is State.ACTIVE}

    first = Node(Publications(declared, FREE))
    assert bound(first) == {"config.yaml:1": "100:80/tcp", "config.yaml:2": "101:80/tcp"}
    second = Node(Publications(declared, FREE), first.kernel)
    second.publications.recover(second.dataplane.chosen)
    assert bound(second) == bound(first)


@pytest.mark.parametrize(
    ("addresses", "where"),
    [
        (["192.0.2.7"], "192.0.2.7"),
        (["::ffff:192.0.2.7"], "192.0.2.7"),
        (["::"], "0.0.0.0"),
        (["0.0.0.0", "192.0.2.7"], "0.0.0.0"),
    ],
)
def test_a_process_on_one_address_keeps_nobody_off_the_others(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], where: str
) -> None:
    def there(protocol: Protocol, of: PortRange) -> dict[int, list[Entry]]:
        return {8080: [Entry(Bound(ip_address(at), v6only=False), 8080, True, 1) for at in addresses]}

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EADDRINUSE, "in use")

    def name(inodes: Iterable[int], _: Callable[[str], str | None]) -> str:
        return "nginx"

    monkeypatch.setattr(hostports, "entries", there)
    monkeypatch.setattr(hostports, "bind", refused)
    monkeypatch.setattr(hostports, "holder", name)
    with pytest.raises(Held) as held:
        Reservations(10).take("web", Claim(Protocol.TCP, PortRange(8080, 8080), (ip_address("0.0.0.0"),)))
    assert str(held.value.at) == where


# Hairpin mode


class Bridge:
    """Which ports have the mode, and what is asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on: set[str] = set()
        self.asked: list[str] = []
        self.broken = False
        monkeypatch.setattr(hairpin, "is_needed", lambda *_: True)
        monkeypatch.setattr(hairpin, "is_on", self.is_on)
        monkeypatch.setattr(hairpin, "switch", self.switch)

    def is_on(self, port: str) -> bool:
        self.asked.append(port)
        return port in self.on

    def switch(self, port: str, on: bool) -> bool:
        if self.broken:
            raise OSError(1, "Operation not permitted")
        changed = (port in self.on) is not on
        (self.on.add if on else self.on.discard)(port)
        return changed


def behind(port: str, publication: Publication) -> Publication:
    return replace(publication, attachments=tuple(replace(a, port=port) for a in publication.attachments))


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> Bridge:
    return Bridge(monkeypatch)


def test_two_mappings_behind_one_port_share_its_mode(bridge: Bridge) -> None:
    node = Node()
    one, two = behind("veth1", WEB), behind("veth1", active("8081:81"))
    node.follow(came(one, two))
    assert bridge.on == {"veth1"}
    assert bridge.asked == ["veth1"]
    node.follow([Change(one, None)])
    assert bridge.on == {"veth1"}
    node.follow([Change(two, None)])
    assert bridge.on == set()


def test_a_port_is_asked_once_however_many_mappings_are_behind_it(bridge: Bridge) -> None:
    bridge.on.add("veth1")
    node = Node()
    node.follow(came(*(behind("veth1", active(f"{port}:80")) for port in range(8000, 8050))))
    assert bridge.asked == ["veth1"]


def test_the_mode_moves_with_a_mapping(bridge: Bridge) -> None:
    node = Node()
    here, there = behind("veth1", WEB), behind("veth2", active("8080:80", "172.17.0.3"))
    node.follow(came(here))
    node.follow([Change(here, there)])
    assert bridge.on == {"veth2"}


def test_a_mode_that_was_there_stays(bridge: Bridge) -> None:
    bridge.on.add("veth1")
    node = Node()
    one = behind("veth1", WEB)
    node.follow(came(one))
    node.follow([Change(one, None)])
    assert bridge.on == {"veth1"}


def test_a_mode_that_could_not_be_switched_off_is_switched_off_later(bridge: Bridge) -> None:
    node = Node()
    one, other = behind("veth1", WEB), active("8081:81")
    node.follow(came(one))
    bridge.broken = True
    node.follow([Change(one, None)])
    assert bridge.on == {"veth1"}
    bridge.broken = False
    node.follow(came(other))
    assert bridge.on == set()
