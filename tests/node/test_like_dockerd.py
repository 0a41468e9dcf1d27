"""What ctrport with `networks` does to packets beside what dockerd without its proxy does: the same, but for a list.

Two nodes that are alike, with the same containers and the same mappings: one is dockerd's, the other ctrport's. Each
row is asked on both, with real packets. ``DIFFERENCES`` are also in docs/docker.md, with their reasons.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from embedded.container import Container
from embedded.dockerd import DockerContainer, Dockerd, missing
from embedded.host import Place
from embedded.loopback import loopback_goes_to
from embedded.node import Node
from embedded.traffic import Outcome, Refused, Reply, Server, TimedOut, eventually, probe_tcp, probe_udp
from tests.node.daemon import ROOT, Ctrport

SECOND = "198.51.100.3"
GATEWAY = "172.17.0.1"
# Host ports, and a port of the container that is not published.
WEB, LOCAL, ON_FIRST, RANGE, BRIEF, FREE = 8080, 8081, 8082, range(8000, 8004), 8090, 8099
HIDDEN = 99
MAPPINGS = {
    "web": ("8080:80", "8080:80/udp", "127.0.0.1:8081:81", "198.51.100.1:8082:82", "8000-8003:9000-9003"),
    "brief": ("8090:80",),
}
#: What the client serves.
OUTSIDE = 90
#: Seconds to wait for an answer that may not come: one that does takes a thousandth of it.
WAIT = 0.4


@dataclass(frozen=True)
class Side:
    """A node, and who lives there: web and sibling on docker0, api on br1. ``at`` is who has which address."""

    node: Node
    web: Place
    sibling: Place
    api: Place
    at: dict[str, str]

    def seen(self, outcome: Outcome) -> str:
        """Put into words what is to be the same on both sides: who answered, and whom that took for the client."""
        if isinstance(outcome, Reply):
            roles = {address: role for role, address in self.at.items()}
            return f"{outcome.name}:{outcome.port} sees {roles.get(outcome.peer, outcome.peer)}"
        return {Refused: "refused", TimedOut: "no answer"}.get(type(outcome), str(outcome))

    def tcp(self, place: Place, address: str, port: int) -> str:
        return self.seen(probe_tcp(place, self.at.get(address, address), port, timeout=WAIT))

    def udp(self, place: Place, address: str, port: int) -> str:
        return self.seen(probe_udp(place, self.at.get(address, address), port, timeout=WAIT))


def _dockers(node: Node) -> dict[str, Place]:
    dockerd = Dockerd(node)
    dockerd.start()
    bridge = ("--subnet", "172.18.0.0/16", "--opt", "com.docker.network.bridge.name=br1")
    dockerd.docker("network", "create", *bridge, "br1")
    places: dict[str, DockerContainer] = {
        "web": dockerd.run("web", *MAPPINGS["web"]),
        "sibling": dockerd.run("sibling"),
        "api": dockerd.run("api", options=("--network", "br1")),
    }
    dockerd.remove(dockerd.run("brief", *MAPPINGS["brief"]))
    return {**places}


def _ours(node: Node) -> dict[str, Place]:
    docker0 = node.add_network("docker0", ip_masq=False, hairpin=False)
    conflist = ROOT / "deploy" / "cni" / "10-docker0.conflist"
    node.path(f"{docker0.directory}/10-docker0.conflist").write_text(conflist.read_text())
    br1 = node.add_network("br1", subnet="172.18.0.0/16", ip_masq=False, hairpin=False)
    ctrport = Ctrport(node)
    lines = ["networks: [{bridge: docker0}, {bridge: br1}]", "publish:"]
    for name, specs in MAPPINGS.items():
        listed = ", ".join(f'"{spec}"' for spec in specs)
        lines += [f"  - match: {{container: {name}}}", f"    ports: [{listed}]"]
    ctrport.configure("\n".join(lines) + "\n")
    places: dict[str, Container] = {"web": node.start("web")}
    ctrport.start()
    places |= {"sibling": node.start("sibling"), "api": node.start("api", network=br1)}
    brief = node.start("brief")
    ctrport.wait_for("8090:80/tcp", "active", "brief")
    node.delete(brief)
    ctrport.wait_for("8090:80/tcp", "waiting")
    eventually(lambda: "-o br1" in node.tables(), what="br1 being run")
    return {**places}


def _side(node: Node, settle: Callable[[Node], dict[str, Place]]) -> Side:
    node.sysctl("net/ipv4/icmp_ratelimit", 0)  # or a client is told only once a second that a UDP port is closed
    node.sysctl("net/ipv4/ip_forward", 0)
    node.add_address(SECOND)
    node.start_containerd()
    places = settle(node)
    at = {"client": node.client_address, "client6": node.client_address6, "node": node.address, "bridge": GATEWAY}
    for name, place in places.items():
        assert isinstance(place, Container | DockerContainer)
        assert place.address is not None
        at[name] = place.address
        Server(place, [80, 81, 82, HIDDEN, *range(9000, 9004)])
        Server(place, 80, kind=socket.SOCK_DGRAM)
        Server(place, 80, address="::")
    Server(node.client, OUTSIDE)
    node.client.run("ip", "route", "add", "172.16.0.0/12", "via", node.address)
    return Side(node, places["web"], places["sibling"], places["api"], at)


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[Side, Side]]:
    """dockerd's side and ours."""
    reason = missing()
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with Node("docker") as theirs, Node("ctrport") as ours:
        yield _side(theirs, _dockers), _side(ours, _ours)


# What is asked


def published_range(side: Side) -> str:
    answers = [side.tcp(side.node.client, "node", port) for port in RANGE]
    return ", ".join(answers)


def forward_policy(side: Side) -> str:
    return side.node.run("iptables-nft", "-S", "FORWARD").stdout.split()[2]


def hidden_port_under_accept(side: Side) -> str:
    policy = forward_policy(side)
    side.node.run("iptables-nft", "-P", "FORWARD", "ACCEPT")
    try:
        return side.tcp(side.node.client, "web", HIDDEN)
    finally:
        side.node.run("iptables-nft", "-P", "FORWARD", policy)


def sibling_without_bridge_nf(side: Side) -> str:
    side.node.sysctl("net/bridge/bridge-nf-call-iptables", 0)
    try:
        return side.tcp(side.sibling, "node", WEB)
    finally:
        side.node.sysctl("net/bridge/bridge-nf-call-iptables", 1)


def route_to_localhost(side: Side) -> str:
    with loopback_goes_to(side.node.address, side.node.client):
        return side.tcp(side.node.client, "127.0.0.1", LOCAL)


def container_route_to_localhost(side: Side) -> str:
    with loopback_goes_to(GATEWAY, side.sibling):
        return side.tcp(side.sibling, "127.0.0.1", LOCAL)


def program_wants_the_port(side: Side) -> str:
    with side.node.socket() as wanting:
        try:
            wanting.bind(("0.0.0.0", WEB))
        except OSError as error:
            return str(error.strerror)
        return "it gets the port"


ROWS: dict[str, Callable[[Side], str]] = {
    "LAN → hostIP:port": lambda s: s.tcp(s.node.client, "node", WEB),
    "LAN → hostIP:port, udp": lambda s: s.udp(s.node.client, "node", WEB),
    "LAN → another address of the node": lambda s: s.tcp(s.node.client, SECOND, WEB),
    "LAN → a range": published_range,
    "LAN → a port published on one hostIP": lambda s: s.tcp(s.node.client, "node", ON_FIRST),
    "LAN → that port on another hostIP": lambda s: s.tcp(s.node.client, SECOND, ON_FIRST),
    "LAN → a port that nobody published": lambda s: s.tcp(s.node.client, "node", FREE),
    "LAN → a port that nobody published, udp": lambda s: s.udp(s.node.client, "node", FREE),
    "LAN → a port published on 127.0.0.1": lambda s: s.tcp(s.node.client, "node", LOCAL),
    "LAN → 127.0.0.1:port, by a route over the LAN": route_to_localhost,
    "LAN → the container's own IP, a published port": lambda s: s.tcp(s.node.client, "web", 80),
    "LAN → the container's own IP, another port": lambda s: s.tcp(s.node.client, "web", HIDDEN),
    "LAN → the container's own IP, another port, FORWARD ACCEPT": hidden_port_under_accept,
    "LAN → the node's IPv6 address": lambda s: s.tcp(s.node.client, s.node.address6, WEB),
    "LAN → the port after the container ended": lambda s: s.tcp(s.node.client, "node", BRIEF),
    "host → its own IP:port": lambda s: s.tcp(s.node, "node", WEB),
    "host → its own IP:port, udp": lambda s: s.udp(s.node, "node", WEB),
    "host → 127.0.0.1:port": lambda s: s.tcp(s.node, "127.0.0.1", WEB),
    "host → 127.0.0.1:port, udp": lambda s: s.udp(s.node, "127.0.0.1", WEB),
    "host → a port published on 127.0.0.1": lambda s: s.tcp(s.node, "127.0.0.1", LOCAL),
    "host → [::1]:port": lambda s: s.tcp(s.node, "::1", WEB),
    "host → the container's own IP": lambda s: s.tcp(s.node, "web", HIDDEN),
    "host → the port after the container ended": lambda s: s.tcp(s.node, "127.0.0.1", BRIEF),
    "container → its own published port": lambda s: s.tcp(s.web, "node", WEB),
    "container → its own published port, udp": lambda s: s.udp(s.web, "node", WEB),
    "container → a host outside": lambda s: s.tcp(s.web, "client", OUTSIDE),
    "container → 127.0.0.1:port, by a route over its network": container_route_to_localhost,
    "sibling → hostIP:port": lambda s: s.tcp(s.sibling, "node", WEB),
    "sibling → hostIP:port, bridge-nf 0": sibling_without_bridge_nf,
    "sibling → the gateway's IP:port": lambda s: s.tcp(s.sibling, "bridge", WEB),
    "sibling → the container's own IP": lambda s: s.tcp(s.sibling, "web", HIDDEN),
    "container on another network → hostIP:port": lambda s: s.tcp(s.api, "node", WEB),
    "container on another network → hostIP:port, udp": lambda s: s.udp(s.api, "node", WEB),
    "container on another network → the container's own IP": lambda s: s.tcp(s.api, "web", 80),
    "container on another network → a host outside": lambda s: s.tcp(s.api, "client", OUTSIDE),
    "a program of the node → binds a published port": program_wants_the_port,
    "the policy of FORWARD, where the node did not forward before": forward_policy,
}


_GUARDED = "what is published on 127.0.0.1 is for the node alone: two rules in `raw` drop the rest (CVE-2020-8558)"
_BY_MAPPING = "a port is published at the node's addresses, where `sources` and DOCKER-USER see who asks for what"
_SIBLING = "the answer must come back through the node, whatever `bridge-nf-call-iptables` says: without, it does not"
_STRANGER = (
    "networks are apart but for what is published; the client was masqueraded as it left its own network. "
    "dockerd's isolation drops it, and leaves it to the proxy that is off here"
)
_OWN_SOURCE = "there is a way back from the node's own address, so there is nothing to translate"

#: Where ctrport does otherwise, on purpose: what dockerd does, what we do, and why.
DIFFERENCES = {
    "LAN → 127.0.0.1:port, by a route over the LAN": ("web:81 sees client", "no answer", _GUARDED),
    "LAN → the container's own IP, a published port": ("web:80 sees client", "no answer", _BY_MAPPING),
    "LAN → the container's own IP, another port, FORWARD ACCEPT": (
        "web:99 sees client",
        "no answer",
        "what is not published stays closed whatever the policy is: dockerd does so since 28",
    ),
    "LAN → the node's IPv6 address": (
        "refused",
        "web:80 sees client6",
        "the network of deploy/cni has IPv6, which dockerd has where `ipv6` and `ip6tables` are set",
    ),
    "host → its own IP:port": ("web:80 sees bridge", "web:80 sees node", _OWN_SOURCE),
    "host → its own IP:port, udp": ("web:80 sees bridge", "web:80 sees node", _OWN_SOURCE),
    "container → 127.0.0.1:port, by a route over its network": ("web:81 sees sibling", "no answer", _GUARDED),
    "sibling → hostIP:port": ("web:80 sees sibling", "web:80 sees bridge", _SIBLING),
    "sibling → hostIP:port, bridge-nf 0": ("no answer", "web:80 sees bridge", _SIBLING),
    "sibling → the gateway's IP:port": ("web:80 sees sibling", "web:80 sees bridge", _SIBLING),
    "container on another network → hostIP:port": ("no answer", "web:80 sees bridge", _STRANGER),
    "container on another network → hostIP:port, udp": ("no answer", "web:80 sees bridge", _STRANGER),
    "the policy of FORWARD, where the node did not forward before": (
        "DROP",
        "ACCEPT",
        "a policy is the operator's. The rules of `networks` close what is behind their bridges, and nothing else",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_ctrport_does_what_dockerd_does_or_says_that_it_does_not(sides: tuple[Side, Side], row: str) -> None:
    theirs, ours = (ROWS[row](side) for side in sides)
    if row in DIFFERENCES:
        assert (theirs, ours) == DIFFERENCES[row][:2]
    else:
        assert theirs == ours


def test_the_docs_list_every_difference_and_no_other() -> None:
    assert DIFFERENCES.keys() <= ROWS.keys()
    lines = (ROOT / "docs" / "docker.md").read_text().splitlines()
    listed = [line for line in lines if line.split(" | ")[0].removeprefix("| ") in ROWS]
    assert listed == [f"| {row} | {' | '.join(columns)} |" for row, columns in DIFFERENCES.items()]
    assert not [row for row, (theirs, ours, _) in DIFFERENCES.items() if theirs == ours]
