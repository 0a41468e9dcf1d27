"""A table of our own in nf_tables, ``ip ctrport`` and ``ip6 ctrport``: what is published are elements of its maps.

``OwnTable`` is the ``Firewall`` of it. The table is the state, as the rules are with iptables: the comment of each
element names its owner.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from ..model import Count, Family, Holder
from ..owners import LocalnetRecord, Owner
from ..rules import Difference, Layout, Rule
from . import AnyPlan, FirewallError, ForeignTable, Refused
from .door import Door
from .drift import Drift, combined, drift
from .plan import Plan
from .sets import COMMENT, Element, Set, table
from .standing import Standing, standing
from .tableplan import Asked, Held, TablePlan, plan_all, plan_change
from .tables import Tables
from .text import diff


class TableKernel(Protocol):
    """How our table of one family is reached. Raises ``FirewallError``."""

    family: Family

    async def read(self, standing: Standing) -> Held | None:
        """Return what the table of our name holds, as far as it may be ours; None where there is none."""
        ...

    async def dropping(self) -> list[str]:
        """Return what is to be said of chains of others that may drop what is let through."""
        ...

    async def counts(self, maps: Sequence[Set]) -> list[tuple[str, Count]]:
        """Return the comment of each element of these maps, and what it counted; beside the event loop."""
        ...

    async def load(self, text: str) -> None:
        """Have all of a script carried out, or nothing: lines in the words of nft."""
        ...

    async def write(self, gone: Sequence[Element], come: Sequence[Element], sets: Mapping[str, Set]) -> None:
        """Delete elements and add others, all of it or nothing."""
        ...

    async def delete(self) -> None:
        """Delete the table; one that is not there is deleted already."""
        ...

    async def close(self) -> None:
        """Give up what it holds. It may be used again."""
        ...


class OwnTable:
    """Keeps rules as elements of the table that ``kernel`` reaches. Implements ``Firewall``.

    ``doors`` are the FORWARD of each iptables, ``others`` what tells of host ports that others have.
    """

    name = "nftables"

    def __init__(
        self, kernel: TableKernel, layout: Layout, doors: Sequence[Door] = (), others: Tables | None = None
    ) -> None:
        self._kernel = kernel
        self._standing = standing(layout, kernel.family)
        self._sets = {one.name: one for one in self._standing.sets}
        self._doors = tuple(doors)
        self._others = others
        self._known = False
        self._held: Held | None = None
        self._asked: Asked | None = None
        self._dropping: tuple[str, ...] = ()
        self.warnings: tuple[str, ...] = ()

    async def read(self, *, words: bool = True) -> None:
        """See ``Firewall.read``. Of our own table there are no words but those that we give it."""
        held = await self._kernel.read(self._standing)
        if held is not None and not held.is_ours(self._standing):
            name = table(self._kernel.family)
            raise ForeignTable(
                f"the table {name} is somebody else's (no rule in it has our mark): it is left alone. "
                f"`nft delete table {name}` if nobody needs it, or set another firewall.backend"
            )
        said = []
        for door in self._doors:
            try:
                await door.look(words=words)
            except FirewallError as error:
                said.append(f"whether FORWARD of {door.name} drops what is published cannot be told: {error}")
        with contextlib.suppress(FirewallError):  # what was known of others stands
            self._dropping = tuple(await self._kernel.dropping())
        self.warnings = (*said, *self._dropping)
        self._held, self._known, self._asked = held, True, None

    @property
    def localnet_records(self) -> tuple[LocalnetRecord, ...]:
        """See ``Firewall.localnet_records``."""
        found = (LocalnetRecord.parse(element.owner) for element in self._elements if element.set == "localnet-devices")
        return tuple(record for record in found if record is not None)

    @property
    def chosen(self) -> tuple[Owner, ...]:
        """See ``Firewall.chosen``."""
        owners = dict.fromkeys(one.owner for one in self._elements if one.data and " of " in one.comment)
        return tuple(its for its in map(Owner.parse, owners) if its is not None and its.mapping.dynamic)

    @property
    def _elements(self) -> Collection[Element]:
        return self._held.elements if self._held is not None else ()

    def plan(self, wanted: Iterable[Rule]) -> TablePlan:
        """See ``Firewall.plan``."""
        if not self._known:
            raise FirewallError("what the kernel holds has not been read")
        plan = plan_all(wanted, self._standing, self._held)
        doors, stay_open = tuple(door.plan() for door in self._doors), tuple(door.stays_open for door in self._doors)
        return replace(plan, doors=doors, stay_open=stay_open)

    def plan_change(self, difference: Difference) -> TablePlan:
        """See ``Firewall.plan_change``."""
        if self._asked is None:
            raise FirewallError("no whole plan has been applied yet")
        return plan_change(difference, self._asked)

    async def apply(self, plan: AnyPlan) -> None:
        """See ``Firewall.apply``. What lets packets through in other tables comes first, and goes last."""
        its, asked = _own(plan), self._asked
        self._known, self._asked = False, None
        await self._write_doors(its, opening=True)
        if its.delete:
            await self._kernel.delete()
        if its.script:
            await self._kernel.load(its.text)
        gone, come = its.elements
        if gone or come:
            await self._kernel.write(gone, come, self._sets)
        await self._write_doors(its, opening=False)
        if its.asked is not None:
            self._asked = its.asked
        elif asked is not None:
            asked.take(its.by)
            self._asked = asked

    async def _write_doors(self, plan: TablePlan, *, opening: bool) -> None:
        """Write the plans for FORWARD that let something through, or the others."""
        for door, its in self._doors_of(plan, opening=opening):
            try:
                await door.write(its)
            except Refused:
                raise
            except FirewallError as error:
                # What is published is right in our table all the same, and gets through wherever nothing drops it.
                self.warnings += (
                    f"FORWARD of {door.name} may drop what is published, and is not as it has to be: {error}",
                )

    def _doors_of(self, plan: TablePlan, *, opening: bool) -> list[tuple[Door, Plan]]:
        """Return each door with its plan, where that lets something through, or where not; none in a mere change."""
        pairs = zip(self._doors, plan.doors, strict=False)
        return [(door, its) for door, its in pairs if door.opens(its) is opening]

    def diff(self, plan: AnyPlan) -> list[str]:
        """See ``Firewall.diff``: in the words of nft, and of iptables where it is in its FORWARD."""
        its = _own(plan)
        before, behind = (
            [line for door, each in self._doors_of(its, opening=opening) for line in self._door_diff(door, each)]
            for opening in (True, False)
        )
        return [*before, *its.diff(), *behind]

    def script(self, plan: AnyPlan) -> list[str]:
        """See ``Firewall.script``. Elements are written over netlink: here they are in the words of nft."""
        its = _own(plan)
        before, behind = (
            [line for door, each in self._doors_of(its, opening=opening) for line in door.script(each)]
            for opening in (True, False)
        )
        return [*before, *its.lines, *behind]

    def _door_diff(self, door: Door, plan: Plan) -> list[str]:
        title, *rest = diff(plan, self._kernel.family) or [""]
        return [f"{title} ({door.name})", *rest] if rest else []

    def drift(self, plan: AnyPlan, asked: Collection[Rule] = (), dismissed: Collection[Rule] = ()) -> Drift:
        """See ``Firewall.drift``."""
        its = _own(plan)
        doors = (drift(each, asked) for each, stays in zip(its.doors, its.stay_open, strict=False) if stays)
        return combined([its.drift(asked, dismissed), *doors])

    async def holders(self) -> list[Holder]:
        """See ``Firewall.holders``."""
        return await self._others.holders() if self._others is not None else []

    async def counters(self) -> dict[str, Count]:
        """See ``Firewall.counters``."""
        counts = await self._kernel.counts([one for one in self._standing.sets if one.data])
        return await asyncio.to_thread(_by_owner, counts)

    async def prepare(self) -> None:
        """See ``Firewall.prepare``: a change takes no program."""

    async def close(self) -> None:
        """See ``Firewall.close``."""
        await self._kernel.close()
        for door in self._doors:
            await door.close()
        if self._others is not None:
            await self._others.close()

    async def plan_sweep(self) -> TablePlan:
        """See ``Firewall.plan_sweep``: our table has one name."""
        return TablePlan(self._standing)

    async def plan_removal(self) -> tuple[TablePlan, TablePlan]:
        """See ``Firewall.plan_removal``. The guard of 127.0.0.0/8 goes with the table."""
        self._held = await self._kernel.read(self._standing)
        ours = self._held is not None and self._held.is_ours(self._standing)
        doors = []
        for door in self._doors:
            with contextlib.suppress(FirewallError):
                await door.look()
            doors.append(door.plan(closing=True))
        gone = tuple(self._elements) if ours else ()
        return TablePlan(self._standing, gone=gone, doors=tuple(doors), delete=ours), TablePlan(self._standing)


def _by_owner(counts: Iterable[tuple[str, Count]]) -> dict[str, Count]:
    counted: dict[str, Count] = {}
    for comment, count in counts:
        found = COMMENT.fullmatch(comment)
        if found is not None:
            counted[found["owner"]] = counted.get(found["owner"], Count()) + count
    return counted


def _own(plan: AnyPlan) -> TablePlan:
    if not isinstance(plan, TablePlan):
        raise TypeError(f"not a plan for a table of our own: {plan!r}")
    return plan
