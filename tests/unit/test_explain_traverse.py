"""A packet through the chains of one hook: the order, jumps, what cannot be told, and what is one again."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from ctrport.explain import traverse
from ctrport.explain.cases import At, Case, Passed
from ctrport.explain.facts import Facts
from ctrport.explain.packet import Packet
from ctrport.explain.ruleset import IPTABLES, NFT, Base, Chain, End, Jump, Perhaps, Return, Rule, Ruleset, Table, Toss
from ctrport.explain.traverse import DEEPEST, MOST_CASES, Hooks
from ctrport.model import Protocol
from tests.unit.ways import CLIENT, NODE, SIBLING, WEB, tables

FIRST = replace(Packet.first(Protocol.TCP, ip_address(CLIENT), ip_address(NODE), 8080), in_device="eth0")


def filtered(*rules: str, policy: str = "ACCEPT", chains: str = "a b") -> Ruleset:
    """Return a table filter with these rules; chains are those that may be jumped to."""
    declared = "".join(f":{chain} - [0:0]\n" for chain in chains.split())
    text = f"*filter\n:FORWARD {policy} [0:0]\n{declared}" + "".join(f"-A {rule}\n" for rule in rules) + "COMMIT\n"
    return tables(text)


def run(rules: Ruleset, packet: Packet = FIRST, hook: str = "forward") -> list[tuple[str, str]]:
    """Return how each case ends: by what, and with how many doubts."""
    tracked = packet if hook == "prerouting" else packet.looked_up()
    ended = Hooks(rules).run(Case(tracked), hook, Facts(rules))
    return sorted((verdict.kind if verdict else "goes on", str(len(case.doubts))) for case, verdict in ended)


SET_MARK = "FORWARD -j MARK --set-xmark 0x1/0xffffffff"
UNKNOWN = "-m set --match-set x src"


@pytest.mark.parametrize(
    ("rules", "policy", "ends"),
    [
        ([], "ACCEPT", ["goes on"]),
        ([], "DROP", ["drop"]),
        (["FORWARD -j DROP"], "ACCEPT", ["drop"]),
        (["FORWARD -j REJECT"], "ACCEPT", ["reject"]),
        (["FORWARD -j ACCEPT", "FORWARD -j DROP"], "ACCEPT", ["goes on"]),
        (["FORWARD -j a", "FORWARD -j DROP", "a -j ACCEPT"], "ACCEPT", ["goes on"]),
        (["FORWARD -j a", "FORWARD -j DROP", "a -j RETURN", "a -j ACCEPT"], "ACCEPT", ["drop"]),
        (["FORWARD -g a", "FORWARD -j ACCEPT"], "DROP", ["drop"]),
        (["FORWARD -j a", "FORWARD -j ACCEPT", "a -g b", "a -j DROP"], "DROP", ["goes on"]),
        (["FORWARD -j RETURN", "FORWARD -j ACCEPT"], "DROP", ["drop"]),
        (["FORWARD -p udp -j DROP"], "ACCEPT", ["goes on"]),
        ([SET_MARK, "FORWARD -m mark --mark 0x1 -j DROP"], "ACCEPT", ["drop"]),
        ([SET_MARK, "FORWARD -j CONNMARK --save-mark", "FORWARD -m connmark --mark 0x1 -j DROP"], "ACCEPT", ["drop"]),
        # Both ways, and one again where it comes to the same.
        ([f"FORWARD {UNKNOWN} -j DROP"], "ACCEPT", ["drop", "goes on"]),
        ([f"FORWARD {UNKNOWN} -j DROP"], "DROP", ["drop", "drop"]),
        ([f"FORWARD {UNKNOWN} -j RETURN"], "ACCEPT", ["goes on"]),
        ([f"FORWARD {UNKNOWN} -j a", "a -p udp -j DROP"], "ACCEPT", ["goes on"]),
        ([f"FORWARD {UNKNOWN} -j MARK --set-xmark 0x1/0x1"], "ACCEPT", ["goes on", "goes on"]),
        ([f"FORWARD {UNKNOWN} -j LOG", f"FORWARD {UNKNOWN}"], "ACCEPT", ["goes on"]),
        (["FORWARD -j NFQUEUE"], "ACCEPT", ["goes on", "untold"]),
        (["FORWARD -j NFQUEUE", "FORWARD -j DROP"], "ACCEPT", ["drop", "untold"]),
        (["FORWARD -j DROP", "FORWARD -j NFQUEUE"], "ACCEPT", ["drop"]),
        (["FORWARD -j MARK --nosuch", "FORWARD -m mark --mark 0x1 -j DROP"], "ACCEPT", ["drop", "goes on"]),
    ],
)  # fmt: skip
def test_how_it_ends(rules: list[str], policy: str, ends: list[str]) -> None:
    assert [end for end, _ in run(filtered(*rules, policy=policy))] == ends


def test_what_does_not_matter_is_no_doubt() -> None:
    assert run(filtered(f"FORWARD {UNKNOWN} -j ACCEPT", "FORWARD -j ACCEPT", policy="DROP")) == [("goes on", "0")]
    [(_, doubts), _] = run(filtered(f"FORWARD {UNKNOWN} -j ACCEPT", "FORWARD -j DROP"))
    assert doubts == "1"


def test_a_chain_that_goes_in_circles_ends() -> None:
    assert ("untold", "1") in run(filtered("FORWARD -j a", "a -j b", "b -j a"))
    assert DEEPEST >= 16


def test_a_chain_that_is_not_there_is_not_understood() -> None:
    chain = Chain("forward", Base("forward", 0, "filter"), lambda: [Rule((Jump("gone"),), "jump gone")])
    assert run(Ruleset([Table(NFT, "inet", "t", {"forward": chain})])) == [("untold", "1")]


def test_too_many_cases_are_one_that_nobody_can_tell() -> None:
    marks = [f"FORWARD {UNKNOWN} -j MARK --set-xmark {1 << bit:#x}/{1 << bit:#x}" for bit in range(10)]
    assert MOST_CASES < 2**10
    assert [end for end, _ in run(filtered(*marks))] == ["untold"]


def test_by_chance_one_of_several() -> None:
    chain = Chain(
        "forward", Base("forward", 0, "filter"), lambda: [Rule((Toss((End("drop"), None, Return())),), "toss")]
    )
    assert [end for end, _ in run(Ruleset([Table(NFT, "ip", "t", {"forward": chain})]))] == ["drop", "goes on"]
    same = Chain("forward", Base("forward", 0, "filter"), lambda: [Rule((Toss((End("drop"), End("drop"))),), "toss")])
    assert run(Ruleset([Table(NFT, "ip", "t", {"forward": same})])) == [("drop", "0")]


def named(name: str, priority: int, turn: int = 0, *, kind: str = "filter", hook: str = "forward") -> Table:
    chain = Chain(name, Base(hook, priority, kind, turn=turn), list)
    return Table(NFT, "inet", name, {name: chain})


def test_chains_are_asked_by_their_priority_and_of_one_the_last_comer_first() -> None:
    found = Ruleset([named("c", 5), named("a", -5), named("b1", 0, 1), named("b2", 0, 2)]).hooked(
        "forward", FIRST.family
    )
    assert [table.name for table, _, _ in found] == ["a", "b2", "b1", "c"]


def test_chains_that_translate_are_asked_at_one_place() -> None:
    tables = [
        named("nat-late", 90, kind="nat", hook="prerouting"),
        named("nat", -100, kind="nat", hook="prerouting"),
        named("mangle", -150, hook="prerouting"),
        named("filter", 0, hook="prerouting"),
    ]
    found = Ruleset(tables).hooked("prerouting", FIRST.family)
    assert [table.name for table, _, _ in found] == ["mangle", "nat", "nat-late", "filter"]


NAT = "*nat\n:PREROUTING ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n{}COMMIT\n"


def translated(
    rules: Ruleset, packet: Packet = FIRST, hook: str = "prerouting", *, translates: bool = True
) -> list[str]:
    ended = Hooks(rules).run(Case(packet), hook, Facts(rules), translates=translates)
    return sorted(str(case.packet.destination) if verdict is None else verdict.kind for case, verdict in ended)


@pytest.mark.parametrize(
    ("to", "ends"),
    [
        (f"{WEB}:80", [f"{WEB}:80"]),
        (WEB, [f"{WEB}:8080"]),
        (f"{WEB}:9000-9010/8075", [f"{WEB}:9005"]),
        (f"{WEB}:80-90", [f"{WEB}:80-90"]),
        (f"{WEB}-{SIBLING}", ["untold"]),
        (f"{WEB}:1-10/9000", ["untold"]),
        (f"{WEB}:80 -m set --match-set x src", [f"{WEB}:80", f"{NODE}:8080"]),
    ],
)
def test_where_it_is_sent(to: str, ends: list[str]) -> None:
    place, _, match = to.partition(" ")
    rules = tables(NAT.format(f"-A PREROUTING {match} -j DNAT --to-destination {place}\n"))
    assert translated(rules) == ends


def test_what_is_not_new_is_not_translated() -> None:
    rules = tables(NAT.format(f"-A PREROUTING -j DNAT --to-destination {WEB}\n"))
    assert translated(rules, translates=False) == [f"{NODE}:8080"]
    assert translated(rules, FIRST.untracked()) == [f"{NODE}:8080"]
    assert translated(rules, FIRST.later(), translates=False) == [f"{NODE}:8080"]


def test_the_first_translation_is_the_only_one() -> None:
    text = NAT.format(
        f"-A PREROUTING -j DNAT --to-destination {WEB}\n-A PREROUTING -j DNAT --to-destination {SIBLING}\n"
    )
    assert translated(tables(text)) == [f"{WEB}:8080"]


def test_of_legacy_tables_it_is_not_known_whether_they_came_first() -> None:
    one = NAT.format(f"-A PREROUTING -j DNAT --to-destination {WEB}\n")
    other = NAT.format(f"-A PREROUTING -j DNAT --to-destination {SIBLING}\n")
    assert translated(tables(one, legacy=other)) == [f"{WEB}:8080", f"{SIBLING}:8080"]
    assert translated(tables(one, legacy=one)) == [f"{WEB}:8080"]
    assert translated(tables(one, legacy=NAT.format(""))) == [f"{WEB}:8080"]


def test_a_redirect_without_an_address_to_go_to_is_not_understood() -> None:
    assert translated(tables(NAT.format("-A PREROUTING -j REDIRECT --to-ports 80\n"))) == ["untold"]


def test_a_source_may_be_replaced_by_nobody_knows_what() -> None:
    rules = tables(NAT.format("-A POSTROUTING -j SNAT --to-source 198.51.100.1-198.51.100.9\n"))
    [(case, verdict)] = Hooks(rules).run(Case(FIRST.looked_up()), "postrouting", Facts(rules))
    assert verdict is None
    assert (case.packet.flow.masked, case.packet.flow.mask) == (True, None)
    assert case.packet.source == FIRST.source


RAW = "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -m conntrack --ctstate {} -j DROP\nCOMMIT\n"


def test_before_its_flow_is_looked_for_it_is_in_no_state() -> None:
    assert [end for end, _ in run(tables(RAW.format("NEW")), hook="prerouting")] == ["goes on"]
    assert [end for end, _ in run(tables(RAW.format("INVALID")), hook="prerouting")] == ["drop"]
    looped = replace(FIRST.looked_up(), in_device="lo")  # what the node sends itself is known by then
    ended = Hooks(tables(RAW.format("NEW"))).run(Case(looped), "prerouting", Facts(tables(RAW)), translates=False)
    assert [verdict.kind for _, verdict in ended if verdict] == ["drop"]


def test_what_is_known_already_is_tracked_whatever_a_rule_says() -> None:
    rules = tables("*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j CT --notrack\nCOMMIT\n")
    [(case, _)] = Hooks(rules).run(Case(replace(FIRST.looked_up(), in_device="lo")), "prerouting", Facts(rules))
    assert case.packet.flow.state == "new"


@pytest.mark.parametrize(
    ("devices", "ends"), [({"eth0"}, ["drop"]), ({"eth1"}, ["goes on"]), (set(), ["drop", "goes on"])]
)
def test_a_chain_for_one_device_is_for_no_other(devices: set[str], ends: list[str]) -> None:
    base = Base("ingress", 0, "filter", devices=frozenset(devices))
    chain = Chain("c", base, lambda: [Rule((End("drop"),), "drop")])
    assert [end for end, _ in run(Ruleset([Table(NFT, "netdev", "t", {"c": chain})]), hook="ingress")] == ends


def test_what_a_chain_jumped_to_is_told_one_by_one() -> None:
    rules = filtered("FORWARD -j a", "FORWARD -j b", "a -p udp -j DROP", "b -j DROP")
    [(case, verdict)] = Hooks(rules).run(Case(FIRST.looked_up()), "forward", Facts(rules))
    told = [each for each in case.trail if isinstance(each, Passed)]
    assert [(each.into, each.verdict.kind if each.verdict else None) for each in told] == [("a", None), ("b", "drop")]
    assert verdict is not None
    assert (verdict.at.chain.name, verdict.at.rule and verdict.at.rule.text) == ("b", "-A b -j DROP")


def test_places_are_the_same_by_what_they_are() -> None:
    chain = Chain("c", None, list)
    table = Table(IPTABLES, "ip", "filter", {"c": chain})
    rule = Rule((Perhaps("x"),), "x")
    assert At(table, chain, rule) == At(table, chain, rule)
    assert At(table, chain, rule) != At(table, chain)
    assert At(table, chain) != "c"
    assert len({At(table, chain), At(table, chain)}) == 1


def test_it_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = filtered("FORWARD -j DROP")
    hooks, facts = Hooks(rules), Facts(rules)
    first = hooks.run(Case(FIRST.looked_up()), "forward", facts)
    monkeypatch.setattr(traverse, "_Hook", None)
    assert hooks.run(Case(FIRST.looked_up()), "forward", facts) == first
