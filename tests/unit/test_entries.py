from __future__ import annotations

import shlex
from collections.abc import Iterable
from ipaddress import ip_network

import pytest
from hypothesis import given, settings

from ctrport.firewall.entries import Entry, Extension, Step, commit, entry, from_json, to_json
from ctrport.firewall.plan import Add, Block, Delete, Empty, Line, New, Op, Plan, Remove, plan_all
from ctrport.firewall.text import arguments, tag
from ctrport.model import BridgeNetwork, Family, PortRange, Protocol, Publication
from ctrport.networks import isolation, rules_beside, rules_of
from ctrport.rules import ACCEPT, Dnat, Jump, Layout, Match, Rule, Table, Verdict, rules_at, rules_for, skeleton
from tests.contract.firewall import ALL
from tests.unit import worlds
from tests.unit.worlds import NODE

NETWORKS = Layout(networks=True)
DOCKER0 = BridgeNetwork("docker0", (ip_network("172.17.0.0/16"), ip_network("fd00:17::/64")))
OWNER = "default/web 8080:80/tcp"


def rule(match: Match | None = None, target: Verdict | Jump | Dnat | None = ACCEPT, chain: str = "DOCKER") -> Rule:
    return Rule(Family.IPV4, Table.NAT, chain, match or Match(), target, OWNER)


def words(its: Entry) -> list[str]:
    """Return an entry in iptables' words: what it was read out of."""
    fields = {"-s": its.source, "-d": its.destination, "-i": its.in_device, "-o": its.out_device, "-p": its.protocol}
    found = []
    for word, value in fields.items():
        found += [*(["!"] if value.startswith("!") else []), word, value.removeprefix("!")] if value else []
    for match in its.matches:
        found += ["-m", match.name, *_options(match)]
    if its.target is not None:
        return [*found, "-j", its.target.name, *_options(its.target)]
    return [*found, "-j", its.jump] if its.jump else found


def _options(extension: Extension) -> Iterable[str]:
    return (word for option, value in extension.options for word in (f"--{option}", value))


@settings(deadline=None, max_examples=60)
@given(worlds.publication_lists())
def test_an_entry_says_what_the_words_say(publications: list[Publication]) -> None:
    rules = {r for family in Family for r in skeleton(Layout(), family)}
    rules |= {r for publication in (*publications, *ALL) for r in rules_for(publication, Layout())}
    rules |= {r for address in NODE for r in rules_at(address, Layout())}
    rules |= {r for family in Family for r in isolation(NETWORKS, family)}
    rules |= {*rules_of(DOCKER0, NETWORKS, Family), *(r for address in NODE for r in rules_beside(address, NETWORKS))}
    for each in rules:
        assert words(entry(each, each.family)) == shlex.split(arguments(each))


@settings(deadline=None, max_examples=30)
@given(worlds.publication_lists())
def test_what_becomes_json_comes_back(publications: list[Publication]) -> None:
    rules = [r for publication in publications for r in rules_for(publication, Layout()) if r.family is Family.IPV4]
    held = dict.fromkeys(Layout().own_chains)
    plan = plan_all([*skeleton(Layout(), Family.IPV4), *rules], held, tag)
    commits = [commit(block, Family.IPV4) for block in plan.blocks]
    assert commits
    assert "\n" not in to_json(commits)
    assert from_json(to_json(commits)) == commits


def test_each_operation_is_a_step() -> None:
    line = Line(f'-A DOCKER -m comment --comment "{tag(rule())}" -j ACCEPT', tag(rule()))
    ops: list[tuple[Op, Step]] = [
        (New("DOCKER"), Step("new", "DOCKER")),
        (Empty("DOCKER"), Step("empty", "DOCKER")),
        (Add(rule(), None), Step("add", "DOCKER", None, entry(rule(), Family.IPV4), tag(rule()))),
        (Add(rule(), 3), Step("add", "DOCKER", 3, entry(rule(), Family.IPV4), tag(rule()))),
        (Add(line, None), Step("again", "DOCKER", tag=tag(rule()))),
        (Remove("DOCKER", line), Step("remove", "DOCKER", tag=tag(rule()))),
        (Remove("DOCKER", rule()), Step("remove", "DOCKER", tag=tag(rule()))),
        (Delete("DOCKER", whole=False), Step("empty", "DOCKER")),
        (Delete("DOCKER"), Step("delete", "DOCKER")),
    ]
    its = commit(Block(Table.NAT, tuple(op for op, _ in ops)), Family.IPV4)
    assert its.table == "nat"
    assert its.steps == tuple(step for _, step in ops)


@pytest.mark.parametrize(
    "wrong",
    [
        rule(Match(in_device="a/b")),
        rule(Match(in_device="x" * 16)),
        rule(Match(out_device="")),
        rule(Match(in_device="docker0 -j DROP")),
        rule(Match(in_device="'")),
        rule(Match(protocol=Protocol.TCP, ports=PortRange(80, 80), original_destination=NODE[1], translated=True)),
        rule(Match(original_destination=NODE[1], translated=True)),
        rule(target=Verdict("x y")),
        rule(target=Verdict("ACCEPT -m comment")),
        rule(target=Verdict("DNAT --to-destination 1.2.3")),
        rule(target=Verdict("")),
        rule(target=Verdict("LOG --log-prefix x")),
        rule(target=Jump("a" * 29)),
        rule(target=Jump("a;b")),
        rule(target=Dnat(NODE[1], 80)),
        rule(target=Dnat(NODE[1], None)),
        rule(target=Dnat(NODE[0], 65536)),
        rule(target=Dnat(NODE[0], 0)),
        rule(chain="a b"),
    ],
    ids=str,
)
def test_what_cannot_be_part_of_a_rule_is_refused(wrong: Rule) -> None:
    with pytest.raises(ValueError, match=r"."):
        commit(Block(Table.NAT, (Add(wrong, None),)), Family.IPV4)


@pytest.mark.parametrize(
    "op",
    [
        New("a b"),
        Empty("DOCKER-USER"),
        Delete("x" * 40),
        Remove("DOCKER", Line("-A DOCKER -j RETURN", None)),
        Add(Line("-A DOCKER -j RETURN", None), None),
    ],
    ids=str,
)
def test_operations_that_are_not_ours_to_do_are_refused(op: Op) -> None:
    with pytest.raises(ValueError, match=r"not a|never emptied"):
        commit(Block(Table.NAT, (op,)), Family.IPV4)


def test_an_empty_plan_is_no_commits() -> None:
    assert to_json(commit(block, Family.IPV4) for block in Plan().blocks) == "[]"
