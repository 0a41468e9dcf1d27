"""Others wrote into the kernel's tables: when to look whether ours is still there, and whom to name if it is not.

A look costs as much as there is of ours, and a neighbour may write every second, so what looking may take is bounded.
Pure: the time is told, never read; times are of one monotonic clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .pace import Budget

#: Seconds from a write to the look, for who commits table by table, and from the first write at the most: a start of
#: dockerd is a hundred commits.
PATIENCE, PATIENCE_WITH_MANY = 0.01, 0.1
#: How much of the time looking may take, and how many seconds of it may be taken ahead.
SHARE, AHEAD = 0.01, 0.3
#: How many writers are remembered by name.
NAMED = 4


@dataclass(frozen=True)
class Grounds:
    """What a look is for: since when, None where nobody was seen to write, and who wrote since then."""

    since: float | None = None
    writers: tuple[str, ...] = ()


class Suspicion:
    """What was told of others' writes since the last look."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._last = 0.0
        self._writers: dict[str, None] = {}
        self._budget = Budget(SHARE, AHEAD)

    def tell(self, writer: str, now: float) -> None:
        """Take in that somebody wrote; ``writer`` is empty where it is not known who."""
        if self._since is None:
            self._since = now
        self._last = now
        if writer and len(self._writers) < NAMED:
            self._writers[writer] = None

    def due(self, *, busy: bool = False) -> float | None:
        """Return when to look, None where there is nothing to look for.

        Where it is ``busy``, not before it has to be: there is something else that should not wait for it.
        """
        if self._since is None:
            return None
        quiet = math.inf if busy else self._last + PATIENCE
        return max(min(quiet, self._since + PATIENCE_WITH_MANY), self._budget.free_at())

    def begin(self) -> Grounds:
        """Begin a look, whatever for: what is told from now on is for the next."""
        grounds = Grounds(self._since, tuple(self._writers))
        self._since, self._writers = None, {}
        return grounds

    def end(self, took: float, now: float) -> None:
        """Take in how many seconds of work a look took that others gave cause for."""
        self._budget.spend(now, took)
