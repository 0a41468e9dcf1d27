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
from ipaddress import IPv4Address, IPv4Network, IPv6Address

from .model import DEVICE_NAME, Address, Attachment, Endpoint, Family, Obstacle, State
from .netlink import LOCAL, UNICAST, Link, Netlink


class Gone(Exception):
    """The process ended while it was being looked at."""


HOST_NETWORK = Obstacle(
    State.UNSUPPORTED, "it is on the host's network: its ports are the node's own, and need no mapping"
)
LOOPBACK_ONLY = Obstacle(State.WAITING, "it has only a loopback address: start it with `ctr run --cni`")
DUPLICATE = Obstacle(State.WAITING, "its only address is another's already: duplicate address detection failed")


def started(pid: int) -> int:
    """Return when a process began, in clock ticks since boot. Raises ``Gone``."""
    stat = read(f"/proc/{pid}/stat")
    # The command (field 2) is in parentheses and may hold anything, parentheses too: count from the last one.
    return int(stat.rpartition(")")[2].split()[19])


def netns(pid: int) -> tuple[int, int]:
    """Return what identifies a process's network namespace: device and inode of its file. Raises ``Gone``."""
    try:
        status = os.stat(f"/proc/{pid}/ns/net")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise Gone(f"process {pid} ended") from error
    except PermissionError as error:
        raise PermissionError(error.errno, f"{error.filename} takes CAP_SYS_PTRACE") from error
    return status.st_dev, status.st_ino


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
    for line in _lines(text)[1:]:
        device, destination, gateway, _, _, _, _, mask = line.split("\t")[:8]
        network = IPv4Network((_address(destination), _address(mask).bit_count()))
        found.append(Route(device, network, int(gateway, 16) == 0))
    return found


def _lines(text: str) -> list[str]:
    """Return the lines of a file of /proc/PID/net.

    Not splitlines(), nor a split() at any space: a container that may name its devices can call one so that they would
    break the line. The kernel takes all but white space of Latin-1 for a name, such as \x1c and U+2028.
    """
    return [line for line in text.split("\n") if line]


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


#: Flags and scopes of linux/if_addr.h and net/ipv6.h.
_TEMPORARY, _DADFAILED, _DEPRECATED, _TENTATIVE = 0x01, 0x08, 0x20, 0x40
_LINK_LOCAL = 0x20
_REJECT = 0x200


@dataclass(frozen=True)
class Address6:
    """A line of ``/proc/net/if_inet6``.

    ``tentative``: it is asked on the network yet whether another has it, which takes a second or two. ``duplicate``:
    another has. ``second_rate``: it is made to be changed often, or about to be given up.
    """

    address: IPv6Address
    device: str
    tentative: bool = False
    duplicate: bool = False
    second_rate: bool = False


def addresses6(if_inet6: str) -> list[Address6]:
    """Read ``/proc/net/if_inet6``, but for the addresses of a link alone."""
    found = []
    for line in _lines(if_inet6):
        address, _, _, scope, hexadecimal, device = line.split(" ", 5)
        if int(scope, 16) != _LINK_LOCAL:
            flags = int(hexadecimal, 16)
            states = (bool(flags & state) for state in (_TENTATIVE, _DADFAILED, _TEMPORARY | _DEPRECATED))
            found.append(Address6(IPv6Address(int(address, 16)), device.lstrip(" "), *states))
    return found


def default_devices6(ipv6_route: str) -> list[str]:
    """Return the devices of the default routes that ``/proc/net/ipv6_route`` shows, in its order."""
    lines = [line.split(" ", 9) for line in _lines(ipv6_route) if line.startswith("0" * 32 + " 00 ")]
    # Every namespace has one at its end that refuses what no other takes.
    return list(dict.fromkeys(fields[9].lstrip(" ") for fields in lines if not int(fields[8], 16) & _REJECT))


def choose6(addresses: list[Address6], defaults: list[str], beside: str | None) -> tuple[IPv6Address, str] | None:
    """Choose which of a container's IPv6 addresses to publish, and name its device; None where none can be.

    As for IPv4, but a second-rate one only where there is no other. ``defaults`` are the devices of its default routes:
    the file has those of every routing table, so that the one it answers through may not be the first; where the
    device ``beside``, that of its IPv4 address, is among them it is taken.
    """
    default = beside if beside in defaults else next(iter(defaults), None)
    usable = [one for one in addresses if not (one.address.is_loopback or one.duplicate)]
    usable.sort(key=lambda one: (one.second_rate, one.device != default, one.address))
    return (usable[0].address, usable[0].device) if usable else None


class Endpoints:
    """Finds endpoints. An async context manager: it holds a netlink socket."""

    async def __aenter__(self) -> Endpoints:
        self._netlink = Netlink()
        self._own = netns(os.getpid())
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._netlink.close()

    def heard_of(self, pid: int) -> int | None:
        """Return the id under which ``netlink.follow_addresses`` tells of a process's network; None for the host's own.

        Raises ``Gone`` and ``OSError``.
        """
        return None if netns(pid) == self._own else self._netlink.nsid(pid)

    def find(self, pid: int, nsid: int | None = None) -> Endpoint | Obstacle:
        """Return where the container of process ``pid`` is reached, or why it cannot be. Raises ``Gone``.

        ``nsid`` is the id that its network namespace has in ours, where that is known. A family that it has no address
        of, or cannot be reached in, does not keep the other from being found.
        """
        if netns(pid) == self._own:
            return HOST_NETWORK
        look = _Look(self._netlink, pid, nsid)
        found: list[Attachment | Obstacle] = []
        addresses = local_addresses(read(f"/proc/{pid}/net/fib_trie"))
        chosen = choose(addresses, routes(read(f"/proc/{pid}/net/route")))
        if chosen is not None:
            found.append(look.attachment(*chosen))
        # A tentative one is taken as it is: the first packets to it wait for its being found, and rules do no harm.
        own = addresses6(read_if_any(f"/proc/{pid}/net/if_inet6"))
        contested = len({one.device for one in own if not one.address.is_loopback}) > 1  # else it goes without saying
        defaults = default_devices6(read(f"/proc/{pid}/net/ipv6_route")) if contested else []
        chosen6 = choose6(own, defaults, beside=chosen[1] if chosen is not None else None)
        if chosen6 is not None:
            found.append(look.attachment(*chosen6))
        elif any(one.duplicate for one in own):
            found.append(DUPLICATE)
        attachments = tuple(one for one in found if isinstance(one, Attachment))
        if attachments:
            return Endpoint(attachments)
        return next((one for one in found if isinstance(one, Obstacle)), LOOPBACK_ONLY)

    @staticmethod
    def has_address(pid: int, family: Family) -> bool:
        """Whether ``find`` may find the container of process ``pid`` reached in one family. Raises ``Gone``.

        A tenth of what that costs: a container that has no such address is mostly left without.
        """
        if family is Family.IPV4:
            return any(not one.is_loopback for one in local_addresses(read(f"/proc/{pid}/net/fib_trie")))
        own = addresses6(read_if_any(f"/proc/{pid}/net/if_inet6"))
        return any(not (one.address.is_loopback or one.duplicate) for one in own)


class _Look:
    """One look at one container. What both of its families need to know is asked for once."""

    def __init__(self, netlink: Netlink, pid: int, nsid: int | None) -> None:
        self._netlink = netlink
        self._pid = pid
        self._nsid = nsid
        self._links: dict[int, Link] = {}
        self._host_sides: dict[str, Link | Obstacle] = {}

    def attachment(self, address: Address, device: str | None) -> Attachment | Obstacle:
        """Return how the host reaches one address of the container, which is on its ``device``, or why it cannot."""
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
            outgoing = self._link(route.device)
        except OSError as error:
            reason = f"the host's device to {address} cannot be found: {error.strerror}"
            return Obstacle(State.WAITING, reason)
        if DEVICE_NAME.fullmatch(outgoing.name) is None:
            return Obstacle(State.UNSUPPORTED, f"the host's device to {address} has a name that no rule can hold")
        veth = self._own_way(device or "eth0", outgoing, address)
        if isinstance(veth, Obstacle):
            return veth
        # No rule names the port, so that an odd name is no obstacle: the port is left as it is.
        port = veth.name if outgoing.index == veth.master and DEVICE_NAME.fullmatch(veth.name) else None
        return Attachment(address, outgoing.name, route.network, port)

    def _own_way(self, device: str, outgoing: Link, address: Address) -> Link | Obstacle:
        """Return the host's end of the container's veth, if the host's device is that or the bridge it is a port of.

        Else why it is neither: a rule on any other device, the node's uplink at worst, would be about other people's
        packets.
        """
        if device not in self._host_sides:
            self._host_sides[device] = self._host_side(device)
        veth = self._host_sides[device]
        if isinstance(veth, Obstacle):
            return veth
        way = f"the host reaches {address} through {outgoing.name}"
        if outgoing.index not in (veth.index, veth.master):
            return Obstacle(State.UNSUPPORTED, f"{way}, which is not the container's own device")
        if outgoing.kind not in ("veth", "bridge"):
            return Obstacle(State.UNSUPPORTED, f"{way}, a {outgoing.kind} device: only veth and bridge can be done")
        return veth

    def _host_side(self, device: str) -> Link | Obstacle:
        """Return the host's end of a container's veth, or why there is none."""
        inside = None
        elsewhere = Obstacle(State.UNSUPPORTED, f"the other end of its {device} is not on this host")
        try:
            nsid = self._netlink.nsid(self._pid) if self._nsid is None else self._nsid
            inside = self._netlink.link(name=device, nsid=nsid)
            if inside.kind != "veth" or inside.peer is None:
                kind = inside.kind or "physical"
                return Obstacle(State.UNSUPPORTED, f"its {device} is a {kind} device: only veth can be done")
            outside = self._netlink.link(index=inside.peer)
        except OSError as error:
            if inside is not None and error.errno == errno.ENODEV:
                return elsewhere
            read(f"/proc/{self._pid}/stat")  # gone is gone, not an obstacle
            return Obstacle(State.WAITING, f"the host's end of its {device} cannot be found: {error.strerror}")
        if outside.peer_nsid != nsid or outside.peer != inside.index:
            return elsewhere
        return outside

    def _link(self, index: int) -> Link:
        if index not in self._links:
            self._links[index] = self._netlink.link(index=index)
        return self._links[index]


def read(path: str) -> str:
    """Read a file of /proc. Raises ``Gone`` where it, or the process that it is about, is there no more."""
    try:
        with open(path, "rb", buffering=0) as file:  # a third of what it takes to read it as a text file
            return file.readall().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise Gone(f"{path} is gone") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # what /proc/PID/net says of a process that is a zombie by now
            raise Gone(f"{path} is gone") from error
        raise


def read_if_any(path: str) -> str:
    """Read a file that only a kernel with IPv6 has."""
    try:
        return read(path)
    except Gone as gone:
        if isinstance(gone.__cause__, FileNotFoundError):  # or the process is gone, which the next look at it will say
            return ""
        raise
