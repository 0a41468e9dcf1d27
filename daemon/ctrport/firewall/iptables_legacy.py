"""The legacy tables: written by python-iptables (libiptc) in a worker, read as iptables-legacy-save prints them.

A worker is a process for one family (see ``legacy_worker``). One that ended or does not answer is killed and the next
write starts another, so that what failed is an error like any other: read the kernel again, and write what it lacks.

The kernel gives out and takes back a legacy table whole, whatever the change. And it makes one that it does not have
for whoever asks for it, so nothing is read of a table that is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..model import Count, Family
from ..rules import Table
from . import FirewallError, Refused, Unusable
from .commands import command, failure
from .detect import legacy_tables
from .entries import commit, to_json
from .plan import KERNEL_CHAINS, Line, Plan
from .text import counts, listing, printed

#: Seconds until an answer has to be there: for the lock, and the writing itself.
TIMEOUT = 30.0
#: And for each operation, which takes the worker some ms where the machine is busy.
TIMEOUT_EACH = 0.02


class LegacyTables:
    """Implements ``Kernel`` with the legacy tables of the network namespace that it is first used in.

    ``worker`` is the program to write with, which takes the family's number. ``waited`` is told how many seconds each
    write had to wait for the lock.
    """

    name = "iptables-legacy"

    def __init__(
        self,
        family: Family = Family.IPV4,
        worker: Sequence[str] = (sys.executable, "-m", "ctrport.firewall.legacy_worker"),
        timeout: float = TIMEOUT,
        waited: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.family = family
        self._waited = waited
        self._save = "iptables-legacy-save" if family is Family.IPV4 else "ip6tables-legacy-save"
        self.writer = f"{self._save.replace('-save', '-restore')} -w --noflush"
        self._worker = _Worker((*worker, str(family.value)))
        self._timeout = timeout
        self._reads: dict[Table, asyncio.Task[str]] = {}

    async def chain(self, table: Table, chain: str) -> list[str] | None:
        """See ``Kernel.chain``. Chains of one table that are asked for together are read at once."""
        if table not in self._reads:
            self._reads[table] = asyncio.create_task(self._read_soon(table))
        head, rule, lines = f":{chain} ", f"-A {chain} ", printed(await self._reads[table])
        policy = next((line.split(" ")[1] for line in lines if line.startswith(head)), None)
        if policy is None:
            return None
        first = f"-N {chain}" if policy == "-" else f"-P {chain} {policy}"
        return [first, *(line for line in lines if line.startswith(rule))]

    async def _read_soon(self, table: Table) -> str:
        await asyncio.sleep(0)  # who asks in the same turn is answered with this; who asks later, by a later look
        del self._reads[table]
        return await self.table(table)

    async def glance(self, table: Table, chain: str) -> list[Line] | None:
        """See ``Kernel.glance``: with all words."""
        lines = await self.chain(table, chain)
        return None if lines is None else listing(lines)

    async def accepts(self, table: Table, chain: str) -> bool:
        """See ``Kernel.accepts``."""
        lines = await self.chain(table, chain)
        return lines is None or lines[0] == f"-P {chain} ACCEPT"

    async def counts(self, table: Table, chain: str) -> list[tuple[str, Count]]:
        """See ``Kernel.counts``."""
        return await asyncio.to_thread(counts, await self._saved(table, "-c"), chain)

    async def table(self, table: Table) -> str:
        """See ``Kernel.table``. One that is not there has no rules."""
        return await self._saved(table)

    async def _saved(self, table: Table, *options: str) -> str:
        try:
            there = legacy_tables(self.family)
        except OSError as error:
            raise FirewallError(f"the table {table} could not be looked for: {error.strerror}") from error
        if table not in there:
            heads = "".join(f":{chain} ACCEPT [0:0]\n" for chain in KERNEL_CHAINS[table])
            return f"*{table}\n{heads}COMMIT\n"
        ended = await command(self._save, "-t", table.value, *options)
        if ended.status != 0:
            raise failure(f"the table {table} could not be listed", ended)
        return ended.out

    async def prepare(self) -> None:
        """See ``Kernel.prepare``: a worker takes longer to start than to write."""
        with contextlib.suppress(FirewallError):
            await self._worker.start()

    async def close(self) -> None:
        """See ``Kernel.close``."""
        await self._worker.end()

    async def restore(self, plan: Plan) -> None:
        """See ``Kernel.restore``."""
        # Beside the event loop: 10,000 rules take a second.
        request = await asyncio.to_thread(_request, plan, self.family)
        operations = sum(len(block.ops) for block in plan.blocks)
        answer = await self._worker.ask(request, self._timeout + TIMEOUT_EACH * operations)
        self._waited(answer["waited"])
        if answer["error"]:
            kind = Unusable if answer["unusable"] else Refused if answer["changed"] else FirewallError
            raise kind(f"the rules could not be written: {answer['error']}")


def _request(plan: Plan, family: Family) -> str:
    return to_json(commit(block, family) for block in plan.blocks)


class _Worker:
    """A process that answers each line with a line."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = argv
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> asyncio.subprocess.Process:
        """Start it, unless it runs. Raises ``FirewallError``."""
        if self._process is not None and self._process.returncode is None:
            return self._process
        package = Path(__file__).parents[2]
        path = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                cwd="/",  # python -m takes modules from where it is started, which may be anybody's
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            )
        except OSError as error:
            raise FirewallError(f"the worker for legacy tables could not be started: {error.strerror}") from error
        return self._process

    async def ask(self, line: str, timeout: float) -> dict[str, Any]:
        """Return what it answers. Raises ``FirewallError``, and ends it, where it does not."""
        process = await self.start()
        assert process.stdin is not None
        assert process.stdout is not None
        answered = False
        try:
            process.stdin.write(f"{line}\n".encode())
            said = await asyncio.wait_for(process.stdout.readline(), timeout)
            answered = said.endswith(b"\n")
            if not answered:
                await asyncio.wait_for(process.wait(), timeout)  # to be told how: kill() would look first
        except asyncio.TimeoutError as error:
            raise FirewallError(f"the worker for legacy tables did not answer within {timeout:.0f} s") from error
        finally:
            if not answered:  # nor is there to be an answer to this one when the next is waited for
                await self.end()
        if not answered:
            raise FirewallError(f"the worker for legacy tables ended: {_manner(process.returncode)}")
        answer: dict[str, Any] = json.loads(said)
        return answer

    async def end(self) -> None:
        """End it, if it runs. What it has not committed by then it never will."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        await process.communicate()


def _manner(status: int | None) -> str:
    return f"killed by signal {-status}" if status is not None and status < 0 else f"exit status {status}"
