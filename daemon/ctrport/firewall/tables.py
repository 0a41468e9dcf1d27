"""The iptables way to keep rules: tables and chains, whichever program or library reaches them.

``Tables`` is the one ``Firewall`` for all of them; what differs between backends is a ``Kernel``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Container, Iterable
from dataclasses import replace
from typing import Protocol

from ..model import Count, Family, Holder
from ..owners import LocalnetRecord, Owner
from ..rules import USER_CHAIN, Difference, Layout, Rule, Table
from ..tasks import together
from . import AnyPlan, FirewallError, ForeignChain
from .drift import Drift, drift
from .plan import ChainKey, Line, Plan, Ranks, plan_all, plan_change, plan_removal, plan_sweep
from .text import diff, holders, listing, owner, restore_input, saved, shell, tag

#: Chains of ``nat`` in which others answer on host ports: kube-proxy's NodePorts, CNI portmap's hostPorts, dockerd's.
HOLDER_CHAINS = ("KUBE-NODEPORTS", "CNI-HOSTPORT-DNAT", "DOCKER")


class Kernel(Protocol):
    """How the tables of one family are reached. Raises ``FirewallError``.

    ``writer`` is the command that writes what ``text.restore_input`` has of a plan, as ``restore`` does.
    """

    name: str
    family: Family
    writer: str

    async def chain(self, table: Table, chain: str) -> list[str] | None:
        """Return one chain as ``iptables -S CHAIN`` prints it, a line an item; None where there is no such chain."""
        ...

    async def glance(self, table: Table, chain: str) -> list[Line] | None:
        """Return the rules of one chain as quickly as can be, perhaps abridged; None where there is no such chain."""
        ...

    async def accepts(self, table: Table, chain: str) -> bool:
        """Whether what reaches the end of a kernel chain goes on: the chain's policy."""
        ...

    async def counts(self, table: Table, chain: str) -> list[tuple[str, Count]]:
        """Return the tag of each rule of ours in one chain, and what it counted; none where there is no such chain.

        Beside the event loop: with 10,000 rules it takes tenths of a second, and nothing waits for it.
        """
        ...

    async def table(self, table: Table) -> str:
        """Return a whole table as ``iptables-save -t TABLE`` prints it."""
        ...

    async def restore(self, plan: Plan) -> None:
        """Commit a plan's blocks one by one, in order, or several at once; an error leaves those before it committed.

        What was only glanced at is known by its tag, and there is nothing to do where it is to go and is gone by now.
        """
        ...

    async def prepare(self) -> None:
        """Do ahead what can be done ahead of the next ``restore``."""
        ...

    async def close(self) -> None:
        """Give up what ``prepare`` holds."""
        ...


class Tables:
    """Keeps rules in the chains of ``layout``. Implements ``Firewall``.

    Rules of ``spared`` owners are somebody else's to remove.
    """

    def __init__(self, kernel: Kernel, layout: Layout, spared: Container[str] = ()) -> None:
        self.name = kernel.name
        self.warnings: tuple[str, ...] = ()
        self._kernel = kernel
        self._layout = layout
        self._spared = spared
        self._held: dict[ChainKey, list[Line] | None] | None = None
        self._ranks: Ranks | None = None
        self._records: tuple[LocalnetRecord, ...] = ()
        self._chosen: tuple[Owner, ...] = ()

    async def read(self, *, words: bool = True) -> None:
        """See ``Firewall.read``. Looks at a chain at a time: the cost does not depend on what others have."""
        keys = [*self._layout.own_chains, *self._layout.kernel_chains, (Table.FILTER, USER_CHAIN)]
        looks = (_listed(self._kernel, *key) if words else self._kernel.glance(*key) for key in keys)
        answers = await together(looks)
        held = dict(zip(keys, answers, strict=True))
        foreign = self._foreign(held)
        if foreign is not None and not words:
            return await self.read()  # to say which it is, or to see that it is none
        if foreign is not None:
            raise foreign
        self._records = _localnet_records([*held.values(), *await self._former(held)])
        self._chosen = _chosen(held[Table.NAT, self._layout.chain] or ())
        self._held, self._ranks = held, None

    @property
    def localnet_records(self) -> tuple[LocalnetRecord, ...]:
        """See ``Firewall.localnet_records``."""
        return self._records

    @property
    def chosen(self) -> tuple[Owner, ...]:
        """See ``Firewall.chosen``."""
        return self._chosen

    def plan(self, wanted: Iterable[Rule]) -> Plan:
        """See ``Firewall.plan``."""
        if self._held is None:
            raise FirewallError("what the kernel holds has not been read")
        return plan_all(wanted, self._held, tag)

    def plan_change(self, difference: Difference) -> Plan:
        """See ``Firewall.plan_change``."""
        if self._ranks is None:
            raise FirewallError("no whole plan has been applied yet")
        return plan_change(difference, self._ranks)

    async def apply(self, plan: AnyPlan) -> None:
        """See ``Firewall.apply``."""
        plan = _own(plan)
        self._held, self._ranks = None, None
        if plan:
            await self._kernel.restore(plan)
        self._ranks = plan.ranks

    def diff(self, plan: AnyPlan) -> list[str]:
        """See ``Firewall.diff``: below the table's name, in the words of ``iptables-restore``."""
        return diff(_own(plan), self._kernel.family)

    def script(self, plan: AnyPlan) -> list[str]:
        """See ``Firewall.script``."""
        return script(self._kernel, _own(plan))

    def drift(self, plan: AnyPlan, asked: Collection[Rule] = (), dismissed: Collection[Rule] = ()) -> Drift:
        """See ``Firewall.drift``."""
        return drift(_own(plan), asked, {tag(rule) for rule in dismissed})

    async def holders(self) -> list[Holder]:
        """See ``Firewall.holders``."""
        chains = [chain for chain in HOLDER_CHAINS if chain != self._layout.chain]
        answers = await together(self._kernel.chain(Table.NAT, chain) for chain in chains)
        return [
            holder
            for chain, lines in zip(chains, answers, strict=True)
            for holder in holders(chain, listing(lines or ()), self._kernel.family)
        ]

    async def counters(self) -> dict[str, Count]:
        """See ``Firewall.counters``."""
        return await asyncio.to_thread(_by_owner, await self._kernel.counts(Table.NAT, self._layout.chain))

    async def prepare(self) -> None:
        """See ``Firewall.prepare``."""
        await self._kernel.prepare()

    async def close(self) -> None:
        """See ``Firewall.close``."""
        await self._kernel.close()

    async def plan_sweep(self) -> Plan:
        """See ``Firewall.plan_sweep``."""
        return replace(plan_sweep(await self._saved(), self._layout.own_chains), ranks=self._ranks or {})

    async def plan_removal(self) -> tuple[Plan, Plan]:
        """See ``Firewall.plan_removal``. Lists whole tables: our chains may have any name."""
        held = await self._saved()
        self._records = _localnet_records(held.values())
        return plan_removal(held)

    async def _saved(self) -> dict[ChainKey, list[Line]]:
        texts = await together(self._kernel.table(table) for table in Table)
        tables = zip(Table, map(saved, texts), strict=True)
        return {
            (table, chain): [line for line in lines if line.owner not in self._spared]
            for table, chains in tables
            for chain, lines in chains.items()
        }

    async def _former(self, held: dict[ChainKey, list[Line] | None]) -> list[list[Line]]:
        """Return the chains that an earlier run jumps to from POSTROUTING under another name than the layout's."""
        lines = held[Table.NAT, "POSTROUTING"] or []
        names = {line.target for line in lines if line.tag is not None} - {"", self._layout.postrouting}
        return [await self._kernel.glance(Table.NAT, name) or [] for name in sorted(names)]

    def _foreign(self, held: dict[ChainKey, list[Line] | None]) -> ForeignChain | None:
        """Return what to raise where a chain of our name is somebody else's.

        It is where it holds a rule without our tag, or where others jump to it: a running dockerd's DOCKER may hold
        nothing, or nothing but what we wrote before we looked. One that nobody else uses is what a flush left of ours.
        """
        for table, chain in self._layout.own_chains:
            lines = held[table, chain]
            foreign = next((line for line in lines or () if line.tag is None), None)
            if foreign is None and lines is not None:
                kernel = [held[key] or [] for key in self._layout.kernel_chains if key[0] is table]
                jumps = (line for lines in kernel for line in lines)
                foreign = next((line for line in jumps if line.tag is None and line.target == chain), None)
            if foreign is not None:
                return ForeignChain(
                    f"the chain {chain} of the table {table} is somebody else's ({foreign.text!r}): "
                    "it is left alone. Set firewall.chain to another name, such as CTRPORT"
                )
        return None


def _by_owner(counts: Iterable[tuple[str, Count]]) -> dict[str, Count]:
    counted: dict[str, Count] = {}
    for its, count in counts:
        words = owner(its)
        if "/" in words.partition(" ")[0]:  # a publication's, of which no rule in there is anything but DNAT
            counted[words] = counted.get(words, Count()) + count
    return counted


def script(kernel: Kernel, plan: Plan) -> list[str]:
    """Return a plan as lines of shell that write what ``Kernel.restore`` would, byte for byte; none where nothing."""
    return shell(kernel.writer, restore_input(plan))


async def _listed(kernel: Kernel, table: Table, chain: str) -> list[Line] | None:
    lines = await kernel.chain(table, chain)
    return None if lines is None else listing(lines)


def _own(plan: AnyPlan) -> Plan:
    if not isinstance(plan, Plan):
        raise TypeError(f"not a plan for tables and chains: {plan!r}")
    return plan


def _localnet_records(chains: Iterable[list[Line] | None]) -> tuple[LocalnetRecord, ...]:
    records = (LocalnetRecord.parse(line.owner) for lines in chains for line in lines or ())
    return tuple(record for record in records if record is not None)


def _chosen(lines: Iterable[Line]) -> tuple[Owner, ...]:
    owners = (Owner.parse(line.owner) for line in lines if line.tag is not None and " of " in line.tag)
    return tuple(dict.fromkeys(found for found in owners if found is not None and found.mapping.dynamic))
