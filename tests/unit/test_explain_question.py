"""What is asked, and which packet that is on a node."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest
from hypothesis import given

from ctrport.explain.facts import Ask, Facts, Local, NoRoute, Route, RouteTo
from ctrport.explain.question import Asked, Inquiry, QuestionError, inquire, read, usual_family
from ctrport.explain.ruleset import Ruleset
from ctrport.model import Family, Protocol
from tests.unit.hostile import fuzz, texts
from tests.unit.ways import CLIENT, NODE, NODE6, OTHER, SIBLING, WEB, World


@pytest.mark.parametrize(
    ("port", "source", "expected"),
    [
        ("8080", None, Asked(8080, Protocol.TCP)),
        ("8080/udp", None, Asked(8080, Protocol.UDP)),
        ("8080/TCP", None, Asked(8080, Protocol.TCP)),
        ("8080/sctp", None, Asked(8080, Protocol.SCTP)),
        ("192.0.2.7:8080", None, Asked(8080, Protocol.TCP, ip_address("192.0.2.7"), None, Family.IPV4)),
        ("[2001:db8::7]:53/udp", None, Asked(53, Protocol.UDP, ip_address("2001:db8::7"), None, Family.IPV6)),
        ("0.0.0.0:8080", None, Asked(8080, Protocol.TCP, None, None, Family.IPV4)),
        ("[::]:8080", None, Asked(8080, Protocol.TCP, None, None, Family.IPV6)),
        ("8080", "192.0.2.9", Asked(8080, Protocol.TCP, None, ip_address("192.0.2.9"), Family.IPV4)),
        ("8080", "::1", Asked(8080, Protocol.TCP, None, ip_address("::1"), Family.IPV6)),
        ("8080", "[::1]", Asked(8080, Protocol.TCP, None, ip_address("::1"), Family.IPV6)),
    ],
)
def test_what_can_be_asked(port: str, source: str | None, expected: Asked) -> None:
    assert read(port, source) == expected


@pytest.mark.parametrize(
    ("port", "source", "said"),
    [
        ("", None, "'' is no port; expected PORT, ADDRESS:PORT or [IPv6]:PORT"),
        ("http", None, "'http' is no port"),
        ("8080:80", None, "'8080:80' has the address '8080'; expected an IPv4 address, or an IPv6 address in brackets"),
        ("::1:80", None, "'::1:80' is no port"),
        ("[127.0.0.1]:80", None, "has the address '127.0.0.1'"),
        ("[fe80::1%eth0]:80", None, "has the address 'fe80::1%eth0'"),
        ("0", None, "has the port '0'; expected a number from 1 to 65535"),
        ("65536", None, "has the port '65536'"),
        ("0080", None, "has the port '0080'"),
        ("9" * 5000, None, "expected a number from 1 to 65535"),
        ("80/icmp", None, "has the protocol 'icmp'; expected tcp, udp or sctp"),
        ("80/", None, "'80/' is no port"),
        ("80", "here", "--from has 'here'; expected an IPv4 or IPv6 address"),
        ("80", "fe80::1%eth0", "--from has 'fe80::1%eth0'"),
        ("80", "0.0.0.0", "nobody sends from 0.0.0.0"),
        ("80", "224.0.0.1", "nobody sends from 224.0.0.1"),
        ("192.0.2.7:80", "::1", "::1 cannot send to 192.0.2.7; expected addresses of one family"),
        ("80\n", None, "is no port"),
    ],
)
def test_what_cannot(port: str, source: str | None, said: str) -> None:
    with pytest.raises(QuestionError) as raised:
        read(port, source)
    assert said in str(raised.value)
    assert str(raised.value).isprintable()


@fuzz(200)
@given(texts, texts)
def test_no_text_is_too_much(port: str, source: str) -> None:
    for arguments in ((port, None), ("80", source), (f"{port}:80", None), (f"[{port}]:80/{source}", None)):
        said = ""
        try:
            read(*arguments)
        except QuestionError as error:
            said = str(error)
        assert said.isprintable()
        assert len(said) < 400


def asked(port: str, source: str | None = None, *, world: World | None = None) -> Inquiry:
    world = world or World()
    facts = world.facts
    while True:
        try:
            return inquire(read(port, source), facts)
        except Ask as ask:
            facts = replace(facts, answers={**facts.answers, ask.question: world.answer(ask.question)})


@pytest.mark.parametrize(
    ("port", "source", "sender", "destination", "device", "origin"),
    [
        ("8080", None, "198.51.100.254", NODE, "eth0", "client"),
        ("8080", CLIENT, CLIENT, NODE, "eth0", "client"),
        ("8080", "203.0.113.9", "203.0.113.9", NODE, "eth0", "client"),
        ("8080", SIBLING, SIBLING, NODE, "docker0", "container"),
        ("8080", OTHER, OTHER, NODE, "net1", "container"),
        ("8080", NODE, NODE, NODE, None, "node"),
        ("8080", "127.0.0.1", "127.0.0.1", "127.0.0.1", None, "node"),
        ("127.0.0.1:8080", None, "127.0.0.1", "127.0.0.1", None, "node"),
        ("[::1]:8080", None, "::1", "::1", None, "node"),
        (f"{NODE}:8080", None, "198.51.100.254", NODE, "eth0", "client"),
        ("172.17.0.1:8080", None, "172.17.255.254", "172.17.0.1", "docker0", "client"),
        (f"{WEB}:80", None, "198.51.100.254", WEB, "eth0", "client"),
        (f"{NODE}:8080", "203.0.113.9", "203.0.113.9", NODE, "eth0", "client"),
        (f"[{NODE6}]:8080", None, "2001:db8:51:0:ffff:ffff:ffff:ffff", NODE6, "eth0", "client"),
        ("8080", "2001:db8:51::9", "2001:db8:51::9", NODE6, "eth0", "client"),
    ],
)  # fmt: skip
def test_which_packet_is_meant(
    port: str, source: str | None, sender: str, destination: str, device: str | None, origin: str
) -> None:
    found = asked(port, source)
    packet = found.packet
    assert (str(packet.source.address), str(packet.destination.address)) == (sender, destination)
    assert (packet.in_device, found.origin) == (device, origin)


def test_a_container_by_a_device_of_its_own_comes_in_by_that() -> None:
    world = World().with_answers({RouteTo(ip_address("10.9.0.5")): Route("unicast", "cali1")})
    world.inhabitants["10.9.0.5"] = world.inhabitants[WEB]
    found = asked("8080", "10.9.0.5", world=world)
    assert (found.packet.in_device, found.origin, str(found.packet.destination.address)) == ("cali1", "container", NODE)


def test_a_client_is_nobody_that_is_known() -> None:
    world = World()
    own = Local(ip_network("198.51.100.254"), "eth0")
    world.facts = replace(world.facts, locals=(*world.facts.locals, own))
    assert str(asked("8080", world=world).packet.source.address) != "198.51.100.254"
    gateway = Route("unicast", "eth0", ip_address("198.51.100.254"), ip_address(NODE))
    world = World().with_answers({RouteTo(ip_address("192.0.2.1")): gateway})
    assert str(asked("8080", world=world).packet.source.address) == "198.51.100.253"


def test_a_node_without_a_default_route_has_clients_too() -> None:
    world = World().with_answers({RouteTo(ip_address("192.0.2.1")): NoRoute(101)})
    found = asked("8080", world=world)
    assert (str(found.packet.source.address), str(found.packet.destination.address)) == ("198.51.100.254", NODE)
    assert str(asked("8080", SIBLING, world=world).packet.destination.address) == "172.17.0.1"


def test_a_node_without_a_network_has_to_be_told_who_sends() -> None:
    world = World().with_answers(
        {RouteTo(ip_address("192.0.2.1")): NoRoute(101), RouteTo(ip_address(CLIENT)): NoRoute(101)}
    )
    world.facts = replace(world.facts, addresses=(("lo", ip_interface("127.0.0.1/8")),))
    with pytest.raises(QuestionError, match=r"no network that a client could be on; expected --from ADDRESS"):
        asked("8080", world=world)
    with pytest.raises(QuestionError, match="the node has no address of that family"):
        asked("8080", CLIENT, world=world)
    with pytest.raises(QuestionError, match=r"no device that a packet from 198\.51\.100\.2 could"):
        asked(f"{NODE}:8080", CLIENT, world=world)


def test_a_small_network_may_have_nobody_else() -> None:
    world = World()
    world.facts = replace(world.facts, addresses=(("eth0", ip_interface("198.51.100.1/32")),))
    with pytest.raises(QuestionError, match="no network"):
        asked("8080", world=world)


def test_a_node_of_ipv6_alone_is_asked_over_ipv6() -> None:
    assert usual_family([("eth0", ip_interface(f"{NODE6}/64")), ("lo", ip_interface("127.0.0.1/8"))]) is Family.IPV6
    assert usual_family([("eth0", ip_interface(f"{NODE6}/64")), ("eth0", ip_interface(f"{NODE}/24"))]) is Family.IPV4
    assert usual_family([]) is Family.IPV4


def test_what_kind_of_address_it_is() -> None:
    facts = World().facts
    kinds = {"198.51.100.1": "local", "127.9.9.9": "local", "198.51.100.255": "broadcast", "224.0.0.1": "multicast"}
    kinds |= {"203.0.113.9": "unicast", "0.0.0.0": "unspec", "::1": "local"}
    for address, kind in kinds.items():
        assert facts.type_of(ip_address(address)) == kind
    assert facts.type_of(ip_address(NODE), "eth0") == "local"
    assert facts.type_of(ip_address(NODE), "docker0") == "unicast"


def test_what_is_not_known_is_asked_for() -> None:
    facts = Facts(Ruleset())
    with pytest.raises(Ask) as raised:
        facts.number("net/ipv4/ip_forward")
    answered = replace(facts, answers={raised.value.question: "1\n".strip()})
    assert answered.number("net/ipv4/ip_forward") == 1
    assert replace(facts, answers={raised.value.question: None}).number("net/ipv4/ip_forward") == 0
    assert replace(facts, answers={raised.value.question: "x"}).number("net/ipv4/ip_forward") == 0
