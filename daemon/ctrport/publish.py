"""Who gets which port: declarations x candidates -> publications.

Pure, and incremental: ``Publications`` remembers what it was told and works out again only what a change can reach, so
that one container costs the same on a node with ten mappings and with ten thousand. What it says depends on what it was
told alone, never on the order of telling.

A contested host port goes to the container that started first. Only mappings that could be served contend: a container
without an address keeps nobody out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .model import (
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
    Publication,
    State,
)

_Cell = tuple[str, int]  # a protocol and a host port: claims that share none cannot be rivals

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

    @property
    def precedence(self) -> tuple[int, ContainerKey, tuple[int, int]]:
        return (self.started, self.container, self.position)

    @property
    def cells(self) -> Iterator[_Cell]:
        return _cells(self.mapping)


_Key = tuple[ContainerKey | str, Mapping]  # the container, or the source of a declaration that matches none


class Publications:
    """All publications of a node.

    Tell it of containers with ``update`` and of the node with ``learn``; ``settle`` then returns what changed.
    ``families`` are those that are served; ``localhost`` is whether 127.0.0.0/8 may be published on.
    """

    def __init__(
        self,
        declarations: Sequence[Declaration],
        facts: NodeFacts,
        *,
        families: Sequence[Family] = (Family.IPV4,),
        localhost: bool = True,
    ) -> None:
        self._declarations = tuple(declarations)
        self._facts = facts
        self._held = _by_cell(facts.holders)
        self._families = tuple(families)
        self._localhost = localhost
        self._candidates: dict[ContainerKey, Candidate] = {}
        self._keys: dict[ContainerKey, dict[_Key, None]] = {}
        self._matching = [0] * len(self._declarations)
        self._claims: dict[_Key, _Claim] = {}
        self._rivals: dict[_Cell, set[_Key]] = {}
        self._published: dict[_Key, Publication] = {}
        self._counts: Counter[State] = Counter()
        self._dirty_cells: set[_Cell] = set()
        self._before: dict[_Key, Publication | None] = {}
        for index in range(len(self._declarations)):
            self._put_unmatched(index)

    def __iter__(self) -> Iterator[Publication]:
        """Iterate over all publications, containers by name, then unmatched declarations as in the file."""
        matched = (p for p in self._published.values() if p.container is not None)
        yield from sorted(matched, key=lambda p: (p.container, _mapping_order(p.mapping)))
        for declaration in self._declarations:
            mappings = dict.fromkeys(declaration.mappings)
            unmatched = (self._published.get((declaration.source, mapping)) for mapping in mappings)
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
        """Whether some declaration matches: what nobody declares needs no endpoint."""
        return any(declaration.selector.matches(container) for declaration in self._declarations)

    def update(self, key: ContainerKey, candidate: Candidate | None) -> None:
        """Take in what is now known of a container; None where it no longer runs."""
        if self._candidates.get(key) == candidate:
            return
        before = self._candidates.get(key)
        if before is not None:
            del self._candidates[key]
            self._forget(before)
        if candidate is not None:
            self._candidates[key] = candidate
            self._consider(candidate)

    def learn(self, facts: NodeFacts) -> None:
        """Take in what is now known of the node; where it changed, every publication is worked out again."""
        if facts == self._facts:
            return
        self._facts = facts
        self._held = _by_cell(facts.holders)
        for candidate in self._candidates.values():
            self._forget(candidate)
            self._consider(candidate)

    def settle(self) -> tuple[Change, ...]:
        """Decide who has which port, and return each publication that is not what it was at the last call."""
        claims = sorted((self._claims[key] for key in self._reachable()), key=lambda c: c.precedence)
        held: dict[_Cell, list[_Claim]] = {}
        for claim in claims:
            holder = self._holder(claim, held)
            if holder is None:
                for cell in claim.cells:
                    held.setdefault(cell, []).append(claim)
            self._put(_decided(claim, holder))
        self._dirty_cells.clear()
        before, self._before = self._before, {}
        changes = (Change(old, self._published.get(key)) for key, old in before.items())
        return tuple(change for change in changes if change.before != change.after)

    def _reachable(self) -> set[_Key]:
        """Return the claims that a change can reach: those that share a port with it, and so on outwards."""
        cells, found = list(self._dirty_cells), set[_Key]()
        while cells:
            for key in self._rivals.get(cells.pop(), ()):
                if key not in found:
                    found.add(key)
                    cells.extend(self._claims[key].cells)
        return found

    @staticmethod
    def _holder(claim: _Claim, held: dict[_Cell, list[_Claim]]) -> _Claim | None:
        rivals = (other for cell in claim.cells for other in held.get(cell, ()))
        return next((other for other in rivals if other.mapping.overlaps(claim.mapping)), None)

    def _consider(self, candidate: Candidate) -> None:
        container = candidate.container
        keys = self._keys[container.key] = dict[_Key, None]()
        for index, declaration in enumerate(self._declarations):
            if not declaration.selector.matches(container):
                continue
            self._matching[index] += 1
            if self._matching[index] == 1:
                self._remove_unmatched(index)
            for place, mapping in enumerate(declaration.mappings):
                key: _Key = (container.key, mapping)
                if key in keys:  # two declarations ask for the same: the first stands for both
                    continue
                keys[key] = None
                judged = self._judge(candidate, mapping)
                if isinstance(judged, Obstacle):
                    source, state, reason = declaration.source, judged.state, judged.reason
                    self._put(Publication(mapping, source, container.key, state, reason, pod=_pod(container)))
                    continue
                order, source = (index, place), declaration.source
                claim = _Claim(container.started, container.key, order, mapping, source, judged, _pod(container))
                self._claims[key] = claim
                for cell in claim.cells:
                    self._rivals.setdefault(cell, set()).add(key)
                    self._dirty_cells.add(cell)

    def _forget(self, candidate: Candidate) -> None:
        container = candidate.container
        for key in self._keys.pop(container.key):
            claim = self._claims.pop(key, None)
            for cell in claim.cells if claim is not None else ():
                self._rivals[cell].discard(key)
                if not self._rivals[cell]:
                    del self._rivals[cell]
                self._dirty_cells.add(cell)
            self._remove(key)
        for index, declaration in enumerate(self._declarations):
            if declaration.selector.matches(container):
                self._matching[index] -= 1
                if self._matching[index] == 0:
                    self._put_unmatched(index)

    def _judge(self, candidate: Candidate, mapping: Mapping) -> tuple[Attachment, ...] | Obstacle:
        """Return where the mapping would lead, or why it cannot be served whoever else wants its port."""
        if mapping.host_ports is None:
            return Obstacle(State.UNSUPPORTED, "a free host port cannot be chosen yet: name the host port")
        if len(mapping.host_ports) != len(mapping.container_ports):
            return Obstacle(State.UNSUPPORTED, "one port of a pool cannot be chosen yet: name the host port")
        if isinstance(candidate.endpoint, Obstacle):
            return candidate.endpoint
        host_ip = mapping.host_ip
        if host_ip is not None and not mapping.any_host_ip:
            if host_ip.is_loopback and not self._localhost:
                return Obstacle(State.UNSUPPORTED, f"{host_ip} is published only with firewall.localhost: true")
            if not host_ip.is_loopback and host_ip not in self._facts.addresses:
                return Obstacle(State.WAITING, f"{host_ip} is not an address of this node")
        holder = self._holder_of(mapping)
        if holder is not None:
            return Obstacle(State.CONFLICT, _held_reason(mapping, holder.mapping, holder.name))
        families = [family for family in mapping.families if family in self._families]
        if not families:
            return Obstacle(State.UNSUPPORTED, f"IPv{mapping.families[0].value} cannot be published yet")
        attachments = self._attachments(candidate.endpoint, families)
        if not attachments:
            names = " or ".join(f"IPv{family.value}" for family in families)
            return Obstacle(State.WAITING, f"the container has no {names} address that the host can reach")
        forwarded = tuple(a for a in attachments if Family.of(a.address) in self._facts.forwarding)
        if not forwarded:
            return Obstacle(State.WAITING, FORWARDING_OFF[Family.of(attachments[0].address)])
        return forwarded

    def _holder_of(self, mapping: Mapping) -> Holder | None:
        """Return somebody else who has the mapping's host port, or one of its host ports."""
        holders = (holder for cell in _cells(mapping) for holder in self._held.get(cell, ()))
        return next((holder for holder in holders if holder.mapping.overlaps(mapping)), None)

    @staticmethod
    def _attachments(endpoint: Endpoint, families: Iterable[Family]) -> tuple[Attachment, ...]:
        found = (endpoint.at(family) for family in families)
        return tuple(attachment for attachment in found if attachment is not None)

    def _put_unmatched(self, index: int) -> None:
        declaration = self._declarations[index]
        reason = f"no running container matches {declaration.selector}"
        for mapping in declaration.mappings:
            self._put(Publication(mapping, declaration.source, None, State.WAITING, reason))

    def _remove_unmatched(self, index: int) -> None:
        declaration = self._declarations[index]
        for mapping in declaration.mappings:
            self._remove((declaration.source, mapping))

    def _put(self, publication: Publication) -> None:
        key: _Key = (publication.container or publication.source, publication.mapping)
        self._remove(key)
        self._published[key] = publication
        self._counts[publication.state] += 1

    def _remove(self, key: _Key) -> None:
        old = self._published.pop(key, None)
        self._before.setdefault(key, old)
        if old is not None:
            self._counts[old.state] -= 1


def _decided(claim: _Claim, holder: _Claim | None) -> Publication:
    state, reason = State.ACTIVE, ""
    if holder is not None:
        state = State.CONFLICT
        name = f"pod {holder.pod}" if holder.pod is not None else str(holder.container)
        reason = _held_reason(claim.mapping, holder.mapping, f"{name} ({holder.mapping})")
    attachments = () if holder is not None else claim.attachments
    return Publication(claim.mapping, claim.source, claim.container, state, reason, attachments, claim.pod)


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


def _cells(mapping: Mapping) -> Iterator[_Cell]:
    return ((mapping.protocol.value, port) for port in mapping.host_ports or ())


def _by_cell(holders: Iterable[Holder]) -> dict[_Cell, list[Holder]]:
    by_cell: dict[_Cell, list[Holder]] = {}
    for holder in holders:
        for cell in _cells(holder.mapping):
            by_cell.setdefault(cell, []).append(holder)
    return by_cell


def _mapping_order(mapping: Mapping) -> tuple[str, int, str]:
    return (mapping.protocol.value, mapping.host_ports.first if mapping.host_ports else 0, str(mapping))
