"""When a program was started, told by the kernel as its file is opened: nothing stands between it and who runs it."""

from __future__ import annotations

import ctypes
import os
import select
import threading
import time
from pathlib import Path

from ctrport.scheduling import ask_for_short_turns
from embedded.wait import eventually

_IN_OPEN = 0x20  # linux/inotify.h
_LIBC = ctypes.CDLL(None, use_errno=True)


class Execs:
    """Hears of each start of the program at ``path``, in whatever namespace. To be used as a context manager.

    A program whose file is shared with others on the machine would be heard of when these run it, too.
    """

    def __init__(self, path: Path) -> None:
        self._times: list[int] = []
        self._end, self._ended = os.pipe()
        self._inotify = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._inotify < 0 or _LIBC.inotify_add_watch(self._inotify, os.fsencode(path), _IN_OPEN) < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{path}: {os.strerror(code)}")
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Execs:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        os.write(self._ended, b".")
        self._thread.join()
        for file in (self._inotify, self._end, self._ended):
            os.close(file)

    def first(self, since: int) -> int:
        """Return when it was started for the first time since then. Raises ``AssertionError`` where it was not."""
        return eventually(lambda: [at for at in self._times if at >= since], within=5, what="a start of the program")[0]

    def _listen(self) -> None:
        ask_for_short_turns()  # for this thread alone, so that what is heard is not late
        while True:
            ready = select.select([self._inotify, self._end], [], [])[0]
            if self._end in ready:
                return
            at = time.time_ns()
            os.read(self._inotify, 1 << 16)
            self._times.append(at)
