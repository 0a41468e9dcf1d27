"""Netlink's messages: a question and its answer, a list, several in one go; whichever part of the kernel is asked.

Numbers are those of linux/netlink.h. The kernel answers within the system call that asks, so nothing here waits.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_ERROR, _DONE = 2, 3
REQUEST, ACK, DUMP = 1, 4, 0x300
# What a message that makes something is to do where that is there already.
EXCLUSIVE, CREATE, APPEND = 0x200, 0x400, 0x800
_DUMP_INTERRUPTED = 0x10
NESTED = 0x8000
_ATTRIBUTE = struct.Struct("=HH")  # length, kind
_HEADER = struct.Struct("=IHHII")  # length, kind, flags, the question's number, who it is for


NETFILTER = 12  # NETLINK_NETFILTER, which not every Python has

_SOL_NETLINK, _CAP_ACK = 270, 10  # linux/socket.h
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h


class Interrupted(Exception):
    """What was being listed changed meanwhile: the list may have it twice, or not at all."""


class Rejected(OSError):
    """One of several messages was refused: the one at ``index``, the first such."""

    def __init__(self, code: int, index: int) -> None:
        super().__init__(code, os.strerror(code))
        self.index = index


@dataclass(frozen=True)
class Message:
    """What is sent: ``kind`` as that part of the kernel numbers it, and what stands behind the header."""

    kind: int
    body: bytes
    flags: int = 0


class Conversation:
    """Asks one part of the kernel (``protocol``) about the network namespace that it was made in.

    Raises ``OSError`` as the kernel refuses.
    """

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))
        self._socket.settimeout(1.0)  # never, as long as the kernel answers within the call
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)  # an error is to come without the message that it is about
        self._asked = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def ask(self, kind: int, body: bytes, flags: int = REQUEST) -> bytes:
        """Ask one question and return the answer without its header; empty where there is nothing to say but yes."""
        self._send(kind, body, flags)
        while True:
            answer = self._socket.recv(1 << 16)
            length, its, _, asked, _ = _HEADER.unpack_from(answer)
            if asked != self._asked:
                continue  # the late answer to a question that was given up
            if its == _ERROR:
                _refuse(answer, 0)
                return b""
            return answer[_HEADER.size : length]

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """Ask for a list, and yield each of its messages without its header. Raises ``Interrupted`` at its end."""
        self._send(kind, body, REQUEST | DUMP)
        interrupted = 0
        while True:
            said, at = self._socket.recv(1 << 16), 0
            while at + _HEADER.size <= len(said):
                length, its, flags, asked, _ = _HEADER.unpack_from(said, at)
                if asked == self._asked:
                    interrupted |= flags & _DUMP_INTERRUPTED
                    if its == _DONE:
                        if interrupted:
                            raise Interrupted
                        return
                    if its == _ERROR:
                        _refuse(said, at)
                    yield said[at + _HEADER.size : at + length]
                at += (length + 3) & ~3

    def together(self, messages: Sequence[Message]) -> None:
        """Send messages in one go, and return when those that ask for an ACK have it.

        Raises ``Rejected`` where one is refused; what becomes of the others then is that part of the kernel's affair.
        """
        first = self._asked + 1
        due = {number for number, one in enumerate(messages, first) if one.flags & ACK}
        said = b"".join(
            _HEADER.pack(_HEADER.size + len(one.body), one.kind, REQUEST | one.flags, number, 0) + _padded(one.body)
            for number, one in enumerate(messages, first)
        )
        self._asked += len(messages)
        self._make_room(len(said))
        self._socket.send(said)
        refused: dict[int, int] = {}
        while True:
            try:
                # Below a timeout of Python's a socket does not block: all that is said of it is there by now.
                answer, at = os.read(self._socket.fileno(), 1 << 16), 0
            except BlockingIOError:
                break
            while at + _HEADER.size <= len(answer):
                length, its, _, asked, _ = _HEADER.unpack_from(answer, at)
                if its == _ERROR and asked >= first:
                    code = -struct.unpack_from("=i", answer, at + _HEADER.size)[0]
                    due.discard(asked)
                    if code:
                        refused[asked - first] = code
                at += (length + 3) & ~3
        if refused:
            index = min(refused)
            raise Rejected(refused[index], index)
        if due:
            raise OSError(errno.EPROTO, "the kernel did not answer")

    def _make_room(self, length: int) -> None:
        """Have the socket take a message of this length: what it takes otherwise is some 1,500 elements of a set."""
        if length > self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - 1024:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, length + 1024)  # the kernel doubles it

    def _send(self, kind: int, body: bytes, flags: int) -> None:
        self._asked += 1
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, self._asked, 0) + body)


def messages(said: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the kind of each message that was received, and what is behind its header."""
    at = 0
    while at + _HEADER.size <= len(said):
        length, kind = struct.unpack_from("=IH", said, at)
        yield kind, said[at + _HEADER.size : at + length]
        at += max(_HEADER.size, (length + 3) & ~3)


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute as it is sent."""
    return struct.pack("=HH", 4 + len(value), kind) + _padded(value)


def _padded(value: bytes) -> bytes:
    return value + b"\0" * (-len(value) % 4)


def each_attribute(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the kind and the value of each attribute."""
    at, end = 0, len(data)
    while end - at >= 4:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < 4:
            break
        yield kind & 0x3FFF, data[at + 4 : at + length]  # without the flags NLA_F_NESTED and NLA_F_NET_BYTEORDER
        at += (length + 3) & ~3


def read_attributes(data: bytes) -> dict[int, bytes]:
    """Return the value of each attribute by its kind; of several of one kind the last."""
    # As each_attribute() says, and here again: a device has forty, and three are looked at before a port is open.
    found: dict[int, bytes] = {}
    at, end, unpack = 0, len(data), _ATTRIBUTE.unpack_from
    while end - at >= 4:
        length, kind = unpack(data, at)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


def text(data: bytes) -> str:
    """Return the text that an attribute holds."""
    return data.rstrip(b"\0").decode(errors="replace")


def _refuse(said: bytes, at: int) -> None:
    code = -struct.unpack_from("=i", said, at + _HEADER.size)[0]
    if code:
        raise OSError(code, os.strerror(code))
