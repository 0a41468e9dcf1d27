"""Who is at an address: the network namespaces of this node, by what /proc shows of them. None is entered.

Containers are told by containerd. What it does not know, such as a container of Podman's, is found by its processes,
and called after one of them. What a virtual machine has for itself is in none of this.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from ..endpoints import Gone, addresses6, local_addresses, netns, read, read_if_any
from ..listed import Listed
from ..listeners import parse, printable
from ..model import Address, Protocol
from ..pods import POD_NAME, POD_NAMESPACE
from .facts import Inhabitant, Next, Socket

_FILES = ((Protocol.TCP, ("tcp", "tcp6")), (Protocol.UDP, ("udp", "udp6")))


def find(address: Address, listed: Iterable[Listed]) -> Inhabitant | None:
    """Return who has an address, other than the node itself."""
    mine = netns(os.getpid())
    spaces: dict[tuple[int, int], list[Listed]] = {}
    for each in listed:
        if each.pid is not None and (its := _netns(each.pid)) not in (None, mine):
            assert its is not None
            spaces.setdefault(its, []).append(each)
    for members in spaces.values():
        pid = next((each.pid for each in members if each.pid is not None), 0)
        if _has(pid, address):
            return _inhabitant(pid, members)
    elsewhere = (pid for pid in _others({mine, *spaces}) if _has(pid, address))
    return next((_inhabitant(pid, []) for pid in elsewhere), None)


def _netns(pid: int) -> tuple[int, int] | None:
    try:
        return netns(pid)
    except (Gone, OSError):
        return None


def _others(known: set[tuple[int, int]]) -> Iterator[int]:
    """Yield the first process of each namespace that no container is in."""
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        its = _netns(pid)
        if its is not None and its not in known:
            known.add(its)
            yield pid


def _has(pid: int, address: Address) -> bool:
    try:
        if address.version == 4:
            return address in local_addresses(read(f"/proc/{pid}/net/fib_trie"))
        return address in [its.address for its in addresses6(read_if_any(f"/proc/{pid}/net/if_inet6"))]
    except (Gone, OSError, ValueError):
        return False


def _inhabitant(pid: int, members: list[Listed]) -> Inhabitant:
    keys = frozenset(each.key for each in members)
    paused = bool(members) and all(each.paused for each in members)
    return Inhabitant(_name(pid, members), keys, pid, paused, tuple(_sockets(pid)), tuple(_routes(pid)))


def _name(pid: int, members: list[Listed]) -> str:
    """Return what to call it, in words safe to print: a pod by its name, another container by its key."""
    for each in members:
        namespace, pod = each.labels.get(POD_NAMESPACE), each.labels.get(POD_NAME)
        if each.role is not None and namespace and pod:
            return f"pod:{printable(namespace, 63)}/{printable(pod, 253)}"
    if members:
        return str(min(each.key for each in members))
    return f"of {printable(_read(pid, 'comm').strip()) or 'a process'} (pid {pid})"


def _sockets(pid: int) -> Iterator[tuple[Protocol, Socket]]:
    for protocol, names in _FILES:
        for name in names:
            for entry in parse(protocol, _read(pid, f"net/{name}")):
                if entry.serving:
                    yield protocol, Socket(entry.bound.address, entry.port, entry.inode)


def _routes(pid: int) -> Iterator[Next]:
    try:
        yield from routes(_read(pid, "net/route"))
        yield from routes6(_read(pid, "net/ipv6_route"))
    except ValueError:
        return  # not as this kernel writes it


def _read(pid: int, name: str) -> str:
    try:
        return read(f"/proc/{pid}/{name}")
    except (Gone, OSError):
        return ""


_REJECT, _UP = 0x200, 0x1


def routes(text: str) -> Iterator[Next]:
    """Read ``/proc/PID/net/route``: those of the main table alone, as this file has no others."""
    for line in text.split("\n")[1:]:
        fields = line.split("\t")
        if len(fields) < 8 or not int(fields[3], 16) & _UP or int(fields[3], 16) & _REJECT:
            continue
        network = IPv4Network((_word(fields[1]), _word(fields[7]).bit_count()), strict=False)
        gateway = _word(fields[2])
        yield Next(network, IPv4Address(gateway) if gateway else None, fields[0])


def routes6(text: str) -> Iterator[Next]:
    """Read ``/proc/PID/net/ipv6_route``, but for what leads nowhere, to the host itself, or to many."""
    for line in text.split("\n"):
        fields = line.split(" ", 9)
        if len(fields) < 10 or int(fields[8], 16) & _REJECT or not int(fields[8], 16) & _UP:
            continue
        device = fields[9].lstrip(" ")
        if device == "lo" or fields[0].startswith("ff"):
            continue
        network = IPv6Network((int(fields[0], 16), int(fields[1], 16)), strict=False)
        gateway = int(fields[4], 16)
        yield Next(network, IPv6Address(gateway) if gateway else None, device)


def _word(digits: str) -> int:
    return int.from_bytes(int(digits, 16).to_bytes(4, sys.byteorder), "big")
