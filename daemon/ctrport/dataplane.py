"""What the kernel is made to hold for the publications: rules, ``route_localnet`` and no stale flows, in a safe order.

The guard of 127.0.0.0/8 is in place before ``route_localnet`` is switched on, and goes after it was switched off. Flows
are looked at after the rules, for a packet in between would make them stale again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from . import conntrack, localnet
from .conntrack import Closed, ConntrackError, Opened
from .firewall import Firewall
from .firewall.plan import Plan
from .model import Address, Family, Publication
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
            leaving = [record for record in _records(difference.removed) if record.ours]
            await self._write(plans, leaving, _records(difference.added))
            self.in_line = True
        return len(difference.added)

    async def _mend(self) -> int:
        self.in_line = False
        plans = []
        left_over: dict[str, LocalnetRecord] = {}
        for family, firewall in self._firewalls.items():
            await firewall.read()
            left_over.update({record.device: record for record in firewall.localnet_records})
            plans.append((firewall, firewall.plan(rule for rule in self._wanted if rule.family is family)))
        wanted = _records(self._wanted)
        needed = {record.device for record in wanted}
        leaving = [record for record in left_over.values() if record.ours and record.device not in needed]
        await self._write(plans, leaving, [record for record in wanted if not localnet.is_on(record.device)])
        self.in_line = True
        restored = {rule.owner for _, plan in plans for rule in plan.added}
        self._touched += _opened(self._active[owner] for owner in restored if owner in self._active)
        return sum(len(plan.added) for _, plan in plans)

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

    async def _write(
        self, plans: Sequence[tuple[Firewall, Plan]], off: Sequence[LocalnetRecord], on: Sequence[LocalnetRecord]
    ) -> None:
        for record in off:
            localnet.switch(record.device, False)
        for firewall, plan in plans:
            self.transactions += bool(plan)
            await firewall.apply(plan)
        for record in on:
            localnet.switch(record.device, True)

    def _take_in(self, changes: Sequence[Change], node: Collection[Address]) -> Difference:
        """Change what is wanted, note whose flows this touches, and return what it makes different."""
        addresses = frozenset(address for address in node if Family.of(address) in self._firewalls)
        old = [rule for address in self._node - addresses for rule in rules_at(address, self._layout)]
        new = [rule for address in addresses - self._node for rule in rules_at(address, self._layout)]
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
            localnet.switch(record.device, False)
    await firewall.apply(plan)
    await firewall.apply(guard)
    return bool(plan or guard)


def _opened(publications: Iterable[Publication]) -> list[Opened | Closed]:
    return [Opened(p.mapping, attachment) for p in publications for attachment in p.attachments]


def _records(rules: Iterable[Rule]) -> list[LocalnetRecord]:
    found = (LocalnetRecord.parse(rule.owner) for rule in rules)
    return [record for record in found if record is not None]


def _of_family(difference: Difference, family: Family) -> Difference:
    added = tuple(rule for rule in difference.added if rule.family is family)
    return Difference(added, tuple(rule for rule in difference.removed if rule.family is family))
