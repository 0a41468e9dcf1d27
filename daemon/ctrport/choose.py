"""Which free host ports are offered to a mapping that names none. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .model import PortRange


def blocks(ranges: Iterable[PortRange], length: int) -> Iterator[PortRange]:
    """Return every block of ``length`` ports in a row, from the lowest on, that is within one of ``ranges``."""
    for ports in ranges:
        for first in range(ports.first, ports.last - length + 2):
            yield PortRange(first, first + length - 1)


class Ring:
    """Offers blocks of ports behind the one that was taken last, so that a port rests after it was given up.

    A client that still talks to the port of a container that ended is not to meet the next container there.
    """

    def __init__(self) -> None:
        self._next = 0

    def blocks(self, ranges: Iterable[PortRange], length: int) -> Iterator[PortRange]:
        """Return every block of ``length`` ports in a row, the next one first."""
        ranges, begin = tuple(ranges), self._next
        rest = (PortRange(max(each.first, begin), each.last) for each in ranges if each.last >= begin)
        yield from blocks(rest, length)
        before = (PortRange(each.first, min(each.last, begin + length - 2)) for each in ranges if each.first < begin)
        yield from blocks(before, length)

    def turn(self, taken: PortRange) -> None:
        """Go on behind ``taken``."""
        self._next = taken.last + 1
