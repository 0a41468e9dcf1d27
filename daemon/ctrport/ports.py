"""The grammar of ``docker run -p``: ``[hostIP:][hostPort[-end]:]containerPort[-end][/protocol]``.

It owns the way from text to `Mapping`; the way back is ``str(mapping)``. Whatever `parse` takes prints to text that
parses to the same mapping. It only reads the grammar: whether a mapping can be served is for others to say.

What Docker's own parser (go-connections, nat.ParsePortSpec) takes and this one does not, because it reads as a slip:

- port 0, and ports with a sign or leading zeros (``+80``, ``0080``);
- an empty host address or host port where none is needed (``:80``, ``::80``, ``:8080:80``), and an empty protocol
  (``80/``);
- an IPv6 address without brackets (``::1:8080:80``, where nobody can tell the address from the ports), and an IPv4
  address with them;
- an IPv4-mapped IPv6 address, which Go quietly turns into the IPv4 address;
- in older releases, a third part of a range (``1-2-3``), dropped without a word.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address

from .model import Address, Mapping, PortRange, Protocol

GRAMMAR = "[hostIP:][hostPort[-end]:]containerPort[-end][/protocol]"

_SHOWN_MAX = 60
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_PORT_EXPECTED = "expected a number from 1 to 65535"
_ADDRESS_EXPECTED = "expected an IPv4 address or an IPv6 address in brackets"
_PROTOCOLS = {str(protocol): protocol for protocol in Protocol}


class PortSpecError(ValueError):
    """A port mapping that is not one. Its text is one sentence: what is wrong, and what was expected."""


def parse(text: str) -> Mapping:
    """Return the mapping that ``text`` stands for, as ``docker run -p`` would read it.

    Raises `PortSpecError` where it stands for none.
    """
    if text == "":
        raise PortSpecError(f"the port mapping is empty; expected {GRAMMAR}, such as 8080:80")
    ports, protocol = _split_protocol(text)
    host_ip, host, container = _split_parts(text, ports)
    container_ports = _ports(text, container, "container port")
    host_ports = None if host is None else _ports(text, host, "host port")
    if host_ports is not None and len(host_ports) != len(container_ports) and len(container_ports) != 1:
        raise PortSpecError(
            f"{quoted(text)} has {_count(host_ports, 'host port')} for {_count(container_ports, 'container port')}; "
            "expected as many of the one as of the other, or a single container port"
        )
    return Mapping(host_ip, host_ports, container_ports, protocol)


def quoted(text: str) -> str:
    """Return ``text`` in quotes for a message: escaped, so that nothing reaches a terminal as a command, and cut."""
    shown = repr(text[: _SHOWN_MAX + 1])
    # The cut is made after escaping: one character can become ten.
    return shown if len(shown) <= _SHOWN_MAX + 2 else f"{shown[: _SHOWN_MAX - 2]}...{shown[0]}"


def _split_protocol(text: str) -> tuple[str, Protocol]:
    ports, *rest = text.split("/")
    if not rest:
        return ports, Protocol.TCP
    if len(rest) > 1:
        raise PortSpecError(f"{quoted(text)} has more than one '/'; expected {GRAMMAR}")
    # Not casefold(), nor upper(): they would take a long s for an s.
    protocol = _PROTOCOLS.get(rest[0].lower())
    if protocol is None:
        given = f"has the protocol {quoted(rest[0])}" if rest[0] else "has no protocol after the '/'"
        raise PortSpecError(f"{quoted(text)} {given}; expected tcp, udp or sctp")
    return ports, protocol


def _split_parts(text: str, ports: str) -> tuple[Address | None, str | None, str]:
    """Return the host address, the host ports and the container ports; the ports are still text."""
    if ports.startswith("["):
        address, bracket, rest = ports[1:].partition("]")
        if not bracket:
            raise PortSpecError(f"{quoted(text)} has a '[' without its ']'; {_ADDRESS_EXPECTED}")
        if not rest.startswith(":"):
            raise PortSpecError(f"{quoted(text)} has no ':' after the host address; expected {GRAMMAR}")
        host_ip: Address | None = _ipv6(text, address)
        parts = rest[1:].split(":")
        if len(parts) > 2:
            raise PortSpecError(f"{quoted(text)} has too many ':'; expected {GRAMMAR}")
        if len(parts) == 1:
            raise _only_one_port(text, f"[{address}]", parts[0])
    else:
        parts = ports.split(":")
        if len(parts) > 3 and _is_ipv4(parts[0]):
            raise PortSpecError(f"{quoted(text)} has too many ':'; expected {GRAMMAR}")
        if len(parts) > 3:
            raise PortSpecError(
                f"{quoted(text)} has too many ':' for an IPv4 address and two ports; "
                "expected brackets around an IPv6 address, such as [::1]:8080:80"
            )
        host_ip = None
        if len(parts) == 3:
            host_ip = _ipv4(text, parts[0])
            del parts[0]
        elif len(parts) == 2 and _is_ipv4(parts[0]):
            raise _only_one_port(text, parts[0], parts[1])
    if len(parts) == 1:
        return host_ip, None, parts[0]
    host, container = parts
    # Docker's way to say "this address, any free port": 127.0.0.1::80.
    return host_ip, None if host == "" and host_ip is not None else host, container


def _only_one_port(text: str, address: str, port: str) -> PortSpecError:
    port = port if _PORT.fullmatch(port) is not None else "80"
    return PortSpecError(
        f"{quoted(text)} has a host address and only one port; "
        f"expected {quoted(f'{address}:8080:{port}')}, or {quoted(f'{address}::{port}')} for any free host port"
    )


def _is_ipv4(text: str) -> bool:
    try:
        IPv4Address(text)
    except ValueError:
        return False
    return True


def _ipv4(text: str, address: str) -> IPv4Address:
    try:
        return IPv4Address(address)
    except ValueError:
        raise _bad_address(text, address) from None


def _ipv6(text: str, address: str) -> IPv6Address:
    if "%" in address:
        raise PortSpecError(
            f"{quoted(text)} has the zone {quoted(address.partition('%')[2])} in its host address; "
            "expected the address alone, since no rule can hold a zone"
        )
    try:
        host_ip = IPv6Address(address)
    except ValueError:
        raise _bad_address(text, address) from None
    if host_ip.ipv4_mapped is not None:
        # Packets to it are IPv4 packets, so taken literally the mapping would never see one.
        raise PortSpecError(
            f"{quoted(text)} has an IPv4 address written as IPv6; expected it plainly, {host_ip.ipv4_mapped}"
        )
    return host_ip


def _bad_address(text: str, address: str) -> PortSpecError:
    if address == "":
        return PortSpecError(f"{quoted(text)} has an empty host address; {_ADDRESS_EXPECTED}, or none and no ':'")
    return PortSpecError(f"{quoted(text)} has the host address {quoted(address)}; {_ADDRESS_EXPECTED}")


def _ports(text: str, ports: str, what: str) -> PortRange:
    if ports == "":
        raise PortSpecError(f"{quoted(text)} has no {what}; expected {GRAMMAR}")
    ends = ports.split("-")
    if len(ends) > 2:
        raise PortSpecError(
            f"{quoted(text)} has the {what} {quoted(ports)}; expected a port or a range, such as 8000-8010"
        )
    first, last = _port(text, ends[0], what), _port(text, ends[-1], what)
    if last < first:
        raise PortSpecError(f"{quoted(text)} has a {what} range that runs backwards; expected {last}-{first}")
    return PortRange(first, last)


def _port(text: str, port: str, what: str) -> int:
    # int() alone would take signs, spaces, underscores and the digits of every script.
    if _PORT.fullmatch(port) is not None and int(port) <= 65535:
        return int(port)
    if port == "":
        raise PortSpecError(f"{quoted(text)} has a {what} range with an open end; {_PORT_EXPECTED} at both ends")
    plain = "" if port.isascii() and port.isdigit() and port[0] != "0" else " in plain digits, no leading zeros"
    plain = "" if port == "0" else plain
    raise PortSpecError(f"{quoted(text)} has the {what} {quoted(port)}; {_PORT_EXPECTED}{plain}")


def _count(ports: PortRange, what: str) -> str:
    return f"{len(ports)} {what}" + ("" if len(ports) == 1 else "s")
