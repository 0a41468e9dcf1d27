"""Which ports may be chosen at random: what the kernel itself gives to sockets that ask for none in particular.

Programs and operators keep out of that range already, and what they need in it they reserve by sysctl.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from .model import PortRange

#: What Docker takes random ports from where the kernel does not say.
DEFAULT_RANDOM_PORTS = PortRange(49153, 65535)


def random_ports(directory: Path = Path("/proc/sys/net/ipv4")) -> tuple[PortRange, ...]:
    """Return the kernel's ephemeral range without the ports reserved from it (ip-sysctl), lowest first."""
    try:
        ephemeral = parse_port_range((directory / "ip_local_port_range").read_text())
        reserved = parse_reserved((directory / "ip_local_reserved_ports").read_text())
    except (OSError, ValueError):
        return (DEFAULT_RANDOM_PORTS,)
    return tuple(without(ephemeral, reserved))


def parse_port_range(text: str) -> PortRange:
    """Read ip_local_port_range, such as "32768 60999". Raises ValueError."""
    first, last = text.split()
    return PortRange(int(first), int(last))


def parse_reserved(text: str) -> list[PortRange]:
    """Read ip_local_reserved_ports, such as "8080,9148-9150", often empty. Raises ValueError."""
    ranges = (part.partition("-") for part in text.strip().split(",") if part)
    return [PortRange(int(first), int(last or first)) for first, _, last in ranges]


def without(ports: PortRange, taken: Iterable[PortRange]) -> Iterator[PortRange]:
    """Return what is left of ``ports``, lowest first."""
    first = ports.first
    for one in sorted(taken):
        if first < one.first and first <= ports.last:
            yield PortRange(first, min(one.first - 1, ports.last))
        first = max(first, one.last + 1)
    if first <= ports.last:
        yield PortRange(first, ports.last)
