"""Somebody else wrote into the kernel's tables: when to look whether ours is still there.

nf_tables announces every commit, with the process that made it. Legacy tables announce nothing: their sizes are asked
for every few seconds, at the cost of a system call a table.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Protocol

from ..model import Family
from ..nfnetlink import Announcements, Writer
from ..rules import Table
from .detect import legacy_tables


class Alarm(Protocol):
    """Tells of each time that others may have changed the tables: who, where that is known, else None."""

    def __aiter__(self) -> AsyncIterator[Writer | None]: ...

    def disregard(self, writer: Writer, commits: int) -> None:
        """What this process is about to write is ours, in so many commits."""
        ...

    def close(self) -> None:
        """Give up what it holds."""
        ...


class NftAlarm:
    """Listens to what nf_tables announces, from when this was made on. Raises ``OSError``.

    The kernel numbers processes as the first pid namespace does. In another (a node made of containers) so many commits
    under the name that the writer of ours has are taken for its own.
    """

    def __init__(self) -> None:
        self._announcements = Announcements()
        self._numbers_known = os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE
        self._ours = deque[Writer](maxlen=64)  # the last ones: a number is used again, if not soon
        self._expected: dict[str, int] = {}

    def disregard(self, writer: Writer, commits: int) -> None:
        """See ``Alarm.disregard``."""
        if writer in self._ours:  # this process may write several times before any of it is announced
            self._expected[writer.name] = self._expected.get(writer.name, 0) + commits
        else:
            self._ours.append(writer)
            self._expected[writer.name] = commits

    def close(self) -> None:
        """See ``Alarm.close``."""
        self._announcements.close()

    async def __aiter__(self) -> AsyncIterator[Writer | None]:
        """See ``Alarm``."""
        async for writer in self._announcements:
            if writer is None or not self._is_ours(writer):
                yield writer

    def _is_ours(self, writer: Writer) -> bool:
        if self._numbers_known:
            return any(writer.pid == ours.pid for ours in self._ours)
        if not self._expected.get(writer.name):
            return False
        self._expected[writer.name] -= 1
        return True


class LegacyAlarm:
    """Compares how many rules the legacy tables hold, and of what length, with what they held before."""

    def __init__(self, families: Iterable[Family], interval: float) -> None:
        self._families = tuple(families)
        self._interval = interval

    def disregard(self, writer: Writer, commits: int) -> None:
        """See ``Alarm.disregard``. Not to be told here: a look in vain after a change of ours."""

    def close(self) -> None:
        """See ``Alarm.close``: there is nothing."""

    async def __aiter__(self) -> AsyncIterator[Writer | None]:
        """See ``Alarm``."""
        before = self._sizes()
        while True:
            await asyncio.sleep(self._interval)
            try:
                now = self._sizes()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                continue  # no more files may be open: what changes meanwhile shows the next time
            if now != before:
                yield None
            before = now

    def _sizes(self) -> dict[tuple[Family, Table], bytes]:
        found = {}
        for family in self._families:
            there = legacy_tables(family)  # to ask for one that is not there would make it
            found.update({(family, table): _info(family, table) for table in Table if table in there})
        return found


_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO, linux/proc_ns.h

_LIBC = ctypes.CDLL(None, use_errno=True)
_SO_GET_INFO = 64  # IPT_SO_GET_INFO, IP6T_SO_GET_INFO
# struct ipt_getinfo (linux/netfilter_ipv4/ip_tables.h): the table's name, which hooks it has, where each begins and has
# its policy, how many entries there are, and their size.
_INFO = struct.Struct("32sI5I5III")


def _info(family: Family, table: Table) -> bytes:
    """Return what the kernel says of a legacy table without giving out its rules. Raises ``OSError``."""
    domain, level = (
        (socket.AF_INET, socket.IPPROTO_IP) if family is Family.IPV4 else (socket.AF_INET6, socket.IPPROTO_IPV6)
    )
    # getsockopt() that takes something in, which Python's does not.
    value = ctypes.create_string_buffer(table.value.encode(), _INFO.size)
    length = ctypes.c_uint32(_INFO.size)
    with socket.socket(domain, socket.SOCK_RAW, socket.IPPROTO_RAW) as asking:
        if _LIBC.getsockopt(asking.fileno(), level, _SO_GET_INFO, value, ctypes.byref(length)):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    return value.raw
