"""Beside kube-proxy, CNI's portmap plugin and Cilium: what is theirs works as before and is not touched, and is named.

kube-proxy's tables are loaded as it writes them: rulesets/ has them. The plugin is the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import portmap
from ctrport.lines import pair
from embedded.container import Container
from embedded.node import Node
from embedded.tables import comparable
from embedded.traffic import Outcome, Reply, Server, eventually, probe_tcp
from tests.node.daemon import Ctrport, publish, wait_open

RULESETS = Path(__file__).parent / "rulesets"
CLUSTER_IP, IDLE_CLUSTER_IP = "10.96.0.80", "10.96.0.81"
NODE_PORT, IDLE_NODE_PORT = 30080, 30081


class Stage(Node):
    """A node without a rule of anybody's, on which these three run and serve port 80."""

    service: Container
    web: Container
    sibling: Container


@pytest.fixture(scope="module")
def shared() -> Iterator[Stage]:
    with Stage() as node:
        node.start_containerd()
        node.add_network("docker0", ip_masq=False)
        node.service, node.web, node.sibling = (node.start(name) for name in ("service", "web", "sibling"))
        for container in (node.service, node.web, node.sibling):
            Server(container, 80)
        node.client.run("ip", "route", "add", "10.96.0.0/16", "via", node.address)
        node.sysctl("net/ipv4/icmp_ratelimit", 0)  # or a client is told once a second that a port is closed
        # Or the answer of a container to its sibling would go past the Service's translation.
        node.sysctl("net/bridge/bridge-nf-call-iptables", 1)
        yield node


@pytest.fixture
def node(shared: Stage) -> Iterator[Stage]:
    """The shared node, without a rule again afterwards."""
    yield shared
    shared.run("nft", "flush", "ruleset")
    shared.run("conntrack", "-F")


@pytest.fixture
def ctrport(node: Stage) -> Iterator[Ctrport]:
    ctrport = Ctrport(node)
    yield ctrport
    ctrport.close()


def load(node: Stage, mode: str) -> None:
    """Have the tables that kube-proxy makes in that mode, with ``service`` as the one endpoint."""
    file = RULESETS / {"iptables": "kube-proxy.iptables", "nftables": "kube-proxy.nft"}[mode]
    text = file.read_text().replace("@ENDPOINT@", str(node.service.address)).replace("@NODE@", node.address)
    command = {"iptables": ("iptables-nft-restore", "--noflush"), "nftables": ("nft", "-f", "-")}[mode]
    node.run(*command, input=text)


def theirs(node: Stage) -> list[str]:
    """Return all rules and chains in the kernel but for ctrport's."""
    found: list[str] = []
    for program in ("iptables", "ip6tables"):
        saved = node.run(f"{program}-nft-save").stdout.splitlines(keepends=True)
        others = [line for line in saved if '--comment "ctrport ' not in line and not line.startswith(":DOCKER")]
        found += comparable("".join(others), program)
    if "table ip kube-proxy" in node.run("nft", "list", "tables").stdout:
        found += node.run("nft", "list", "table", "ip", "kube-proxy").stdout.splitlines()
    return found


def jumps(node: Stage, table: str, chain: str) -> list[str]:
    lines = node.run("iptables-nft", "-t", table, "-S", chain).stdout.splitlines()
    return [line.rpartition(" -j ")[2] for line in lines if line.startswith("-A ")]


def said(outcome: Outcome) -> tuple[str, ...]:
    """Return who answered and whom it took the client for, or how it failed."""
    return (outcome.name, outcome.peer) if isinstance(outcome, Reply) else (type(outcome).__name__,)


def services(node: Stage) -> dict[str, tuple[str, ...]]:
    """Try kube-proxy's Services from everywhere."""
    places = {"client": node.client, "node": node, "sibling": node.sibling, "service": node.service}
    targets = [(CLUSTER_IP, 80), (node.address, NODE_PORT), (IDLE_CLUSTER_IP, 80), (node.address, IDLE_NODE_PORT)]
    return {
        f"{name} to {address}:{port}": said(probe_tcp(place, address, port, timeout=1))
        for name, place in places.items()
        for address, port in targets
    }


def published(node: Stage, port: int, name: str) -> None:
    """Check that a published port is answered, whoever asks, and that the client on the LAN keeps its address."""
    assert said(probe_tcp(node.client, node.address, port)) == (name, node.client_address)
    for place in (node, node.sibling, node.web, node.service):
        assert said(probe_tcp(place, node.address, port))[0] == name, place.name
    assert said(probe_tcp(node, "127.0.0.1", port))[0] == name


def look_again(node: Stage) -> None:
    """Have the node looked at now, and not at the next tick."""
    node.add_address("198.51.100.77")
    node.run("ip", "address", "delete", "198.51.100.77/24", "dev", "eth0")


ORDER = {
    "iptables": {
        ("nat", "PREROUTING"): ["KUBE-SERVICES", "DOCKER"],
        ("nat", "OUTPUT"): ["KUBE-SERVICES", "DOCKER"],
        ("nat", "POSTROUTING"): ["DOCKER-POSTROUTING", "KUBE-POSTROUTING"],
        ("filter", "FORWARD"): [
            *("DOCKER-USER", "KUBE-PROXY-FIREWALL", "KUBE-FORWARD", "KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES"),
            "DOCKER-FORWARD",
        ],
    },
    # No chain of kube-proxy's is in there.
    "nftables": {
        ("nat", "PREROUTING"): ["DOCKER"],
        ("nat", "OUTPUT"): ["DOCKER"],
        ("nat", "POSTROUTING"): ["DOCKER-POSTROUTING"],
        ("filter", "FORWARD"): ["DOCKER-USER", "DOCKER-FORWARD"],
    },
}
HOLDER = {"iptables": "KUBE-NODEPORTS", "nftables": "kube-proxy"}
every_backend = pytest.mark.parametrize("backend", ["iptables-nft", "nftables"])


def settings(backend: str) -> str:
    return f"firewall: {{backend: {backend}}}"


@every_backend
@pytest.mark.parametrize("mode", ORDER)
def test_beside_kube_proxy_services_and_published_ports_work(
    node: Stage, ctrport: Ctrport, mode: str, backend: str
) -> None:
    load(node, mode)
    tables, found = theirs(node), services(node)
    # The tables do what they are for, or the rest would prove nothing.
    for name in ("client", "node", "sibling", "service"):
        for target in (f"{CLUSTER_IP}:80", f"{node.address}:{NODE_PORT}"):
            assert found[f"{name} to {target}"][0] == "service", found
        for target in (f"{IDLE_CLUSTER_IP}:80", f"{node.address}:{IDLE_NODE_PORT}"):
            assert found[f"{name} to {target}"] == ("Refused",), found

    web, service = "{container: web}", "{container: service}"
    mappings = ((web, "8080:80"), (web, f"{NODE_PORT}:80"), (service, "8081:80"))
    ctrport.configure(publish(*mappings, settings=settings(backend)))
    for _ in ("started", "restarted"):
        ctrport.start()
        reason = ctrport.wait_for(f"{NODE_PORT}:80/tcp", "conflict")["reason"]
        assert reason == f"host port {NODE_PORT}/tcp is held by {HOLDER[mode]} (shop/web:http)"
        published(node, 8080, "web")
        published(node, 8081, "service")
        assert services(node) == found
        assert theirs(node) == tables
        if backend == "iptables-nft":
            assert {place: jumps(node, *place) for place in ORDER[mode]} == ORDER[mode]
        assert ctrport.stop() == 0
    ctrport.run("clean")
    assert "ctrport" not in node.run("nft", "list", "ruleset").stdout
    assert theirs(node) == tables
    assert services(node) == found


def test_a_node_port_that_comes_later_gets_its_port(node: Stage, ctrport: Ctrport) -> None:
    load(node, "nftables")
    ctrport.configure(publish(("{container: web}", "30090:80")))
    ctrport.start()
    wait_open(node, 30090, "web")
    element = "{ tcp . 30090 : goto external-WEB5HTTP-shop/web/tcp/http }"
    node.run("nft", "add", "element", "ip", "kube-proxy", "service-nodeports", element)
    reason = ctrport.wait_for("30090:80/tcp", "conflict", within=15)["reason"]  # no event tells of it: the tick sees it
    assert reason == "host port 30090/tcp is held by kube-proxy (shop/web:http)"
    wait_open(node, 30090, "service")
    node.run("nft", "delete", "element", "ip", "kube-proxy", "service-nodeports", "{ tcp . 30090 }")
    look_again(node)
    ctrport.wait_for("30090:80/tcp", "active")
    wait_open(node, 30090, "web")


def test_where_nft_is_not_installed_all_else_works(node: Stage, ctrport: Ctrport) -> None:
    load(node, "iptables")
    directory = node.directory / "without-nft"
    directory.mkdir()
    for program in ("iptables-nft", "iptables-nft-restore", "iptables-nft-save"):
        for name in (program, program.replace("iptables", "ip6tables")):
            path = node.run("sh", "-c", f"command -v {name}").stdout.strip()
            if not (directory / name).exists():
                (directory / name).symlink_to(path)
    ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: web}", f"{NODE_PORT}:80")))
    ctrport.start("--verbose", env={"PATH": str(directory)})
    ctrport.wait_for(f"{NODE_PORT}:80/tcp", "conflict")
    wait_open(node, 8080, "web")
    assert "cannot be seen" not in ctrport.messages


# CNI's portmap plugin: hostPorts, and `nerdctl -p`


@every_backend
def test_beside_portmap_both_publish(node: Stage, ctrport: Ctrport, backend: str) -> None:
    service, sibling = node.service, node.sibling
    portmap.call(node, "ADD", service, {9090: 80})
    alone = theirs(node)
    web = "{container: web}"
    ctrport.configure(publish((web, "8080:80"), (web, "9090:80"), settings=settings(backend)))
    ctrport.start()
    reason = ctrport.wait_for("9090:80/tcp", "conflict")["reason"]
    assert reason == "host port 9090/tcp is held by CNI-HOSTPORT-DNAT"
    wait_open(node, 9090, "service")
    published(node, 8080, "web")
    assert theirs(node) == alone

    portmap.call(node, "ADD", sibling, {9091: 80})  # beside what ctrport has there already
    both = theirs(node)
    assert both != alone
    for _ in ("running", "restarted"):
        wait_open(node, 9090, "service")
        wait_open(node, 9091, "sibling")
        published(node, 8080, "web")
        assert theirs(node) == both
        ours = ["DOCKER"] if backend == "iptables-nft" else []
        assert jumps(node, "nat", "PREROUTING") == ["CNI-HOSTPORT-DNAT", *ours]
        assert jumps(node, "nat", "OUTPUT") == ["CNI-HOSTPORT-DNAT", *ours]
        assert ctrport.stop() == 0
        ctrport.start()

    portmap.call(node, "DEL", service, {9090: 80})
    look_again(node)
    ctrport.wait_for("9090:80/tcp", "active")
    wait_open(node, 9090, "web")
    wait_open(node, 9091, "sibling")
    published(node, 8080, "web")
    assert ctrport.run("plan", "--config", str(ctrport.config)).stdout == "nothing to change\n"

    left = theirs(node)
    assert ctrport.stop() == 0
    ctrport.run("clean")
    assert "ctrport" not in node.tables()
    assert theirs(node) == left
    wait_open(node, 9091, "sibling")


def test_portmap_may_come_second(node: Stage, ctrport: Ctrport) -> None:
    ctrport.configure(publish(("{container: web}", "8080:80")))
    ctrport.start()
    portmap.call(node, "ADD", node.service, {9090: 80})
    tables = theirs(node)
    # It appends its jump to ours, which gives it the way at once: as it would have come first.
    order = ["CNI-HOSTPORT-DNAT", "DOCKER"]
    eventually(lambda: jumps(node, "nat", "PREROUTING") == order, what="its jump coming first")
    for _ in range(2):
        assert jumps(node, "nat", "PREROUTING") == order
        wait_open(node, 9090, "service")
        published(node, 8080, "web")
        assert theirs(node) == tables
        assert ctrport.stop() == 0
        ctrport.start()
    assert ctrport.stop() == 0
    ctrport.run("clean")
    assert theirs(node) == tables
    wait_open(node, 9090, "service")


# Cilium


def test_cilium_is_named_as_a_limit_when_it_comes(node: Stage, ctrport: Ctrport) -> None:
    ctrport.configure(publish(("{container: web}", "8080:80")))
    ctrport.start()
    assert ctrport.run("ps").stderr == ""
    assert ctrport.status()["warnings"] == []

    # As Cilium does: the device, and its address. Its kind does not matter.
    node.script("ip link add cilium_host type bridge; ip address add 10.0.1.7/32 dev cilium_host")
    try:
        [warning] = eventually(lambda: ctrport.status()["warnings"], what="the warning")
        assert "eBPF" in warning
        assert "cilium_host" in warning
        assert ctrport.run("ps").stderr == f"warning: {warning}\n"
        look_again(node)
        eventually(lambda: "198.51.100.77" not in node.tables(), what="the node being looked at again")
        logged = pair("text", warning)
        assert ctrport.messages.count(f" WARNING note {logged}\n") == 1
        wait_open(node, 8080, "web")  # it is a warning: nothing is taken away

        assert ctrport.stop() == 0
        without_daemon = ctrport.run("ps", "--config", str(ctrport.config)).stderr.splitlines()
        assert without_daemon[1:] == [f"warning: {warning}"]
        ctrport.start()
        assert ctrport.messages.count(logged) == 2
        assert ctrport.status()["warnings"] == [warning]
    finally:
        node.run("ip", "link", "delete", "cilium_host")
    eventually(lambda: ctrport.status()["warnings"] == [], what="the warning being gone")
    assert ctrport.run("ps").stderr == ""
