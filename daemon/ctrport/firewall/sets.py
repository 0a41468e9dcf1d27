"""The sets and maps of our own table: what their elements are made of, as bytes for the kernel and in the words of nft.

Pure. Everything that changes is an element, so that a packet is looked up in the same few steps whatever there is, and
a change writes what it is about. An element is bytes, as the kernel has it: so it can be compared exactly, and read
back into words without having been known.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, summarize_address_range
from typing import NamedTuple

from ..model import Family, Protocol
from ..rules import Gate, Layout

#: The name of our table, in each family.
TABLE = "ctrport"
#: What an element of ours bears as its comment, and a rule of ours with a digest of itself as the owner. The kernel
#: takes 256 bytes with what is around it. The program nft writes no more than 128, and lists all of them.
COMMENT = re.compile(r"ctrport (?P<owner>[A-Za-z0-9._/:=@\[\] -]{1,240})")


class Kind(enum.Enum):
    """What a field of an element holds, as nft calls it; ``ADDRESS`` is of the table's own family."""

    ADDRESS = "addr"
    PROTOCOL = "inet_proto"
    PORT = "inet_service"
    DEVICE = "ifname"


_SIZES = {Kind.PROTOCOL: 1, Kind.PORT: 2, Kind.DEVICE: 16}
_NUMBERS = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}
_PROTOCOLS = {number: protocol.value for protocol, number in _NUMBERS.items()}


class Element(NamedTuple):
    """One element: its key, or where it is an interval the first and the last (``end``, else empty), and its data."""

    set: str
    key: bytes
    end: bytes
    data: bytes
    comment: str

    @property
    def owner(self) -> str:
        """Whose it is, in the words of its comment; empty where it is not ours."""
        found = COMMENT.fullmatch(self.comment)
        return found["owner"] if found else ""


@dataclass(frozen=True)
class Set:
    """A set, or a map where there is ``data``: what each of its elements has to have.

    ``nested``: what is wanted in it may lie within one another; the kernel takes no such intervals.
    """

    name: str
    key: tuple[Kind, ...]
    data: tuple[Kind, ...] = ()
    interval: bool = False
    nested: bool = False

    def key_size(self, family: Family) -> int:
        """Return how many bytes a key has."""
        return _length(self.key, family)

    def data_size(self, family: Family) -> int:
        """Return how many bytes the data have; 0 in a set."""
        return _length(self.data, family) if self.data else 0

    def words(self, family: Family) -> str:
        """Return what makes it, as nft reads it."""
        kinds = " . ".join(_name(kind, family) for kind in self.key)
        data = " : " + " . ".join(_name(kind, family) for kind in self.data) if self.data else ""
        flags = " flags interval ;" if self.interval else ""
        counter = " counter ;" if self.data else ""  # each mapping counts its connections
        what = "map" if self.data else "set"
        return f"add {what} {table(family)} {self.name} {{ type {kinds}{data} ;{flags}{counter} }}"


_A, _P, _S, _D = Kind.ADDRESS, Kind.PROTOCOL, Kind.PORT, Kind.DEVICE


def _sets() -> Iterator[Set]:
    # Where a packet to an address of the node goes: by the address, the protocol and the port that it was sent to.
    yield Set("host-ports", (_P, _S), (_A, _S))
    yield Set("host-ports-at", (_A, _P, _S), (_A, _S))
    for protocol in Protocol:  # a set of intervals of one field is searched and changed sooner than one of several
        yield Set(f"host-ranges-{protocol}", (_S,), (_A,), interval=True)
    yield Set("host-ranges-at", (_A, _P, _S), (_A,), interval=True)
    # Addresses that are the node's, and those that look so and are a Service's.
    yield Set("node-addresses", (_A,))
    yield Set("services", (_A,))
    # What was sent there by that: the container's address and port, and the port that was asked, perhaps at which
    # address.
    yield Set("published", (_A, _P, _S, _S))
    yield Set("published-at", (_A, _A, _P, _S, _S))
    for protocol in Protocol:
        yield Set(f"published-ranges-{protocol}", (_S,), interval=True)
    yield Set("published-ranges-at", (_A, _P, _S), interval=True)
    yield Set("range-hosts", (_A, _P))
    # Devices behind which something is published, and those of them by which the node goes to 127.0.0.1.
    yield Set("link-devices", (_D,))
    yield Set("localnet-devices", (_D,))
    # From where to where a container could not be answered: within one subnet, and to itself.
    yield Set("links", (_A, _A), interval=True, nested=True)
    yield Set("selves", (_A, _A))
    # Bridges that are run the Docker way.
    yield Set("bridges", (_D,))
    yield Set("bridge-pairs", (_D, _D))
    yield Set("subnets", (_A,), interval=True, nested=True)
    yield Set("subnet-bridges", (_A, _D), interval=True, nested=True)


_STANDING = tuple(_sets())


def gate_maps(gate: Gate) -> tuple[Set, Set]:
    """Return where mappings are that are not for everybody in that way: at one address of the node, and at all."""
    key = ((_A,) if gate.length else ()) + ((_D,) if gate.interface else ())
    names = [f"from-{gate.length}"] if gate.length else []
    name = "-".join(names + ["by-device"] * gate.interface)
    return Set(f"{name}-at", (*key, _A, _P, _S), (_A, _S)), Set(name, (*key, _P, _S), (_A, _S))


def sets(layout: Layout, family: Family) -> tuple[Set, ...]:
    """Return the sets and maps of the table, in the order in which they are made."""
    its = (gate for gate in layout.gates if gate.version == family.value)
    return (*_STANDING, *(one for gate in its for one in gate_maps(gate)))


_GATE = re.compile(r"(?:from-(?P<length>\d{1,3})(?P<both>-by-device)?|(?P<device>by-device))(?P<at>-at)?")


def gate_map(name: str) -> Set | None:
    """Return the map of a gate by its name, None where that is no such name: of another layout perhaps."""
    found = _GATE.fullmatch(name)
    if found is None:
        return None
    gate = Gate(4, int(found["length"] or 0), bool(found["both"] or found["device"]))
    return gate_maps(gate)[not found["at"]]


def table(family: Family) -> str:
    """Return what nft calls our table of one family."""
    return f"{'ip' if family is Family.IPV4 else 'ip6'} {TABLE}"


# Bytes.


def packed(*fields: bytes) -> bytes:
    """Return the fields of a key, or of data, as the kernel has them: of several each begins at a multiple of four."""
    return fields[0] if len(fields) == 1 else b"".join([field + b"\0" * (-len(field) % 4) for field in fields])


def protocol(its: Protocol) -> bytes:
    """Return a protocol as a field."""
    return bytes([_NUMBERS[its]])


def port(number: int) -> bytes:
    """Return a port as a field."""
    return number.to_bytes(2, "big")


def device(name: str) -> bytes:
    """Return a device as a field."""
    return name.encode("ascii").ljust(_SIZES[Kind.DEVICE], b"\0")


def outermost(elements: Iterable[Element], of: Set, family: Family) -> list[Element]:
    """Return those of them that do not lie within another, of equal ones the first."""
    kept: list[Element] = []
    # What another lies within begins first, or ends later.
    for element in sorted(elements, key=lambda one: (one.key, _reverse(one.end), one.comment)):
        if not any(_within(element, other, of, family) for other in kept):
            kept.append(element)
    return kept


def _reverse(end: bytes) -> bytes:
    return bytes(255 - byte for byte in end)


def _within(inner: Element, outer: Element, of: Set, family: Family) -> bool:
    ends = zip(_fields(inner.end, of.key, family), _fields(outer.end, of.key, family), strict=True)
    begins = zip(_fields(inner.key, of.key, family), _fields(outer.key, of.key, family), strict=True)
    return all(its >= others for its, others in begins) and all(its <= others for its, others in ends)


def _length(kinds: tuple[Kind, ...], family: Family) -> int:
    sizes = [_size(kind, family) for kind in kinds]
    return sizes[0] if len(sizes) == 1 else sum(size + -size % 4 for size in sizes)


def _size(kind: Kind, family: Family) -> int:
    return _SIZES.get(kind) or (4 if family is Family.IPV4 else 16)


def _fields(data: bytes, kinds: tuple[Kind, ...], family: Family) -> Iterator[bytes]:
    at = 0
    for kind in kinds:
        size = _size(kind, family)
        yield data[at : at + size]
        at += size + (-size % 4 if len(kinds) > 1 else 0)


# Words.


def add(element: Element, of: Set, family: Family) -> str:
    """Return what adds an element, as nft reads it and lists it."""
    comment = f' comment "{element.comment}"' if element.comment else ""
    data = " : " + _said(element.data, element.data, of.data, family) if of.data else ""
    key = _said(element.key, element.end or element.key, of.key, family)
    return f"add element {table(family)} {of.name} {{ {key}{comment}{data} }}"


def delete(element: Element, of: Set, family: Family) -> str:
    """Return what deletes an element, as nft reads it, with its comment as a remark."""
    key = _said(element.key, element.end or element.key, of.key, family)
    return f"delete element {table(family)} {of.name} {{ {key} }}" + (
        f"  # {element.comment}" if element.comment else ""
    )


def _said(first: bytes, last: bytes, kinds: tuple[Kind, ...], family: Family) -> str:
    pairs = zip(_fields(first, kinds, family), _fields(last, kinds, family), kinds, strict=True)
    return " . ".join(_field(one, other, kind) for one, other, kind in pairs)


def _field(first: bytes, last: bytes, kind: Kind) -> str:
    if first == last:
        return _value(first, kind)
    if kind is Kind.ADDRESS:
        [*networks] = summarize_address_range(*_ends(first, last))
        if len(networks) == 1:
            return str(networks[0])
    return f"{_value(first, kind)}-{_value(last, kind)}"


def _ends(first: bytes, last: bytes) -> tuple[IPv4Address, IPv4Address] | tuple[IPv6Address, IPv6Address]:
    if len(first) == 4:
        return IPv4Address(first), IPv4Address(last)
    return IPv6Address(first), IPv6Address(last)


def _value(field: bytes, kind: Kind) -> str:
    match kind:
        case Kind.ADDRESS:
            return str(_ends(field, field)[0])
        case Kind.PROTOCOL:
            return _PROTOCOLS.get(field[0], str(field[0]))
        case Kind.PORT:
            return str(int.from_bytes(field, "big"))
        case Kind.DEVICE:
            return '"' + field.rstrip(b"\0").decode(errors="replace") + '"'
    raise AssertionError(kind)  # pragma: no cover - every kind is above


def _name(kind: Kind, family: Family) -> str:
    return f"ipv{family.value}_addr" if kind is Kind.ADDRESS else kind.value
