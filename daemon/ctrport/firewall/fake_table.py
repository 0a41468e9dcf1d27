"""Our own table in memory, with faults to switch on: a ``TableKernel`` for tests and dry runs.

It knows as much of nft as ``standing`` and ``tableplan`` write, and is as strict as the kernel about it: what is not
there cannot be deleted, what is there cannot be added, and a write is carried out whole or not at all.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_network

from ..model import Count, Family, Protocol
from . import FirewallError, Refused
from .sets import Element, Kind, Set, device, packed, port, protocol
from .standing import Standing
from .tableplan import Held, HeldChain, HeldSet

_HOOKS = {"prerouting": 0, "forward": 2, "output": 3, "postrouting": 4}
_HOOK = re.compile(r"\{ type (\w+) hook (\w+) priority (-?\d+) ; policy (\w+) ; \}")
_ELEMENT = re.compile(r'\{ (?P<key>.+?)(?: comment "(?P<comment>[^"]*)")?(?: : (?P<data>.+))? \}')


@dataclass
class Content:
    """What is in a table: sets as they were made, chains with the comments of their rules, and all elements."""

    sets: dict[str, HeldSet] = field(default_factory=dict)
    chains: dict[str, HeldChain] = field(default_factory=dict)
    elements: set[Element] = field(default_factory=set)


class MemoryTable:
    """The table of one family; ``content`` is None where there is none. ``writes`` counts what was committed."""

    def __init__(self, family: Family = Family.IPV4) -> None:
        self.family = family
        self.content: Content | None = None
        self.counted: dict[Element, Count] = {}
        self.writes = 0
        self.fail_next_write = False
        self._made: dict[str, Set] = {}

    async def read(self, standing: Standing) -> Held | None:
        """See ``TableKernel.read``."""
        self._made |= {one.name: one for one in standing.sets}
        if self.content is None:
            return None
        return Held(dict(self.content.sets), dict(self.content.chains), set(self.content.elements))

    async def counts(self, maps: Sequence[Set]) -> list[tuple[str, Count]]:
        """See ``TableKernel.counts``."""
        names = {one.name for one in maps}
        there = self.content.elements if self.content is not None else set[Element]()
        return [(one.comment, self.counted.get(one, Count())) for one in sorted(there) if one.set in names]

    async def dropping(self) -> list[str]:
        """See ``TableKernel.dropping``: nobody else is here."""
        return []

    async def load(self, text: str) -> None:
        """See ``TableKernel.load``."""
        self._commit([line.split(" ", 5) for line in text.splitlines()])

    async def write(self, gone: Sequence[Element], come: Sequence[Element], sets: Mapping[str, Set]) -> None:
        """See ``TableKernel.write``."""
        self._fail_if_asked()
        if self.content is None:
            raise Refused("the table could not be written: there is none")
        elements = set(self.content.elements)
        for each in gone:
            found = _by_key(elements, each)
            if found is None:
                raise Refused(f"the table could not be written: no such element: {each}")
            elements.discard(found)
        for each in come:
            if each.set not in self.content.sets or _by_key(elements, each) is not None:
                raise Refused(f"the table could not be written: no such set, or an element that is there: {each}")
            elements.add(each)
        self.content.elements = elements
        self.writes += 1

    async def delete(self) -> None:
        """See ``TableKernel.delete``."""
        self._fail_if_asked()
        self.content = None
        self.writes += 1

    async def close(self) -> None:
        """See ``TableKernel.close``."""

    def _fail_if_asked(self) -> None:
        if self.fail_next_write:
            self.fail_next_write = False
            raise FirewallError("the table could not be written: as asked")

    def _commit(self, lines: Sequence[Sequence[str]]) -> None:
        """Carry out lines, each as ``do what family table [name [rest]]``."""
        self._fail_if_asked()
        content = copy.deepcopy(self.content)
        for do, what, _, _, *more in lines:
            if what == "table":
                content = None if do == "delete" else content or Content()
                continue
            if content is None:
                raise Refused(f"{do} {what}: there is no table")
            self._carry_out(content, f"{do} {what}", more[0], "".join(more[1:]))
        self.content = content
        self.writes += 1

    def _carry_out(self, content: Content, do: str, name: str, rest: str) -> None:
        match do:
            case "add set" | "add map":
                content.sets[name] = HeldSet.of(self._made[name], self.family)
            case "add chain":
                content.chains[name] = _chain(rest, content.chains.get(name))
            case "add rule" if name in content.chains:
                tags = content.chains[name].tags
                content.chains[name] = replace(content.chains[name], tags=(*tags, rest.split('"')[-2]))
            case "flush chain" if name in content.chains:
                content.chains[name] = replace(content.chains[name], tags=())
            case "delete chain" if name in content.chains and not content.chains[name].tags:
                del content.chains[name]
            case "delete map" if name in content.sets:
                del content.sets[name]
                content.elements = {one for one in content.elements if one.set != name}
            case "add element" if name in content.sets:
                content.elements.add(_element(self._made[name], rest))
            case _:
                raise Refused(f"{do} {name}: not there, not empty, or not understood")


def _by_key(elements: set[Element], like: Element) -> Element | None:
    return next((one for one in elements if one[:3] == like[:3]), None)


def _chain(rest: str, there: HeldChain | None) -> HeldChain:
    found = _HOOK.fullmatch(rest)
    hook = None if found is None else (found[1], _HOOKS[found[2]], int(found[3]))
    if there is not None and there.hook != hook:
        raise Refused("a chain of that name is called from elsewhere")
    return HeldChain(hook, found is None or found[4] == "accept", () if there is None else there.tags)


def _element(of: Set, words: str) -> Element:
    found = _ELEMENT.fullmatch(words)
    assert found is not None, words
    firsts, lasts = zip(*map(_field, found["key"].split(" . "), of.key), strict=True)
    to = [_field(words, kind)[0] for words, kind in zip((found["data"] or "").split(" . "), of.data, strict=False)]
    end = packed(*lasts) if of.interval else b""
    return Element(of.name, packed(*firsts), end, packed(*to) if to else b"", found["comment"] or "")


def _field(words: str, kind: Kind) -> tuple[bytes, bytes]:
    """Return the first and the last value that words stand for."""
    match kind:
        case Kind.ADDRESS:
            network = ip_network(words)
            return network.network_address.packed, network.broadcast_address.packed
        case Kind.PROTOCOL:
            return protocol(Protocol(words)), protocol(Protocol(words))
        case Kind.PORT:
            first, _, last = words.partition("-")
            return port(int(first)), port(int(last or first))
        case Kind.DEVICE:
            return device(words.strip('"')), device(words.strip('"'))
    raise AssertionError(kind)  # pragma: no cover - every kind is above
