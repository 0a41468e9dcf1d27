"""What the kernel is made to hold for the publications: rules, ``route_localnet`` and no stale flows, in a safe order.

The guard of 127.0.0.0/8 is in place before ``route_localnet`` is switched on, and goes after it was switched off. Flows
are looked at after the rules, for a packet in between would make them stale again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from . import conntrack, localnet, ports
from .conntrack import Closed, ConntrackError, Opened
from .firewall import Firewall, FirewallError
from .firewall.plan import Plan
from .firewall.text import owner
from .model import Address, Family, Publication
from .ports import PortSpecError
from .publish import Change
from .rules import (
    Difference,
    Layout,
    LocalnetRecord,
    Rule,
    Ruleset,
    needs_localnet,
    owner_of,
    rules_at,
    rules_for,
    skeleton,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Transition:
    """What brings the kernel in line: plans, and the devices to switch route_localnet off for before, on for after."""

    plans: Sequence[tuple[Firewall, Plan]]
    localnet_off: Sequence[str]
    localnet_on: Sequence[str]

    def __bool__(self) -> bool:
        return any(plan for _, plan in self.plans) or bool(self.localnet_off or self.localnet_on)


class Dataplane:
    """Keeps the kernel in line with the publications that it is told of.

    At first, and after an error, the kernel is not known to be in line (``in_line`` is False). ``transactions`` counts
    the plans that were written.
    """

    def __init__(self, firewalls: Mapping[Family, Firewall], layout: Layout) -> None:
        self._firewalls = dict(firewalls)
        self._layout = layout
        self._wanted = Ruleset(rule for family in firewalls for rule in skeleton(layout, family))
        self._node: frozenset[Address] = frozenset()
        self._active: dict[str, Publication] = {}
        self._localnet_ours: dict[str, bool] = {}
        self._touched: list[Opened | Closed] = []
        self._complaint = ""
        self.in_line = False
        self.transactions = 0

    async def start(self) -> None:
        """Look at what an earlier run left. Raises ``FirewallError`` where this node's tables cannot be ours."""
        for firewall in self._firewalls.values():
            await firewall.read()
            for record in firewall.localnet_records:
                self._localnet_ours[record.device] = record.ours

    async def follow(self, changes: Sequence[Change], node: Collection[Address], *, mend: bool = False) -> int:
        """Make the kernel hold what changed, in one transaction a family, and return how many rules that added.

        ``node`` are the node's own addresses. With ``mend``, and after an error, what the kernel holds is read first,
        and whatever it lacks is written.
        Raises ``FirewallError``.
        """
        difference = self._take_in(changes, node)
        if mend or not self.in_line:
            return await self._mend()
        if difference:
            self.in_line = False
            plans = [(f, f.plan_change(_of_family(difference, family))) for family, f in self._firewalls.items()]
            off = [record.device for record in _records(difference.removed) if record.ours]
            await self._write(Transition(plans, off, [record.device for record in _records(difference.added)]))
            self.in_line = True
        return len(difference.added)

    async def preview(self, changes: Sequence[Change], node: Collection[Address]) -> Transition:
        """Return what a mending ``follow`` would do, and do nothing. Raises ``FirewallError``."""
        self._take_in(changes, node)
        return await self._transition()

    async def _mend(self) -> int:
        self.in_line = False
        transition = await self._transition()
        await self._write(transition)
        self.in_line = True
        added = [rule for _, plan in transition.plans for rule in plan.added]
        restored = dict.fromkeys(rule.owner for rule in added)
        self._touched += _opened(self._active[its] for its in restored if its in self._active)
        removed = {owner(each) for _, plan in transition.plans for each in plan.removed_tags}
        self._touched += _vacated(sorted(removed), self._active.values())
        return len(added)

    async def _transition(self) -> Transition:
        """Read what the kernel holds, and return what brings it in line."""
        plans = []
        left_over: dict[str, LocalnetRecord] = {}
        for family, firewall in self._firewalls.items():
            await firewall.read()
            left_over.update({record.device: record for record in firewall.localnet_records})
            plans.append((firewall, firewall.plan(rule for rule in self._wanted if rule.family is family)))
        wanted = _records(self._wanted)
        needed = {record.device for record in wanted}
        for device in self._localnet_ours.keys() - needed:
            del self._localnet_ours[device]  # an earlier run's: its record goes with its rule
        off = [record.device for record in left_over.values() if record.ours and record.device not in needed]
        return Transition(plans, off, [record.device for record in wanted if not localnet.is_on(record.device)])

    async def prepare(self) -> None:
        """Make ready for the next change, while there is time."""
        for firewall in self._firewalls.values():
            await firewall.prepare()

    async def close(self) -> None:
        """Give up what ``prepare`` holds."""
        for firewall in self._firewalls.values():
            await firewall.close()

    async def sweep(self) -> None:
        """Delete what another ``firewall.chain`` has left of an earlier run; where that fails it says so."""
        for firewall in self._firewalls.values():
            try:
                plan = await firewall.plan_sweep()
                if plan:
                    await firewall.apply(plan)
                    log.info("chains of another firewall.chain are deleted")
            except FirewallError as error:
                self.in_line = False
                log.warning("chains of another firewall.chain may be left: %s", error)

    async def drop_stale_flows(self) -> None:
        """Remove the flows that what was written made stale.

        Where it fails it says so once; the rules are right all the same.
        """
        touched, self._touched = self._touched, []
        if not touched:
            return
        try:
            await conntrack.drop_stale(touched, self._node)
        except ConntrackError as error:
            if str(error) != self._complaint:
                log.warning("%s", error)
            self._complaint = str(error)
        else:
            self._complaint = ""

    async def _write(self, transition: Transition) -> None:
        for device in transition.localnet_off:
            _switch(device, False)
        for firewall, plan in transition.plans:
            self.transactions += bool(plan)
            await firewall.apply(plan)
        for device in transition.localnet_on:
            _switch(device, True)

    def _take_in(self, changes: Sequence[Change], node: Collection[Address]) -> Difference:
        """Change what is wanted, note whose flows this touches, and return what it makes different."""
        addresses = frozenset(address for address in node if Family.of(address) in self._firewalls)
        old = [rule for address in _sorted(self._node - addresses) for rule in rules_at(address, self._layout)]
        new = [rule for address in _sorted(addresses - self._node) for rule in rules_at(address, self._layout)]
        self._node = addresses
        for before in (change.before for change in changes):
            if before is not None and before.attachments:
                old += self._rules(before)
                self._active.pop(owner_of(before))
                self._touched += (Closed(before.mapping, attachment) for attachment in before.attachments)
        for after in (change.after for change in changes):
            if after is not None and after.attachments:
                new += self._rules(after)
                self._active[owner_of(after)] = after
                self._touched += _opened([after])
        difference = self._wanted.replace(old, new)
        for record in _records(difference.removed):
            del self._localnet_ours[record.device]
        return difference

    def _rules(self, publication: Publication) -> tuple[Rule, ...]:
        device = needs_localnet(publication, self._layout)
        if device is None:
            return rules_for(publication, self._layout)
        ours = self._localnet_ours.setdefault(device, not localnet.is_on(device))
        return rules_for(publication, self._layout, localnet_ours=ours)


async def remove_everything(firewall: Firewall) -> bool:
    """Take every rule of ours away, put ``route_localnet`` back, and return whether there was anything.

    Needs no config: rules are known by their tags, whatever their chains are called. Raises ``FirewallError``.
    """
    plan, guard = await firewall.plan_removal()
    for record in firewall.localnet_records:
        if record.ours:
            _switch(record.device, False)
    await firewall.apply(plan)
    await firewall.apply(guard)
    return bool(plan or guard)


def _sorted(addresses: Iterable[Address]) -> list[Address]:
    return sorted(addresses, key=lambda address: (address.version, int(address)))


def _vacated(owners: Iterable[str], active: Iterable[Publication]) -> Iterator[Closed]:
    """Return the mappings that an earlier run's rules were of, but for those whose host ports are served now."""
    served = {(p.mapping.protocol, port) for p in active for port in p.mapping.host_ports or ()}
    for each in owners:
        with contextlib.suppress(PortSpecError):
            mapping = ports.parse(each.partition(" ")[2])
            if not any((mapping.protocol, port) in served for port in mapping.host_ports or ()):
                yield Closed(mapping, None)


def _switch(device: str, on: bool) -> None:
    try:
        localnet.switch(device, on)
    except OSError as error:
        raise FirewallError(f"route_localnet of {device} cannot be switched: {error.strerror}") from error


def _opened(publications: Iterable[Publication]) -> list[Opened | Closed]:
    return [Opened(p.mapping, attachment) for p in publications for attachment in p.attachments]


def _records(rules: Iterable[Rule]) -> list[LocalnetRecord]:
    found = (LocalnetRecord.parse(rule.owner) for rule in rules)
    return [record for record in found if record is not None]


def _of_family(difference: Difference, family: Family) -> Difference:
    added = tuple(rule for rule in difference.added if rule.family is family)
    return Difference(added, tuple(rule for rule in difference.removed if rule.family is family))
