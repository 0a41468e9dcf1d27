"""The daemon: puts the rooms together, lets them run until it is told to end, and leaves the rules as asked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from pathlib import Path
from typing import Any

from . import __version__, status, systemd
from .config import Config
from .containerd import Containerd
from .dataplane import Dataplane, remove_everything
from .endpoints import Endpoints
from .firewall import Firewall, FirewallError
from .firewall.alarm import Alarm, LegacyAlarm, NftAlarm
from .firewall.detect import choose, families, legacy_tables
from .firewall.iptables_legacy import LegacyTables
from .firewall.iptables_nft import NftCommands
from .firewall.tables import Tables
from .hostports import Reservations, allow_sockets, inheritable_sockets
from .model import Family
from .reconcile import Reconciler
from .rules import Layout, Place
from .survey import Survey

log = logging.getLogger(__name__)

#: Seconds between two writes of the status file at the least.
STATUS_PAUSE = 0.2

_POSITIONS = {"auto": Place.POLICY, "first": Place.FIRST, "last": Place.LAST}


def layout(config: Config) -> Layout:
    """Return what the config makes of the rules."""
    firewall = config.firewall
    return Layout(
        firewall.chain,
        _POSITIONS[firewall.position],
        firewall.localhost,
        masquerade_all=firewall.masquerade == "all",
        networks=bool(config.networks),
    )


async def firewalls(its: Layout, backend: str, alarm: Alarm | None = None) -> dict[Family, Firewall]:
    """Return what writes the rules of each family that can be served on this node; ``alarm`` is not to ring for it."""
    served = await families(backend)
    if backend == LegacyTables.name:
        return {family: Tables(LegacyTables(family), its) for family in served}
    announce = (alarm.disregard,) if alarm is not None else ()
    return {family: Tables(NftCommands(family, *announce), its) for family in served}


def _alarm(backend: str, interval: float) -> Alarm | None:
    """Return what tells when others write, None where nothing does; ``interval`` is for what has to be asked."""
    if backend == LegacyTables.name:
        return LegacyAlarm(Family, interval)
    try:
        return NftAlarm()
    except OSError as error:
        log.warning("what others do to our rules is seen once a minute only: %s", error.strerror)
        return None


async def every_firewall() -> list[Firewall]:
    """Return what takes rules of ours away, from all tables that may hold some. Makes no table."""
    nft = await firewalls(Layout(), NftCommands.name)
    return [*nft.values(), *(Tables(LegacyTables(family), Layout()) for family in Family if legacy_tables(family))]


async def run(config: Config, directory: Path) -> None:
    """Run until SIGTERM or SIGINT; ``directory`` is the run directory, whose lock the caller holds.

    Raises ``FirewallError`` or ``ContainerdError`` where it cannot begin.
    """
    log.info("ctrport %s, declarations: %d", __version__, len(config.publish))
    kept = systemd.received()
    store = systemd.FileStore(systemd.manager(), inheritable_sockets())
    choice = await choose(config.firewall.backend)
    log.info("backend %s: %s", choice.backend, choice.reason)
    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end.set)
    shape = layout(config)
    alarm = _alarm(choice.backend, config.firewall.poll_interval)
    its = await firewalls(shape, choice.backend, alarm)
    changed = asyncio.Event()
    # A port on both families takes two sockets. Those that do not fit would take the files that all else needs.
    limit = allow_sockets(2 * config.firewall.reserve_limit) // 2
    if limit < config.firewall.reserve_limit:
        log.warning("firewall.reserve_limit is %d: no more files may be open (LimitNOFILE)", limit)
    async with Containerd(config.containerd.address) as containerd, Endpoints() as endpoints:
        survey = Survey(config, containerd, endpoints, its)
        reservations = Reservations(limit, survey.container_of, store)
        adopted = reservations.adopt(kept)
        if adopted:
            log.info("sockets of host ports that systemd has kept: %d", adopted)
        reconciler = Reconciler(config, containerd, survey, Dataplane(its, shape, reservations), changed.set, alarm)
        tasks = [
            asyncio.create_task(reconciler.run()),
            asyncio.create_task(_keep_reporting(reconciler, directory, changed)),
        ]
        ended = asyncio.create_task(end.wait())
        await asyncio.wait([*tasks, ended], return_when=asyncio.FIRST_COMPLETED)
        systemd.notify("STOPPING=1")
        failed = next((task.exception() for task in tasks if task.done()), None)
        left: set[asyncio.Task[Any]] = {*tasks, ended}
        while left:
            # Again and again: before Python 3.12 wait_for() swallows a cancellation that comes with its result.
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=0.05)
    if failed is not None:
        raise failed
    await _leave(config, its, reservations)
    with contextlib.suppress(OSError):
        status.write(directory, reconciler.status(running=False))


async def _leave(config: Config, its: dict[Family, Firewall], reservations: Reservations) -> None:
    """Keep or remove the rules, as ``firewall.on_stop`` says, and the sockets of their host ports with them."""
    if config.firewall.on_stop == "keep":
        log.info("ended; the rules stay (firewall.on_stop: keep)")
        return
    for firewall in its.values():
        try:
            await remove_everything(firewall)
        except FirewallError as error:
            log.error("%s; `ctrport clean` removes them", error)
            return
    await reservations.forget()
    log.info("ended; the rules are removed (firewall.on_stop: remove)")


async def _keep_reporting(reconciler: Reconciler, directory: Path, changed: asyncio.Event) -> None:
    """Write the status file when there is something new, however often, but not more often than it is worth."""
    complaint = ""
    while True:
        await changed.wait()
        changed.clear()
        try:
            status.write(directory, reconciler.status(running=True))
            complaint = ""
        except OSError as error:
            if str(error) != complaint:
                log.warning("the status file cannot be written: %s", error)
            complaint = str(error)
        await asyncio.sleep(STATUS_PAUSE)
