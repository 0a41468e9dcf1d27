"""The tables as the commands iptables-nft and ip6tables-nft reach them (iptables over nf_tables).

One process a write, whatever the size of the plan, and one for each chain that is listed; a glance takes none, as it
asks nf_tables itself, and neither does a removal (see ``handles``). The text that is written is ``text.restore_input``
of a plan and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence

from ..model import Count, Family
from ..nfnetlink import NfTables, Writer, comment, counted, target
from ..nlmsg import Interrupted
from ..programs import Ready
from ..rules import Table
from ..tasks import together
from . import FirewallError, Refused, Unusable
from .commands import TIMEOUT, command, errors, failure
from .handles import Handles, Missing
from .plan import BUILT_IN, Line, Plan, Remove, abridged, parted, spell
from .text import TAG, listing, printed, restore_input

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
        self._asks: NfTables | None = None
        self._handles = Handles(family, self._tables)

    async def chain(self, table: Table, chain: str) -> list[str] | None:
        """See ``Kernel.chain``."""
        with _errors(table, chain):
            # Most nodes do not have most of those that are asked for, and to start a program takes 3 ms.
            if chain not in BUILT_IN and not self._tables().has_chain(self._domain, table.value, chain):
                return None
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
        return [self._line(table, chain, rule) for rule in rules]

    async def accepts(self, table: Table, chain: str) -> bool:
        """See ``Kernel.accepts``."""
        with _errors(table, chain):
            return self._tables().accepts(self._domain, table.value, chain)

    async def counts(self, table: Table, chain: str) -> list[tuple[str, Count]]:
        """See ``Kernel.counts``."""
        return await asyncio.to_thread(self._counts, table, chain)

    def _counts(self, table: Table, chain: str) -> list[tuple[str, Count]]:
        # By a socket of its own: the other is asked by the event loop meanwhile.
        with _errors(table, chain), contextlib.closing(NfTables()) as tables:
            rules = tables.rules(self._domain, table.value, chain) or ()
        tagged = ((comment(rule), rule) for rule in rules)
        return [(its, Count(*counted(rule))) for its, rule in tagged if its is not None and TAG.fullmatch(its)]

    def _tables(self) -> NfTables:
        # Kept open: to close it takes some 10 ms where rules went just before.
        if self._asks is None:
            self._asks = NfTables()
        return self._asks

    def _rules(self, table: Table, chain: str) -> list[bytes] | None:
        with _errors(table, chain):
            return self._tables().rules(self._domain, table.value, chain)

    def _line(self, table: Table, chain: str, rule: bytes) -> Line:
        its = comment(rule)
        ours = its if its is not None and TAG.fullmatch(its) else None
        if ours is not None:
            self._handles.learn(table, ours, rule)
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
        self._handles.close()
        if self._asks is not None:
            self._asks.close()
        self._asks = None

    async def restore(self, plan: Plan) -> None:
        """See ``Kernel.restore``."""
        first, removals = parted(plan)
        if first:
            await self._write(await self._spelled(first))
        if removals:
            self._remove(removals)

    async def _write(self, plan: Plan) -> None:
        with errors():
            await self._restore.prepare()
            pid = self._restore.waiting()
            if pid is not None:
                self._announce(Writer(pid, f"{self._program}-restore"[:15]), len(plan.blocks))
            with self._handles.listening(plan.added):
                ended = await self._restore.run(timeout=TIMEOUT, input=restore_input(plan))
        if ended.status != 0:
            raise failure("the rules could not be written", ended, Refused)

    def _remove(self, removals: Sequence[tuple[Table, Remove]]) -> None:
        """Take rules away; in this process, as iptables would read all that there are."""
        self._announce(Writer(os.getpid(), _name_of_this_process()), 1)
        try:
            self._handles.remove(removals)
        except Missing as error:
            raise Refused(f"a rule that is to go is gone: {error}") from error
        except Interrupted as error:
            raise FirewallError("the rules could not be removed: others write all the time") from error
        except OSError as error:
            kind = Unusable if error.errno in (errno.EPERM, errno.EACCES) else Refused
            raise kind(f"the rules could not be removed: {error.strerror}") from error

    async def _spelled(self, plan: Plan) -> Plan:
        """Return a plan with the words of all rules that it knows by their tags alone; what is gone needs no more."""
        keys = abridged(plan)
        if not keys:
            return plan
        answers = await together(self.chain(table, chain) for table, chain in keys)
        return spell(plan, {key: listing(lines or ()) for key, lines in zip(keys, answers, strict=True)})


def _name_of_this_process() -> str:
    with open("/proc/thread-self/comm", encoding="utf-8", errors="replace") as file:
        return file.read().rstrip("\n")


@contextlib.contextmanager
def _errors(table: Table, chain: str) -> Iterator[None]:
    try:
        yield
    except Interrupted as error:
        raise FirewallError(f"the chain {chain} of the table {table} changes all the time") from error
    except OSError as error:
        kind = Unusable if error.errno in (errno.EPERM, errno.EACCES) else FirewallError
        raise kind(f"the chain {chain} of the table {table} could not be looked at: {error.strerror}") from error
