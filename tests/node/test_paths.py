"""Who reaches a published port from where, with real packets: the table "from -> to | reaches" of the design.

The paths that are open share one node with a network of each kind, under every FORWARD policy and both settings of
bridge-nf-call-iptables. What changes tables or routes by hand has a node of its own.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from embedded.container import Container
from embedded.host import Place
from embedded.loopback import loopback_goes_to
from embedded.node import Node
from embedded.traffic import Outcome, Refused, Reply, Server, TimedOut, eventually, probe_tcp, probe_udp, serve
from tests.node.daemon import Ctrport

SECOND = "198.51.100.3"  # another address of the node on the LAN
ON_SECOND, ON_LOCALHOST, UNPUBLISHED = 8082, 8081, 8099
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
#: The networks by name, and the host port of the container on each.
NETWORKS = {"masq0": 8070, "plain0": 8071, "routed0": 8072}
GUARD = ("-d 127.0.0.0/8", "-s 127.0.0.0/8")


def probe(place: Place, address: str, port: int, protocol: str, *, timeout: float = 2) -> Outcome:
    ask = probe_tcp if protocol == "tcp" else probe_udp
    return ask(place, address, port, timeout=timeout)


def rules(node: Node, table: str, chain: str) -> list[str]:
    listed = node.run("iptables-nft", "-t", table, "-S", chain).stdout.splitlines()
    return [line for line in listed if line.startswith("-A ")]


@dataclass(frozen=True)
class Street:
    """A node with a network of each kind, a published container and its sibling on each, and a stranger elsewhere."""

    node: Node
    webs: dict[str, Container]
    siblings: dict[str, Container]
    stranger: Container


def build(node: Node) -> Street:
    node.sysctl("net/ipv4/icmp_ratelimit", 0)  # or a client is told only once a second that a UDP port is closed
    node.start_containerd()
    node.add_address(SECOND)
    networks = [
        node.add_network("masq0", subnet="172.17.0.0/16", ip_masq=True, hairpin=True),
        node.add_network("plain0", subnet="172.18.0.0/16", ip_masq=False, hairpin=True),
        node.add_network("routed0", subnet="172.19.0.0/16", kind="ptp"),
    ]
    far = node.add_network("far0", subnet="172.20.0.0/16", ip_masq=False)
    webs = {network.name: node.start(f"web-{network.name}", network=network) for network in networks}
    siblings = {network.name: node.start(f"sibling-{network.name}", network=network) for network in networks}
    for web in webs.values():
        serve(web, 80)
    serve(webs["masq0"], 81, 82)
    return Street(node, webs, siblings, node.start("stranger", network=far))


def declarations() -> str:
    lines = ["publish:"]
    for name, port in NETWORKS.items():
        ports = [f"{port}:80"]
        if name == "masq0":
            ports += [f"127.0.0.1:{ON_LOCALHOST}:81", f"{SECOND}:{ON_SECOND}:82"]
        both = ", ".join(f'"{spec}/{protocol}"' for spec in ports for protocol in KINDS)
        lines += [f"  - match: {{container: web-{name}}}", f"    ports: [{both}]"]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def street() -> Iterator[Street]:
    with Node() as node:
        street = build(node)
        ctrport = Ctrport(node)
        ctrport.configure(declarations())
        ctrport.start()
        yield street


@pytest.fixture(
    scope="module",
    params=[(policy, nf) for policy in ("ACCEPT", "DROP") for nf in (0, 1)],
    ids=lambda param: f"forward-{param[0]}-bridge-nf-{param[1]}".lower(),
)
def under(request: pytest.FixtureRequest, street: Street) -> Street:
    """The street under a policy of FORWARD, with and without iptables asked about bridged packets."""
    policy, nf = request.param
    street.node.run("iptables-nft", "-P", "FORWARD", policy)
    street.node.sysctl("net/bridge/bridge-nf-call-iptables", nf)
    street.node.run("conntrack", "-F")  # no flow that was let in under other conditions answers for these
    return street


every_network = pytest.mark.parametrize("network", NETWORKS)
every_protocol = pytest.mark.parametrize("protocol", KINDS)


def reply_of(under: Street, network: str, outcome: Outcome) -> Reply:
    assert isinstance(outcome, Reply), outcome
    assert (outcome.name, outcome.port) == (f"web-{network}", 80)
    return outcome


@every_network
@every_protocol
def test_the_lan_reaches_the_port_with_its_own_address(under: Street, network: str, protocol: str) -> None:
    outcome = probe(under.node.client, under.node.address, NETWORKS[network], protocol)
    assert reply_of(under, network, outcome).peer == under.node.client_address


@every_network
@every_protocol
def test_the_lan_reaches_the_port_at_the_nodes_other_address(under: Street, network: str, protocol: str) -> None:
    outcome = probe(under.node.client, SECOND, NETWORKS[network], protocol)
    assert reply_of(under, network, outcome).peer == under.node.client_address


@every_network
@every_protocol
def test_the_host_reaches_the_port_at_its_own_address(under: Street, network: str, protocol: str) -> None:
    reply_of(under, network, probe(under.node, under.node.address, NETWORKS[network], protocol))


@every_network
@every_protocol
def test_the_host_reaches_the_port_at_127_0_0_1(under: Street, network: str, protocol: str) -> None:
    reply_of(under, network, probe(under.node, "127.0.0.1", NETWORKS[network], protocol))


@every_network
@every_protocol
def test_a_container_reaches_its_own_published_port(under: Street, network: str, protocol: str) -> None:
    reply_of(under, network, probe(under.webs[network], under.node.address, NETWORKS[network], protocol))


@every_network
@every_protocol
def test_a_sibling_reaches_the_port(under: Street, network: str, protocol: str) -> None:
    reply_of(under, network, probe(under.siblings[network], under.node.address, NETWORKS[network], protocol))


@every_network
@every_protocol
def test_a_container_on_another_bridge_reaches_the_port_with_its_own_address(
    under: Street, network: str, protocol: str
) -> None:
    outcome = probe(under.stranger, under.node.address, NETWORKS[network], protocol)
    assert reply_of(under, network, outcome).peer == under.stranger.address


@every_protocol
def test_a_port_published_on_one_address_is_open_there_and_refused_on_the_others(under: Street, protocol: str) -> None:
    node, sibling = under.node, under.siblings["masq0"]
    for place in (node.client, node, sibling, under.stranger):
        reply = probe(place, SECOND, ON_SECOND, protocol)
        assert isinstance(reply, Reply), place.name
        assert reply.port == 82
        assert isinstance(probe(place, node.address, ON_SECOND, protocol), Refused), place.name
    assert isinstance(probe(node, "127.0.0.1", ON_SECOND, protocol), Refused)


@every_protocol
def test_a_port_published_on_127_0_0_1_is_open_to_the_host_alone(under: Street, protocol: str) -> None:
    node = under.node
    reply = probe(node, "127.0.0.1", ON_LOCALHOST, protocol)
    assert isinstance(reply, Reply)
    assert reply.port == 81
    for place in (node.client, node, under.webs["masq0"], under.siblings["masq0"], under.stranger):
        for address in (node.address, SECOND):
            assert isinstance(probe(place, address, ON_LOCALHOST, protocol), Refused), (place.name, address)


@every_protocol
def test_an_unpublished_port_of_the_node_is_refused(under: Street, protocol: str) -> None:
    node = under.node
    for place in (node.client, node, under.siblings["masq0"], under.stranger):
        assert isinstance(probe(place, node.address, UNPUBLISHED, protocol), Refused), place.name


@every_protocol
def test_the_host_is_refused_at_ipv6_localhost_at_once(under: Street, protocol: str) -> None:
    # So that a client that tries ::1 first goes on to 127.0.0.1.
    for port in (*NETWORKS.values(), ON_LOCALHOST):
        assert isinstance(probe(under.node, "::1", port, protocol), Refused)


def test_no_path_is_left_after_the_containers_ended() -> None:
    with Node() as node:
        node.run("iptables-nft", "-P", "FORWARD", "DROP")
        before = node.tables()
        street = build(node)
        ctrport = Ctrport(node)
        ctrport.configure(declarations())
        ctrport.start()
        here = (node.client, node, street.stranger)
        for port in NETWORKS.values():
            assert all(probe(place, node.address, port, protocol) for place in here for protocol in KINDS)
        for container in (*street.webs.values(), *street.siblings.values()):
            node.delete(container)
        for spec in (*(f"{port}:80/udp" for port in NETWORKS.values()), f"{SECOND}:{ON_SECOND}:82/udp"):
            ctrport.wait_for(spec, "waiting")
        for place in here:
            for protocol in KINDS:
                for port in NETWORKS.values():
                    assert isinstance(probe(place, node.address, port, protocol), Refused), (place.name, port)
                assert isinstance(probe(place, SECOND, ON_SECOND, protocol), Refused), place.name
        for port in (*NETWORKS.values(), ON_LOCALHOST):
            assert isinstance(probe(node, "127.0.0.1", port, "tcp"), Refused)
        node.delete(street.stranger)
        assert ctrport.stop() == 0
        ctrport.run("clean")
        assert node.tables() == before


# 127.0.0.0/8: from the host alone. (CVE-2020-8558)


def remove_guard(node: Node) -> None:
    for rule in rules(node, "raw", "PREROUTING"):
        # As a shell reads it: the comment is quoted.
        node.script(f"iptables-nft -t raw {rule.replace('-A', '-D', 1)}")


def make_jump_naive(node: Node) -> None:
    """Replace the jump to DOCKER with the one that does not leave 127.0.0.0/8 alone."""
    [jump] = [rule for rule in rules(node, "nat", "PREROUTING") if "-j DOCKER" in rule]
    node.script(f"iptables-nft -t nat {jump.replace('-A', '-D', 1)}")
    node.run("iptables-nft", "-t", "nat", "-A", "PREROUTING", "-m", "addrtype", "--dst-type", "LOCAL", "-j", "DOCKER")


@pytest.mark.parametrize("localhost", ["true", "false"])
def test_the_lan_gets_nowhere_with_a_route_to_127_0_0_1(node: Node, ctrport: Ctrport, localhost: str) -> None:
    web = node.start("web")
    serve(web, 80, 81)
    ctrport.configure(
        f"firewall: {{localhost: {localhost}}}\n"
        "publish:\n"
        "  - match: {container: web}\n"
        '    ports: ["8080:80", "8080:80/udp", "127.0.0.1:8081:81", "127.0.0.1:8081:81/udp"]\n'
    )
    ctrport.start()
    ports = (8080, 8081) if localhost == "true" else (8080,)
    with loopback_goes_to(node.address, node.client), ctrport.frozen():  # or it would mend what is done here
        for port in ports:
            for protocol in KINDS:
                assert isinstance(probe(node.client, "127.0.0.1", port, protocol, timeout=0.2), TimedOut)
        # Either rule alone is enough; the attack itself is one that works where there is neither.
        if localhost == "true":
            assert len(rules(node, "raw", "PREROUTING")) == 2
            remove_guard(node)
            assert isinstance(probe(node.client, "127.0.0.1", 8080, "tcp", timeout=0.2), TimedOut)
        make_jump_naive(node)
        for port in ports:
            # A flow of UDP that was tracked before would not meet the new rule, so each probe is a new one.
            assert all(isinstance(probe(node.client, "127.0.0.1", port, protocol), Reply) for protocol in KINDS)


def test_the_guard_alone_keeps_the_lan_from_127_0_0_1(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web")
    serve(web, 81)
    ctrport.configure('publish:\n  - match: {container: web}\n    ports: ["127.0.0.1:8081:81"]\n')
    ctrport.start()
    with loopback_goes_to(node.address, node.client), ctrport.frozen():
        make_jump_naive(node)
        assert isinstance(probe(node.client, "127.0.0.1", 8081, "tcp", timeout=0.3), TimedOut)
        remove_guard(node)
        assert isinstance(probe(node.client, "127.0.0.1", 8081, "tcp"), Reply)


@pytest.mark.parametrize("nf", [0, 1])
def test_a_container_does_not_reach_what_the_host_serves_on_127_0_0_1(node: Node, ctrport: Ctrport, nf: int) -> None:
    node.sysctl("net/bridge/bridge-nf-call-iptables", nf)
    web, thief = node.start("web"), node.start("thief")
    serve(web, 80)
    serve(node, 7000, addresses=["127.0.0.1"], name="private")
    ctrport.configure('publish:\n  - match: {container: web}\n    ports: ["8080:80"]\n')
    ctrport.start()
    with loopback_goes_to("172.17.0.1", thief), ctrport.frozen():
        for protocol in KINDS:
            assert isinstance(probe(thief, "127.0.0.1", 7000, protocol, timeout=0.2), TimedOut)
        remove_guard(node)
        for protocol in KINDS:
            assert isinstance(probe(thief, "127.0.0.1", 7000, protocol), Reply)


def test_a_container_does_not_pass_for_the_host_with_a_source_in_127(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web")
    serve(web, 80)
    ctrport.configure('publish:\n  - match: {container: web}\n    ports: ["8080:80"]\n')
    ctrport.start()
    web.run("sh", "-ec", "echo 1 >/proc/sys/net/ipv4/conf/eth0/route_localnet")
    trusting = Server(node, 7000, kind=socket.SOCK_DGRAM, address="172.17.0.1")

    def spoof() -> list[str]:
        with web.socket(socket.SOCK_DGRAM) as spoofer:
            spoofer.bind(("127.0.0.5", 0))  # not 127.0.0.1: the kernel itself refuses what is an address of the host
            spoofer.sendto(b"I am you\n", ("172.17.0.1", 7000))
        # The same veth keeps the order: once this one is answered, the one before was delivered or dropped.
        assert isinstance(probe_udp(web, "172.17.0.1", 7000), Reply)
        return [visit.peer for visit in trusting.visits]

    assert spoof() == [web.address]
    with ctrport.frozen():
        remove_guard(node)
        assert spoof() == [web.address, "127.0.0.5", web.address]


def test_without_localhost_127_0_0_1_is_refused_and_all_else_works(node: Node, ctrport: Ctrport) -> None:
    before = node.tables()
    web, sibling = node.start("web"), node.start("sibling")
    serve(web, 80, 81)
    ctrport.configure(
        "firewall: {localhost: false}\n"
        "publish:\n"
        "  - match: {container: web}\n"
        '    ports: ["8080:80", "8080:80/udp", "127.0.0.1:8081:81"]\n'
    )
    ctrport.start()
    assert ctrport.publication("127.0.0.1:8081:81/tcp")["state"] == "unsupported"
    assert "firewall.localhost" in ctrport.publication("127.0.0.1:8081:81/tcp")["reason"]
    for protocol in KINDS:
        # What reserves the host port refuses tcp, and drops udp.
        meets_nobody = Refused if protocol == "tcp" else TimedOut
        assert isinstance(probe(node, "127.0.0.1", 8080, protocol, timeout=0.3), meets_nobody)
        for place in (node.client, node, web, sibling):
            assert isinstance(probe(place, node.address, 8080, protocol), Reply), place.name
    assert isinstance(probe(node, "127.0.0.1", 8081, "tcp"), Refused)
    assert isinstance(probe(node.client, node.address, 8081, "tcp"), Refused)
    assert "1" not in localnet(node).values()
    assert rules(node, "raw", "PREROUTING") == []
    node.delete(web)
    eventually(lambda: isinstance(probe(node, node.address, 8080, "tcp"), Refused), what="the port being closed")
    node.delete(sibling)
    assert ctrport.stop() == 0
    ctrport.run("clean")
    assert node.tables() == before


def localnet(node: Node) -> dict[str, str]:
    """Return route_localnet of every device, and of "all" and "default"."""
    lines = node.script("cd /proc/sys/net/ipv4/conf; grep . */route_localnet").split()
    return {line.partition("/")[0]: line.partition(":")[2] for line in lines}


TWO_WEBS = 'publish:\n  - match: {container: web}\n    ports: ["8080:80"]\n  - match: {container: shop}\n'
TWO_WEBS += '    ports: ["127.0.0.1:8081:80"]\n'


def test_route_localnet_is_on_for_that_device_alone_until_the_last_mapping_leaves(node: Node, ctrport: Ctrport) -> None:
    before = node.tables()
    other = node.add_network("br1", subnet="172.18.0.0/16")
    ctrport.configure(TWO_WEBS)
    ctrport.start()
    web, shop, bystander = node.start("web"), node.start("shop"), node.start("bystander", network=other)
    serve(web, 80)
    serve(shop, 80)
    for port in (8080, 8081):
        eventually(lambda port=port: probe(node, "127.0.0.1", port, "tcp"), what=f"{port} being open")  # type: ignore[misc]
    assert [device for device, on in localnet(node).items() if on == "1"] == ["docker0"]
    ctrport.stop()
    ctrport.start()  # it is the rules that remember who set it, not the daemon
    node.delete(web)
    eventually(lambda: isinstance(probe(node, "127.0.0.1", 8080, "tcp"), Refused), what="the first being closed")
    assert isinstance(probe(node, "127.0.0.1", 8081, "tcp"), Reply)
    assert localnet(node)["docker0"] == "1"
    node.delete(shop)
    eventually(lambda: isinstance(probe(node, "127.0.0.1", 8081, "tcp"), Refused), what="the last being closed")
    eventually(lambda: rules(node, "raw", "PREROUTING") == [], what="the guard being gone")
    assert "1" not in localnet(node).values()
    node.delete(bystander)
    assert ctrport.stop() == 0
    ctrport.run("clean")
    assert node.tables() == before


def test_clean_puts_route_localnet_back_and_takes_the_guard_away(node: Node, ctrport: Ctrport) -> None:
    before = node.tables()
    web = node.start("web")
    serve(web, 80)
    ctrport.configure(TWO_WEBS)
    ctrport.start()
    assert ctrport.stop() == 0
    assert isinstance(probe(node, "127.0.0.1", 8080, "tcp"), Reply)
    ctrport.run("clean")
    assert "1" not in localnet(node).values()
    for place, address in ((node, "127.0.0.1"), (node, node.address), (node.client, node.address)):
        assert isinstance(probe(place, address, 8080, "tcp"), Refused)
    node.delete(web)
    assert node.tables() == before


@pytest.mark.parametrize("end", ["the container's end", "clean"])
def test_route_localnet_that_somebody_else_set_is_left_on(node: Node, ctrport: Ctrport, end: str) -> None:
    before = node.tables()
    web = node.start("web")
    serve(web, 80)
    node.sysctl("net/ipv4/conf/docker0/route_localnet", 1)
    ctrport.configure(TWO_WEBS)
    ctrport.start()
    ctrport.stop()
    ctrport.start()
    assert isinstance(probe(node, "127.0.0.1", 8080, "tcp"), Reply)
    if end == "clean":
        ctrport.stop()
        ctrport.run("clean")
    node.delete(web)
    eventually(lambda: isinstance(probe(node, "127.0.0.1", 8080, "tcp"), Refused), what="the port being closed")
    eventually(lambda: rules(node, "raw", "PREROUTING") == [], what="the guard being gone")
    assert [device for device, on in localnet(node).items() if on == "1"] == ["docker0"]
    if end != "clean":
        ctrport.stop()
        ctrport.run("clean")
    assert node.tables() == before
    assert localnet(node)["docker0"] == "1"


@pytest.mark.parametrize("end", ["the container's end", "clean"])
def test_route_localnet_is_left_on_where_no_rule_of_ours_says_who_set_it(
    node: Node, ctrport: Ctrport, end: str
) -> None:
    web = node.start("web")
    ctrport.configure(TWO_WEBS)
    ctrport.start()
    ctrport.stop()
    # The record is gone with its rule: by now it may be anybody's, such as the portmap plugin's, which sets it too.
    node.run("iptables-nft", "-t", "nat", "-F", "DOCKER-POSTROUTING")
    if end == "clean":
        ctrport.run("clean")
    else:
        ctrport.start()
        node.delete(web)
        eventually(lambda: rules(node, "raw", "PREROUTING") == [], what="the guard being gone")
        assert ctrport.stop() == 0
        ctrport.run("clean")
    assert [device for device, on in localnet(node).items() if on == "1"] == ["docker0"]
