"""Who gets which host port: claims in, publications out.

Pure, and incremental: only what a change can reach is decided again. A claim is a mapping that could be served; what
cannot be keeps nobody out, and is none. A host port that was chosen stays as it was for as long as it can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

from .choose import Ring, blocks
from .contest import Cell, Contest, cells
from .model import (
    Access,
    Attachment,
    ContainerKey,
    Family,
    Holder,
    Mapping,
    NodeFacts,
    PortRange,
    Publication,
    State,
    Unread,
)

#: What a publication goes by: the container, or the source of a declaration that matches none; what is asked for, and
#: who may reach it. The same asked for twice is one.
Key = tuple[ContainerKey | str, Mapping | Unread, Access]
#: What containers stand in line for: a declaration, and a mapping of it.
_Line = tuple[int, Mapping]


@dataclass(frozen=True)
class Claim:
    """A mapping of a container that could be served, if no earlier claim has its host port.

    ``started`` is when the container started. ``position`` is that of the declaration among those of its kind, and of
    the mapping in it; ``own`` is whether the container declared it by itself, ``shared`` whether the declaration is one
    of many containers.
    """

    started: int
    container: ContainerKey
    position: tuple[int, int]
    mapping: Mapping
    source: str
    attachments: tuple[Attachment, ...]
    pod: str | None
    access: Access
    own: bool = False
    shared: bool = False

    @property
    def precedence(self) -> tuple[bool, int, ContainerKey, tuple[int, int]]:
        """Sorts claims: who comes first gets a contested port."""
        return (self.own, self.started, self.container, self.position)

    @cached_property
    def families(self) -> frozenset[Family]:
        """The families that it could be served in."""
        return frozenset(Family.of(attachment.address) for attachment in self.attachments)

    @property
    def key(self) -> Key:
        """What the publication that comes of it goes by."""
        return (self.container, self.mapping, self.access)

    @property
    def name(self) -> str:
        """Whose it is, for people."""
        return f"pod {self.pod}" if self.pod is not None else str(self.container)

    @property
    def line(self) -> _Line | None:
        """The line it stands in behind whoever serves what it asks for: that of its declaration; None for none."""
        return (self.position[0], self.mapping) if self.shared else None

    def on(self, ports: PortRange) -> Mapping:
        """Return the mapping on these host ports."""
        return replace(self.mapping, host_ports=ports) if self.mapping.dynamic else self.mapping

    def decided(self, state: State, reason: str = "", bound: Mapping | None = None, place: int = 0) -> Publication:
        """Return what becomes of it."""
        attachments = self.attachments if bound is not None else ()
        return Publication(
            *(
                self.mapping,
                self.source,
                self.container,
                state,
                reason,
                attachments,
                self.pod,
                bound,
                self.access,
                place,
            )
        )


@dataclass
class _Round:
    """What one ``decide`` has found so far: claims with the same mapping, in the same families, find alike."""

    held: dict[Cell, list[tuple[Claim, Mapping]]] = field(default_factory=dict)  # by whom decided already
    lines: Counter[_Line] = field(default_factory=Counter)  # how many wait in each
    spent: set[tuple[Mapping, frozenset[Family]]] = field(default_factory=set)  # for which nothing is free
    next: dict[tuple[Mapping, frozenset[Family]], int] = field(default_factory=dict)  # where to go on in a pool


class Allotment:
    """The claims on host ports of a node, and who has which.

    Tell it of claims with ``enter`` and ``leave``, of the node with ``learn`` and of sockets that hold ports with
    ``meet``; ``decide`` then says what has become of those that it may have changed for. ``declared`` is what may be
    claimed any time.
    """

    def __init__(self, declared: Iterable[Mapping], facts: NodeFacts) -> None:
        self._facts = facts
        self._held = _by_cell(facts.holders)
        self._met: dict[Cell, list[Holder]] = {}
        declared = tuple(declared)
        self._named = {cell for mapping in declared if not mapping.dynamic for cell in cells(mapping)}
        self._pooled = {cell for mapping in declared if mapping.dynamic for cell in cells(mapping)}
        self._claims: dict[Key, Claim] = {}
        self._contest = Contest[Key]()
        self._chosen: dict[Key, PortRange] = {}
        self._earlier: dict[tuple[ContainerKey | str, Mapping | Unread], Sequence[PortRange]] = {}
        self._ring = Ring()

    def enter(self, claim: Claim, beside: Iterable[Key]) -> None:
        """Have a claim contend; ``beside`` are all of its container."""
        key, mapping = claim.key, claim.mapping
        self._claims[key] = claim
        if mapping.dynamic and key not in self._chosen:
            self._have_again(claim, beside)
        self._contest.enter(key, mapping, self._chosen.get(key))

    def leave(self, key: Key) -> None:
        """Have a claim contend no more, if it does; what was chosen for it is kept."""
        if key in self._claims:
            self._contest.leave(key)
            del self._claims[key]

    def give_up(self, key: Key) -> None:
        """Forget what was chosen for a claim."""
        container, asked, _ = key
        ports = self._chosen.pop(key, None)
        if ports is not None and (container, asked) in self._earlier:
            its = [other for other in self._earlier[container, asked] if other != ports]
            self._earlier[container, asked] = its

    def recover(self, chosen: MappingABC[tuple[ContainerKey, Mapping], Sequence[PortRange]]) -> None:
        """Take in which host ports an earlier run chose, for claims that enter from now on."""
        self._earlier = {(container, mapping): ports for (container, mapping), ports in chosen.items()}

    def learn(self, facts: NodeFacts) -> None:
        """Take in what is now known of the node."""
        before, self._facts = self._facts, facts
        self._held = _by_cell(facts.holders)
        for holder in set(before.holders) ^ set(facts.holders):
            self._contest.touch(cells(holder.mapping))

    @property
    def met(self) -> list[Holder]:
        """The sockets that it was told of, as far as some claim contends for their ports."""
        met = (holder for cell, holders in self._met.items() if self._contest.wanted(cell) for holder in holders)
        return list(dict.fromkeys(met))

    def meet(self, holders: Iterable[Holder]) -> None:
        """Take in whose sockets hold host ports: all that are known of."""
        before, self._met = self._met, _by_cell(holders)
        self._contest.touch(
            cell for cell in before.keys() | self._met.keys() if before.get(cell) != self._met.get(cell)
        )

    def meet_also(self, holders: Iterable[Holder]) -> bool:
        """Take in whose sockets hold host ports beside those it was told of, and return whether any of it is new."""
        new = False
        for cell, found in _by_cell(holders).items():
            its = self._met.setdefault(cell, [])
            others = [holder for holder in found if holder not in its]
            if others:
                its += others
                self._contest.touch([cell])
                new = True
        return new

    def decide(self) -> Iterator[Publication]:
        """Decide who has which port, and return what becomes of each claim that this may have changed for.

        To be read to its end.
        """
        reached = self._contest.reached(self._facts.free_ports)
        sofar = _Round()
        for claim in sorted((self._claims[key] for key in reached), key=lambda c: c.precedence):
            ports = self._choose(claim, sofar) if claim.mapping.dynamic else claim.mapping.host_ports
            if ports is None:
                yield claim.decided(State.CONFLICT, self._none_is_free(claim.mapping))
                continue
            bound = claim.on(ports)
            holder = self._holder(claim, bound, sofar)
            if holder is not None:
                yield _kept_out(claim, bound, holder, sofar)
                continue
            for cell in cells(bound):
                sofar.held.setdefault(cell, []).append((claim, bound))
            yield claim.decided(State.ACTIVE, bound=bound)
        self._contest.settled()

    # Choosing host ports.

    def _choose(self, claim: Claim, sofar: _Round) -> PortRange | None:
        """Return the host ports for a claim that names none, and keep them: those that it has, if it may."""
        key = claim.key
        has = self._chosen.get(key)
        if has is None or not self._is_free(claim, has, sofar):
            kind = (claim.mapping, claim.families)
            has = None if kind in sofar.spent else self._first_of(claim, sofar)
            if has is None:
                sofar.spent.add(kind)
            elif claim.mapping.host_ports is None:
                self._ring.turn(has)
            else:
                sofar.next[kind] = has.last + 1
        if has != self._chosen.get(key):
            self._contest.leave(key)
            self._chosen.pop(key, None)
            if has is not None:
                self._chosen[key] = has
            self._contest.enter(key, claim.mapping, has)
        return has

    def _first_of(self, claim: Claim, sofar: _Round) -> PortRange | None:
        """Return the first that is free among the ports offered, best those that nobody else has or names.

        What another has is taken from it only where a pool has nothing else: who started first goes before.
        """
        pool = claim.mapping.host_ports
        if pool is None:
            offered = self._ring.blocks(self._facts.free_ports, len(claim.mapping.container_ports))
            return next((p for p in offered if self._is_free(claim, p, sofar) and not self._is_wanted(claim, p)), None)
        begin = sofar.next.get((claim.mapping, claim.families), pool.first)
        rest = blocks([PortRange(begin, pool.last)] if begin <= pool.last else [], 1)
        free = (ports for ports in chain(rest, blocks([pool], 1)) if self._is_free(claim, ports, sofar))
        had, first = None, None
        for ports in free:
            if not self._is_wanted(claim, ports):
                return ports
            if had is None and not self._is_had(claim, ports):
                had = ports
            first = first or ports
        return had or first

    def _is_free(self, claim: Claim, ports: PortRange, sofar: _Round) -> bool:
        return self._holder(claim, claim.on(ports), sofar) is None

    def _is_wanted(self, claim: Claim, ports: PortRange) -> bool:
        """Whether another claim has one of these ports, or may want it: whoever names it may start any time."""
        anywhere = claim.mapping.host_ports is None
        named = (cell in self._named or (anywhere and cell in self._pooled) for cell in cells(claim.on(ports)))
        return any(named) or self._is_had(claim, ports)

    def _is_had(self, claim: Claim, ports: PortRange) -> bool:
        """Whether another claim is on one of these ports, though it may have to leave it."""
        bound = claim.on(ports)
        for cell in cells(bound):
            for key in self._contest.on(cell):
                other = self._claims[key]
                # In a pool who comes first makes way for nobody, as all of the pool are decided again with it. Whoever
                # takes any free port is not, and goes where nobody is.
                goes_before = other.own and not claim.own and claim.mapping.host_ports is not None
                if key == claim.key or goes_before:
                    continue
                its = self._chosen[key] if other.mapping.dynamic else other.mapping.host_ports
                if its is not None and other.on(its).overlaps(bound):
                    return True
        return False

    def _none_is_free(self, mapping: Mapping) -> str:
        if mapping.host_ports is not None:
            return f"every host port of {mapping.host_ports}/{mapping.protocol} is held"
        among = ", ".join(map(str, self._facts.free_ports)) or "net.ipv4.ip_local_port_range"
        count = len(mapping.container_ports)
        return (
            f"there {'is no free host port' if count == 1 else f'are no {count} free host ports in a row'} in {among}"
        )

    # Who holds a port.

    def _holder(self, claim: Claim, bound: Mapping, sofar: _Round) -> Holder | tuple[Claim, Mapping] | None:
        """Return who has the host port, or one of the host ports: somebody else, or an earlier claim, and as what."""
        families = claim.families
        for cell in cells(bound):
            holders: Iterable[Holder] = (*self._held.get(cell, ()), *self._met.get(cell, ()))
            for holder in holders:
                if not families.isdisjoint(holder.mapping.families) and holder.mapping.overlaps(bound):
                    return holder
            for other, its in sofar.held.get(cell, ()):
                if its.overlaps(bound):
                    return other, its
        return None

    def _have_again(self, claim: Claim, beside: Iterable[Key]) -> None:
        """Give a claim the host ports that an earlier run chose for it, or for another that differs in access alone."""
        key, container, mapping = claim.key, claim.container, claim.mapping
        others = {self._chosen.get(other) for other in beside if other[1] == mapping}
        earlier = (ports for ports in self._earlier.get((container, mapping), ()) if ports not in others)
        ports = next(earlier, None)
        if ports is not None:
            self._chosen[key] = ports


def _kept_out(claim: Claim, bound: Mapping, holder: Holder | tuple[Claim, Mapping], sofar: _Round) -> Publication:
    """Return what becomes of a claim whose host ports another has: it waits for one of its own declaration."""
    if isinstance(holder, Holder):
        return claim.decided(State.CONFLICT, _held_reason(bound, holder.mapping, holder.name))
    other, its = holder
    if claim.line is None or claim.line != other.line:
        return claim.decided(State.CONFLICT, _held_reason(bound, its, f"{other.name} ({its})"))
    sofar.lines[claim.line] += 1
    place = sofar.lines[claim.line]
    ports = f"host port{'' if len(bound.host_ports or ()) == 1 else 's'} {bound.host_ports}/{bound.protocol}"
    reason = f"{other.name} serves {ports}; {'next' if place == 1 else _ordinal(place)} in line"
    return claim.decided(State.WAITING, reason, place=place)


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _held_reason(wanted: Mapping, held: Mapping, holder: str) -> str:
    first = max(ports.first for ports in (wanted.host_ports, held.host_ports) if ports is not None)
    return f"host port {first}/{wanted.protocol} is held by {holder}"


def _by_cell(holders: Iterable[Holder]) -> dict[Cell, list[Holder]]:
    by_cell: dict[Cell, list[Holder]] = {}
    for holder in holders:
        for cell in cells(holder.mapping):
            by_cell.setdefault(cell, []).append(holder)
    return by_cell
