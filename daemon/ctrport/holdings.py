"""The host ports of what is published, held by sockets: had before there are rules, let go when they are gone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Mapping as MappingABC

from .hostports import Claim, Held, NotOnNode, Reservations
from .listeners import UNKNOWN
from .model import ContainerKey, Family, Holder, Mapping, PortRange, Publication
from .owners import owner_of

Chosen = MappingABC[tuple[ContainerKey, Mapping], tuple[PortRange, ...]]


class Holdings:
    """What publications have reserved, by the owner of their rules, and what is to be said of it."""

    def __init__(self, reservations: Reservations) -> None:
        self._reservations = reservations
        self._remarks: dict[str, str] = {}
        self._fresh: set[str] = set()  # had since the last change was followed
        self._vacated: set[str] = set()  # to be let go when the rules are gone

    def succeed(self, before: Holdings, active: Iterable[str]) -> None:
        """Go on with what another one has; of who was ``active`` there what is not wanted again is vacated.

        And what was to be let go there, or was had for nobody, where that one never came to it.
        """
        self._remarks = dict(before._remarks)
        self._vacated = {*active, *before._vacated, *before._fresh}

    def hold_at_most(self, limit: int) -> None:
        """Have no more ports held than so many."""
        self._reservations.limit = limit

    def have(self, publication: Publication, is_active: bool, chosen: Chosen) -> list[Holder]:
        """Have the host ports of a publication held; return who holds those that were not had.

        ``chosen`` are those that an earlier run chose.
        """
        its, claim = owner_of(publication), _claim(publication)
        if not is_active:
            self._fresh.add(its)
        # A port that was named is the operator's affair; one that is chosen is not to be one that the node uses. Other
        # than one that an earlier run chose: meanwhile a connection may have it, which is no reason to give it up.
        if publication.mapping.dynamic and its not in self._remarks and not _was_chosen(publication, chosen):
            used = self._reservations.in_use(claim)
            if used:
                return [_holder(Held(claim.protocol, address, port, UNKNOWN)) for address, port in used]
        try:
            self._remarks[its] = self._reservations.take(its, claim)
        except Held as other:
            return [_holder(other)]
        except NotOnNode as reason:
            self._remarks[its] = f"not reserved: {reason}"  # just coming or going: worth trying again
        return []

    def worth_another_try(self, active: Collection[str]) -> list[str]:
        """Return whose host ports could not all be had, and may be by now."""
        return [its for its, remark in self._remarks.items() if remark and its in active]

    def is_full(self) -> bool:
        """Whether no more ports can be held."""
        return self._reservations.is_full()

    @property
    def held(self) -> tuple[int, int]:
        """How many host ports are held, and how many may be."""
        return self._reservations.ports, self._reservations.limit

    @property
    def unreserved(self) -> int:
        """How many have not all of their host ports held."""
        return sum(map(bool, self._remarks.values()))

    def still_held(self, holders: Iterable[Holder]) -> list[Holder]:
        """Return those of ``holders``, as they were found by ``have``, that are there still."""
        found: list[Holder] = []
        for holder in holders:
            mapping = holder.mapping
            assert mapping.host_ip is not None
            assert mapping.host_ports is not None
            try:
                self._reservations.take(holder, Claim(mapping.protocol, mapping.host_ports, (mapping.host_ip,)))
            except Held as other:
                found.append(_holder(other))
            except NotOnNode:
                continue
            else:
                self._reservations.release(holder)
        return found

    def remark(self, its: str) -> str:
        """Return what is to be said of somebody's host ports; empty where they are reserved."""
        return self._remarks.get(its, "")

    def vacate(self, its: str) -> None:
        """Let go of what somebody has when the rules are gone."""
        self._vacated.add(its)

    def give_up_unused(self, active: Collection[str]) -> None:
        """Let go of what was reserved for publications that were not to be active after all, and have no rules."""
        self._release([its for its in self._fresh if its not in active and its not in self._vacated])
        self._fresh.clear()

    def leave_vacated(self, active: Collection[str]) -> None:
        """Let go of what was vacated: the rules are gone."""
        self._release([its for its in self._vacated if its not in active])
        self._vacated.clear()

    async def keep(self) -> None:
        """Have the sockets survive this daemon, where systemd keeps them.

        Those that an earlier run left, and that no publication has, are let go.
        """
        await self._reservations.keep()

    def _release(self, owners: Iterable[str]) -> None:
        for its in owners:
            self._reservations.release(its)
            self._remarks.pop(its, None)


def _was_chosen(publication: Publication, chosen: Chosen) -> bool:
    """Whether an earlier run chose the host ports that a publication has."""
    assert publication.container is not None
    assert publication.bound is not None
    ports = publication.bound.host_ports
    return ports is not None and ports in chosen.get((publication.container, publication.mapping), ())


def _claim(publication: Publication) -> Claim:
    """Return the host ports that a publication is to have reserved, on what addresses."""
    bound = publication.bound
    assert bound is not None
    assert bound.host_ports is not None
    host_ip = None if bound.any_host_ip else bound.host_ip
    families = (Family.of(attachment.address) for attachment in publication.attachments)
    return Claim(bound.protocol, bound.host_ports, tuple(host_ip or family.unspecified for family in families))


def _holder(held: Held) -> Holder:
    port = PortRange(held.port, held.port)
    return Holder(held.holder, Mapping(held.at, port, port, held.protocol))
