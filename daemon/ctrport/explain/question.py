"""What is asked: ``8080``, ``8080/udp``, ``ADDRESS:8080``; and from where the packet is to come. Pure.

Who names neither address means a client beyond the node's default route, at the address of the node that it would use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address

from ..model import Address, Family, Network, Protocol
from ..ports import quoted
from .facts import Facts, Route, RouteTo
from .packet import Packet

GRAMMAR = "PORT, ADDRESS:PORT or [IPv6]:PORT, and perhaps /tcp, /udp or /sctp"


class QuestionError(ValueError):
    """What is asked cannot be read, or makes no sense here. One sentence: what is wrong, and what was expected."""


@dataclass(frozen=True)
class Asked:
    """A port, and the addresses that were named. ``family`` is theirs; None where none was."""

    port: int
    protocol: Protocol
    address: Address | None = None
    source: Address | None = None
    family: Family | None = None


@dataclass(frozen=True)
class Inquiry:
    """The packet that is meant. ``origin`` is client, node or container; ``sender`` says who that is."""

    packet: Packet
    origin: str
    sender: str


_ASKED = re.compile(r"(?:(?:\[(?P<v6>[^]]*)\]|(?P<v4>[^]/:]*)):)?(?P<port>[0-9]+)(?:/(?P<protocol>[A-Za-z]+))?")


def read(port: str, source: str | None = None) -> Asked:
    """Read what was asked. Raises ``QuestionError``."""
    found = _ASKED.fullmatch(port)
    if found is None:
        raise QuestionError(f"{quoted(port)} is no port; expected {GRAMMAR}")
    number = int(found["port"]) if len(found["port"]) < 6 else 65536
    if not 1 <= number <= 65535 or found["port"].startswith("0"):
        raise QuestionError(f"{quoted(port)} has the port {quoted(found['port'])}; expected a number from 1 to 65535")
    protocols = {str(each): each for each in Protocol}
    protocol = protocols.get((found["protocol"] or "tcp").lower())
    if protocol is None:
        raise QuestionError(f"{quoted(port)} has the protocol {quoted(found['protocol'])}; expected tcp, udp or sctp")
    text = found["v4"] if found["v6"] is None else found["v6"]
    address = None if text is None else _address(text, IPv4Address if found["v6"] is None else IPv6Address, port)
    client = None if source is None else _source(source)
    if address is not None and client is not None and address.version != client.version:
        raise QuestionError(f"{client} cannot send to {address}; expected addresses of one family")
    named = address or client
    if address is not None and address.is_unspecified:
        address = None  # as in a mapping: every address
    return Asked(number, protocol, address, client, None if named is None else Family.of(named))


def _address(text: str, kind: type[IPv4Address] | type[IPv6Address], whole: str) -> Address:
    try:
        return _plain(kind(text))
    except ValueError:
        expected = "an IPv4 address, or an IPv6 address in brackets"
        raise QuestionError(f"{quoted(whole)} has the address {quoted(text)}; expected {expected}") from None


def _source(text: str) -> Address:
    try:
        found = _plain(ip_address(text[1:-1] if text.startswith("[") and text.endswith("]") else text))
    except ValueError:
        raise QuestionError(f"--from has {quoted(text)}; expected an IPv4 or IPv6 address") from None
    if found.is_unspecified or found.is_multicast:
        raise QuestionError(f"nobody sends from {found}; expected the address of a host for --from")
    return found


def _plain(address: Address) -> Address:
    """Return an address that has no zone. Raises ``ValueError``."""
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise ValueError
    return address


def inquire(asked: Asked, facts: Facts) -> Inquiry:
    """Return the packet that is meant on this node. Raises ``QuestionError``, and ``Ask``."""
    family = asked.family or usual_family(facts.addresses)
    source, chosen = asked.source, False
    if source is None:
        source, chosen = _client(asked.address, family, facts), True
    own = facts.is_own(source)
    device = None if own else _device(source, asked.address, facts)
    destination = asked.address or _destination(source, device, own, family, facts)
    packet = Packet.first(asked.protocol, source, destination, asked.port)
    if own:
        return Inquiry(packet, "node", "the node itself")
    if device is None:
        raise QuestionError(
            f"the node has no device that a packet from {source} could come in by; expected another --from"
        )
    inhabitant = None if chosen else facts.inhabitant(source)
    sender = "some client, as --from names none" if chosen else f"container {inhabitant.name}" if inhabitant else ""
    return Inquiry(replace(packet, in_device=device), "container" if inhabitant else "client", sender)


def usual_family(addresses: Iterable[tuple[str, IPv4Interface | IPv6Interface]]) -> Family:
    """Return the family that is meant where no address says it: IPv4, unless the node has none."""
    versions = {its.version for _, its in addresses if not its.ip.is_loopback and not its.ip.is_link_local}
    return Family.IPV6 if versions == {6} else Family.IPV4


#: An address that is nowhere, and so beyond the default route (RFC 5737, RFC 3849).
_FAR: dict[Family, Address] = {Family.IPV4: IPv4Address("192.0.2.1"), Family.IPV6: IPv6Address("2001:db8::1")}


def _client(address: Address | None, family: Family, facts: Facts) -> Address:
    """Return some address that a client can have: on the link that ``address`` is on, or that the default route is."""
    route = facts.route(RouteTo(_FAR[family]))
    outward = route.device if isinstance(route, Route) and route.kind == "unicast" else ""
    if address is not None and address.is_loopback:
        return address  # nobody else gets there
    devices = [name for name, its in facts.addresses if its.ip == address] if address is not None else []
    devices += [outward, *(name for name, _ in facts.addresses if name != "lo" and name not in facts.bridges)]
    for device in devices:
        for name, its in facts.addresses:
            if name != device or Family.of(its.ip) is not family or its.ip.is_link_local or name == "lo":
                continue
            found = _somebody(its.network, facts, route.gateway if isinstance(route, Route) else None)
            if found is not None:
                return found
    raise QuestionError("there is no network that a client could be on; expected --from ADDRESS")


def _somebody(network: Network, facts: Facts, gateway: Address | None) -> Address | None:
    """Return an address of a network that nobody is known to have: from its end, where few are given away."""
    last = int(network.broadcast_address) - (1 if network.version == 4 and network.prefixlen < 31 else 0)
    for number in range(last, max(last - 8, int(network.network_address)), -1):
        address = IPv4Address(number) if network.version == 4 else IPv6Address(number)
        if address != gateway and not facts.is_own(address) and facts.type_of(address) == "unicast":
            return address
    return None


def _device(source: Address, destination: Address | None, facts: Facts) -> str | None:
    """Return the device that a packet from ``source`` comes in by.

    That is where its address belongs. One from elsewhere is sent to an address of the node, and comes where that is.
    """
    near = [(its.network.prefixlen, name) for name, its in facts.addresses if source in its.network and name != "lo"]
    if near:
        return max(near)[1]
    there = [name for name, its in facts.addresses if its.ip == destination and name != "lo"]
    there = [name for name in there if name not in facts.bridges]
    route = facts.route(RouteTo(source))
    way = route.device if isinstance(route, Route) and route.kind == "unicast" else None
    if facts.inhabitant(source) is not None:
        return way  # a container by a device of its own
    return there[0] if there else way


def _destination(source: Address, device: str | None, own: bool, family: Family, facts: Facts) -> Address:
    """Return the address of the node that who is at ``source`` would use."""
    if own:
        return source
    beside = [its for name, its in facts.addresses if name == device and source in its.network]
    if beside and facts.inhabitant(source) is None:
        return beside[0].ip
    outward = facts.route(RouteTo(_FAR[family]))
    found = outward.source if isinstance(outward, Route) and outward.kind == "unicast" else None
    found = found or (beside[0].ip if beside else facts.address_of(device or "", family))
    if found is None:
        raise QuestionError("the node has no address of that family; expected ADDRESS:PORT")
    return found
