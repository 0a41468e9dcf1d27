"""Ranges of ports, with real packets: each host port leads to its own container port and to no other."""

from __future__ import annotations

import socket

import pytest

from embedded.node import Node
from embedded.traffic import Outcome, Refused, Reply, eventually, probe_tcp, probe_udp, serve
from tests.node.daemon import Ctrport

SECOND = "198.51.100.3"  # another address of the node on the LAN
PORTS = 10

#: By what it shows: the first host port, the first container port, and how many DNAT rules it takes.
RANGES = {"same ports": (9000, 9000, 1), "offset": (8000, 9000, PORTS)}


@pytest.mark.parametrize(("first", "inside", "rules"), RANGES.values(), ids=RANGES)
def test_each_port_of_a_range_is_its_own(node: Node, ctrport: Ctrport, first: int, inside: int, rules: int) -> None:
    def probe(port: int) -> list[Outcome]:
        return [ask(node.client, node.address, port) for ask in (probe_tcp, probe_udp)]

    def refused(port: int) -> bool:
        return all(isinstance(outcome, Refused) for outcome in probe(port))

    before = node.tables()
    node.run("iptables-nft", "-P", "FORWARD", "DROP")
    web = node.start("web")
    # It serves the neighbours as well, so that one port too many would answer.
    serve(web, *range(inside - 1, inside + PORTS + 1))
    last = first + PORTS - 1
    ends = f"{first}-{last}:{inside}-{inside + PORTS - 1}"
    ctrport.configure(f'publish:\n  - match: {{container: web}}\n    ports: ["{ends}/tcp", "{ends}/udp"]\n')
    ctrport.start()
    for port in range(first, last + 1):
        for reply in probe(port):
            assert isinstance(reply, Reply), port
            assert (reply.port, reply.peer) == (inside + port - first, node.client_address)
    assert refused(first - 1)
    assert refused(last + 1)
    chain = node.run("iptables-nft", "-t", "nat", "-S", "DOCKER").stdout.splitlines()
    for protocol in ("tcp", "udp"):
        assert sum(f"-p {protocol} " in rule and "-j DNAT" in rule for rule in chain) == rules
    node.delete(web)
    eventually(lambda: refused(first), what="the range being closed")
    for port in range(first - 1, last + 2):
        assert refused(port), port
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
    serve(web, *range(inside, inside + PORTS))
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
