"""Where a container is reached: from its process to its address, and from the address to the host's device.

A container's network namespace is never entered. Its addresses and routes are read below ``/proc/PID/net`` (proc(5)),
its devices are asked for over rtnetlink by the id that its namespace has in ours (``IFLA_TARGET_NETNSID``, Linux 4.15).
Whether the host can reach an address, and by which device, is the host's own route to say (``RTM_GETROUTE``).

Everything is as seen from the network namespace and the PID namespace that the daemon runs in: that is the node.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from .model import DEVICE_NAME, Address, Attachment, Endpoint, Family, NodeFacts, Obstacle, State
from .netlink import LOCAL, UNICAST, Link, Netlink


class Gone(Exception):
    """The process ended while it was being looked at."""


HOST_NETWORK = Obstacle(
    State.UNSUPPORTED, "it is on the host's network: its ports are the node's own, and need no mapping"
)
LOOPBACK_ONLY = Obstacle(State.WAITING, "it has only a loopback address: start it with `ctr run --cni`")


def started(pid: int) -> int:
    """Return when a process began, in clock ticks since boot. Raises ``Gone``."""
    stat = _read(Path(f"/proc/{pid}/stat"))
    # The command (field 2) is in parentheses and may hold anything, parentheses too: count from the last one.
    return int(stat.rpartition(")")[2].split()[19])


def netns(pid: int) -> tuple[int, int]:
    """Return what identifies a process's network namespace: device and inode of its file. Raises ``Gone``."""
    try:
        status = os.stat(f"/proc/{pid}/ns/net")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise Gone(f"process {pid} ended") from error
    return status.st_dev, status.st_ino


def node_facts() -> NodeFacts:
    """Return what the node itself decides over publications: whether it forwards, and its addresses."""
    forwarding = _read(Path("/proc/sys/net/ipv4/ip_forward")).strip() == "1"
    addresses = frozenset[Address](local_addresses(_read(Path("/proc/self/net/fib_trie"))))
    return NodeFacts(frozenset({Family.IPV4} if forwarding else ()), addresses)


_LOCAL = re.compile(r"\|-- ([0-9.]+)\n(?:\s+/\d+ .*\n)*?\s+/32 host LOCAL\n")


def local_addresses(fib_trie: str) -> list[IPv4Address]:
    """Return the addresses that are a host's own, out of what ``/proc/net/fib_trie`` says, lowest first."""
    return sorted({IPv4Address(text) for text in _LOCAL.findall(fib_trie)})


@dataclass(frozen=True)
class Route:
    """A line of ``/proc/net/route``: where ``network`` is reached."""

    device: str
    network: IPv4Network
    on_link: bool


def routes(text: str) -> list[Route]:
    """Read ``/proc/net/route``: addresses are hexadecimal words in the machine's byte order."""
    found = []
    for line in text.splitlines()[1:]:
        device, destination, gateway, _, _, _, _, mask = line.split()[:8]
        network = IPv4Network((_address(destination), _address(mask).bit_count()))
        found.append(Route(device, network, int(gateway, 16) == 0))
    return found


def _address(word: str) -> int:
    return int.from_bytes(int(word, 16).to_bytes(4, sys.byteorder), "big")


def choose(addresses: list[IPv4Address], known: list[Route]) -> tuple[IPv4Address, str | None] | None:
    """Choose which of a container's addresses to publish, and name its device; None where all are loopback.

    The one on the device of the default route: where a container has several networks, that is the one it answers
    through. Else the lowest.
    """
    usable = [address for address in addresses if not address.is_loopback]
    if not usable:
        return None
    default = next((route.device for route in known if route.network.prefixlen == 0), None)
    on_link = [route for route in known if route.on_link and 0 < route.network.prefixlen < 32]
    on_link.sort(key=lambda route: -route.network.prefixlen)  # the longest match decides, as in the kernel
    devices = {a: next((r.device for r in on_link if a in r.network), None) for a in usable}
    address = next((a for a in usable if devices[a] == default and default is not None), usable[0])
    return address, devices[address] or default


class Endpoints:
    """Finds endpoints. An async context manager: it holds a netlink socket."""

    async def __aenter__(self) -> Endpoints:
        self._netlink = Netlink()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._netlink.close()

    def find(self, pid: int) -> Endpoint | Obstacle:
        """Return where the container of process ``pid`` is reached, or why it cannot be. Raises ``Gone``."""
        if netns(pid) == netns(os.getpid()):
            return HOST_NETWORK
        addresses = local_addresses(_read(Path(f"/proc/{pid}/net/fib_trie")))
        chosen = choose(addresses, routes(_read(Path(f"/proc/{pid}/net/route"))))
        if chosen is None:
            return LOOPBACK_ONLY
        found = self._attachment(pid, *chosen)
        return found if isinstance(found, Obstacle) else Endpoint((found,))

    def _attachment(self, pid: int, address: IPv4Address, device: str | None) -> Attachment | Obstacle:
        try:
            route = self._netlink.route(address)
        except OSError:
            return Obstacle(State.WAITING, f"the host has no route to {address}")
        if route.kind == LOCAL:
            return Obstacle(State.UNSUPPORTED, f"{address} is an address of the node itself")
        if route.kind != UNICAST or route.gateway or route.device is None:
            where = f"only through the gateway {route.gateway}" if route.gateway else "by no device of its own"
            return Obstacle(State.WAITING, f"the host reaches {address} {where}: it is not on one of its own networks")
        try:
            outgoing = self._netlink.link(index=route.device)
        except OSError as error:
            reason = f"the host's device to {address} cannot be found: {error.strerror}"
            return Obstacle(State.WAITING, reason)
        if DEVICE_NAME.fullmatch(outgoing.name) is None:
            return Obstacle(State.UNSUPPORTED, f"the host's device to {address} has a name that no rule can hold")
        obstacle = self._not_its_own(pid, device or "eth0", outgoing, address)
        return obstacle or Attachment(address, outgoing.name, route.network)

    def _not_its_own(self, pid: int, device: str, outgoing: Link, address: IPv4Address) -> Obstacle | None:
        """Return why the host's device is neither the container's own veth nor the bridge that this veth is a port of.

        A rule on any other device, the node's uplink at worst, would be about other people's packets.
        """
        veth = self._host_side(pid, device)
        if isinstance(veth, Obstacle):
            return veth
        way = f"the host reaches {address} through {outgoing.name}"
        if outgoing.index not in (veth.index, veth.master):
            return Obstacle(State.UNSUPPORTED, f"{way}, which is not the container's own device")
        if outgoing.kind not in ("veth", "bridge"):
            return Obstacle(State.UNSUPPORTED, f"{way}, a {outgoing.kind} device: only veth and bridge can be done")
        return None

    def _host_side(self, pid: int, device: str) -> Link | Obstacle:
        """Return the host's end of a container's veth, or why there is none."""
        inside = None
        elsewhere = Obstacle(State.UNSUPPORTED, f"the other end of its {device} is not on this host")
        try:
            nsid = self._netlink.nsid(pid)
            inside = self._netlink.link(name=device, nsid=nsid)
            if inside.kind != "veth" or inside.peer is None:
                kind = inside.kind or "physical"
                return Obstacle(State.UNSUPPORTED, f"its {device} is a {kind} device: only veth can be done")
            outside = self._netlink.link(index=inside.peer)
        except OSError as error:
            if inside is not None and error.errno == errno.ENODEV:
                return elsewhere
            _read(Path(f"/proc/{pid}/stat"))  # gone is gone, not an obstacle
            return Obstacle(State.WAITING, f"the host's end of its {device} cannot be found: {error.strerror}")
        if outside.peer_nsid != nsid or outside.peer != inside.index:
            return elsewhere
        return outside


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise Gone(f"{path} is gone") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # what /proc/PID/net says of a process that is a zombie by now
            raise Gone(f"{path} is gone") from error
        raise
