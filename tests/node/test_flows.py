"""Flows that are older than a rule, or outlive it, with real packets and the kernel's own list of flows."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import pytest

from ctrport import conntrack, ports
from ctrport.conntrack import Closed, Opened
from ctrport.model import Attachment, Endpoint, Family
from ctrport.node import look
from embedded.container import Container
from embedded.host import Place
from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, eventually, probe_tcp, probe_udp, serve
from tests.node.daemon import Ctrport
from tests.node.modules import call, find, run

DNS = socket.SOCK_DGRAM


class Persistent:
    """A UDP client that sends and sends from one port, whatever comes back; ``answers`` are who answered, in order."""

    def __init__(self, place: Place, address: str, port: int) -> None:
        self.answers: list[str] = []
        self._socket = place.socket(socket.SOCK_DGRAM, socket.AF_INET6 if ":" in address else socket.AF_INET)
        self._socket.settimeout(0.05)  # it never leaves its flow alone for longer
        self._socket.connect((address, port))
        self.port: int = self._socket.getsockname()[1]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send_on, name=f"client of {port}", daemon=True)
        self._thread.start()

    def _send_on(self) -> None:
        while not self._ended.wait(0.02):
            try:
                self._socket.send(b"who?\n")
                self.answers.append(self._socket.recv(200).decode().split()[0])
            except OSError:  # refused, or no answer: it goes on
                continue

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()


@contextmanager
def persistent(place: Place, address: str, port: int) -> Iterator[Persistent]:
    client = Persistent(place, address, port)
    try:
        yield client
    finally:
        client.close()


def flows(node: Node, *filters: str) -> list[str]:
    """Return the flows that the node tracks and that match, each with its id, which a new flow does not share."""
    return node.run("conntrack", "-L", "-o", "id", *filters).stdout.splitlines()


def ids(lines: list[str]) -> set[str]:
    return {found[1] for line in lines if (found := re.search(r"\bid=(\d+)", line))}


def address_of(container: Container) -> str:
    assert container.address is not None
    return container.address


# At once: a UDP flow without an answer is forgotten after 30 s and one with after 120, but not while its client sends.
AT_ONCE = 2.0


@pytest.mark.parametrize("place", ["client", "node"])
@pytest.mark.parametrize("refused", [True, False], ids=["to a closed port", "to a program that has ended"])
def test_a_udp_client_that_kept_sending_reaches_the_container_at_once(
    node: Node, ctrport: Ctrport, place: str, refused: bool
) -> None:
    before = node.tables()
    ctrport.configure('publish:\n  - match: {container: web}\n    ports: ["5353:53/udp"]\n')
    ctrport.start()
    sender = node.client if place == "client" else node
    program = None if refused else Server(node, 5353, kind=DNS, address=node.address, name="program")
    with persistent(sender, node.address, 5353) as client:
        eventually(lambda: flows(node, "-p", "udp", "--orig-port-dst", "5353"), what="the flow being tracked")
        if program is not None:
            eventually(lambda: client.answers, what="the program answering")
            program.close()
        web = node.start("web")
        Server(web, 53, kind=DNS)
        ctrport.wait_for("5353:53/udp", "active")
        eventually(lambda: "web" in client.answers, within=AT_ONCE, what="the container answering the client")
        node.delete(web)
        ctrport.wait_for("5353:53/udp", "waiting")
    assert isinstance(probe_udp(sender, node.address, 5353), Refused)
    ctrport.stop()
    ctrport.run("clean")
    assert node.tables() == before


def test_a_udp_client_follows_its_port_to_the_next_container(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure('publish:\n  - match: {container: "web*"}\n    ports: ["5353:53/udp"]\n')
    ctrport.start()
    first = node.start("web1")
    Server(first, 53, kind=DNS)
    ctrport.wait_for("5353:53/udp", "active", "web1")
    with persistent(node.client, node.address, 5353) as client:
        eventually(lambda: "web1" in client.answers, what="the first answering")
        node.delete(first)
        second = node.start("web2")
        Server(second, 53, kind=DNS)
        assert second.address != first.address
        ctrport.wait_for("5353:53/udp", "active", "web2")
        eventually(lambda: "web2" in client.answers, within=AT_ONCE, what="the second answering")


def test_a_udp_client_follows_its_port_to_the_container_that_waited_for_it(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure('publish:\n  - match: {container: "web*"}\n    ports: ["5353:53/udp"]\n')
    first = node.start("web1")
    ctrport.start()
    second = node.start("web2")
    Server(first, 53, kind=DNS)
    Server(second, 53, kind=DNS)
    ctrport.wait_for("5353:53/udp", "waiting", "web2")
    with persistent(node.client, node.address, 5353) as client:
        eventually(lambda: "web1" in client.answers, what="the first answering")
        node.delete(first)  # rules of the one go and of the other come in one transaction
        ctrport.wait_for("5353:53/udp", "active", "web2")
        eventually(lambda: "web2" in client.answers, within=AT_ONCE, what="the second answering")


def test_no_flow_of_a_mapping_is_left_and_no_other_to_that_port_is_touched(node: Node, ctrport: Ctrport) -> None:
    before = node.tables()
    ctrport.configure('publish:\n  - match: {container: dns}\n    ports: ["53:53/udp", "53:53/tcp"]\n')
    dns, sibling = node.start("dns"), node.start("sibling")
    serve(dns, 53)
    serve(node.client, 53, addresses=[node.client_address], name="resolver")
    ctrport.start()
    for place in (node.client, node, sibling):
        assert isinstance(probe_udp(place, node.address, 53), Reply)
    through = address_of(dns)
    assert len(flows(node, "-p", "udp", "--reply-src", through)) == 3
    with sibling.socket() as connection, node.client.socket() as cut:
        cut.settimeout(2)
        cut.connect((node.address, 53))
        assert cut.recv(200)
        assert len(flows(node, "-p", "tcp", "--reply-src", through)) == 1
        connection.settimeout(2)
        connection.connect((node.client_address, 53))  # the sibling's resolver by TCP
        assert connection.recv(200)
        for place in (sibling, node):
            assert isinstance(probe_udp(place, node.client_address, 53), Reply)
        to_resolver = ("--orig-dst", node.client_address, "--orig-port-dst", "53")
        others = {protocol: ids(flows(node, "-p", protocol, *to_resolver)) for protocol in ("udp", "tcp")}
        assert (len(others["udp"]), len(others["tcp"])) == (2, 1)
        node.delete(dns)
        ctrport.wait_for("53:53/udp", "waiting")
        eventually(
            lambda: not flows(node, "--reply-src", through), within=AT_ONCE, what="the mapping's flows being gone"
        )
        for protocol, there in others.items():
            assert ids(flows(node, "-p", protocol, *to_resolver)) == there
        connection.sendall(b"still there?\n")
        assert connection.recv(200)
    assert isinstance(probe_udp(node.client, node.address, 53), Refused)
    assert isinstance(probe_tcp(node.client, node.address, 53), Refused)
    node.delete(sibling)
    ctrport.stop()
    ctrport.run("clean")
    assert node.tables() == before


def test_publishing_a_port_leaves_flows_to_it_on_other_hosts_alone(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure('publish:\n  - match: {container: dns}\n    ports: ["53:53/udp"]\n')
    ctrport.start()
    sibling = node.start("sibling")
    Server(node.client, 53, kind=DNS, address=node.client_address, name="resolver")
    for place in (sibling, node):
        assert isinstance(probe_udp(place, node.client_address, 53), Reply)
    there = ids(flows(node, "-p", "udp", "--orig-dst", node.client_address))
    assert len(there) == 2
    # A flow that must go, to see that there was a looking for such.
    assert isinstance(probe_udp(node.client, node.address, 53), Refused)
    dns = node.start("dns")
    Server(dns, 53, kind=DNS)
    ctrport.wait_for("53:53/udp", "active")
    eventually(lambda: not flows(node, "-p", "udp", "--reply-src", node.address), what="the stale flow being gone")
    assert ids(flows(node, "-p", "udp", "--orig-dst", node.client_address)) == there
    assert isinstance(probe_udp(node.client, node.address, 53), Reply)


def packets(node: Node, chain: str, table: str, container: str) -> list[int]:
    """Return the packet counters of one container's rules in one chain."""
    saved = node.run("iptables-nft-save", "-c", "-t", table).stdout.splitlines()
    counted = [re.match(r"\[(\d+):\d+\] -A (\S+) .*ctrport default/(\S+) ", line) for line in saved]
    return [int(found[1]) for found in counted if found and (found[2], found[3]) == (chain, container)]


def test_changes_of_others_leave_a_connection_and_its_counters_alone(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(
        "publish:\n"
        "  - match: {container: web}\n"
        '    ports: ["8080:80"]\n'
        "  - match: {container: other}\n"
        f'    ports: ["{node.address}:8070:80", "8090:80", "8091:80/udp", "9000-9009:7000-7009"]\n'
    )
    ctrport.start()
    node.run("iptables-nft", "-P", "FORWARD", "DROP")
    web = node.start("web")
    Server(web, 80)
    eventually(lambda: probe_tcp(node.client, node.address, 8080), what="the port being open")
    with node.client.socket() as connection:
        connection.settimeout(2)
        connection.connect((node.address, 8080))
        assert connection.recv(200).startswith(b"web ")
        flow = ids(flows(node, "-p", "tcp", "--orig-port-dst", "8080", "--state", "ESTABLISHED"))
        assert len(flow) == 1
        counted = {table: packets(node, "DOCKER", table, "web") for table in ("nat", "filter")}
        assert all(len(counters) == 1 and counters[0] >= 2 for counters in counted.values()), counted
        for _ in range(2):
            other = node.start("other")
            Server(other, 80)
            eventually(lambda: probe_tcp(node.client, node.address, 8090), what="the other's port being open")
            connection.sendall(b"still there?\n")
            assert connection.recv(200).startswith(b"web ")
            node.delete(other)
            eventually(
                lambda: isinstance(probe_tcp(node.client, node.address, 8090), Refused), what="the other's being closed"
            )
            connection.sendall(b"still there?\n")
            assert connection.recv(200).startswith(b"web ")
        assert ids(flows(node, "-p", "tcp", "--orig-port-dst", "8080", "--state", "ESTABLISHED")) == flow
        # These rules see the first packet of a connection only, so nothing but a rewriting could change them.
        assert {table: packets(node, "DOCKER", table, "web") for table in ("nat", "filter")} == counted


# The same in both families, with rules made by hand


@pytest.fixture
def both() -> Iterator[Node]:
    """A node whose containers have both families."""
    with Node() as node:
        node.start_containerd()
        node.add_network("docker0", subnet6="fd00:17::/64")
        node.sysctl("net/ipv4/icmp_ratelimit", 0)
        node.sysctl("net/ipv6/icmp/ratelimit", 0)
        yield node


class ByHand:
    """Ports of one container, in one family, with the one rule of each that decides over flows."""

    def __init__(self, node: Node, container: Container, family: Family) -> None:
        found = find(node, container)
        assert isinstance(found, Endpoint)
        attachment = found.at(family)
        assert attachment is not None
        self.node = node
        self.attachment: Attachment = attachment
        self.address = node.address if family is Family.IPV4 else node.address6
        self.family = f"ipv{family.value}"

    def rule(self, do: str, text: str) -> None:
        mapping = ports.parse(text)
        assert mapping.host_ports is not None
        to = f"[{self.attachment.address}]" if self.attachment.address.version == 6 else str(self.attachment.address)
        rule = f"-t nat {do} PREROUTING -p {mapping.protocol} --dport {mapping.host_ports} -d {self.address}"
        program = "iptables-nft" if self.attachment.address.version == 4 else "ip6tables-nft"
        self.node.run(program, *f"{rule} -j DNAT --to {to}:{mapping.container_ports}".split())

    def drop_stale(self, touched: Opened | Closed) -> int:
        addresses = call(self.node, look).facts.addresses
        assert ip_address(self.address) in addresses
        return run(self.node, conntrack.drop_stale, [touched], addresses)


def ask(connection: socket.socket) -> bytes:
    connection.sendall(b"still there?\n")
    return connection.recv(200)


@pytest.mark.parametrize("known", [True, False], ids=["of this run", "of an earlier run"])
@pytest.mark.parametrize("family", Family)
def test_connections_are_cut_with_their_mapping_though_the_container_lives_on(
    both: Node, family: Family, known: bool
) -> None:
    web = both.start("web")
    hands = {each: ByHand(both, web, each) for each in Family}
    withdrawn, kept = hands.pop(family), next(iter(hands.values()))
    mapping = ports.parse("8080:80")
    connections = []
    for each in (withdrawn, kept):
        Server(web, [80, 81], address="::" if each.family == "ipv6" else "0.0.0.0")
        each.rule("-A", "8080:80")
    withdrawn.rule("-A", "8081:81")
    for address, port in ((withdrawn.address, 8080), (withdrawn.address, 8081), (kept.address, 8080)):
        connections.append(both.client.socket(family=socket.AF_INET6 if ":" in address else socket.AF_INET))
        connections[-1].settimeout(2)
        connections[-1].connect((address, port))
        assert connections[-1].recv(200)
    cut, other_port, other_family = connections
    if known:
        closed = Closed(mapping, withdrawn.attachment)
    else:  # a mapping bound to the address, for one that is not would be the other family's as well
        text = f"[{withdrawn.address}]:8080:80" if ":" in withdrawn.address else f"{withdrawn.address}:8080:80"
        closed = Closed(ports.parse(text), None)
    withdrawn.rule("-D", "8080:80")
    assert ask(cut)  # the rule was asked once only: that is what this is for
    assert withdrawn.drop_stale(closed) == 1
    with pytest.raises(ConnectionError):
        ask(cut)
    assert ask(other_port)
    assert ask(other_family)
    assert withdrawn.drop_stale(closed) == 0
    for connection in connections:
        connection.close()


def test_connections_of_an_earlier_run_are_cut_in_both_families(both: Node) -> None:
    web = both.start("web")
    connections = []
    for each in (ByHand(both, web, family) for family in Family):
        Server(web, 80, address="::" if each.family == "ipv6" else "0.0.0.0")
        each.rule("-A", "8080:80")
        connections.append(both.client.socket(family=socket.AF_INET6 if ":" in each.address else socket.AF_INET))
        connections[-1].settimeout(2)
        connections[-1].connect((each.address, 8080))
        assert connections[-1].recv(200)
        each.rule("-D", "8080:80")
    assert each.drop_stale(Closed(ports.parse("8080:80"), None)) == 2
    for connection in connections:
        with connection, pytest.raises(ConnectionError):
            ask(connection)


@pytest.mark.parametrize("family", Family)
def test_a_udp_client_from_before_the_rule_reaches_the_container(both: Node, family: Family) -> None:
    web = both.start("web")
    hand = ByHand(both, web, family)
    Server(web, 53, kind=DNS, address=str(hand.attachment.address))
    hand.rule("-A", "1:1")  # some rule: without any the kernel tracks no flow
    tracked = ("-f", hand.family, "-p", "udp", "--orig-port-dst", "5353")
    with persistent(both.client, hand.address, 5353) as client:
        eventually(lambda: flows(both, *tracked), what="the flow being tracked")
        hand.rule("-A", "5353:53/udp")
        opened = Opened(ports.parse("5353:53/udp"), hand.attachment)
        assert client.answers == []
        assert hand.drop_stale(opened) == 1
        eventually(lambda: "web" in client.answers, within=AT_ONCE, what="the container answering the client")
        now = ids(flows(both, *tracked))
        assert now == ids(flows(both, *tracked, "--reply-src", str(hand.attachment.address)))
        assert hand.drop_stale(opened) == 0
        assert ids(flows(both, *tracked)) == now
