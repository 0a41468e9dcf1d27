"""What the node itself is like: its addresses, whether it forwards, and the bridges that are run the Docker way.

Everything is as seen from the network namespace that the daemon runs in.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Node:
    """What is known of the node. ``amiss`` says, by the name of a bridge, why it cannot be run as a network.

    ``warnings`` are what may keep published ports from working, though nothing is wrong with them: a sentence each.
    """

    facts: NodeFacts
    amiss: dict[str, str]
    warnings: tuple[str, ...] = ()


def look(bridges: Iterable[str] = ()) -> Node:
    """Look at the node; ``bridges`` are those to be run the Docker way. Who else has host ports is not asked."""
    switches = {Family.IPV4: "/proc/sys/net/ipv4/ip_forward", Family.IPV6: "/proc/sys/net/ipv6/conf/all/forwarding"}
    forwarding = frozenset(f for f, path in switches.items() if read_if_any(path).strip() not in ("", "0"))
    ipv4 = local_addresses(read("/proc/self/net/fib_trie"))
    # A tentative one is not in use yet; when it is, that is announced. One of a link alone (fe80::) means nothing
    # without the link's name, which no mapping can say.
    ipv6 = [one.address for one in addresses6(read_if_any("/proc/self/net/if_inet6")) if not one.tentative]
    amiss: dict[str, str] = {}
    with contextlib.closing(Netlink()) as netlink:
        services = _addresses_of(netlink, IPVS_DEVICE)
        networks = [network for name in bridges if (network := _network(netlink, name, amiss)) is not None]
        warnings = (CILIUM,) if _exists(netlink, CILIUM_DEVICE) else ()
    facts = NodeFacts(
        forwarding,
        (frozenset[Address](ipv4) | frozenset(ipv6)) - services,
        free_ports=random_ports(),
        protocols=conntrack.tracked(),
        networks=tuple(networks),
        services=services,
    )
    return Node(facts, amiss, warnings)


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


def _exists(netlink: Netlink, device: str) -> bool:
    try:
        return netlink.link(name=device).name == device
    except OSError:
        return False
