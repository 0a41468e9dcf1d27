"""Ranges of ports, with real packets: each host port leads to its own container port and to no other."""

from __future__ import annotations

import socket

import pytest

from embedded.node import Node
from embedded.traffic import Outcome, Refused, Reply, Server, eventually, probe_tcp, probe_udp
from tests.node.daemon import Ctrport

SECOND = "198.51.100.3"  # another address of the node on the LAN
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
PORTS = 10

#: By what it shows: the first host port, the first container port, and how many DNAT rules it takes.
RANGES = {"same ports": (9000, 9000, 1), "offset": (8000, 9000, PORTS)}


@pytest.fixture
def node(node: Node) -> Node:
    """A node that says each time that a port is closed: by default a client is told of it once a second."""
    node.sysctl("net/ipv4/icmp_ratelimit", 0)
    return node


@pytest.mark.parametrize("protocol", KINDS)
@pytest.mark.parametrize(("first", "inside", "rules"), RANGES.values(), ids=RANGES)
def test_each_port_of_a_range_is_its_own(
    node: Node, ctrport: Ctrport, protocol: str, first: int, inside: int, rules: int
) -> None:
    def probe(port: int) -> Outcome:
        return (probe_tcp if protocol == "tcp" else probe_udp)(node.client, node.address, port)

    before = node.tables()
    node.run("iptables-nft", "-P", "FORWARD", "DROP")
    web = node.start("web")
    # It serves the neighbours as well, so that one port too many would answer.
    Server(web, range(inside - 1, inside + PORTS + 1), kind=KINDS[protocol])
    last = first + PORTS - 1
    ctrport.configure(
        "publish:\n"
        "  - match: {container: web}\n"
        f'    ports: ["{first}-{last}:{inside}-{inside + PORTS - 1}/{protocol}"]\n'
    )
    ctrport.start()
    for port in range(first, last + 1):
        reply = probe(port)
        assert isinstance(reply, Reply), port
        assert (reply.port, reply.peer) == (inside + port - first, node.client_address)
    assert isinstance(probe(first - 1), Refused)
    assert isinstance(probe(last + 1), Refused)
    chain = node.run("iptables-nft", "-t", "nat", "-S", "DOCKER").stdout
    assert chain.count("-j DNAT") == rules
    node.delete(web)
    eventually(lambda: isinstance(probe(first), Refused), what="the range being closed")
    for port in range(first - 1, last + 2):
        assert isinstance(probe(port), Refused), port
    assert ctrport.stop() == 0
    ctrport.run("clean")
    node.run("iptables-nft", "-P", "FORWARD", "ACCEPT")
    assert node.tables() == before


# Two flows of one client port to two addresses of the node become one and the same on the container's side. The kernel
# has to tell them apart, and must do so by the client's port: by the container's port, one would get the neighbour's.


@pytest.mark.parametrize(("first", "inside", "rules"), RANGES.values(), ids=RANGES)
def test_one_client_port_reaches_the_same_port_at_two_addresses(
    node: Node, ctrport: Ctrport, first: int, inside: int, rules: int
) -> None:
    node.add_address(SECOND)
    web = node.start("web")
    for kind in KINDS.values():
        Server(web, range(inside, inside + PORTS), kind=kind)
    ends = f"{first}-{first + PORTS - 1}:{inside}-{inside + PORTS - 1}"
    ctrport.configure(f'publish:\n  - match: {{container: web}}\n    ports: ["{ends}/tcp", "{ends}/udp"]\n')
    ctrport.start()
    for offset in range(PORTS):
        asked = inside + offset
        assert udp_ports(node, first + offset) == [asked, asked]
        assert tcp_ports(node, first + offset) == [asked, asked]


def udp_ports(node: Node, port: int) -> list[int]:
    """Return which container ports answer, the first flow being tracked still when the second begins."""
    answers = []
    with node.client.socket(socket.SOCK_DGRAM) as client:
        for address in (node.address, SECOND):
            reply = probe_udp(node.client, address, port, over=client)
            assert isinstance(reply, Reply), (address, port)
            answers.append((reply.port, reply.source[1]))
    assert answers[0][1] == answers[1][1]
    return [answer[0] for answer in answers]


def tcp_ports(node: Node, port: int) -> list[int]:
    """Return which container ports answer, the first connection being open still when the second begins."""
    with node.client.socket() as first, node.client.socket() as second:
        answers = []
        for client, address in ((first, node.address), (second, SECOND)):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.settimeout(2)
            client.bind(("0.0.0.0", 0 if client is first else first.getsockname()[1]))
            client.connect((address, port))
            answers.append(int(client.recv(200).split()[3]))
        return answers
