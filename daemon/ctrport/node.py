"""What the node itself is like: its addresses, whether it forwards, and the bridges that are run the Docker way.

Everything is as seen from the network namespace that the daemon runs in.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from . import conntrack
from .endpoints import addresses6, local_addresses, read, read_if_any
from .ephemeral import random_ports
from .model import Address, BridgeNetwork, Family, NodeFacts
from .netlink import Netlink

#: The device that kube-proxy in IPVS mode gives the address of each Service: a node's own, for the kernel.
IPVS_DEVICE = "kube-ipvs0"
#: The device that Cilium makes on each node, whatever its settings.
CILIUM_DEVICE = "cilium_host"

CILIUM = (
    f"Cilium runs on this node (there is a device {CILIUM_DEVICE}): what its eBPF programs send on past iptables, they "
    "send past ctrport, and a published port may get no answer; "
    '"Beside Cilium" in docs/troubleshooting.md says what to do'
)


#: The files that say whether the node forwards a family.
_SWITCHES = {Family.IPV4: "/proc/sys/net/ipv4/ip_forward", Family.IPV6: "/proc/sys/net/ipv6/conf/all/forwarding"}
#: The files that have its addresses of IPv4, those of IPv6, and what ``random_ports`` reads.
_ADDRESSES, _ADDRESSES6 = "/proc/self/net/fib_trie", "/proc/self/net/if_inet6"
_PORTS = ("/proc/sys/net/ipv4/ip_local_port_range", "/proc/sys/net/ipv4/ip_local_reserved_ports")


@dataclass(frozen=True)
class Node:
    """What is known of the node. ``amiss`` says, by the name of a bridge, why it cannot be run as a network.

    ``warnings`` are what may keep published ports from working, though nothing is wrong with them: a sentence each.
    ``texts`` are the files of /proc that this was read from.
    """

    facts: NodeFacts
    amiss: dict[str, str]
    warnings: tuple[str, ...] = ()
    texts: tuple[str, ...] = field(default=(), compare=False, repr=False)


def look(bridges: Iterable[str] = (), known: Node | None = None) -> Node:
    """Look at the node; ``bridges`` are those to be run the Docker way. Who else has host ports is not asked.

    ``known`` is what an earlier look has returned. Where all is as it was, that is returned itself: files whose text is
    the same are not made sense of again, which is most of the work.
    """
    texts = (read(_ADDRESSES), *map(read_if_any, (_ADDRESSES6, *_SWITCHES.values(), *_PORTS)))
    amiss: dict[str, str] = {}
    services, networks = frozenset[Address](), list[BridgeNetwork]()
    bridges = tuple(bridges)
    if bridges or _is_there(IPVS_DEVICE):
        with contextlib.closing(Netlink()) as netlink:
            services = _addresses_of(netlink, IPVS_DEVICE)
            networks = [network for name in bridges if (network := _network(netlink, name, amiss)) is not None]
    warnings = (CILIUM,) if _is_there(CILIUM_DEVICE) else ()
    protocols = conntrack.tracked()
    if known is not None and known.texts == texts:
        same = replace(known.facts, networks=tuple(networks), services=services, protocols=protocols)
        if (same, amiss, warnings) == (known.facts, known.amiss, known.warnings):
            return known
    fib_trie, if_inet6, *switches = texts
    forwarding = frozenset(f for f, text in zip(_SWITCHES, switches, strict=False) if text.strip() not in ("", "0"))
    # A tentative one is not in use yet; when it is, that is announced. One of a link alone (fe80::) means nothing
    # without the link's name, which no mapping can say.
    ipv6 = [one.address for one in addresses6(if_inet6) if not one.tentative]
    facts = NodeFacts(
        forwarding,
        (frozenset[Address](local_addresses(fib_trie)) | frozenset(ipv6)) - services,
        free_ports=random_ports(),
        protocols=protocols,
        networks=tuple(networks),
        services=services,
    )
    return Node(facts, amiss, warnings, texts)


def _network(netlink: Netlink, name: str, amiss: dict[str, str]) -> BridgeNetwork | None:
    """Return the network that a bridge is, or None and say in ``amiss`` why it cannot be one."""
    try:
        link = netlink.link(name=name)
        if link.kind != "bridge":
            # Its rules drop what comes in by another device: on an uplink that would be everything.
            amiss[name] = f"{name} is a {link.kind or 'physical'} device and no bridge: nothing is done to it"
            return None
        interfaces = netlink.addresses(link.index)
    except OSError as error:
        gone = error.errno == errno.ENODEV
        amiss[name] = f"there is no bridge {name} yet" if gone else f"the bridge {name}: {error.strerror}"
        return None
    subnets = {interface.network for interface in interfaces if not interface.ip.is_link_local}
    return BridgeNetwork(name, tuple(sorted(subnets, key=lambda one: (one.version, one.network_address.packed))))


def _addresses_of(netlink: Netlink, device: str) -> frozenset[Address]:
    try:
        return frozenset(interface.ip for interface in netlink.addresses(netlink.link(name=device).index))
    except OSError:
        return frozenset()  # there is no such device on most nodes


def _is_there(device: str) -> bool:
    try:
        return socket.if_nametoindex(device) > 0
    except OSError:
        return False
