"""Every table of the node that packets of one family meet, asked for with the programs that show them.

Nothing is made by asking: nft tables are listed only as they are, and legacy ones only where the kernel has them.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterable

from .. import nfnetlink
from ..firewall.detect import legacy_tables
from ..model import Family
from ..programs import NotInstalled, ProgramError, run
from . import nftrules, saved
from .ruleset import IPTABLES, LEGACY, Ruleset, Table

#: Seconds that a program may take. 20,000 rules take iptables-nft-save one.
TIMEOUT = 60.0

# nft puts its arguments together and reads them as a script, so that a table's name must be no more than a name.
_NAME = re.compile(r"[A-Za-z_.][A-Za-z0-9/\\_.-]{0,255}")


async def look(family: Family) -> tuple[Ruleset, list[str]]:
    """Return the tables, and a sentence for each thing that could not be seen. Those about frames are among them."""
    unseen: list[str] = []
    kept = await asyncio.gather(_iptables(family, unseen), _legacy(family, unseen), _chains(unseen))
    by_iptables, by_legacy, turns = kept
    names = {table.name for table in by_iptables}
    word = _word(family)
    others = [key for key in _there(family, unseen) if not (key[0] == word and key[1] in names)]
    by_nft = await _nft(others, turns, unseen)
    for table in by_iptables:
        _in_turn(table, turns)
    return Ruleset([*by_iptables, *by_legacy, *by_nft]), unseen


def _word(family: Family) -> str:
    return "ip" if family is Family.IPV4 else "ip6"


def _program(name: str, family: Family) -> str:
    return name if family is Family.IPV4 else name.replace("iptables", "ip6tables")


async def _iptables(family: Family, unseen: list[str]) -> list[Table]:
    """Return the tables that iptables-nft-save can say; those that it cannot are nft's."""
    text = await _said((_program("iptables-nft-save", family),), unseen, missing="")
    return saved.tables(text, IPTABLES, _word(family))


async def _legacy(family: Family, unseen: list[str]) -> list[Table]:
    found: list[Table] = []
    try:
        names = sorted(legacy_tables(family) & set(saved.NAMES))
    except OSError as error:
        unseen.append(f"whether there are legacy tables cannot be seen: {error.strerror}")
        return found
    for name in names:
        program = _program("iptables-legacy-save", family)
        text = await _said(
            (program, "-t", name), unseen, missing=f"{program} is not installed, and there are such tables"
        )
        found += saved.tables(text, LEGACY, _word(family))
    return found


async def _chains(unseen: list[str]) -> dict[tuple[str, str, str], int]:
    """Return in which turn the chains that hook in were made."""
    text = await _said(("nft", "--json", "list", "chains"), unseen, missing="")
    with contextlib.suppress(ValueError):
        return nftrules.base_chains(nftrules.parse(text))
    return {}


def _there(family: Family, unseen: list[str]) -> list[nftrules.Key]:
    """Return the tables that packets of a family meet, as the kernel has them."""
    try:
        with contextlib.closing(nfnetlink.NfTables()) as netlink:
            found = netlink.tables()
    except OSError as error:
        unseen.append(f"which nft tables there are cannot be seen: {error.strerror}")
        return []
    return [key for key in found if key[0] in (_word(family), "inet", "netdev", "bridge")]


async def _nft(keys: Iterable[nftrules.Key], turns: dict[tuple[str, str, str], int], unseen: list[str]) -> list[Table]:
    found: list[Table] = []
    for family, name in keys:
        if _NAME.fullmatch(name) is None:
            unseen.append(f"an nft table of the family {family} has a name that cannot be asked for")
            continue
        missing = f"nft is not installed, and there is a table {family} {name}"
        text = await _said(("nft", "--json", "list", "table", family, name), unseen, missing=missing)
        if not text:
            continue
        try:
            found += nftrules.tables(nftrules.parse(text), turns)
        except ValueError as error:
            unseen.append(f"the table {family} {name}: {error}")
    return found


def _in_turn(table: Table, turns: dict[tuple[str, str, str], int]) -> None:
    """Say of the chains of iptables when they were made, as far as nft says it."""
    for chain in table.chains.values():
        turn = turns.get((table.family, table.name, chain.name))
        if chain.base is not None and turn is not None:
            chain.base = chain.base.at(turn)


async def _said(argv: tuple[str, ...], unseen: list[str], *, missing: str) -> str:
    """Return what a program prints, empty where it fails: that is unseen then; ``missing`` where there is none."""
    try:
        ended = await run(*argv, timeout=TIMEOUT)
    except NotInstalled:
        unseen += [missing] if missing else []
        return ""
    except ProgramError as error:
        unseen.append(str(error))
        return ""
    if ended.status != 0:
        unseen.append(f"{' '.join(argv)}: {' '.join(ended.err.split()) or ended.manner}")
        return ""
    return ended.out
