"""What the kernel is made to hold for the publications: sockets, rules, switches and no stale flows, in a safe order.

A host port is reserved before there are rules for it, and let go when they are gone. The guard of 127.0.0.0/8 is in
place before ``route_localnet`` is switched on, and goes after it was switched off. Flows are looked at after the rules,
for a packet in between would make them stale again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, replace

from . import localnet
from .connections import Counts
from .firewall import AnyPlan, Firewall, FirewallError, Refused
from .firewall.drift import Drift, combined
from .flows import StaleFlows, closed, narrowed, opened, vacated
from .hairpins import Hairpins
from .holdings import Holdings
from .hostports import Reservations
from .model import Address, ContainerKey, Family, Holder, Mapping, NodeFacts, PortRange, Publication
from .networks import isolation, rules_beside, rules_of
from .owners import LocalnetRecord, owner_of
from .publish import Change
from .rules import (
    Difference,
    Layout,
    Rule,
    Ruleset,
    needs_localnet,
    rules_at,
    rules_for,
    skeleton,
)
from .tally import Tally

log = logging.getLogger(__name__)

#: How often the kernel is read anew where what was read was not there any more when it was to be mended.
MENDING_TRIES = 3


@dataclass(frozen=True)
class Transition:
    """What brings the kernel in line: plans, and the devices to switch route_localnet off for before, on for after.

    ``hairpin_on`` are the bridge ports to switch hairpin mode on for.
    """

    plans: Sequence[tuple[Firewall, AnyPlan]]
    localnet_off: Sequence[str]
    localnet_on: Sequence[str]
    hairpin_on: Sequence[str] = ()

    def __bool__(self) -> bool:
        return any(plan for _, plan in self.plans) or bool(self.localnet_off or self.localnet_on or self.hairpin_on)


class Dataplane:
    """Keeps the kernel in line with the publications that it is told of.

    ``firewalls`` and ``layout`` are what the rules are written with, and what shapes them.
    At first, and after an error, the kernel is not known to be in line (``in_line`` is False). ``transactions`` counts
    the plans that were written. ``complaint`` is what could not be done though the rules are right. ``others`` are
    tables that are to hold nothing of ours, and may: another backend's. ``chosen`` are the host ports that an earlier
    run chose, once it has looked; several for one mapping where two declarations ask for it and differ in who may reach
    it. ``tally`` has what writing took.
    """

    def __init__(
        self,
        firewalls: MappingABC[Family, Firewall],
        layout: Layout,
        reservations: Reservations | None = None,
        others: Sequence[Firewall] = (),
        tally: Tally | None = None,
    ) -> None:
        self._tally = Tally() if tally is None else tally
        self.firewalls = dict(firewalls)
        self.layout = layout
        self._others = tuple(others)
        standing = (rule for family in firewalls for rule in (*skeleton(layout, family), *isolation(layout, family)))
        self._wanted = Ruleset(standing)
        self._node = NodeFacts(frozenset(), frozenset())
        self._active: dict[str, Publication] = {}
        self._former: dict[str, Publication] = {}  # of those before, until the kernel has followed
        # Asked for None: one that holds no socket yet is empty, and so counts as False.
        self._holdings = Holdings(Reservations(0) if reservations is None else reservations)
        self._hairpins = Hairpins(self._complain)
        self._localnet_ours: dict[str, bool] = {}
        self._flows = StaleFlows(self._complain, self._tally)
        self.complaint = ""
        self.chosen: dict[tuple[ContainerKey, Mapping], tuple[PortRange, ...]] = {}
        self.in_line = False
        self.transactions = 0

    def succeed(self, before: Dataplane) -> None:
        """Take over what another one has brought about with the same reservations, to go on from there."""
        self._former = before._former | before._active
        self._holdings.succeed(before._holdings, before._active)
        self._hairpins.succeed(before._hairpins)
        self.complaint = before.complaint
        self._flows.succeed(before._flows)
        self.transactions = before.transactions

    async def start(self) -> None:
        """Look at what an earlier run left. Raises ``FirewallError`` where this node's tables cannot be ours."""
        for other in self._others:
            with contextlib.suppress(FirewallError):  # what cannot be read there is somebody else's, or not there
                await other.read(words=False)
                self._learn(other)
        for firewall in self.firewalls.values():
            await firewall.read()
            self._learn(firewall)

    def _learn(self, firewall: Firewall) -> None:
        for record in firewall.localnet_records:
            self._localnet_ours[record.device] = record.ours
        for its in firewall.chosen:
            if its.bound.host_ports is not None:
                before = self.chosen.get((its.container, its.mapping), ())
                # Both families say it; and ports are chosen upwards, so the first goes to who asks first.
                self.chosen[its.container, its.mapping] = tuple(sorted({*before, its.bound.host_ports}))

    def hold_at_most(self, limit: int) -> None:
        """Have no more host ports than so many held by sockets."""
        self._holdings.hold_at_most(limit)

    def reserve(self, changes: Sequence[Change]) -> list[Holder]:
        """Have the host ports of what is to be active held by sockets; return who holds those that were not had."""
        held: list[Holder] = []
        for after in (change.after for change in changes):
            if after is None or after.bound is None:
                continue
            held += self._holdings.have(after, owner_of(after) in self._active, self.chosen)
        return held

    def reserve_again(self) -> list[Holder]:
        """Try again what could not be reserved of what is active; return whose sockets hold such host ports by now."""
        held: list[Holder] = []
        for its in self._holdings.worth_another_try(self._active):
            if self._holdings.is_full():
                break
            held += self._holdings.have(self._active[its], True, self.chosen)
        return held

    def still_held(self, holders: Iterable[Holder]) -> list[Holder]:
        """Return those of ``holders``, as they were found by ``reserve``, that are there still."""
        return self._holdings.still_held(holders)

    def remark(self, publication: Publication) -> str:
        """Return what is to be said of an active publication's host ports; empty where they are reserved."""
        return self._holdings.remark(owner_of(publication)) if publication.bound is not None else ""

    async def follow(self, changes: Sequence[Change], node: NodeFacts, *, mend: bool = False) -> Drift:
        """Make the kernel hold what changed, in one transaction a family.

        ``node`` is what is known of the node. With ``mend``, and after an error, what the kernel holds is read first,
        and whatever it lacks is written. Return what of it had been in the kernel and was not as it should be.
        Raises ``FirewallError``.
        """
        was_in_line = self.in_line
        difference = self._take_in(changes, node)
        self._holdings.give_up_unused(self._active)
        if was_in_line and not mend and (not difference or await self._write_change(difference, changes)):
            return Drift()
        self.in_line = False
        fresh = {record.device for record in _records(difference.added)}
        off = tuple(device for device in self._localnet_ours if device not in fresh and _is_off(device))
        plans = await self._mend()
        if not was_in_line:
            return Drift()
        added, removed = set(difference.added), set(difference.removed)
        found = combined(firewall.drift(plan, added, removed) for firewall, plan in plans)
        return replace(found, switches=off)

    async def _write_change(self, difference: Difference, changes: Sequence[Change]) -> bool:
        """Write a difference alone, and return whether that could be done: not in chains that are others by now."""
        self.in_line = False
        plans = [(f, f.plan_change(_of_family(difference, family))) for family, f in self.firewalls.items()]
        off = [record.device for record in _records(difference.removed) if record.ours]
        on = [record.device for record in _records(difference.added)]
        active = [change.after for change in changes if change.after is not None]
        try:
            await self._write(Transition(plans, off, on))
        except Refused as error:
            log.info("%s; looking at what is there", error)
            return False
        self._hairpins.switch(self._hairpins.due(active))  # behind the rules: who calls from elsewhere is served
        self.in_line = True
        return True

    @property
    def warnings(self) -> tuple[str, ...]:
        """What of others' tables may keep from working what is published, in a sentence each."""
        return tuple(dict.fromkeys(said for firewall in self.firewalls.values() for said in firewall.warnings))

    def switched_off(self) -> bool:
        """Whether somebody switched a device's ``route_localnet`` off that has to be on."""
        with contextlib.suppress(FirewallError):  # what cannot be told now is asked again
            return any(map(_is_off, self._localnet_ours))
        return False

    async def preview(self, changes: Sequence[Change], node: NodeFacts) -> Transition:
        """Return what a mending ``follow`` would do, and do nothing. Raises ``FirewallError``."""
        self._take_in(changes, node)
        return await self._transition(words=True)

    async def glance(self, changes: Sequence[Change], node: NodeFacts) -> Transition:
        """Return what ``start`` and then ``preview`` would, at a glance: one look a family (see ``Firewall.read``)."""
        for firewall in self.firewalls.values():
            await firewall.read(words=False)
            self._learn(firewall)
        self._take_in(changes, node)
        return self._due()

    async def _mend(self) -> list[tuple[Firewall, AnyPlan]]:
        """Return what it took; what it would have taken, too, where somebody was still writing meanwhile."""
        plans: list[tuple[Firewall, AnyPlan]] = []
        for left in reversed(range(MENDING_TRIES)):
            transition = await self._transition(words=False)
            plans += transition.plans
            try:
                await self._write(transition)
                break
            except Refused:
                if not left:
                    raise
        self._hairpins.switch(transition.hairpin_on)
        self.in_line = True
        restored = dict.fromkeys(rule.owner for _, plan in plans for rule in plan.added)
        self._flows.touch(opened(self._active[its] for its in restored if its in self._active))
        removed = {owner for _, plan in plans for owner in plan.removed}
        self._flows.touch(vacated(sorted(removed), self._active.values()))
        self._flows.touch(narrowed(self._active[its] for its in sorted(removed) if its in self._active))
        for its, former in self._former.items():
            self._flows.touch(closed(former, self._active.get(its)))
        self._former.clear()
        return plans

    async def _transition(self, *, words: bool) -> Transition:
        """Read what the kernel holds, and return what brings it in line; see ``Firewall.read`` for ``words``."""
        for firewall in self.firewalls.values():
            await firewall.read(words=words)
        return self._due()

    def _due(self) -> Transition:
        """Return what brings the kernel in line with what is wanted, by what was read last."""
        plans = []
        left_over: dict[str, LocalnetRecord] = {}
        for family, firewall in self.firewalls.items():
            left_over.update({record.device: record for record in firewall.localnet_records})
            plans.append((firewall, firewall.plan(rule for rule in self._wanted if rule.family is family)))
        wanted = _records(self._wanted)
        needed = {record.device for record in wanted}
        for device in self._localnet_ours.keys() - needed:
            del self._localnet_ours[device]  # an earlier run's: its record goes with its rule
        off = [record.device for record in left_over.values() if record.ours and record.device not in needed]
        on = [record.device for record in wanted if not _is_on(record.device)]
        return Transition(plans, off, on, self._hairpins.due(self._active.values()))

    @property
    def held_ports(self) -> tuple[int, int]:
        """How many host ports are held by sockets, and how many may be."""
        return self._holdings.held

    @property
    def unreserved(self) -> int:
        """How many publications have not all of their host ports held."""
        return self._holdings.unreserved

    async def counts(self) -> Counts | None:
        """Return how many connections each mapping has had; None where the kernel cannot be asked now."""
        found = dict[Family, dict[str, int]]()
        try:
            for family, firewall in self.firewalls.items():
                found[family] = {its: count.packets for its, count in (await firewall.counters()).items()}
        except FirewallError as error:
            log.debug("connections cannot be counted, what was known of them stands: %s", error)
            return None
        return Counts(found, dict(self._active))

    async def prepare(self) -> None:
        """Make ready for the next change, while there is time."""
        for firewall in self.firewalls.values():
            await firewall.prepare()

    async def finish(self) -> None:
        """Remove the flows that are left to be removed, where no other run of this is to go on with them."""
        await self._flows.finish(lambda: self._node.addresses)

    async def close(self) -> None:
        """Give up what ``prepare`` holds, and the flows that are being removed. The host ports are held on."""
        await self._flows.close()
        for firewall in self.firewalls.values():
            await firewall.close()

    async def sweep(self) -> None:
        """Delete what another chain or backend has left of an earlier run; where that fails it says so.

        To be called when the kernel is in line: no port is closed by it.
        """
        for firewall in self.firewalls.values():
            try:
                plan = await firewall.plan_sweep()
                if plan:
                    await firewall.apply(plan)
                    log.info("chains of another firewall.chain are deleted")
            except FirewallError as error:
                self.in_line = False
                log.warning("chains of another firewall.chain may be left: %s", error)
        for other in self._others:
            try:
                plans = await other.plan_removal()
                # Its guard goes with its rules, and nobody else would know any more whose doing the switch was.
                needed = {record.device for record in _records(self._wanted)}
                _switch_off(record for record in other.localnet_records if record.device not in needed)
                for plan in plans:
                    await other.apply(plan)
                if any(plans):
                    log.info("what another firewall.backend had written is deleted (%s)", other.name)
            except FirewallError as error:
                log.warning("rules of another firewall.backend may be left (`ctrport clean`): %s", error)
            finally:
                await other.close()

    async def keep_host_ports(self) -> None:
        """Have the sockets of host ports survive this daemon, where systemd keeps them; to be called behind the rules.

        Those that an earlier run left, and that no publication has, are let go.
        """
        await self._holdings.keep()

    def drop_stale_flows(self) -> asyncio.Task[None]:
        """Begin to remove the flows that what was written made stale; the task ends when that is done.

        Beside all else: the next mapping does not wait for it. Where it fails it says so once, and the next call tries
        again; the rules are right all the same.
        """
        return self._flows.drop(lambda: self._node.addresses)

    async def _write(self, transition: Transition) -> None:
        for device in transition.localnet_off:
            _switch(device, False)
        for family, (firewall, plan) in zip(self.firewalls, transition.plans, strict=True):
            self.transactions += bool(plan)
            with self._counted(family) if plan else contextlib.nullcontext():
                await firewall.apply(plan)
        for device in transition.localnet_on:
            _switch(device, True)
        self._holdings.leave_vacated(self._active)

    @contextlib.contextmanager
    def _counted(self, family: Family) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except FirewallError:
            self._tally.write_errors[family] += 1
            raise
        finally:
            self._tally.writes[family].observe(time.monotonic() - began)

    def _complain(self, complaint: str) -> None:
        """Say what could not be done though the rules are right; not twice in a row."""
        if complaint and complaint != self.complaint:
            log.warning("%s", complaint)
        self.complaint = complaint

    def _take_in(self, changes: Sequence[Change], node: NodeFacts) -> Difference:
        """Change what is wanted, note whose flows this touches, and return what it makes different."""
        old, new = list[Rule](), list[Rule]()
        if node is not self._node:
            old, new = self._of_node(self._node, besides=node), self._of_node(node, besides=self._node)
            self._node = node
        for change in changes:
            before = change.before
            if before is not None and before.attachments:
                its = owner_of(before)
                old += self._rules(before)
                self._active.pop(its)
                self._holdings.vacate(its)
                self._hairpins.go(before)
                self._flows.touch(closed(before, change.after))
        for after in (change.after for change in changes):
            if after is not None and after.attachments:
                new += self._rules(after)
                self._active[owner_of(after)] = after
                self._hairpins.come(after)
                self._flows.touch(opened([after]))
        difference = self._wanted.replace(old, new)
        for record in _records(difference.removed):
            del self._localnet_ours[record.device]
        return difference

    def _of_node(self, node: NodeFacts, *, besides: NodeFacts) -> list[Rule]:
        """Return the rules that the node itself asks for, but for those that ``besides`` asks for too."""
        rules: list[Rule] = []
        for address in _sorted(node.addresses - besides.addresses):
            rules += rules_at(address, self.layout)
        for service in _sorted(node.services - besides.services):
            rules += rules_beside(service, self.layout)
        for network in node.networks:
            if network not in besides.networks:
                rules += rules_of(network, self.layout, self.firewalls)
        return [rule for rule in rules if rule.family in self.firewalls]

    def _rules(self, publication: Publication) -> tuple[Rule, ...]:
        device = needs_localnet(publication, self.layout)
        if device is None:
            return rules_for(publication, self.layout)
        if device not in self._localnet_ours:
            try:
                self._localnet_ours[device] = not _is_on(device)
            except FirewallError:
                self._localnet_ours[device] = True  # left on by mistake it would have no guard
        ours = self._localnet_ours[device]
        return rules_for(publication, self.layout, localnet_ours=ours)


async def remove_everything(firewall: Firewall) -> bool:
    """Take every rule of ours away, put ``route_localnet`` back, and return whether there was anything.

    Needs no config: rules are known by their tags, whatever their chains are called. Raises ``FirewallError``.
    """
    plan, guard = await firewall.plan_removal()
    _switch_off(firewall.localnet_records)
    try:
        await firewall.apply(plan)
        await firewall.apply(guard)
    finally:
        await firewall.close()
    return bool(plan or guard)


def _sorted(addresses: Iterable[Address]) -> list[Address]:
    return sorted(addresses, key=lambda address: (address.version, int(address)))


def _switch(device: str, on: bool) -> None:
    with _errors(device, "switched"):
        localnet.switch(device, on)


def _switch_off(records: Iterable[LocalnetRecord]) -> None:
    """Put ``route_localnet`` back where it was off before; to be called before the guard goes."""
    for record in records:
        if record.ours:
            _switch(record.device, False)


def _is_on(device: str) -> bool:
    with _errors(device, "read"):
        return localnet.is_on(device)


def _is_off(device: str) -> bool:
    with _errors(device, "read"):
        return localnet.is_off(device)


@contextlib.contextmanager
def _errors(device: str, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FirewallError(f"route_localnet of {device} cannot be {done}: {error.strerror}") from error


def _records(rules: Iterable[Rule]) -> list[LocalnetRecord]:
    found = (LocalnetRecord.parse(rule.owner) for rule in rules)
    return [record for record in found if record is not None]


def _of_family(difference: Difference, family: Family) -> Difference:
    added = tuple(rule for rule in difference.added if rule.family is family)
    return Difference(added, tuple(rule for rule in difference.removed if rule.family is family))
