"""iptables' FORWARD, as far as it is in the way of what our own table of nftables lets through.

What is dropped in one table is dropped, whatever another has said. So where FORWARD may drop what is published it gets
one rule of ours, which lets through what bears the mark of ``rules.ACCEPTED_MARK``: our table's own chain of forwarded
packets sets it just before FORWARD is asked, and another takes it off just behind. Where FORWARD lets all through, it
gets nothing. The chain DOCKER-USER is asked before, where somebody has put that on top.
"""

from __future__ import annotations

from dataclasses import replace

from ..rules import ACCEPTED_OWNER, USER_CHAIN, Jump, Layout, Match, Place, Rule, Table, accepted
from .plan import NEIGHBOURS, Add, Block, Line, Op, Plan, Remove, plan_all
from .tables import Kernel, script
from .text import listing, tag

_FORWARD = (Table.FILTER, "FORWARD")
#: Where a rule can go that drops nothing.
_HARMLESS = ("", "ACCEPT", "RETURN", "LOG", "NFLOG", "MARK", "CONNMARK", "TCPMSS", "TRACE")


class Door:
    """The FORWARD of the tables that ``kernel`` reaches."""

    def __init__(self, kernel: Kernel, layout: Layout) -> None:
        self._kernel = kernel
        self._rule = accepted(layout, kernel.family)
        # Somebody else's, and never written: it says where that stands, and is to stand.
        self._user = Rule(kernel.family, *_FORWARD, Match(), Jump(USER_CHAIN), "user", place=Place.FIRST)
        self._lines: list[Line] = []
        self._needed = False
        self._opened = False  # whether our rule was there, and was to be there, when it was written last

    @property
    def name(self) -> str:
        """What writes it."""
        return self._kernel.name

    async def look(self, *, words: bool = False) -> None:
        """Look at what is in the chain; see ``Firewall.read`` for ``words``. Raises ``FirewallError``."""
        lines, accepts = await self._kernel.glance(*_FORWARD), await self._kernel.accepts(*_FORWARD)
        if words and any(line.owner == ACCEPTED_OWNER for line in lines or ()):
            lines = await self._listed(*_FORWARD)  # where nothing of ours can go, iptables need not be there
        # What another backend of ours has there is not to be touched, and goes by itself.
        self._lines = [line if line.owner == ACCEPTED_OWNER else replace(line, tag=None) for line in lines or ()]
        others = (line for line in lines or () if line.tag is None)
        self._needed = not accepts or any(map(_may_drop, others))

    def plan(self, *, closing: bool = False) -> Plan:
        """Return what opens it where that is needed and closes it where it is not; where ``closing``, closes it."""
        wanted = [self._rule] if self._needed and not closing else []
        lines, before = self._lines, list[Rule]()
        ours = [line for line in lines if line.tag is not None]
        theirs = [line for line in lines if line.tag is None]
        if theirs and theirs[0].target == USER_CHAIN:
            if wanted and lines[0] in ours:  # it came on top when ours was there: not it is moved, but ours
                moved: tuple[Op, ...] = (*(Remove(_FORWARD[1], line) for line in ours), Add(self._rule, 2))
                return Plan((Block(_FORWARD[0], moved),))
            at = lines.index(theirs[0])
            lines = [*lines[:at], replace(lines[at], tag=tag(self._user)), *lines[at + 1 :]]
            before = [self._user]
        return plan_all([*before, *wanted], {_FORWARD: lines}, tag)

    async def _listed(self, table: Table, chain: str) -> list[Line] | None:
        lines = await self._kernel.chain(table, chain)
        return None if lines is None else listing(lines)

    def script(self, plan: Plan) -> list[str]:
        """See ``Firewall.script``."""
        return script(self._kernel, plan)

    def opens(self, plan: Plan) -> bool:
        """Whether a plan of this is to be written before anything is let through, and not behind that."""
        return bool(plan.added)

    @property
    def stays_open(self) -> bool:
        """Whether what a plan of now mends has drifted: not where somebody has only begun to drop, or no longer does.

        To be asked before the plan is written.
        """
        return self._opened and self._needed

    async def write(self, plan: Plan) -> None:
        """Write a plan. Raises ``FirewallError``."""
        if plan:
            await self._kernel.restore(plan)
        self._opened = self._needed

    async def close(self) -> None:
        """Give up what writing has left running."""
        await self._kernel.close()


def _may_drop(line: Line) -> bool:
    """Whether a rule may drop what is published: a chain that is jumped to may, but for those of known neighbours.

    What policy agents drop they are meant to: ``firewall.position`` says who is asked first.
    """
    return line.target not in _HARMLESS and not line.target.startswith(NEIGHBOURS)
