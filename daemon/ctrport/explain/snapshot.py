"""What of the node the walk needs: what counts always at once, the rest as the walk asks for it. Nothing is changed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
from collections.abc import Iterable, Iterator
from ipaddress import ip_address
from pathlib import Path

from .. import conntrack, hairpin, ports, status
from ..config import Config
from ..containerd import Containerd, ContainerdError
from ..endpoints import Endpoints, Gone
from ..listed import Listed
from ..listeners import entries, holder
from ..model import Access, Address, ContainerKey, Endpoint, Family, PortRange, Protocol
from ..netlink import KINDS, Netlink
from ..node import CILIUM, CILIUM_DEVICE
from ..report import NOT_INSTALLED
from ..survey import container_of
from . import inside, tables
from .facts import (
    Answer,
    Bridging,
    Declared,
    Facts,
    HolderOf,
    Local,
    NoRoute,
    OldFlow,
    PortOf,
    Question,
    Route,
    RouteTo,
    Setting,
    Socket,
    SocketsAt,
    WhoIsAt,
)
from .question import Asked, usual_family

#: An address that is nowhere, and so beyond the default route (RFC 5737, RFC 3849).
_FAR = {Family.IPV4: "192.0.2.1", Family.IPV6: "2001:db8::1"}


class Snapshot:
    """Looks at the node. An async context manager: it holds netlink sockets.

    ``containerd`` is the path of containerd's socket. What it does not say is not known, and no failure.
    """

    _family: Family

    def __init__(self, containerd: str) -> None:
        self._address = containerd
        self._listed: list[Listed] | None = None
        self._opened = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Snapshot:
        self._netlink = self._opened.enter_context(contextlib.closing(Netlink()))
        self._endpoints = await self._opened.enter_async_context(Endpoints())
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._opened.aclose()

    async def facts(self, asked: Asked, current: status.Status | None, config: Config) -> Facts:
        """Return what counts for every packet to that port. ``current`` is what is published, None if not known."""
        names = self._netlink.links()
        addresses = tuple((_name(names, index), its) for index, its in self._netlink.interfaces())
        self._family = asked.family or usual_family(addresses)
        (rules, unseen), flows = await asyncio.gather(
            tables.look(self._family), self._flows(asked.protocol, asked.port)
        )
        local = [
            Local(network, _name(names, index), _kind(kind)) for kind, network, index in self._netlink.local_routes()
        ]
        if any(name == CILIUM_DEVICE for name, _ in names.values()):
            unseen.append(CILIUM)
        return Facts(
            rules=rules,
            locals=tuple(local),
            addresses=addresses,
            declared=tuple(_declared(current, config)),
            chain="" if config.firewall.backend == "nftables" else config.firewall.chain,
            localhost=config.firewall.localhost,
            keepers=tuple(_keepers(current)),
            bridges=frozenset(name for name, kind in names.values() if kind == "bridge") - {self._outward()},
            flows=flows,
            ipvs=frozenset(served_by_ipvs(_read("/proc/net/ip_vs"))),
            unseen=tuple(unseen),
        )

    async def answer(self, question: Question) -> Answer:
        """Return what the walk asks for."""
        match question:
            case RouteTo():
                return self._route(question)
            case Setting(path):
                return _setting(path)
            case SocketsAt(protocol, port):
                found = entries(protocol, PortRange(port, port)).get(port, [])
                return tuple(Socket(each.bound.address, each.port, each.inode) for each in found if each.serving)
            case HolderOf(inode):
                running = [each.key for each in await self._containers()]
                return holder({inode}, lambda cgroup: container_of(cgroup, running))
            case WhoIsAt(address):
                return inside.find(address, await self._containers())
            case PortOf(bridge, address):
                return self._bridging(bridge, address, await self._containers())

    async def _containers(self) -> list[Listed]:
        """Return what containerd runs; nothing where it does not answer."""
        if self._listed is None:
            self._listed = []
            with contextlib.suppress(ContainerdError):
                async with Containerd(self._address) as containerd:
                    for namespace in await containerd.namespaces():
                        self._listed += await containerd.containers(namespace)
        return self._listed

    async def _flows(self, protocol: Protocol, port: int) -> tuple[OldFlow, ...]:
        try:
            found = await conntrack.to_port(protocol, self._family, port)
        except conntrack.ConntrackError:
            return ()
        return tuple(
            OldFlow(each.protocol, each.destination, each.port, each.reply_source, each.reply_port) for each in found
        )

    def _outward(self) -> str | None:
        with contextlib.suppress(OSError):
            device = self._netlink.decide(ip_address(_FAR[self._family])).device
            return self._netlink.link(index=device).name if device else None
        return None

    def _route(self, question: RouteTo) -> Route | NoRoute:
        try:
            device = self._netlink.link(name=question.in_device).index if question.in_device is not None else 0
            found = self._netlink.decide(question.destination, question.source, device, question.mark)
            name = self._netlink.link(index=found.device).name if found.device else ""
        except OSError as error:
            return NoRoute(error.errno or errno.EINVAL)
        return Route(_kind(found.kind), name, found.gateway, found.source)

    def _bridging(self, bridge: str, address: Address, listed: Iterable[Listed]) -> Bridging:
        try:
            if self._netlink.link(name=bridge).kind != "bridge":
                return Bridging(bridge=False, filtered=False)
            filtered = hairpin.is_needed(bridge, self._family)
            who = inside.find(address, listed)
            endpoint = self._endpoints.find(who.pid) if who is not None else None
            at = endpoint.at(self._family) if isinstance(endpoint, Endpoint) else None
            port = at.port if at is not None else None
            return Bridging(True, filtered, port, None if port is None else hairpin.is_on(port))
        except (OSError, Gone):
            return Bridging(bridge=True, filtered=False)


def _name(names: dict[int, tuple[str, str | None]], index: int | None) -> str:
    return names[index][0] if index in names else ""


def _kind(number: int) -> str:
    return KINDS[number] if number < len(KINDS) else str(number)


def _setting(path: str) -> str | None:
    return _read(f"/proc/sys/{path}").strip() or None


def _read(path: str) -> str:
    """Return what is in a file of /proc, empty where there is none."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


_SERVED = re.compile(r"^(TCP|UDP|SCTP)  (?:[0-9A-F]{8}|\[[0-9a-f:]+\]):([0-9A-F]{4}) ", re.MULTILINE)


def served_by_ipvs(text: str) -> Iterator[tuple[Protocol, int]]:
    """Read ``/proc/net/ip_vs``, of which each service begins a line (ip_vs_info_seq_show in ip_vs_ctl.c)."""
    for protocol, port in _SERVED.findall(text):
        yield Protocol(protocol.lower()), int(port, 16)


def _declared(current: status.Status | None, config: Config) -> Iterable[Declared]:
    access = {declaration.source: declaration.access for declaration in config.publish}
    for each in current.publications if current is not None else ():
        try:
            mapping = ports.parse(each.mapping)
            bound = ports.parse(each.bound) if each.bound else None
        except ports.PortSpecError:
            continue  # what a container asks for and nobody can read
        key = ContainerKey(each.namespace, each.container) if each.container else None
        families = frozenset(Family.of(ip_address(address)) for address in each.addresses) or frozenset(Family)
        missing = each.reason == NOT_INSTALLED
        its = access.get(each.source, Access())
        yield Declared(each.name, key, mapping, bound, each.state, each.reason, missing, families, its)


def _keepers(current: status.Status | None) -> Iterable[tuple[Protocol, str]]:
    """Return who has the sockets that keep host ports from others."""
    if current is not None and current.running:
        yield from ((protocol, f"(pid {current.pid})") for protocol in Protocol)
    else:
        # systemd holds them for the next run. Those of tcp do not listen, and are in no list.
        yield Protocol.UDP, "systemd (pid 1)"
