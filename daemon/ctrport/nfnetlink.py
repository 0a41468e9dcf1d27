"""nf_tables over netlink: which rules a chain holds, that somebody changed something, and changes made at once.

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
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace

from .nlmsg import (
    ACK,
    NETFILTER,
    Conversation,
    Interrupted,
    Message,
    Rejected,
    attribute,
    each_attribute,
    messages,
    read_attributes,
    text,
)

_GROUP_NFTABLES = 7
_GETTABLE, _GETCHAIN, _NEWRULE, _GETRULE, _DELRULE = ((10 << 8) | number for number in (1, 4, 6, 7, 8))
_NEWGEN, _GETGEN = (10 << 8) | 15, (10 << 8) | 16
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_BATCH = struct.pack(">BBH", 0, 0, 10)  # what is said in it is for nf_tables
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


@dataclass(frozen=True)
class BaseChain:
    """A chain that the kernel calls for packets; ``accepts``: what it lets pass to its end goes on, by its policy."""

    table: str
    name: str
    accepts: bool


class NfTables(Conversation):
    """Asks about the nf_tables of the network namespace it was made in. Raises ``OSError`` as the kernel refuses."""

    def __init__(self) -> None:
        super().__init__(NETFILTER)

    def tables(self) -> list[tuple[str, str]]:
        """Return the family, in nft's word, and the name of every table."""
        found: list[tuple[str, str]] = []
        with contextlib.suppress(Interrupted):
            for message in self.dump(_GETTABLE, struct.pack("=BBH", 0, 0, 0)):
                family = _FAMILIES.get(message[0], str(message[0]))
                found.append((family, text(read_attributes(message[4:]).get(1, b""))))
        return found

    def rules(self, family: int, table: str, chain: str) -> list[bytes] | None:
        """Return the rules of a chain in their order, for the functions below; None where there is no such chain.

        ``family`` is AF_INET or AF_INET6. Raises ``Interrupted`` where others change the tables all the time.
        """
        head = _head(family, table)
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

    def chains(self, family: int) -> set[tuple[str, str]]:
        """Return all chains of a family, each behind the name of its table. Raises ``Interrupted``."""
        its = (read_attributes(message[4:]) for message in self.dump(_GETCHAIN, struct.pack("=BBH", family, 0, 0)))
        return {(text(chain.get(1, b"")), text(chain.get(3, b""))) for chain in its}

    def rule(self, family: int, table: str, chain: str, number: int) -> bytes | None:
        """Return the rule that has this number, for the functions below; None where there is none."""
        try:
            return self.ask(_GETRULE, _of_rule(family, table, chain, number))[4:]
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def generation(self) -> int:
        """Return the number of what the tables hold now: another one after each commit, whoever makes it."""
        return int.from_bytes(read_attributes(self.ask(_GETGEN, struct.pack("=BBH", 0, 0, 0))[4:])[1], "big")

    def has_table(self, family: int, table: str) -> bool:
        """Whether there is a table of that name."""
        try:
            self.ask(_GETTABLE, _head(family, table))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def base_chains(self, family: int, hook: int) -> list[BaseChain]:
        """Return the chains of one family that are called at a hook, by its number. Raises ``Interrupted``."""
        found = []
        for message in self.dump(_GETCHAIN, struct.pack("=BBH", family, 0, 0)):
            its = read_attributes(message[4:])
            if int.from_bytes(read_attributes(its.get(4, b"")).get(1, b"\xff"), "big") == hook:
                found.append(BaseChain(text(its[1]), text(its[3]), _accepts(its)))
        return found

    def has_chain(self, family: int, table: str, chain: str) -> bool:
        """Whether there is a chain of that name."""
        try:
            self.ask(_GETCHAIN, _head(family, table) + attribute(3, chain.encode() + b"\0"))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def accepts(self, family: int, table: str, chain: str) -> bool:
        """Whether what a chain lets pass to its end goes on, by its policy; also where there is no such chain."""
        try:
            answer = self.ask(_GETCHAIN, _head(family, table) + attribute(3, chain.encode() + b"\0"))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return True
            raise
        return _accepts(read_attributes(answer[4:]))

    def commit(self, changes: Sequence[Message], *, generation: int | None = None) -> None:
        """Have changes made at once, or none of them. Takes 0.1 ms, and what each of them takes.

        Raises ``Rejected`` with the index of the first that is refused, -1 where it is all of them together: as with
        ERESTART, where the tables are no longer of that ``generation``.
        """
        if not changes:
            return
        since = b"" if generation is None else attribute(1, struct.pack(">I", generation))
        begin, end = Message(_BATCH_BEGIN, _BATCH + since), Message(_BATCH_END, _BATCH)
        # Some kernels acknowledge the end of a batch, others do not.
        last = replace(changes[-1], flags=changes[-1].flags | ACK)
        try:
            self.together([begin, *changes[:-1], last, end])
        except Rejected as error:
            raise Rejected(error.errno or 0, error.index - 1 if error.index <= len(changes) else -1) from error


def _accepts(chain: dict[int, bytes]) -> bool:
    return int.from_bytes(chain.get(5, b"\1"), "big") == 1


def delete_rule(family: int, table: str, chain: str, handle: int) -> Message:
    """Return what takes one rule away, by its ``handle``."""
    return Message(_DELRULE, _of_rule(family, table, chain, handle))


def _of_rule(family: int, table: str, chain: str, handle: int) -> bytes:
    return _head(family, table) + attribute(2, chain.encode() + b"\0") + attribute(3, struct.pack(">Q", handle))


def _head(family: int, table: str) -> bytes:
    return struct.pack("=BBH", family, 0, 0) + attribute(1, table.encode() + b"\0")


def handle(rule: bytes) -> int:
    """Return the number by which the kernel knows a rule, as long as that is there."""
    return next(int.from_bytes(value, "big") for kind, value in each_attribute(rule) if kind == 3)  # of the first ones


def comment(rule: bytes) -> str | None:
    """Return the comment of a rule; of several the first."""
    found = _COMMENT.search(rule) if _MATCH in rule else None
    return found[1].decode(errors="replace") if found else None


# An expression is its name (NFTA_EXPR_NAME), and behind that what it holds.
_COUNTER = attribute(1, b"counter\0")


def counted(rule: bytes) -> tuple[int, int]:
    """Return the packets and the bytes that a rule counted."""
    at = rule.find(_COUNTER)
    _, its = next(each_attribute(rule[at + len(_COUNTER) :]), (0, b"")) if at >= 0 else (0, b"")
    data = read_attributes(its)
    return int.from_bytes(data.get(2, b""), "big"), int.from_bytes(data.get(1, b""), "big")


def expressions(rule: bytes) -> Iterator[tuple[str, dict[int, bytes]]]:
    """Yield each expression of a rule, by its name and its attributes."""
    for _, expression in each_attribute(read_attributes(rule).get(4, b"")):
        its = read_attributes(expression)
        yield text(its.get(1, b"")), read_attributes(its.get(2, b""))


def target(rule: bytes) -> str:
    """Return the chain that a rule goes to, or the name of its verdict or target; empty where it goes nowhere."""
    found = ""
    for name, data in expressions(rule):
        if name == "immediate":
            verdict = read_attributes(read_attributes(data.get(2, b"")).get(2, b""))
            if 1 in verdict:
                found = text(verdict[2]) if 2 in verdict else _VERDICTS.get(struct.unpack(">i", verdict[1])[0], "")
        elif name == "target":
            found = text(data.get(1, b""))
    return found


class NewRules:
    """Hears which rules come, whoever writes them, between ``begin`` and ``end``.

    Raises ``OSError`` as the kernel refuses.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETFILTER)
        self._socket.setblocking(False)
        self._socket.bind((0, 0))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def begin(self) -> None:
        """Begin to listen."""
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP_NFTABLES)

    def end(self) -> list[tuple[int, bytes]]:
        """Listen no more; return the family and each rule that came, for the functions above.

        Not all of them, where they were many. A commit has been heard of when the system call that made it returns.
        """
        self._socket.setsockopt(_SOL_NETLINK, _DROP_MEMBERSHIP, _GROUP_NFTABLES)
        found: list[tuple[int, bytes]] = []
        while True:
            try:
                said = self._socket.recv(1 << 16)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                continue
            found += [(message[0], message[4:]) for kind, message in messages(said) if kind == _NEWRULE]


class Announcements:
    """What the kernel announces of changes to nf_tables, from when this was made on. Raises ``OSError``."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETFILTER)
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


_SOL_NETLINK, _ADD_MEMBERSHIP, _DROP_MEMBERSHIP = 270, 1, 2  # linux/socket.h, linux/netlink.h
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
