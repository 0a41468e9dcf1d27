"""Who has a port of this node already: what /proc says of other processes' sockets, and what to call their owner.

Asked only where the kernel refused a port, as looking for a process goes through the open files of all of them.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from itertools import chain

from .model import Address, PortRange, Protocol

#: Seconds that looking for the process behind a socket may take: a node can have thousands of processes, and the daemon
#: has other things to do.
LOOK_FOR = 0.5

#: What a holder is called that cannot be told. So with TCP sockets that are bound and do not listen, which /proc/net
#: does not show, with the kernel's own (NFS), and with what takes longer than ``LOOK_FOR``.
UNKNOWN = "another process"


@dataclass(frozen=True)
class Bound:
    """The local address of a socket.

    ``v6only`` counts for ``::`` alone: without it the socket has the port for IPv4 too (ipv6(7), IPV6_V6ONLY).
    """

    address: Address
    v6only: bool = True

    def overlaps(self, other: Bound) -> bool:
        """Whether the kernel would refuse to bind both to one port, as inet_rcv_saddr_equal() of Linux judges it."""
        mine, theirs = self.unmapped, other.unmapped
        if mine.version == theirs.version:
            return mine == theirs or mine.is_unspecified or theirs.is_unspecified
        wide = self if mine.version == 6 else other
        return wide.address.is_unspecified and not wide.v6only

    @property
    def unmapped(self) -> Address:
        """The address, or the IPv4 address that one like ::ffff:127.0.0.1 stands for."""
        address = self.address
        return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


@dataclass(frozen=True)
class Entry:
    """A socket that /proc/net shows.

    ``serving`` is whether it is there for anyone who comes: a TCP socket that listens, a UDP socket that is not
    connected. All others are ends of one connection, ``inode`` 0 where no process has it any more (TIME_WAIT).
    """

    bound: Bound
    port: int
    serving: bool
    inode: int


_ENTRY = re.compile(
    r"^ *\d+: (?P<address>[0-9A-F]{8}|[0-9A-F]{32}):(?P<port>[0-9A-F]{4}) [0-9A-F]+:[0-9A-F]{4} (?P<state>[0-9A-F]{2}) "
    r"\S+ \S+ \S+ +\d+ +\d+ (?P<inode>\d+) ",
    re.MULTILINE,
)
#: Every port that a socket can be bound to.
ALL_PORTS = PortRange(1, 65535)

_ESTABLISHED, _LISTEN = "01", "0A"  # enum of net/tcp_states.h, which UDP uses too


def parse(protocol: Protocol, text: str, ports: PortRange = ALL_PORTS) -> Iterator[Entry]:
    """Read who has ``ports`` from /proc/net/tcp, tcp6, udp or udp6 (proc(5)); ``protocol`` is TCP or UDP.

    What is no entry is passed over. The file does not say whether ``::`` is for IPv6 alone, so it is taken for both
    families.
    """
    for found in _ENTRY.finditer(text):
        port = int(found["port"], 16)
        if not ports.first <= port <= ports.last:  # a node can have a hundred thousand connections
            continue
        listens = found["state"] == _LISTEN if protocol is Protocol.TCP else found["state"] != _ESTABLISHED
        bound = Bound(_address(found["address"]), v6only=False)
        yield Entry(bound, port, listens, int(found["inode"]))


def _address(digits: str) -> Address:
    # Words of 32 bits in network order, each printed as a number of this machine.
    words = (int(digits[at : at + 8], 16) for at in range(0, len(digits), 8))
    packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def entries(protocol: Protocol, ports: PortRange) -> dict[int, list[Entry]]:
    """Return the sockets of this network namespace by port, both families.

    There are none for SCTP, which shows its own elsewhere.
    """
    by_port: dict[int, list[Entry]] = {}
    for name in {Protocol.TCP: ("tcp", "tcp6"), Protocol.UDP: ("udp", "udp6")}.get(protocol, ()):
        # /proc/net would be that of the process's first thread.
        for entry in parse(protocol, _read(f"/proc/thread-self/net/{name}"), ports):
            by_port.setdefault(entry.port, []).append(entry)
    return by_port


# By socket: the process that was found to have it. The same sockets are asked for again and again, as long as they are
# in the way; no two sockets have one number. _NOBODY: none was found, which takes longest.
_owners: dict[str, int] = {}
_NOBODY = 0
_MOST_OWNERS = 4096


def holder(inodes: Collection[int], name_container: Callable[[str], str | None]) -> str:
    """Return what to call the process that has one of these sockets, in words safe to print.

    ``name_container`` gets the text of its /proc/PID/cgroup, and says which container that is, or None.
    """
    wanted = {f"socket:[{inode}]" for inode in inodes if inode}
    if not wanted:
        return UNKNOWN
    before = {_owners.get(link) for link in wanted}
    if before == {_NOBODY}:
        return UNKNOWN
    if len(_owners) > _MOST_OWNERS:
        _owners.clear()
    deadline = time.monotonic() + LOOK_FOR
    for pid in chain((pid for pid in before if pid), _processes()):
        for link in _open_files(pid):
            if link in wanted:
                _owners[link] = pid
                return _described(pid, name_container)
            if time.monotonic() > deadline:
                break
        if time.monotonic() > deadline:
            break
    _owners.update(dict.fromkeys(wanted, _NOBODY))
    return UNKNOWN


def _processes() -> Iterable[int]:
    """Return the processes, oldest numbers first, but for the first of all.

    systemd has the sockets of what it starts on demand; the service's own process says more.
    """
    return sorted((int(name) for name in os.listdir("/proc") if name.isdecimal()), key=lambda pid: (pid == 1, pid))


def _open_files(pid: int) -> Iterator[str]:
    try:
        with os.scandir(f"/proc/{pid}/fd") as files:
            for file in files:
                yield os.readlink(file.path)
    except OSError:
        return  # it ended, or is not ours to look at


def _described(pid: int, name_container: Callable[[str], str | None]) -> str:
    command = printable(_read(f"/proc/{pid}/comm").rstrip("\n")) or "a process"
    container = name_container(_read(f"/proc/{pid}/cgroup"))
    return f"{command} (pid {pid})" + (f" in container {printable(container, 200)}" if container else "")


_UNSAFE = re.compile(r"[^A-Za-z0-9 ._:/@+-]")


def printable(text: str, most: int = 32) -> str:
    """Return at most ``most`` characters of what a stranger chose, none of which a terminal would obey."""
    return _UNSAFE.sub("?", text[:most]).strip()


def _read(path: str) -> str:
    """Return what is in a file of /proc; nothing where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read().decode("ascii", "replace")
    except OSError:
        return ""
