"""`make boot`: the unit under a real systemd, step by step, in a Debian that is booted for it and then thrown away.

    python -m tests.boot             # installed with make, from the sources
    python -m tests.boot archive     # installed from the archive of `make dist`

Prints a line a step, with what was seen. Exit status: 0 all was as it should be, 1 not, at the step it says.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from embedded.host import CommandError
from tests.boot.machine import Machine, missing
from tests.boot.steps import ARCHIVE_STEPS, STEPS
from tests.boot.tree import Unbuilt, tree, wheels
from tests.boot.world import UNIT, World

#: Seconds that one step may take.
LIMIT = 300


def main() -> int:
    """Return the exit status."""
    reason = missing()
    if reason is not None:
        print(f"boot: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGALRM, _too_long)
    began = time.monotonic()
    steps = ARCHIVE_STEPS if sys.argv[1:] == ["archive"] else STEPS
    try:
        root = tree(_say)
        found = wheels(root, _say)
        with tempfile.TemporaryFile("w+") as console, Machine(root, console) as machine:
            world = World(machine, found)
            if not all(_tried(step, world) for step in steps):
                return 1
    except (Unbuilt, AssertionError, CommandError, OSError) as error:
        print(f"boot: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("boot: interrupted; the machine is removed", file=sys.stderr)
        return 130
    _say(f"{len(steps)} steps, {time.monotonic() - began:.0f} s; the machine is removed")
    return 0


def _tried(step: Callable[[World], str], world: World) -> bool:
    title, began = step.__name__.replace("_", " "), time.monotonic()
    signal.alarm(LIMIT)
    try:
        seen = step(world)
    except Exception as error:
        _say(f"FAIL {time.monotonic() - began:5.1f} s  {title}: {error!r}")
        with contextlib.suppress(CommandError):
            last = world.machine.journal(UNIT).splitlines()[-20:]
            print(*(f"    {line}" for line in last), sep="\n", file=sys.stderr)
        return False
    finally:
        signal.alarm(0)
    _say(f"ok   {time.monotonic() - began:5.1f} s  {title}: {seen}")
    return True


def _say(text: str) -> None:
    print(text, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _too_long(number: int, frame: FrameType | None) -> NoReturn:
    raise AssertionError(f"not done after {LIMIT} s")


if __name__ == "__main__":
    sys.exit(main())
