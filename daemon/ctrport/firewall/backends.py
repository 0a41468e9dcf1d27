"""What writes the rules, by the name of its backend: one ``Firewall`` a family."""

from __future__ import annotations

from collections.abc import Iterable

from ..model import Family
from ..rules import Layout
from . import Firewall
from .alarm import Alarm
from .detect import families, legacy_tables
from .iptables_legacy import LegacyTables
from .iptables_nft import NftCommands
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
    return {family: Tables(NftCommands(family, *announce), its) for family in served}


async def others_than(backend: str, its: Layout) -> list[Firewall]:
    """Return the tables that are not this backend's, and may hold rules of ours all the same."""
    if backend == LegacyTables.name:
        return [*(await firewalls(its, NftCommands.name)).values()]
    return _existing_legacy(its)


async def every_firewall() -> list[Firewall]:
    """Return what takes rules of ours away, from all tables that may hold some. Makes no table."""
    return [*(await firewalls(Layout(), NftCommands.name)).values(), *_existing_legacy(Layout())]


def _existing_legacy(its: Layout) -> list[Firewall]:
    return [Tables(LegacyTables(family), its) for family in Family if legacy_tables(family)]
