"""The tables as the commands iptables-nft and ip6tables-nft reach them (iptables over nf_tables).

One process a write, whatever the size of the plan, and one for each chain that is listed; a glance takes none, as it
asks nf_tables itself. The text that is written is ``text.restore_input`` of a plan and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterator

from ..model import Count, Family
from ..nfnetlink import NfTables, Writer, comment, counted, target
from ..nlmsg import Interrupted
from ..programs import Ready
from ..rules import Table
from . import FirewallError, Refused, Unusable
from .commands import TIMEOUT, command, errors, failure
from .plan import BUILT_IN, Line, Plan
from .text import TAG, printed, restore_input

Announce = Callable[[Writer, int], None]


class NftCommands:
    """Implements ``Kernel`` with the commands of iptables.

    ``announce`` is told of each process that is about to write, and how many commits it will make.
    """

    name = "iptables-nft"

    def __init__(self, family: Family = Family.IPV4, announce: Announce = lambda *_: None) -> None:
        self.family = family
        self._announce = announce
        self._domain = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
        self._program = "iptables-nft" if family is Family.IPV4 else "ip6tables-nft"
        self.writer = f"{self._program}-restore --noflush"
        self._restore = Ready(f"{self._program}-restore", "--noflush")

    async def chain(self, table: Table, chain: str) -> list[str] | None:
        """See ``Kernel.chain``."""
        ended = await command(self._program, "-t", table.value, "-S", chain)
        if ended.status == 0:
            return printed(ended.out)
        # "incompatible" is what 1.8.9 says of a chain that is not there. Where it really is, and there, nothing is lost
        # by taking it for absent: a chain is made with -N, which refuses to touch one that exists.
        absent = ("No chain/target/match by that name", f"chain `{chain}' in table `{table}' is incompatible")
        if any(words in ended.err for words in absent):
            return None
        raise failure(f"the chain {chain} of the table {table} could not be listed", ended)

    async def glance(self, table: Table, chain: str) -> list[Line] | None:
        """See ``Kernel.glance``: of our rules with the comment alone, of others with the target alone."""
        rules = self._rules(table, chain)
        if rules is None:
            return [] if chain in BUILT_IN else None  # nf_tables has no chains of its own, iptables always has
        return [self._line(chain, rule) for rule in rules]

    async def accepts(self, table: Table, chain: str) -> bool:
        """See ``Kernel.accepts``."""
        with _errors(table, chain), contextlib.closing(NfTables()) as tables:
            return tables.accepts(self._domain, table.value, chain)

    async def counts(self, table: Table, chain: str) -> list[tuple[str, Count]]:
        """See ``Kernel.counts``."""
        tagged = ((comment(rule), rule) for rule in self._rules(table, chain) or ())
        return [(its, Count(*counted(rule))) for its, rule in tagged if its is not None and TAG.fullmatch(its)]

    def _rules(self, table: Table, chain: str) -> list[bytes] | None:
        with _errors(table, chain), contextlib.closing(NfTables()) as tables:
            return tables.rules(self._domain, table.value, chain)

    def _line(self, chain: str, rule: bytes) -> Line:
        its = comment(rule)
        ours = its if its is not None and TAG.fullmatch(its) else None
        # Where a rule goes takes ten times as long to find out, and of ours in a chain of ours it is known.
        goes = f" -j {target(rule)}" if ours is None or chain in BUILT_IN else ""
        return Line(f"-A {chain}{goes}", ours, abridged=True)

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
            await self._restore.prepare()
            pid = self._restore.waiting()
            if pid is not None:
                self._announce(Writer(pid, f"{self._program}-restore"[:15]), len(plan.blocks))
            ended = await self._restore.run(timeout=TIMEOUT, input=restore_input(plan))
        if ended.status != 0:
            raise failure("the rules could not be written", ended, Refused)


@contextlib.contextmanager
def _errors(table: Table, chain: str) -> Iterator[None]:
    try:
        yield
    except Interrupted as error:
        raise FirewallError(f"the chain {chain} of the table {table} changes all the time") from error
    except OSError as error:
        kind = Unusable if error.errno in (errno.EPERM, errno.EACCES) else FirewallError
        raise kind(f"the chain {chain} of the table {table} could not be looked at: {error.strerror}") from error
