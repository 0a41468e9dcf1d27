"""Which elements stand for which rule. The golden texts are written anew with ``UPDATE_GOLDEN=1 pytest tests/unit``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Address, ip_network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrport.firewall import sets
from ctrport.firewall.elements import comment, elements
from ctrport.firewall.fake_table import _element
from ctrport.firewall.sets import Element, Set
from ctrport.model import Access, BridgeNetwork, ContainerKey, Family, Publication
from ctrport.networks import isolation, rules_beside, rules_of
from ctrport.owners import LocalnetRecord, owner_of
from ctrport.rules import (
    ACCEPT,
    RETURN,
    Layout,
    Match,
    Rule,
    Table,
    Verdict,
    gates,
    rules_at,
    rules_for,
    skeleton,
)
from tests.unit import worlds
from tests.unit.test_rules import CASES
from tests.unit.worlds import active

GOLDEN = Path(__file__).with_name("golden") / "nft"

accesses = st.builds(
    Access,
    st.lists(
        st.sampled_from(
            [*map(ip_network, ("0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/16", "192.0.2.7/32", "2001:db8::/48", "fe80::/10"))]
        ),
        max_size=3,
        unique=True,
    ).map(tuple),
    st.sampled_from([None, None, "eth1"]),
)
NETWORK = BridgeNetwork("docker0", (ip_network("172.17.0.0/16"), ip_network("fd00::/64")))


def served(publication: Publication) -> bool:
    """Whether somebody is let in, in each of its families."""
    return all(publication.access.sources_of(Family.of(one.address)) is not None for one in publication.attachments)


@st.composite
def worlds_of_rules(draw: st.DrawFn) -> tuple[Layout, list[Publication]]:
    """Publications for anybody and for some, and the layout that they have."""
    made = draw(worlds.publication_lists())
    made = [one for one in (replace(each, access=draw(accesses)) for each in made) if served(one)]
    layout = Layout(
        localhost=draw(st.booleans()),
        masquerade_all=draw(st.booleans()),
        networks=draw(st.booleans()),
        gates=gates(one.access for one in made),
    )
    return layout, made


def all_rules(layout: Layout, publications: Iterable[Publication]) -> list[Rule]:
    """Every rule that the daemon may ask for."""
    rules = [rule for family in Family for rule in (*skeleton(layout, family), *isolation(layout, family))]
    rules += [rule for address in worlds.NODE for rule in rules_at(address, layout)]
    rules += rules_beside(IPv4Address("10.96.0.10"), layout)
    rules += rules_of(NETWORK, layout, Family) if layout.networks else []
    return rules + [rule for publication in publications for rule in rules_for(publication, layout)]


def words(element: Element, of: Set, family: Family) -> str:
    return sets.add(element, of, family)


@settings(deadline=None, max_examples=200)
@given(worlds_of_rules())
def test_every_rule_has_its_elements_or_is_part_of_what_stands(world: tuple[Layout, list[Publication]]) -> None:
    layout, publications = world
    made = {family: {one.name: one for one in sets.sets(layout, family)} for family in Family}
    for rule in all_rules(layout, publications):
        its = elements(rule)
        assert bool(its) == ("/" in rule.owner.partition(" ")[0] or rule.owner.partition(" ")[0] in _OF_ELEMENTS)
        for element in its:
            of = made[rule.family][element.set]
            assert len(element.key) == of.key_size(rule.family)
            assert len(element.data) == of.data_size(rule.family)
            assert len(element.end) == (len(element.key) if of.interval else 0)
            assert element.comment in (comment(rule.owner), "ctrport link", "ctrport ranges")
            # Words say all that there is: read again they give the same.
            text = words(element, of, rule.family)
            assert _element(of, text.split(" ", 5)[5]) == element


_OF_ELEMENTS = ("device", "node", "service", "network")


@settings(deadline=None, max_examples=60)
@given(worlds_of_rules())
def test_what_different_rules_ask_for_by_one_key_is_one_element(world: tuple[Layout, list[Publication]]) -> None:
    layout, publications = world
    # As they are settled: no host port is published twice.
    apart: list[Publication] = []
    for one in publications:
        if not any(one.mapping.overlaps(other.mapping) for other in apart):
            apart.append(one)
    for family in Family:
        rules = [rule for rule in all_rules(layout, apart) if rule.family is family]
        found = {element for rule in rules for element in elements(rule)}
        assert len({element[:3] for element in found}) == len(found)


def test_the_same_layout_has_no_two_sets_of_one_name() -> None:
    every = gates(
        Access((ip_network(f"10.0.0.0/{length}"),), device) for length in range(8, 33) for device in (None, "eth1")
    )
    names = [one.name for one in sets.sets(Layout(gates=every), Family.IPV4)]
    assert len(set(names)) == len(names)
    assert all(sets.gate_map(name) is not None for name in names if name.startswith("from-"))


@pytest.mark.parametrize("name", ["host-ports", "from-", "from-24-by", "from-1234", "by-device-at-at", "selves", ""])
def test_other_names_are_those_of_no_gate(name: str) -> None:
    assert sets.gate_map(name) is None


@given(worlds_of_rules())
def test_a_gate_is_found_by_the_name_of_its_map(world: tuple[Layout, list[Publication]]) -> None:
    for gate in world[0].gates:
        for one in sets.gate_maps(gate):
            assert sets.gate_map(one.name) == one


def in_order(layout: Layout, family: Family, publications: Iterable[Publication]) -> list[str]:
    """Every element that these publications ask for, in the words of nft."""
    made = {one.name: one for one in sets.sets(layout, family)}
    rules = [rule for publication in publications for rule in rules_for(publication, layout)]
    found = {element for rule in rules if rule.family is family for element in elements(rule)}
    return [words(element, made[element.set], family) for element in sorted(found)]


@pytest.mark.parametrize("case", CASES)
def test_elements_are_as_they_were(case: str) -> None:
    layout, family, publications = CASES[case]
    layout = replace(layout, gates=gates(publication.access for publication in publications))
    text = "".join(f"{line}\n" for line in in_order(layout, family, publications))
    path = GOLDEN / f"{case}.txt"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert text == path.read_text()


def test_the_longest_owner_fits_into_a_comment() -> None:
    long = ContainerKey("n" * 76, "c" * 76)
    address = "2001:db8:1111:2222:3333:4444:5555:6666"
    one = replace(active(f"[{address}]::30000-40000/sctp", "fd00::2", on="10000-20000"), container=long)
    assert len(comment(owner_of(one))) <= 253  # with what is around it the kernel takes 256 bytes
    assert len(comment(owner_of(one))) > 220
    assert len(comment(LocalnetRecord("d" * 15, ours=False).owner)) < 128


@pytest.mark.parametrize("owner", ['quo"te', "line\nbreak", "x" * 241, ""])
def test_what_cannot_be_an_owner_is_refused(owner: str) -> None:
    with pytest.raises(ValueError, match="not an owner"):
        comment(owner)


STRANGE = {
    "a verdict that we have none of": replace(
        rules_at(worlds.NODE4, Layout())[0], match=Match(to_local=True), target=Verdict("REJECT")
    ),
    "who comes from anywhere": Rule(
        Family.IPV4, Table.NAT, "DOCKER-POSTROUTING", Match(source=ip_network("10.0.0.0/8")), Verdict("MASQUERADE"), "x"
    ),
    "a bridge that is returned from": Rule(
        Family.IPV4, Table.FILTER, "DOCKER-FORWARD", Match(in_device="docker0"), RETURN, "network docker0"
    ),
    "a port without translation": Rule(Family.IPV4, Table.NAT, "DOCKER", Match(in_device="docker0"), ACCEPT, "x"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_is_no_rule_of_ours_is_refused(what: str) -> None:
    with pytest.raises(ValueError, match="not a rule of ours"):
        elements(STRANGE[what])


def interval(first: str, last: str, of: str = "subnets") -> Element:
    return Element(of, ip_network(first).network_address.packed, ip_network(last).broadcast_address.packed, b"", "")


SUBNETS = next(one for one in sets.sets(Layout(), Family.IPV4) if one.name == "subnets")
LINKS = next(one for one in sets.sets(Layout(), Family.IPV4) if one.name == "links")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(22, 32)), max_size=8))
def test_of_networks_within_one_another_the_outermost_are_kept(some: list[tuple[int, int]]) -> None:
    networks = [ip_network((0x0A000000 + 256 * number, length), strict=False) for number, length in some]
    made = [interval(str(one), str(one)) for one in networks]
    kept = sets.outermost(made, SUBNETS, Family.IPV4)
    assert set(kept) <= set(made)
    assert len({(one.key, one.end) for one in kept}) == len(kept)
    # They cover what all of them cover, and none of them another.
    covered = {address for one in networks for address in (one.network_address, one.broadcast_address)}
    for address in covered:
        assert sum(one.key <= address.packed <= one.end for one in kept) == 1


def test_links_are_kept_by_both_of_their_ends() -> None:
    def link(source: str, to: str) -> Element:
        one, other = ip_network(source), ip_network(to)
        first = one.network_address.packed + other.network_address.packed
        return Element("links", first, one.broadcast_address.packed + other.broadcast_address.packed, b"", "")

    wide, narrow, other = (link(net, net) for net in ("10.0.0.0/8", "10.1.0.0/16", "172.17.0.0/16"))
    across = link("10.1.0.0/16", "172.17.0.0/16")
    assert set(sets.outermost([narrow, other, across, wide], LINKS, Family.IPV4)) == {wide, other, across}


def test_an_element_that_is_not_ours_is_shown_as_well() -> None:
    odd = Element("host-ports", b"\x2f\0\0\0\x1f\x90\0\0", b"", b"\x0a\0\0\1\0\x50\0\0", "")
    made = {one.name: one for one in sets.sets(Layout(), Family.IPV4)}
    assert words(odd, made["host-ports"], Family.IPV4) == (
        "add element ip ctrport host-ports { 47 . 8080 : 10.0.0.1 . 80 }"
    )
    assert odd.owner == ""
    ends = Element("subnets", b"\x0a\0\0\1", b"\x0a\0\0\6", b"", "ctrport network docker0")
    assert sets.delete(ends, SUBNETS, Family.IPV4) == (
        "delete element ip ctrport subnets { 10.0.0.1-10.0.0.6 }  # ctrport network docker0"
    )
    assert ends.owner == "network docker0"
