"""Connection tracking over netlink: which flows the kernel tracks, and the removal of one of them.

Numbers are those of linux/netfilter/nfnetlink_conntrack.h and linux/netfilter/nfnetlink.h. What the flags of a filter
mean stands in the kernel's own net/netfilter/nf_internals.h alone (CTA_FILTER_F_*).

A list makes the kernel walk its whole table, which takes 9 ms where it has 262,144 places and no flow, and 200 ms with
100,000 flows. So nothing here is for the event loop's thread.
"""

from __future__ import annotations

import errno
import functools
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from .model import Address, Family, PortRange, Protocol
from .nlmsg import ACK, NESTED, NETFILTER, REQUEST, Conversation, attribute, read_attributes

_GET, _DELETE = (1 << 8) | 1, (1 << 8) | 2
_ORIGINAL, _REPLY, _ID, _ZONE, _FILTER = 1, 2, 12, 18, 25
_IP, _PROTO = 1, 2
_SOURCE, _DESTINATION = {Family.IPV4: 1, Family.IPV6: 3}, {Family.IPV4: 2, Family.IPV6: 4}
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_FLAGS_OF_ORIGINAL = 1
_BY_NUMBER, _BY_DESTINATION_PORT = 1 << 3, 1 << 5

_DOMAINS = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
_PROTOCOLS = {6: Protocol.TCP, 17: Protocol.UDP, 132: Protocol.SCTP}
_NUMBERS = {protocol: number for number, protocol in _PROTOCOLS.items()}

Ports = Mapping[Protocol, Sequence[PortRange]]


class GivenUp(Exception):
    """It took longer than it may."""


class Patience:
    """How long a list may take; another thread may cut that short."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def end(self) -> None:
        """Have no more of it."""
        self._until = float("-inf")

    def check(self) -> None:
        """Raise ``GivenUp`` where it is over."""
        if time.monotonic() > self._until:
            raise GivenUp


@dataclass(frozen=True)
class Key:
    """What the kernel knows a flow by, in its own bytes: two flows with one ``original`` are in different zones.

    ``id`` tells it from a later flow with the same addresses, unless that has come to the same place in memory.
    """

    original: bytes
    zone: bytes | None = None
    id: bytes | None = None


@dataclass(frozen=True)
class Flow:
    """One tracked flow: where its first packet went, and where its answers come from."""

    protocol: Protocol
    destination: Address
    port: int
    reply_source: Address
    reply_port: int
    key: Key

    @property
    def translated(self) -> bool:
        """Whether the flow's destination was translated."""
        return self.reply_source != self.destination


class Flows(Conversation):
    """The flows of the network namespace that it was made in. Raises ``OSError`` as the kernel refuses.

    Each method is for a thread of its own.
    """

    def __init__(self) -> None:
        super().__init__(NETFILTER)

    def to(self, family: Family, ports: Ports, patience: Patience) -> Iterator[Flow]:
        """Yield the flows that were sent to these ports, of any address. Raises ``Interrupted`` and ``GivenUp``."""
        wanted = {_NUMBERS[protocol]: _marked(ranges) for protocol, ranges in ports.items()}
        shape = _SHAPES[family]
        # As an older kernel sends more than it was asked for, and any kernel does of SCTP, each is looked at here.
        for message in self._sent(family, ports):
            patience.check()
            if not shape.excludes(message, wanted):
                found = flow(message, family)
                if found is not None and wanted.get(_NUMBERS[found.protocol], _NONE)[found.port]:
                    yield found

    def _sent(self, family: Family, ports: Ports) -> Iterator[bytes]:
        narrowed, all_of_them = question(family, ports), question(family, {})
        try:
            yield from self.dump(_GET, narrowed)
        except OSError as error:
            # Refused before anything was sent: how much of a filter a kernel understands is its own affair.
            if narrowed == all_of_them or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            yield from self.dump(_GET, all_of_them)

    def remove(self, one: Flow) -> bool:
        """Remove a flow; return whether it was there still."""
        try:
            self.ask(_DELETE, removal(one), REQUEST | ACK)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True


def question(family: Family, ports: Ports) -> bytes:
    """Return what asks for flows, narrowed to those of one protocol and to one port where that is all of it.

    Since Linux 5.8 the kernel narrows; before, it knows no such attribute and sends all flows of the family.
    """
    head = _head(family)
    if len(ports) != 1:
        return head
    [(protocol, ranges)] = ports.items()
    about, flags = attribute(_NUMBER, bytes([_NUMBERS[protocol]])), _BY_NUMBER
    only = {(each.first, each.last) for each in ranges}
    if len(only) == 1 and ranges[0].first == ranges[0].last:
        about += attribute(_DESTINATION_PORT, struct.pack(">H", ranges[0].first))
        flags |= _BY_DESTINATION_PORT
    original = attribute(_ORIGINAL | NESTED, attribute(_PROTO | NESTED, about))
    # The flags are the one number here in the machine's own order.
    return head + original + attribute(_FILTER | NESTED, attribute(_FLAGS_OF_ORIGINAL, struct.pack("=I", flags)))


def removal(one: Flow) -> bytes:
    """Return what asks for the removal of one flow.

    It always names the flow's addresses: a removal without them is one of all flows.
    """
    said = _head(Family.of(one.destination)) + attribute(_ORIGINAL | NESTED, one.key.original)
    said += attribute(_ZONE, one.key.zone) if one.key.zone is not None else b""
    return said + (attribute(_ID, one.key.id) if one.key.id is not None else b"")


def flow(message: bytes, family: Family) -> Flow | None:
    """Read a flow as it is sent; None where it is of another family, or of a protocol without ports."""
    about = read_attributes(message[4:])
    try:
        there, back = read_attributes(about[_ORIGINAL]), read_attributes(about[_REPLY])
        protocol, answer = read_attributes(there[_PROTO]), read_attributes(back[_PROTO])
        return Flow(
            protocol=_PROTOCOLS[protocol[_NUMBER][0]],
            destination=_address(read_attributes(there[_IP])[_DESTINATION[family]]),
            port=int.from_bytes(protocol[_DESTINATION_PORT][:2], "big"),
            reply_source=_address(read_attributes(back[_IP])[_SOURCE[family]]),
            reply_port=int.from_bytes(answer[_SOURCE_PORT][:2], "big"),
            key=Key(about[_ORIGINAL], about.get(_ZONE), about.get(_ID)),
        )
    except (LookupError, ValueError):
        return None


@functools.lru_cache(maxsize=1024)
def _address(packed: bytes) -> Address:
    return ip_address(packed)  # of many flows the same few


def _head(family: Family) -> bytes:
    return struct.pack("=BBH", _DOMAINS[family], 0, 0)


_NONE = bytes(1 << 16)


def _marked(ranges: Sequence[PortRange]) -> bytearray:
    """Return for each port whether it is one of these."""
    marked = bytearray(1 << 16)
    for each in ranges:
        marked[each.first : each.last + 1] = b"\1" * (each.last + 1 - each.first)
    return marked


class _Shape:
    """How every kernel until now sends the addresses and ports that a flow begins with: at the same places.

    So most flows need not be taken apart to see that they are not wanted, which takes ten times as long.
    """

    def __init__(self, family: Family) -> None:
        size = 4 + _SIZES[family]
        # Behind the message's head: the original side, in it the addresses, then protocol and ports. How long that
        # side is does not matter, as it may end with a zone.
        self._read = struct.Struct(f"=4x2xHI{2 * size}xIIB3x8xIBB")
        addresses = attribute(_IP | NESTED, bytes(2 * size))[:4]
        protocol = attribute(_PROTO | NESTED, bytes(24))[:4]
        number, port = attribute(_NUMBER, bytes(1))[:4], attribute(_DESTINATION_PORT, bytes(2))[:4]
        self._heads = (_ORIGINAL | NESTED, *struct.unpack("=IIII", addresses + protocol + number + port))

    def excludes(self, message: bytes, wanted: Mapping[int, bytearray]) -> bool:
        """Whether a flow is not to one of these ports; False where that is not seen from its shape."""
        if len(message) < self._read.size:
            return False
        side, addresses, part, number, protocol, port, high, low = self._read.unpack_from(message)
        if (side, addresses, part, number, port) != self._heads:
            return False
        marked = wanted.get(protocol)
        return marked is None or not marked[high << 8 | low]


_SIZES = {Family.IPV4: 4, Family.IPV6: 16}
_SHAPES = {family: _Shape(family) for family in Family}
