"""A table of our own: what stands in it, and what is written so that it holds what it should, over one in memory.

The golden texts are written anew with ``UPDATE_GOLDEN=1 pytest tests/unit``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrport.firewall import FirewallError, ForeignTable, sets
from ctrport.firewall.door import Door
from ctrport.firewall.elements import elements
from ctrport.firewall.fake import MemoryKernel
from ctrport.firewall.fake_table import Content, MemoryTable
from ctrport.firewall.nftables import OwnTable
from ctrport.firewall.plan import Plan
from ctrport.firewall.sets import Element
from ctrport.firewall.standing import standing
from ctrport.firewall.tableplan import Asked, HeldChain, HeldSet, TablePlan
from ctrport.firewall.tables import Tables
from ctrport.model import Access, ContainerKey, Family, Network, Publication
from ctrport.owners import owner_of
from ctrport.rules import ACCEPTED_OWNER, Gate, Layout, Rule, Ruleset, Table, rules_for
from tests.unit.test_elements import all_rules, worlds_of_rules
from tests.unit.worlds import active

V4 = Family.IPV4
GOLDEN = Path(__file__).with_name("golden") / "nft"
EVERY_GATE = tuple(
    Gate(version, length, interface)
    for version, lengths in ((4, (0, 24, 32)), (6, (0, 33, 128)))
    for length in lengths
    for interface in (False, True)
    if length or interface
)
LAYOUTS = {
    "standing-ipv4": (Layout(), V4),
    "standing-ipv6": (Layout(), Family.IPV6),
    "standing-all-else-ipv4": (Layout(localhost=False, masquerade_all=True, networks=True, gates=EVERY_GATE), V4),
    "standing-all-else-ipv6": (Layout(masquerade_all=True, networks=True, gates=EVERY_GATE), Family.IPV6),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_what_stands_is_as_it_was(case: str) -> None:
    text = "".join(f"{line}\n" for line in standing(*LAYOUTS[case]).script)
    path = GOLDEN / f"{case}.txt"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert text == path.read_text()


def test_every_golden_text_has_its_case() -> None:
    from tests.unit.test_rules import CASES

    assert {path.stem for path in GOLDEN.glob("*.txt")} == {*LAYOUTS, *CASES}


def fit(table: MemoryTable, layout: Layout, rules: Iterable[Rule]) -> TablePlan:
    async def once() -> TablePlan:
        firewall = OwnTable(table, layout)
        await firewall.read()
        plan = firewall.plan(rules)
        await firewall.apply(plan)
        return plan

    return asyncio.run(once())


def wanted(layout: Layout, publications: Iterable[Publication]) -> list[Rule]:
    apart: list[Publication] = []
    for one in publications:
        if not any(one.mapping.overlaps(other.mapping) for other in apart):
            apart.append(one)
    return list(Ruleset(rule for rule in all_rules(layout, apart) if rule.family is V4))


def content(table: MemoryTable) -> Content:
    assert table.content is not None
    return table.content


def held(table: MemoryTable) -> set[Element]:
    return content(table).elements


# What somebody does to it.


def lose(data: st.DataObject, table: MemoryTable) -> None:
    there = sorted(held(table))
    if there:
        held(table).discard(data.draw(st.sampled_from(there)))


def edit(data: st.DataObject, table: MemoryTable) -> None:
    there = sorted(held(table))
    if there:
        one = data.draw(st.sampled_from(there))
        held(table).discard(one)
        held(table).add(one._replace(comment=data.draw(st.sampled_from(["", "not ours", "ctrport node 192.0.2.9"]))))


def insert(data: st.DataObject, table: MemoryTable) -> None:
    number = data.draw(st.sampled_from([1, 8000, 8001, 65535]))
    one = Element("host-ports", sets.packed(b"\x06", sets.port(number)), b"", b"\x0a\0\0\1\0\x50\0\0", "")
    if not any(other[:3] == one[:3] for other in held(table)):
        held(table).add(one)


def unhook(data: st.DataObject, table: MemoryTable) -> None:
    chains = content(table).chains
    name = data.draw(st.sampled_from(sorted(chains)))
    how = data.draw(st.sampled_from(["no rule", "another rule", "policy", "elsewhere", "gone"]))
    match how:
        case "no rule":
            chains[name] = replace(chains[name], tags=())
        case "another rule":
            chains[name] = replace(chains[name], tags=(*chains[name].tags, ""))
        case "policy":
            chains[name] = replace(chains[name], accepts=False)
        case "elsewhere":
            chains[name] = replace(chains[name], hook=("filter", 1, 0))
        case "gone":
            del chains[name]


def spoil(data: st.DataObject, table: MemoryTable) -> None:
    there = content(table).sets
    name = data.draw(st.sampled_from(sorted(there)))
    held(table).difference_update([one for one in held(table) if one.set == name])
    if data.draw(st.booleans()):
        del there[name]
    else:
        there[name] = HeldSet(1, 1, True, False)


def drop(data: st.DataObject, table: MemoryTable) -> None:
    table.content = None


DRIFTS = st.sampled_from([lose, lose, edit, insert, unhook, unhook, spoil, drop])


@settings(deadline=None, max_examples=150)
@given(st.data(), worlds_of_rules(), worlds_of_rules())
def test_whatever_was_there_it_holds_what_it_should(
    data: st.DataObject,
    before: tuple[Layout, list[Publication]],
    after: tuple[Layout, list[Publication]],
) -> None:
    table = MemoryTable()
    fit(table, before[0], wanted(*before))
    for _ in range(data.draw(st.integers(0, 3))):
        if table.content is not None:
            data.draw(DRIFTS)(data, table)
    rules = wanted(*after)
    fit(table, after[0], rules)
    assert held(table) == set(Asked(standing(after[0], V4), rules))
    fresh = MemoryTable()
    fit(fresh, after[0], rules)
    assert content(table) == content(fresh)
    again = fit(table, after[0], rules)
    assert not again, again


@settings(deadline=None, max_examples=80)
@given(worlds_of_rules(), st.randoms(use_true_random=False))
def test_changes_one_by_one_come_to_the_same(world: tuple[Layout, list[Publication]], random: object) -> None:
    layout, publications = world
    everything = wanted(layout, publications)
    bare = wanted(layout, [])
    table = MemoryTable()

    async def work() -> None:
        rules = Ruleset(bare)
        firewall = OwnTable(table, layout)
        await firewall.read()
        await firewall.apply(firewall.plan(rules))
        fresh = held(table).copy()
        apart = [one for one in publications if any(rule.owner == owner_of(one) for rule in everything)]
        for one in (*apart, *apart[::-1]):
            its = [rule for rule in rules_for(one, layout) if rule.family is V4]
            here = any(rule in rules and rule.owner == owner_of(one) for rule in its)
            await firewall.apply(firewall.plan_change(rules.replace(its, ()) if here else rules.replace((), its)))
            assert held(table) == set(Asked(standing(layout, V4), rules))
        assert held(table) == fresh

    asyncio.run(work())


def many(count: int) -> list[Publication]:
    return [active(f"{port}:80", f"172.17.{port >> 8}.{port & 255}") for port in range(1000, 1000 + count)]


def test_a_change_is_its_own_elements_whatever_there_is() -> None:
    its = [rule for rule in rules_for(active("8080:80"), Layout()) if rule.family is V4]

    async def written_beside(count: int) -> list[TablePlan]:
        rules = Ruleset(wanted(Layout(), []))
        for one in many(count):  # a list of all of them is compared with all of them
            rules.replace((), (rule for rule in rules_for(one, Layout()) if rule.family is V4))
        firewall = OwnTable(MemoryTable(), Layout())
        await firewall.read()
        await firewall.apply(firewall.plan(rules))
        return [firewall.plan_change(rules.replace((), its))]

    [few], [a_lot] = asyncio.run(written_beside(1)), asyncio.run(written_beside(500))
    assert few == a_lot
    assert {element.set for element in few.come} == {"published", "host-ports"}
    assert not few.script
    assert not few.gone


def test_a_table_that_has_a_wrong_set_is_made_anew_at_once_with_all_it_is_to_hold() -> None:
    table, rules = MemoryTable(), wanted(Layout(), [active("8080:80"), active("9000-9001:9000-9001/udp")])
    fit(table, Layout(), rules)
    content(table).sets["published"] = HeldSet(8, 0, False, False)
    whole, writes = held(table).copy(), table.writes
    plan = fit(table, Layout(), rules)
    assert plan.whole
    assert table.writes == writes + 1
    assert held(table) == whole
    assert "delete table ip ctrport\n" in plan.text
    assert "add element ip ctrport host-ranges-udp { 9000-9001 comment" in plan.text


def test_what_nft_cannot_write_of_a_comment_is_written_behind_it() -> None:
    long = replace(active("8080:80"), container=ContainerKey("n" * 70, "c" * 70))
    table, rules = MemoryTable(), wanted(Layout(), [long, active("8081:81", "172.17.0.3", name="db")])
    fit(table, Layout(), rules)
    whole = held(table).copy()
    content(table).sets["published"] = HeldSet(8, 0, False, False)
    plan = fit(table, Layout(), rules)
    assert "n" * 70 not in plan.text
    assert held(table) == whole
    assert any("n" * 70 in element.comment for element in held(table))


def test_a_plan_is_shown_raw_as_nft_would_load_it() -> None:
    table = MemoryTable()
    rules = wanted(Layout(), [active("8080:80"), active("8081:81", "172.17.0.3", name="db")])

    async def script(rules: Iterable[Rule]) -> list[str]:
        firewall = OwnTable(table, Layout())
        await firewall.read()
        return firewall.script(firewall.plan(rules))

    first = asyncio.run(script(rules))
    assert first.count("nft -f - <<'EOF'") == first.count("EOF") == 2  # what stands, and then the elements
    assert any("tcp . 8081" in line for line in first[first.index("EOF") :])
    fit(table, Layout(), rules)
    assert asyncio.run(script(rules)) == []
    second = asyncio.run(script(wanted(Layout(), [active("8080:80")])))
    assert (second[0], second[-1]) == ("nft -f - <<'EOF'", "EOF")
    assert all(line.startswith("delete element ip ctrport ") for line in second[1:-1])
    content(table).sets["published"] = HeldSet(8, 0, False, False)
    assert asyncio.run(script(rules)).count("EOF") == 1  # all at once


def test_what_a_former_layout_had_goes_with_its_sets_and_chains() -> None:
    here = Access((ip_network("192.0.2.0/24"),), "eth1")
    layout, table = Layout(gates=EVERY_GATE), MemoryTable()
    fit(table, layout, wanted(layout, [active("8080:80", access=here)]))
    assert any(one.set == "from-24-by-device" for one in held(table))
    plan = fit(table, Layout(localhost=False), wanted(Layout(localhost=False), []))
    assert not plan.whole
    assert "default/web 8080:80/tcp" in plan.removed
    assert not any(name.startswith(("from-", "by-")) for name in content(table).sets)
    assert "localhost-guard" not in content(table).chains


def test_of_subnets_within_one_another_the_outer_one_stands_for_both() -> None:
    inner, outer = (
        [rule for rule in rules_for(one, Layout()) if rule.family is V4]
        for one in (active("8080:80", "172.17.0.2"), active("8081:80", "172.17.0.3", name="db"))
    )
    narrow, wide = ip_network("172.17.0.0/24"), ip_network("172.17.0.0/16")

    def within(rules: list[Rule], network: Network) -> list[Rule]:
        return [
            replace(rule, match=replace(rule.match, source=network)) if rule.match.source == wide else rule
            for rule in rules
        ]

    table = MemoryTable()

    async def links(firewall: OwnTable, rules: Ruleset, old: list[Rule], new: list[Rule]) -> int:
        await firewall.apply(firewall.plan_change(rules.replace(old, new)))
        [only] = [one for one in held(table) if one.set == "links"]
        return int.from_bytes(only.end[:4], "big") - int.from_bytes(only.key[:4], "big") + 1

    async def work() -> None:
        rules = Ruleset(wanted(Layout(), []))
        firewall = OwnTable(table, Layout())
        await firewall.read()
        await firewall.apply(firewall.plan(rules))
        small = within(inner, narrow)
        assert await links(firewall, rules, [], small) == narrow.num_addresses
        assert await links(firewall, rules, [], outer) == wide.num_addresses
        assert await links(firewall, rules, outer, []) == narrow.num_addresses

    asyncio.run(work())


SAID: dict[str, tuple[Callable[[MemoryTable], object], str]] = {
    "nothing": (lambda table: None, ""),
    "an element": (lambda table: forget(table, "host-ports"), "1 rule gone (what publishes default/web 8080:80/tcp)"),
    "one of two rules": (
        lambda table: forget(table, "published"),
        "2 rules gone (what publishes default/web 8080:80/tcp)",
    ),
    "one that all share": (
        lambda table: forget(table, "links"),
        "1 rule gone (what publishes default/web 8080:80/tcp)",
    ),
    "edited": (lambda table: misdirect(table), "1 rule edited (what publishes default/web 8080:80/tcp)"),
    "left over": (lambda table: insert_port(table, 9999), "too many: 1 rule"),
    "a chain": (lambda table: flush(table, "forward"), "gone or changed: the chain forward of ip ctrport"),
    "a set": (lambda table: lose_set(table, "bridges"), "gone or changed: the set bridges of ip ctrport"),
    "the table": (
        lambda table: setattr(table, "content", None),
        "gone or changed: the table ip ctrport; 9 rules gone (what publishes default/web 8080:80/tcp)",
    ),
}


def forget(table: MemoryTable, name: str) -> None:
    held(table).difference_update([one for one in held(table) if one.set == name])


def misdirect(table: MemoryTable) -> None:
    [one] = [one for one in held(table) if one.set == "host-ports"]
    held(table).discard(one)
    held(table).add(one._replace(data=b"\x0a\0\0\1\0\x50\0\0"))


def insert_port(table: MemoryTable, number: int) -> None:
    key = sets.packed(b"\x06", sets.port(number))
    held(table).add(Element("host-ports", key, b"", b"\x0a\0\0\1\0\x50\0\0", "ctrport default/old 9999:80/tcp"))


def flush(table: MemoryTable, name: str) -> None:
    content(table).chains[name] = replace(content(table).chains[name], tags=())


def lose_set(table: MemoryTable, name: str) -> None:
    del content(table).sets[name]


@pytest.mark.parametrize("case", SAID)
def test_what_was_found_is_said(case: str) -> None:
    damage, said = SAID[case]
    table, rules = MemoryTable(), wanted(Layout(), [active("8080:80")])
    fit(table, Layout(), rules)
    damage(table)

    async def work() -> None:
        firewall = OwnTable(table, Layout())
        await firewall.read()
        plan = firewall.plan(rules)
        assert str(firewall.drift(plan)) == said
        # What is dismissed is not too much, and what is asked for is not gone.
        if case not in ("a chain", "a set", "the table", "left over"):
            assert not firewall.drift(plan, asked=rules, dismissed=rules)

    asyncio.run(work())


def test_a_dormant_table_is_woken() -> None:
    table, rules = MemoryTable(), wanted(Layout(), [active("8080:80")])
    fit(table, Layout(), rules)

    async def work() -> None:
        firewall = OwnTable(table, Layout())
        await firewall.read()
        assert firewall._held is not None
        firewall._held = replace(firewall._held, dormant=True)
        plan = firewall.plan(rules)
        assert plan.script == ("add table ip ctrport",)
        assert str(firewall.drift(plan)) == "gone or changed: the table ip ctrport"

    asyncio.run(work())


def test_a_port_that_changed_hands_did_not_drift() -> None:
    table, before = MemoryTable(), wanted(Layout(), [active("8080:80")])
    after = wanted(Layout(), [active("8080:81", "172.17.0.3", name="db")])
    fit(table, Layout(), before)

    async def work() -> None:
        firewall = OwnTable(table, Layout())
        await firewall.read()
        plan = firewall.plan(after)
        assert plan.gone
        old, new = set(before) - set(after), set(after) - set(before)
        assert not firewall.drift(plan, new, old)
        assert str(firewall.drift(plan, new)) == "too many: 1 rule"

    asyncio.run(work())


def test_a_table_that_has_nothing_of_ours_is_left_alone_unless_it_has_nothing_at_all() -> None:
    table = MemoryTable()
    table.content = Content()
    fit(table, Layout(), wanted(Layout(), []))
    table.content = Content(chains={"mine": HeldChain(None, True, ())})
    with pytest.raises(ForeignTable, match=r"the table ip ctrport is somebody else's .+`nft delete table ip ctrport`"):
        fit(table, Layout(), wanted(Layout(), []))


def test_a_table_whose_rules_were_flushed_is_ours_all_the_same() -> None:
    table, rules = MemoryTable(), wanted(Layout(), [active("8080:80")])
    fit(table, Layout(), rules)
    for name in content(table).chains:
        flush(table, name)
    whole = held(table).copy()
    plan = fit(table, Layout(), rules)
    assert not plan.come
    assert held(table) == whole


def test_after_a_failure_nothing_is_known() -> None:
    table = MemoryTable()
    rules = wanted(Layout(), [active("8080:80")])

    async def work() -> None:
        firewall = OwnTable(table, Layout())
        with pytest.raises(FirewallError, match="has not been read"):
            firewall.plan(rules)
        await firewall.read()
        plan = firewall.plan(rules)
        table.fail_next_write = True
        with pytest.raises(FirewallError, match="as asked"):
            await firewall.apply(plan)
        with pytest.raises(FirewallError, match="no whole plan has been applied"):
            firewall.plan_change(Ruleset().replace((), rules))
        with pytest.raises(TypeError, match="not a plan for a table of our own"):
            await firewall.apply(Plan())
        with pytest.raises(TypeError, match="not a plan for tables and chains"):
            await Tables(MemoryKernel(), Layout()).apply(plan)

    asyncio.run(work())


# FORWARD of iptables.


class Street:
    """Our own table in memory, and a FORWARD of iptables beside it."""

    def __init__(self) -> None:
        self.table, self.kernel = MemoryTable(), MemoryKernel()
        self.firewall = OwnTable(self.table, Layout(), [Door(self.kernel, Layout())])
        self.rules = wanted(Layout(), [active("8080:80")])

    async def mend(self) -> TablePlan:
        await self.firewall.read()
        plan = self.firewall.plan(self.rules)
        self.shown = self.firewall.diff(plan)
        await self.firewall.apply(plan)
        self.said = str(self.firewall.drift(plan))
        return plan

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.firewall.warnings

    @property
    def forward(self) -> list[str]:
        return self.kernel.tables[Table.FILTER]["FORWARD"]


def test_forward_is_opened_while_it_drops_and_before_anything_is_let_through() -> None:
    async def work() -> None:
        street = Street()
        street.kernel.policies[Table.FILTER, "FORWARD"] = "DROP"
        street.table.fail_next_write = True
        with pytest.raises(FirewallError):
            await street.mend()
        [rule] = street.forward
        assert "--mark 0x40/0x40" in rule
        assert street.shown[:2] == ["*filter (memory)", f"+ -I FORWARD 1 {rule}"]
        assert await street.mend()
        assert not await street.mend()
        street.forward.clear()
        await street.mend()
        assert street.said == "1 rule gone (the jumps of FORWARD)"
        street.forward.insert(0, "-s 192.0.2.9/32 -j DROP")
        await street.mend()
        assert street.said == "out of place: a rule of FORWARD in filter"
        # Somebody lets all through: that is no drift, and ours goes.
        street.kernel.policies.clear()
        del street.forward[-1]
        await street.mend()
        assert street.said == ""
        assert street.forward == []
        street.forward.append("-s 192.0.2.9/32 -j DROP")
        await street.mend()
        assert street.said == ""
        assert len(street.forward) == 2

    asyncio.run(work())


def test_a_forward_that_cannot_be_written_is_complained_of_and_nothing_else_waits_for_it() -> None:
    async def work() -> None:
        street = Street()
        street.kernel.policies[Table.FILTER, "FORWARD"] = "DROP"
        street.kernel.fail_next_restore = lambda table: True
        await street.mend()
        assert any(one.set == "host-ports" for one in held(street.table))
        assert list(street.warnings) == [
            "FORWARD of memory may drop what is published, and is not as it has to be: "
            "the table filter could not be written: as asked"
        ]
        await street.mend()
        assert list(street.warnings) == []
        assert len(street.forward) == 1
        await street.firewall.close()

    asyncio.run(work())


def test_what_another_backend_of_ours_has_in_forward_is_left_to_it() -> None:
    async def work() -> None:
        street = Street()
        street.kernel.policies[Table.FILTER, "FORWARD"] = "DROP"
        other = Tables(street.kernel, Layout())
        await other.read()
        await other.apply(other.plan(street.rules))
        before = street.forward.copy()
        await street.mend()
        [ours] = [rule for rule in street.forward if f"ctrport {ACCEPTED_OWNER} " in rule]
        assert [rule for rule in street.forward if rule != ours] == before
        assert not await street.mend()
        # And it is swept but for that.
        for plan in await Tables(street.kernel, Layout(), (ACCEPTED_OWNER,)).plan_removal():
            await other.apply(plan)
        assert street.forward == [ours]
        all_of_it, guard = await street.firewall.plan_removal()
        assert street.firewall.diff(all_of_it)[0] == "- delete table ip ctrport"
        await street.firewall.apply(all_of_it)
        assert not guard
        assert street.forward == []
        assert street.table.content is None

    asyncio.run(work())


def test_elements_are_counted_and_one_is_there_as_long_as_somebody_asks() -> None:
    rules = wanted(Layout(), [active("8080:80"), active("8081:81", "172.17.0.3", name="db")])
    asked = Asked(standing(Layout(), V4), rules)
    [link] = [one for one in asked if one.set == "links"]
    its = [rule for rule in rules if link in elements(rule)]
    assert len(its) == 2
    by, gone, come = asked.change(Ruleset(rules).replace(its[:1], ()))
    assert link not in gone
    assert come == []
    asked.take(by)
    _, gone, _ = asked.change(Ruleset(its[1:]).replace(its[1:], ()))
    assert link in gone
