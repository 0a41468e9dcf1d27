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
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, ip_network
from pathlib import Path
from types import TracebackType
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import RTMGRP_IPV4_IFADDR

from .model import DEVICE_NAME, Address, Attachment, Endpoint, Family, NodeFacts, Obstacle, State

_RTM_F_FIB_MATCH = 0x2000  # answer with the route that matched, not with one made for the address (linux/rtnetlink.h)
_RTN_UNICAST, _RTN_LOCAL = 1, 2
_NSID_NOT_ASSIGNED = 0xFFFFFFFF  # -1 to the kernel, which pyroute2 reads as unsigned


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


async def node_changes() -> AsyncIterator[None]:
    """Yield whenever an address of the node's came or went. Raises ``OSError`` where it cannot be told."""
    async with AsyncIPRoute() as netlink:
        await netlink.bind(groups=RTMGRP_IPV4_IFADDR)
        while True:
            async for _ in netlink.get():
                yield


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
    """Finds endpoints. An async context manager: it holds one netlink socket."""

    async def __aenter__(self) -> Endpoints:
        self._netlink = AsyncIPRoute()
        await self._netlink.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._netlink.__aexit__(kind, error, traceback)

    async def find(self, pid: int) -> Endpoint | Obstacle:
        """Return where the container of process ``pid`` is reached, or why it cannot be. Raises ``Gone``."""
        if netns(pid) == netns(os.getpid()):
            return HOST_NETWORK
        addresses = local_addresses(_read(Path(f"/proc/{pid}/net/fib_trie")))
        chosen = choose(addresses, routes(_read(Path(f"/proc/{pid}/net/route"))))
        if chosen is None:
            return LOOPBACK_ONLY
        address, device = chosen
        found = await self._attachment(pid, address, device)
        return found if isinstance(found, Obstacle) else Endpoint((found,))

    async def _attachment(self, pid: int, address: IPv4Address, device: str | None) -> Attachment | Obstacle:
        try:
            [route, *_] = await self._netlink.route("get", dst=str(address), flags=_RTM_F_FIB_MATCH)
        except NetlinkError:
            return Obstacle(State.WAITING, f"the host has no route to {address}")
        if route["type"] == _RTN_LOCAL:
            return Obstacle(State.UNSUPPORTED, f"{address} is an address of the node itself")
        gateway = route.get_attr("RTA_GATEWAY") or route.get_attr("RTA_VIA")
        if route["type"] != _RTN_UNICAST or gateway or route.get_attr("RTA_OIF") is None:
            where = f"only through the gateway {gateway}" if gateway else "by no device of its own"
            return Obstacle(State.WAITING, f"the host reaches {address} {where}: it is not on one of its own networks")
        [outgoing, *_] = await self._netlink.link("get", index=route.get_attr("RTA_OIF"))
        name = str(outgoing.get_attr("IFLA_IFNAME"))
        if DEVICE_NAME.fullmatch(name) is None:
            return Obstacle(State.UNSUPPORTED, f"the host's device to {address} has a name that no rule can hold")
        obstacle = await self._not_its_own(pid, device or "eth0", outgoing, address)
        if obstacle is not None:
            return obstacle
        network = ip_network((route.get_attr("RTA_DST") or str(address), route["dst_len"]), strict=False)
        return Attachment(address, name, network)

    async def _not_its_own(self, pid: int, device: str, outgoing: Any, address: IPv4Address) -> Obstacle | None:
        """Return why the host's device is neither the container's own veth nor the bridge that this veth is a port of.

        A rule on any other device, the node's uplink at worst, would be about other people's packets.
        """
        name = outgoing.get_attr("IFLA_IFNAME")
        veth = await self._host_side(pid, device)
        if isinstance(veth, Obstacle):
            return veth
        if outgoing["index"] in (veth["index"], veth.get_attr("IFLA_MASTER")):
            kind = outgoing.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND")
            if kind in ("veth", "bridge"):
                return None
            return Obstacle(
                State.UNSUPPORTED, f"{address} is reached through {name}, a {kind} device: only veth and bridge are"
            )
        return Obstacle(
            State.UNSUPPORTED, f"the host reaches {address} through {name}, which is not the container's own device"
        )

    async def _host_side(self, pid: int, device: str) -> Any:
        """Return the host's end of a container's veth, or an ``Obstacle``."""
        inside: Any = None
        elsewhere = Obstacle(State.UNSUPPORTED, f"the other end of its {device} is not on this host")
        try:
            nsid = await self._nsid(pid)
            [inside, *_] = await self._netlink.link("get", ifname=device, if_netnsid=nsid)
            kind = inside.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND")
            if kind != "veth":
                return Obstacle(
                    State.UNSUPPORTED, f"its {device} is a {kind or 'physical'} device: only veth can be done"
                )
            [outside, *_] = await self._netlink.link("get", index=inside.get_attr("IFLA_LINK"))
        except NetlinkError as error:
            if inside is not None and error.code == errno.ENODEV:
                return elsewhere
            _read(Path(f"/proc/{pid}/stat"))  # gone is gone, not an obstacle
            return Obstacle(State.WAITING, f"the host's end of its {device} cannot be found: {os.strerror(error.code)}")
        if outside.get_attr("IFLA_LINK_NETNSID") != nsid or outside.get_attr("IFLA_LINK") != inside["index"]:
            return elsewhere
        return outside

    async def _nsid(self, pid: int) -> int:
        """Return the id that a process's network namespace has in ours, giving it one where it has none."""
        nsid = (await self._netlink.get_netnsid(pid=pid))["nsid"]
        if nsid == _NSID_NOT_ASSIGNED:
            await self._netlink.set_netnsid(pid=pid)  # the kernel chooses
            nsid = (await self._netlink.get_netnsid(pid=pid))["nsid"]
        return int(nsid)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise Gone(f"{path} is gone") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # what /proc/PID/net says of a process that is a zombie by now
            raise Gone(f"{path} is gone") from error
        raise
