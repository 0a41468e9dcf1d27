"""The node that one site of the matrix is tried on: who lives there, what is published, and who asks."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from embedded.container import Container
from embedded.host import Place
from embedded.network import Network
from embedded.node import Node
from embedded.traffic import Outcome, Server, probe_tcp, probe_udp
from tests.matrix.life import Key, Life, Stage
from tests.matrix.settings import SOCKETS, Family, Protocol, Setting, Site
from tests.node.daemon import Ctrport

#: The node's second address on the LAN.
SECOND: dict[Family, str] = {"IPv4": "198.51.100.3", "IPv6": "2001:db8:51::3"}
LOCALHOST: dict[Family, str] = {"IPv4": "127.0.0.1", "IPv6": "::1"}
WILDCARD: dict[Family, str] = {"IPv4": "0.0.0.0", "IPv6": "::"}

# Ports of the node, and what the container has behind them.
PUBLISHED, ON_LOCALHOST, BRIEF = 8080, 8081, 8090
WEB, PRIVATE, UNPUBLISHED = 80, 81, 99
PORTS = 4
#: Ranges, each by the first port of the node and the first of the container.
SAME, OFFSET = (9000, 9000), (8000, 9100)
#: What the node itself serves, on 127.0.0.1 and on its own address in the network.
HOST_SERVICE = 7000


@dataclass(frozen=True)
class Street:
    """A node with a published container, a sibling beside it, and a stranger on another network."""

    site: Site
    keys: tuple[Key, ...]
    node: Node
    ctrport: Ctrport
    network: Network
    web: Container
    sibling: Container
    stranger: Container

    @functools.cached_property
    def life(self) -> dict[Key, Life]:
        """What was seen around a container that came, went, and came again. Lived once, for all that is published."""
        places = (self.node.client, self.node, self.sibling, self.stranger)
        return Stage(self.node, self.ctrport, self.network, "brief", BRIEF, WEB, self.keys, places).live()


@dataclass(frozen=True)
class World:
    """A street as one setting has it: one family and one protocol."""

    street: Street
    setting: Setting

    @property
    def node_address(self) -> str:
        """The node's address on the LAN."""
        return Node.address if self.setting.family == "IPv4" else Node.address6

    @property
    def second_address(self) -> str:
        """Its other one."""
        return SECOND[self.setting.family]

    @property
    def localhost(self) -> str:
        """127.0.0.1 or ::1."""
        return LOCALHOST[self.setting.family]

    def address(self, place: Place) -> str:
        """Return the address of a container, or of the client on the LAN."""
        if isinstance(place, Container):
            address = place.address if self.setting.family == "IPv4" else place.address6
            assert address is not None, f"{place.name} has no {self.setting.family} address"
            return address
        assert place is self.street.node.client, f"{place.name} has many addresses"
        return Node.client_address if self.setting.family == "IPv4" else Node.client_address6

    def probe(self, place: Place, address: str, port: int, *, timeout: float = 2.0) -> Outcome:
        """Ask a port from somewhere."""
        if self.setting.protocol == "udp":
            return probe_udp(place, address, port, timeout=timeout)
        return probe_tcp(place, address, port, timeout=timeout, proto=SOCKETS[self.setting.protocol][1])

    def socket(self, place: Place) -> socket.socket:
        """Return a new socket of the family and the protocol."""
        kind, proto = SOCKETS[self.setting.protocol]
        return place.socket(kind, socket.AF_INET if self.setting.family == "IPv4" else socket.AF_INET6, proto)


@contextlib.contextmanager
def street(site: Site, keys: tuple[Key, ...]) -> Iterator[Street]:
    """Build the node of a site, with ctrport on it, and publish everything in those families and protocols."""
    protocols = sorted({protocol for _, protocol in keys})
    with Node() as node:
        _settle(node, site)
        network, far = _networks(node, site, any(family == "IPv6" for family, _ in keys))
        web, sibling = node.start("web", network=network), node.start("sibling", network=network)
        stranger = node.start("stranger", network=far)
        ranges = [first + number for _, first in (SAME, OFFSET) for number in range(PORTS)]
        for family, protocol in keys:
            kind, proto = SOCKETS[protocol]
            inside = [WEB, PRIVATE, UNPUBLISHED, *ranges]
            Server(web, inside, kind=kind, proto=proto, address=WILDCARD[family])
            if family == "IPv4":
                for address in (LOCALHOST[family], network.gateway):
                    Server(node, HOST_SERVICE, kind=kind, proto=proto, address=address, name="host")
        ctrport = Ctrport(node)
        ctrport.configure(_declarations(site, protocols))
        ctrport.start()
        for protocol in protocols:
            ctrport.wait_for(f"{PUBLISHED}:{WEB}/{protocol}", "active")
        yield Street(site, keys, node, ctrport, network, web, sibling, stranger)


def _settle(node: Node, site: Site) -> None:
    for program in site.programs:
        node.run(program, "-P", "FORWARD", site.forward_policy)
    for family, key in (("ip", "ipv4/icmp_ratelimit"), ("ip6", "ipv6/icmp/ratelimit")):
        node.sysctl(f"net/bridge/bridge-nf-call-{family}tables", site.bridge_nf)
        node.sysctl(f"net/{key}", 0)  # or a client is not always told that a port is closed
    # Counts what comes from 127.0.0.0/8 over a wire, and lets it go on: see `rows.from_127`.
    node.run(site.program, "-A", "INPUT", "-s", "127.0.0.0/8", "!", "-i", "lo")
    for address in SECOND.values():
        node.add_address(address)
    node.start_containerd()


def _networks(node: Node, site: Site, ipv6: bool) -> tuple[Network, Network]:
    """Add the network of the site, and another one. IPv6 only where it is needed: ptp takes two seconds more for it."""
    one, other = ("fd00:17::/64", "fd00:20::/64") if ipv6 else (None, None)
    # hairpinMode is off, as it is by default: what a container needs to reach itself is ctrport's affair.
    if site.network == "routed veth":
        network = node.add_network("routed0", subnet6=one, kind="ptp")
    else:
        masquerade = site.network == "bridge with ipMasq"
        network = node.add_network("docker0", subnet6=one, ip_masq=masquerade, hairpin=False)
    return network, node.add_network("far0", subnet="172.20.0.0/16", subnet6=other, ip_masq=False, hairpin=False)


def _declarations(site: Site, protocols: Sequence[Protocol]) -> str:
    web, brief = [], []
    for protocol in protocols:
        web += [f"{PUBLISHED}:{WEB}/{protocol}", f"127.0.0.1:{ON_LOCALHOST}:{PRIVATE}/{protocol}"]
        web += [
            f"{outside}-{outside + PORTS - 1}:{inside}-{inside + PORTS - 1}/{protocol}"
            for outside, inside in (SAME, OFFSET)
        ]
        brief.append(f"{BRIEF}:{WEB}/{protocol}")
    lines = [f"firewall: {{backend: {site.backend}}}", "publish:"]
    for name, specs in (("web", web), ("brief", brief)):
        listed = ", ".join(f'"{spec}"' for spec in specs)
        lines += [f"  - match: {{container: {name}}}", f"    ports: [{listed}]"]
    return "\n".join(lines) + "\n"
