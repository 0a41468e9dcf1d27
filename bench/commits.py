"""When nf_tables took something over: the kernel's own announcement of each commit, with a time and its writer.

The kernel sends NEWGEN at the end of a commit, in the writer's system call: from then on packets meet the new rules.
The time is read where the announcement is received, so it includes waking this process up.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ctrport.scheduling import ask_for_short_turns
from embedded.host import Host, inside
from embedded.wait import eventually

_NETLINK_NETFILTER = 12  # linux/netlink.h
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1
_NFNLGRP_NFTABLES = 7  # linux/netfilter/nfnetlink.h
_NEWGEN = 10 << 8 | 15  # NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWGEN
_GEN_PROC_NAME = 3  # linux/netfilter/nf_tables.h: NFTA_GEN_PROC_NAME
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h; past the machine's limit, as a full buffer would lose a commit
_BUFFER = 4 << 20
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
#: Seconds without a commit after which a writer's last one is known to be its last.
QUIET = 0.15


@dataclass(frozen=True)
class Commit:
    """One commit: when it was heard of, in ns since the epoch, and the first 15 characters of the writer's name."""

    at: int
    writer: str


class Commits:
    """Listens to the commits in a host's network namespace. To be used as a context manager."""

    def __init__(self, host: Host) -> None:
        self._seen: list[Commit] = []
        self._failed: OSError | None = None
        self._socket = inside(host.pid, ("net",), listening)
        self._socket.settimeout(0.2)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Commits:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()
        self._socket.close()

    def last(self, writers: Collection[str], since: int) -> int:
        """Return when the last commit of these writers since a time was heard of, once it is quiet.

        Raises ``AssertionError`` without one.
        """

        def found() -> int | None:
            commits = self._of(writers, since)
            return commits[-1].at if commits and time.time_ns() - commits[-1].at > QUIET * 1e9 else None

        last = eventually(found, within=30, what=f"a commit by {' or '.join(sorted(writers))}")
        assert last is not None
        return last

    def last_until(self, writers: Collection[str], since: int, until: int) -> int:
        """Return when the last commit of these writers was heard of between two times, the second of which is past.

        Raises ``AssertionError`` without one.
        """

        def found() -> list[Commit]:
            return [commit for commit in self._of(writers, since) if commit.at <= until]

        return eventually(found, within=5, what=f"a commit by {' or '.join(sorted(writers))}")[-1].at

    def first(self, writers: Collection[str], since: int) -> int:
        """Return when the first commit of these writers since a time was heard of. Raises ``AssertionError``."""
        what = f"a commit by {' or '.join(sorted(writers))}"
        return eventually(lambda: self._of(writers, since), within=5, what=what)[0].at

    def _of(self, writers: Collection[str], since: int) -> list[Commit]:
        if self._failed is not None:
            raise self._failed
        return [commit for commit in tuple(self._seen) if commit.at >= since and commit.writer in writers]

    def _listen(self) -> None:
        ask_for_short_turns()  # for this thread alone, so that what is heard is not late
        while not self._end.is_set():
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError as error:
                self._failed = OSError(error.errno, f"commits were missed: {errno.errorcode.get(error.errno or 0)}")
                return
            at = time.time_ns()
            self._seen += (Commit(at, writer) for writer in writers(data))


def listening() -> socket.socket:
    """Return a socket that is told of each commit in the network namespace that it was made in: see ``writers``."""
    listening = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    try:
        # The changes themselves are announced too, tens of thousands at times: the kernel is to keep them.
        program = ctypes.create_string_buffer(_ONLY_NEWGEN)
        count = len(_ONLY_NEWGEN) // 8
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", count, ctypes.addressof(program)))
        listening.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        listening.bind((0, 0))
        listening.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
    except BaseException:
        listening.close()
        raise
    return listening


# Classic BPF (linux/filter.h): load the kind of the message, two bytes at 4; take it whole where it is NEWGEN. BPF
# reads numbers as big endian, whatever they are.
_ONLY_NEWGEN = b"".join(
    struct.pack("=HBBI", *instruction)
    for instruction in (
        (0x28, 0, 0, 4),
        (0x15, 0, 1, int.from_bytes(struct.pack("=H", _NEWGEN), "big")),
        (0x06, 0, 0, 0xFFFFFFFF),
        (0x06, 0, 0, 0),
    )
)


def writers(data: bytes) -> Iterator[str]:
    """Yield who wrote, for each NEWGEN in what was received: there are the changes themselves beside it."""
    for kind, body in _messages(data):
        if kind == _NEWGEN:
            attributes = dict(_attributes(body[4:]))  # past the nfgenmsg
            yield attributes.get(_GEN_PROC_NAME, b"").rstrip(b"\0").decode(errors="replace")


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 16:
        length, kind = struct.unpack_from("=IH", data)
        if length < 16:
            return
        yield kind, data[16:length]
        data = data[length + 3 & ~3 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            return
        yield kind & 0x3FFF, data[4:length]
        data = data[length + 3 & ~3 :]
