"""What every way to reach the tables has to hold to: one suite, run over each and over the tables in memory.

A module that runs it derives from ``FirewallContract`` and gives it four fixtures: ``kernel``, the ``Kernel`` under
test over tables that hold nothing; ``run``, which runs a coroutine where the kernel's tables are; and ``operator``,
somebody else who writes into the same tables, in the words of ``iptables``; ``visitor``, who sends packets to the node.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Coroutine, Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

import pytest

from ctrport.firewall import FirewallError, ForeignChain, Refused
from ctrport.firewall.plan import BUILT_IN, Add, Block, Line, New, Plan
from ctrport.firewall.tables import Kernel, Tables
from ctrport.firewall.text import TAG, listing, saved, tag
from ctrport.model import Count, Family, Protocol, Publication
from ctrport.owners import LocalnetRecord, owner_of
from ctrport.rules import USER_CHAIN, Layout, Place, Rule, Ruleset, Table, rules_at, rules_for, skeleton
from tests.unit.worlds import NODE, active

T = TypeVar("T")


class Run(typing.Protocol):
    """Runs a coroutine to its end."""

    def __call__(self, work: Coroutine[object, object, T]) -> T: ...


class Operator(typing.Protocol):
    """Somebody else: writes what stands behind ``iptables -t TABLE``."""

    def __call__(self, table: Table, words: str) -> None: ...


class Visitor(typing.Protocol):
    """Sends packets of one flow each time, of the family under test, to an address of the node."""

    def __call__(self, protocol: Protocol, port: int, packets: int = 1) -> None: ...


# Every kind of mapping: a port, a host address, localhost, a range onto itself, a range with an offset.
ALL = (
    active("8080:80", "172.17.0.2", "fd00::2"),
    active("192.0.2.1:8081:81", "172.17.0.2"),
    active("[2001:db8::1]:8081:81", "fd00::2"),
    active("127.0.0.1:8082:82", "172.17.0.2"),
    active("9000-9010:9000-9010/udp", "172.17.0.3", "fd00::3", name="db"),
    active("7000-7002:80-82/sctp", "10.244.1.7", "fd00::4", name="api", device="cali12ab"),
)
LAYOUT = Layout()


def wanted(family: Family, publications: Iterable[Publication] = ALL, layout: Layout = LAYOUT) -> list[Rule]:
    rules = Ruleset(skeleton(layout, family))
    rules.replace((), (rule for address in NODE for rule in rules_at(address, layout)))
    for publication in publications:
        rules.replace((), rules_for(publication, layout))
    return [rule for rule in rules if rule.family is family]


async def fit(kernel: Kernel, rules: Iterable[Rule], layout: Layout = LAYOUT, *, words: bool = True) -> Plan:
    tables = Tables(kernel, layout)
    await tables.read(words=words)
    plan = tables.plan(rules)
    await tables.apply(plan)
    return plan


async def lines(kernel: Kernel, table: Table, chain: str) -> list[Line]:
    found = await kernel.chain(table, chain)
    assert found is not None
    return listing(found)


async def everything(kernel: Kernel) -> dict[Table, dict[str, list[str]]]:
    """All tables, without what a kernel counts."""
    return {
        table: {chain: [line.text for line in there] for chain, there in saved(await kernel.table(table)).items()}
        for table in Table
    }


class FirewallContract:
    """The suite."""

    def test_what_was_written_is_found_again(self, kernel: Kernel, run: Run) -> None:
        async def work() -> None:
            assert await fit(kernel, wanted(kernel.family))
            plan = await fit(kernel, wanted(kernel.family))
            assert not plan, plan

        run(work())

    def test_each_chain_holds_its_rules_in_their_order(self, kernel: Kernel, run: Run) -> None:
        rules = wanted(kernel.family)
        by_tag = {(rule.table, rule.chain, tag(rule)): rule for rule in rules}

        async def work() -> None:
            await fit(kernel, reversed(rules))
            found = []
            for table, chain in (*LAYOUT.own_chains, *LAYOUT.kernel_chains):
                there = [by_tag[table, chain, line.tag or ""] for line in await lines(kernel, table, chain)]
                found += there
                if (table, chain) in LAYOUT.own_chains:
                    assert all(one.rank <= other.rank for one, other in pairwise(there))
            assert len(found) == len(rules)
            assert set(found) == set(rules)

        run(work())

    def test_rules_are_listed_with_the_tag_that_they_were_written_with(self, kernel: Kernel, run: Run) -> None:
        async def work() -> None:
            await fit(kernel, wanted(kernel.family))
            tags = set[str]()
            for table in Table:
                # As people see them, not as our own reading of a listing has it.
                for comment in re.findall(r'--comment "([^"]*)"', await kernel.table(table)):
                    assert TAG.fullmatch(comment), comment
                    tags.add(comment)
            assert tags == {tag(rule) for rule in wanted(kernel.family)}

        run(work())

    def test_a_chain_and_its_table_are_listed_in_the_same_words(self, kernel: Kernel, run: Run) -> None:
        async def work() -> None:
            await fit(kernel, wanted(kernel.family))
            for table, chain in (*LAYOUT.own_chains, *LAYOUT.kernel_chains):
                whole = saved(await kernel.table(table))
                assert whole[chain] == await lines(kernel, table, chain)

        run(work())

    def test_a_glance_sees_what_a_listing_does(self, kernel: Kernel, run: Run, operator: Operator) -> None:
        operator(Table.FILTER, "-N KUBE-FORWARD")
        operator(Table.FILTER, '-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD')
        operator(Table.FILTER, "-A FORWARD -i lo -g KUBE-FORWARD")
        operator(Table.FILTER, "-A FORWARD -i lo -j DROP")
        operator(Table.FILTER, "-A KUBE-FORWARD -i lo -j RETURN")
        operator(Table.FILTER, "-A KUBE-FORWARD -i lo")
        operator(Table.NAT, '-A POSTROUTING -o lo -m comment --comment "not ours" -j MASQUERADE')
        others = [(Table.FILTER, "KUBE-FORWARD"), (Table.RAW, "DOCKER"), (Table.FILTER, "ABSENT")]

        async def work() -> None:
            await fit(kernel, wanted(kernel.family))
            for table, chain in (*LAYOUT.own_chains, *LAYOUT.kernel_chains, *others):
                listed, seen = await kernel.chain(table, chain), await kernel.glance(table, chain)
                if listed is None or seen is None:
                    assert listed is None
                    assert seen is None
                    continue
                known = listing(listed)
                assert [line.tag for line in seen] == [line.tag for line in known]
                assert {line.chain for line in seen} <= {chain}
                if chain in BUILT_IN or (table, chain) in others:
                    assert [line.target for line in seen] == [line.target for line in known]

        run(work())

    def test_a_change_of_what_is_there_no_more_is_refused(self, kernel: Kernel, run: Run, operator: Operator) -> None:
        its = [rule for rule in rules_for(ALL[0], LAYOUT) if rule.family is kernel.family]

        async def work() -> None:
            rules = Ruleset(wanted(kernel.family, ()))
            tables = Tables(kernel, LAYOUT)
            await tables.read()
            await tables.apply(tables.plan(rules))
            operator(Table.NAT, "-F PREROUTING")
            operator(Table.NAT, "-F OUTPUT")
            operator(Table.NAT, "-F DOCKER")
            operator(Table.NAT, "-X DOCKER")
            plan = tables.plan_change(rules.replace((), its))
            with pytest.raises(Refused):
                await tables.apply(plan)
            await fit(kernel, rules, words=False)
            assert not await fit(kernel, rules)

        run(work())

    def test_a_chain_that_is_not_there_is_none(self, kernel: Kernel, run: Run) -> None:
        async def work() -> None:
            for table in Table:
                assert await kernel.chain(table, "DOCKER") is None
            await fit(kernel, wanted(kernel.family))
            assert await kernel.chain(Table.NAT, "DOCKER") is not None
            assert await kernel.chain(Table.NAT, "DOCKER-FORWARD") is None
            assert await kernel.chain(Table.RAW, "DOCKER") is None

        run(work())

    def test_an_empty_chain_is_no_missing_one(self, kernel: Kernel, run: Run, operator: Operator) -> None:
        operator(Table.FILTER, "-N DOCKER")

        async def work() -> None:
            assert await lines(kernel, Table.FILTER, "DOCKER") == []
            assert await lines(kernel, Table.FILTER, "FORWARD") == []

        run(work())

    def test_changes_are_carried_out_one_by_one(self, kernel: Kernel, run: Run) -> None:
        async def work() -> None:
            rules = Ruleset(wanted(kernel.family, ()))
            tables = Tables(kernel, LAYOUT)
            await tables.read()
            await tables.apply(tables.plan(rules))
            bare = await everything(kernel)
            # Wildcards first, so that a host address has to be put before what is there.
            for publication in (*ALL, *ALL[::-1]):
                its = [rule for rule in rules_for(publication, LAYOUT) if rule.family is kernel.family]
                here = any(rule in rules for rule in its if str(publication.container) in rule.owner)
                difference = rules.replace(its, ()) if here else rules.replace((), its)
                await tables.apply(tables.plan_change(difference))
                look = Tables(kernel, LAYOUT)
                await look.read()
                assert not look.plan(rules)
            assert await everything(kernel) == bare

        run(work())

    def test_a_host_address_is_put_before_the_wildcards_that_are_there(self, kernel: Kernel, run: Run) -> None:
        named, wild = (ALL[1], ALL[0]) if kernel.family is Family.IPV4 else (ALL[2], ALL[0])

        async def work() -> None:
            rules = Ruleset(wanted(kernel.family, [wild]))
            tables = Tables(kernel, LAYOUT)
            await tables.read()
            await tables.apply(tables.plan(rules))
            its = [rule for rule in rules_for(named, LAYOUT) if rule.family is kernel.family]
            await tables.apply(tables.plan_change(rules.replace((), its)))
            texts = [line.text for line in await lines(kernel, Table.NAT, "DOCKER")]
            [first] = [index for index, text in enumerate(texts) if "--dport 8081" in text]
            [then] = [index for index, text in enumerate(texts) if "--dport 8080" in text]
            assert first < then

        run(work())

    def test_connections_are_counted_by_the_owner_of_the_mapping(
        self, kernel: Kernel, run: Run, visitor: Visitor
    ) -> None:
        moved, onto_itself, idle = (
            active("8000-8002:80-82", "172.17.0.2", "fd00::2"),
            active("9000-9010:9000-9010/udp", "172.17.0.3", "fd00::3", name="db"),
            active("8443:443", "172.17.0.2", "fd00::2"),
        )
        tables = Tables(kernel, LAYOUT)

        async def work() -> None:
            assert await tables.counters() == {}  # there is no chain of ours yet
            await fit(kernel, wanted(kernel.family, (moved, onto_itself, idle)))
            assert await tables.counters() == dict.fromkeys(map(owner_of, (moved, onto_itself, idle)), Count())

        async def after() -> None:
            counted = await tables.counters()
            assert {its: count.packets for its, count in counted.items()} == {
                owner_of(moved): 2,
                owner_of(onto_itself): 1,
                owner_of(idle): 0,
            }
            assert counted[owner_of(idle)] == Count()
            size = 20 if kernel.family is Family.IPV4 else 40
            assert counted[owner_of(onto_itself)].bytes == size + 8 + 5  # of a datagram with five bytes
            assert counted[owner_of(moved)].bytes >= 2 * (size + 20)
            # A change of others leaves the counters alone.
            await tables.read(words=False)
            await tables.apply(tables.plan(wanted(kernel.family, (moved, onto_itself))))
            counted.pop(owner_of(idle))
            assert await tables.counters() == counted

        run(work())
        visitor(Protocol.TCP, 8000)
        visitor(Protocol.TCP, 8002)
        visitor(Protocol.UDP, 9005, packets=3)
        visitor(Protocol.UDP, 8443)  # nobody's
        run(after())

    def test_removal_leaves_what_was_there_before(self, kernel: Kernel, run: Run, operator: Operator) -> None:
        operator(Table.FILTER, "-A FORWARD -i lo -j ACCEPT")
        operator(Table.NAT, "-N CNI-HOSTPORT")
        operator(Table.NAT, "-A PREROUTING -j CNI-HOSTPORT")

        async def work() -> None:
            before = await everything(kernel)
            await fit(kernel, wanted(kernel.family))
            tables = Tables(kernel, Layout("OTHER"))
            for plan in await tables.plan_removal():
                await tables.apply(plan)
            assert await everything(kernel) == before
            assert not any(await tables.plan_removal())

        run(work())

    def test_removal_leaves_the_operators_chain_to_the_operator(
        self, kernel: Kernel, run: Run, operator: Operator
    ) -> None:
        async def work() -> None:
            tables = Tables(kernel, LAYOUT)
            for plan in await tables.plan_removal():
                await tables.apply(plan)
            assert [line.target for line in await lines(kernel, Table.FILTER, USER_CHAIN)] == ["DROP"]
            assert await kernel.chain(Table.FILTER, "DOCKER-FORWARD") is None

        run(_all(fit(kernel, wanted(kernel.family))))
        operator(Table.FILTER, "-A DOCKER-USER -i lo -j DROP")
        run(work())

    @pytest.mark.parametrize(
        "writes",
        [
            ["-N DOCKER", "-A DOCKER -i docker0 -j RETURN"],
            ["-N DOCKER", '-A DOCKER -i docker0 -m comment --comment "an operator of ctrport" -j RETURN'],
            ["-N DOCKER", "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER"],
        ],
    )
    def test_somebody_elses_chain_is_refused_untouched(
        self, kernel: Kernel, run: Run, operator: Operator, writes: Sequence[str]
    ) -> None:
        for each in writes:
            operator(Table.NAT, each)

        async def work() -> None:
            before = await everything(kernel)
            with pytest.raises(ForeignChain, match=r"the chain DOCKER of the table nat is somebody else's"):
                await fit(kernel, wanted(kernel.family))
            assert await everything(kernel) == before
            other = Layout("CTRPORT")
            await fit(kernel, wanted(kernel.family, layout=other), other)
            after = await everything(kernel)
            assert after[Table.NAT]["DOCKER"] == before[Table.NAT]["DOCKER"]

        run(work())

    def test_a_chain_that_came_meanwhile_is_not_emptied(self, kernel: Kernel, run: Run, operator: Operator) -> None:
        operator(Table.NAT, "-N DOCKER")
        operator(Table.NAT, "-A DOCKER -i docker0 -j RETURN")

        async def work() -> None:
            before = await everything(kernel)
            plan = Plan((Block(Table.NAT, (New("DOCKER-POSTROUTING"), New("DOCKER"))),))
            with pytest.raises(FirewallError):
                await kernel.restore(plan)
            assert await everything(kernel) == before

        run(work())

    def test_a_table_is_committed_whole_or_not_at_all_and_those_before_it_stay(self, kernel: Kernel, run: Run) -> None:
        jump = next(rule for rule in skeleton(LAYOUT, kernel.family) if rule.chain == "PREROUTING")
        # A position that is not there fails in the kernel, when all has been read and understood.
        last = (New("DOCKER"), Add(jump, None), Add(jump, 77))
        plan = Plan((Block(Table.FILTER, (New("DOCKER"),)), Block(Table.NAT, last)))

        async def work() -> None:
            with pytest.raises(FirewallError):
                await kernel.restore(plan)
            assert await kernel.chain(Table.FILTER, "DOCKER") is not None
            assert await kernel.chain(Table.NAT, "DOCKER") is None
            assert await lines(kernel, Table.NAT, "PREROUTING") == []
            await fit(kernel, wanted(kernel.family))
            assert not await fit(kernel, wanted(kernel.family))

        run(work())

    @pytest.mark.parametrize(
        "drift",
        [
            [(Table.NAT, "-F DOCKER")],
            [(Table.FILTER, "-F DOCKER-FORWARD"), (Table.FILTER, "-F DOCKER")],
            [(Table.FILTER, "-F FORWARD"), (Table.FILTER, "-F DOCKER-FORWARD"), (Table.FILTER, "-X DOCKER-FORWARD")],
            [(Table.FILTER, "-I FORWARD 1 -i lo -j ACCEPT"), (Table.NAT, "-I POSTROUTING 1 -o lo -j ACCEPT")],
            [(Table.NAT, "-D DOCKER 2"), (Table.FILTER, "-D DOCKER 1")],
            [(Table.FILTER, "-F FORWARD"), (Table.FILTER, "-X DOCKER-USER")],
            [(Table.NAT, "-F PREROUTING"), (Table.NAT, "-F OUTPUT"), (Table.NAT, "-F POSTROUTING")],
        ],
    )
    @pytest.mark.parametrize("words", [False, True])
    def test_drift_is_mended(
        self, kernel: Kernel, run: Run, operator: Operator, drift: Sequence[tuple[Table, str]], words: bool
    ) -> None:
        run(_all(fit(kernel, wanted(kernel.family))))
        for table, write in drift:
            operator(table, write)

        async def work() -> None:
            assert await fit(kernel, wanted(kernel.family), words=words)
            assert not await fit(kernel, wanted(kernel.family), words=not words)

        run(work())

    @pytest.mark.parametrize("words", [False, True])
    def test_a_rule_that_stands_twice_stands_once_again(self, kernel: Kernel, run: Run, words: bool) -> None:
        twice = next(rule for rule in wanted(kernel.family) if rule.chain == "DOCKER" and rule.table is Table.NAT)
        jump = next(rule for rule in wanted(kernel.family) if rule.chain == "OUTPUT")

        async def work() -> None:
            await fit(kernel, wanted(kernel.family))
            await kernel.restore(Plan((Block(Table.NAT, (Add(twice, None), Add(jump, 1))),)))
            assert await fit(kernel, wanted(kernel.family), words=words)
            assert not await fit(kernel, wanted(kernel.family))

        run(work())

    def test_what_nobody_asks_for_any_more_goes(self, kernel: Kernel, run: Run) -> None:
        async def work() -> None:
            await fit(kernel, wanted(kernel.family))
            assert await fit(kernel, wanted(kernel.family, ALL[:2]), words=False)
            assert not await fit(kernel, wanted(kernel.family, ALL[:2]))
            # In a chain that is written anew as well.
            await fit(kernel, wanted(kernel.family))
            twice = next(rule for rule in wanted(kernel.family) if rule.chain == "DOCKER" and rule.table is Table.NAT)
            await kernel.restore(Plan((Block(Table.NAT, (Add(twice, None),)),)))
            assert await fit(kernel, wanted(kernel.family, ALL[3:]), words=False)
            assert not await fit(kernel, wanted(kernel.family, ALL[3:]))

        run(work())

    def test_a_policy_agent_is_asked_first(self, kernel: Kernel, run: Run, operator: Operator) -> None:
        operator(Table.FILTER, "-N KUBE-FORWARD")
        operator(Table.FILTER, '-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD')
        operator(Table.FILTER, "-A FORWARD -i lo -j DROP")

        async def work() -> None:
            await fit(kernel, wanted(kernel.family))
            order = [line.target for line in await lines(kernel, Table.FILTER, "FORWARD")]
            assert order == ["DOCKER-USER", "KUBE-FORWARD", "DROP", "DOCKER-FORWARD"]
            first = Layout(position=Place.FIRST)
            await fit(kernel, wanted(kernel.family, layout=first), first, words=False)
            order = [line.target for line in await lines(kernel, Table.FILTER, "FORWARD")]
            assert order == ["DOCKER-USER", "DOCKER-FORWARD", "KUBE-FORWARD", "DROP"]

        run(work())

    def test_who_switched_route_localnet_on_is_read_from_the_rules(self, kernel: Kernel, run: Run) -> None:
        async def work() -> None:
            await fit(kernel, wanted(kernel.family))
            tables = Tables(kernel, LAYOUT)
            await tables.read()
            found = set(tables.localnet_records)
            devices = {"docker0", "cali12ab"} if kernel.family is Family.IPV4 else set[str]()
            assert found == {LocalnetRecord(device, ours=True) for device in devices}

        run(work())


async def _all(*work: Coroutine[object, object, object]) -> None:
    for each in work:
        await each
