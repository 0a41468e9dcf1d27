"""How soon the kernel lets the daemon go on when there is something for it.

A container's start keeps every processor of a small node busy: its runtime, its own program, and the daemon is woken in
the midst of it. Who asks for short turns is let in before those with long ones have used theirs up (EEVDF, since Linux
6.12), and has no more of the processor for that: no priority is taken.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

#: The turn that is asked for, in nanoseconds: the shortest there is. Usual are some milliseconds.
TURN = 100_000

# sched_setattr(2), which libc has only since glibc 2.41. The numbers of asm/unistd.h.
_NUMBERS = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "ppc64le": 355, "s390x": 345, "armv7l": 380, "i686": 351}
# struct sched_attr (linux/sched/types.h): size, policy, flags, nice, priority, runtime, deadline, period.
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
_SCHED_OTHER = 0

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
