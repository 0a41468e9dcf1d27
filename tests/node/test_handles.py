"""Rules taken away by their numbers: the right ones, all at once or none, whatever others did meanwhile."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address

import pytest

from ctrport.firewall.handles import MOST_ASKED, TRIES, Handles, Missing
from ctrport.firewall.plan import Add, Block, Line, New, Plan, Remove
from ctrport.firewall.text import restore_input, tag
from ctrport.model import Family, PortRange, Protocol
from ctrport.nfnetlink import NfTables
from ctrport.nlmsg import Interrupted, Rejected
from ctrport.rules import ACCEPT, Dnat, Match, Rule, Table
from embedded.host import Host, inside

CHAIN = "DOCKER"
#: The rules of a chain, by name, in which somebody else's are as well.
OTHERS = "-A DOCKER -s 192.0.2.1/32 -j RETURN"


def rule(port: int, table: Table = Table.NAT) -> Rule:
    match = Match(protocol=Protocol.TCP, ports=PortRange(port, port))
    target = Dnat(ip_address("172.17.0.2"), 80) if table is Table.NAT else ACCEPT
    return Rule(Family.IPV4, table, CHAIN, match, target, f"default/web {port}:80/tcp")


def removal(port: int, table: Table = Table.NAT) -> tuple[Table, Remove]:
    return table, Remove(CHAIN, rule(port, table))


class Chains:
    """The chains DOCKER of nat and filter, on a host that has no other rules."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.tables = inside(host.pid, ("net",), NfTables)
        self.handles = Handles(Family.IPV4, lambda: self.tables)

    def close(self) -> None:
        self.handles.close()
        self.tables.close()

    def write(self, *rules: Rule, new: Iterable[Table] = ()) -> None:
        """Write rules as iptables-nft does, and be listened to."""
        blocks = [Block(table, (New(CHAIN),)) for table in new]
        blocks += [Block(each.table, (Add(each, None),)) for each in rules]
        text = restore_input(Plan(tuple(blocks)))

        def work() -> None:
            with self.handles.listening(rules):
                self.host.run("iptables-nft-restore", "--noflush", input=text)

        self._inside(work)

    def remove(self, *removals: tuple[Table, Remove]) -> None:
        self._inside(lambda: self.handles.remove(removals))

    def ports(self, table: Table = Table.NAT) -> list[int]:
        listed = self.host.run("iptables-nft", "-t", table.value, "-S", CHAIN).stdout.splitlines()
        return [int(line.split("--dport ")[1].split()[0]) for line in listed if "--dport" in line]

    def _inside(self, work: Callable[[], None]) -> None:
        inside(self.host.pid, ("net",), work)


@pytest.fixture
def chains(host: Host) -> Iterator[Chains]:
    chains = Chains(host)
    chains.write(new=(Table.NAT, Table.FILTER))
    host.run("iptables-nft", "-t", "nat", *OTHERS.split())
    yield chains
    chains.close()
    host.run("nft", "flush", "ruleset")


@pytest.fixture
def no_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """To list a chain costs as much as it has rules: nothing of what is tried here is to take that."""

    def lists(*_: object) -> None:
        raise AssertionError("a whole chain was listed")

    monkeypatch.setattr(NfTables, "rules", lists)


@pytest.mark.usefixtures("no_lists")
def test_what_was_written_goes_by_its_number_whatever_its_table(chains: Chains) -> None:
    chains.write(*map(rule, range(8000, 8005)), *(rule(port, Table.FILTER) for port in range(8000, 8005)))
    chains.remove(removal(8001), removal(8004), removal(8001, Table.FILTER))
    assert chains.ports() == [8000, 8002, 8003]
    assert chains.ports(Table.FILTER) == [8000, 8002, 8003, 8004]
    assert OTHERS in chains.host.run("iptables-nft", "-t", "nat", "-S", CHAIN).stdout


def test_what_an_earlier_run_wrote_is_found_by_its_comment(chains: Chains) -> None:
    chains.write(*map(rule, range(8000, 8003)))
    chains.handles.close()
    chains.handles = Handles(Family.IPV4, lambda: chains.tables)
    chains.remove(removal(8001))
    assert chains.ports() == [8000, 8002]


def test_a_number_that_is_another_rules_by_now_is_left_alone(chains: Chains) -> None:
    chains.write(rule(8000), rule(8001))
    known = dict(chains.handles._known)
    # A table that is made anew counts from the beginning.
    chains.host.run("nft", "flush", "ruleset")
    fresh = Chains(chains.host)
    fresh.write(new=(Table.NAT, Table.FILTER))
    chains.host.run("iptables-nft", "-t", "nat", *OTHERS.split())
    fresh.write(rule(8001), rule(8000))
    fresh.close()
    assert set(known.values()) == set(fresh.handles._known.values())
    assert known != fresh.handles._known
    chains.remove(removal(8000))
    assert chains.ports() == [8001]


def test_what_is_not_there_is_missed_and_nothing_goes(chains: Chains) -> None:
    chains.write(rule(8000), rule(8001))
    with pytest.raises(Missing, match="DOCKER of nat has no rule 'ctrport default/web 9999:80/tcp"):
        chains.remove(removal(8000), removal(9999))
    assert chains.ports() == [8000, 8001]
    glanced = Line(f"-A {CHAIN}", tag(rule(9999)), abridged=True)
    chains.remove(removal(8000), (Table.NAT, Remove(CHAIN, glanced)))
    assert chains.ports() == [8001]


def test_each_of_those_that_stand_there_twice_goes_in_its_turn(chains: Chains) -> None:
    chains.write(rule(8000), rule(8001), rule(8000))
    chains.remove(removal(8000))
    assert sorted(chains.ports()) == [8000, 8001]
    chains.write(rule(8000))
    chains.remove(removal(8000), removal(8000))
    assert chains.ports() == [8001]
    with pytest.raises(Missing):
        chains.remove(removal(8001), removal(8001))
    assert chains.ports() == [8001]


def test_many_go_at_once(chains: Chains) -> None:
    ports = range(8000, 8000 + 2 * MOST_ASKED)
    chains.write(*map(rule, ports), rule(7999))
    chains.remove(*map(removal, ports))
    assert chains.ports() == [7999]


def test_where_others_commit_meanwhile_it_is_looked_at_anew(chains: Chains, monkeypatch: pytest.MonkeyPatch) -> None:
    chains.write(rule(8000), rule(8001))
    now, asked = NfTables.generation, list[None]()

    def late(tables: NfTables, times: int) -> int:
        asked.append(None)
        if len(asked) <= times:  # a commit that comes just behind
            return now(tables) - 1
        return now(tables)

    monkeypatch.setattr(NfTables, "generation", lambda tables: late(tables, 2))
    chains.remove(removal(8000))
    assert chains.ports() == [8001]
    assert len(asked) == 3
    monkeypatch.setattr(NfTables, "generation", lambda tables: late(tables, 100))
    with pytest.raises(Interrupted):
        chains.remove(removal(8001))
    assert len(asked) == 3 + TRIES
    assert chains.ports() == [8001]


def test_the_kernel_makes_a_batch_void_that_others_have_overtaken(chains: Chains) -> None:
    chains.write(rule(8000))

    def work() -> None:
        tables = NfTables()
        try:
            before = tables.generation()
            chains.host.run("iptables-nft", "-t", "nat", *OTHERS.split())
            assert tables.generation() != before
            deletions = chains.handles._deletions(tables, [removal(8000)])
            with pytest.raises(Rejected) as refused:
                tables.commit(deletions, generation=before)
            assert refused.value.errno == errno.ERESTART
        finally:
            tables.close()

    inside(chains.host.pid, ("net",), work)
    assert chains.ports() == [8000]
