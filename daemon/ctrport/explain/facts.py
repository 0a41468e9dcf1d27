"""What of the node the walk knows, and how it asks for what it lacks. Pure.

The rules, the addresses and what is published are looked up beforehand. What depends on where the packet goes is asked
for when the walk comes to it: ``Ask`` ends the walk, somebody finds out, and it begins anew with the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv6Interface

from ..model import Access, Address, ContainerKey, Family, Network, PortRange, Protocol
from ..model import Mapping as PortMapping
from .ruleset import Ruleset


@dataclass(frozen=True)
class RouteTo:
    """By which way does the kernel send what goes from ``source`` to ``destination``?

    It came in by ``in_device``, or where that is None the node itself sends it, and chooses a source where it has none.
    """

    destination: Address
    source: Address | None = None
    in_device: str | None = None
    mark: int = 0


@dataclass(frozen=True)
class Route:
    """The way there. ``kind`` is the kernel's word; ``source`` is the address that the node itself would send from."""

    kind: str
    device: str = ""
    gateway: Address | None = None
    source: Address | None = None


@dataclass(frozen=True)
class NoRoute:
    """The kernel sends it nowhere; ``error`` is the number (errno) by which it says so."""

    error: int


@dataclass(frozen=True)
class Setting:
    """What is in a file below /proc/sys? None: there is no such file."""

    path: str


@dataclass(frozen=True)
class SocketsAt:
    """Which sockets of the node itself have this port?"""

    protocol: Protocol
    port: int


@dataclass(frozen=True)
class Socket:
    """A socket that serves whoever comes."""

    address: Address
    port: int
    inode: int

    def __str__(self) -> str:
        address = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{address}:{self.port}"


@dataclass(frozen=True)
class HolderOf:
    """Which process has this socket? The answer is words safe to print."""

    inode: int


@dataclass(frozen=True)
class WhoIsAt:
    """Which container has this address?"""

    address: Address


@dataclass(frozen=True)
class Next:
    """A route of a container's own: ``gateway`` None is the link itself."""

    network: Network
    gateway: Address | None
    device: str


@dataclass(frozen=True)
class Inhabitant:
    """Who is in a network namespace, as far as /proc shows it: a container, or the containers of a pod.

    ``sockets`` are those that serve tcp or udp; ``routes`` those of both families.
    """

    name: str
    keys: frozenset[ContainerKey]
    pid: int
    paused: bool
    sockets: tuple[tuple[Protocol, Socket], ...]
    routes: tuple[Next, ...]


@dataclass(frozen=True)
class PortOf:
    """Which port of a bridge leads to a container's address, and what does the bridge do with frames?"""

    bridge: str
    address: Address


@dataclass(frozen=True)
class Bridging:
    """``filtered``: iptables is asked about frames that the bridge sends on. ``hairpin``: the port sends a frame back.

    ``hairpin`` is None where the port is not known.
    """

    bridge: bool
    filtered: bool
    port: str | None = None
    hairpin: bool | None = None


Question = RouteTo | Setting | SocketsAt | HolderOf | WhoIsAt | PortOf
Answer = Route | NoRoute | str | None | tuple[Socket, ...] | Inhabitant | Bridging


class Ask(Exception):
    """The walk cannot go on without the answer to ``question``."""

    def __init__(self, question: Question) -> None:
        super().__init__(question)
        self.question = question


@dataclass(frozen=True)
class Declared:
    """A publication as ``ps`` shows it. ``bound`` has the host ports that it got, None unless it is active.

    ``missing`` is whether its rules should be in the kernel and are not, as no daemon runs. ``families`` are those that
    it has an address of, where it is active; ``access`` is who may reach it, as far as the configuration says so.
    """

    name: str
    container: ContainerKey | None
    mapping: PortMapping
    bound: PortMapping | None
    state: str
    reason: str = ""
    missing: bool = False
    families: frozenset[Family] = frozenset(Family)
    access: Access = field(default_factory=Access)

    def __str__(self) -> str:
        its = str(self.bound or self.mapping)
        return its if self.container is None else f"{self.name} {its}"

    def covers(self, protocol: Protocol, port: int) -> bool:
        """Whether it is about this port of the node."""
        mapping = self.bound or self.mapping
        return mapping.protocol is protocol and mapping.host_ports is not None and _in(port, mapping.host_ports)

    def serves(self, address: Address) -> bool:
        """Whether it is about this address of the node."""
        mapping = self.bound or self.mapping
        return Family.of(address) in mapping.families and (mapping.any_host_ip or mapping.host_ip == address)


def _in(port: int, ports: PortRange) -> bool:
    return ports.first <= port <= ports.last


@dataclass(frozen=True)
class OldFlow:
    """A flow that connection tracking knows already: where it was sent to, and where its packets go."""

    protocol: Protocol
    destination: Address
    port: int
    leads_to: Address
    leads_to_port: int


@dataclass(frozen=True)
class Local:
    """What the kernel takes for the node's own: addresses, each with its device."""

    network: Network
    device: str
    kind: str = "local"


@dataclass(frozen=True)
class Facts:
    """What is known of the node.

    ``chain`` and ``localhost`` are those of ``firewall``; no chain where tables of its own are used. ``keepers`` are
    who has the sockets by which ctrport keeps ports from others, by a part of what such a holder is called. ``bridges``
    are all but the one that the default route is by. ``ipvs`` are the ports that IPVS serves, of whichever address.
    ``unseen`` says what could not be looked at, a sentence each: with it nothing is sure.
    """

    rules: Ruleset
    locals: tuple[Local, ...] = ()
    addresses: tuple[tuple[str, IPv4Interface | IPv6Interface], ...] = ()
    declared: tuple[Declared, ...] = ()
    chain: str = "DOCKER"
    localhost: bool = True
    keepers: tuple[tuple[Protocol, str], ...] = ()
    bridges: frozenset[str] = frozenset()
    flows: tuple[OldFlow, ...] = ()
    ipvs: frozenset[tuple[Protocol, int]] = frozenset()
    unseen: tuple[str, ...] = ()
    answers: Mapping[Question, Answer] = field(default_factory=dict)

    def type_of(self, address: Address, device: str | None = None) -> str:
        """Return what kind of address it is to the node; ``local`` on that device alone, if given."""
        if address.is_multicast:
            return "multicast"
        best = max(
            (its for its in self.locals if address in its.network), key=lambda its: its.network.prefixlen, default=None
        )
        if best is None or (device is not None and best.device != device):
            return "unspec" if address.is_unspecified else "unicast"
        return best.kind

    def is_own(self, address: Address) -> bool:
        """Whether it is an address of the node itself."""
        return self.type_of(address) == "local"

    def device_to(self, address: Address) -> str | None:
        """Return the device of the route to it, None where there is none."""
        route = self.route(RouteTo(address))
        return route.device if isinstance(route, Route) else None

    def address_of(self, device: str, family: Family) -> Address | None:
        """Return the first address of a device."""
        found = (its.ip for name, its in self.addresses if name == device and Family.of(its.ip) is family)
        return next((address for address in found if not address.is_link_local), None)

    def route(self, question: RouteTo) -> Route | NoRoute:
        """Return the way that the kernel sends something."""
        found = self._answer(question)
        assert isinstance(found, (Route, NoRoute))
        return found

    def setting(self, path: str) -> str | None:
        """Return what is in a file below /proc/sys."""
        found = self._answer(Setting(path))
        assert found is None or isinstance(found, str)
        return found

    def number(self, path: str) -> int:
        """Return a number out of a file below /proc/sys, 0 where there is none."""
        text = self.setting(path) or ""
        return int(text) if text.isdecimal() else 0

    def sockets(self, protocol: Protocol, port: int) -> tuple[Socket, ...]:
        """Return the sockets of the node itself at a port."""
        found = self._answer(SocketsAt(protocol, port))
        assert isinstance(found, tuple)
        return found

    def holder(self, socket: Socket) -> str:
        """Return who has a socket, in words safe to print."""
        found = self._answer(HolderOf(socket.inode))
        assert isinstance(found, str)
        return found

    def keeps(self, protocol: Protocol, socket: Socket) -> bool:
        """Whether a socket is one of ctrport's own, which answer nobody."""
        keepers = [name for its, name in self.keepers if its is protocol]
        return bool(keepers) and any(name in self.holder(socket) for name in keepers)

    def inhabitant(self, address: Address) -> Inhabitant | None:
        """Return which container has an address."""
        found = self._answer(WhoIsAt(address))
        assert found is None or isinstance(found, Inhabitant)
        return found

    def bridging(self, bridge: str, address: Address) -> Bridging:
        """Return what a device is as a bridge, and its port that leads to an address."""
        found = self._answer(PortOf(bridge, address))
        assert isinstance(found, Bridging)
        return found

    def _answer(self, question: Question) -> Answer:
        if question not in self.answers:
            raise Ask(question)
        return self.answers[question]
