"""Plans, carried out by tables in memory: whatever state these are in, what we want comes out and nothing else."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrport.firewall import FirewallError
from ctrport.firewall.fake import MemoryKernel
from ctrport.firewall.plan import (
    Add,
    Block,
    Delete,
    Empty,
    Line,
    New,
    Op,
    Plan,
    Remove,
    parted,
)
from ctrport.firewall.tables import Tables
from ctrport.model import Publication
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
    rules_for,
    skeleton,
)
from tests.unit import worlds
from tests.unit.drifts import (
    JUMP,
    OTHERS,
    QUICK,
    V4,
    State,
    assert_as_wanted,
    drift,
    fit,
    foreign,
    forward,
    layouts,
    lines,
    others_come,
    others_rules,
    own_places,
    text_of,
    wanted_of,
)
from tests.unit.worlds import active


@pytest.mark.parametrize("lost", [True, False])
def test_the_operators_jump_that_comes_back_does_not_push_ours_behind_others(lost: bool) -> None:
    kernel, wanted = MemoryKernel(), wanted_of([], Layout())
    fit(kernel, Layout(), wanted)
    rules = kernel.tables[Table.FILTER]["FORWARD"]
    user, ours = rules
    rules[:] = ["-i lo -j DROP", ours] if lost else ["-i lo -j DROP", ours, user]
    fit(kernel, Layout(), wanted)
    assert [line.target for line in forward(kernel)] == ["DOCKER-USER", "DOCKER-FORWARD", "DROP"]


@settings(deadline=None, max_examples=100)
@given(st.data(), layouts, worlds.publication_lists(), worlds.publication_lists(max_size=2))
def test_removals_may_all_go_at_the_end(
    data: st.DataObject, layout: Layout, publications: list[Publication], gone: list[Publication]
) -> None:
    kernel = MemoryKernel()
    fit(kernel, layout, wanted_of([*publications, *gone], layout))
    strays = wanted_of(gone, Layout(layout.chain, layout.position, localhost=not layout.localhost))
    for _ in range(data.draw(st.integers(0, 6))):
        drift(data, kernel, strays)
    in_order, at_the_end = copy.deepcopy(kernel), copy.deepcopy(kernel)
    tables = Tables(kernel, layout)
    asyncio.run(tables.read())
    plan = tables.plan(wanted_of(publications, layout))
    first, removals = parted(plan)
    assert not any(isinstance(op, Remove) for op in [block.ops[-1] for block in first.blocks])
    asyncio.run(in_order.restore(plan))
    asyncio.run(at_the_end.restore(Plan((*first.blocks, *(Block(table, (op,)) for table, op in removals)))))
    assert at_the_end.tables == in_order.tables


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
