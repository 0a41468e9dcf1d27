"""The daemon's word compared with the kernel, over tables in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest

from ctrport import __version__, installed, localnet, status
from ctrport.firewall import Firewall, FirewallError
from ctrport.firewall.fake import MemoryKernel
from ctrport.firewall.tables import Tables
from ctrport.firewall.text import tag
from ctrport.installed import IN_LINE, MISSING, NotComparable, compared
from ctrport.model import Access, BridgeNetwork, Count, Family, NodeFacts, Publication
from ctrport.networks import isolation, rules_beside, rules_of
from ctrport.rules import Layout, Rule, Ruleset, Table, rules_at, rules_for, skeleton
from ctrport.status import PublicationStatus, Status
from tests.unit.worlds import NODE, active

WEB = active("8080:80", "172.17.0.2", "fd00::2")
DB = active("5432", "172.17.0.3", name="db", on="32768")
LOCAL = active("127.0.0.1:81:80", "10.244.1.7", name="api", device="cali12ab")
CHOSEN = replace(active("8000-8010:80", "172.17.0.4", name="pool", on="8003"), access=Access(interface="eth0"))
SHUT = active("[2001:db8::1]:82:80/udp", "fd00::5", name="v6", access=Access(sources=(ip_network("2001:db8::/32"),)))
ALL = (WEB, DB, LOCAL, CHOSEN, SHUT)
LAYOUT = Layout("CTRPORT", networks=True)
NETWORK = BridgeNetwork("br0", (WEB.attachments[0].subnet,))
SERVICE = NODE[0] + 1000


class World:
    """Tables of both families that hold what is wanted, and what the daemon says of itself."""

    def __init__(self, publications: Iterable[Publication] = ALL) -> None:
        self.kernels = {family: MemoryKernel(family) for family in Family}
        self.said = Status(
            *(__version__, True, 1, "", "connected", "in line"),
            publications=[PublicationStatus.of(each, "2024-05-01T10:00:00+00:00") for each in publications],
            networks=status.networks(NodeFacts(frozenset(), frozenset(), networks=(NETWORK,)), {"br1": "no bridge"}),
            backend="iptables-nft",
            families=[4, 6],
            layout=status.layout(LAYOUT),
            addresses=[str(address) for address in NODE],
            services=[str(SERVICE)],
        )
        rules = Ruleset(rule for family in Family for rule in (*skeleton(LAYOUT, family), *isolation(LAYOUT, family)))
        for address in NODE:
            rules.replace((), rules_at(address, LAYOUT))
        rules.replace((), rules_of(NETWORK, LAYOUT, Family))
        rules.replace((), rules_beside(SERVICE, LAYOUT))
        for publication in publications:
            rules.replace((), rules_for(publication, LAYOUT))
        self.rules = list(rules)
        asyncio.run(self._write())

    async def _write(self) -> None:
        for family, kernel in self.kernels.items():
            tables = Tables(kernel, LAYOUT)
            await tables.read()
            await tables.apply(tables.plan(rule for rule in self.rules if rule.family is family))

    def firewalls_of(self, families: Iterable[Family], layout: Layout, backend: str) -> dict[Family, Firewall]:
        assert (layout, backend) == (LAYOUT, "iptables-nft")
        return {family: Tables(self.kernels[family], layout) for family in families}

    def lose(self, matches: Callable[[Rule], bool]) -> None:
        lost = [rule for rule in self.rules if matches(rule)]
        assert lost
        for rule in lost:
            chain = self.kernels[rule.family].tables[rule.table][rule.chain]
            chain[:] = [text for text in chain if tag(rule) not in text]

    def compared(self, again: Callable[[], Status | None] = lambda: None) -> Status:
        return asyncio.run(compared(self.said, again))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    for device in ("docker0", "cali12ab"):
        (tmp_path / device).mkdir()
        (tmp_path / device / "route_localnet").write_text("1\n")
    monkeypatch.setattr(localnet, "_CONF", tmp_path)
    monkeypatch.setattr(installed, "PAUSE", 0.0)
    monkeypatch.setattr(installed, "PATIENCE", 0.1)
    world = World()
    monkeypatch.setattr(installed, "firewalls_of", world.firewalls_of)
    return world


def states(current: Status) -> dict[str, str]:
    return {its.container: its.state for its in current.publications}


def test_the_rules_follow_from_what_the_daemon_says(world: World) -> None:
    seen = world.compared()
    assert (seen.kernel, seen.undeclared) == (IN_LINE, [])
    assert all(its.installed and its.connections == its.bytes == 0 for its in seen.publications)
    assert set(states(seen).values()) == {"active"}


def test_what_a_rule_counted_is_told_of_whose_it_is(world: World) -> None:
    for rule in world.rules:
        if rule.owner.startswith("default/web ") and rule.table is Table.NAT and rule.chain == "CTRPORT":
            world.kernels[rule.family].counted[tag(rule)] = Count(3, 180)
    seen = world.compared()
    assert [(its.connections, its.bytes) for its in seen.publications] == [(6, 360), *[(0, 0)] * 4]


@pytest.mark.parametrize("table", [Table.NAT, Table.FILTER])
def test_what_lacks_a_rule_is_not_active(world: World, table: Table) -> None:
    world.lose(lambda rule: rule.owner.startswith("default/db ") and rule.table is table)
    seen = world.compared()
    assert states(seen) == {**dict.fromkeys(("web", "api", "pool", "v6"), "active"), "db": "waiting"}
    db = seen.publications[1]
    assert (db.reason, db.installed, db.bound, db.addresses) == (MISSING, False, "", [])
    assert db.since
    assert seen.kernel == "1 mapping is not all there"


def test_what_all_of_them_need_is_lacked_by_all(world: World) -> None:
    world.lose(lambda rule: rule.chain == "PREROUTING" and rule.table is Table.NAT)
    seen = world.compared()
    assert set(states(seen).values()) == {"waiting"}
    assert seen.kernel == "5 mappings are not all there"


def test_what_a_device_needs_is_lacked_by_who_is_behind_it(world: World, tmp_path: Path) -> None:
    world.lose(lambda rule: rule.owner == "device docker0" and rule.table is Table.FILTER)
    assert states(world.compared()) == {**dict.fromkeys(("web", "db", "pool", "v6"), "waiting"), "api": "active"}
    (tmp_path / "cali12ab" / "route_localnet").write_text("0\n")
    assert states(world.compared())["api"] == "waiting"


def test_what_nothing_declares_is_named(world: World) -> None:
    world.said = replace(world.said, publications=world.said.publications[1:])
    seen = world.compared()
    [left] = seen.undeclared
    assert (left.name, left.mapping, left.owner) == ("default/web", "8080:80/tcp", "default/web 8080:80/tcp")
    assert seen.kernel == "1 is there that nothing declares"


def test_what_a_daemon_that_cannot_write_does_not_know_is_known(world: World) -> None:
    first, *rest = world.said.publications
    first = replace(first, state="waiting", reason="somebody has held the lock", bound="")
    world.said = replace(world.said, publications=[first, *rest])
    seen = world.compared().publications[0]
    assert (seen.state, seen.installed) == ("waiting", True)
    assert seen.reason == "somebody has held the lock; its rules are in the kernel all the same"


def test_what_is_to_have_no_rules_lacks_none(world: World) -> None:
    idle = PublicationStatus("", "", "", "9:9/tcp", "", [], "waiting", "nobody", "c.yaml:1", "")
    world.said = replace(world.said, publications=[idle, *world.said.publications])
    world.lose(lambda rule: rule.chain == "PREROUTING")
    assert world.compared().publications[0] == idle


def test_a_difference_counts_where_it_lasts(world: World) -> None:
    """The kernel is written before the status is: what came or went just now is no difference."""
    later = world.said
    world.said = replace(later, publications=later.publications[1:])
    assert world.compared(lambda: later).kernel == IN_LINE  # web came
    gone = replace(later, publications=later.publications[1:])
    world.said = later
    world.lose(lambda rule: rule.owner.startswith("default/web "))
    assert world.compared(lambda: gone).kernel == IN_LINE  # web went

    def mended() -> None:
        for family, kernel in world.kernels.items():
            kernel.tables = whole[family]

    whole = {family: kernel.tables for family, kernel in World().kernels.items()}
    assert world.compared(mended).kernel == IN_LINE  # the daemon was quicker
    assert world.compared().kernel == IN_LINE


def test_a_difference_that_lasts_is_looked_at_until_patience_ends(world: World) -> None:
    world.lose(lambda rule: rule.owner.startswith("default/web "))
    began, looks = time.monotonic(), []
    assert world.compared(lambda: looks.append(1)).kernel == "1 mapping is not all there"
    assert time.monotonic() - began >= installed.PATIENCE
    assert len(looks) >= 1


def test_what_differs_in_one_look_and_what_in_the_next_are_two_things(world: World) -> None:
    whole = {family: kernel.tables for family, kernel in World().kernels.items()}
    world.lose(lambda rule: rule.owner.startswith("default/web "))

    def meanwhile() -> Status:
        for family, kernel in world.kernels.items():
            kernel.tables = whole[family]
        world.lose(lambda rule: rule.owner.startswith("default/db "))
        return replace(world.said, publications=world.said.publications[1:])

    seen = world.compared(meanwhile)
    assert (seen.kernel, seen.undeclared) == (IN_LINE, [])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": "0.0"}, r"the daemon is of another version \(0\.0\)"),
        ({"backend": ""}, "of another version"),
        ({"layout": {}}, "not understood"),
        ({"families": [5]}, "not understood"),
        ({"addresses": ["x"]}, "not understood"),
        ({"firewall": "not read yet"}, r"yet to see what runs \(containerd: .*\); rules stay as they are until then"),
    ],
)
def test_what_cannot_be_compared_is_not(world: World, change: dict[str, object], why: str) -> None:
    world.said = replace(world.said, **change)  # type: ignore[arg-type]
    with pytest.raises(NotComparable, match=why):
        world.compared()


def test_a_kernel_that_cannot_be_asked_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: object) -> None:
        raise FirewallError("no")

    monkeypatch.setattr(MemoryKernel, "glance", fails)
    with pytest.raises(FirewallError):
        world.compared()
