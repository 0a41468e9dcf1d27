"""What the kernel should hold. The golden texts are written anew with ``UPDATE_GOLDEN=1 pytest tests/unit``."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrport.firewall.fake import MemoryKernel
from ctrport.firewall.plan import Plan
from ctrport.firewall.tables import Tables
from ctrport.firewall.text import arguments, restore_input
from ctrport.model import Access, Family, Publication, State
from ctrport.owners import LocalnetRecord, Owner, owner_of
from ctrport.rules import (
    ACCEPT,
    Dnat,
    Jump,
    Layout,
    Match,
    Place,
    Rule,
    Ruleset,
    Table,
    needs_localnet,
    rules_at,
    rules_for,
    skeleton,
)
from tests.unit import worlds
from tests.unit.worlds import active

GOLDEN = Path(__file__).with_name("golden")


def access(*sources: str, interface: str | None = None) -> Access:
    return Access(tuple(map(ip_network, sources)), interface)


#: Networks of both families, and one of each that covers it all.
BOTH = access("192.0.2.0/24", "198.51.100.7/32", "2001:db8:7::/48")
ALL4 = access("0.0.0.0/0", "192.0.2.0/24")
DUAL = ("172.17.0.2", "fd00::2")

Case = tuple[Layout, Family, tuple[Publication, ...]]
CASES: dict[str, Case] = {
    "nothing-published": (Layout(), Family.IPV4, ()),
    "one-tcp-port": (Layout(), Family.IPV4, (active("8080:80"),)),
    "host-address": (Layout(), Family.IPV4, (active("192.0.2.1:8080:80"), active("8080:81", "172.17.0.3", name="db"))),
    "localhost-only": (Layout(), Family.IPV4, (active("127.0.0.1:8080:80"),)),
    "localhost-off": (Layout(localhost=False), Family.IPV4, (active("8080:80"),)),
    "same-range-udp": (Layout(), Family.IPV4, (active("9000-9010:9000-9010/udp"),)),
    "offset-range-tcp": (Layout(), Family.IPV4, (active("8000-8002:9000-9002"),)),
    "two-families-ipv4": (Layout(), Family.IPV4, (active("8080:80", "172.17.0.2", "fd00::2"),)),
    "two-families-ipv6": (Layout(), Family.IPV6, (active("8080:80", "172.17.0.2", "fd00::2"),)),
    "ipv6-host-address-and-range": (
        Layout(),
        Family.IPV6,
        (active("[2001:db8::1]:8000-8001:8000-8001", "fd00::2"), active("8080:80", "fd00::3", name="db")),
    ),
    "position-first": (Layout(position=Place.FIRST), Family.IPV4, (active("8080:80"),)),
    "position-last": (Layout(position=Place.LAST), Family.IPV4, (active("8080:80"),)),
    "chain-CTRPORT": (Layout(chain="CTRPORT"), Family.IPV4, (active("8080:80"),)),
    "sources-ipv4": (
        Layout(),
        Family.IPV4,
        (active("8080:80", *DUAL, access=BOTH), active("192.0.2.1:8081:81", *DUAL, access=ALL4)),
    ),
    "sources-ipv6": (
        Layout(),
        Family.IPV6,
        (active("8080:80", *DUAL, access=BOTH), active("8081:81", *DUAL, access=access("::/0"))),
    ),
    "sources-of-ranges": (
        Layout(),
        Family.IPV4,
        (
            active("9000-9002:9000-9002", access=BOTH),
            active("8000-8001:9000-9001/udp", access=access("192.0.2.0/24", "127.0.0.0/8")),
        ),
    ),
    "interface": (
        Layout(),
        Family.IPV4,
        (
            active("8080:80", access=access(interface="eth1")),
            active("8081:81", access=access("192.0.2.0/24", interface="eth1")),
        ),
    ),
    "masquerade-all-ipv4": (
        Layout(masquerade_all=True),
        Family.IPV4,
        (active("8080:80", *DUAL), active("192.0.2.1:9000-9001:9000-9001/udp", *DUAL)),
    ),
    "masquerade-all-ipv6": (Layout(masquerade_all=True), Family.IPV6, (active("8080:80", *DUAL),)),
    "sctp": (Layout(), Family.IPV4, (active("8080:80/sctp"),)),
    "chosen-ports": (
        Layout(),
        Family.IPV4,
        (active("80", on="32768"), active("8000-8010:81/udp", on="8003")),
    ),
    "shared-bridge-and-routed-veth": (
        Layout(),
        Family.IPV4,
        (
            active("8080:80"),
            active("8443:443", "172.17.0.3", name="db"),
            active("53:53/udp", "10.244.1.7", name="api", device="cali12ab"),
        ),
    ),
}


def from_nothing(layout: Layout, family: Family, publications: tuple[Publication, ...]) -> Plan:
    """The plan for a kernel that holds nothing."""
    rules = Ruleset(skeleton(layout, family))
    rules.replace((), (rule for address in worlds.NODE for rule in rules_at(address, layout)))
    for publication in publications:
        rules.replace((), rules_for(publication, layout))
    tables = Tables(MemoryKernel(family), layout)
    asyncio.run(tables.read())
    return tables.plan(rule for rule in rules if rule.family is family)


@pytest.mark.parametrize("case", CASES)
def test_rules_are_as_they_were(case: str) -> None:
    text = restore_input(from_nothing(*CASES[case]))
    path = GOLDEN / f"{case}.txt"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert text == path.read_text()


def test_every_golden_text_has_its_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)


@settings(deadline=None, max_examples=60)
@given(st.data(), worlds.publication_lists(), st.sampled_from(Family), st.booleans())
def test_the_same_publications_give_the_same_bytes_in_whatever_order_they_came(
    data: st.DataObject, publications: list[Publication], family: Family, localhost: bool
) -> None:
    layout = Layout(localhost=localhost)
    shuffled = data.draw(st.permutations(publications))
    one = restore_input(from_nothing(layout, family, tuple(publications)))
    other = restore_input(from_nothing(layout, family, tuple(shuffled)))
    # In the kernel's own chains, and only there, rules stand as they came: they are the same for all.
    assert one == other


@settings(deadline=None, max_examples=60)
@given(worlds.publication_lists(), st.sampled_from(Family), st.booleans())
def test_every_line_is_marked_as_ours_and_quotes_nothing_but_the_mark(
    publications: list[Publication], family: Family, localhost: bool
) -> None:
    text = restore_input(from_nothing(Layout(localhost=localhost), family, tuple(publications)))
    assert text.endswith("COMMIT\n")
    for line in text.splitlines():
        if line.startswith(("*", "COMMIT", ":", "-N ")):
            assert '"' not in line
            continue
        before, quote, rest = line.partition(' --comment "')
        assert quote
        mark, quote, after = rest.partition('"')
        assert quote
        assert mark.startswith("ctrport ")
        assert '"' not in before + after
        assert "'" not in line
        assert "\\" not in line


def of(publication: Publication, layout: Layout | None = None) -> tuple[Rule, ...]:
    return rules_for(publication, layout or Layout())


def test_what_is_not_active_has_no_rules() -> None:
    waiting = Publication(active("8080:80").mapping, "config.yaml:1", worlds.key("web"), State.WAITING, "why")
    assert of(waiting) == ()


@settings(deadline=None, max_examples=60)
@given(worlds.publication_lists(max_size=1), st.booleans())
def test_whoever_is_translated_is_accepted_unless_he_comes_from_the_host_alone(
    publications: list[Publication], localhost: bool
) -> None:
    for publication in publications:
        rules = of(publication, Layout(localhost=localhost))
        host_ip = publication.mapping.host_ip
        for attachment in publication.attachments:
            family = Family.of(attachment.address)
            mine = [rule for rule in rules if rule.family is family]
            sent = [rule for rule in mine if isinstance(rule.target, Dnat)]
            accepted = [r for r in mine if (r.table, r.chain, r.target) == (Table.FILTER, "DOCKER", ACCEPT)]
            assert sent
            if host_ip is not None and host_ip.is_loopback:
                assert accepted == []
                continue
            [rule] = accepted
            # Not what another translated to the same container: kube-proxy's NodePorts and ClusterIPs.
            assert rule.match.original_ports == publication.mapping.host_ports
            assert rule.match.translated
            for dnat in sent:
                assert isinstance(dnat.target, Dnat)
                assert dnat.match.ports is not None
                ports = set(dnat.match.ports) if dnat.target.port is None else {dnat.target.port}
                assert rule.match.ports is not None
                assert ports <= set(rule.match.ports)


@settings(deadline=None, max_examples=60)
@given(worlds.publication_lists(max_size=1))
def test_each_host_port_leads_to_its_own_container_port(publications: list[Publication]) -> None:
    for publication in publications:
        for attachment in publication.attachments:
            leads: dict[int, int] = {}
            for rule in of(publication):
                if not isinstance(rule.target, Dnat) or rule.target.address != attachment.address:
                    continue
                assert rule.match.ports is not None
                assert rule.target.port is None or len(rule.match.ports) == 1
                for port in rule.match.ports:
                    assert port not in leads
                    leads[port] = rule.target.port or port
            mapping = publication.mapping
            assert mapping.host_ports is not None
            assert leads == dict(zip(mapping.host_ports, mapping.container_ports, strict=True))


def sent(publication: Publication, layout: Layout | None = None) -> list[Rule]:
    return [rule for rule in of(publication, layout) if isinstance(rule.target, Dnat)]


accesses = st.builds(
    Access,
    st.lists(
        st.sampled_from(["192.0.2.0/24", "192.0.2.7/32", "127.0.0.0/8", "0.0.0.0/0", "2001:db8::/32", "::/0"]),
        max_size=3,
    ).map(lambda texts: tuple(map(ip_network, texts))),
    st.sampled_from([None, None, "eth1"]),
)


@settings(deadline=None, max_examples=100)
@given(worlds.publication_lists(max_size=1), accesses)
def test_access_narrows_who_is_sent_on_and_nothing_else(publications: list[Publication], its: Access) -> None:
    for publication in publications:
        families = [Family.of(a.address) for a in publication.attachments]
        if any(its.sources_of(family) is None for family in families):
            continue  # of which it would have no attachment
        limited, open_ = replace(publication, access=its), publication
        # Without a source and a device each rule is one of those without access: a rule for each source.
        for rule in sent(limited):
            assert rule.match.in_device == its.interface
            sources = its.sources_of(rule.family)
            assert rule.match.source in (sources or (None,))
            assert rule.match.source is None or Family.of(rule.match.source) is rule.family
            whole = replace(rule.match, source=None, in_device=None, not_source=None)
            assert whole in [replace(other.match, not_source=None) for other in sent(open_)]
        for family in families:
            number = len(its.sources_of(family) or (None,))
            theirs = [[rule for rule in sent(p) if rule.family is family] for p in (limited, open_)]
            assert len(theirs[0]) == number * len(theirs[1])
        # Who is not sent on meets no other rule; and the answers of who is, go by rules that all share.
        others = [
            [r for r in of(p) if r.table is not Table.RAW and "route_localnet" not in r.owner] for p in (limited, open_)
        ]
        assert [r for r in others[0] if r not in sent(limited)] == [r for r in others[1] if r not in sent(open_)]


@pytest.mark.parametrize(
    ("sources", "family", "expected"),
    [
        ((), Family.IPV4, ["-p"]),
        ((), Family.IPV6, ["! -s fe80::/10 -p"]),
        (("0.0.0.0/0",), Family.IPV4, ["-p"]),
        (("::/0", "2001:db8::/32"), Family.IPV6, ["! -s fe80::/10 -p"]),
        (("2001:db8::/32",), Family.IPV6, ["-s 2001:db8::/32 -p"]),
        (("192.0.2.0/24", "::/0", "192.0.2.0/25"), Family.IPV4, ["-s 192.0.2.0/24 -p", "-s 192.0.2.0/25 -p"]),
    ],
)
def test_a_source_is_a_rule_of_its_family(sources: tuple[str, ...], family: Family, expected: list[str]) -> None:
    rules = sent(active("8080:80", *DUAL, access=access(*sources)))
    its = [arguments(rule) for rule in rules if rule.family is family]
    assert [text[: text.index("-p ") + 2] for text in its] == expected


@pytest.mark.parametrize(
    ("its", "expected"),
    [
        (access(), "docker0"),
        (access("127.0.0.0/8"), "docker0"),
        (access("127.0.0.1/32", "192.0.2.0/24"), "docker0"),
        (access("0.0.0.0/0"), "docker0"),
        (access("96.0.0.0/3"), "docker0"),
        (access("192.0.2.0/24"), None),
        (access("2001:db8::/32"), None),
        (access(interface="lo"), None),
        (access("127.0.0.0/8", interface="eth0"), None),
    ],
)
def test_route_localnet_is_needed_where_the_node_itself_is_let_in(its: Access, expected: str | None) -> None:
    assert needs_localnet(active("8080:80", access=its), Layout()) == expected
    assert needs_localnet(active("127.0.0.1:8080:80", access=its), Layout()) == expected


@settings(deadline=None, max_examples=60)
@given(worlds.publication_lists(max_size=1), st.booleans())
def test_masquerade_all_takes_the_source_off_the_hairpin_rule_alone(
    publications: list[Publication], localhost: bool
) -> None:
    for publication in publications:
        rules = of(publication, Layout(localhost=localhost))
        everyone = of(publication, Layout(localhost=localhost, masquerade_all=True))
        expected = [
            replace(rule, match=replace(rule.match, source=None)) if rule.chain == "DOCKER-HAIRPIN" else rule
            for rule in rules
        ]
        assert list(everyone) == expected
        assert all(rule.match.source is not None for rule in rules if rule.chain == "DOCKER-HAIRPIN")


def test_host_addresses_are_asked_before_wildcards() -> None:
    [named] = [r for r in of(active("192.0.2.1:8080:80")) if isinstance(r.target, Dnat)]
    [wild] = [r for r in of(active("0.0.0.0:8080:80")) if isinstance(r.target, Dnat)]
    assert named.rank < wild.rank
    assert wild.match.destination is None


def test_flows_that_are_known_are_asked_before_new_ones() -> None:
    [jump] = [rule for rule in rules_at(worlds.NODE4, Layout()) if rule.chain == "DOCKER-FORWARD"]
    known = [rule for rule in of(active("8080:80")) if rule.chain == "DOCKER-FORWARD"]
    assert {rule.rank < jump.rank for rule in known} == {True}
    assert {(rule.match.in_device, rule.match.out_device) for rule in known} == {("docker0", None), (None, "docker0")}


@pytest.mark.parametrize(
    ("mapping", "addresses", "localhost", "expected"),
    [
        ("8080:80", ["172.17.0.2"], True, "docker0"),
        ("0.0.0.0:8080:80", ["172.17.0.2"], True, "docker0"),
        ("127.0.0.1:8080:80", ["172.17.0.2"], True, "docker0"),
        ("8080:80", ["172.17.0.2"], False, None),
        ("192.0.2.1:8080:80", ["172.17.0.2"], True, None),
        ("8080:80", ["fd00::2"], True, None),  # ::1 is not routed: nothing could be switched on for it
        ("8080:80", ["fd00::2", "172.17.0.2"], True, "docker0"),
    ],
)
def test_route_localnet_is_needed_where_localhost_leads_to_a_container(
    mapping: str, addresses: list[str], localhost: bool, expected: str | None
) -> None:
    publication, layout = active(mapping, *addresses), Layout(localhost=localhost)
    assert needs_localnet(publication, layout) == expected
    guarded = [rule for rule in of(publication, layout) if rule.table is Table.RAW]
    assert len(guarded) == (0 if expected is None else 2)


def test_a_record_of_route_localnet_is_read_back_from_the_rule_that_needs_it() -> None:
    for ours in (True, False):
        rules = rules_for(active("8080:80"), Layout(), localnet_ours=ours)
        records = [record for rule in rules if (record := LocalnetRecord.parse(rule.owner)) is not None]
        assert records == [LocalnetRecord("docker0", ours)]


@pytest.mark.parametrize(
    "owner",
    [
        "",
        "chain",
        "device docker0",
        "device docker0 route_localnet=",
        "device a b route_localnet=set",
        "default/web 80",
    ],
)
def test_other_owners_are_no_record_of_route_localnet(owner: str) -> None:
    assert LocalnetRecord.parse(owner) is None


def test_an_owner_is_the_container_and_the_mapping() -> None:
    assert owner_of(active("127.0.0.1:8080:80/udp")) == "default/web 127.0.0.1:8080:80/udp"


@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize("layout", [Layout(), Layout("CTRPORT", Place.LAST, localhost=False)])
def test_rules_stand_in_the_chains_that_the_layout_names(layout: Layout, family: Family) -> None:
    rules = [*skeleton(layout, family), *of(active("8080:80", "172.17.0.2", "fd00::2"), layout)]
    rules += [rule for address in worlds.NODE for rule in rules_at(address, layout)]
    own = {(rule.table, rule.chain) for rule in rules if rule.place is Place.OWN}
    assert own == set(layout.own_chains)
    kernel = {(rule.table, rule.chain) for rule in rules if rule.place is not Place.OWN}
    assert kernel <= set(layout.kernel_chains)
    assert all(chain.startswith(layout.chain) for _, chain in own)


def test_only_flows_that_were_sent_to_the_node_meet_the_rules_of_publications() -> None:
    layout = Layout()
    jumps = {rule.chain: rule for rule in rules_at(worlds.NODE4, layout)}
    assert {chain: rule.target for chain, rule in jumps.items()} == {
        layout.forward: Jump(layout.chain),
        layout.postrouting: Jump(layout.hairpin),
    }
    for rule in jumps.values():
        assert rule.match == Match(translated=True, original_destination=worlds.NODE4)
    # And no other way leads there.
    behind = {(Table.FILTER, layout.chain), (Table.NAT, layout.hairpin)}
    others = [*skeleton(layout, Family.IPV4), *of(active("8080:80"))]
    assert not [r for r in others if isinstance(r.target, Jump) and (r.table, r.target.chain) in behind]


def test_a_loopback_address_of_the_node_needs_no_rule() -> None:
    assert rules_at(IPv4Address("127.0.0.1"), Layout()) == ()
    assert rules_at(IPv6Address("::1"), Layout()) == ()


def test_no_packet_of_the_node_to_its_ipv6_localhost_is_translated() -> None:
    jumps = [rule for rule in skeleton(Layout(), Family.IPV6) if rule.chain == "OUTPUT"]
    assert ["! -d ::1/128" in arguments(rule) for rule in jumps] == [True]


@st.composite
def askings(draw: st.DrawFn) -> list[tuple[list[Rule], list[Rule]]]:
    """What is asked for no more and what is asked for, again and again; nobody gives back what he never asked for."""
    alphabet = [Rule(Family.IPV4, Table.NAT, "DOCKER", Match(), ACCEPT, owner) for owner in "abc"]
    asked: Counter[Rule] = Counter()
    steps = []
    for _ in range(draw(st.integers(1, 8))):
        held = list(asked.elements())
        old = draw(st.lists(st.sampled_from(range(len(held))), unique=True)) if held else []
        new = draw(st.lists(st.sampled_from(alphabet), max_size=3))
        steps.append(([held[index] for index in old], new))
        asked.subtract(held[index] for index in old)
        asked.update(new)
    return steps


@settings(deadline=None)
@given(askings())
def test_a_shared_rule_comes_with_the_first_and_leaves_with_the_last(
    steps: list[tuple[list[Rule], list[Rule]]],
) -> None:
    rules, asked, held = Ruleset(), Counter[Rule](), set[Rule]()
    for old, new in steps:
        difference = rules.replace(old, new)
        asked.subtract(old)
        asked.update(new)
        assert held.isdisjoint(difference.added)
        assert held.issuperset(difference.removed)
        held = (held - set(difference.removed)) | set(difference.added)
        assert held == {rule for rule, by in asked.items() if by}
        assert set(rules) == held
        assert len(rules) == len(held)
        assert all(rule in rules for rule in held)
        assert bool(difference) is bool(difference.added or difference.removed)


def test_giving_back_what_nobody_asked_for_is_an_error() -> None:
    with pytest.raises(ValueError, match="nobody asked for this rule"):
        Ruleset().replace(of(active("8080:80")), ())


def test_two_containers_on_one_bridge_share_what_is_the_bridges() -> None:
    rules = Ruleset()
    first, second = of(active("8080:80")), of(active("8081:80", "172.17.0.3", name="db"))
    rules.replace((), first)
    added = rules.replace((), second).added
    assert {rule.owner for rule in added} == {"default/db 8081:80/tcp"}
    assert set(rules.replace(first, ()).removed).isdisjoint(second)
    assert {rule.owner for rule in rules.replace(second, ()).removed} == {
        *("default/db 8081:80/tcp", "device docker0", "localhost guard", "device docker0 route_localnet=set")
    }


def test_a_container_that_moved_has_other_rules_of_the_same_owner() -> None:
    here, there = active("8080:80"), active("8080:80", "172.17.0.3")
    both = set(of(here)) & set(of(there))
    assert owner_of(here) == owner_of(there)
    assert owner_of(here) not in {rule.owner for rule in both}  # only what is the device's stays


@pytest.mark.parametrize(
    "text",
    [
        *("", "chain", "default/web", "node 192.0.2.1", "device docker0 route_localnet=set", "localhost guard"),
        *("default/we b 80:80/tcp", "web 80:80/tcp", "default/web 80/tcp", "default/web 80:80/tcp of many"),
    ],
)
def test_what_is_no_owner_of_a_publication_is_not_taken_for_one(text: str) -> None:
    assert Owner.parse(text) is None


@pytest.mark.parametrize(
    "text",
    ["default/web 8080:80/tcp", "default/web 32768:80/tcp of any", "default/web [::]:8001:80/udp of 8000-8010"],
)
def test_an_owner_is_read_back_as_it_was_written(text: str) -> None:
    assert str(Owner.parse(text)) == text
