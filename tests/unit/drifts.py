"""Tables in memory for plans: what is wanted in them, what others put there, and how they drift."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st

from ctrport.firewall.fake import Chains, MemoryKernel
from ctrport.firewall.plan import (
    BUILT_IN,
    NEIGHBOURS,
    POLICY_AGENTS,
    Add,
    Block,
    Line,
    Plan,
)
from ctrport.firewall.tables import Tables
from ctrport.firewall.text import listing, restore_input, tag
from ctrport.model import Family, Publication
from ctrport.rules import (
    USER_CHAIN,
    Layout,
    Place,
    Rule,
    Ruleset,
    Table,
    rules_at,
    rules_for,
    skeleton,
)
from tests.unit import worlds

V4 = Family.IPV4
State = dict[Table, Chains]
QUICK = settings(deadline=None, max_examples=80)
JUMP = next(rule for rule in skeleton(Layout(), V4) if rule.chain == "PREROUTING")

layouts = st.builds(
    Layout,
    chain=st.sampled_from(["DOCKER", "CTRPORT"]),
    position=st.sampled_from([Place.POLICY, Place.POLICY, Place.FIRST, Place.LAST]),
    localhost=st.booleans(),
)


def wanted_of(publications: Iterable[Publication], layout: Layout) -> list[Rule]:
    rules = Ruleset([*skeleton(layout, V4), *rules_at(worlds.NODE4, layout)])
    for publication in publications:
        rules.replace((), rules_for(publication, layout))
    return [rule for rule in rules if rule.family is V4]


def fit(kernel: MemoryKernel, layout: Layout, wanted: Iterable[Rule]) -> Plan:
    """Read, plan and apply; return the plan."""

    async def once() -> Plan:
        tables = Tables(kernel, layout)
        await tables.read()
        plan = tables.plan(wanted)
        await tables.apply(plan)
        return plan

    return asyncio.run(once())


def lines(kernel: MemoryKernel, table: Table, chain: str) -> list[Line]:
    return listing(f"-A {chain} {rule}" for rule in kernel.tables[table].get(chain, ()))


def foreign(state: State) -> State:
    """What others have in it: their rules in their order, and their chains."""
    left: State = {}
    for table, chains in state.items():
        left[table] = {
            chain: [rule for rule in rules if "ctrport " not in rule]
            for chain, rules in chains.items()
            if chain in BUILT_IN or chain == USER_CHAIN or not chain.startswith(("DOCKER", "CTRPORT"))
        }
    return left


# Others' rules, by what they mean to the order in a kernel chain.
OTHERS = {
    "": ("-s 192.0.2.9/32 -j DROP", '-m comment --comment "allow \\"this\\"" -j ACCEPT', "-p tcp -m tcp --dport 22"),
    "KUBE-FORWARD": ('-m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD',),
    "cali-FORWARD": ('-m comment --comment "cali:wUHhoiAYhphO9Mso" -j cali-FORWARD',),
    "FLANNEL-FWD": ('-m comment --comment "flanneld forward" -j FLANNEL-FWD',),
    "CNI-FORWARD": ('-m comment --comment "CNI firewall plugin rules" -j CNI-FORWARD',),
}


@st.composite
def others_rules(draw: st.DrawFn) -> list[tuple[Table, str, str, str, int]]:
    """Rules that others put into kernel chains: table, chain, the chain that they jump to, the rule, where."""
    found = []
    for _ in range(draw(st.integers(0, 4))):
        table, chain = draw(st.sampled_from(Layout().kernel_chains))
        target = draw(st.sampled_from(["", "", "", *OTHERS]))
        index = draw(st.sampled_from([0, 0, 1, 9]))
        found.append((table, chain, target, draw(st.sampled_from(OTHERS[target])), index))
    return found


def others_come(kernel: MemoryKernel, coming: Iterable[tuple[Table, str, str, str, int]]) -> None:
    for table, chain, target, rule, index in coming:
        if target:
            kernel.tables[table].setdefault(target, ["-j RETURN"])
        kernel.tables[table][chain].insert(index, rule)


def own_places(kernel: MemoryKernel) -> list[tuple[Table, str, int]]:
    return [
        (table, chain, index)
        for table, chains in kernel.tables.items()
        for chain, rules in chains.items()
        for index, rule in enumerate(rules)
        if "ctrport " in rule
    ]


def drop_jumps(chains: Chains, chain: str) -> None:
    for rules in chains.values():
        rules[:] = [rule for rule in rules if not rule.endswith(f" -j {chain}")]


DRIFTS = ("delete", "double", "move", "flush", "delete the chain", "strange", "user")


def drift(data: st.DataObject, kernel: MemoryKernel, strays: Sequence[Rule], *, without: Sequence[str] = ()) -> None:
    """Do to the tables what a careless neighbour does, once."""
    how = data.draw(st.sampled_from([drift for drift in DRIFTS if drift not in without]))
    if how == "user":
        rules = kernel.tables[Table.FILTER].get(USER_CHAIN)
        if rules is not None:
            rules.append("-s 192.0.2.66/32 -j DROP")
        return
    if how == "strange":  # a rule of ours that nobody wants any more
        rule = data.draw(st.sampled_from(strays))
        chain = kernel.tables[rule.table].get(rule.chain)
        if chain is not None:
            chain.insert(data.draw(st.integers(0, len(chain))), text_of(rule))
        return
    places = own_places(kernel)
    if not places:
        return
    table, chain_name, index = data.draw(st.sampled_from(places))
    rules = kernel.tables[table][chain_name]
    match how:
        case "delete":
            del rules[index]
        case "double":
            rules.insert(data.draw(st.integers(0, len(rules))), rules[index])
        case "move":
            rule_text = rules.pop(index)
            rules.insert(data.draw(st.integers(0, len(rules))), rule_text)
        case "flush" if chain_name not in BUILT_IN:
            rules.clear()
        case "delete the chain" if chain_name not in BUILT_IN:
            drop_jumps(kernel.tables[table], chain_name)
            del kernel.tables[table][chain_name]


def text_of(rule: Rule) -> str:
    [line] = restore_input(Plan((Block(rule.table, (Add(rule, None),)),))).splitlines()[1:-1]
    return line.removeprefix(f"-A {rule.chain} ")


def assert_as_wanted(kernel: MemoryKernel, layout: Layout, wanted: Sequence[Rule]) -> None:
    """Each rule once, own chains by rank, and in kernel chains each where it belongs."""
    by_tag: dict[tuple[Table, str, str], Rule] = {(r.table, r.chain, tag(r)): r for r in wanted}
    found = []
    for table, chains in kernel.tables.items():
        for chain in chains:
            there = [line.tag for line in lines(kernel, table, chain)]
            found += [(table, chain, mark) for mark in there if mark is not None]
            if (table, chain) in layout.own_chains:
                ranks = [by_tag[table, chain, mark].rank for mark in there if mark is not None]
                assert all(a <= b for a, b in pairwise(ranks))
                assert len(ranks) == len(there)
    assert sorted(found) == sorted(by_tag)
    for rule in wanted:
        if rule.place is not Place.OWN:
            assert_placed(rule, lines(kernel, rule.table, rule.chain))


def assert_placed(rule: Rule, there: list[Line]) -> None:
    [index] = [index for index, line in enumerate(there) if line.tag == tag(rule)]
    above, below = there[:index], there[index + 1 :]
    place = rule.place
    if place is Place.POLICY:
        policed = any(line.tag is None and line.target.startswith(POLICY_AGENTS) for line in there)
        place = Place.LAST if policed else Place.FIRST
    if place is Place.FIRST:
        assert all(line.tag is not None for line in above)
    elif place is Place.EARLY:
        assert all(line.tag is not None or line.target.startswith(NEIGHBOURS) for line in above)
    else:
        assert not any(line.tag is None and line.target.startswith(NEIGHBOURS) for line in below)


def forward(kernel: MemoryKernel) -> list[Line]:
    return lines(kernel, Table.FILTER, "FORWARD")
