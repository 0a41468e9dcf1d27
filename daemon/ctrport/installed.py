"""What the kernel holds at this moment of what is published: the rules there are, compared with those there should be.

They are compared by their tags. The daemon says what should be there, or whoever works that out without it. A
difference counts where it lasts: what the daemon says is written a moment after the kernel is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import ip_address, ip_network

from . import __version__
from .dataplane import Dataplane, Transition
from .firewall import Firewall
from .firewall.backends import firewalls_of
from .model import Access, Attachment, BridgeNetwork, Count, Family, Network, NodeFacts, Publication, State
from .owners import Owner
from .publish import Change
from .rules import Rule
from .status import NOT_READ, PublicationStatus, Status, Undeclared, layout_of

#: Seconds between two looks at what differs, and for how long it has to, with so much for each publication: longer than
#: the daemon takes until its word is written.
PAUSE, PATIENCE, PATIENCE_EACH = 0.3, 0.6, 0.0002

IN_LINE = "in line"
MISSING = "its rules are not all in the kernel at this moment; it is for the daemon to put them back"


class NotComparable(Exception):
    """Why the kernel was not compared with what the daemon says, in a sentence."""


@dataclass(frozen=True)
class Sight:
    """One look at the kernel: the rules that it lacks, devices whose ``route_localnet`` is off, and what it counted.

    ``counts`` has whoever has DNAT rules in the kernel.
    """

    missing: frozenset[Rule]
    off: frozenset[str]
    counts: Mapping[str, Count]

    @classmethod
    async def of(cls, due: Transition, firewalls: Iterable[Firewall]) -> Sight:
        """Return what was seen where this is due. Raises ``FirewallError``."""
        counts: dict[str, Count] = {}
        for firewall in firewalls:
            for owner, count in (await firewall.counters()).items():
                counts[owner] = counts.get(owner, Count()) + count
        missing = frozenset(rule for _, plan in due.plans for rule in plan.added)
        return cls(missing, frozenset(due.localnet_on), counts)

    def also_in(self, before: Sight) -> Sight:
        """Return this look with those differences alone that an earlier one had seen, too."""
        return Sight(self.missing & before.missing, self.off & before.off, self.counts)

    def lacking(self) -> Callable[[PublicationStatus], bool]:
        """Return what says whether a publication lacks a rule of its own, of its device, or one that all need."""
        owners = {rule.owner for rule in self.missing}
        own = {owner for owner in owners if "/" in owner.partition(" ")[0]}
        devices = {owner.split(" ")[1] for owner in owners - own if owner.startswith("device ")} | self.off
        all_of_them = any(not owner.startswith("device ") for owner in owners - own)

        def lacks(its: PublicationStatus) -> bool:
            return all_of_them or its.owner in own or any(each.device in devices for each in its.attachments)

        return lacks

    def undeclared(self, publications: Iterable[PublicationStatus]) -> list[Undeclared]:
        """Return the mappings that the kernel holds and that are none of these."""
        declared = {its.owner for its in publications}
        owners = ((Owner.parse(owner), count) for owner, count in self.counts.items() if owner not in declared)
        return [
            Undeclared(
                *(its.container.namespace, its.container.id, str(its.bound), str(its)), count.packets, count.bytes
            )
            for its, count in owners
            if its is not None
        ]


async def compared(current: Status, again: Callable[[], Status | None]) -> Status:
    """Return what the daemon says, with what the kernel holds of it; ``again`` has the daemon's word anew.

    Raises ``NotComparable`` or ``FirewallError``.
    """
    sight = await look(current)
    seen = shown(current, sight, MISSING)
    end = time.monotonic() + PATIENCE + PATIENCE_EACH * len(current.publications)
    while (sight.missing or sight.off or seen.undeclared) and time.monotonic() < end:
        await asyncio.sleep(PAUSE)
        current = again() or current
        sight = (await look(current)).also_in(sight)
        seen = shown(current, sight, MISSING, only={its.owner for its in seen.undeclared})
    return seen


async def look(current: Status) -> Sight:
    """Look at the kernel once, with the daemon's word in hand. Raises ``NotComparable`` or ``FirewallError``."""
    if current.version != __version__ or not current.backend:
        raise NotComparable(f"the daemon is of another version ({current.version})")
    if current.firewall == NOT_READ:  # what the kernel holds is declared, for all that is known
        reason = f"the daemon has yet to see what runs (containerd: {current.containerd})"
        raise NotComparable(f"{reason}; rules stay as they are until then")
    try:
        layout = layout_of(current.layout)
        firewalls = firewalls_of(map(Family, current.families), layout, current.backend)
        node = NodeFacts(
            frozenset(),
            frozenset(map(ip_address, current.addresses)),
            networks=tuple(
                BridgeNetwork(network.bridge, tuple(map(ip_network, network.subnets)))
                for network in current.networks
                if not network.reason
            ),
            services=frozenset(map(ip_address, current.services)),
        )
        changes = [Change(None, _publication(its)) for its in current.publications if its.owner]
    except (ValueError, TypeError, KeyError) as error:
        raise NotComparable(f"what the daemon says is not understood: {error}") from error
    dataplane = Dataplane(firewalls, layout)
    try:
        return await Sight.of(await dataplane.glance(changes, node), firewalls.values())
    finally:
        await dataplane.close()


def shown(current: Status, sight: Sight, reason: str, only: Iterable[str] | None = None) -> Status:
    """Return publications as far as the kernel holds them: active only where nothing that they need is missing.

    ``reason`` is that of those. Of mappings that nothing declares, ``only`` are those to be shown, None is all.
    """
    lacks = sight.lacking()
    publications = [_as_it_is(its, lacks(its), sight.counts.get(its.owner), reason) for its in current.publications]
    undeclared = sight.undeclared(current.publications)
    if only is not None:
        undeclared = [its for its in undeclared if its.owner in only]
    return replace(
        current, publications=publications, undeclared=undeclared, kernel=_summary(publications, len(undeclared))
    )


def _as_it_is(its: PublicationStatus, lacks: bool, count: Count | None, reason: str) -> PublicationStatus:
    if not its.owner:
        return its
    connections, size = (count.packets, count.bytes) if count is not None else (0, 0)
    its = replace(its, installed=not lacks, connections=connections, bytes=size)
    if lacks and its.state == State.ACTIVE:
        return replace(its, state=str(State.WAITING), reason=reason, bound="", addresses=[])
    if not lacks and its.state != State.ACTIVE:  # the daemon could not write, and does not know what there is
        return replace(its, reason=f"{its.reason}; its rules are in the kernel all the same")
    return its


def _summary(publications: Iterable[PublicationStatus], undeclared: int) -> str:
    lacking = sum(its.installed is False for its in publications)
    parts = [f"{lacking} {'mapping is' if lacking == 1 else 'mappings are'} not all there"] if lacking else []
    parts += [f"{undeclared} {'is' if undeclared == 1 else 'are'} there that nothing declares"] if undeclared else []
    return "; ".join(parts) or IN_LINE


@lru_cache(maxsize=1024)
def _network(text: str) -> Network:
    return ip_network(text)


def _publication(its: PublicationStatus) -> Publication:
    owner = Owner.parse(its.owner)
    if owner is None:
        raise ValueError(f"{its.owner!r} is no owner")
    attachments = (
        Attachment(ip_address(each.address), each.device, _network(each.subnet), each.port or None)
        for each in its.attachments
    )
    access = Access(tuple(map(_network, its.sources)), its.interface or None)
    return Publication(
        *(owner.mapping, its.source, owner.container, State.ACTIVE, "", tuple(attachments)),
        bound=owner.bound,
        access=access,
    )
