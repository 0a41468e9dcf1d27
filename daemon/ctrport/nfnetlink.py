"""What nf_tables tells over netlink: which rules a chain holds, and that somebody changed something.

The rules that iptables-nft writes are rules of nf_tables, each with its comment in it as iptables' own extension holds
it. So the few chains that matter are looked at in 1.5 ms a thousand rules, whatever else there is, where starting
``iptables-nft -S`` alone takes 3 ms a chain. What is not told is a rule in iptables' words.

Numbers are those of linux/netfilter/nf_tables.h and linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import re
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass

from .nlmsg import Conversation, Interrupted, attribute, each_attribute, messages, read_attributes, text

_NETFILTER = 12  # NETLINK_NETFILTER, which not every Python has
_GROUP_NFTABLES = 7
_GETTABLE, _GETCHAIN, _GETRULE, _NEWGEN = ((10 << 8) | number for number in (1, 4, 7, 15))
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}  # NFPROTO_*, linux/netfilter.h
_TRIES = 5

# A match called comment holds 256 bytes, so its attribute (NFTA_MATCH_INFO) has 260. Searched for rather than taken
# apart, as a rule has some ten expressions, and there are thousands of rules.
_COMMENT = re.compile(re.escape(struct.pack("=HH", 260, 3)) + rb"([^\0]{1,255})\0")
_MATCH = attribute(1, b"comment\0")

_VERDICTS = {0: "DROP", 1: "ACCEPT", -3: "", -4: "", -5: "RETURN"}


@dataclass(frozen=True)
class Writer:
    """The process that changed something, under the name it has for the kernel (at most 15 characters)."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


class NfTables(Conversation):
    """Asks about the nf_tables of the network namespace it was made in. Raises ``OSError`` as the kernel refuses."""

    def __init__(self) -> None:
        super().__init__(_NETFILTER)

    def tables(self) -> list[tuple[str, str]]:
        """Return the family, in nft's word, and the name of every table."""
        found: list[tuple[str, str]] = []
        with contextlib.suppress(Interrupted):
            for message in self.dump(_GETTABLE, struct.pack("=BBH", 0, 0, 0)):
                family = _FAMILIES.get(message[0], str(message[0]))
                found.append((family, text(read_attributes(message[4:]).get(1, b""))))
        return found

    def rules(self, family: int, table: str, chain: str) -> list[bytes] | None:
        """Return the rules of a chain in their order, for ``comment`` and ``target``; None where there is no chain.

        ``family`` is AF_INET or AF_INET6. Raises ``Interrupted`` where others change the tables all the time.
        """
        head = struct.pack("=BBH", family, 0, 0) + attribute(1, table.encode() + b"\0")
        for left in reversed(range(_TRIES)):
            try:
                self.ask(_GETCHAIN, head + attribute(3, chain.encode() + b"\0"))
                return [message[4:] for message in self.dump(_GETRULE, head + attribute(2, chain.encode() + b"\0"))]
            except Interrupted:
                if not left:
                    raise
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return None
                raise
        raise AssertionError  # pragma: no cover - the last turn returned or raised


def comment(rule: bytes) -> str | None:
    """Return the comment of a rule; of several the first."""
    found = _COMMENT.search(rule) if _MATCH in rule else None
    return found[1].decode(errors="replace") if found else None


def target(rule: bytes) -> str:
    """Return the chain that a rule goes to, or the name of its verdict or target; empty where it goes nowhere."""
    found = ""
    for _, expression in each_attribute(read_attributes(rule).get(4, b"")):
        its = read_attributes(expression)
        name, data = text(its.get(1, b"")), read_attributes(its.get(2, b""))
        if name == "immediate":
            verdict = read_attributes(read_attributes(data.get(2, b"")).get(2, b""))
            if 1 in verdict:
                found = text(verdict[2]) if 2 in verdict else _VERDICTS.get(struct.unpack(">i", verdict[1])[0], "")
        elif name == "target":
            found = text(data.get(1, b""))
    return found


class Announcements:
    """What the kernel announces of changes to nf_tables, from when this was made on. Raises ``OSError``."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER)
        self._socket.setblocking(False)
        # The rules themselves are announced too, thousands where kube-proxy writes: the kernel is to keep them.
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _ONLY_NEWGEN)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP_NFTABLES)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    async def __aiter__(self) -> AsyncIterator[Writer | None]:
        """Yield who changed something, once for each commit; None where there were more than are told."""
        while True:
            try:
                said = await asyncio.get_running_loop().sock_recv(self._socket, 1 << 16)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield None
                continue
            for _, message in messages(said):
                about = read_attributes(message[4:])
                pid, name = about.get(2), about.get(3)
                yield Writer(struct.unpack(">I", pid)[0], _printable(text(name or b""))) if pid is not None else None


def _printable(name: str) -> str:
    """Return the name of a process, which it chose itself, without what does not belong in a line of text."""
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in name) or "?"


_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1  # linux/socket.h, linux/netlink.h
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
# Classic BPF (linux/filter.h): take the two bytes at 4, which are the message's kind; take all of it where it is
# NEWGEN, and nothing of others. BPF reads them as big endian, whatever they are.
_PROGRAM = ctypes.create_string_buffer(
    b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (0x28, 0, 0, 4),
            (0x15, 0, 1, int.from_bytes(struct.pack("=H", _NEWGEN), "big")),
            (0x06, 0, 0, 0xFFFFFFFF),
            (0x06, 0, 0, 0),
        )
    ),
    32,
)
_ONLY_NEWGEN = struct.pack("HP", 4, ctypes.addressof(_PROGRAM))
