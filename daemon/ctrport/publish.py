"""Who gets which port: declarations x candidates -> publications.

Pure, and incremental: ``Publications`` remembers what it was told and works out again only what a change can reach, so
that one container costs the same on a node with ten mappings and with ten thousand. What it says depends on what it was
told alone, never on the order of telling; but a host port that was chosen stays as it was for as long as it can.

A contested host port goes to what the operator declared, in the file or by `ctrport publish`, before what containers
declare by themselves, and among these to the container that started first: allot.py decides that. Only mappings that
could be served contend, which reach.py knows: a container without an address keeps nobody out.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, replace
from operator import itemgetter

from .allot import Allotment, Claim, Key
from .declared import Permission, Wish, declares, wishes
from .model import (
    Access,
    Candidate,
    Container,
    ContainerKey,
    Declaration,
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
from .reach import Reach

#: The ``source`` of a mapping that the operator gave a container as it ran.
LIVE_SOURCE = "ctrport publish"


@dataclass(frozen=True)
class Change:
    """One publication before and after; None where it did not exist or does no longer."""

    before: Publication | None
    after: Publication | None


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

    ``unmatched`` is how many of them no running container matches, ``standby`` how many wait in line behind one that is
    active, and ``starved`` how many take any free host port, or any of a pool, and find none.
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
        self._reach = Reach(facts, tuple(families), localhost)
        declared = (mapping for declaration in declarations for mapping in declaration.mappings)
        self._allotment = Allotment(declared, facts)
        self._candidates: dict[ContainerKey, Candidate] = {}
        self._keys: dict[ContainerKey, dict[Key, None]] = {}
        self._matching = [0] * len(self._declarations)
        self._published: dict[Key, Publication] = {}
        self._in_order: list[tuple[_Rank, Publication]] = []  # those of containers
        self._counts: Counter[State] = Counter()
        self.unmatched, self.standby, self.starved = 0, 0, 0
        self._before: dict[Key, Publication | None] = {}
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

    def families(self, key: ContainerKey) -> frozenset[Family]:
        """Return the families in which a container it was told of is to be published, as its mappings say."""
        mappings = (mapping for _, mapping, _ in self._keys.get(key, ()) if isinstance(mapping, Mapping))
        return frozenset(family for mapping in mappings for family in mapping.families)

    def wants(self, container: Container) -> bool:
        """Whether some declaration matches, or is its own: what nobody declares needs no endpoint."""
        return (
            declares(container)
            or any(_word(container))
            or any(declaration.selector.matches(container) for declaration in self._declarations)
        )

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
                    self._allotment.give_up(its)
        if candidate is not None:
            self._candidates[key] = candidate
            self._consider(candidate)
            if before is not None:
                for its in keys.keys() - self._keys[key].keys():  # taken back: it is another's to have by now
                    self._allotment.give_up(its)

    def recover(self, chosen: MappingABC[tuple[ContainerKey, Mapping], Sequence[PortRange]]) -> None:
        """Take in which host ports an earlier run chose, for containers it is told of from now on."""
        self._allotment.recover(chosen)

    def learn(self, facts: NodeFacts) -> None:
        """Take in what is now known of the node; where it changed, what this can reach is worked out again."""
        if facts == self._facts:
            return
        before, self._facts = self._facts, facts
        self._allotment.learn(facts)
        if replace(before, holders=()) == replace(facts, holders=()):
            return
        self._reach = replace(self._reach, facts=facts)
        for candidate in self._candidates.values():
            self._forget(candidate)
            self._consider(candidate)

    @property
    def met(self) -> list[Holder]:
        """The sockets that it was told of, as far as some claim contends for their ports."""
        return self._allotment.met

    def meet(self, holders: Iterable[Holder]) -> None:
        """Take in whose sockets hold host ports: all that are known of."""
        self._allotment.meet(holders)

    def meet_also(self, holders: Iterable[Holder]) -> bool:
        """Take in whose sockets hold host ports beside those it was told of, and return whether any of it is new."""
        return self._allotment.meet_also(holders)

    def settle(self) -> tuple[Change, ...]:
        """Decide who has which port, and return each publication that is not what it was at the last call."""
        changes = self.decide()
        self._before = {}
        return changes

    def decide(self) -> tuple[Change, ...]:
        """Decide who has which port, and return what ``settle`` would."""
        for publication in self._allotment.decide():
            self._put(publication)
        changes = (Change(old, self._published.get(key)) for key, old in self._before.items())
        return tuple(change for change in changes if change.before != change.after)

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
                claim = Claim(
                    *(container.started, container.key, (index, place), mapping, declaration.source),
                    *((), _pod(container), declaration.access),
                    shared=True,
                )
                self._enter(candidate, claim)
        for place, wish in enumerate(_word(container)):
            self._grant(candidate, (len(self._declarations), place), wish, own=False)
        for place, wish in enumerate(wishes(container, self._permissions)):
            self._grant(candidate, (0, place), wish, own=True)

    def _grant(self, candidate: Candidate, position: tuple[int, int], wish: Wish, *, own: bool) -> None:
        """Take in what is declared for this container alone; what was declared first for the same stands for both."""
        container, asked = candidate.container, wish.asked
        if isinstance(asked, Mapping) and not wish.refusal:
            claim = Claim(
                *(container.started, container.key, position, asked, wish.source),
                *((), _pod(container), Access(), own),
            )
            self._enter(candidate, claim)
            return
        key: Key = (container.key, asked, Access())
        if key not in self._keys[container.key]:
            self._keys[container.key][key] = None
            refused = Publication(asked, wish.source, container.key, State.REFUSED, wish.refusal, pod=_pod(container))
            self._put(refused)

    def _enter(self, candidate: Candidate, claim: Claim) -> None:
        """Have a claim contend, if it could be served."""
        keys = self._keys[claim.container]
        if claim.key in keys:  # two declarations ask for the same: the first stands for both
            return
        keys[claim.key] = None
        judged = self._reach.judge(candidate, claim.mapping, claim.access)
        if isinstance(judged, Obstacle):
            self._put(claim.decided(judged.state, judged.reason))
        else:
            self._allotment.enter(replace(claim, attachments=judged), keys)

    def _forget(self, candidate: Candidate) -> None:
        container = candidate.container
        for key in self._keys.pop(container.key):
            self._allotment.leave(key)
            self._remove(key)
        for index, declaration in enumerate(self._declarations):
            if declaration.selector.matches(container):
                self._matching[index] -= 1
                if self._matching[index] == 0:
                    self._put_unmatched(index)

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
        key: Key = (publication.container or publication.source, publication.asked, publication.access)
        self._remove(key)
        self._published[key] = publication
        self._count(publication, 1)
        if publication.container is not None:
            # Kept sorted: to sort thousands costs more than the one that has changed.
            insort(self._in_order, (_rank(publication), publication), key=itemgetter(0))

    def _remove(self, key: Key) -> None:
        old = self._published.pop(key, None)
        self._before.setdefault(key, old)
        if old is not None:
            self._count(old, -1)
            if old.container is not None:
                at = bisect_left(self._in_order, _rank(old), key=itemgetter(0))
                while self._in_order[at][1] is not old:
                    at += 1
                del self._in_order[at]

    def _count(self, publication: Publication, by: int) -> None:
        self._counts[publication.state] += by
        if publication.container is None:
            self.unmatched += by
        elif publication.place:
            self.standby += by
        elif publication.state is State.CONFLICT and publication.mapping.dynamic:
            self.starved += by  # what is to be chosen is in conflict with nobody in particular


def _pod(container: Container) -> str | None:
    return None if container.pod is None else container.pod.shown


def _word(container: Container) -> Iterator[Wish]:
    """Return what `ctrport publish` has this container publish; nobody has to allow that."""
    if container.live is not None:
        yield from (Wish(mapping, LIVE_SOURCE, "") for mapping in container.live.mappings)
        yield from (Wish(unread, LIVE_SOURCE, fault) for unread, fault in container.live.unread)


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
