"""How often something may be done: at once while it is rare, and no faster than it pays for when it comes in floods.

Pure: the time is told, never read.
"""

from __future__ import annotations


class Pace:
    """Lets ``burst`` turns pass at once, and one more every ``interval`` seconds; times are of one monotonic clock."""

    def __init__(self, burst: int, interval: float) -> None:
        self._interval = interval
        self._capacity = burst * interval
        self._spent_until = 0.0  # when all that was spent will have been earned again

    def take(self, now: float) -> None:
        """Spend a turn."""
        self._spent_until = max(self._spent_until, now) + self._interval

    def wait(self, now: float) -> float:
        """Return how many seconds there are until the next turn, 0 where it may be taken at once."""
        return max(0.0, self._spent_until + self._interval - self._capacity - now)


class Backoff:
    """How long to wait before the next try: ``first`` seconds, doubled with each, ``most`` at the most."""

    def __init__(self, first: float, most: float) -> None:
        self._first, self._most = first, most
        self._next = first

    def pause(self) -> float:
        """Return how many seconds to wait now that a try has failed."""
        pause, self._next = self._next, min(2 * self._next, self._most)
        return pause

    def reset(self) -> None:
        """Begin anew: a try has worked."""
        self._next = self._first


class Budget:
    """Lets work take ``share`` of the time: at once while little was spent, ``most`` seconds of work ahead at the most.

    Times are of one monotonic clock.
    """

    def __init__(self, share: float, most: float) -> None:
        self._share = share
        self._ahead = most / share
        self._earned_at = 0.0  # when all that was spent will have been earned

    def spend(self, now: float, seconds: float) -> None:
        """Spend the seconds that work took."""
        self._earned_at = max(self._earned_at, now) + seconds / self._share

    def free_at(self) -> float:
        """Return from when on there may be more work."""
        return self._earned_at - self._ahead
