"""What the daemon has counted since it started, and how it is now: plain numbers, cheap to count up.

Pure: times are told, never read. Who shows the numbers, and how, is another's (``metrics``).
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .model import Family, State

#: Seconds, the upper bounds of what is told apart: of a turn of the loop and a write, from an event to an open port,
#: and of what somebody else does to our rules.
WORK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
OPENING = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
DAMAGE = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

#: What a turn of the loop was for: containers that events named, what sends no event, everything, what others wrote,
#: a write that had failed, another configuration.
CAUSES = ("event", "tick", "resync", "drift", "retry", "configuration")

#: What others do to what is ours.
DRIFTS = ("missing", "misplaced", "surplus", "route_localnet")

#: How containerd fails a call: nobody is there, no answer in time, and it will not.
CALL_ERRORS = ("unavailable", "unresponsive", "refused")


class Histogram:
    """How many times something took up to so many seconds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        #: By the bound that they are up to, the last one being what is beyond all of them.
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one more."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)


@dataclass
class Tally:
    """What was counted since the daemon started; it only grows, whatever becomes of the rooms that count."""

    #: Of containers that are looked at, by topic.
    events: Counter[str] = field(default_factory=Counter)
    turns: dict[str, Histogram] = field(default_factory=lambda: {cause: Histogram(WORK) for cause in CAUSES})
    #: From the first event that led to it to the rules of a publication being in the kernel.
    opened: Histogram = field(default_factory=lambda: Histogram(OPENING))
    writes: dict[Family, Histogram] = field(default_factory=lambda: {family: Histogram(WORK) for family in Family})
    write_errors: Counter[Family] = field(default_factory=lambda: Counter(dict.fromkeys(Family, 0)))
    #: For the lock of legacy tables, by write; nf_tables has none.
    lock_waits: Histogram = field(default_factory=lambda: Histogram(WORK))
    drift: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(DRIFTS, 0)))
    #: For how long what was repaired had not been as it should be.
    drift_lasted: Histogram = field(default_factory=lambda: Histogram(DAMAGE))
    #: How often containerd's events were subscribed to.
    subscriptions: int = 0
    call_errors: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(CALL_ERRORS, 0)))
    reloads: int = 0
    failed_reloads: int = 0
    flows_deleted: int = 0
    conntrack_errors: int = 0

    def expect(self, topics: Iterable[str]) -> None:
        """Have events of these topics counted from 0 on, so that the first of them is seen as one more."""
        self.events.update(dict.fromkeys(topics, 0))

    def copy(self) -> Tally:
        """Return the numbers as they are now."""
        return copy.deepcopy(self)


@dataclass(frozen=True)
class Reading:
    """The numbers of one moment.

    ``reloaded_at`` is when the configuration in use was read, in seconds since 1970. ``held_ports`` are the host ports
    that sockets of the daemon hold, of ``held_ports_limit``; ``unreserved`` are the publications that have not all of
    theirs held. ``unmatched`` are those of the waiting that no running container matches, ``standby`` those that
    wait in line behind one that serves; ``starved`` are those of the conflicts that take any free port and find none.
    """

    version: str
    backend: str
    counted: Tally
    states: Mapping[State, int]
    unmatched: int
    standby: int
    starved: int
    unreserved: int
    held_ports: int
    held_ports_limit: int
    in_line: bool
    connected: bool
    config_in_use_is_current: bool
    reloaded_at: float
    transactions: int
    repairs: int
    warnings: int
