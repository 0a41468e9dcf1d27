"""What the kernel announces in a network namespace, a line each: commits of nf_tables, and addresses.

    python -m bench.heard

Runs until it is ended, with a real-time priority where it may have one: when something was heard is read here, so that
nothing else that this machine does, the benchmark least of all, is to hold it up. The lines, after a ``ready``:

    TIME commit WRITER      at the end of the commit, in the writer's system call; its name has 15 characters at most
    TIME address ADDRESS    of IPv4, also of a container whose network namespace has an id in ours

``TIME`` is in nanoseconds since the epoch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator

_NETLINK_NETFILTER = 12  # linux/netlink.h
_SOL_NETLINK, _ADD_MEMBERSHIP, _LISTEN_ALL_NSID = 270, 1, 8
_NFNLGRP_NFTABLES = 7  # linux/netfilter/nfnetlink.h
_NEWGEN = 10 << 8 | 15  # NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWGEN
_GEN_PROC_NAME = 3  # linux/netfilter/nf_tables.h: NFTA_GEN_PROC_NAME
_RTMGRP_IPV4_IFADDR, _RTM_NEWADDR, _IFA_LOCAL = 0x10, 20, 2  # linux/rtnetlink.h, linux/if_addr.h
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h; past the machine's limit, as a full buffer would lose a commit
_BUFFER = 4 << 20
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h


def main() -> None:
    """Write lines until it is ended, or by an ``OSError`` where a message was lost."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    commits, addresses = listening(), _listening_to_addresses()
    os.write(sys.stdout.fileno(), b"ready\n")
    poll = select.poll()
    for each in (commits, addresses):
        poll.register(each, select.POLLIN)
    while True:
        ready = {number for number, _ in poll.poll()}
        at = time.time_ns()
        # The address first: where both wait, it was first.
        if addresses.fileno() in ready:
            _say(at, "address", came(addresses.recv(1 << 16)))
        if commits.fileno() in ready:
            _say(at, "commit", writers(commits.recv(1 << 16)))


def _say(at: int, what: str, which: Iterator[str]) -> None:
    os.write(sys.stdout.fileno(), "".join(f"{at} {what} {each}\n" for each in which).encode())


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
        listening.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
    except BaseException:
        listening.close()
        raise
    return listening


def _listening_to_addresses() -> socket.socket:
    listening = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    listening.setsockopt(_SOL_NETLINK, _LISTEN_ALL_NSID, 1)
    listening.bind((0, _RTMGRP_IPV4_IFADDR))
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


def came(data: bytes) -> Iterator[str]:
    """Yield the addresses of IPv4 that came, by what was received."""
    for kind, body in _messages(data):
        local = dict(_attributes(body[8:])).get(_IFA_LOCAL) if kind == _RTM_NEWADDR else None  # past the ifaddrmsg
        if local is not None:
            yield socket.inet_ntoa(local)


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


if __name__ == "__main__":
    main()
