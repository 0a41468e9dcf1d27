"""What every way to reach iptables' tables has to hold to, beside what every firewall has to.

A module that runs it derives from ``TablesContract`` and gives it four fixtures: ``kernel``, the ``Kernel`` under test
over tables that hold nothing; ``run`` and ``visitor``, as for every firewall; and ``operator``, somebody else who
writes into the same tables, in the words of ``iptables``.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from itertools import pairwise

import pytest

from ctrport.firewall import FirewallError, ForeignChain
from ctrport.firewall.door import Door
from ctrport.firewall.plan import BUILT_IN, Add, Block, Line, New, Plan, Remove
from ctrport.firewall.tables import Kernel, Tables
from ctrport.firewall.text import TAG, listing, saved, tag
from ctrport.model import Family
from ctrport.rules import ACCEPTED_OWNER, USER_CHAIN, Layout, Place, Rule, Ruleset, Table, accepted, rules_for, skeleton
from tests.contract.firewall import ALL, LAYOUT, FirewallContract, Run, wanted


class Operator(typing.Protocol):
    """Somebody else: writes what stands behind ``iptables -t TABLE``."""

    def __call__(self, table: Table, words: str) -> None: ...


_NAT, _FILTER = ("DOCKER", "DOCKER-POSTROUTING", "DOCKER-HAIRPIN"), ("DOCKER-FORWARD", "DOCKER", "DOCKER-USER")


class IptablesGrounds:
    """Implements ``Grounds`` with the tables that a kernel reaches."""

    def __init__(self, kernel: Kernel, operator: Operator) -> None:
        self.family = kernel.family
        self._kernel = kernel
        self._operator = operator

    @property
    def damages(self) -> Mapping[str, Callable[[], object]]:
        nat = [f"-F {chain}" for chain in ("PREROUTING", "OUTPUT", "POSTROUTING", *_NAT)]
        return {
            "a mapping deleted": lambda: self._write(Table.NAT, "-D DOCKER 2"),
            "all mappings deleted": lambda: self._write(Table.NAT, "-F DOCKER"),
            "what leads to them deleted": lambda: self._write(Table.NAT, "-F PREROUTING"),
            "all of it deleted": lambda: [
                self._write(Table.NAT, *nat, *(f"-X {chain}" for chain in _NAT)),
                self._write(Table.FILTER, "-F FORWARD", *(f"-F {chain}" for chain in _FILTER)),
                self._write(Table.FILTER, *(f"-X {chain}" for chain in _FILTER)),
            ],
        }

    def _write(self, table: Table, *words: str) -> int:
        for each in words:
            self._operator(table, each)
        return len(words)

    def firewall(self, layout: Layout) -> Tables:
        return Tables(self._kernel, layout)

    async def everything(self) -> object:
        return await everything(self._kernel)

    def neighbour(self) -> None:
        self._operator(Table.FILTER, "-A FORWARD -i lo -j ACCEPT")
        self._operator(Table.NAT, "-N CNI-HOSTPORT")
        self._operator(Table.NAT, "-A PREROUTING -j CNI-HOSTPORT")

    def usurper(self) -> None:
        self._operator(Table.NAT, "-N DOCKER")
        self._operator(Table.NAT, "-A DOCKER -i docker0 -j RETURN")


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


class TablesContract(FirewallContract):
    """The suite."""

    @pytest.fixture
    def grounds(self, kernel: Kernel, operator: Operator) -> IptablesGrounds:
        return IptablesGrounds(kernel, operator)

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

    def test_what_nobody_asks_for_any_more_goes_from_a_chain_written_anew_as_well(
        self, kernel: Kernel, run: Run
    ) -> None:
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

    @pytest.mark.parametrize(
        ("writes", "place"),
        [
            ([], None),
            (["-P FORWARD DROP"], 0),
            (["-A FORWARD -i lo -j DROP"], 0),
            (["-N ufw-before-forward", "-A FORWARD -j ufw-before-forward"], 0),
            (["-A FORWARD -i lo -j ACCEPT", "-N KUBE-FORWARD", "-A FORWARD -j KUBE-FORWARD"], None),
            (["-P FORWARD DROP", "-N KUBE-FORWARD", "-A FORWARD -j KUBE-FORWARD"], 1),
            (["-N DOCKER-USER", "-A FORWARD -j DOCKER-USER", "-A FORWARD -i lo -j DROP"], 1),
            (["-N DOCKER-USER", "-A FORWARD -i lo -j DROP", "-A FORWARD -j DOCKER-USER"], 0),
        ],
    )
    def test_a_forward_that_may_drop_is_opened_for_what_our_own_table_accepts(
        self, kernel: Kernel, run: Run, operator: Operator, writes: Sequence[str], place: int | None
    ) -> None:
        for each in writes:
            operator(Table.FILTER, each)
        opened = place is not None

        async def work() -> None:
            before, door = await everything(kernel), Door(kernel, LAYOUT)
            await door.look()
            plan = door.plan()
            await door.write(plan)
            assert bool(plan) == opened
            there = await lines(kernel, Table.FILTER, "FORWARD")
            rule = tag(accepted(LAYOUT, kernel.family))
            assert [index for index, line in enumerate(there) if line.tag == rule] == ([place] if opened else [])
            await door.look()
            assert not door.plan()
            if opened:
                # It is put back where it belongs, whoever moved it.
                [line] = [line for line in there if line.tag == rule]
                await kernel.restore(Plan((Block(Table.FILTER, (Remove("FORWARD", line),)),)))
                await kernel.restore(Plan((Block(Table.FILTER, (Add(accepted(LAYOUT, kernel.family), 1),)),)))
                await door.look()
                await door.write(door.plan())
                there = await lines(kernel, Table.FILTER, "FORWARD")
                assert [index for index, line in enumerate(there) if line.tag == rule] == [place]
                await door.look()
                assert not door.plan()
            # What takes everything of ours away takes this as well, but where it is to be left.
            spared = Tables(kernel, LAYOUT, (ACCEPTED_OWNER,))
            assert not any(await spared.plan_removal())
            assert any(await Tables(kernel, LAYOUT).plan_removal()) == opened
            closing = door.plan(closing=True)
            await door.write(closing)
            assert bool(closing) == opened
            assert await everything(kernel) == before

        run(work())


async def _all(*work: Coroutine[object, object, object]) -> None:
    for each in work:
        await each
