"""Bridges that are run the Docker way: out, masqueraded; in, by published ports alone; and apart from one another."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from ipaddress import ip_interface

import pytest

from embedded.container import Container
from embedded.host import Place
from embedded.network import Network
from embedded.node import Node
from embedded.traffic import BOTH_FAMILIES, Outcome, Refused, Reply, TimedOut, eventually, probe_tcp, serve
from tests.node.daemon import ROOT, Ctrport, wait_open

NETWORKS = "networks: [{bridge: docker0}, {bridge: br1}]\n"
PUBLISH = 'publish:\n  - match: {container: web}\n    ports: ["8080:80"]\n'
#: Where the containers are, as the LAN client routes them.
INSIDE = ("172.16.0.0/12", "fd00::/16")


class Street:
    """Two networks without masquerading of their own: web and db on docker0, api on br1, other on br2, unnamed."""

    def __init__(self, node: Node, policy: str, backend: str) -> None:
        self.node = node
        self.backend = backend
        for program in ("iptables-nft", "ip6tables-nft"):
            node.run(program, "-P", "FORWARD", policy)
        for name, number in (("docker0", 17), ("br1", 18), ("br2", 19)):
            node.add_network(name, subnet=f"172.{number}.0.0/16", subnet6=f"fd00:{number}::/64", ip_masq=False)
        self.web, self.db = self._start("web", node.networks[0]), self._start("db", node.networks[0])
        self.api, self.other = self._start("api", node.networks[1]), self._start("other", node.networks[2])
        for subnet in INSIDE:
            node.client.run("ip", "route", "add", subnet, "via", node.address6 if ":" in subnet else node.address)

    def _start(self, name: str, network: Network) -> Container:
        container = self.node.start(name, network=network)
        serve(container, 80, 81, kinds=[socket.SOCK_STREAM], addresses=BOTH_FAMILIES)
        return container

    def own(self, container: Container, family: int) -> str:
        return next(str(each.ip) for each in map(ip_interface, container.interfaces) if each.version == family)

    def node_at(self, family: int) -> str:
        return self.node.address if family == 4 else self.node.address6

    def client_at(self, family: int) -> str:
        return self.node.client_address if family == 4 else self.node.client_address6


@pytest.fixture(scope="module", params=["ACCEPT iptables-nft", "DROP iptables-nft", "ACCEPT nftables", "DROP nftables"])
def street(request: pytest.FixtureRequest) -> Iterator[Street]:
    with Node() as node:
        node.start_containerd()
        policy, backend = request.param.split(" ")
        street = Street(node, policy, backend)
        serve(node.client, 90, kinds=[socket.SOCK_STREAM], addresses=BOTH_FAMILIES)
        ctrport = Ctrport(node)
        ctrport.configure(f"firewall: {{backend: {backend}}}\n{NETWORKS}{PUBLISH}")
        ctrport.start()
        wait_open(node, 8080, "web")
        yield street


def probe(place: Place, address: str, port: int) -> Outcome:
    """Ask where perhaps no answer comes: one that does takes a hundredth of the time."""
    return probe_tcp(place, address, port, timeout=0.2)


BOTH = pytest.mark.parametrize("family", [4, 6])


@BOTH
def test_a_container_gets_out_with_the_nodes_address(street: Street, family: int) -> None:
    out = probe_tcp(street.web, street.client_at(family), 90)
    assert isinstance(out, Reply), out
    assert out.text.split()[1] == street.node_at(family)


@BOTH
def test_containers_of_one_network_reach_one_another(street: Street, family: int) -> None:
    reply = probe_tcp(street.db, street.own(street.web, family), 81)
    assert isinstance(reply, Reply), reply
    assert reply.text.split()[1] == street.own(street.db, family)


@BOTH
def test_networks_reach_each_others_published_ports_and_nothing_else(street: Street, family: int) -> None:
    for port in (80, 81):
        assert isinstance(probe(street.api, street.own(street.web, family), port), TimedOut)
        assert isinstance(probe(street.web, street.own(street.api, family), port), TimedOut)
    assert isinstance(probe_tcp(street.api, street.node_at(family), 8080), Reply)


@BOTH
def test_what_is_not_published_is_not_reached_from_outside_under_any_policy(street: Street, family: int) -> None:
    for port in (80, 81):
        assert isinstance(probe(street.node.client, street.own(street.web, family), port), TimedOut)
    reply = probe_tcp(street.node.client, street.node_at(family), 8080)
    assert isinstance(reply, Reply), reply
    assert reply.text.split()[1] == street.client_at(family)


@BOTH
def test_the_node_itself_reaches_its_containers(street: Street, family: int) -> None:
    assert isinstance(probe_tcp(street.node, street.own(street.web, family), 81), Reply)


@BOTH
def test_nothing_happens_to_a_bridge_that_is_not_named(street: Street, family: int) -> None:
    policy = street.node.run("iptables-nft", "-S", "FORWARD").stdout.splitlines()[0].split()[2]
    expected = Reply if policy == "ACCEPT" else TimedOut
    assert isinstance(probe(street.node.client, street.own(street.other, family), 81), expected)
    assert "br2" not in street.node.run("nft", "list", "ruleset").stdout


def test_the_chains_are_dockers(street: Street) -> None:
    if street.backend == "nftables":
        bridges = street.node.run("nft", "list", "set", "ip", "ctrport", "bridges").stdout
        assert '"docker0"' in bridges
        assert '"br1"' in bridges
        return
    for program in ("iptables-nft", "ip6tables-nft"):
        listed = street.node.run(program, "-S", "DOCKER-FORWARD").stdout
        assert listed.index("-j DOCKER-ISOLATION-STAGE-1") < listed.index("-i br1 -o br1")
        stages = [street.node.run(program, "-S", f"DOCKER-ISOLATION-STAGE-{number}").stdout for number in (1, 2)]
        assert "-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0" in stages[0]
        assert "-A DOCKER-ISOLATION-STAGE-2 -o br1" in stages[1]
        assert all(stage.splitlines()[-1].endswith("-j RETURN") for stage in stages)
        assert street.node.run(program, "-S", "FORWARD").stdout.splitlines()[1].endswith("-j DOCKER-USER")


# What comes and goes


@pytest.fixture
def plain() -> Iterator[Node]:
    """A node with containerd and two networks, of which no container has made the bridges yet."""
    with Node() as node:
        node.start_containerd()
        node.add_network("docker0", ip_masq=False)
        node.add_network("br1", subnet="172.18.0.0/16", ip_masq=False)
        yield node


def networks(ctrport: Ctrport) -> dict[str, tuple[list[str], str]]:
    return {each["bridge"]: (each["subnets"], each["reason"]) for each in ctrport.status()["networks"]}


def test_a_bridge_is_taken_up_as_it_comes_and_given_up_with_the_configuration(plain: Node) -> None:
    ctrport = Ctrport(plain)
    ctrport.configure("networks: [{bridge: docker0}, {bridge: eth0}]\n" + PUBLISH)
    ctrport.start()
    assert networks(ctrport) == {
        "docker0": ([], "there is no bridge docker0 yet"),
        "eth0": ([], "eth0 is a veth device and no bridge: nothing is done to it"),
    }
    assert "eth0" not in plain.tables()
    assert "network eth0: eth0 is a veth device and no bridge" in ctrport.messages
    web = plain.start("web")
    serve(web, 80, kinds=[socket.SOCK_STREAM])
    wait_open(plain, 8080, "web")
    eventually(lambda: networks(ctrport)["docker0"] == (["172.17.0.0/16"], ""), what="docker0 being run")
    eventually(lambda: "-s 172.17.0.0/16 ! -o docker0" in plain.tables(), what="its masquerading")
    plain.run("iptables-nft", "-A", "DOCKER-USER", "-s", "203.0.113.7", "-j", "DROP")
    shown = ctrport.run("ps").stderr
    assert "eth0 is a veth device and no bridge" in shown

    # DOCKER-USER is the operator's: it outlives a restart, a change and all that is ours.
    assert ctrport.stop() == 0
    ctrport.configure(PUBLISH)
    assert "- -A DOCKER-ISOLATION-STAGE-2 -o docker0" not in ctrport.run("plan", check=False).stdout
    ctrport.start()
    eventually(lambda: "ISOLATION" not in plain.tables(), what="the chains of isolation being gone")
    tables = plain.tables()
    assert "! -o docker0" not in tables
    assert "-A DOCKER-USER -s 203.0.113.7/32 -j DROP" in tables
    assert ctrport.stop() == 0
    ctrport.run("clean")
    assert "ctrport" not in plain.tables()
    assert "-A DOCKER-USER -s 203.0.113.7/32 -j DROP" in plain.tables()


def test_clean_removes_what_networks_made(plain: Node) -> None:
    plain.start("api", network=plain.networks[1])
    plain.start("web")
    before = plain.tables()
    ctrport = Ctrport(plain)
    ctrport.configure(NETWORKS)
    ctrport.start()
    assert "DOCKER-ISOLATION-STAGE-1" in plain.tables()
    assert ctrport.stop() == 0
    ctrport.run("clean")
    assert plain.tables() == before


# As the README has it


def test_the_conflist_and_one_entry_are_what_docker_run_p_was(plain: Node) -> None:
    conflist = ROOT / "deploy" / "cni" / "10-docker0.conflist"
    network = plain.networks[0]
    for written in plain.path(network.directory).iterdir():
        written.unlink()
    plain.path(f"{network.directory}/10-docker0.conflist").write_text(conflist.read_text())
    plugin = json.loads(conflist.read_text())["plugins"][0]
    ctrport = Ctrport(plain)
    ctrport.configure("networks: [{bridge: docker0}]\n" + PUBLISH)
    ctrport.start()
    web = plain.start("web")
    serve(plain.client, 90, addresses=BOTH_FAMILIES)
    serve(web, 80, 81, addresses=BOTH_FAMILIES)
    wait_open(plain, 8080, "web")
    wait_open(plain, 8080, "web", address=plain.address6)
    assert isinstance(probe_tcp(plain, "127.0.0.1", 8080), Reply)
    assert isinstance(probe_tcp(web, plain.address, 8080), Reply)
    eventually(lambda: "! -o docker0" in plain.tables(), what="docker0 being run")
    out = probe_tcp(web, plain.client_address, 90)
    assert isinstance(out, Reply), out
    assert out.text.split()[1] == plain.address
    plain.client.run("ip", "route", "add", "172.16.0.0/12", "via", plain.address)
    assert isinstance(probe(plain.client, str(web.address), 81), TimedOut)
    assert plugin["ipMasq"] is False
    plain.delete(web)
    eventually(lambda: isinstance(probe(plain.client, plain.address, 8080), Refused), what="the port being closed")
