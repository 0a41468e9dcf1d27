"""Who may reach a mapping, with real packets: ``sources`` and ``interface``, and ``firewall.masquerade: all``.

One node has a mapping of each kind, all of one container. Whoever calls reaches exactly those that let him in, whatever
FORWARD's policy is; at the others he meets the socket that reserves the port.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from embedded.container import Container
from embedded.host import Place
from embedded.node import Node
from embedded.traffic import (
    BOTH_FAMILIES,
    Outcome,
    Refused,
    Reply,
    Server,
    TimedOut,
    eventually,
    probe_tcp,
    probe_udp,
    serve,
)
from tests.node.daemon import Ctrport

OTHER, OTHER6 = "198.51.100.10", "2001:db8:51::10"  # the client's other addresses
LAN, CONTAINERS = "198.51.100.0/24", "172.17.0.0/16"

#: Who may reach a host port. Each leads to the container's port that is 1000 less.
PORTS: dict[int, str] = {
    8080: "",
    8081: f"sources: [{Node.client_address}]",
    8082: f"sources: [{OTHER}, {CONTAINERS}]",
    8083: f'sources: ["{Node.client_address6}/128"]',
    8084: "sources: [127.0.0.0/8]",
    8085: f"sources: [{Node.address}, 192.0.2.0/24]",
    8086: "sources: [0.0.0.0/0]",
    8087: f'sources: ["::/0", {OTHER}]',
    8088: "interface: eth0",
    8089: "interface: docker0",
    8090: f'interface: eth0, sources: [{Node.client_address}, "{OTHER6}"]',
    8091: f'interface: docker0, sources: [{LAN}, "2001:db8:51::/64"]',
    8092: f'sources: [{LAN}, {Node.client_address}, "fd00:17::/64"]',
}
#: Ranges for one client alone, onto the same ports and onto others.
SAME, SHIFTED = range(8200, 8203), range(8300, 8303)


@dataclass(frozen=True)
class Street:
    """A node, the container that is published, a sibling of it, and a caller of each kind."""

    node: Node
    web: Container
    sibling: Container
    backend: str


def declarations(backend: str) -> str:
    lines = [f"firewall: {{backend: {backend}}}", "publish:"]
    for port, access in PORTS.items():
        both = f'"{port}:{port - 1000}", "{port}:{port - 1000}/udp"'
        lines.append(f"  - {{match: {{container: web}}, ports: [{both}]{access and ', '}{access}}}")
    ranges = f'"{ends(SAME)}:{ends(SAME)}", "{ends(SHIFTED)}:{ends(SAME)}"'
    lines.append(f"  - {{match: {{container: web}}, ports: [{ranges}], sources: [{Node.client_address}]}}")
    return "\n".join(lines) + "\n"


def ends(ports: range) -> str:
    return f"{ports[0]}-{ports[-1]}"


@pytest.fixture(scope="module", params=["iptables-nft", "nftables"])
def street(request: pytest.FixtureRequest) -> Iterator[Street]:
    with Node() as node:
        node.start_containerd()
        node.add_network("docker0", subnet6="fd00:17::/64")
        node.client.run("ip", "address", "add", f"{OTHER}/24", "dev", "eth0")
        node.client.run("ip", "address", "add", f"{OTHER6}/64", "dev", "eth0", "nodad")
        web, sibling = node.start("web"), node.start("sibling")
        serve(web, *(port - 1000 for port in PORTS), *SAME, addresses=BOTH_FAMILIES)
        ctrport = Ctrport(node)
        ctrport.configure(declarations(request.param))
        ctrport.start()
        assert {p["state"] for p in ctrport.status()["publications"]} == {"active"}
        yield Street(node, web, sibling, request.param)


@pytest.fixture(
    scope="module",
    params=[("ACCEPT", 0), ("DROP", 0), ("DROP", 1)],
    ids=lambda param: f"forward-{param[0]}-bridge-nf-{param[1]}".lower(),
)
def under(request: pytest.FixtureRequest, street: Street) -> Street:
    """The street under a policy of FORWARD, with and without iptables asked about bridged packets."""
    policy, nf = request.param
    for program, switch in (("iptables-nft", "iptables"), ("ip6tables-nft", "ip6tables")):
        street.node.run(program, "-P", "FORWARD", policy)
        street.node.sysctl(f"net/bridge/bridge-nf-call-{switch}", nf)
        if street.backend == "nftables":  # which has a rule in there while it drops, and no longer
            forward = (program, "-S", "FORWARD")
            eventually(partial(_is_open, street.node, forward, policy == "DROP"), what="FORWARD being opened, or left")
    street.node.run("conntrack", "-F")  # no flow that was let in under other conditions answers for these
    return street


def _is_open(node: Node, forward: tuple[str, ...], opened: bool) -> bool:
    return ("ctrport nftables" in node.run(*forward).stdout) is opened


CLIENT, CLIENT6 = Node.client_address, Node.client_address6
#: Who calls, from which of his addresses, at which, and whom he reaches.
CALLERS: dict[str, tuple[str, str | None, str, set[int]]] = {
    "a client": ("client", CLIENT, Node.address, {8080, 8081, 8086, 8088, 8090, 8092}),
    "the client by its other address": ("client", OTHER, Node.address, {8080, 8082, 8086, 8087, 8088, 8092}),
    "the node at its address": ("node", None, Node.address, {8080, 8085, 8086, 8092}),
    "the node at 127.0.0.1": ("node", None, "127.0.0.1", {8080, 8084, 8086}),
    "a sibling": ("sibling", None, Node.address, {8080, 8082, 8086, 8089}),
    "the container itself": ("web", None, Node.address, {8080, 8082, 8086, 8089}),
    "a client over IPv6": ("client", CLIENT6, Node.address6, {8080, 8083, 8087, 8088}),
    "the client by its other IPv6 address": ("client", OTHER6, Node.address6, {8080, 8087, 8088, 8090}),
    "the node at its IPv6 address": ("node", None, Node.address6, {8080, 8087}),
    "the node at ::1": ("node", None, "::1", set()),
    "a sibling over IPv6": ("sibling", None, Node.address6, {8080, 8087, 8089, 8092}),
    "the container itself over IPv6": ("web", None, Node.address6, {8080, 8087, 8089, 8092}),
}
every_caller = pytest.mark.parametrize("caller", CALLERS)


def calling(street: Street, caller: str) -> tuple[Place, tuple[str, int] | None, str]:
    """Return from where a caller calls, as which source, and whom."""
    name, source, address, _ = CALLERS[caller]
    places: dict[str, Place] = {
        "client": street.node.client,
        "node": street.node,
        "sibling": street.sibling,
        "web": street.web,
    }
    return places[name], None if source is None else (source, 0), address


@every_caller
def test_a_caller_reaches_what_lets_him_in_and_is_refused_at_all_else(under: Street, caller: str) -> None:
    place, source, address = calling(under, caller)
    reached = set()
    for port in PORTS:
        outcome = probe_tcp(place, address, port, source=source, timeout=0.5)
        if isinstance(outcome, Reply):
            assert (outcome.name, outcome.port) == ("web", port - 1000)
            reached.add(port)
            continue
        assert isinstance(outcome, Refused), (port, outcome)  # at once, and by nobody's silence
    assert reached == CALLERS[caller][3]


@every_caller
def test_a_callers_datagram_reaches_what_lets_him_in(under: Street, caller: str) -> None:
    place, source, address = calling(under, caller)
    if address == "::1":
        return  # nothing is published there, and nothing reserved against all of its own programs
    # All are asked before any is waited for: who is not let in hears nothing, for the reserving socket is mute.
    callers = dict(zip(PORTS, place.sockets(len(PORTS), socket.SOCK_DGRAM, family_of(address)), strict=True))
    reached = {}
    try:
        for port, one in callers.items():
            if source is not None:
                one.bind(source)
            one.connect((address, port))
            one.send(b"who?\n")
        for port, one in callers.items():
            one.settimeout(2 if port in CALLERS[caller][3] else 0.02)
            try:
                reached[port] = one.recv(4096).split()
            except (TimeoutError, ConnectionRefusedError):
                continue
    finally:
        for one in callers.values():
            one.close()
    assert set(reached) == CALLERS[caller][3]
    assert {(port, int(fields[3])) for port, fields in reached.items()} == {(port, port - 1000) for port in reached}


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@pytest.mark.parametrize("ports", [SAME, SHIFTED], ids=["onto the same ports", "onto others"])
def test_each_port_of_a_range_lets_in_the_same(under: Street, ports: range) -> None:
    node = under.node
    for port, inside in zip(ports, SAME, strict=True):
        reply = probe_tcp(node.client, node.address, port, source=(CLIENT, 0))
        assert isinstance(reply, Reply), port
        assert (reply.port, reply.peer) == (inside, CLIENT)
        for place, address, source in (
            (node.client, node.address, OTHER),
            (node.client, node.address6, CLIENT6),
            (node, node.address, None),
            (node, "127.0.0.1", None),
            (under.sibling, node.address, None),
        ):
            outcome = probe_tcp(place, address, port, source=None if source is None else (source, 0), timeout=0.5)
            assert isinstance(outcome, Refused), (place.name, address, source, port)


def test_a_connection_of_who_is_let_in_lives_while_others_are_refused(under: Street) -> None:
    node = under.node
    with node.client.socket() as client:
        client.settimeout(2)
        client.bind((CLIENT, 0))
        client.connect((node.address, 8081))
        said = client.recv(200)
        for _ in range(3):
            assert isinstance(probe_tcp(node.client, node.address, 8081, source=(OTHER, 0), timeout=0.5), Refused)
            client.send(b"more\n")
            assert client.recv(200) == said


def test_a_container_meets_no_rule_of_a_family_it_has_no_source_of(street: Street) -> None:
    if street.backend == "nftables":
        v4, v6 = (street.node.run("nft", "list", "table", family, "ctrport").stdout for family in ("ip", "ip6"))
        assert " . 8083 " not in v4
        assert " . 8081 " not in v6
        # What is for every address of a family is with what is for all.
        assert all(re.search(rf"[={{,]\s+tcp \. {port} ", its) for port, its in ((8086, v4), (8087, v6)))
        return

    def chain(program: str) -> list[str]:
        listed = street.node.run(program, "-t", "nat", "-S", "DOCKER").stdout
        return [line for line in listed.splitlines() if "-j DNAT" in line]

    assert not [line for line in chain("iptables-nft") if "--dport 8083 " in line]
    assert not [line for line in chain("ip6tables-nft") if "--dport 8081 " in line]
    # Every address of a family is no condition; the address of a link alone can never be answered from elsewhere.
    assert not [line for line in chain("iptables-nft") if "--dport 8086 " in line and "-s " in line]
    assert all("! -s fe80::/10" in line for line in chain("ip6tables-nft") if "--dport 8087 " in line)


def test_a_source_without_an_address_of_the_container_is_unsupported_and_refused(node: Node, ctrport: Ctrport) -> None:
    Server(node.start("web"), 80)
    ctrport.configure(
        "publish:\n"
        "  - match: {container: web}\n"
        '    ports: ["0.0.0.0:8080:80"]\n'
        '    sources: ["2001:db8::/32"]\n'
        "  - match: {container: web}\n"
        '    ports: ["8081:80"]\n'
        '    sources: ["2001:db8::/32"]\n'
    )
    ctrport.start()
    publication = ctrport.publication("0.0.0.0:8080:80/tcp")
    assert (publication["state"], publication["reason"]) == ("unsupported", "none of its sources is a network of IPv4")
    publication = ctrport.publication("8081:80/tcp")
    assert publication["state"] == "waiting"
    assert publication["reason"] == "the container has no IPv6 address that the host can reach"
    for port in (8080, 8081):
        assert isinstance(probe_tcp(node.client, node.address, port), Refused)


@pytest.mark.parametrize("access", ["sources: [198.51.100.0/24]", "interface: lo"])
def test_127_0_0_1_is_not_switched_on_for_nobody(node: Node, ctrport: Ctrport, access: str) -> None:
    Server(node.start("web"), 80)
    ctrport.configure(f'publish:\n  - {{match: {{container: web}}, ports: ["8080:80"], {access}}}\n')
    ctrport.start()
    ctrport.wait_for("8080:80/tcp", "active")
    assert node.run("cat", "/proc/sys/net/ipv4/conf/docker0/route_localnet").stdout == "0\n"
    assert "DROP" not in node.run("iptables-nft", "-t", "raw", "-S", "PREROUTING").stdout
    assert isinstance(probe_tcp(node, "127.0.0.1", 8080), Refused)


def narrowed(sources: str) -> str:
    ports = '["8080:80", "8080:80/udp"]'
    return f"publish:\n  - {{match: {{container: web}}, ports: {ports}, sources: [{sources}]}}\n"


def test_who_is_let_in_from_now_on_is_and_who_is_no_longer_is_not(node: Node, ctrport: Ctrport) -> None:
    # Other sources take a restart. A client that kept asking meanwhile is let in by his next datagram.
    node.client.run("ip", "address", "add", f"{OTHER}/24", "dev", "eth0")
    serve(node.start("web"), 80)

    def reached(source: str) -> bool:
        return isinstance(probe_tcp(node.client, node.address, 8080, source=(source, 0)), Reply)

    ctrport.configure(narrowed(CLIENT))
    ctrport.start()
    assert (reached(CLIENT), reached(OTHER)) == (True, False)
    with node.client.socket(socket.SOCK_DGRAM) as other:
        other.bind((OTHER, 0))
        assert isinstance(asking(node, other), TimedOut)
        ctrport.stop()
        ctrport.configure(narrowed(OTHER))
        ctrport.start()
        eventually(lambda: isinstance(asking(node, other), Reply), what="a client that goes on asking being let in")
    assert (reached(CLIENT), reached(OTHER)) == (False, True)


@pytest.mark.parametrize("before", ["0.0.0.0/0", CLIENT, f"{CLIENT}, {OTHER}"])
def test_who_is_no_longer_let_in_loses_his_flow_too(node: Node, ctrport: Ctrport, before: str) -> None:
    # He would keep it for as long as he goes on asking: a flow is looked up in the rules once.
    node.client.run("ip", "address", "add", f"{OTHER}/24", "dev", "eth0")
    serve(node.start("web"), 80)
    ctrport.configure(narrowed(before))
    ctrport.start()
    with node.client.socket(socket.SOCK_DGRAM) as client, node.client.socket() as connected:
        assert isinstance(asking(node, client, timeout=2), Reply)
        connected.settimeout(2)
        connected.connect((node.address, 8080))
        said = connected.recv(200)
        ctrport.stop()
        ctrport.configure(narrowed(OTHER))
        ctrport.start()
        eventually(lambda: not asking(node, client), within=2, what="the client being let in no more")
        # A connection that was made when it might be lives to its end.
        connected.send(b"more\n")
        assert connected.recv(200) == said


def asking(node: Node, client: socket.socket, *, timeout: float = 0.2) -> Outcome:
    return probe_udp(node.client, node.address, 8080, over=client, timeout=timeout)


# firewall.masquerade.


@pytest.mark.parametrize("masquerade", ["hairpin", "all"])
def test_a_container_whose_default_route_is_another_host(masquerade: str) -> None:
    with Node() as node:
        node.start_containerd()
        node.add_network("docker0", subnet6="fd00:17::/64")
        web, sibling = node.start("web"), node.start("sibling")
        serve(web, 80, addresses=BOTH_FAMILIES)
        assert sibling.address is not None
        assert sibling.address6 is not None
        web.run("ip", "route", "replace", "default", "via", sibling.address)  # who forwards nothing
        web.run("ip", "-6", "route", "replace", "default", "via", sibling.address6)
        ctrport = Ctrport(node)
        ctrport.configure(
            f"firewall: {{masquerade: {masquerade}}}\n"
            'publish:\n  - {match: {container: web}, ports: ["8080:80", "8080:80/udp"]}\n'
        )
        ctrport.start()
        for policy in ("ACCEPT", "DROP"):
            for program in ("iptables-nft", "ip6tables-nft"):
                node.run(program, "-P", "FORWARD", policy)
            see_who_is_answered(node, sibling, everyone=masquerade == "all")


def see_who_is_answered(node: Node, sibling: Container, *, everyone: bool) -> None:
    timeout = 2 if everyone else 0.2
    for address, own in ((node.address, "172.17.0.1"), (node.address6, "fd00:17::1")):
        for place in (node.client, node):
            outcome = probe_tcp(place, address, 8080, timeout=timeout)
            assert isinstance(outcome, Reply if everyone else TimedOut), (place.name, address)
            assert not isinstance(outcome, Reply) or outcome.peer == own
        reply = probe_tcp(sibling, address, 8080)  # it shares the link, and is masqueraded in any case
        assert isinstance(reply, Reply)
        assert reply.peer == own
    assert isinstance(probe_udp(node.client, node.address, 8080, timeout=timeout), Reply if everyone else TimedOut)
    assert isinstance(probe_tcp(node, "127.0.0.1", 8080), Reply)  # masqueraded in any case, too
