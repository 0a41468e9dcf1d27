"""What can be known of a container before its start is announced: what is stored of it, its process, where that is.

A container is made some ten milliseconds before it starts, as its network is made in between. What containerd has
stored of it is asked for meanwhile, its process is looked at as soon as there is one, and again when its network may be
there: so that at its start next to nothing is left to find out.

None of it counts before the start is announced. All of it is dropped as soon as anything may have changed it, and may
be missing at any time: then it is found out when the container starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, replace

from . import endpoints
from .cgroups import is_in
from .containerd import Containerd, ContainerdError, Listed
from .endpoints import Endpoints, Gone
from .model import ContainerKey, Endpoint
from .pods import Running
from .taskevents import CREATED, DELETED, TASK_CREATED, UPDATED, TaskEvent

log = logging.getLogger(__name__)

#: How many containers are remembered, and of how many containerd is asked at the same time.
MOST, MOST_ASKED = 256, 16
#: For how many seconds after it was made a container's start is what may come next.
SOON = 1.0
#: How often it is looked where one is: of some that is not to be found before their start, or ever.
TRIES = 8


@dataclass
class _Known:
    """What is known of one: what is stored of it, the process that it is said to have, and what that shows."""

    stored: Listed | None = None
    pid: int | None = None
    running: Running | None = None
    endpoint: Endpoint | None = None
    tries: int = 0  # to find that


class Expected:
    """Finds out ahead what there is to know of containers that are to start, as far as events say so."""

    def __init__(self, containerd: Containerd, finder: Endpoints) -> None:
        self._containerd = containerd
        self._endpoints = finder
        self._known: dict[ContainerKey, _Known] = {}
        self._asking: set[asyncio.Task[None]] = set()
        self._made_at = -SOON  # the last of them

    def take(self, event: TaskEvent, *, annotations: bool) -> None:
        """Take in what an event says of a container; ``annotations`` is whether these are to be known."""
        key = event.key
        if event.topic == CREATED or (event.topic == UPDATED and key in self._known):
            self.forget(key)
            if len(self._asking) < MOST_ASKED:
                self._made_at = time.monotonic()
                known = self._known[key] = _Known()
                asking = asyncio.create_task(self._ask(key, known, annotations))
                self._asking.add(asking)
                asking.add_done_callback(self._asking.discard)
                if len(self._known) > MOST:
                    self.forget(next(iter(self._known)))  # the oldest
        elif event.topic == DELETED:
            self.forget(key)
        elif event.topic == TASK_CREATED and key in self._known:
            self._made_at = time.monotonic()
            self._known[key].pid = event.pid
            self.prepare()

    def prepare(self) -> None:
        """Look where those are that have a process: their network may have been made just now."""
        for known in self._known.values() if self.soon() else ():
            if known.stored is None or known.pid is None or known.endpoint is not None or known.tries >= TRIES:
                continue
            known.tries += 1
            with contextlib.suppress(OSError):  # then at the start
                known.running = known.running or _running(known.stored, known.pid)
                found = self._find(known.pid) if known.running is not None else None
                known.endpoint = found if isinstance(found, Endpoint) else None

    def soon(self) -> bool:
        """Whether one of them may start any moment."""
        return bool(self._known) and time.monotonic() < self._made_at + SOON

    def stored(self, key: ContainerKey) -> Listed | None:
        """Return what is stored of a container, if that is known by now."""
        known = self._known.get(key)
        return None if known is None else known.stored

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

    def forget_all(self) -> None:
        """Drop all that is known."""
        self._known.clear()

    async def _ask(self, key: ContainerKey, known: _Known, annotations: bool) -> None:
        # Never cancelled where it is no longer wanted: a call that is cancelled costs memory that is never given back.
        try:
            stored = await self._containerd.stored(key, annotations=annotations)
        except ContainerdError as error:
            log.debug("what is stored of container %s cannot be told ahead: %s", key, error)
            return
        if stored.cgroup:
            known.stored = stored
            self.prepare()

    def _find(self, pid: int) -> object:
        with contextlib.suppress(Gone):
            return self._endpoints.find(pid)
        return None


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
    its = (listed.labels, listed.annotation, listed.live, listed.role)
    return Running(listed.key, listed.pid, started, netns, *its)
