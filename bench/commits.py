"""When nf_tables took something over: the kernel's own announcement of each commit, with a time and its writer.

The kernel sends NEWGEN at the end of a commit, in the writer's system call: from then on packets meet the new rules.
The time is read where the announcement is received, so it includes waking this process up.
"""

from __future__ import annotations

import errno
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from embedded.host import Host, inside
from embedded.wait import eventually

_NETLINK_NETFILTER = 12  # linux/netlink.h
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1
_NFNLGRP_NFTABLES = 7  # linux/netfilter/nfnetlink.h
_NEWGEN = 10 << 8 | 15  # NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWGEN
_GEN_PROC_NAME = 3  # linux/netfilter/nf_tables.h: NFTA_GEN_PROC_NAME
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h; past the machine's limit, as a full buffer would lose a commit
_BUFFER = 4 << 20
#: Seconds without a commit after which a writer's last one is known to be its last.
QUIET = 0.03


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

    def last(self, writer: str, since: int) -> Commit:
        """Return a writer's last commit since that time, once it is quiet. Raises ``AssertionError`` without one."""

        def found() -> Commit | None:
            if self._failed is not None:
                raise self._failed
            commits = [commit for commit in tuple(self._seen) if commit.at >= since and commit.writer == writer]
            return commits[-1] if commits and time.time_ns() - commits[-1].at > QUIET * 1e9 else None

        commit = eventually(found, within=5, what=f"a commit by {writer}")
        assert commit is not None
        return commit

    def _listen(self) -> None:
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
        listening.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        listening.bind((0, 0))
        listening.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
    except BaseException:
        listening.close()
        raise
    return listening


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
