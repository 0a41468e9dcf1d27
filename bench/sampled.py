"""The daemon, looked at every fraction of a millisecond from when a container has its network until its port is open.

    python -m bench.sampled FILE run --config ...

Where it waits, it is said what for: a look is at the loop that follows the events (its chain of awaits), and at what
runs meanwhile. What was seen is in FILE when the daemon has ended: a JSON list of the ways, and of each the stacks,
outermost first, with the milliseconds that it was there.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import selectors
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NoReturn

from ctrport import cli
from ctrport.dataplane import Dataplane
from ctrport.publish import Change
from ctrport.reconcile import Reconciler
from ctrport.survey import Survey

#: Seconds between two looks. Each wakes the event loop, so that the way gets some percent longer.
INTERVAL = 0.001
#: How the names of the containers begin whose starts are looked at: there may be one with thousands of mappings.
SAMPLED = "web-"
#: What else than code is on the stacks.
WAITING, MEANWHILE = "(waiting)", "(meanwhile)"

Stack = tuple[CodeType | str, ...]


class Sampler:
    """Notes where the daemon is on the way from one to the other, and writes it to ``path`` at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._task: asyncio.Task[Any] | None = None  # the one that follows the events
        self._loop: asyncio.AbstractEventLoop | None = None
        self._began: float | None = None  # of the way that is being looked at
        self._last = 0.0
        self._looking = False
        self._seen: dict[Stack, float] = {}  # of that way, in seconds
        self._ways: list[dict[Stack, float]] = []

    def start(self) -> None:
        """Begin to look at the current task."""
        self._task, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        signal.signal(signal.SIGALRM, self._look)
        signal.setitimer(signal.ITIMER_REAL, INTERVAL, INTERVAL)

    def begin(self) -> None:
        """Take in that the kernel has announced an address of a container."""
        self._began = None  # so that no look comes in between
        self._seen = {}
        self._began = self._last = time.monotonic()

    def end(self) -> None:
        """Take in that the kernel holds what the event led to."""
        began, self._began = self._began, None  # so that no look comes in between
        if began is not None:
            self._add(self._seen, self._stack(sys._getframe(1)), time.monotonic() - self._last)
            self._ways.append(self._seen)

    def write(self) -> None:
        """Look no more, and write what was seen."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        ways = [
            [([_name(place) for place in stack], seconds * 1000) for stack, seconds in way.items()]
            for way in self._ways
        ]
        self._path.write_text(json.dumps(ways))

    def _look(self, number: int, frame: FrameType | None) -> None:
        if self._began is None or self._task is None or self._looking:
            return
        self._looking = True  # the next signal may come meanwhile, and what it would see is this look
        took = time.monotonic() - self._last
        self._add(self._seen, self._stack(frame), took)
        self._last = time.monotonic()  # anew, as looking is no part of the way
        self._looking = False

    @staticmethod
    def _add(to: dict[Stack, float], stack: Stack, seconds: float) -> None:
        to[stack] = to.get(stack, 0.0) + seconds

    def _stack(self, frame: FrameType | None) -> Stack:
        """Return where the daemon is, quickly: what the loop awaits, and what runs in that or meanwhile."""
        assert self._task is not None
        running: list[CodeType | str] = []
        while frame is not None and frame.f_code is not _RUN:
            running.append(frame.f_code)
            frame = frame.f_back
        running.reverse()
        if asyncio.current_task(self._loop) is self._task:
            return tuple(running)
        found: list[CodeType | str] = []
        coroutine: Any = self._task.get_coro()
        while (code := getattr(coroutine, "cr_code", None) or getattr(coroutine, "gi_code", None)) is not None:
            found.append(code)
            coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
        return (*found, WAITING) if running[-1:] == [_SELECT] else (*found, MEANWHILE, *running)


def _name(place: CodeType | str) -> str:
    if isinstance(place, str):
        return place
    path = Path(place.co_filename).with_suffix("").parts
    start = next((index + 1 for index, part in enumerate(path) if part in ("ctrport", "site-packages")), -2)
    if "asyncio" in path:
        start = path.index("asyncio")
    return f"{'.'.join(path[start:])}.{place.co_name}"


#: What runs each step of a task, and what the event loop waits in.
_RUN = asyncio.Handle._run.__code__
_SELECT = selectors.EpollSelector.select.__code__


def install(sampler: Sampler) -> None:
    """Have the daemon of this process tell the sampler when an address comes, and when the kernel has followed."""
    follow, changed, run = Dataplane.follow, Survey.network_changed, Reconciler.run

    def hearing(self: Survey, nsid: int | None) -> None:
        if nsid is not None:
            sampler.begin()
        changed(self, nsid)

    async def following(self: Dataplane, changes: Sequence[Change], *others: Any, **options: Any) -> Any:
        try:
            return await follow(self, changes, *others, **options)
        finally:
            opened = (change.after.container for change in changes if change.after is not None)
            if any(container is not None and container.id.startswith(SAMPLED) for container in opened):
                sampler.end()

    async def running(self: Reconciler) -> None:
        sampler.start()
        await run(self)

    setattr(Survey, "network_changed", hearing)  # noqa: B010 - mypy has no word for a replaced function
    setattr(Dataplane, "follow", following)  # noqa: B010
    setattr(Reconciler, "run", running)  # noqa: B010


def main() -> NoReturn:
    """Run the daemon."""
    sampler = Sampler(Path(sys.argv[1]))
    install(sampler)
    atexit.register(sampler.write)
    del sys.argv[1]
    cli.main()


if __name__ == "__main__":
    main()
