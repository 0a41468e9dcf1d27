"""What rules compare with: numbers, ranges, names, sets and maps of them. Pure.

A set can have a hundred thousand elements, so what is looked up exactly is found by its hash. What is not understood of
a set is not left out: then what is not found in it is not known to be missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from .packet import Absent, Reading, Span

T = TypeVar("T")


@dataclass(frozen=True)
class Name:
    """A name, or all that begin with ``text`` where it is a ``prefix``: eth+ of iptables, eth* of nft."""

    text: str
    prefix: bool = False


#: One value, a range of them, or a name.
Pattern = Span | Name


def compare(pattern: Pattern, reading: Reading) -> bool | None:
    """Whether what a packet has is what is meant; None where that cannot be told."""
    if reading is None or isinstance(reading, Absent):
        return None
    if isinstance(reading, str):
        if not isinstance(pattern, Name):
            return None  # a number for what has a name: nobody knows it here
        return reading.startswith(pattern.text) if pattern.prefix else reading == pattern.text
    if isinstance(pattern, Name):
        return None
    if reading[1] < pattern[0] or pattern[1] < reading[0]:
        return False
    return True if pattern[0] <= reading[0] and reading[1] <= pattern[1] else None


@dataclass(frozen=True)
class Found(Generic[T]):
    """What a look-up found: one ``value`` where it is ``sure``, or those that it may be. None: not in it."""

    values: tuple[T | None, ...]

    @property
    def sure(self) -> bool:
        """Whether there is one answer."""
        return len(self.values) == 1


class Elements(Generic[T]):
    """A set, or a map to ``T``. Each element has as many patterns as a look-up has readings.

    ``unread`` is whether there are elements that were not understood.
    """

    def __init__(self, elements: Iterable[tuple[tuple[Pattern, ...], T]], unread: bool = False) -> None:
        self._exact: dict[tuple[int | str, ...], T] = {}
        self._wide: list[tuple[tuple[Pattern, ...], T]] = []
        self._unread = unread
        for patterns, value in elements:
            key = _key(patterns)
            if key is None:
                self._wide.append((patterns, value))
            else:
                self._exact.setdefault(key, value)

    def find(self, readings: Sequence[Reading]) -> Found[T]:
        """Look up what a packet has."""
        key = _key(readings)
        if key is not None and key in self._exact:
            return Found((self._exact[key],))
        possible: dict[T | None, None] = {}
        for patterns, value in self._wide:
            hit = _all(patterns, readings)
            if hit:
                return Found((value,))
            if hit is None:
                possible[value] = None
        if key is None:
            for exact, value in self._exact.items():
                if (
                    _all(tuple(Name(part) if isinstance(part, str) else (part, part) for part in exact), readings)
                    is None
                ):
                    possible[value] = None
        if self._unread and not possible:
            return Found((None, None))
        return Found((*possible, None)) if possible else Found((None,))


def _key(parts: Sequence[Pattern | Reading]) -> tuple[int | str, ...] | None:
    """Return what finds exactly this; None where it is more than one thing, or not known."""
    key: list[int | str] = []
    for part in parts:
        if isinstance(part, tuple) and part[0] == part[1]:
            key.append(part[0])
        elif isinstance(part, Name) and not part.prefix:
            key.append(part.text)
        elif isinstance(part, str):
            key.append(part)
        else:
            return None
    return tuple(key)


def _all(patterns: Sequence[Pattern], readings: Sequence[Reading]) -> bool | None:
    """Whether each is met: one that is not decides, whatever cannot be told of others."""
    if len(patterns) != len(readings):
        return None
    found: bool | None = True
    for pattern, reading in zip(patterns, readings, strict=True):
        its = compare(pattern, reading)
        if its is False:
            return False
        found = found if its else None
    return found
