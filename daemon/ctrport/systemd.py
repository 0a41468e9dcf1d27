"""What systemd is told of the daemon, and what it keeps for it: the few lines of sd_notify(3) and sd_listen_fds(3)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import select
import socket
import time
from array import array
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import count, islice
from typing import Any

#: Files that one message can carry: SCM_MAX_FD of the kernel.
FILES_A_MESSAGE = 253
#: Characters that the names of all files may have together, each with a colon behind it. They come back in a single
#: variable of the environment, and with one of 128 KiB (MAX_ARG_STRLEN) the kernel would not start the service again.
LENGTH_OF_NAMES = 120_000
#: Seconds to wait for a manager that does not read what it is told, and between two tries.
PATIENCE, PAUSE = 1.0, 0.002

_FIRST_FILE = 3  # SD_LISTEN_FDS_START
_NO_ROOM = (errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS)  # the last one: too many files are on their way


def notify(*assignments: str) -> None:
    """Send assignments such as ``READY=1`` or ``STATUS=...`` to the service manager, if one listens.

    What cannot be told is not worth failing for.
    """
    _send(manager(), *assignments)


def watchdog() -> None:
    """Tell the service manager that the loop has come round once more, where it wants to hear of that.

    Where it does not read it is not waited for: it will hear of the next time.
    """
    if os.environ.get("WATCHDOG_USEC") and os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
        _send(manager(), "WATCHDOG=1", wait=False)


def manager() -> str:
    """Return the address of the socket at which the service manager listens; empty where none does."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):
        return "\0" + address[1:]  # an abstract socket
    return address if address.startswith("/") else ""


def under_journal() -> bool:
    """Whether what is written to stderr goes to the journal, where each line may begin with its priority."""
    return "JOURNAL_STREAM" in os.environ


def received() -> list[tuple[str, int]]:
    """Return the files that the service manager has handed to this process, each with the name it has there.

    They are this process's to close, and no child of it gets them. A second call returns nothing.
    """
    pid, number, names = (os.environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not re.fullmatch("[0-9]{1,6}", number):
        return []
    files = range(_FIRST_FILE, _FIRST_FILE + int(number))
    named = names.split(":")
    if len(named) != len(files):
        named = ["unknown"] * len(files)  # as sd_listen_fds_with_names() calls them
    found = []
    for name, file in zip(named, files, strict=True):
        with contextlib.suppress(OSError):  # not open
            os.set_inheritable(file, False)
            found.append((name, file))
    return found


class FileStore:
    """The files that the service manager holds for this service while none of its processes runs.

    Each goes in under a key of the caller's, and in a lot: with those that are likely to go together. The manager knows
    a lot by its name, and can only remove it whole; what is left of it then goes in anew. A file must stay open until
    it is removed. ``put`` and ``remove`` say what is to be held; ``flush`` sends what is not sent yet.

    ``address`` is the manager's; without one nothing is held. ``most`` is how many files are sent at most.
    """

    def __init__(self, address: str = "", most: int = 0) -> None:
        self._address = address
        self._most = most
        self._lots: dict[str, dict[Hashable, int]] = {}
        self._name_of: dict[Hashable, str] = {}
        self._length = 0
        self._sent: set[str] = set()  # the names under which the manager may hold something
        self._gone: dict[str, None] = {}  # those of them to be removed, before anything is sent under them again
        self._due: dict[str, int] = {}  # the lots to be sent, and how many files of each were sent already

    def __len__(self) -> int:
        """Return how many files the manager is to hold."""
        return len(self._name_of)

    def adopt(self, name: str, files: Mapping[Any, int], *, whole: bool) -> None:
        """Take over what the manager holds under ``name``; unless that is the ``whole``, the rest of it is removed."""
        self._sent.add(name)
        self._add(name, files)
        if not whole:
            self._gone[name] = None
            if files:
                self._due[name] = 0
            self._send_removals()

    def put(self, word: str, files: Mapping[Any, int]) -> None:
        """Have files held, as far as there is room for them, in a lot named after ``word``."""
        if not self._address:
            return
        name = next(name for name in _names(word) if name not in self._lots)
        room = min(self._most - len(self), (LENGTH_OF_NAMES - self._length) // (len(name) + 1))
        fitting = dict(islice(files.items(), max(0, room)))
        if fitting:
            self._add(name, fitting)
            self._due[name] = 0

    def remove(self, keys: Iterable[Hashable]) -> bool:
        """Have files held no more, and return whether the manager may hold any of them until it has read so."""
        was_sent = False
        for key in keys:
            name = self._name_of.pop(key, None)
            if name is None:
                continue
            self._length -= len(name) + 1
            lot = self._lots[name]
            del lot[key]
            if name in self._sent:
                self._gone[name] = None
                was_sent = True
            self._due[name] = 0
            if not lot:
                del self._lots[name], self._due[name]
        self._send_removals()
        return was_sent

    async def flush(self) -> None:
        """Send what is not sent yet; what the manager does not read within a second is left to the next call."""
        for _ in range(int(PATIENCE / PAUSE)):
            if self._send_all():
                return
            await asyncio.sleep(PAUSE)

    async def clear(self) -> None:
        """Have nothing held any more."""
        self.remove(list(self._name_of))
        await self.flush()

    def wait(self) -> None:
        """Wait until the manager has read all that it was told, but no longer than a second."""
        end = time.monotonic() + PATIENCE
        with contextlib.suppress(OSError), contextlib.ExitStack() as closing:
            ours, theirs = os.pipe()
            closing.callback(os.close, ours)
            try:
                # It reads in order, and closes what comes with this.
                while not (self._send_removals() and _send(self._address, "BARRIER=1", files=[theirs], wait=False)):
                    if time.monotonic() >= end:
                        return
                    time.sleep(PAUSE)
            finally:
                os.close(theirs)
            closed = select.poll()
            closed.register(ours, 0)  # POLLHUP comes unasked
            closed.poll(max(0.0, end - time.monotonic()) * 1000)

    def _add(self, name: str, files: Mapping[Any, int]) -> None:
        if files:
            self._lots[name] = dict(files)
            self._name_of.update(dict.fromkeys(files, name))
            self._length += (len(name) + 1) * len(files)

    def _send_removals(self) -> bool:
        for name in list(self._gone):
            if not _send(self._address, "FDSTOREREMOVE=1", f"FDNAME={name}", wait=False):
                return False
            del self._gone[name]
            self._sent.discard(name)
        return True

    def _send_all(self) -> bool:
        # Removals first: systemd ignores a file that it has already, under whatever name.
        if not self._send_removals():
            return False
        for name, begin in list(self._due.items()):
            files = list(self._lots[name].values())
            self._sent.add(name)
            for at in range(begin, len(files), FILES_A_MESSAGE):
                self._due[name], part = at, files[at : at + FILES_A_MESSAGE]
                # Without FDPOLL=0 it would drop a socket that is bound and no more, which says POLLHUP.
                if not _send(self._address, "FDSTORE=1", "FDPOLL=0", f"FDNAME={name}", files=part, wait=False):
                    return False
            del self._due[name]
        return True


def _names(word: str) -> Iterable[str]:
    yield word
    yield from (f"{word}-{number}" for number in count(2))


def _send(address: str, *assignments: str, files: Sequence[int] = (), wait: bool = True) -> bool:
    """Send a message; return False where the receiver has no room for it now, and it is not to ``wait``.

    One that cannot be sent at all counts as sent: another try would not be better.
    """
    if not address:
        return True
    message = "\n".join(line.replace("\n", " ") for line in assignments).encode(errors="backslashreplace")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", files))] if files else []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendmsg([message], rights, 0 if wait else socket.MSG_DONTWAIT, address)
    except OSError as error:
        return error.errno not in _NO_ROOM
    return True
