"""The loop that joins the rooms: events say where to look, what is seen decides, and the kernel follows.

Subscribe first, then list: what happens in between is in both. An event carries no truth, it only names a container to
look at again, so a lost, doubled or late one costs time and nothing else. Events that come while a change is being
written are taken together in the next: a burst is a few transactions.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import resource
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from . import netlink, systemd
from .account import NOT_CONNECTED, Account
from .chronicle import Chronicle
from .config import Config
from .connections import Counts
from .containerd import Containerd, ContainerdError
from .dataplane import Dataplane
from .events import Event
from .firewall import FirewallError
from .firewall.alarm import Alarm
from .firewall.drift import Drift
from .ground import Ground, Prepare
from .model import ContainerKey, Holder, Publication
from .pace import Backoff, Pace
from .publish import Change
from .reload import Reload
from .status import Status
from .survey import Survey
from .suspicion import Grounds, Suspicion
from .tally import Reading, Tally
from .taskevents import AHEAD, TOPICS, TaskEvent
from .tasks import end, through

log = logging.getLogger(__name__)

#: Seconds between looks at what sends no event: whether the node forwards, containers without an endpoint, and whether
#: containerd still answers.
TICK = 10.0
#: Every so many ticks everything is listed again, and the kernel is read.
TICKS_TO_RESYNC = 6
#: Or seldomer, as far as this: where there is much, so that it takes 0.025 % of the time and no more. When nothing
#: happens the daemon is to take 0.1 % in all: gRPC's threads take 0.03, the ticks in between up to 0.03.
MOST_TICKS_TO_RESYNC, RESYNC_IN_TICK = 60, 0.0025
#: Transactions that are written as soon as there is something to write, and the seconds that each one more takes when
#: these are used up: a flood of events is written in few transactions, a single event at once.
BURST, INTERVAL = 10, 0.25
#: Seconds until a write that failed is tried again; doubled each time, up to TICK.
RETRY = 1.0


@dataclass(frozen=True)
class _Seen:
    """Events about a container that was not looked at since: when the first came, and the process the last named."""

    at: float
    pid: int | None


class Reconciler:
    """Keeps the publications of one node, and the kernel in line with them.

    ``prepare`` makes ready what another configuration takes. ``on_change`` is called whenever what it has to say of
    itself may have changed; ``status`` says it, and ``reading`` says it in numbers, with those of ``tally``.
    ``on_turn`` is called each time that its loop has come round.
    """

    def __init__(
        self,
        containerd: Containerd,
        survey: Survey,
        ground: Ground,
        prepare: Prepare,
        on_change: Callable[[], None],
        on_turn: Callable[[], None],
        tally: Tally | None = None,
    ) -> None:
        self._tally = Tally() if tally is None else tally
        self._tally.expect(TOPICS)
        self._containerd = containerd
        self._survey = survey
        self._ground = ground
        self._prepare = prepare
        self._on_change = on_change
        self._on_turn = on_turn
        self._table_watch: asyncio.Task[None] | None = None
        self._suspicion = Suspicion()
        self._others_wrote = True
        self._deaf = True  # whether nobody tells when others write
        self._chronicle = Chronicle(self._tally)
        self._account = Account(survey, self._chronicle, self._tally)
        self._reload = Reload(self._account, self._tally, self._tell)
        self._dirty: dict[ContainerKey, _Seen] = {}
        self._node_changed = False
        self._wake = asyncio.Event()
        survey.on_foreseen = self._wake.set
        self._pace = Pace(BURST, INTERVAL)
        self._retry_at, self._writing = 0.0, Backoff(RETRY, TICK)
        self._looking = Backoff(RETRY, TICK)
        self._lost = False  # whether containerd was there and is not now
        self._told_in_line = False
        # The publications before, where all begins anew: what is as it was is not told again.
        self._told_before: list[Publication] | None = None
        self._complaint = ""  # of the dataplane's, as it was last shown
        self._told: tuple[dict[str, str], tuple[str, ...]] = ({}, ())  # what is amiss with the node, and the warnings
        self._turns, self._at_rest = 0, asyncio.Event()  # how many are under way
        self._at_rest.set()

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
        await self._dataplane.finish()
        await self._leave_ground()

    async def at_rest(self) -> None:
        """Wait until what is known is decided and written, or could not be: ``status`` then is not half of a change."""
        while self._turns:  # which the next may have come to before the end of the last was told
            await self._at_rest.wait()

    @contextlib.contextmanager
    def _turn(self, cause: str) -> Iterator[None]:
        began = time.monotonic()
        self._turns += 1
        self._at_rest.clear()
        try:
            yield
        finally:
            self._tally.turns[cause].observe(time.monotonic() - began)
            self._turns -= 1
            if not self._turns:
                self._at_rest.set()

    async def _leave_ground(self) -> None:
        if self._table_watch is not None:
            await end(self._table_watch)
        await self._ground.close()

    @property
    def _dataplane(self) -> Dataplane:
        return self._ground.dataplane

    def use(self, config: Config) -> None:
        """Use another configuration from the next turn on; what is the same in both is not touched."""
        self._reload.want(config, self._survey.config)
        self._wake.set()

    def stay(self, reason: str) -> None:
        """Go on with the configuration in use, as the one of the files cannot be, and say why."""
        self._reload.stay(reason)

    async def _change_config(self, config: Config) -> None:
        """Have the kernel follow another configuration. Raises ``ContainerdError``, and is through with it then too.

        And ``OSError`` where this process may not so much as open a file: then all has to be looked at again first.
        """
        self._reload.begin(config)
        try:
            await self._take_up(config)
        finally:
            self._reload.end()

    async def _take_up(self, config: Config) -> None:
        if config == self._survey.config:
            return self._reload.take_back()  # while another was being taken up, of which nothing came
        if config.containerd.address != self._survey.config.containerd.address:
            return self._reload.refuse("another containerd.address takes a restart: systemctl restart ctrport")
        ground: Ground | None = None
        try:
            ground = await self._prepare(config)
            await ground.dataplane.start()
        except (FirewallError, OSError) as error:
            if ground is not None:
                await ground.close()
            return self._reload.refuse_for_now(config, error)
        before = self._ground
        await self._leave_ground()
        ground.dataplane.succeed(before.dataplane)
        ground.dataplane.hold_at_most(ground.reserve_limit)
        self._ground = ground
        self._table_watch = asyncio.create_task(self._watch_tables(ground.alarm))
        self._reload.succeed()
        self._told_before = list(self._survey.publications)
        try:
            await self._survey.use(config, ground.firewalls)
        except ContainerdError:
            await self._settle(mend=True)  # by what is known to run
            raise
        # After an OSError nothing is decided yet: some of what runs was not looked at, and its ports would be closed.
        await self._settle(mend=True)
        await self._dataplane.sweep()
        log.info(Event("reloaded", **self._account.counted()))

    async def _run(self) -> None:
        while True:
            self._on_change()
            self._on_turn()
            await self._containerd.connected(self._on_turn)
            try:
                async with self._containerd.events() as events:
                    self._tally.subscriptions += 1
                    version = await self._containerd.version()
                    if self._account.containerd == NOT_CONNECTED:
                        log.info(Event("containerd", address=self._containerd.address, version=version))
                    reader = asyncio.create_task(self._read(events))
                    try:
                        await self._follow(reader, version)
                    finally:
                        self._reload.wait()
                        reader.cancel()
                        await asyncio.gather(reader, return_exceptions=True)
            except ContainerdError as error:
                self._account.containerd = f"lost: {error}"
                if not self._lost:
                    reason = f"{error}; rules stay as they are until it answers again"
                    log.warning(Event("containerd-lost", address=self._containerd.address, reason=reason))
                self._lost = True
                systemd.notify("STATUS=containerd is lost; rules stay as they are")
                self._on_change()
                await asyncio.sleep(RETRY)
            except OSError as error:
                await asyncio.sleep(self._cannot_look(error))

    async def _watch_node(self) -> None:
        def changed(nsid: int | None) -> None:
            self._survey.network_changed(nsid)
            if nsid is None:
                self._node_changed = True
                self._wake.set()

        try:
            await netlink.follow_addresses(changed)
        except OSError as error:
            log.warning("new addresses of the node are seen only every %.0f s: %s", TICK, error)
        except Exception:  # a fault of ours: not to be lost, and no reason to end
            log.exception("new addresses of the node are seen only every %.0f s", TICK)

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
                if not self._survey.config.watches(event.key.namespace):
                    continue
                self._account.events += 1
                self._tally.events[event.topic] += 1
                self._survey.expect(event)
                if event.topic not in AHEAD:
                    first = self._dirty.get(event.key)
                    at = time.monotonic() if first is None else first.at
                    self._dirty[event.key] = _Seen(at, event.pid)
                    self._wake.set()
        finally:
            self._wake.set()

    async def _follow(self, reader: asyncio.Task[None], version: str) -> None:
        """Look everywhere once and then where events say, until they end. Raises ``ContainerdError``."""
        with self._turn("resync"):
            began = _cpu()
            await self._survey.everything()
            ticks = self._ticks(_cpu() - began)
            # Not before: it may tell its version, which it knows without asking anybody, and list nothing.
            self._account.containerd = f"connected, version {version}"
            if self._account.blind:
                log.info("the node can be looked at again")
            self._account.blind = ""
            self._looking.reset()
            await self._settle(mend=True)
        if self._lost:
            log.info(Event("containerd-back", address=self._containerd.address, **self._account.counted()))
        self._lost = False
        systemd.notify("READY=1", f"STATUS={self._account.summary()}")
        self._on_change()
        await self._dataplane.sweep()
        await self._dataplane.prepare()
        gc.freeze()  # what is there by now mostly stays, and is not to be gone through again and again
        next_tick = time.monotonic() + TICK
        self._reload.follow()
        while not reader.done():
            self._on_turn()  # here alone while containerd answers: all that a turn has to do is behind it
            if self._reload.next is not None and time.monotonic() >= self._reload.due:
                config, self._reload.next = self._reload.next, None
                with self._turn("configuration"):
                    await self._change_config(config)
            await self._woken(min(next_tick, self._due_at(), self._reload.due))
            if self._dirty or self._node_changed or self._survey.foreseen_since is not None:
                pause = self._pace.wait(time.monotonic())
                if pause:
                    await asyncio.sleep(pause)
                with self._turn("event"):
                    await self._look()
            elif time.monotonic() >= next_tick:
                ticks, next_tick = ticks - 1, time.monotonic() + TICK
                began = _cpu()
                with self._turn("tick" if ticks else "resync"):
                    await self._tick(everything=ticks == 0)
                if not ticks:
                    ticks = self._ticks(_cpu() - began)
            elif time.monotonic() >= self._due_at():
                with self._turn("drift" if self._dataplane.in_line else "retry"):
                    await self._settle(mend=True)
            await self._dataplane.prepare()
        await reader

    def _ticks(self, took: float) -> int:
        return TICKS_TO_RESYNC if self._deaf else ticks_to_resync(took)

    async def _look(self) -> None:
        """Look where events said that something happened, and make the kernel follow."""
        if self._node_changed:
            self._node_changed = False
            await self._survey.node(others=False)
        dirty, self._dirty = self._dirty, {}
        first = (self._survey.foreseen_since, *(seen.at for seen in dirty.values()))
        since = min((at for at in first if at is not None), default=None)
        named = {key: seen.pid for key, seen in dirty.items()}
        foreseen = self._survey.foresee(named)
        if foreseen:
            await self._settle(since=since)
        if not named and foreseen:
            return
        await self._survey.look(named, foreseen=foreseen)
        await self._settle(since=since)

    async def _woken(self, until: float) -> None:
        """Wait for anything that is worth a look, or until then by the monotonic clock."""
        # Not by wait_for(), which lets two more turns of the event loop pass between an event and the look at it.
        loop = asyncio.get_running_loop()
        alarm = loop.call_later(max(0.0, until - time.monotonic()), self._wake.set)
        try:
            await self._wake.wait()
        finally:
            alarm.cancel()
        self._wake.clear()

    def _due_at(self) -> float:
        """Return when the kernel is to be read: for what others wrote, or as writing failed."""
        if not self._dataplane.in_line:
            return self._retry_at
        # Just before a container starts, its network is made, and with that rules: its port is not to wait for a look.
        due = self._suspicion.due(busy=self._survey.start_is_near)
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
        taken: list[Holder] = []
        if everything and self._dataplane.unreserved:
            taken = self._dataplane.reserve_again()
            self._chronicle.look_anew()  # whose host ports are reserved by now, nobody tells
        publications.meet([*self._dataplane.still_held(publications.met), *taken])
        await self._settle(mend=everything or (self._dataplane.in_line and self._dataplane.switched_off()))

    async def _settle(self, *, mend: bool = False, since: float | None = None) -> None:
        """Decide, and make the kernel follow. ``since`` is when the first event came that led here."""
        self._tell_of_node()
        changes = self._decide()
        was_in_line, transactions = self._dataplane.in_line, self._dataplane.transactions
        drift, news = Drift(), False
        if was_in_line or changes or mend or time.monotonic() >= self._retry_at:
            began, grounds = (_cpu(), self._suspicion.begin()) if mend else (0.0, Grounds())
            try:
                drift = await self._dataplane.follow(changes, self._survey.facts, mend=mend)
            except FirewallError as error:
                self._failed(error)
            else:
                if drift:
                    self._chronicle.repaired(drift, grounds, self._account.looked_at)
                if mend:
                    self._account.looked_at = time.monotonic()
                    self._tell_of_node()  # of tables of others something may be new, too
                self._account.problem = ""
                self._writing.reset()
            if grounds.since is not None:
                self._suspicion.end(_cpu() - began, time.monotonic())
            # A look that somebody's write was the cause of, and that found nothing, is no news.
            news = bool(drift) or (mend and grounds.since is None)
        if self._dataplane.transactions != transactions:
            self._pace.take(time.monotonic())
        told, self._told_before = self._told_before, None
        self._chronicle.take(changes if told is None else self._chronicle.compared(told, changes), since)
        self._chronicle.tell(self._dataplane.remark, in_line=self._dataplane.in_line)
        if self._account.revisions != self._survey.revisions:
            self._account.revisions, news = dict(self._survey.revisions), True
        if changes or news or self._dataplane.in_line != was_in_line:
            self._tell()
        if self._dataplane.in_line and not self._told_in_line:
            log.info(Event("in-line", **self._account.counted()))
            self._told_in_line = True
        if self._dataplane.in_line:
            await self._dataplane.keep_host_ports()
            self._dataplane.drop_stale_flows().add_done_callback(self._complained)

    def _complained(self, _: object) -> None:
        if self._dataplane.complaint != self._complaint:
            self._complaint = self._dataplane.complaint
            self._on_change()

    def _tell(self) -> None:
        systemd.notify(f"STATUS={self._account.summary()}")
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
        if str(error) != self._account.problem:
            log.error(Event("write-failed", reason=f"{error}; trying again until it works"))
        self._account.problem, self._told_in_line = str(error), False
        self._retry_at = time.monotonic() + self._writing.pause()

    def _cannot_look(self, error: OSError) -> float:
        """Say once that this process may not so much as open a file; return in how many seconds to look again."""
        blind = f"the node cannot be looked at: {error.strerror or error}; what was known of it stands"
        if not self._account.blind:
            log.error("%s, and it is tried again until it works", blind)
            systemd.notify(f"STATUS={blind}")
        self._account.blind = blind
        self._on_change()
        return self._looking.pause()

    def status(self, *, running: bool) -> Status:
        """Return what there is to say now."""
        return self._account.status(self._dataplane, running=running)

    def reading(self) -> Reading:
        """Return in numbers what there is to say now, at a cost of microseconds: no publication is looked at."""
        return self._account.reading(self._dataplane)

    async def counts(self) -> Counts | None:
        """Return how many connections each mapping has had; None where the kernel cannot be asked now."""
        return await self._dataplane.counts()

    @property
    def config(self) -> Config:
        """The configuration in use."""
        return self._survey.config


def ticks_to_resync(took: float) -> int:
    """Return after how many ticks to look at everything again, where that took so many seconds of processor time."""
    return max(TICKS_TO_RESYNC, min(MOST_TICKS_TO_RESYNC, math.ceil(took / RESYNC_IN_TICK)))


def _cpu() -> float:
    """Return the seconds of processor time that the daemon has taken, with the programs that it ran."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)
