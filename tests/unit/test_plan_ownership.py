"""What plans take for ours in the kernel: to remove it with nothing of others, to adopt it, or to leave it alone."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrport.firewall import FirewallError, ForeignChain
from ctrport.firewall.fake import MemoryKernel
from ctrport.firewall.plan import (
    Line,
    Plan,
    plan_removal,
)
from ctrport.firewall.tables import Tables
from ctrport.model import Publication
from ctrport.rules import (
    USER_CHAIN,
    Layout,
    Table,
    skeleton,
)
from tests.unit import worlds
from tests.unit.drifts import (
    V4,
    State,
    assert_as_wanted,
    drift,
    fit,
    foreign,
    layouts,
    others_come,
    others_rules,
    text_of,
    wanted_of,
)
from tests.unit.worlds import active


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
