"""What writes the rules, by the name of its backend: one ``Firewall`` a family."""

from __future__ import annotations

from collections.abc import Container, Iterable

from ..model import Family
from ..rules import ACCEPTED_OWNER, Layout
from . import Firewall
from .alarm import Alarm
from .detect import families, legacy_tables, may_have_iptables_nft, own_tables
from .door import Door
from .iptables_legacy import LegacyTables
from .iptables_nft import NftCommands
from .nft_table import Announce, NftTable
from .nftables import OwnTable
from .tables import Tables


async def firewalls(its: Layout, backend: str, alarm: Alarm | None = None) -> dict[Family, Firewall]:
    """Return what writes the rules of each family that can be served on this node; ``alarm`` is not to ring for it."""
    return firewalls_of(await families(backend), its, backend, alarm)


def firewalls_of(
    served: Iterable[Family], its: Layout, backend: str, alarm: Alarm | None = None
) -> dict[Family, Firewall]:
    """Return what writes the rules of these families; see ``firewalls``. Asks nothing of the node."""
    if backend == LegacyTables.name:
        return {family: Tables(LegacyTables(family), its) for family in served}
    announce = (alarm.disregard,) if alarm is not None else ()
    if backend == OwnTable.name:
        return {family: _own_table(family, its, *announce) for family in served}
    return {family: Tables(NftCommands(family, *announce), its) for family in served}


async def others_than(backend: str, its: Layout) -> list[Firewall]:
    """Return the tables that are not this backend's, and may hold rules of ours all the same."""
    # The one rule that our own table has in FORWARD is not theirs.
    spared = (ACCEPTED_OWNER,) if backend == OwnTable.name else ()
    found: list[Firewall] = []
    if backend != NftCommands.name and may_have_iptables_nft():
        found += [Tables(NftCommands(family), its, spared) for family in await families(NftCommands.name)]
    if backend != LegacyTables.name:
        found += _existing_legacy(its, spared)
    return found if backend == OwnTable.name else found + _existing_own(its)


async def every_firewall() -> list[Firewall]:
    """Return what takes rules of ours away, from all tables that may hold some. Makes no table."""
    its = Layout()
    found = _existing_own(its)
    if may_have_iptables_nft() or not found:  # which says what is missing
        found += (await firewalls(its, NftCommands.name)).values()
    return [*found, *_existing_legacy(its)]


def _own_table(family: Family, its: Layout, announce: Announce = lambda *_: None) -> OwnTable:
    commands, legacy = NftCommands(family, announce), LegacyTables(family)
    # Of nobody's chain is its name, so that it tells of all.
    others = Tables(NftCommands(family), Layout("CTRPORT"))
    return OwnTable(NftTable(family, announce), its, (Door(commands, its), Door(legacy, its)), others)


def _existing_own(its: Layout) -> list[Firewall]:
    return [_own_table(family, its) for family in own_tables()]


def _existing_legacy(its: Layout, spared: Container[str] = ()) -> list[Firewall]:
    return [Tables(LegacyTables(family), its, spared) for family in Family if legacy_tables(family)]
