"""The tables as the commands iptables-nft and ip6tables-nft reach them (iptables over nf_tables).

One process a write, whatever the size of the plan, and one for each chain that is listed. The text that is written is
``text.restore_input`` of a plan and nothing else.
"""

from __future__ import annotations

from ..model import Family
from ..programs import Ready
from ..rules import Table
from .commands import TIMEOUT, command, errors, failure
from .plan import Plan
from .text import restore_input


class NftCommands:
    """Implements ``Kernel`` with the commands of iptables."""

    name = "iptables-nft"

    def __init__(self, family: Family = Family.IPV4) -> None:
        self.family = family
        self._program = "iptables-nft" if family is Family.IPV4 else "ip6tables-nft"
        self._restore = Ready(f"{self._program}-restore", "--noflush")

    async def chain(self, table: Table, chain: str) -> list[str] | None:
        """See ``Kernel.chain``."""
        ended = await command(self._program, "-t", table.value, "-S", chain)
        if ended.status == 0:
            return ended.out.splitlines()
        # "incompatible" is what 1.8.9 says of a chain that is not there. Where it really is, and there, nothing is lost
        # by taking it for absent: a chain is made with -N, which refuses to touch one that exists.
        absent = ("No chain/target/match by that name", f"chain `{chain}' in table `{table}' is incompatible")
        if any(words in ended.err for words in absent):
            return None
        raise failure(f"the chain {chain} of the table {table} could not be listed", ended)

    async def table(self, table: Table) -> str:
        """See ``Kernel.table``."""
        ended = await command(f"{self._program}-save", "-t", table.value)
        if ended.status != 0:
            raise failure(f"the table {table} could not be listed", ended)
        return ended.out

    async def prepare(self) -> None:
        """See ``Kernel.prepare``: starting the command takes as long as the change it is to make."""
        await self._restore.prepare()

    async def close(self) -> None:
        """See ``Kernel.close``."""
        await self._restore.close()

    async def restore(self, plan: Plan) -> None:
        """See ``Kernel.restore``."""
        with errors():
            ended = await self._restore.run(timeout=TIMEOUT, input=restore_input(plan))
        if ended.status != 0:
            raise failure("the rules could not be written", ended)
