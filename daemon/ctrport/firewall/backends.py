"""What writes the rules, by the name of its backend: one ``Firewall`` a family."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

from ..model import Family
from ..rules import ACCEPTED_OWNER, Layout
from . import Firewall, FirewallError
from .alarm import Alarm
from .detect import families, legacy_tables, may_have_iptables_nft, own_tables
from .door import Door
from .iptables_legacy import LegacyTables
from .iptables_nft import NftCommands
from .nft_table import Announce, NftTable
from .nftables import OwnTable
from .tables import Tables

#: Told how many seconds a write waited for a lock.
Waited = Callable[[float], None]


async def firewalls(
    its: Layout, backend: str, alarm: Alarm | None = None, waited: Waited = lambda _: None
) -> dict[Family, Firewall]:
    """Return what writes the rules of each family that can be served on this node; ``alarm`` is not to ring for it.

    ``waited`` is told of each write, where there is a lock to wait for. Raises ``FirewallError`` where it cannot be
    told which these are.
    """
    return firewalls_of(await families(backend), its, backend, alarm, waited)


def firewalls_of(
    served: Iterable[Family], its: Layout, backend: str, alarm: Alarm | None = None, waited: Waited = lambda _: None
) -> dict[Family, Firewall]:
    """Return what writes the rules of these families; see ``firewalls``. Asks nothing of the node."""
    if backend == LegacyTables.name:
        return {family: Tables(LegacyTables(family, waited=waited), its) for family in served}
    announce = (alarm.disregard,) if alarm is not None else ()
    if backend == OwnTable.name:
        return {family: _own_table(family, its, *announce) for family in served}
    return {family: Tables(NftCommands(family, *announce), its) for family in served}


async def others_than(backend: str, its: Layout, alarm: Alarm | None = None) -> list[Firewall]:
    """Return the tables that are not this backend's, and may hold rules of ours all the same; see ``firewalls``."""
    announce = (alarm.disregard,) if alarm is not None else ()
    # The one rule that our own table has in FORWARD is not theirs.
    spared = (ACCEPTED_OWNER,) if backend == OwnTable.name else ()
    found: list[Firewall] = []
    if backend != NftCommands.name and may_have_iptables_nft():
        served = await _perhaps_served(NftCommands.name)
        found += [Tables(NftCommands(family, *announce), its, spared) for family in served]
    if backend != LegacyTables.name:
        found += _existing_legacy(its, spared)
    return found if backend == OwnTable.name else found + _existing_own(its, *announce)


async def every_firewall() -> list[Firewall]:
    """Return what takes rules of ours away, from all tables that may hold some. Makes no table."""
    its = Layout()
    found = _existing_own(its)
    if may_have_iptables_nft() or not found:  # which says what is missing
        found += firewalls_of(await _perhaps_served(NftCommands.name), its, NftCommands.name).values()
    return [*found, *_existing_legacy(its)]


async def _perhaps_served(backend: str) -> tuple[Family, ...]:
    """Return the families whose tables may hold something: where it cannot be told which are served, all."""
    try:
        return await families(backend)
    except FirewallError:
        return tuple(Family)


def _own_table(family: Family, its: Layout, announce: Announce = lambda *_: None) -> OwnTable:
    commands, legacy = NftCommands(family, announce), LegacyTables(family)
    # Of nobody's chain is its name, so that it tells of all.
    others = Tables(NftCommands(family), Layout("CTRPORT"))
    return OwnTable(NftTable(family, announce), its, (Door(commands, its), Door(legacy, its)), others)


def _existing_own(its: Layout, announce: Announce = lambda *_: None) -> list[Firewall]:
    return [_own_table(family, its, announce) for family in own_tables()]


def _existing_legacy(its: Layout, spared: Container[str] = ()) -> list[Firewall]:
    return [Tables(LegacyTables(family), its, spared) for family in Family if legacy_tables(family)]
