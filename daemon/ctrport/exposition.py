"""The text that whoever scrapes gets, made on a thread while the loop goes on, and not more often than it is worth."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from .connections import Connections, Counts
from .metrics import render
from .pace import Budget
from .tally import Reading

#: Seconds that a text is good for, whoever asks for it.
FRESH = 1.0
#: Seconds between two looks at the kernel's counters at the least; and the share of the time that looking may take,
#: with the seconds of it that may be taken ahead: with thousands of mappings it takes a tenth of a second and more.
LOOK_PAUSE, LOOK_SHARE, LOOK_AHEAD = 5.0, 0.01, 0.2
#: Seconds that a scrape waits for such a look; after that it gets what was seen before.
LOOK_PATIENCE = 2.0


class Exposition:
    """The text for whoever scrapes; made anew when it is asked for and older than ``FRESH``.

    ``read`` returns the numbers of the moment. ``look`` returns what the kernel has counted, or None where it cannot be
    asked: what was known of it stands.
    """

    def __init__(
        self,
        read: Callable[[], Reading],
        look: Callable[[], Awaitable[Counts | None]],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self._read = read
        self._look = look
        self._looking: asyncio.Task[None] | None = None
        self._next_look, self._budget = 0.0, Budget(LOOK_SHARE, LOOK_AHEAD)
        self._seen: Counts | None = None  # and not taken in yet
        self._seen_at: float | None = None
        self._connections = Connections()
        self._making: asyncio.Task[bytes] | None = None
        self._made, self._made_at = b"", -FRESH

    async def text(self) -> bytes:
        """Return it. Who asks while it is being made gets the same."""
        if self._now() < self._made_at + FRESH:
            return self._made
        if self._making is None or self._making.done():
            self._making = asyncio.create_task(self._make())
        return await asyncio.shield(self._making)

    async def close(self) -> None:
        """Break off what is being done."""
        tasks = [task for task in (self._making, self._looking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _make(self) -> bytes:
        if self._looking is None and self._now() >= max(self._next_look, self._budget.free_at()):
            self._looking = asyncio.create_task(self._look_once())
        if self._looking is not None:
            await asyncio.wait({self._looking}, timeout=LOOK_PATIENCE)
            if self._looking.done():
                looked, self._looking = self._looking, None
                looked.result()
        seen, self._seen = self._seen, None
        age = None if self._seen_at is None else self._now() - self._seen_at
        self._made = await asyncio.to_thread(self._written, self._read(), seen, age)
        self._made_at = self._now()
        return self._made

    async def _look_once(self) -> None:
        began = self._now()
        try:
            seen = await self._look()
            if seen is not None:
                self._seen, self._seen_at = seen, self._now()
        finally:
            now = self._now()
            self._next_look = now + LOOK_PAUSE
            self._budget.spend(now, now - began)

    def _written(self, reading: Reading, seen: Counts | None, age: float | None) -> bytes:
        if seen is not None:
            self._connections.take(seen)
        return render(reading, self._connections, age)
