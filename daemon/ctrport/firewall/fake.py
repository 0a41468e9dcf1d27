"""Tables in memory, with faults to switch on: a ``Kernel`` for tests and dry runs.

It knows as much of iptables as plans use, and is as strict about it as the kernel: what is not there cannot be deleted,
a chain that is in use cannot go, a table is committed whole or not at all.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

from ..model import Count, Family
from ..rules import Table
from . import FirewallError, Refused
from .plan import BUILT_IN, KERNEL_CHAINS, Line, Plan
from .text import listing, restore_input

Chains = dict[str, list[str]]


class MemoryKernel:
    """The tables of one family. ``restores`` are the inputs that were committed, for tests to count and read.

    ``counted`` is what a test has rules count, by their tags.
    """

    name = "memory"
    writer = "memory-restore"

    def __init__(self, family: Family = Family.IPV4) -> None:
        self.family = family
        self.tables: dict[Table, Chains] = {
            table: {chain: [] for chain in chains} for table, chains in KERNEL_CHAINS.items()
        }
        self.policies: dict[tuple[Table, str], str] = {}
        self.restores: list[str] = []
        self.counted: dict[str, Count] = {}
        self.fail_next_restore: Callable[[Table], bool] | None = None

    async def chain(self, table: Table, chain: str) -> list[str] | None:
        """See ``Kernel.chain``."""
        rules = self.tables[table].get(chain)
        if rules is None:
            return None
        head = f"-P {chain} {self._policy(table, chain)}" if chain in BUILT_IN else f"-N {chain}"
        return [head, *(f"-A {chain} {rule}" for rule in rules)]

    async def glance(self, table: Table, chain: str) -> list[Line] | None:
        """See ``Kernel.glance``: with all words."""
        lines = await self.chain(table, chain)
        return None if lines is None else listing(lines)

    async def counts(self, table: Table, chain: str) -> list[tuple[str, Count]]:
        """See ``Kernel.counts``."""
        tags = (line.tag for line in listing(await self.chain(table, chain) or ()))
        return [(its, self.counted.get(its, Count())) for its in tags if its is not None]

    async def table(self, table: Table) -> str:
        """See ``Kernel.table``."""
        chains = self.tables[table]
        heads = [f":{chain} {self._policy(table, chain) if chain in BUILT_IN else '-'} [0:0]" for chain in chains]
        rules = [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
        return "\n".join([f"*{table}", *heads, *rules, "COMMIT", ""])

    async def accepts(self, table: Table, chain: str) -> bool:
        """See ``Kernel.accepts``."""
        return self._policy(table, chain) == "ACCEPT"

    def _policy(self, table: Table, chain: str) -> str:
        return self.policies.get((table, chain), "ACCEPT")

    async def prepare(self) -> None:
        """See ``Kernel.prepare``: nothing to do ahead."""

    async def close(self) -> None:
        """See ``Kernel.close``."""

    async def restore(self, plan: Plan) -> None:
        """See ``Kernel.restore``."""
        text = restore_input(plan)
        for block in re.findall(r"\*(\w+)\n(.*?)COMMIT\n", text, re.DOTALL):
            table = Table(block[0])
            if self.fail_next_restore is not None and self.fail_next_restore(table):
                self.fail_next_restore = None
                raise FirewallError(f"the table {table} could not be written: as asked")
            chains = copy.deepcopy(self.tables[table])
            for line in block[1].splitlines():
                _carry_out(line, chains)
            _check_jumps(chains)
            self.tables[table] = chains
        self.restores.append(text)


def _carry_out(line: str, chains: Chains) -> None:
    verb, _, rest = line.partition(" ")
    chain, _, rule = rest.partition(" ")
    if line.startswith(":"):
        chains[verb[1:]] = []
        return
    if verb == "-N":
        if chain in chains:
            raise Refused(f"{line}: chain already exists")
        chains[chain] = []
        return
    if chain not in chains:
        raise Refused(f"{line}: no chain by that name")
    match verb:
        case "-A":
            chains[chain].append(rule)
        case "-I":
            position, _, rule = rule.partition(" ")
            if not 1 <= int(position) <= len(chains[chain]) + 1:
                raise Refused(f"{line}: index of insertion too big")
            chains[chain].insert(int(position) - 1, rule)
        case "-D":
            if rule not in chains[chain]:
                raise Refused(f"{line}: no such rule")
            chains[chain].remove(rule)
        case "-F":
            chains[chain].clear()
        case "-X":
            if chains[chain]:
                raise Refused(f"{line}: chain is not empty")
            del chains[chain]
        case _:
            raise Refused(f"{line}: not understood")


def _check_jumps(chains: Chains) -> None:
    """Raise where a rule jumps to a chain that is not there; targets of the kernel's own are all upper case words."""
    for chain, rules in chains.items():
        for line in listing(f"-A {chain} {rule}" for rule in rules):
            target = line.target
            if target and target not in chains and target not in _TARGETS:
                raise Refused(f"-A {chain} ...: no chain or target {target}")


_TARGETS = {"ACCEPT", "DROP", "RETURN", "REJECT", "DNAT", "SNAT", "MASQUERADE", "MARK", "LOG"}
