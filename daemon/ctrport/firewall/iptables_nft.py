"""The tables as the commands iptables-nft and ip6tables-nft reach them (iptables over nf_tables).

One process a write, whatever the size of the plan, and one for each chain that is listed. The text that is written is
``text.restore_input`` of a plan and nothing else.
"""

from __future__ import annotations

import asyncio
import os

from ..model import Family
from ..rules import Table
from . import FirewallError, Unusable
from .plan import Plan
from .text import restore_input

#: Seconds a command may take before it is ended: what hangs must not hang the daemon. 10,000 rules take 0.2 s.
TIMEOUT = 30.0


class NftCommands:
    """Implements ``Kernel`` with the commands of iptables."""

    name = "iptables-nft"

    def __init__(self, family: Family = Family.IPV4) -> None:
        self.family = family
        self._program = "iptables-nft" if family is Family.IPV4 else "ip6tables-nft"

    async def chain(self, table: Table, chain: str) -> list[str] | None:
        """See ``Kernel.chain``."""
        status, out, err = await self._run(self._program, "-t", table.value, "-S", chain)
        if status == 0:
            return out.splitlines()
        # "incompatible" is what 1.8.9 says of a chain that is not there. Where it really is, and there, nothing is lost
        # by taking it for absent: a chain is made with -N, which refuses to touch one that exists.
        if "No chain/target/match by that name" in err or f"chain `{chain}' in table `{table}' is incompatible" in err:
            return None
        raise _error(f"the chain {chain} of the table {table} could not be listed", err, status)

    async def table(self, table: Table) -> str:
        """See ``Kernel.table``."""
        status, out, err = await self._run(f"{self._program}-save", "-t", table.value)
        if status != 0:
            raise _error(f"the table {table} could not be listed", err, status)
        return out

    async def restore(self, plan: Plan) -> None:
        """See ``Kernel.restore``."""
        text = restore_input(plan)
        status, _, err = await self._run(f"{self._program}-restore", "--noflush", input=text)
        if status != 0:
            raise _error("the rules could not be written", err, status)

    async def _run(self, *argv: str, input: str = "") -> tuple[int, str, str]:
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, "LC_ALL": "C"},
            )
        except FileNotFoundError as error:
            raise Unusable(f"{argv[0]} is not installed: install iptables (1.8 or later)") from error
        except OSError as error:
            raise FirewallError(f"{argv[0]} could not be started: {error.strerror}") from error
        try:
            out, err = await asyncio.wait_for(process.communicate(input.encode()), TIMEOUT)
        except asyncio.TimeoutError as error:
            raise FirewallError(f"{argv[0]} did not end within {TIMEOUT:.0f} s") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")


def _error(what: str, err: str, status: int) -> FirewallError:
    said = " ".join(line.strip() for line in err.splitlines() if line.strip() and "Try `" not in line)
    kind = Unusable if "Permission denied" in err or "Operation not permitted" in err else FirewallError
    return kind(f"{what}: {said or f'exit status {status}'}")
