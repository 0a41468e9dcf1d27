"""What is seen of a node: the daemon's word and the kernel's tables, and containerd where no daemon answers."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import ps, status
from .lines import Failure, one_line
from .terminal import complain, remarks, rendered, table

if TYPE_CHECKING:
    from .config import Config
    from .status import Status

#: Seconds between two looks of ``watch``, and for how many times as long as one took it pauses at least.
PAUSE, SHARE = 1.0, 4


@dataclass(frozen=True)
class Seen:
    """What was seen, of that what is to be shown, and what there is to say of how it was seen.

    ``absent`` is why the daemon said nothing, empty where it did; ``silent`` for how many seconds it has not come
    round, ``trouble`` why the kernel could not be asked.
    """

    status: Status
    chosen: ps.Filter
    absent: str = ""
    silent: float = 0.0
    trouble: str = ""
    notes: list[str] = field(default_factory=list)

    def show(self, wide: bool, as_json: bool) -> None:
        """Print it."""
        for note in self.notes:
            complain(note)
        if as_json:
            click.echo(self.status.to_json())
        else:
            table(self.status, wide)

    def verdict(self) -> tuple[bool, str]:
        """Return whether all is as declared, and one line that says so."""
        return ps.verdict(self.status, self.absent, self.silent, self.trouble, bool(self.chosen))


def look(directory: Path, load: Callable[[], Config], chosen: ps.Filter) -> Seen:
    """Look at a node; ``load`` has the configuration, which it takes without a daemon alone. Raises ``Failure``."""
    running = status.is_running(directory)
    current = status.read(directory) if running else None
    if current is None or not current.running:
        absent = absence(running)
        if os.geteuid() != 0:
            raise Failure("ctrport ps, while no daemon answers, needs root: it works with the kernel's tables")
        seen = without_daemon(load(), directory)
        return Seen(chosen.of(seen), chosen, absent, notes=[f"{absent}; this is what can be seen without it"])
    silent, notes = status.silent_for(directory), list[str]()
    if silent > ps.HANGS:
        notes.append(f"the daemon hangs: it has not come round for {silent:.0f} s, and said this before")
    current, trouble = _compared(current, directory)
    if current.kernel.startswith("not asked"):
        notes.append(f"the kernel was {current.kernel}; this is the daemon's word")
    return Seen(chosen.of(current), chosen, "", silent, trouble, notes)


def absence(running: bool) -> str:
    """Say why there is no word of the daemon's."""
    return "the daemon is just starting, or cannot write its status" if running else "the daemon is down"


def _compared(current: Status, directory: Path) -> tuple[Status, str]:
    """Return the daemon's word with what the kernel holds of it, and what went wrong."""
    if os.geteuid() != 0:
        return replace(current, kernel="not asked: that takes root"), ""
    import asyncio

    from . import installed
    from .firewall import FirewallError

    try:
        return asyncio.run(installed.compared(current, lambda: status.read(directory))), ""
    except installed.NotComparable as reason:
        return replace(current, kernel=f"not asked: {reason}"), ""
    except FirewallError as error:
        return replace(current, kernel=f"not asked: {error}"), str(error)


def without_daemon(config: Config, directory: Path) -> Status:
    """Return what would be published, and what of it the kernel holds. Raises ``Failure``."""
    import asyncio

    from .firewall.backends import firewalls
    from .firewall.detect import choose
    from .report import without_daemon
    from .run import layout

    async def work() -> Status:
        backend = (await choose(config.firewall.backend)).backend
        shape = layout(config)
        return await without_daemon(config, await firewalls(shape, backend), shape, directory)

    return asyncio.run(work())


def watch(look: Callable[[], Seen], wide: bool, count: int | None) -> None:
    """Show what is seen each time that it changes, ``count`` times or until it is interrupted.

    A terminal is drawn anew, with the times and connections as they are. Elsewhere each state of things is a block of
    lines, with an empty line in between.
    """
    drawn = sys.stdout.isatty()
    before: object = None
    with contextlib.suppress(KeyboardInterrupt):
        while count is None or count > 0:
            began = time.monotonic()
            try:
                seen = look()
                notes, rest = map(one_line, seen.notes), map(one_line, remarks(seen.status))
                lines = [*notes, *rendered(seen.status, wide), *rest]
                how = (seen.absent, seen.silent > ps.HANGS, seen.trouble)
                state: object = lines if drawn else (how, _without_counts(seen.status))
            except Failure as error:
                lines, state = [one_line(str(error))], str(error)
            if state != before:
                if drawn:
                    click.clear()
                elif before is not None:
                    click.echo()
                for line in lines:
                    click.echo(line)
                before = state
                count = None if count is None else count - 1
            if count != 0:
                time.sleep(max(PAUSE, SHARE * (time.monotonic() - began)))


def _without_counts(current: Status) -> Status:
    """Return what of a status is worth a block of its own: not that there was another connection."""
    return replace(
        current,
        updated="",
        events=0,
        transactions=0,
        publications=[replace(its, connections=None, bytes=None) for its in current.publications],
        undeclared=[replace(its, connections=0, bytes=0) for its in current.undeclared],
    )
