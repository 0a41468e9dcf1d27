"""What is said of drift: read out of plans that mend it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from ctrport.firewall.drift import NAMED, Drift, drift
from ctrport.firewall.fake import Chains, MemoryKernel
from ctrport.firewall.plan import Plan
from ctrport.firewall.tables import Tables
from ctrport.firewall.text import tag
from ctrport.model import Family, Publication
from ctrport.rules import Layout, Rule, Ruleset, Table, rules_for, skeleton
from tests.unit.worlds import active

WEB, DB = active("8080:80"), active("127.0.0.1:5432:5432", "172.17.0.3", name="db")


def wanted(*publications: Publication) -> list[Rule]:
    rules = Ruleset(skeleton(Layout(), Family.IPV4))
    for publication in publications:
        rules.replace((), rules_for(publication, Layout()))
    return list(rules)


def plan_after(
    damage: Callable[[dict[Table, Chains]], object],
    publications: Sequence[Publication] = (WEB, DB),
    then: Sequence[Publication] | None = None,
) -> Plan:
    """Return what mends the damage, where ``then`` is wanted afterwards."""
    kernel = MemoryKernel()

    async def work() -> Plan:
        tables = Tables(kernel, Layout())
        await tables.read()
        await tables.apply(tables.plan(wanted(*publications)))
        damage(kernel.tables)
        await tables.read()
        return tables.plan(wanted(*(publications if then is None else then)))

    return asyncio.run(work())


def swap(tables: dict[Table, Chains]) -> None:
    rules = tables[Table.NAT]["DOCKER"]
    rules.append(rules.pop(1))


def left_over(tables: dict[Table, Chains]) -> None:
    rules = tables[Table.NAT]["DOCKER"]
    rules.append(rules[-1].replace("default/web", "default/old"))


def everything(tables: dict[Table, Chains]) -> None:
    for chains in tables.values():
        for chain in list(chains):
            if chain.isupper() and "DOCKER" not in chain:
                chains[chain].clear()
            else:
                del chains[chain]


SAID = {
    "nothing": (lambda tables: None, ""),
    "a rule": (
        lambda tables: tables[Table.NAT]["DOCKER"].pop(),
        "1 rule gone (what publishes default/web 8080:80/tcp)",
    ),
    "a jump": (lambda tables: tables[Table.NAT]["OUTPUT"].clear(), "1 rule gone (the jumps of OUTPUT)"),
    "one of all": (lambda tables: tables[Table.FILTER]["DOCKER-FORWARD"].pop(), "1 rule gone"),
    "pushed down": (
        lambda tables: tables[Table.FILTER]["FORWARD"].insert(0, "-i lo -j DROP"),
        "out of place: a rule of FORWARD in filter",
    ),
    "twice": (
        lambda tables: tables[Table.NAT]["DOCKER"].append(tables[Table.NAT]["DOCKER"][-1]),
        "out of place: the chain DOCKER of nat",
    ),
    "reordered": (swap, "out of place: the chain DOCKER of nat"),
    "left over": (left_over, "too many: 1 rule"),
}


@pytest.mark.parametrize("case", SAID)
def test_what_was_found_is_said(case: str) -> None:
    damage, said = SAID[case]
    found = drift(plan_after(damage))
    assert str(found) == said
    assert bool(found) == bool(said)


def test_all_of_it_gone_is_counted_and_a_few_are_named() -> None:
    many = [active(f"{port}:80", name=f"web-{port}") for port in range(8000, 8100)]
    found = drift(plan_after(everything, many))
    assert len(found.gone) == len(wanted(*many))
    assert f"{len(found.gone)} rules gone (the jumps of " in str(found)
    assert f" and {100 - NAMED} more)" in str(found)
    assert len(str(found)) < 300


def test_what_was_asked_for_just_now_did_not_drift() -> None:
    before, after = wanted(DB), wanted(WEB)
    plan = plan_after(lambda tables: None, [DB], [WEB])
    asked, dismissed = set(after) - set(before), {tag(rule) for rule in set(before) - set(after)}
    assert drift(plan)
    assert not drift(plan, asked, dismissed)
    plan = plan_after(lambda tables: tables[Table.NAT]["OUTPUT"].clear(), [DB], [WEB])
    assert str(drift(plan, asked, dismissed)) == "1 rule gone (the jumps of OUTPUT)"


def test_a_switch_is_told_beside_the_rules() -> None:
    assert str(Drift(switches=("docker0",))) == "route_localnet off: docker0"
    assert str(Drift(surplus=2, switches=("docker0", "br1"))) == "too many: 2 rules; route_localnet off: docker0, br1"
