"""The suite over the real commands and the real kernel, in a network namespace of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import socket
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from ctrport.firewall import FirewallError, Refused, Unusable
from ctrport.firewall.alarm import NftAlarm
from ctrport.firewall.door import Door
from ctrport.firewall.iptables_legacy import LegacyTables
from ctrport.firewall.iptables_nft import NftCommands
from ctrport.firewall.nft_table import NftTable
from ctrport.firewall.nftables import OwnTable
from ctrport.firewall.sets import table
from ctrport.firewall.tables import Tables
from ctrport.model import Family, Protocol, Publication
from ctrport.nfnetlink import NfTables, Writer
from ctrport.nlmsg import Message
from ctrport.rules import Layout, Rule, Ruleset, Table, rules_for
from embedded.host import Host, inside
from tests.contract.firewall import LAYOUT, FirewallContract, Run, Visitor, wanted
from tests.contract.tables import Operator, TablesContract
from tests.unit.worlds import active

T = TypeVar("T")


def in_namespace_of(host: Host, work: Coroutine[object, object, T]) -> T:
    """Run ``work`` on an event loop of a thread in the host's network namespace: what it starts is in there too."""
    machine = os.readlink("/proc/self/ns/net")

    async def awaited() -> T:
        # The last look before something is written: never the machine's own tables.
        here = os.readlink("/proc/thread-self/ns/net")
        assert here == os.readlink(f"/proc/{host.pid}/ns/net")
        assert here != machine
        return await work

    # The network namespace alone: the loop needs threads, which nobody has who is between two PID namespaces.
    return inside(host.pid, ("net",), lambda: asyncio.run(awaited()))


@pytest.fixture
def host() -> Iterator[Host]:
    with Host("tables") as host:
        assert os.readlink(f"/proc/{host.pid}/ns/net") != os.readlink("/proc/self/ns/net")
        yield host


@pytest.fixture
def private_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The lock of the legacy tables is a file, and the machine's is not the host's."""
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))


def visitor_of(host: Host, family: Family) -> Visitor:
    """Return who sends from the host itself; what is translated goes out by a device behind which nobody answers."""
    host.script(
        "ip link add nowhere type veth peer name end; ip link set nowhere arp off up; ip link set end up\n"
        "ip address add 192.0.2.1/32 dev lo; ip address add 172.17.0.1/16 dev nowhere\n"
        "ip address add 2001:db8::1/128 dev lo nodad; ip address add fd00::1/64 dev nowhere nodad"
    )
    domain, node = {
        Family.IPV4: (socket.AF_INET, "192.0.2.1"),
        Family.IPV6: (socket.AF_INET6, "2001:db8::1"),
    }[family]

    def visit(protocol: Protocol, port: int, packets: int = 1) -> None:
        kind = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}[protocol]
        with host.socket(kind, domain) as sender:
            sender.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # nobody will ever answer
                sender.connect((node, port))
            for _ in range(packets if protocol is Protocol.UDP else 0):
                sender.send(b"hello")

    return visit


class TestNftCommands(TablesContract):
    @pytest.fixture(params=list(Family))
    def kernel(self, request: pytest.FixtureRequest) -> Iterator[NftCommands]:
        kernel = NftCommands(request.param)
        yield kernel
        asyncio.run(kernel.close())

    @pytest.fixture
    def run(self, host: Host) -> Run:
        def run(work: Coroutine[object, object, T]) -> T:
            return in_namespace_of(host, work)

        return run

    @pytest.fixture
    def operator(self, host: Host, kernel: NftCommands) -> Operator:
        program = "iptables-nft" if kernel.family is Family.IPV4 else "ip6tables-nft"

        def write(table: Table, words: str) -> None:
            host.run(program, "-t", table.value, *shlex.split(words))

        return write

    @pytest.fixture
    def visitor(self, host: Host, kernel: NftCommands) -> Visitor:
        return visitor_of(host, kernel.family)


class TestLegacyTables(TablesContract):
    @pytest.fixture(params=list(Family))
    def kernel(self, request: pytest.FixtureRequest) -> LegacyTables:
        return LegacyTables(request.param)

    @pytest.fixture
    def run(self, host: Host, kernel: LegacyTables, private_lock: None) -> Run:
        async def closing(work: Coroutine[object, object, T]) -> T:
            try:
                return await work
            finally:
                await kernel.close()

        def run(work: Coroutine[object, object, T]) -> T:
            return in_namespace_of(host, closing(work))

        return run

    @pytest.fixture
    def operator(self, host: Host, kernel: LegacyTables, private_lock: None) -> Operator:
        program = "iptables-legacy" if kernel.family is Family.IPV4 else "ip6tables-legacy"

        def write(table: Table, words: str) -> None:
            host.run(program, "-w", "-t", table.value, *shlex.split(words))

        return write

    @pytest.fixture
    def visitor(self, host: Host, kernel: LegacyTables) -> Visitor:
        return visitor_of(host, kernel.family)


class NftGrounds:
    """Implements ``Grounds`` with a table of our own in the kernel."""

    def __init__(self, host: Host, family: Family) -> None:
        self.family = family
        self._host = host
        self._name = table(family)
        self._made: list[OwnTable] = []

    @property
    def damages(self) -> Mapping[str, Callable[[], object]]:
        maps = ("host-ports", "host-ports-at", "host-ranges-udp", "host-ranges-at")
        return {
            "a mapping deleted": lambda: self._nft(f"delete element {self._name} host-ports {{ tcp . 8080 }}"),
            "all mappings deleted": lambda: self._nft(*(f"flush map {self._name} {each}" for each in maps)),
            "what leads to them deleted": lambda: self._nft(f"flush chain {self._name} prerouting"),
            "all of it deleted": lambda: self._nft("flush ruleset"),
        }

    def _nft(self, *lines: str) -> None:
        self._host.run("nft", "-f", "-", input="".join(f"{line}\n" for line in lines))

    def firewall(self, layout: Layout) -> OwnTable:
        commands = NftCommands(self.family)
        self._made.append(OwnTable(NftTable(self.family), layout, [Door(commands, layout)], Tables(commands, layout)))
        return self._made[-1]

    async def close(self) -> None:
        for each in self._made:
            await each.close()

    async def everything(self) -> object:
        listed = self._host.run("nft", "--stateless", "list", "ruleset").stdout
        # The elements of a set are listed as they are hashed.
        return sorted(re.split(r",\n?\s+|\n|elements = \{ | \}", listed))

    def neighbour(self) -> None:
        self._nft("add table ip6 ctrport-not", f"add table {self._name.replace('ctrport', 'other')}")

    def usurper(self) -> None:
        self._nft(
            f"add table {self._name}",
            f"add set {self._name} blocked {{ type inet_service ; }}",
            f"add chain {self._name} forward {{ type filter hook forward priority 0 ; }}",
            f'add rule {self._name} forward th dport @blocked drop comment "not of ctrport"',
        )


class TestNftTable(FirewallContract):
    @pytest.fixture(params=list(Family))
    def grounds(self, request: pytest.FixtureRequest, host: Host) -> NftGrounds:
        return NftGrounds(host, request.param)

    @pytest.fixture
    def run(self, host: Host, grounds: NftGrounds) -> Run:
        async def closing(work: Coroutine[object, object, T]) -> T:
            try:
                return await work
            finally:
                await grounds.close()

        def run(work: Coroutine[object, object, T]) -> T:
            return in_namespace_of(host, closing(work))

        return run

    @pytest.fixture
    def visitor(self, host: Host, grounds: NftGrounds) -> Visitor:
        return visitor_of(host, grounds.family)

    def test_what_somebody_else_has_put_there_is_not_taken_for_ours(
        self, grounds: NftGrounds, run: Run, host: Host
    ) -> None:
        rules = Ruleset(wanted(grounds.family, ()))
        its = rules_for(active("8080:80", "172.17.0.2", "fd00::2"), LAYOUT)
        to = {Family.IPV4: "172.17.0.2", Family.IPV6: "fd00::2"}[grounds.family]
        firewall = grounds.firewall(LAYOUT)

        async def before() -> None:
            await firewall.read()
            await firewall.apply(firewall.plan(rules))

        async def after() -> None:
            new = [rule for rule in its if rule.family is grounds.family]
            plan = firewall.plan_change(rules.replace((), new))
            with pytest.raises(Refused, match="could not be written: File exists"):
                await firewall.apply(plan)
            await firewall.read()
            assert firewall.plan(rules).removed == []  # nobody's
            await firewall.apply(firewall.plan(rules))

        run(before())
        # The same port to the same place, and no word of whose it is.
        host.run(
            "nft", "add", "element", *table(grounds.family).split(" "), "host-ports", f"{{ tcp . 8080 : {to} . 80 }}"
        )
        run(after())


@pytest.mark.parametrize("numbers_known", [True, False])
def test_the_alarm_does_not_ring_for_changes_of_this_process(host: Host, numbers_known: bool) -> None:
    async def work() -> None:
        alarm = NftAlarm()
        alarm._numbers_known = numbers_known
        rules = Ruleset(wanted(Family.IPV4, ()))
        firewall = OwnTable(NftTable(Family.IPV4, alarm.disregard), LAYOUT)
        await firewall.read()
        await firewall.apply(firewall.plan(rules))
        for number in range(8000, 8100):
            its = [rule for rule in rules_for(active(f"{number}:80"), LAYOUT) if rule.family is Family.IPV4]
            await firewall.apply(firewall.plan_change(rules.replace((), its)))
        await firewall.close()
        process = await asyncio.create_subprocess_exec("nft", "add", "table", "ip", "other")
        await process.wait()
        async for writer in alarm:
            assert writer == Writer(process.pid, "nft")
            break
        alarm.close()

    in_namespace_of(host, work())


def test_a_change_is_as_many_bytes_whatever_the_table_holds(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    together = NfTables.together

    def counted(self: NfTables, batch: Sequence[Message]) -> None:
        sent.append(sum(len(message.body) for message in batch))
        together(self, batch)

    def rules_of(publication: Publication) -> list[Rule]:
        return [rule for rule in rules_for(publication, LAYOUT) if rule.family is Family.IPV4]

    async def work() -> None:
        firewall = OwnTable(NftTable(Family.IPV4), LAYOUT)
        rules = Ruleset(wanted(Family.IPV4, ()))
        await firewall.read()
        await firewall.apply(firewall.plan(rules))
        monkeypatch.setattr(NfTables, "together", counted)
        its = rules_of(active("60000:80", name="one"))

        async def come_and_go() -> list[int]:
            sent.clear()
            await firewall.apply(firewall.plan_change(rules.replace((), its)))
            await firewall.apply(firewall.plan_change(rules.replace(its, ())))
            return sent.copy()

        others = [active(f"{number}:80", f"172.17.{number >> 8}.{number & 255}") for number in range(1000, 11000)]
        await firewall.apply(firewall.plan_change(rules.replace((), rules_of(others[0]))))
        beside_one = await come_and_go()
        many = [rule for each in others[1:] for rule in rules_of(each)]
        await firewall.apply(firewall.plan_change(rules.replace((), many)))
        assert await come_and_go() == beside_one
        assert len(beside_one) == 2
        assert max(beside_one) < 1000
        await firewall.read()
        assert not firewall.plan(rules)
        await firewall.close()

    in_namespace_of(host, work())


async def listed(chain: str) -> list[str] | None:
    commands = NftCommands()
    try:
        return await commands.chain(Table.NAT, chain)
    finally:
        await commands.close()


def test_commands_reach_the_tables_of_the_namespace_that_they_start_in(host: Host) -> None:
    host.run("iptables-nft", "-t", "nat", "-N", "PROBE")
    with Host("other") as other:
        assert in_namespace_of(host, listed("PROBE")) == ["-N PROBE"]
        assert in_namespace_of(other, listed("PROBE")) is None


def test_programs_that_are_not_installed_are_named(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    host.run("iptables-nft", "-t", "nat", "-N", "DOCKER")  # what is not there takes no program
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unusable, match="iptables-nft is not installed: install iptables"):
        in_namespace_of(host, listed("DOCKER"))


def test_what_iptables_says_is_passed_on(host: Host) -> None:
    host.run("nft", f"add table ip nat; add chain ip nat {'x' * 40}")  # nf_tables takes longer names
    with pytest.raises(FirewallError, match=r"the chain x+ of the table nat could not be listed: .+too long"):
        in_namespace_of(host, listed("x" * 40))
