"""Who gets which port: declarations x candidates -> publications.

Pure, and incremental: ``Publications`` remembers what it was told and works out again only what a change can reach, so
that one container costs the same on a node with ten mappings and with ten thousand. What it says depends on what it was
told alone, never on the order of telling; but a host port that was chosen stays as it was for as long as it can.

A contested host port goes to what the operator declared before what containers declare by themselves, and among these
to the container that started first. Only mappings that could be served contend: a container
without an address keeps nobody out.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from operator import itemgetter

from .choose import Ring, blocks
from .contest import Cell, Contest, cells
from .declared import Permission, Wish, declares, wishes
from .model import (
    Access,
    Attachment,
    Candidate,
    Container,
    ContainerKey,
    Declaration,
    Endpoint,
    Family,
    Holder,
    Mapping,
    NodeFacts,
    Obstacle,
    PortRange,
    Publication,
    State,
    Unread,
)

FORWARDING_OFF = {
    Family.IPV4: "the node does not forward IPv4: sysctl -w net.ipv4.ip_forward=1",
    Family.IPV6: "the node does not forward IPv6: sysctl -w net.ipv6.conf.all.forwarding=1",
}


@dataclass(frozen=True)
class Change:
    """One publication before and after; None where it did not exist or does no longer."""

    before: Publication | None
    after: Publication | None


@dataclass(frozen=True)
class _Claim:
    """A mapping that could be served, if no earlier claim has its host port."""

    started: int
    container: ContainerKey
    position: tuple[int, int]  # of the declaration in the file, and of the mapping in it
    mapping: Mapping
    source: str
    attachments: tuple[Attachment, ...]
    pod: str | None
    access: Access
    own: bool = False  # declared by the container itself

    @property
    def precedence(self) -> tuple[bool, int, ContainerKey, tuple[int, int]]:
        return (self.own, self.started, self.container, self.position)

    @cached_property
    def families(self) -> frozenset[Family]:
        return frozenset(Family.of(attachment.address) for attachment in self.attachments)

    @property
    def key(self) -> _Key:
        return (self.container, self.mapping, self.access)

    def on(self, ports: PortRange) -> Mapping:
        """Return the mapping on these host ports."""
        return replace(self.mapping, host_ports=ports) if self.mapping.dynamic else self.mapping

    def decided(self, state: State, reason: str = "", bound: Mapping | None = None) -> Publication:
        """Return what becomes of it."""
        attachments = self.attachments if bound is not None else ()
        return Publication(
            *(self.mapping, self.source, self.container, state, reason, attachments, self.pod, bound, self.access)
        )


#: The container, or the source of a declaration that matches none; what is asked for, and for whom.
_Key = tuple[ContainerKey | str, Mapping | Unread, Access]


@dataclass
class _Round:
    """What one ``decide`` has found so far: claims with the same mapping, in the same families, find alike."""

    held: dict[Cell, list[tuple[_Claim, Mapping]]] = field(default_factory=dict)  # by whom decided already
    spent: set[tuple[Mapping, frozenset[Family]]] = field(default_factory=set)  # for which nothing is free
    next: dict[tuple[Mapping, frozenset[Family]], int] = field(default_factory=dict)  # where to go on in a pool


def chosen(publications: Iterable[Publication]) -> dict[tuple[ContainerKey, Mapping], tuple[PortRange, ...]]:
    """Return the host ports that were chosen for these, by container and mapping."""
    found: dict[tuple[ContainerKey, Mapping], tuple[PortRange, ...]] = {}
    for publication in publications:
        container, bound = publication.container, publication.bound
        if container is not None and bound is not None and publication.mapping.dynamic and bound.host_ports is not None:
            key = (container, publication.mapping)
            # In the order in which they are asked for again.
            found[key] = (*found.get(key, ()), bound.host_ports)
    return found


class Publications:
    """All publications of a node.

    Tell it of containers with ``update``, of the node with ``learn`` and of sockets that hold ports with ``meet``;
    ``settle`` then returns what changed. ``families`` are those that are served; ``localhost`` is whether 127.0.0.0/8
    may be published on; ``permissions`` say what containers may publish that declare it themselves.
    """

    def __init__(
        self,
        declarations: Sequence[Declaration],
        facts: NodeFacts,
        *,
        families: Sequence[Family] = tuple(Family),
        localhost: bool = True,
        permissions: Sequence[Permission] = (),
    ) -> None:
        self._permissions = tuple(permissions)
        self._declarations = tuple(declarations)
        self._facts = facts
        self._held = _by_cell(facts.holders)
        self._met: dict[Cell, list[Holder]] = {}
        declared = [mapping for declaration in declarations for mapping in declaration.mappings]
        self._named = {cell for mapping in declared if not mapping.dynamic for cell in cells(mapping)}
        self._pooled = {cell for mapping in declared if mapping.dynamic for cell in cells(mapping)}
        self._families = tuple(families)
        self._localhost = localhost
        self._candidates: dict[ContainerKey, Candidate] = {}
        self._keys: dict[ContainerKey, dict[_Key, None]] = {}
        self._matching = [0] * len(self._declarations)
        self._claims: dict[_Key, _Claim] = {}
        self._contest = Contest[_Key]()
        self._chosen: dict[_Key, PortRange] = {}
        self._earlier: dict[tuple[ContainerKey, Mapping], Sequence[PortRange]] = {}
        self._ring = Ring()
        self._published: dict[_Key, Publication] = {}
        self._in_order: list[tuple[_Rank, Publication]] = []  # those of containers
        self._counts: Counter[State] = Counter()
        self._before: dict[_Key, Publication | None] = {}
        for index in range(len(self._declarations)):
            self._put_unmatched(index)

    def __iter__(self) -> Iterator[Publication]:
        """Iterate over all publications, containers by name, then unmatched declarations as in the file."""
        yield from map(itemgetter(1), self._in_order)
        for declaration in self._declarations:
            mappings = dict.fromkeys(declaration.mappings)
            keys = ((declaration.source, mapping, declaration.access) for mapping in mappings)
            unmatched = (self._published.get(key) for key in keys)
            yield from (publication for publication in unmatched if publication is not None)

    def __len__(self) -> int:
        return len(self._published)

    def count(self, state: State) -> int:
        """Return how many publications are in a state."""
        return self._counts[state]

    @property
    def candidates(self) -> Iterable[Candidate]:
        """Every container it was told of and not told to forget."""
        return self._candidates.values()

    def candidate(self, key: ContainerKey) -> Candidate | None:
        """Return what it was last told of a container."""
        return self._candidates.get(key)

    def wants(self, container: Container) -> bool:
        """Whether some declaration matches, or is its own: what nobody declares needs no endpoint."""
        return declares(container) or any(declaration.selector.matches(container) for declaration in self._declarations)

    def update(self, key: ContainerKey, candidate: Candidate | None) -> None:
        """Take in what is now known of a container; None where it no longer runs."""
        if self._candidates.get(key) == candidate:
            return
        before = self._candidates.get(key)
        if before is not None:
            keys = self._keys[key]
            del self._candidates[key]
            self._forget(before)
            if candidate is None:
                for its in keys:
                    self._chosen.pop(its, None)
        if candidate is not None:
            self._candidates[key] = candidate
            self._consider(candidate)

    def recover(self, chosen: MappingABC[tuple[ContainerKey, Mapping], Sequence[PortRange]]) -> None:
        """Take in which host ports an earlier run chose, for containers it is told of from now on."""
        self._earlier = dict(chosen)

    def learn(self, facts: NodeFacts) -> None:
        """Take in what is now known of the node; where it changed, what this can reach is worked out again."""
        if facts == self._facts:
            return
        before, self._facts = self._facts, facts
        self._held = _by_cell(facts.holders)
        for holder in set(before.holders) ^ set(facts.holders):
            self._contest.touch(cells(holder.mapping))
        if replace(before, holders=()) == replace(facts, holders=()):
            return
        for candidate in self._candidates.values():
            self._forget(candidate)
            self._consider(candidate)

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

    def settle(self) -> tuple[Change, ...]:
        """Decide who has which port, and return each publication that is not what it was at the last call."""
        changes = self.decide()
        self._before = {}
        return changes

    def decide(self) -> tuple[Change, ...]:
        """Decide who has which port, and return what ``settle`` would."""
        reached = self._contest.reached(self._facts.free_ports)
        sofar = _Round()
        for claim in sorted((self._claims[key] for key in reached), key=lambda c: c.precedence):
            ports = self._choose(claim, sofar) if claim.mapping.dynamic else claim.mapping.host_ports
            if ports is None:
                self._put(claim.decided(State.CONFLICT, self._none_is_free(claim.mapping)))
                continue
            bound = claim.on(ports)
            holder = self._holder(claim, bound, sofar)
            if holder is not None:
                self._put(claim.decided(State.CONFLICT, _held_reason(bound, *holder)))
                continue
            for cell in cells(bound):
                sofar.held.setdefault(cell, []).append((claim, bound))
            self._put(claim.decided(State.ACTIVE, bound=bound))
        self._contest.settled()
        changes = (Change(old, self._published.get(key)) for key, old in self._before.items())
        return tuple(change for change in changes if change.before != change.after)

    # Choosing host ports.

    def _choose(self, claim: _Claim, sofar: _Round) -> PortRange | None:
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

    def _first_of(self, claim: _Claim, sofar: _Round) -> PortRange | None:
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

    def _is_free(self, claim: _Claim, ports: PortRange, sofar: _Round) -> bool:
        return self._holder(claim, claim.on(ports), sofar) is None

    def _is_wanted(self, claim: _Claim, ports: PortRange) -> bool:
        """Whether another claim has one of these ports, or may want it: whoever names it may start any time."""
        anywhere = claim.mapping.host_ports is None
        named = (cell in self._named or (anywhere and cell in self._pooled) for cell in cells(claim.on(ports)))
        return any(named) or self._is_had(claim, ports)

    def _is_had(self, claim: _Claim, ports: PortRange) -> bool:
        """Whether another claim is on one of these ports, though it may have to leave it."""
        bound = claim.on(ports)
        for cell in cells(bound):
            for key in self._contest.on(cell):
                other = self._claims[key]
                if key == claim.key or (other.own and not claim.own):  # who comes first makes way for nobody
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

    def _holder(self, claim: _Claim, bound: Mapping, sofar: _Round) -> tuple[Mapping, str] | None:
        """Return who has the host port, or one of the host ports, and as what: somebody else, or an earlier claim."""
        families = claim.families
        for cell in cells(bound):
            for holder in (*self._held.get(cell, ()), *self._met.get(cell, ())):
                if not families.isdisjoint(holder.mapping.families) and holder.mapping.overlaps(bound):
                    return holder.mapping, holder.name
            for other, its in sofar.held.get(cell, ()):
                if its.overlaps(bound):
                    name = f"pod {other.pod}" if other.pod is not None else str(other.container)
                    return its, f"{name} ({its})"
        return None

    # What is told of containers.

    def _consider(self, candidate: Candidate) -> None:
        container = candidate.container
        self._keys[container.key] = {}
        for index, declaration in enumerate(self._declarations):
            if not declaration.selector.matches(container):
                continue
            self._matching[index] += 1
            if self._matching[index] == 1:
                self._remove_unmatched(index)
            for place, mapping in enumerate(declaration.mappings):
                claim = _Claim(
                    *(container.started, container.key, (index, place), mapping, declaration.source),
                    *((), _pod(container), declaration.access),
                )
                self._enter(candidate, claim)
        for place, wish in enumerate(wishes(container, self._permissions)):
            self._grant(candidate, place, wish)

    def _grant(self, candidate: Candidate, place: int, wish: Wish) -> None:
        """Take in what a container declares by itself; the operator's own word for the same stands for both."""
        container, asked = candidate.container, wish.asked
        if isinstance(asked, Mapping) and not wish.refusal:
            claim = _Claim(
                *(container.started, container.key, (0, place), asked, wish.source),
                *((), _pod(container), Access(), True),
            )
            self._enter(candidate, claim)
            return
        key: _Key = (container.key, asked, Access())
        if key not in self._keys[container.key]:
            self._keys[container.key][key] = None
            refused = Publication(asked, wish.source, container.key, State.REFUSED, wish.refusal, pod=_pod(container))
            self._put(refused)

    def _enter(self, candidate: Candidate, claim: _Claim) -> None:
        """Have a claim contend, if it could be served."""
        key, mapping = claim.key, claim.mapping
        keys = self._keys[claim.container]
        if key in keys:  # two declarations ask for the same: the first stands for both
            return
        keys[key] = None
        judged = self._judge(candidate, mapping, claim.access)
        if isinstance(judged, Obstacle):
            self._put(claim.decided(judged.state, judged.reason))
            return
        self._claims[key] = replace(claim, attachments=judged)
        if mapping.dynamic and key not in self._chosen:
            self._have_again(claim)
        self._contest.enter(key, mapping, self._chosen.get(key))

    def _have_again(self, claim: _Claim) -> None:
        """Give a claim the host ports that an earlier run chose for it, or for another that differs in access alone."""
        key, container, mapping = claim.key, claim.container, claim.mapping
        others = {self._chosen.get(other) for other in self._keys[container] if other[1] == mapping}
        earlier = (ports for ports in self._earlier.get((container, mapping), ()) if ports not in others)
        ports = next(earlier, None)
        if ports is not None:
            self._chosen[key] = ports

    def _forget(self, candidate: Candidate) -> None:
        container = candidate.container
        for key in self._keys.pop(container.key):
            if key in self._claims:
                self._contest.leave(key)
                del self._claims[key]
            self._remove(key)
        for index, declaration in enumerate(self._declarations):
            if declaration.selector.matches(container):
                self._matching[index] -= 1
                if self._matching[index] == 0:
                    self._put_unmatched(index)

    def _judge(self, candidate: Candidate, mapping: Mapping, access: Access) -> tuple[Attachment, ...] | Obstacle:
        """Return where the mapping would lead, or why it cannot be served whoever else wants its port."""
        if mapping.protocol not in self._facts.protocols:
            return Obstacle(State.UNSUPPORTED, f"this kernel does not track {mapping.protocol} connections")
        if isinstance(candidate.endpoint, Obstacle):
            return candidate.endpoint
        obstacle = self._unfit_host_ip(mapping)
        if obstacle is not None:
            return obstacle
        families = [family for family in mapping.families if family in self._families]
        if not families:
            return Obstacle(State.UNSUPPORTED, f"this node cannot publish on IPv{mapping.families[0].value}")
        admitted = [family for family in families if access.sources_of(family) is not None]
        if not admitted:
            names = " or ".join(f"IPv{family.value}" for family in families)
            return Obstacle(State.UNSUPPORTED, f"none of its sources is a network of {names}")
        attachments = self._attachments(candidate.endpoint, admitted)
        if not attachments:
            names = " or ".join(f"IPv{family.value}" for family in admitted)
            return Obstacle(State.WAITING, f"the container has no {names} address that the host can reach")
        forwarded = tuple(a for a in attachments if Family.of(a.address) in self._facts.forwarding)
        if not forwarded:
            return Obstacle(State.WAITING, FORWARDING_OFF[Family.of(attachments[0].address)])
        return forwarded

    def _unfit_host_ip(self, mapping: Mapping) -> Obstacle | None:
        host_ip = mapping.host_ip
        if host_ip is None or mapping.any_host_ip:
            return None
        if host_ip.is_loopback and host_ip.version == 6:
            reason = f"the kernel sends nothing on that was sent to {host_ip}: publish on 127.0.0.1"
            return Obstacle(State.UNSUPPORTED, reason)
        if host_ip.is_loopback and not self._localhost:
            return Obstacle(State.UNSUPPORTED, f"{host_ip} is published only with firewall.localhost: true")
        if not host_ip.is_loopback and host_ip not in self._facts.addresses:
            return Obstacle(State.WAITING, f"{host_ip} is not an address of this node")
        return None

    @staticmethod
    def _attachments(endpoint: Endpoint, families: Iterable[Family]) -> tuple[Attachment, ...]:
        found = (endpoint.at(family) for family in families)
        return tuple(attachment for attachment in found if attachment is not None)

    def _put_unmatched(self, index: int) -> None:
        declaration = self._declarations[index]
        reason = f"no running container matches {declaration.selector}"
        for mapping in declaration.mappings:
            self._put(Publication(mapping, declaration.source, None, State.WAITING, reason, access=declaration.access))

    def _remove_unmatched(self, index: int) -> None:
        declaration = self._declarations[index]
        for mapping in declaration.mappings:
            self._remove((declaration.source, mapping, declaration.access))

    def _put(self, publication: Publication) -> None:
        key: _Key = (publication.container or publication.source, publication.asked, publication.access)
        self._remove(key)
        self._published[key] = publication
        self._counts[publication.state] += 1
        if publication.container is not None:
            # Kept sorted: to sort thousands costs more than the one that has changed.
            insort(self._in_order, (_rank(publication), publication), key=itemgetter(0))

    def _remove(self, key: _Key) -> None:
        old = self._published.pop(key, None)
        self._before.setdefault(key, old)
        if old is not None:
            self._counts[old.state] -= 1
            if old.container is not None:
                at = bisect_left(self._in_order, _rank(old), key=itemgetter(0))
                while self._in_order[at][1] is not old:
                    at += 1
                del self._in_order[at]


_PRINTABLE = re.compile(r"[A-Za-z0-9._-]{1,253}/[A-Za-z0-9._-]{1,253}")


def _pod(container: Container) -> str | None:
    """Return a pod's name so that it can be printed: whoever makes a sandbox by hand may call it anything."""
    if container.pod is None:
        return None
    name = str(container.pod)
    return name if _PRINTABLE.fullmatch(name) else f"{name!a:.80}"


def _held_reason(wanted: Mapping, held: Mapping, holder: str) -> str:
    first = max(ports.first for ports in (wanted.host_ports, held.host_ports) if ports is not None)
    return f"host port {first}/{wanted.protocol} is held by {holder}"


def _by_cell(holders: Iterable[Holder]) -> dict[Cell, list[Holder]]:
    by_cell: dict[Cell, list[Holder]] = {}
    for holder in holders:
        for cell in cells(holder.mapping):
            by_cell.setdefault(cell, []).append(holder)
    return by_cell


#: Of a container's publication: namespace and id, protocol, first host port, mapping and source.
_Rank = tuple[str, str, str, int, str, str]


def _rank(publication: Publication) -> _Rank:
    """Return what orders the publications of containers: by the container's name, then by the port."""
    container, mapping = publication.container, publication.bound or publication.asked
    assert container is not None
    protocol, first = "", 0
    if not isinstance(mapping, Unread):
        protocol, first = mapping.protocol.value, mapping.host_ports.first if mapping.host_ports else 0
    return (container.namespace, container.id, protocol, first, str(mapping), publication.source)
