"""What containerd has stored of containers that were made and have not started yet.

A container is made some ten milliseconds before it starts, as its network is made in between. What is stored of it is
asked for meanwhile, so that its port need not wait for that. It is dropped as soon as anything may have changed it, and
may be missing at any time: then containerd is asked when the container starts.
"""

from __future__ import annotations

import asyncio
import logging

from .containerd import Containerd, ContainerdError, Listed
from .model import ContainerKey

log = logging.getLogger(__name__)

#: How many containers are remembered, and of how many containerd is asked at the same time.
MOST, MOST_ASKED = 256, 16


class Expected:
    """Asks containerd of containers that are expected to start, and remembers the answers for as long as they hold."""

    def __init__(self, containerd: Containerd) -> None:
        self._containerd = containerd
        self._known: dict[ContainerKey, Listed] = {}
        self._asking: dict[ContainerKey, asyncio.Task[None]] = {}
        self._given_up: set[asyncio.Task[None]] = set()

    def expect(self, key: ContainerKey, *, annotations: bool) -> None:
        """Begin to find out what is stored of a container, in place of what was."""
        self.forget(key)
        if len(self._asking) + len(self._given_up) < MOST_ASKED:
            self._asking[key] = asyncio.create_task(self._ask(key, annotations))

    def get(self, key: ContainerKey) -> Listed | None:
        """Return what is stored of a container, if that is known by now."""
        return self._known.get(key)

    def forget(self, key: ContainerKey) -> bool:
        """Drop what is known of a container, as it may be something else by now; return whether it was expected."""
        known, asking = self._known.pop(key, None), self._asking.pop(key, None)
        if asking is not None:
            # Not cancelled, but let come to its end: a call that is cancelled costs memory that is never given back.
            self._given_up.add(asking)
            asking.add_done_callback(self._given_up.discard)
        return known is not None or asking is not None

    def forget_all(self) -> None:
        """Drop all that is known."""
        for key in [*self._known, *self._asking]:
            self.forget(key)

    async def _ask(self, key: ContainerKey, annotations: bool) -> None:
        found: Listed | None = None
        try:
            found = await self._containerd.stored(key, annotations=annotations)
        except ContainerdError as error:
            log.debug("what is stored of container %s cannot be told ahead: %s", key, error)
        if self._asking.get(key) is not asyncio.current_task():
            return
        del self._asking[key]
        if found is not None and found.cgroup:
            self._known[key] = found
            if len(self._known) > MOST:
                del self._known[next(iter(self._known))]  # the oldest
