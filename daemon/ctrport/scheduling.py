"""How soon the kernel lets the daemon go on when there is something for it, and how exactly it wakes it by the clock.

A container's start keeps every processor of a small node busy: its runtime, its own program, and the daemon is woken in
the midst of it. Who asks for short turns is let in before those with long ones have used theirs up (EEVDF, since Linux
6.12), and has no more of the processor for that: no priority is taken.

What wakes up often for nothing costs little if that need not be on time: the kernel does it together with something
else that it wakes up for.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
from collections.abc import Iterator

#: The turn that is asked for, in nanoseconds: the shortest there is. Usual are some milliseconds.
TURN = 100_000

# sched_setattr(2), which libc has only since glibc 2.41. The numbers of asm/unistd.h.
_NUMBERS = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "ppc64le": 355, "s390x": 345, "armv7l": 380, "i686": 351}
# struct sched_attr (linux/sched/types.h): size, policy, flags, nice, priority, runtime, deadline, period.
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
_SCHED_OTHER = 0

_SET_SLACK, _GET_SLACK = 29, 30  # PR_SET_TIMERSLACK, PR_GET_TIMERSLACK, linux/prctl.h

_LIBC = ctypes.CDLL(None, use_errno=True)


def ask_for_short_turns() -> bool:
    """Ask for them, for this thread and all that it starts; return whether that was taken. Older kernels ignore it."""
    number = _NUMBERS.get(platform.machine())
    if number is None or os.sched_getscheduler(0) != _SCHED_OTHER:  # somebody has arranged it otherwise
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = ctypes.create_string_buffer(
        _ATTRIBUTES.pack(_ATTRIBUTES.size, _SCHED_OTHER, 0, nice, 0, TURN, 0, 0), _ATTRIBUTES.size
    )
    return bool(_LIBC.syscall(number, 0, attributes, 0) == 0)


@contextlib.contextmanager
def late_threads(seconds: float) -> Iterator[None]:
    """Have the threads that are started within, and by those, woken by the clock as late as this; by all else at once.

    Usual are 50 us. Under a real-time policy there is no such thing.
    """
    before = slack()
    _LIBC.prctl(_SET_SLACK, ctypes.c_ulong(round(seconds * 1e9)), 0, 0, 0)
    try:
        yield
    finally:
        _LIBC.prctl(_SET_SLACK, ctypes.c_ulong(before), 0, 0, 0)


def slack() -> int:
    """Return how many nanoseconds late this thread may be woken by the clock."""
    return int(_LIBC.prctl(_GET_SLACK, 0, 0, 0, 0))
