"""Which lines of a file claim the same host port: by ranges, at a cost that grows with the text alone. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

from .model import Mapping, PortRange


class Claims:
    """Who claims which host ports, as ``Mapping.overlaps`` judges it.

    By ranges: one line can claim every port there is, and a file has room for thousands of them.
    """

    def __init__(self) -> None:
        self._taken: dict[tuple[object, ...], _Taken] = {}
        self._turn = 0

    def claim(self, mapping: Mapping, who: str) -> str | None:
        """Take in that ``who`` claims the host ports of ``mapping``; return who has one of them already."""
        if mapping.host_ports is None or mapping.dynamic:
            return None
        self._turn += 1
        found: list[tuple[int, int, str]] = []
        for family in mapping.families:
            anybody, anywhere = (mapping.protocol, family, "anybody"), (mapping.protocol, family, "anywhere")
            its = anywhere if mapping.any_host_ip else (mapping.protocol, family, mapping.host_ip)
            found += (
                first
                for place in ([anybody] if mapping.any_host_ip else [anywhere, its])
                if (first := self._at(place).first(mapping.host_ports)) is not None
            )
            for place in (anybody, its):
                self._at(place).take(mapping.host_ports, self._turn, who)
        return min(found)[-1] if found else None

    def _at(self, place: tuple[object, ...]) -> _Taken:
        return self._taken.setdefault(place, _Taken())


class _Taken:
    """Ports that are taken, each by the first who did."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int, int, str]] = []  # first and last port, the turn, and who
        self._covered: list[tuple[int, int]] = []  # the same without who: as few as can be

    def first(self, ports: PortRange) -> tuple[int, int, str] | None:
        """Return the lowest of ``ports`` that is taken, in which turn and by whom."""
        at = bisect_left(self._pieces, ports.first, key=lambda piece: piece[1])
        if at == len(self._pieces) or self._pieces[at][0] > ports.last:
            return None
        begin, _, turn, who = self._pieces[at]
        return (max(begin, ports.first), turn, who)

    def take(self, ports: PortRange, turn: int, who: str) -> None:
        """Take those of ``ports`` that are free yet."""
        at = bisect_left(self._covered, ports.first, key=lambda piece: piece[1])
        end = bisect_right(self._covered, ports.last, key=lambda piece: piece[0])
        free = ports.first
        for first, last in [*self._covered[at:end], (ports.last + 1, ports.last + 1)]:
            if free < first:
                insort(self._pieces, (free, first - 1, turn, who))
            free = last + 1
        touched = [*self._covered[at:end], (ports.first, ports.last)]
        self._covered[at:end] = [(min(first for first, _ in touched), max(last for _, last in touched))]
