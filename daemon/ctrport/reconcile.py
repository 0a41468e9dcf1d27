"""The loop that joins the rooms: events say where to look, what is seen decides, and the kernel follows.

Subscribe first, then list: what happens in between is in both. An event carries no truth, it only names a container to
look at again, so a lost, doubled or late one costs time and nothing else. Events that come while a change is being
written are taken together in the next: a burst is a few transactions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from . import __version__, netlink, systemd
from .chronicle import Chronicle
from .config import Config
from .containerd import Containerd, ContainerdError, TaskEvent
from .dataplane import Dataplane
from .firewall import Firewall, FirewallError
from .firewall.alarm import Alarm
from .firewall.drift import Drift
from .model import ContainerKey, Family, Publication, State
from .pace import Backoff, Pace
from .publish import Change
from .status import Status, networks, shown
from .survey import Survey
from .suspicion import Grounds, Suspicion
from .tasks import end, through

log = logging.getLogger(__name__)

#: Seconds between looks at what sends no event: whether the node forwards, containers without an endpoint, and whether
#: containerd still answers.
TICK = 10.0
#: Every so many ticks everything is listed again, and the kernel is read.
TICKS_TO_RESYNC = 6
#: Transactions that are written as soon as there is something to write, and the seconds that each one more takes when
#: these are used up: a flood of events is written in few transactions, a single event at once.
BURST, INTERVAL = 10, 0.25
#: Seconds until a write that failed is tried again; doubled each time, up to TICK.
RETRY = 1.0


@dataclass(frozen=True)
class Ground:
    """What a configuration is carried out with: the tables of each family, and who tells when others write there."""

    firewalls: Mapping[Family, Firewall]
    dataplane: Dataplane
    alarm: Alarm | None

    async def close(self) -> None:
        """Give up what it holds, but no rules and no host ports."""
        if self.alarm is not None:
            self.alarm.close()
        await self.dataplane.close()


Prepare = Callable[[Config], Awaitable[Ground]]


@dataclass(frozen=True)
class _Seen:
    """Events about a container that was not looked at since: when the first came, and the process the last named."""

    at: float
    pid: int | None


class Reconciler:
    """Keeps the publications of one node, and the kernel in line with them.

    ``prepare`` makes ready what another configuration takes. ``on_change`` is called whenever what it has to say of
    itself may have changed; ``status`` says it.
    """

    def __init__(
        self, containerd: Containerd, survey: Survey, ground: Ground, prepare: Prepare, on_change: Callable[[], None]
    ) -> None:
        self._containerd = containerd
        self._survey = survey
        self._ground = ground
        self._prepare = prepare
        self._on_change = on_change
        self._next_config: Config | None = None
        self._stale = ""  # why the configuration in use is not that of the files; empty where it is
        self._table_watch: asyncio.Task[None] | None = None
        self._suspicion = Suspicion()
        self._looked_at = 0.0  # when the kernel was last seen to hold what it should
        self._others_wrote = True
        self._deaf = True  # whether nobody tells when others write
        self._chronicle = Chronicle()
        self._dirty: dict[ContainerKey, _Seen] = {}
        self._node_changed = False
        self._wake = asyncio.Event()
        self._pace = Pace(BURST, INTERVAL)
        self._retry_at, self._writing = 0.0, Backoff(RETRY, TICK)
        self._blind, self._looking = "", Backoff(RETRY, TICK)  # why nothing can be looked at; empty where it can
        self._containerd_state = "not connected"
        self._problem = ""  # why the kernel is not in line; empty where it is
        self._in_line = False  # whether it was when it was last settled: while it is looked at nothing is known
        self._complaint = ""  # of the dataplane's, as it was last shown
        self._events = 0
        self._told: tuple[dict[str, str], tuple[str, ...]] = ({}, ())  # what is amiss with the node, and the warnings

    async def run(self) -> None:
        """Keep the node in line until cancelled.

        Raises ``FirewallError`` where this node's tables cannot be ours, and ``containerd.Refused`` where it may not
        so much as connect.
        """
        node_watch = asyncio.create_task(self._watch_node())
        try:
            await self._dataplane.start()
            self._survey.publications.recover(self._dataplane.chosen)
            self._table_watch = asyncio.create_task(self._watch_tables(self._ground.alarm))
            await self._run()
        finally:
            # Not to be broken off: the event loop cannot end while a program that was being started is left behind
            # (https://github.com/python/cpython/issues/125502).
            await through(self._leave(node_watch))

    async def _leave(self, node_watch: asyncio.Task[None]) -> None:
        await end(node_watch)
        await self._leave_ground()

    async def _leave_ground(self) -> None:
        if self._table_watch is not None:
            await end(self._table_watch)
        await self._ground.close()

    @property
    def _dataplane(self) -> Dataplane:
        return self._ground.dataplane

    def use(self, config: Config) -> None:
        """Use another configuration from the next turn on; what is the same in both is not touched."""
        if self._stale:
            self._stale = ""
            self._tell()
        self._next_config = None if config == self._survey.config else config
        self._wake.set()

    def stay(self, reason: str) -> None:
        """Go on with the configuration in use, as the one of the files cannot be, and say why."""
        self._next_config = None
        if reason != self._stale:
            self._stale = reason
            log.error("the configuration stays as it was: %s", reason)
            self._tell()

    async def _change_config(self, config: Config) -> None:
        """Have the kernel follow another configuration. Raises ``ContainerdError``, and is through with it then too."""
        if config.containerd.address != self._survey.config.containerd.address:
            return self.stay("another containerd.address takes a restart: systemctl restart ctrport")
        ground: Ground | None = None
        try:
            ground = await self._prepare(config)
            await ground.dataplane.start()
        except (FirewallError, OSError) as error:
            if ground is not None:
                await ground.close()
            return self.stay(str(error))
        before = self._ground
        await self._leave_ground()
        ground.dataplane.succeed(before.dataplane)
        self._ground = ground
        self._table_watch = asyncio.create_task(self._watch_tables(ground.alarm))
        told = list(self._survey.publications)
        try:
            await self._survey.use(config, ground.firewalls)
        finally:
            await self._settle(mend=True, told=told)
        await self._dataplane.sweep()
        log.info("the configuration was read anew: %s", self._summary())

    async def _run(self) -> None:
        while True:
            self._on_change()
            systemd.watchdog()
            await self._containerd.connected(systemd.watchdog)
            try:
                async with self._containerd.events() as events:
                    self._containerd_state = f"connected, version {await self._containerd.version()}"
                    reader = asyncio.create_task(self._read(events))
                    try:
                        await self._follow(reader)
                    finally:
                        reader.cancel()
                        await asyncio.gather(reader, return_exceptions=True)
            except ContainerdError as error:
                self._containerd_state = f"lost: {error}"
                log.warning("%s; rules stay as they are until it answers again", error)
                systemd.notify("STATUS=containerd is lost; rules stay as they are")
                self._on_change()
                await asyncio.sleep(RETRY)
            except OSError as error:
                await asyncio.sleep(self._cannot_look(error))

    async def _watch_node(self) -> None:
        try:
            async for _ in netlink.address_changes():
                self._node_changed = True
                self._wake.set()
        except OSError as error:
            log.warning("new addresses of the node are seen only every %.0f s: %s", TICK, error)

    async def _watch_tables(self, alarm: Alarm | None) -> None:
        self._deaf = alarm is None
        if alarm is None:
            return
        try:
            async for writer in alarm:
                self._suspicion.tell("" if writer is None else str(writer), time.monotonic())
                self._others_wrote = True
                self._wake.set()
        except OSError as error:
            log.warning("what others do to our rules is seen once a minute only from now on: %s", error)
            self._deaf = True

    async def _read(self, events: AsyncIterator[TaskEvent]) -> None:
        try:
            async for event in events:
                if self._survey.config.watches(event.key.namespace):
                    self._events += 1
                    first = self._dirty.get(event.key)
                    at = time.monotonic() if first is None else first.at
                    self._dirty[event.key] = _Seen(at, event.pid)
                    self._wake.set()
        finally:
            self._wake.set()

    async def _follow(self, reader: asyncio.Task[None]) -> None:
        """Look everywhere once and then where events say, until they end. Raises ``ContainerdError``."""
        await self._survey.everything()
        if self._blind:
            log.info("the node can be looked at again")
        self._blind = ""
        self._looking.reset()
        await self._settle(mend=True)
        total = len(self._survey.publications)
        if self._dataplane.in_line:
            log.info("in line: containerd is %s, %d publications", self._containerd_state, total)
        systemd.notify("READY=1", f"STATUS={self._summary()}")
        self._on_change()
        await self._dataplane.sweep()
        await self._dataplane.prepare()
        ticks, next_tick = 0, time.monotonic() + TICK
        while not reader.done():
            systemd.watchdog()  # here alone while containerd answers: all that a turn has to do is behind it
            if self._next_config is not None:
                config, self._next_config = self._next_config, None
                if config != self._survey.config:  # one that is announced twice is carried out once
                    await self._change_config(config)
            await self._woken(min(next_tick, self._due_at()))
            if self._dirty or self._node_changed:
                await asyncio.sleep(self._pace.wait(time.monotonic()))
                if self._node_changed:
                    self._node_changed = False
                    await self._survey.node(others=False)
                dirty, self._dirty = self._dirty, {}
                await self._survey.look({key: seen.pid for key, seen in dirty.items()})
                await self._settle(since=min((seen.at for seen in dirty.values()), default=None))
            elif time.monotonic() >= next_tick:
                ticks, next_tick = ticks + 1, time.monotonic() + TICK
                await self._tick(everything=ticks % TICKS_TO_RESYNC == 0)
            elif time.monotonic() >= self._due_at():
                await self._settle(mend=True)
            await self._dataplane.prepare()
        await reader

    async def _woken(self, until: float) -> None:
        """Wait for anything that is worth a look, or until then by the monotonic clock."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wake.wait(), max(0.0, until - time.monotonic()))
        self._wake.clear()

    def _due_at(self) -> float:
        """Return when the kernel is to be read: for what others wrote, or as writing failed."""
        if not self._dataplane.in_line:
            return self._retry_at
        due = self._suspicion.due()
        return math.inf if due is None else due

    async def _tick(self, everything: bool) -> None:
        await self._containerd.version()  # the event stream of a containerd that hangs is silent, and says no error
        # Where nobody wrote, who holds host ports in the tables is known: asking takes a process a chain.
        others, self._others_wrote = self._others_wrote or self._deaf, False
        if everything:
            await self._survey.everything()
        else:
            await self._survey.node(others=others)
            self._survey.what_may_heal()
        publications = self._survey.publications
        taken = self._dataplane.reserve_again() if everything else []
        publications.meet([*self._dataplane.still_held(publications.met), *taken])
        await self._settle(mend=everything or (self._dataplane.in_line and self._dataplane.switched_off()))

    async def _settle(
        self, *, mend: bool = False, since: float | None = None, told: Sequence[Publication] | None = None
    ) -> None:
        """Decide, and make the kernel follow.

        ``since`` is when the first event came that led here. ``told`` are the publications before, where all begins
        anew: what is as it was is not told again.
        """
        self._tell_of_node()
        changes = self._decide()
        was_in_line, transactions = self._dataplane.in_line, self._dataplane.transactions
        drift, news = Drift(), False
        if was_in_line or changes or mend or time.monotonic() >= self._retry_at:
            began, grounds = _cpu(), self._suspicion.begin() if mend else Grounds()
            try:
                drift = await self._dataplane.follow(changes, self._survey.facts, mend=mend)
            except FirewallError as error:
                self._failed(error)
            else:
                if drift:
                    self._chronicle.repaired(drift, grounds, self._looked_at)
                if mend:
                    self._looked_at = time.monotonic()
                    self._tell_of_node()  # of tables of others something may be new, too
                if self._problem:
                    log.info("the kernel is in line again")
                self._problem = ""
                self._writing.reset()
            if grounds.since is not None:
                self._suspicion.end(_cpu() - began, time.monotonic())
            self._in_line = self._dataplane.in_line
            # A look that somebody's write was the cause of, and that found nothing, is no news.
            news = bool(drift) or (mend and grounds.since is None)
        if self._dataplane.transactions != transactions:
            self._pace.take(time.monotonic())
        self._chronicle.take(changes if told is None else self._chronicle.compared(told, changes), since)
        self._chronicle.tell(self._dataplane.remark, in_line=self._dataplane.in_line)
        if changes or news or self._dataplane.in_line != was_in_line:
            self._tell()
        if self._dataplane.in_line:
            await self._dataplane.keep_host_ports()
            self._dataplane.drop_stale_flows().add_done_callback(self._complained)

    def _complained(self, _: object) -> None:
        if self._dataplane.complaint != self._complaint:
            self._complaint = self._dataplane.complaint
            self._on_change()

    def _tell(self) -> None:
        systemd.notify(f"STATUS={self._summary()}")
        self._on_change()

    def _tell_of_node(self) -> None:
        """Say what is new of the node itself: each warning is logged as it comes."""
        warnings = (*self._survey.warnings, *self._dataplane.warnings)
        before, self._told = self._told, (self._survey.amiss, warnings)
        for warning in warnings:
            if warning not in before[1]:
                log.warning("%s", warning)
        if self._told != before:
            self._on_change()

    def _decide(self) -> tuple[Change, ...]:
        """Have every host port reserved that is to be published; what another process has is decided once more."""
        publications = self._survey.publications
        # It ends, as what was met is not given again: each turn leaves fewer ports.
        while (held := self._dataplane.reserve(publications.decide())) and publications.meet_also(held):
            pass
        return publications.settle()

    def _failed(self, error: FirewallError) -> None:
        """Say once what went wrong, and when to try again: later each time."""
        if str(error) != self._problem:
            log.error("%s; trying again until it works", error)
        self._problem = str(error)
        self._retry_at = time.monotonic() + self._writing.pause()

    def _cannot_look(self, error: OSError) -> float:
        """Say once that this process may not so much as open a file; return in how many seconds to look again."""
        blind = f"the node cannot be looked at: {error.strerror or error}; what was known of it stands"
        if not self._blind:
            log.error("%s, and it is tried again until it works", blind)
            systemd.notify(f"STATUS={blind}")
        self._blind = blind
        self._on_change()
        return self._looking.pause()

    def _summary(self) -> str:
        if self._problem:
            return f"not in line: {self._problem}"
        publications = self._survey.publications
        stale = f"; an older configuration is in use: {self._stale}" if self._stale else ""
        return f"{publications.count(State.ACTIVE)} of {len(publications)} publications active{stale}"

    def status(self, *, running: bool) -> Status:
        """Return what there is to say now."""
        return Status(
            version=__version__,
            running=running,
            pid=os.getpid(),
            updated=shown(datetime.now(timezone.utc)),
            config=self._stale,
            containerd=self._containerd_state,
            firewall=self._problem or ("in line" if self._in_line else "not read yet"),
            events=self._events,
            transactions=self._dataplane.transactions,
            repairs=self._chronicle.repairs,
            last_repair=self._chronicle.last_repair,
            publications=[
                self._chronicle.shown(publication, self._dataplane.remark(publication), self._problem)
                for publication in self._survey.publications
            ],
            networks=networks(self._survey.facts, self._survey.amiss),
            warnings=[
                *filter(None, [self._blind, self._dataplane.complaint]),
                *self._survey.warnings,
                *self._dataplane.warnings,
            ],
        )


def _cpu() -> float:
    """Return the seconds of processor time that the daemon has taken, with the programs that it ran."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)
