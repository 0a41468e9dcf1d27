"""Beside other people's rules, with real packets: theirs keep their effect, and ours work all the same."""

from __future__ import annotations

import pytest

from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, TimedOut, eventually, probe_tcp, probe_udp, serve
from tests.node.daemon import Ctrport

WEB = 'publish:\n  - match: {container: web}\n    ports: ["8080:80", "8080:80/udp"]\n'
#: What kube-proxy has in FORWARD.
KUBE_FORWARD = """
iptables-nft -N KUBE-FORWARD
iptables-nft -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
iptables-nft -A FORWARD -j KUBE-FORWARD
"""


def forward(node: Node) -> list[str]:
    """Return where the rules of FORWARD go to, in order."""
    lines = node.run("iptables-nft", "-S", "FORWARD").stdout.splitlines()
    return [line.rpartition(" -j ")[2] for line in lines if line.startswith("-A ")]


def leave(node: Node, ctrport: Ctrport) -> None:
    assert ctrport.stop() == 0
    ctrport.run("clean")


def test_behind_kube_proxy_a_policy_is_asked_first(node: Node, ctrport: Ctrport) -> None:
    node.script(KUBE_FORWARD)
    before = node.tables()
    web = node.start("web")
    Server(web, 80)
    ctrport.configure(WEB)
    ctrport.start()
    assert forward(node) == ["DOCKER-USER", "KUBE-FORWARD", "DOCKER-FORWARD"]
    assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)
    node.run("iptables-nft", "-A", "KUBE-FORWARD", "-p", "tcp", "-d", str(web.address), "--dport", "80", "-j", "DROP")
    assert isinstance(probe_tcp(node.client, node.address, 8080, timeout=0.3), TimedOut)
    node.run("iptables-nft", "-D", "KUBE-FORWARD", "-p", "tcp", "-d", str(web.address), "--dport", "80", "-j", "DROP")
    node.run("iptables-nft", "-P", "FORWARD", "DROP")
    assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)
    node.run("iptables-nft", "-P", "FORWARD", "ACCEPT")
    node.delete(web)
    eventually(lambda: isinstance(probe_tcp(node.client, node.address, 8080), Refused), what="the port being closed")
    leave(node, ctrport)
    assert node.tables() == before


def test_without_kube_proxy_what_is_published_is_asked_first(node: Node, ctrport: Ctrport) -> None:
    # A refusal such as firewall front ends leave at the end of FORWARD.
    node.run("iptables-nft", "-A", "FORWARD", "-j", "REJECT")
    before = node.tables()
    web = node.start("web")
    serve(web, 80, 81)
    ctrport.configure(WEB)
    ctrport.start()
    assert forward(node)[:2] == ["DOCKER-USER", "DOCKER-FORWARD"]
    for probe in (probe_tcp, probe_udp):
        assert isinstance(probe(node.client, node.address, 8080), Reply)
        assert isinstance(probe(node.client, str(web.address), 81), Refused)
    node.delete(web)
    eventually(lambda: isinstance(probe_tcp(node.client, node.address, 8080), Refused), what="the port being closed")
    leave(node, ctrport)
    assert node.tables() == before


@pytest.mark.parametrize("there", ["before", "after"])
def test_a_drop_in_docker_user_refuses_what_is_published(node: Node, ctrport: Ctrport, there: str) -> None:
    drop = "DOCKER-USER -p tcp -m conntrack --ctorigdstport 8080 --ctdir ORIGINAL -j DROP"
    if there == "before":
        node.script(f"iptables-nft -N DOCKER-USER; iptables-nft -A {drop}")
    before = node.tables()
    web = node.start("web")
    Server(web, 80)
    ctrport.configure('publish:\n  - match: {container: web}\n    ports: ["8080:80", "8090:80"]\n')
    ctrport.start()
    if there == "after":
        assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)
        node.script(f"iptables-nft -A {drop}")
    assert isinstance(probe_tcp(node.client, node.address, 8080, timeout=0.3), TimedOut)
    assert isinstance(probe_tcp(node.client, node.address, 8090), Reply)
    # The host's own packets are not forwarded, so nobody in FORWARD is asked about them.
    assert isinstance(probe_tcp(node, node.address, 8080), Reply)
    ctrport.stop()
    ctrport.start()
    assert isinstance(probe_tcp(node.client, node.address, 8080, timeout=0.3), TimedOut)
    node.delete(web)
    eventually(lambda: isinstance(probe_tcp(node.client, node.address, 8090), Refused), what="the port being closed")
    leave(node, ctrport)
    if there == "after":  # the operator's chain is the operator's: what is in it stays, and the chain with it
        assert f"-A {drop}" in node.tables()
        node.script(f"iptables-nft -D {drop}; iptables-nft -X DOCKER-USER")
    assert node.tables() == before


def kube_services(node: Node, address: str | None, port: int = 8000) -> None:
    """Let a service be reached as kube-proxy does: at its own address and at a port of every node."""
    lines = ["iptables-nft -t nat -N KUBE-SERVICES", "iptables-nft -t nat -I PREROUTING -j KUBE-SERVICES"]
    for protocol in ("tcp", "udp"):
        for match in (
            f"-d 10.96.0.10/32 -p {protocol} --dport {port}",
            f"-m addrtype --dst-type LOCAL -p {protocol} --dport 30080",
        ):
            lines.append(f"iptables-nft -t nat -A KUBE-SERVICES {match} -j DNAT --to-destination {address}:80")
    node.script("\n".join(lines))


def test_a_service_of_others_to_the_same_container_is_not_let_in(node: Node, ctrport: Ctrport) -> None:
    before = node.tables()
    node.client.run("ip", "route", "add", "10.96.0.0/16", "via", node.address)
    web = node.start("web")
    serve(web, 80)
    kube_services(node, web.address)
    ctrport.configure(WEB)
    ctrport.start()
    for probe in (probe_tcp, probe_udp):
        assert isinstance(probe(node.client, node.address, 30080), Reply)  # by the policy, which is ACCEPT still
    node.run("iptables-nft", "-P", "FORWARD", "DROP")
    for probe in (probe_tcp, probe_udp):
        assert isinstance(probe(node.client, node.address, 8080), Reply)
        assert isinstance(probe(node.client, node.address, 30080, timeout=0.2), TimedOut)
        assert isinstance(probe(node.client, "10.96.0.10", 8000, timeout=0.2), TimedOut)
    node.run("iptables-nft", "-P", "FORWARD", "ACCEPT")
    node.script(
        "iptables-nft -t nat -D PREROUTING -j KUBE-SERVICES\n"
        "iptables-nft -t nat -F KUBE-SERVICES\n"
        "iptables-nft -t nat -X KUBE-SERVICES\n"
    )
    node.delete(web)
    eventually(lambda: isinstance(probe_tcp(node.client, node.address, 8080), Refused), what="the port being closed")
    leave(node, ctrport)
    assert node.tables() == before


def test_a_sibling_keeps_its_address_towards_a_service_of_others(node: Node, ctrport: Ctrport) -> None:
    node.sysctl("net/bridge/bridge-nf-call-iptables", 1)  # or the answers would go past the service's translation
    web, sibling = node.start("web"), node.start("sibling")
    serve(web, 80)
    kube_services(node, web.address)
    ctrport.configure(WEB)
    ctrport.start()
    for probe in (probe_tcp, probe_udp):
        for address, port in (("10.96.0.10", 8000), (node.address, 30080)):
            reply = probe(sibling, address, port)
            assert isinstance(reply, Reply), (address, port)
            assert reply.peer == sibling.address
        reply = probe(sibling, node.address, 8080)  # where ours is needed, it is there
        assert isinstance(reply, Reply)
        assert reply.peer == "172.17.0.1"


# What marks a flow as ours is its port before translation, and a service may have the number of a published port.
def test_a_service_of_others_with_the_number_of_a_published_port_is_not_let_in(node: Node, ctrport: Ctrport) -> None:
    node.client.run("ip", "route", "add", "10.96.0.0/16", "via", node.address)
    web = node.start("web")
    Server(web, 80)
    kube_services(node, web.address, port=8080)
    ctrport.configure(WEB)
    ctrport.start()
    node.run("iptables-nft", "-P", "FORWARD", "DROP")
    assert isinstance(probe_tcp(node.client, "10.96.0.10", 8080, timeout=0.3), TimedOut)


def test_a_sibling_keeps_its_address_towards_a_service_with_that_number(node: Node, ctrport: Ctrport) -> None:
    node.sysctl("net/bridge/bridge-nf-call-iptables", 1)
    web, sibling = node.start("web"), node.start("sibling")
    Server(web, 80)
    kube_services(node, web.address, port=8080)
    ctrport.configure(WEB)
    ctrport.start()
    reply = probe_tcp(sibling, "10.96.0.10", 8080)
    assert isinstance(reply, Reply)
    assert reply.peer == sibling.address
