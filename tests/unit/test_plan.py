"""Plans, carried out by tables in memory: whatever state these are in, what we want comes out and nothing else."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrport.firewall import FirewallError, ForeignChain
from ctrport.firewall.fake import Chains, MemoryKernel
from ctrport.firewall.plan import (
    BUILT_IN,
    NEIGHBOURS,
    POLICY_AGENTS,
    Add,
    Block,
    Delete,
    Empty,
    Line,
    New,
    Op,
    Plan,
    Remove,
    plan_removal,
)
from ctrport.firewall.tables import Tables
from ctrport.firewall.text import listing, restore_input, tag
from ctrport.model import Family, Publication
from ctrport.owners import LocalnetRecord
from ctrport.rules import (
    ACCEPT,
    USER_CHAIN,
    Difference,
    Dnat,
    Layout,
    Match,
    Place,
    Rule,
    Ruleset,
    Table,
    rules_at,
    rules_for,
    skeleton,
)
from tests.unit import worlds
from tests.unit.worlds import active

V4 = Family.IPV4
State = dict[Table, Chains]
QUICK = settings(deadline=None, max_examples=80)

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


@pytest.mark.parametrize("lost", [True, False])
def test_the_operators_jump_that_comes_back_does_not_push_ours_behind_others(lost: bool) -> None:
    kernel, wanted = MemoryKernel(), wanted_of([], Layout())
    fit(kernel, Layout(), wanted)
    rules = kernel.tables[Table.FILTER]["FORWARD"]
    user, ours = rules
    rules[:] = ["-i lo -j DROP", ours] if lost else ["-i lo -j DROP", ours, user]
    fit(kernel, Layout(), wanted)
    assert [line.target for line in forward(kernel)] == ["DOCKER-USER", "DOCKER-FORWARD", "DROP"]


@settings(deadline=None, max_examples=150)
@given(st.data(), layouts, worlds.publication_lists(), worlds.publication_lists(max_size=2), others_rules())
def test_out_of_any_drift_comes_what_is_wanted_and_others_feel_nothing(
    data: st.DataObject,
    layout: Layout,
    publications: list[Publication],
    gone: list[Publication],
    coming: list[tuple[Table, str, str, str, int]],
) -> None:
    kernel = MemoryKernel()
    wanted = wanted_of(publications, layout)
    if data.draw(st.booleans(), label="installed before"):
        fit(kernel, layout, wanted)
    strays = wanted_of(gone, Layout(layout.chain, layout.position, localhost=not layout.localhost))
    for _ in range(data.draw(st.integers(0, 6))):
        drift(data, kernel, strays)
    others_come(kernel, coming)
    before = foreign(kernel.tables)
    before[Table.FILTER].setdefault(USER_CHAIN, [])
    fit(kernel, layout, wanted)
    assert_as_wanted(kernel, layout, wanted)
    assert foreign(kernel.tables) == before
    after = copy.deepcopy(kernel.tables)
    assert not fit(kernel, layout, wanted)
    assert kernel.tables == after


@QUICK
@given(st.data(), layouts, worlds.publication_lists(), others_rules())
def test_what_has_not_drifted_is_not_written(
    data: st.DataObject, layout: Layout, publications: list[Publication], coming: list[tuple[Table, str, str, str, int]]
) -> None:
    kernel = MemoryKernel()
    others_come(kernel, coming)
    wanted = wanted_of(publications, layout)
    fit(kernel, layout, wanted)
    places = [(t, c, i) for t, c, i in own_places(kernel) if (t, c) in layout.own_chains]
    table, chain, index = data.draw(st.sampled_from(places))
    del kernel.tables[table][chain][index]
    plan = fit(kernel, layout, wanted)
    # One rule is missing and nothing is out of order: one rule is written, so all others keep their counters.
    assert [type(op) for block in plan.blocks for op in block.ops] == [Add]


def differences(
    data: st.DataObject, publications: Sequence[Publication], rules: Ruleset, layout: Layout
) -> Iterable[tuple[list[Publication], Difference]]:
    """Publications that come and go a few at a time: who is there after each step, and what it changed."""
    there: list[Publication] = []
    for _ in range(data.draw(st.integers(1, 4))):
        chosen = data.draw(st.lists(st.sampled_from(publications), unique_by=id)) if publications else []
        came = [p for p in chosen if p not in there]
        difference = rules.replace(
            [rule for p in there if p not in chosen for rule in rules_for(p, layout) if rule.family is V4],
            [rule for p in came for rule in rules_for(p, layout) if rule.family is V4],
        )
        there = [p for p in there if p in chosen] + came
        yield there, difference


@QUICK
@given(st.data(), layouts, worlds.publication_lists(max_size=8), others_rules())
def test_small_changes_lead_where_a_whole_plan_leads(
    data: st.DataObject, layout: Layout, publications: list[Publication], coming: list[tuple[Table, str, str, str, int]]
) -> None:
    async def follow() -> None:
        kernel = MemoryKernel()
        others_come(kernel, coming)
        before = foreign(kernel.tables)
        before[Table.FILTER].setdefault(USER_CHAIN, [])
        rules = Ruleset(wanted_of([], layout))
        tables = Tables(kernel, layout)
        await tables.read()
        await tables.apply(tables.plan(rules))
        for there, difference in differences(data, publications, rules, layout):
            await tables.apply(tables.plan_change(difference))
            wanted = wanted_of(there, layout)
            assert set(wanted) == set(rules)
            assert_as_wanted(kernel, layout, wanted)
            assert foreign(kernel.tables) == before
        await tables.read()
        assert not tables.plan(rules)

    asyncio.run(follow())


def watched(kernel: MemoryKernel, look: Callable[[State], None]) -> None:
    """Have ``look`` called with the tables after each block that is committed, but for the last."""

    def before_a_block(_: Table) -> bool:
        look(kernel.tables)
        return False

    kernel.fail_next_restore = before_a_block


def holds(state: State, rule: Rule) -> bool:
    return text_of(rule) in state[rule.table].get(rule.chain, ())


def pairs(publications: Iterable[Publication], layout: Layout) -> list[tuple[Rule, Rule]]:
    """Each rule that translates, with the one that accepts what it translated."""
    found = []
    for publication in publications:
        rules = [rule for rule in rules_for(publication, layout) if rule.family is V4]
        accepting = [r for r in rules if (r.table, r.chain, r.target) == (Table.FILTER, layout.chain, ACCEPT)]
        found += [(rule, accept) for rule in rules if isinstance(rule.target, Dnat) for accept in accepting]
    return found


def assert_translated_is_accepted(state: State, couples: Iterable[tuple[Rule, Rule]]) -> None:
    for dnat, accept in couples:
        assert not holds(state, dnat) or holds(state, accept), text_of(dnat)


@QUICK
@given(st.data(), layouts, worlds.publication_lists(), worlds.publication_lists())
def test_at_no_moment_is_a_packet_translated_that_is_not_accepted(
    data: st.DataObject, layout: Layout, old: list[Publication], new: list[Publication]
) -> None:
    couples = pairs([*old, *new], layout)
    old_rules, new_rules = wanted_of(old, layout), wanted_of(new, layout)

    async def replace() -> None:
        kernel = MemoryKernel()
        watched(kernel, lambda state: assert_translated_is_accepted(state, couples))
        tables = Tables(kernel, layout)
        await tables.read()
        await tables.apply(tables.plan(old_rules))
        if data.draw(st.booleans(), label="as a change"):
            change = Ruleset(old_rules).replace(old_rules, new_rules)
            await tables.apply(tables.plan_change(change))
        else:  # as after a restart with another configuration
            await tables.read()
            await tables.apply(tables.plan(new_rules))
        assert_translated_is_accepted(kernel.tables, couples)
        for plan in await tables.plan_removal():
            await tables.apply(plan)

    asyncio.run(replace())


@QUICK
@given(st.data(), layouts, worlds.publication_lists(), worlds.publication_lists(max_size=2))
def test_a_restore_that_fails_halfway_leaves_what_is_safe_and_is_made_good(
    data: st.DataObject, layout: Layout, publications: list[Publication], gone: list[Publication]
) -> None:
    kernel = MemoryKernel()
    wanted = wanted_of(publications, layout)
    fit(kernel, layout, wanted_of(gone, layout))
    for _ in range(data.draw(st.integers(0, 4))):
        drift(data, kernel, wanted)
    others = foreign(kernel.tables)
    others[Table.FILTER].setdefault(USER_CHAIN, [])
    countdown = data.draw(st.integers(0, 3), label="blocks that are committed")
    committed = []

    def fail(table: Table) -> bool:
        committed.append(table)
        return len(committed) > countdown

    kernel.fail_next_restore = fail
    try:
        fit(kernel, layout, wanted)
    except FirewallError:
        filter_is_written = Table.FILTER in committed[:countdown]
        kernel.fail_next_restore = None
        if filter_is_written:
            assert_translated_is_accepted(kernel.tables, pairs(publications, layout))
    kernel.fail_next_restore = None
    fit(kernel, layout, wanted)
    assert_as_wanted(kernel, layout, wanted)
    assert foreign(kernel.tables) == others
    assert not fit(kernel, layout, wanted)


def test_repairing_a_chain_does_not_refuse_what_is_still_translated() -> None:
    layout, leaving = Layout(), active("8080:80")
    kernel = MemoryKernel()
    fit(kernel, layout, wanted_of([leaving, active("8081:80", "172.17.0.3", name="db")], layout))
    kernel.tables[Table.FILTER]["DOCKER"].append(kernel.tables[Table.FILTER]["DOCKER"][0])
    watched(kernel, lambda state: assert_translated_is_accepted(state, pairs([leaving], layout)))
    fit(kernel, layout, wanted_of([active("8081:80", "172.17.0.3", name="db")], layout))


@QUICK
@given(layouts, worlds.publication_lists(), worlds.publication_lists())
def test_filter_is_added_before_nat_and_nat_removed_before_filter_with_the_guard_around_both(
    layout: Layout, old: list[Publication], new: list[Publication]
) -> None:
    kernel = MemoryKernel()
    fit(kernel, layout, wanted_of(old, layout))
    plan = fit(kernel, layout, wanted_of(new, layout))
    order: dict[tuple[Table, type[Op]], int] = {(Table.RAW, Add): 0, (Table.FILTER, Add): 1, (Table.NAT, Add): 2}
    order |= {(Table.NAT, Remove): 3, (Table.FILTER, Remove): 4, (Table.RAW, Remove): 5}
    steps = [order[block.table, type(op)] for block in plan.blocks for op in block.ops]
    assert steps == sorted(steps)
    assert len(plan.blocks) <= 5
    assert all(block.ops for block in plan.blocks)


def removed(kernel: MemoryKernel, layout: Layout) -> tuple[Plan, Plan]:
    """Take everything of ours away, and return what that took."""

    async def clean() -> tuple[Plan, Plan]:
        tables = Tables(kernel, layout)
        plan, guard = await tables.plan_removal()
        await tables.apply(plan)
        await tables.apply(guard)
        return plan, guard

    return asyncio.run(clean())


@settings(deadline=None, max_examples=120)
@given(st.data(), layouts, worlds.publication_lists(), others_rules(), others_rules(), st.booleans(), st.booleans())
def test_removal_leaves_what_others_have_and_nothing_of_ours(
    data: st.DataObject,
    layout: Layout,
    publications: list[Publication],
    before_us: list[tuple[Table, str, str, str, int]],
    after_us: list[tuple[Table, str, str, str, int]],
    user_rule: bool,
    user_jump: bool,
) -> None:
    kernel = MemoryKernel()
    others_come(kernel, before_us)
    fit(kernel, layout, wanted_of(publications, layout))
    for _ in range(data.draw(st.integers(0, 4))):
        drift(data, kernel, wanted_of(publications, layout), without=("flush", "delete the chain", "user"))
    others_come(kernel, after_us)
    filters = kernel.tables[Table.FILTER]
    if user_rule:
        filters[USER_CHAIN].append("-s 192.0.2.66/32 -j DROP")
    if user_jump:
        filters["INPUT"].append("-j DOCKER-USER")
    kept = foreign(kernel.tables)
    # Its chain stays with the operator who has use for it, and where our jump is gone it may be anybody's.
    ours_jumps = any(rule.endswith("-j DOCKER-USER") and "ctrport " in rule for rule in filters["FORWARD"])
    if ours_jumps and not user_rule and not user_jump:
        del kept[Table.FILTER][USER_CHAIN]
    # What drift has emptied to the last rule cannot be told from somebody else's chain, unless we jump to it.
    for table, chain in layout.own_chains:
        rules = (rule for rules in kernel.tables[table].values() for rule in rules)
        jumped_to = any(rule.endswith(f"-j {chain}") and "ctrport " in rule for rule in rules)
        if kernel.tables[table][chain] == [] and not jumped_to:
            kept[table][chain] = []
    # Nobody needs to know what our chains were called.
    plan, guard = removed(kernel, Layout("OTHER"))
    assert kernel.tables == kept
    assert [block.table for block in plan.blocks] == sorted(
        [block.table for block in plan.blocks], key=[Table.NAT, Table.FILTER].index
    )
    assert {block.table for block in guard.blocks} <= {Table.RAW}
    again = removed(kernel, layout)
    assert not any(again)


@settings(deadline=None, max_examples=60)
@given(layouts, worlds.publication_lists(), others_rules())
def test_what_another_name_left_is_swept_and_nothing_else(
    layout: Layout, publications: list[Publication], coming: list[tuple[Table, str, str, str, int]]
) -> None:
    kernel, now = MemoryKernel(), replace(layout, chain="CTRPORT" if layout.chain == "DOCKER" else "DOCKER")
    others_come(kernel, coming)
    fresh = copy.deepcopy(kernel)
    fit(kernel, layout, wanted_of(publications, layout))

    async def follow(kernel: MemoryKernel) -> bool:
        tables = Tables(kernel, now)
        await tables.read()
        await tables.apply(tables.plan(wanted_of(publications, now)))
        sweep = await tables.plan_sweep()
        await tables.apply(sweep)
        assert not await tables.plan_sweep()
        return bool(sweep)

    assert asyncio.run(follow(kernel))
    assert not asyncio.run(follow(fresh))
    # The chains came in another order; what they hold is the same.
    assert {table: dict(sorted(chains.items())) for table, chains in kernel.tables.items()} == {
        table: dict(sorted(chains.items())) for table, chains in fresh.tables.items()
    }


def test_removal_deletes_every_chain_of_ours() -> None:
    kernel = MemoryKernel()
    fit(kernel, Layout(), wanted_of([active("8080:80")], Layout()))
    removed(kernel, Layout())
    assert kernel.tables == MemoryKernel().tables


def test_removal_deletes_a_chain_of_ours_that_was_flushed() -> None:
    kernel = MemoryKernel()
    fit(kernel, Layout(), wanted_of([active("8080:80")], Layout()))
    kernel.tables[Table.NAT]["DOCKER"].clear()
    removed(kernel, Layout())
    assert "DOCKER" not in kernel.tables[Table.NAT]


def test_removal_leaves_a_chain_of_ours_that_others_use_without_our_rules() -> None:
    kernel = MemoryKernel()
    fit(kernel, Layout(), wanted_of([active("8080:80")], Layout()))
    kernel.tables[Table.NAT]["DOCKER"].append("-p tcp -j RETURN")
    kernel.tables[Table.FILTER]["INPUT"].append("-j DOCKER")
    removed(kernel, Layout())
    assert kernel.tables[Table.NAT]["DOCKER"] == ["-p tcp -j RETURN"]
    assert kernel.tables[Table.FILTER]["DOCKER"] == []
    assert kernel.tables[Table.FILTER]["INPUT"] == ["-j DOCKER"]
    assert not {"DOCKER-FORWARD", "DOCKER-USER"} & set(kernel.tables[Table.FILTER])
    assert "DOCKER-POSTROUTING" not in kernel.tables[Table.NAT]


def test_an_operators_chain_that_our_jump_does_not_lead_to_is_not_ours_to_delete() -> None:
    held = {(Table.FILTER, "FORWARD"): list[Line](), (Table.FILTER, USER_CHAIN): list[Line]()}
    assert plan_removal(held) == (Plan(), Plan())


MARK = next(rule for rule in skeleton(Layout(), V4) if (rule.table, rule.chain) == (Table.FILTER, "DOCKER"))
JUMP = next(rule for rule in skeleton(Layout(), V4) if rule.chain == "PREROUTING")
FOREIGN: dict[str, Callable[[State], None]] = {
    "a rule without our mark": lambda state: state[Table.NAT].update({"DOCKER": ["-i docker0 -j RETURN"]}),
    "one such rule among ours": lambda state: state[Table.FILTER].update(
        {"DOCKER": [text_of(MARK), "-d 172.17.0.9/32 -j ACCEPT"]}
    ),
    "empty, and somebody jumps to it": lambda state: state[Table.NAT].update(
        {"DOCKER": [], "PREROUTING": ["-m addrtype --dst-type LOCAL -j DOCKER"]}
    ),
    "ours until somebody else took it": lambda state: state[Table.NAT].update(
        {"DOCKER": [text_of(MARK)], "PREROUTING": ["-m addrtype --dst-type LOCAL -j DOCKER"]}
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_chain_of_our_name_that_is_somebody_elses_is_left_alone(what: str) -> None:
    kernel = MemoryKernel()
    FOREIGN[what](kernel.tables)
    before = copy.deepcopy(kernel.tables)
    with pytest.raises(ForeignChain, match=r"the chain DOCKER of the table \w+ is somebody else's .*firewall\.chain"):
        fit(kernel, Layout(), wanted_of([], Layout()))
    assert kernel.tables == before
    # The advice in the message is good.
    fit(kernel, Layout("CTRPORT"), wanted_of([active("8080:80")], Layout("CTRPORT")))
    for table in (Table.NAT, Table.FILTER):
        assert kernel.tables[table].get("DOCKER") == before[table].get("DOCKER")


@pytest.mark.parametrize(("table", "chain"), Layout().own_chains)
def test_an_empty_chain_of_our_name_that_nobody_uses_is_adopted(table: Table, chain: str) -> None:
    kernel = MemoryKernel()
    kernel.tables[table][chain] = []
    fit(kernel, Layout(), wanted_of([active("8080:80")], Layout()))
    assert_as_wanted(kernel, Layout(), wanted_of([active("8080:80")], Layout()))


def test_an_empty_chain_that_only_we_jump_to_is_adopted() -> None:
    kernel = MemoryKernel()
    wanted = wanted_of([active("8080:80")], Layout())
    fit(kernel, Layout(), wanted)
    kernel.tables[Table.NAT]["DOCKER"].clear()
    fit(kernel, Layout(), wanted)
    assert_as_wanted(kernel, Layout(), wanted)


def test_a_chain_that_came_meanwhile_is_not_emptied() -> None:
    kernel = MemoryKernel()

    async def race() -> None:
        tables = Tables(kernel, Layout())
        await tables.read()
        plan = tables.plan(wanted_of([], Layout()))
        kernel.tables[Table.NAT]["DOCKER"] = ["-j RETURN"]
        with pytest.raises(FirewallError, match="chain already exists"):
            await tables.apply(plan)

    asyncio.run(race())
    assert kernel.tables[Table.NAT]["DOCKER"] == ["-j RETURN"]


def test_without_a_look_at_the_kernel_there_is_no_plan() -> None:
    tables = Tables(MemoryKernel(), Layout())
    with pytest.raises(FirewallError, match="has not been read"):
        tables.plan([])
    with pytest.raises(FirewallError, match="no whole plan has been applied"):
        tables.plan_change(Difference((), ()))
    assert tables.localnet_records == ()


def test_after_an_error_nothing_is_known_of_the_kernel() -> None:
    async def fail() -> None:
        kernel = MemoryKernel()
        tables = Tables(kernel, Layout())
        await tables.read()
        kernel.fail_next_restore = lambda table: table is Table.NAT
        with pytest.raises(FirewallError, match="the table nat could not be written"):
            await tables.apply(tables.plan(wanted_of([], Layout())))
        with pytest.raises(FirewallError, match="has not been read"):
            tables.plan([])
        with pytest.raises(FirewallError, match="no whole plan has been applied"):
            tables.plan_change(Difference((), ()))

    asyncio.run(fail())


def test_an_empty_plan_writes_nothing_and_is_known_as_applied() -> None:
    async def twice() -> None:
        kernel = MemoryKernel()
        tables, wanted = Tables(kernel, Layout()), wanted_of([], Layout())
        await tables.read()
        await tables.apply(tables.plan(wanted))
        await tables.read()
        plan = tables.plan(wanted)
        assert not plan
        await tables.apply(plan)
        assert len(kernel.restores) == 1
        await tables.apply(tables.plan_change(Difference(rules_for(active("8080:80"), Layout()), ())))
        assert len(kernel.restores) == 2

    asyncio.run(twice())


def test_a_change_that_changes_nothing_is_an_empty_plan() -> None:
    async def change() -> Plan:
        tables = Tables(MemoryKernel(), Layout())
        await tables.read()
        await tables.apply(tables.plan(wanted_of([], Layout())))
        return tables.plan_change(Difference((), ()))

    assert not asyncio.run(change())


def test_the_cost_of_a_change_is_that_of_the_change() -> None:
    async def change() -> Plan:
        kernel = MemoryKernel()
        tables, layout = Tables(kernel, Layout()), Layout()
        many = [active(f"{port}:80", name=f"web-{port}") for port in range(8000, 8100)]
        await tables.read()
        await tables.apply(tables.plan(wanted_of(many, layout)))
        more = active("192.0.2.1:9000:80")
        rules = Ruleset(wanted_of(many, layout))
        return tables.plan_change(rules.replace((), rules_for(more, layout)))

    plan = asyncio.run(change())
    assert [(block.table, len(block.ops)) for block in plan.blocks] == [(Table.FILTER, 1), (Table.NAT, 2)]
    # The host address stands before every wildcard: behind the chain's mark.
    [nat] = [rule for rule in plan.added if rule.chain == "DOCKER" and rule.table is Table.NAT]
    [add] = [op for op in plan.blocks[1].ops if isinstance(op, Add) and op.rule == nat]
    assert add.position == 2


def test_what_our_rules_say_of_route_localnet_is_read_from_the_kernel() -> None:
    async def record(clean: bool) -> tuple[LocalnetRecord, ...]:
        kernel = MemoryKernel()
        fit_tables = Tables(kernel, Layout())
        await fit_tables.read()
        rules = [*skeleton(Layout(), V4), *rules_for(active("8080:80"), Layout(), localnet_ours=False)]
        await fit_tables.apply(fit_tables.plan(rules))
        tables = Tables(kernel, Layout())
        if clean:
            await tables.plan_removal()
        else:
            await tables.read()
        return tables.localnet_records

    assert asyncio.run(record(clean=False)) == (LocalnetRecord("docker0", ours=False),)
    assert asyncio.run(record(clean=True)) == (LocalnetRecord("docker0", ours=False),)


def test_a_plan_names_the_rules_that_it_writes() -> None:
    kernel = MemoryKernel()
    wanted = wanted_of([active("8080:80")], Layout())
    assert set(fit(kernel, Layout(), wanted).added) == set(wanted)


def test_a_rule_in_a_chain_that_is_out_of_order_has_the_chain_rewritten_in_one_commit() -> None:
    kernel = MemoryKernel()
    wanted = wanted_of([active("8080:80"), active("192.0.2.1:8081:81")], Layout())
    fit(kernel, Layout(), wanted)
    kernel.tables[Table.NAT]["DOCKER"].reverse()
    [block] = fit(kernel, Layout(), wanted).blocks
    assert block.table is Table.NAT
    assert block.ops[0] == Empty("DOCKER")
    assert [type(op) for op in block.ops[1:]] == [Add, Add, Add]


@pytest.mark.parametrize(
    ("there", "position", "expected"),
    [
        (["foreign"], Place.POLICY, ["USER", "FORWARD", "foreign"]),
        (["KUBE-FORWARD"], Place.POLICY, ["USER", "KUBE-FORWARD", "FORWARD"]),
        (["KUBE-FORWARD"], Place.FIRST, ["USER", "FORWARD", "KUBE-FORWARD"]),
        (["foreign"], Place.LAST, ["USER", "foreign", "FORWARD"]),
        (["FLANNEL-FWD"], Place.POLICY, ["USER", "FORWARD", "FLANNEL-FWD"]),
        (["cali-FORWARD", "foreign"], Place.POLICY, ["USER", "cali-FORWARD", "foreign", "FORWARD"]),
    ],
)
def test_the_jump_stands_where_the_position_says(there: list[str], position: Place, expected: list[str]) -> None:
    kernel, layout = MemoryKernel(), Layout(position=position)
    for name in there:
        target = "" if name == "foreign" else name
        others_come(kernel, [(Table.FILTER, "FORWARD", target, OTHERS[target][0], 9)])
    fit(kernel, layout, wanted_of([], layout))
    names = [line.target if line.tag is None else line.target.removeprefix("DOCKER-") for line in forward(kernel)]
    assert ["foreign" if name == "DROP" else name for name in names] == expected


def forward(kernel: MemoryKernel) -> list[Line]:
    return lines(kernel, Table.FILTER, "FORWARD")


def test_a_policy_agent_that_comes_later_is_asked_first_from_the_next_look_on() -> None:
    kernel, wanted = MemoryKernel(), wanted_of([], Layout())
    fit(kernel, Layout(), wanted)
    others_come(kernel, [(Table.FILTER, "FORWARD", "cali-FORWARD", "-j cali-FORWARD", 0)])
    fit(kernel, Layout(), wanted)
    assert [line.target for line in forward(kernel)] == ["DOCKER-USER", "cali-FORWARD", "DOCKER-FORWARD"]


@pytest.mark.parametrize(("table", "chain"), [(Table.RAW, "PREROUTING"), (Table.NAT, "POSTROUTING")])
@pytest.mark.parametrize(("who", "moves"), [("", True), ("KUBE-FORWARD", False), ("CNI-FORWARD", False)])
def test_what_wants_the_top_gives_way_to_neighbours_and_to_nobody_else(
    table: Table, chain: str, who: str, moves: bool
) -> None:
    kernel, wanted = MemoryKernel(), wanted_of([active("8080:80")], Layout())
    fit(kernel, Layout(), wanted)
    others_come(kernel, [(table, chain, who, OTHERS[who][0], 0)])
    plan = fit(kernel, Layout(), wanted)
    assert bool(plan) is moves
    assert (lines(kernel, table, chain)[0].tag is not None) is moves


def test_a_chain_of_ours_that_should_hold_nothing_is_not_made() -> None:
    kernel = MemoryKernel()
    assert not fit(kernel, Layout(), [])
    assert USER_CHAIN not in kernel.tables[Table.FILTER]


def test_rules_of_ours_that_nobody_wants_leave_the_chain_that_stays() -> None:
    kernel = MemoryKernel()
    fit(kernel, Layout(), wanted_of([active("8080:80")], Layout()))
    fit(kernel, Layout(), [])
    assert own_places(kernel) == []
    assert kernel.tables[Table.NAT]["DOCKER"] == []


REFUSED: dict[str, tuple[Plan, str]] = {
    "a chain that is there": (Plan((Block(Table.NAT, (New("DOCKER"), New("DOCKER"))),)), "already exists"),
    "no such chain": (Plan((Block(Table.NAT, (Delete("DOCKER"),)),)), "no chain by that name"),
    "a chain that holds rules": (
        Plan((Block(Table.NAT, (New("X"), Add(Rule(V4, Table.NAT, "X", Match(), None, "chain"), None), Delete("X"))),)),
        "chain is not empty",
    ),
    "no such rule": (
        Plan((Block(Table.NAT, (Remove("OUTPUT", Line("-A OUTPUT -j ACCEPT", None)),)),)),
        "no such rule",
    ),
    "a position behind the end": (
        Plan((Block(Table.NAT, (Add(JUMP, 7),)),)),
        "index of insertion too big",
    ),
    "a jump to nowhere": (
        Plan((Block(Table.NAT, (Add(JUMP, None),)),)),
        "no chain or target DOCKER",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_tables_in_memory_refuse_what_the_kernel_refuses(what: str) -> None:
    plan, message = REFUSED[what]
    kernel = MemoryKernel()
    before = copy.deepcopy(kernel.tables)
    with pytest.raises(FirewallError, match=message):
        asyncio.run(kernel.restore(plan))
    assert kernel.tables == before
    assert kernel.restores == []
