"""What is asked of rtnetlink: by which device an address is reached, and whose device that is.

A few questions, asked on the way from a container's start to its port being open, so they are asked here directly: the
five of one container (six with IPv6) take 0.1 ms this way, and 2 to 3 ms by pyroute2, which was a fifth of that way
(and 10 MB of 65). One thing is set as well: whether a bridge sends a frame back through the port that it came by.

Numbers are those of linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h and linux/net_namespace.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)

from .nlmsg import (
    ACK,
    NESTED,
    REQUEST,
    Conversation,
    Interrupted,
    attribute,
    each_attribute,
    messages,
    read_attributes,
    text,
)

_RTM_GETLINK, _RTM_SETLINK, _RTM_NEWADDR, _RTM_DELADDR = 18, 19, 20, 21
_RTM_GETADDR, _RTM_GETROUTE, _RTM_NEWNSID, _RTM_GETNSID = 22, 26, 88, 90
_RTMGRP_IPV4_IFADDR, _RTMGRP_IPV6_IFADDR = 0x10, 0x100
_SCOPE_LINK = 253
_TENTATIVE = 0x40
_FIB_MATCH = 0x2000  # answer with the route that matched, not with one made for the address
_SKIP_STATS = 8
_NOT_ASSIGNED = -1
_SOL_NETLINK, _LISTEN_ALL_NSID, _STRICT = 270, 8, 12
_FROM_NSID = [_SOL_NETLINK, _LISTEN_ALL_NSID]
_ROOM = socket.CMSG_SPACE(4)
_LOCAL_TABLE = 255

UNICAST, LOCAL = 1, 2  # kinds of route
#: All of them, in iproute2's words, which are those of rules as well.
KINDS = ("unspec", "unicast", "local", "broadcast", "anycast", "multicast", "blackhole", "unreachable", "prohibit")


@dataclass(frozen=True)
class Route:
    """The host's route to an address: ``kind`` as the kernel numbers it, ``network`` what it is for."""

    kind: int
    network: IPv4Network | IPv6Network
    device: int | None
    gateway: str | None


@dataclass(frozen=True)
class Decision:
    """Where the host sends one packet: ``kind`` as the kernel numbers it, ``source`` where the host chooses one."""

    kind: int
    device: int | None
    gateway: IPv4Address | IPv6Address | None
    source: IPv4Address | IPv6Address | None


@dataclass(frozen=True)
class Link:
    """A network device. ``kind`` is None for a physical one; ``peer`` and ``peer_nsid`` are of a veth."""

    index: int
    name: str
    kind: str | None
    master: int | None
    peer: int | None
    peer_nsid: int | None


@dataclass(frozen=True)
class Bridging:
    """What a device is to bridges.

    ``hairpin`` is of a port: whether a frame may go back through it; None for what is no port. ``calls_iptables`` and
    ``calls_ip6tables`` are of a bridge: whether it asks those tables, whatever other bridges do.
    """

    index: int
    hairpin: bool | None
    calls_iptables: bool
    calls_ip6tables: bool


class Netlink(Conversation):
    """Asks the kernel about the network namespace it was made in. Raises ``OSError`` as the kernel refuses."""

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE)

    def route(self, address: IPv4Address | IPv6Address) -> Route:
        """Return the route that packets to ``address`` take."""
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        header = struct.pack("=BBBBBBBBI", family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, _FIB_MATCH)
        answer = self.ask(_RTM_GETROUTE, header + attribute(1, address.packed))
        _, length, _, _, _, _, _, kind, _ = struct.unpack_from("=BBBBBBBBI", answer)
        attributes = read_attributes(answer[12:])
        destination = attributes.get(1, address.packed if length else bytes(len(address.packed)))
        network: IPv4Network | IPv6Network
        if address.version == 4:
            network = IPv4Network((destination, length), strict=False)
            gateway = str(IPv4Address(attributes[5])) if 5 in attributes else ("of IPv6" if 18 in attributes else None)
        else:
            network = IPv6Network((destination, length), strict=False)
            gateway = str(IPv6Address(attributes[5])) if 5 in attributes else None
        return Route(kind, network, _number(attributes.get(4)), gateway)

    def decide(
        self,
        destination: IPv4Address | IPv6Address,
        source: IPv4Address | IPv6Address | None = None,
        in_device: int = 0,
        mark: int = 0,
    ) -> Decision:
        """Return where a packet goes, with all that is checked on the way in where it came in by a device.

        Nothing is sent. The kernel refuses as it would refuse the packet.
        """
        family = socket.AF_INET if destination.version == 4 else socket.AF_INET6
        bits = destination.max_prefixlen
        header = struct.pack("=BBBBBBBBI", family, bits, bits if source is not None else 0, 0, 0, 0, 0, 0, 0)
        request = header + attribute(1, destination.packed)
        request += attribute(2, source.packed) if source is not None else b""
        request += attribute(3, struct.pack("=I", in_device)) if in_device else b""
        request += attribute(16, struct.pack("=I", mark)) if mark else b""
        answer = self.ask(_RTM_GETROUTE, request)
        attributes = read_attributes(answer[12:])
        # A gateway of the other family (RTA_VIA) has two bytes in front that say which.
        gateway = attributes.get(5) or attributes.get(18, b"")[2:]
        return Decision(
            answer[7],
            _number(attributes.get(4)),
            ip_address(gateway) if gateway else None,
            ip_address(attributes[7]) if 7 in attributes else None,
        )

    def local_routes(self) -> list[tuple[int, IPv4Network | IPv6Network, int | None]]:
        """Return what the kernel takes for this host: the kind of each route of its local table, and the device."""
        with contextlib.suppress(OSError):  # an older kernel, which sends the routes of all tables
            self._socket.setsockopt(_SOL_NETLINK, _STRICT, 1)
        found: list[tuple[int, IPv4Network | IPv6Network, int | None]] = []
        for family, size in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
            header = struct.pack("=BBBBBBBBI", family, 0, 0, 0, _LOCAL_TABLE, 0, 0, 0, 0)
            with contextlib.suppress(Interrupted):
                for message in self.dump(_RTM_GETROUTE, header):
                    its, length, _, _, table, _, _, kind, _ = struct.unpack_from("=BBBBBBBBI", message)
                    attributes = read_attributes(message[12:])
                    if table == _LOCAL_TABLE and its == family:
                        network = ip_network((attributes.get(1, bytes(size)), length), strict=False)
                        found.append((kind, network, _number(attributes.get(4))))
        return found

    def interfaces(self) -> list[tuple[int, IPv4Interface | IPv6Interface]]:
        """Return every address of this host, with the index of its device."""
        found: list[tuple[int, IPv4Interface | IPv6Interface]] = []
        with contextlib.suppress(Interrupted):
            for message in self.dump(_RTM_GETADDR, struct.pack("=BBBBi", 0, 0, 0, 0, 0)):
                _, length, _, _, device = struct.unpack_from("=BBBBi", message)
                attributes = read_attributes(message[8:])
                packed = attributes.get(2) or attributes.get(1)
                if packed is not None:
                    found.append((device, ip_interface((packed, length))))
        return found

    def links(self) -> dict[int, tuple[str, str | None]]:
        """Return the name and the kind of every device, by its index."""
        found: dict[int, tuple[str, str | None]] = {}
        request = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + attribute(29, struct.pack("=I", _SKIP_STATS))
        with contextlib.suppress(Interrupted):
            for message in self.dump(_RTM_GETLINK, request):
                attributes = read_attributes(message[16:])
                kind = read_attributes(attributes.get(18, b"")).get(1)
                found[struct.unpack_from("=BxHi", message)[2]] = (
                    text(attributes[3]),
                    None if kind is None else text(kind),
                )
        return found

    def link(self, *, index: int = 0, name: str = "", nsid: int | None = None) -> Link:
        """Return a device by its index or its name, in the network namespace that has ``nsid`` in ours."""
        found, attributes = self._link(index, name, nsid)
        kind = read_attributes(attributes.get(18, b"")).get(1)
        return Link(
            index=found,
            name=text(attributes[3]),
            kind=None if kind is None else text(kind),
            master=_number(attributes.get(10)),
            peer=_number(attributes.get(5)),
            peer_nsid=_number(attributes.get(37)),
        )

    def bridging(self, name: str) -> Bridging:
        """Return what a device of that name is to bridges."""
        index, attributes = self._link(name=name)
        about = read_attributes(attributes.get(18, b""))
        as_bridge = read_attributes(about.get(2, b"")) if about.get(1) == b"bridge\0" else {}
        as_port = read_attributes(about.get(5, b"")) if about.get(4) == b"bridge\0" else {}
        return Bridging(
            index=index,
            hairpin=as_port[4] != b"\0" if 4 in as_port else None,
            calls_iptables=as_bridge.get(36, b"\0") != b"\0",
            calls_ip6tables=as_bridge.get(37, b"\0") != b"\0",
        )

    def hairpins(self) -> set[str]:
        """Return the names of all bridge ports that a frame may go back through."""
        found: set[str] = set()
        with contextlib.suppress(Interrupted):  # a port that was missed by that is asked for again when it is switched
            for message in self.dump(_RTM_GETLINK, struct.pack("=BxHiII", socket.AF_BRIDGE, 0, 0, 0, 0)):
                attributes = read_attributes(message[16:])
                # The fourth of forty: the others are left unread.
                as_port = each_attribute(attributes.get(12, b""))
                if next((value for kind, value in as_port if kind == 4), b"\0") != b"\0":
                    found.add(text(attributes[3]))
        return found

    def set_hairpin(self, port: int, on: bool) -> None:
        """Set whether a bridge may send a frame back through the port that has this index."""
        # Of all that is to be said of a port only this is said: what is left out stays as it is.
        mode = attribute(12 | NESTED, attribute(4, struct.pack("=B", on)))
        self.ask(_RTM_SETLINK, struct.pack("=BxHiII", socket.AF_BRIDGE, 0, port, 0, 0) + mode, REQUEST | ACK)

    def _link(self, index: int = 0, name: str = "", nsid: int | None = None) -> tuple[int, dict[int, bytes]]:
        request = struct.pack("=BxHiII", 0, 0, index, 0, 0) + attribute(29, struct.pack("=I", _SKIP_STATS))
        request += attribute(3, name.encode() + b"\0") if name else b""
        request += attribute(46, struct.pack("=i", nsid)) if nsid is not None else b""
        answer = self.ask(_RTM_GETLINK, request)
        return struct.unpack_from("=BxHi", answer)[2], read_attributes(answer[16:])

    def nsid(self, pid: int) -> int:
        """Return the id that a process's network namespace has in ours, giving it one where it has none."""
        request = bytes(4) + attribute(2, struct.pack("=I", pid))
        found = self._nsid(request)
        if found == _NOT_ASSIGNED:
            wanted = request + attribute(1, struct.pack("=i", _NOT_ASSIGNED))  # the kernel chooses
            self.ask(_RTM_NEWNSID, wanted, REQUEST | ACK)
            found = self._nsid(request)
        return found

    def _nsid(self, request: bytes) -> int:
        return int(struct.unpack("=i", read_attributes(self.ask(_RTM_GETNSID, request)[4:])[1])[0])

    def addresses(self, index: int) -> list[IPv4Interface | IPv6Interface]:
        """Return the addresses of a device, in both families, each with the length of its prefix."""
        found: list[IPv4Interface | IPv6Interface] = []
        # The kernel filters by device only for who asks strictly (Linux 4.20), so what it sends is looked through too.
        with contextlib.suppress(Interrupted):  # by a change, which is announced
            for message in self.dump(_RTM_GETADDR, struct.pack("=BBBBi", 0, 0, 0, 0, index)):
                _, length, _, _, device = struct.unpack_from("=BBBBi", message)
                attributes = read_attributes(message[8:])
                packed = attributes.get(2) or attributes.get(1)  # IFA_LOCAL, which IPv6 has not unless it is a tunnel's
                if device == index and packed is not None:
                    found.append(ip_interface((packed, length)))
        return found


async def follow_addresses(tell: Callable[[int | None], None]) -> None:
    """Tell whenever an address of this network namespace came or went: None. Raises ``OSError``, and what that raises.

    And where one came in another, the id that this has in ours (see ``Netlink.nsid``), as long as it has one: of all
    those the kernel tells who asks so and has CAP_NET_BROADCAST.

    Those of a link alone (fe80::) do not count: every veth has one, and comes and goes with its container. In our own
    a tentative one, which others may have (duplicate address detection), comes when it is found to be free.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def reading(read: Callable[[], None]) -> None:
        # Here and not in a task: a container's port waits for it, and each turn of the event loop takes its time.
        try:
            read()
        except Exception as error:
            if not ended.done():
                ended.set_exception(error)

    with _listener() as own, _listener() as elsewhere:
        readers = {own.fileno(): partial(_tell_of_own, own, tell)}
        with contextlib.suppress(PermissionError):
            elsewhere.setsockopt(_SOL_NETLINK, _LISTEN_ALL_NSID, 1)
            readers[elsewhere.fileno()] = partial(_tell_of_others, elsewhere, tell)
        # Once, and by its number: to tell it anew each time, as asyncio does, takes longer than to read what came.
        for number, read in readers.items():
            loop.add_reader(number, reading, read)
        try:
            await ended
        finally:
            for number in readers:
                loop.remove_reader(number)


def _listener() -> socket.socket:
    listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        listener.bind((0, _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _tell_of_own(listener: socket.socket, tell: Callable[[int | None], None]) -> None:
    for said, _ in _received(listener):
        if said is None or _tells_of_change(said):
            tell(None)


def _tell_of_others(listener: socket.socket, tell: Callable[[int | None], None]) -> None:
    """Tell of what came with an id. What came without is our own, which the other socket hears.

    As some kernels put an id to our own as well (a namespace may have one in itself; before "net: netlink: don't set
    nsid on local notifications", 2026), or a negative one to others', nothing is taken for our own by that.
    """
    for said, nsid in _received(listener):
        if said is not None and nsid is not None and nsid >= 0 and _tells_of_new(said):
            tell(nsid)


def _received(listener: socket.socket) -> Iterator[tuple[bytes | None, int | None]]:
    """Yield what came, with the id of the namespace where it says one; None where more came than the buffer holds."""
    while True:
        try:
            said, about, _, _ = listener.recvmsg(1 << 16, _ROOM)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            yield None, None
            continue
        yield said, next((struct.unpack("=i", word)[0] for *kind, word in about if kind == _FROM_NSID), None)


def _tells_of_change(said: bytes) -> bool:
    """Whether one of these messages is of an address that came into use or went."""
    for kind, family, flags, scope in _addresses(said):
        if family == socket.AF_INET or (
            scope != _SCOPE_LINK and (kind == _RTM_DELADDR or (kind == _RTM_NEWADDR and not flags & _TENTATIVE))
        ):
            return True
    return False


def _tells_of_new(said: bytes) -> bool:
    """Whether one of these messages is of an address that came and by which others could reach its host."""
    return any(kind == _RTM_NEWADDR and scope < _SCOPE_LINK for kind, _, _, scope in _addresses(said))


def _addresses(said: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield of each message its kind, and the family, the flags and the scope of the address."""
    for kind, message in messages(said):
        if len(message) >= 8:
            family, _, flags, scope = struct.unpack_from("=BBBB", message)
            yield kind, family, flags, scope


def _number(data: bytes | None) -> int | None:
    return None if data is None else int(struct.unpack("=I", data)[0])
