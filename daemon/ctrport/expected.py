"""What can be known of a container before its start is announced: what is stored of it, its process, where that is.

A container is made some ten milliseconds before it starts, as its network is made in between. What containerd has
stored of it is asked for meanwhile, and its process is looked at as soon as there is one and whenever its network
namespace gets an address. Where it has all that its ports take, they can be opened before its first process begins.

All of it is dropped as soon as anything may have changed it, and may be missing at any time: then it is found out when
the container starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from . import endpoints
from .cgroups import is_in
from .containerd import Containerd, ContainerdError
from .endpoints import Endpoints, Gone
from .listed import Listed
from .model import ContainerKey, Endpoint
from .pods import Running
from .taskevents import CREATED, DELETED, TASK_CREATED, UPDATED, TaskEvent

log = logging.getLogger(__name__)

#: How many containers are remembered, and of how many containerd is asked at the same time.
MOST, MOST_ASKED = 256, 16
#: For how many seconds after it was made a container's start is what may come next.
SOON = 1.0
#: How often it is looked where one is: of some that is not to be found before their start, or ever.
TRIES = 16
#: Seconds until it is looked again where the container has an address and the host no route yet: some network plugins
#: come to that last. And what is then found is told that much later, as the host's own change is told meanwhile: a new
#: address of its own would take a transaction of its own.
PAUSES = (0.001, 0.004, 0.016, 0.064)
TOLD = 0.001


@dataclass
class _Known:
    """What is known of one: what is stored of it, the process that it is said to have, and what that shows.

    ``nsid`` is the id of its network namespace in ours, by which the kernel tells of changes there.
    """

    stored: Listed | None = None
    pid: int | None = None
    running: Running | None = None
    nsid: int | None = None
    endpoint: Endpoint | None = None
    tries: int = 0  # to find that


class Expected:
    """Finds out ahead what there is to know of containers that are to start, as far as events say so.

    ``matters`` tells whether anything of a container is to be published: the others are not looked at. ``found`` is
    called when of another one all is known, which ``ready`` then has.
    """

    def __init__(
        self,
        containerd: Containerd,
        finder: Endpoints,
        matters: Callable[[Running], bool] = lambda _: True,
        found: Callable[[], None] = lambda: None,
    ) -> None:
        self._containerd = containerd
        self._endpoints = finder
        self._matters = matters
        self._found = found
        self._known: dict[ContainerKey, _Known] = {}
        self._asking: set[asyncio.Task[None]] = set()
        self._made_at = -SOON  # the last of them
        #: Those of which all is known, each since when, by the monotonic clock, until somebody takes them out.
        self.ready: dict[ContainerKey, float] = {}

    def take(self, event: TaskEvent, *, annotations: bool) -> None:
        """Take in what an event says of a container; ``annotations`` is whether these are to be known."""
        key, known = event.key, self._known.get(event.key)
        if event.topic == CREATED:
            self._learn(key, None, annotations)
        elif event.topic == UPDATED and known is not None:
            self._learn(key, known.pid, annotations)
        elif event.topic == DELETED:
            self.forget(key)
        elif event.topic == TASK_CREATED and known is None:  # made long ago, to be started once more
            self._learn(key, event.pid, annotations)
        elif event.topic == TASK_CREATED and known is not None:
            self._made_at = time.monotonic()
            if event.pid != known.pid:  # of a task before this one, which was not started, nothing holds any more
                self.ready.pop(key, None)
                known.pid, known.tries = event.pid, 0
                known.running = known.nsid = known.endpoint = None
            self._look(key, known)

    def network_changed(self, nsid: int | None) -> None:
        """Look where those are whose network namespace has this id in ours, and has a new address.

        None is our own: some of them may be reached only now.
        """
        for key, known in list(self._known.items()):
            if known.nsid is not None and (known.endpoint is None if nsid is None else known.nsid == nsid):
                self._look(key, known, PAUSES)

    def soon(self) -> bool:
        """Whether one of them may start any moment."""
        return bool(self._known) and time.monotonic() < self._made_at + SOON

    def stored(self, key: ContainerKey) -> Listed | None:
        """Return what is stored of a container, if that is known by now."""
        known = self._known.get(key)
        return None if known is None else known.stored

    def about_to_start(self, key: ContainerKey) -> tuple[Running, Endpoint] | None:
        """Return one that was ``ready``, as it was found; None where it may be something else by now."""
        known = self._known.get(key)
        if known is None or known.running is None or known.endpoint is None:
            return None
        return replace(known.running, starts=True), known.endpoint

    def started(self, key: ContainerKey, pid: int) -> tuple[Running, Endpoint | None] | None:
        """Return the container that is said to have started as this process, and where it was, if that is known.

        None unless the kernel bears it out: the process is in the cgroup that was stored for the container. Raises
        ``OSError``.
        """
        known = self._known.get(key)
        if known is None or known.stored is None:
            return None
        running, endpoint = known.running, known.endpoint
        with contextlib.suppress(Gone):
            if running is not None and running.pid == pid and endpoints.started(pid) == running.started:
                return running, endpoint
            running = _running(known.stored, pid)
            return None if running is None else (running, None)
        return None

    def forget(self, key: ContainerKey) -> None:
        """Drop what is known of a container: it may be something else by now, or is expected no more."""
        self._known.pop(key, None)
        self.ready.pop(key, None)

    def forget_all(self) -> None:
        """Drop all that is known."""
        self._known.clear()
        self.ready.clear()

    def _learn(self, key: ContainerKey, pid: int | None, annotations: bool) -> None:
        self.forget(key)
        if len(self._asking) >= MOST_ASKED:
            return
        self._made_at = time.monotonic()
        known = self._known[key] = _Known(pid=pid)
        asking = asyncio.create_task(self._ask(key, known, annotations))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        if len(self._known) > MOST:
            self.forget(next(iter(self._known)))  # the oldest

    async def _ask(self, key: ContainerKey, known: _Known, annotations: bool) -> None:
        # Never cancelled where it is no longer wanted: a call that is cancelled costs memory that is never given back.
        try:
            stored = await self._containerd.stored(key, annotations=annotations)
        except ContainerdError as error:
            log.debug("what is stored of container %s cannot be told ahead: %s", key, error)
            return
        if stored.cgroup:
            known.stored = stored
            self._look(key, known)

    def _look(self, key: ContainerKey, known: _Known, pauses: Sequence[float] = (), *, again: bool = False) -> None:
        """Look where one is, and again after these pauses where it is not to be found."""
        if self._known.get(key) is not known or known.stored is None or known.pid is None or known.tries >= TRIES:
            return
        known.tries += 1
        with contextlib.suppress(OSError, Gone):  # then at the start
            if known.running is None:
                known.running = _running(known.stored, known.pid)
                if known.running is None or not self._matters(known.running):
                    known.tries = TRIES
                    return
            if known.nsid is None:
                known.nsid = self._endpoints.heard_of(known.pid)  # before the look, so that nothing falls between
            found = self._endpoints.find(known.pid, known.nsid)
            if isinstance(found, Endpoint):
                if found != known.endpoint:
                    known.endpoint = found
                    self.ready.setdefault(key, time.monotonic())
                    if again:
                        asyncio.get_running_loop().call_later(TOLD, self._found)
                    else:
                        self._found()
            elif pauses:
                looking = functools.partial(self._look, key, known, pauses[1:], again=True)
                asyncio.get_running_loop().call_later(pauses[0], looking)


def _running(stored: Listed, pid: int) -> Running | None:
    """Return a container as its process shows it; None where that process is gone, or is not the container's."""
    try:
        started = endpoints.started(pid)
        if not is_in(stored.cgroup, endpoints.read(f"/proc/{pid}/cgroup")):
            return None
        return running_as(replace(stored, pid=pid), started)
    except Gone:
        return None


def running_as(listed: Listed, started: int) -> Running:
    """Return a container that runs, as the process that began then. Raises ``Gone``."""
    assert listed.pid is not None
    netns = endpoints.netns(listed.pid)
    its = (listed.labels, listed.annotation, listed.live, listed.role, listed.starts)
    return Running(listed.key, listed.pid, started, netns, *its)
