"""A socket that holds one host port, and answers nobody. It meets only what the rules do not take:

- TCP: bound, and not listening: a client is refused at once. Such a socket is in no /proc/net/tcp; ``ss`` shows it from
  iproute2 6.8 and Linux 6.8 on, with ``--bound-inactive``.
- UDP: bound, with a filter that drops everything: a datagram vanishes, without ICMP, and nothing is queued.
- SCTP: bound, where the kernel has it.

IPv6 sockets are for IPv6 alone. No socket keeps SO_REUSEADDR or SO_REUSEPORT, so nobody else can bind the port.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
import struct
import sys
from typing import NamedTuple

from .model import Protocol

#: Files that the daemon may have open beside its reservations.
OTHER_FILES = 256

_KINDS = {
    Protocol.TCP: (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    Protocol.UDP: (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    Protocol.SCTP: (socket.SOCK_STREAM, 132),  # IPPROTO_SCTP, which not every Python has
}

# One instruction of classic BPF, "return 0": take no byte of the packet (linux/filter.h). The struct that points to it
# is read by the kernel during the call only.
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_RETURN_0 = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0), 8)
_DROP_ALL = struct.pack("HP", 1, ctypes.addressof(_RETURN_0))


class Cell(NamedTuple):
    """What one socket holds. There are thousands, and an address as text is quicker to look up and to bind."""

    protocol: Protocol
    address: str
    port: int


def bind(cell: Cell, reuse: bool) -> socket.socket:
    """Return a socket that holds ``cell``, bound with SO_REUSEADDR or without, and without it from then on."""
    family = socket.AF_INET6 if ":" in cell.address else socket.AF_INET
    one = socket.socket(family, *_KINDS[cell.protocol])
    try:
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if cell.protocol is Protocol.UDP:
            one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _DROP_ALL)  # before the first datagram can come
        if reuse:
            set_reuse(one, True)
        one.bind((cell.address, cell.port))
        if reuse:
            set_reuse(one, False)
    except BaseException:
        one.close()
        raise
    return one


def adopted(file: int) -> tuple[Cell, socket.socket]:
    """Return what a file holds that was opened by ``bind``, and its socket. Raises OSError where it is another's.

    That one is closed.
    """
    try:
        one = socket.socket(fileno=file)
    except OSError:
        os.close(file)
        raise
    try:
        protocol = next((its for its, kind in _KINDS.items() if kind == (one.type, one.proto)), None)
        if protocol is None or one.family not in (socket.AF_INET, socket.AF_INET6):
            raise OSError(errno.EPROTONOSUPPORT, "no socket for a host port")
        address, port = one.getsockname()[:2]
        if not port or _is_in_use(one):
            raise OSError(errno.EINVAL, "no socket that holds a port and no more")
        if one.family == socket.AF_INET6 and not one.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            raise OSError(errno.EINVAL, "a socket for both families")
        # As ``bind`` leaves it, though its process may have been killed in the middle of something.
        set_reuse(one, False)
        if protocol is Protocol.UDP:
            one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _DROP_ALL)
    except BaseException:
        one.close()
        raise
    return Cell(protocol, address, port), one


def _is_in_use(one: socket.socket) -> bool:
    """Whether a socket listens or is connected."""
    if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return True
    try:
        one.getpeername()
    except OSError as error:
        return error.errno != errno.ENOTCONN
    return True


def set_reuse(one: socket.socket, reuse: bool) -> None:
    """Set or take back SO_REUSEADDR."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)


def allow_sockets(limit: int) -> int:
    """Raise RLIMIT_NOFILE to what ``limit`` sockets need, as far as its hard limit goes; return how many then fit.

    It is never lowered. The programs that the daemon starts inherit it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = limit + OTHER_FILES if hard == resource.RLIM_INFINITY else min(limit + OTHER_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return limit if soft == resource.RLIM_INFINITY else max(0, min(limit, soft - OTHER_FILES))


def inheritable_sockets() -> int:
    """Return how many sockets this process could have been started with, and still have opened what it needs.

    To be asked before ``allow_sockets``: the next run begins with the limit that this one began with.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(0, soft - OTHER_FILES)
