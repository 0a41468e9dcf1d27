"""What a configuration is carried out with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from .config import Config
from .dataplane import Dataplane
from .firewall import Firewall
from .firewall.alarm import Alarm
from .model import Family


@dataclass(frozen=True)
class Ground:
    """The tables of each family, what keeps them in line, and who tells when others write there.

    ``reserve_limit`` is how many host ports may be held by sockets.
    """

    firewalls: Mapping[Family, Firewall]
    dataplane: Dataplane
    alarm: Alarm | None
    reserve_limit: int

    async def close(self) -> None:
        """Give up what it holds, but no rules and no host ports."""
        if self.alarm is not None:
            self.alarm.close()
        await self.dataplane.close()


#: Makes ready what a configuration takes. Raises ``FirewallError``, and ``OSError`` where no file may be opened.
Prepare = Callable[[Config], Awaitable[Ground]]
