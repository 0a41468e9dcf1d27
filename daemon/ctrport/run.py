"""The daemon: puts the rooms together, lets them run until it is told to end, and leaves the rules as asked."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import __version__, configfiles, neighbours, scheduling, status, systemd
from .config import Config, ConfigError
from .containerd import Containerd, ContainerdError
from .dataplane import Dataplane, remove_everything
from .endpoints import Endpoints
from .events import Event, warn_once
from .firewall import FirewallError
from .firewall.alarm import Alarm, LegacyAlarm, NftAlarm
from .firewall.backends import every_firewall, firewalls, others_than
from .firewall.detect import choose
from .firewall.iptables_legacy import LegacyTables
from .ground import Ground
from .hostports import Reservations
from .listen import Listen
from .model import Family
from .portsockets import allow_sockets, inheritable_sockets
from .reconcile import Reconciler
from .rules import Layout, Place, gates
from .survey import Survey
from .tally import Tally

log = logging.getLogger(__name__)

#: Seconds between two writes of the status file at the least, and until one that failed is tried again.
STATUS_PAUSE, STATUS_RETRY = 0.2, 2.0
#: How much of the time writing it may take: 10,000 publications take 20 ms, and events wait for that long.
STATUS_SHARE = 0.02
#: Seconds until a configuration that could not be read is tried again.
CONFIG_RETRY = 5.0

#: Seconds after which one of two busy threads makes way for the other.
SWITCHING = 0.0005

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
        gates=gates(declaration.access for declaration in config.publish),
    )


def _alarm(backend: str, interval: float) -> Alarm | None:
    """Return what tells when others write, None where nothing does; ``interval`` is for what has to be asked."""
    if backend == LegacyTables.name:
        return LegacyAlarm(Family, interval)
    try:
        return NftAlarm()
    except OSError as error:
        log.warning("what others do to our rules is seen once a minute only: %s", error.strerror)
        return None


class Failed(Exception):
    """The daemon could not go on; why is in the log."""


async def run(config: Config, path: str, directory: Path, lock: status.Lock) -> None:
    """Run until SIGTERM or SIGINT, with ``config`` at first, and then with what the files at ``path`` have.

    ``directory`` is the run directory, whose ``lock`` the caller holds. Raises ``Failed`` where it cannot begin or go
    on.
    """
    scheduling.ask_for_short_turns()  # before anything has threads
    # Next to nothing here goes round in circles, and to look for that after each 700 new values stops all else.
    gc.set_threshold(20_000, 20, 20)
    try:
        await _run(config, path, directory, lock)
    except (FirewallError, ContainerdError) as error:
        log.error(Event("stopped", reason=str(error)))
        raise Failed from error
    except OSError as error:
        log.error(Event("stopped", reason=f"it cannot go on: {error.strerror or error}"))
        raise Failed from error


async def _run(config: Config, path: str, directory: Path, lock: status.Lock) -> None:
    log.info(Event("started", version=__version__, pid=os.getpid(), kernel=os.uname().release))
    log.info(_declared(config, path))
    kept = systemd.received()
    store = systemd.FileStore(systemd.manager(), inheritable_sockets())
    end, reload = asyncio.Event(), asyncio.Event()
    for number, event in ((signal.SIGTERM, end), (signal.SIGINT, end), (signal.SIGHUP, reload)):
        asyncio.get_running_loop().add_signal_handler(number, event.set)
    changed, changed_for_metrics = asyncio.Event(), asyncio.Event()
    reservations, tally = Reservations(0, store=store), Tally()
    told = ""

    def turned() -> None:
        systemd.watchdog()
        lock.turned()

    async def prepare(config: Config) -> Ground:
        nonlocal told
        ground, found = await _ground(config, reservations, tally)
        if str(found) != told:  # or a reload would say it each time
            log.info(found)
        told = str(found)
        return ground

    def on_change() -> None:
        changed.set()
        changed_for_metrics.set()

    async with Containerd(config.containerd.address, tally, lasting=True) as containerd, Endpoints() as endpoints:
        ground = await prepare(config)
        ground.dataplane.hold_at_most(ground.reserve_limit)
        survey = Survey(config, containerd, endpoints, ground.firewalls)
        reservations.name_container = survey.container_of
        adopted = reservations.adopt(kept)
        log.info(Event("host-ports", limit=reservations.limit, kept=adopted))
        log.info(Event("neighbours", **(neighbours.found() or {"found": "none"})))
        reconciler = Reconciler(containerd, survey, ground, prepare, on_change, turned, tally)
        tasks = [
            asyncio.create_task(reconciler.run()),
            asyncio.create_task(_keep_reporting(reconciler, directory, changed)),
            asyncio.create_task(_watch_files(path, reload)),
            asyncio.create_task(_keep_current(reconciler, path, reload)),
            asyncio.create_task(_keep_metrics(reconciler, changed_for_metrics)),
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
    reservations.close()
    if failed is not None:
        raise failed
    await _leave(survey.config, reservations)
    with contextlib.suppress(OSError):
        status.write(directory, reconciler.status(running=False))


def _declared(config: Config, path: str) -> Event:
    """Return what there is to say of a configuration."""
    return Event(
        "configuration",
        file=path,
        declarations=len(config.publish),
        mappings=sum(len(declaration.mappings) for declaration in config.publish),
        containers_may_publish=len(config.containers_may_publish),
        networks=",".join(config.networks) or "none",
    )


async def _ground(config: Config, reservations: Reservations, tally: Tally) -> tuple[Ground, Event]:
    """Make ready what a configuration is carried out with; return what there is to say of it, too.

    Raises ``FirewallError`` where it cannot be told what that is, and ``OSError`` where no more files may be open.
    """
    choice = await choose(config.firewall.backend)
    # A port on both families takes two sockets. Those that do not fit would take the files that all else needs.
    limit = min(config.firewall.reserve_limit, allow_sockets(2 * config.firewall.reserve_limit) // 2)
    if limit < config.firewall.reserve_limit:
        warn_once(log, f"firewall.reserve_limit is {limit}: no more files may be open (LimitNOFILE)")
    shape, alarm = layout(config), _alarm(choice.backend, config.firewall.poll_interval)
    try:
        its = await firewalls(shape, choice.backend, alarm, tally.lock_waits.observe)
        others = await others_than(choice.backend, shape, alarm)
    except BaseException:
        if alarm is not None:
            alarm.close()
        raise
    found = Event(
        "firewall",
        backend=choice.backend,
        reason=choice.reason,
        families=",".join(f"IPv{family.value}" for family in its),
        chain=shape.chain,
        position=config.firewall.position,
        localhost="yes" if shape.localhost else "no",
        masquerade=config.firewall.masquerade,
        alarm="none: looked at once a minute" if alarm is None else alarm.how,
    )
    return Ground(its, Dataplane(its, shape, reservations, others, tally), alarm, limit), found


async def _watch_files(path: str, reload: asyncio.Event) -> None:
    try:
        async for _ in configfiles.changes(path):
            reload.set()
    except OSError as error:
        log.warning("a changed configuration is read on SIGHUP alone (systemctl reload ctrport): %s", error.strerror)
        await asyncio.Event().wait()


async def _keep_current(reconciler: Reconciler, path: str, reload: asyncio.Event) -> None:
    """Have the files' configuration used when they have changed, or when it is asked for."""
    again: float | None = None
    while True:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(reload.wait(), again)
        reload.clear()
        again = None
        try:
            config = configfiles.load(path)
        except ConfigError as error:
            first, *more = error.problems
            reconciler.stay(f"{first}" + (f", and {len(more)} more: ctrport check" if more else ""))
        except configfiles.Unreadable as error:
            reconciler.stay(str(error))
            again = CONFIG_RETRY  # it may be this process that may open no file, of which nothing is announced
        else:
            reconciler.use(config)


async def _keep_metrics(reconciler: Reconciler, changed: asyncio.Event) -> None:
    """Serve the metrics where the configuration in use says, for as long as it says so."""
    while True:
        where = reconciler.config.metrics.listen
        serving = None if where is None else asyncio.create_task(_serve_metrics(reconciler, where))
        try:
            while reconciler.config.metrics.listen == where:
                await changed.wait()
                changed.clear()
        finally:
            if serving is not None:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
        if serving is not None:
            log.info("metrics are served at %s no more", where)


async def _serve_metrics(reconciler: Reconciler, where: Listen) -> None:
    # Here, as most nodes do without.
    from .exposition import Exposition
    from .metrics import CONTENT_TYPE
    from .scrapes import Scrapes

    # The text is made on another thread. By default the loop would wait 5 ms each time that it wants to go on.
    sys.setswitchinterval(SWITCHING)
    exposition = Exposition(reconciler.reading, reconciler.counts)
    try:
        await Scrapes(exposition.text, CONTENT_TYPE).serve(where)
    except Exception:
        log.exception("metrics are served no more")
    finally:
        await exposition.close()


async def _leave(config: Config, reservations: Reservations) -> None:
    """Keep or remove the rules, as ``firewall.on_stop`` says, and the sockets of their host ports with them."""
    if config.firewall.on_stop == "keep":
        log.info(Event("stopped", rules="stay", on_stop="keep"))
        return
    for firewall in await every_firewall():
        try:
            await remove_everything(firewall)
        except FirewallError as error:
            log.error(Event("stopped", rules="left", reason=f"{error}; `ctrport clean` removes them"))
            return
    await reservations.forget()
    log.info(Event("stopped", rules="removed", on_stop="remove"))


async def _keep_reporting(reconciler: Reconciler, directory: Path, changed: asyncio.Event) -> None:
    """Write the status file when there is something new, however often, but not more often than it is worth."""
    complaint = ""
    spare = _SpareFile()
    while True:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(changed.wait(), STATUS_RETRY if complaint else None)
        await reconciler.at_rest()
        changed.clear()
        began = time.thread_time()  # what it takes, not for how long others kept it from that
        try:
            with spare.lent():
                _report(reconciler, directory)
            if complaint:
                log.info("the status file can be written again")
            complaint = ""
        except OSError as error:
            if not complaint:
                log.warning("the status file cannot be written: %s; `ctrport ps` shows what it can see itself", error)
            complaint = str(error)
        await asyncio.sleep(max(STATUS_PAUSE, (time.thread_time() - began) / STATUS_SHARE))


def _report(reconciler: Reconciler, directory: Path) -> None:
    said = reconciler.status(running=True)
    try:
        status.write(directory, said)
    except OSError:
        status.withdraw(directory)  # no longer so, and on a full disk it is in the place of the new one
        status.write(directory, said)


class _SpareFile:
    """A file that is open for nothing: that no more may be opened must not keep the daemon from saying so."""

    def __init__(self) -> None:
        self._file = self._opened()

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Let another file be opened in its place."""
        if self._file is not None:
            os.close(self._file)
        try:
            yield
        finally:
            self._file = self._opened()

    @staticmethod
    def _opened() -> int | None:
        with contextlib.suppress(OSError):
            return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        return None
