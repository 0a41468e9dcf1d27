"""Which configuration is to be used next, and what is said while it is not."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from .account import Account
from .config import Config
from .events import Event
from .firewall import FirewallError, ForeignChain, ForeignTable, Unusable
from .pace import Backoff
from .tally import Tally

log = logging.getLogger(__name__)

#: Seconds until a configuration that was refused for what may pass is tried again: doubled each time, up to the latest.
RETRY, LATEST = 1.0, 60.0
#: What a configuration is refused for until it or the node is changed by somebody.
LASTING = (ForeignChain, ForeignTable, Unusable)
#: Why a configuration that came is not in use yet.
WAITS = "the new one waits until containerd answers and the node can be looked at"


class Reload:
    """The configuration of the files, on its way to being used.

    ``next`` is the one that is to be taken up, None where there is none. Why what is in use is not that of the files
    goes to ``account``; ``tell`` is called where that is new.
    """

    def __init__(self, account: Account, tally: Tally, tell: Callable[[], None]) -> None:
        self._account = account
        self._tally = tally
        self._tell = tell
        self.next: Config | None = None
        self._taken_up: Config | None = None  # that which is being taken up now
        self._stayed = False  # whether the files have become ones that cannot be used since
        self._at, self._pauses = 0.0, Backoff(RETRY, LATEST)
        self._followed = False  # whether there is a loop that comes round to take one up

    @property
    def due(self) -> float:
        """When the next one is to be taken up, by the monotonic clock; never, where there is none."""
        return math.inf if self.next is None else self._at

    def want(self, config: Config, in_use: Config) -> None:
        """Have a configuration be the next, if it is not the one that is in use by then."""
        self.next = None if config == (in_use if self._taken_up is None else self._taken_up) else config
        self._stayed = False
        self._at = 0.0
        self._pauses.reset()
        if self.next is None:
            self.take_back()
        else:
            self._say("" if self._followed else WAITS)

    def stay(self, reason: str) -> None:
        """Have none be the next, as the one of the files cannot be, and say why."""
        self.next, self._stayed = None, True
        self.refuse(reason)

    def follow(self) -> None:
        """From now on there is a loop that takes up the next one."""
        self._followed = True

    def wait(self) -> None:
        """Until all is looked at again nothing is taken up; say so where something is to be."""
        self._followed = False
        if self.next is not None and not self._account.stale:
            self._say(WAITS)

    def begin(self, config: Config) -> None:
        """Take in that a configuration is being taken up, until ``end``."""
        self._taken_up, self._stayed = config, False

    def end(self) -> None:
        """Take in that it is in use, or was refused."""
        self._taken_up = None

    def succeed(self) -> None:
        """Take in that the one that is being taken up is in use."""
        self._count()
        self._pauses.reset()
        if not self._stayed:
            self._account.stale = ""

    def take_back(self) -> None:
        """Take in that the files have again what is in use."""
        if self._account.stale:
            self._account.stale = ""
            self._count()
            self._tell()

    def refuse(self, reason: str) -> None:
        """Say why a configuration is not used; the same once."""
        if reason != self._account.stale:
            self._tally.failed_reloads += 1
            self._account.stale = reason
            log.error(Event("not-reloaded", reason=reason))
            self._tell()

    def refuse_for_now(self, config: Config, error: FirewallError | OSError) -> None:
        """Refuse a configuration, and try it again later where that may pass, unless another came meanwhile."""
        if self._stayed:
            return
        self.refuse(str(error))
        if self.next is None and not isinstance(error, LASTING):
            self.next, self._at = config, time.monotonic() + self._pauses.pause()

    def _say(self, reason: str) -> None:
        if self._account.stale != reason:
            self._account.stale = reason
            self._tell()

    def _count(self) -> None:
        self._tally.reloads += 1
        self._account.reloaded_at = time.time()
