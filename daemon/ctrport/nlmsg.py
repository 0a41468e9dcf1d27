"""Netlink's messages: a question and its answer, a list, attributes; whichever part of the kernel is asked.

Numbers are those of linux/netlink.h. The kernel answers within the system call that asks, so nothing here waits.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

_ERROR, _DONE = 2, 3
REQUEST, ACK, DUMP = 1, 4, 0x300
_DUMP_INTERRUPTED = 0x10
NESTED = 0x8000
_HEADER = struct.Struct("=IHHII")  # length, kind, flags, the question's number, who it is for


class Interrupted(Exception):
    """What was being listed changed meanwhile: the list may have it twice, or not at all."""


class Conversation:
    """Asks one part of the kernel (``protocol``) about the network namespace that it was made in.

    Raises ``OSError`` as the kernel refuses.
    """

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))
        self._socket.settimeout(1.0)  # never, as long as the kernel answers within the call
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
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def each_attribute(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the kind and the value of each attribute."""
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        yield kind & 0x3FFF, data[4:length]  # without the flags NLA_F_NESTED and NLA_F_NET_BYTEORDER
        data = data[(length + 3) & ~3 :]


def read_attributes(data: bytes) -> dict[int, bytes]:
    """Return the value of each attribute by its kind; of several of one kind the last."""
    return dict(each_attribute(data))


def text(data: bytes) -> str:
    """Return the text that an attribute holds."""
    return data.rstrip(b"\0").decode(errors="replace")


def _refuse(said: bytes, at: int) -> None:
    code = -struct.unpack_from("=i", said, at + _HEADER.size)[0]
    if code:
        raise OSError(code, os.strerror(code))
