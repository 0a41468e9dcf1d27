"""What the packet table is tried under: every combination of its dimensions, and a selection with all pairs of them."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

Protocol = Literal["tcp", "udp", "sctp"]
Family = Literal["IPv4", "IPv6"]
BridgeNf = Literal[0, 1]
Policy = Literal["ACCEPT", "DROP"]
Backend = Literal["iptables-nft", "iptables-legacy", "nftables"]
Wiring = Literal["bridge with ipMasq", "bridge without ipMasq", "routed veth"]

PROTOCOLS: tuple[Protocol, ...] = ("tcp", "udp", "sctp")
FAMILIES: tuple[Family, ...] = ("IPv4", "IPv6")
BRIDGE_NF: tuple[BridgeNf, ...] = (0, 1)
POLICIES: tuple[Policy, ...] = ("ACCEPT", "DROP")
WIRINGS: tuple[Wiring, ...] = ("bridge with ipMasq", "bridge without ipMasq", "routed veth")

BACKENDS: tuple[Backend, ...] = ("iptables-nft", "iptables-legacy", "nftables")

#: The kind of a protocol's sockets, and the third argument of socket(2).
SOCKETS: dict[Protocol, tuple[socket.SocketKind, int]] = {
    "tcp": (socket.SOCK_STREAM, 0),
    "udp": (socket.SOCK_DGRAM, 0),
    "sctp": (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
}


@dataclass(frozen=True)
class Site:
    """What is the same for everything on one node."""

    bridge_nf: BridgeNf
    forward_policy: Policy
    network: Wiring
    backend: Backend

    def __str__(self) -> str:
        return f"{self.network}, bridge-nf {self.bridge_nf}, FORWARD {self.forward_policy}, {self.backend}"

    @property
    def program(self) -> str:
        """The command for the iptables that everything is in here, or is beside our own table."""
        return "iptables-nft" if self.backend == "nftables" else self.backend

    @property
    def programs(self) -> tuple[str, str]:
        """The same of IPv4 and of IPv6."""
        return self.program, self.program.replace("ip", "ip6", 1)


@dataclass(frozen=True)
class Setting:
    """One combination of the dimensions.

    ``bridge_nf`` is bridge-nf-call-iptables and bridge-nf-call-ip6tables, ``forward_policy`` that of FORWARD in both
    families, ``network`` how the published container is joined to the node, ``backend`` what writes the tables.
    """

    protocol: Protocol
    family: Family
    bridge_nf: BridgeNf
    forward_policy: Policy
    network: Wiring
    backend: Backend

    @property
    def site(self) -> Site:
        """The part of it that a node has."""
        return Site(self.bridge_nf, self.forward_policy, self.network, self.backend)

    def __str__(self) -> str:
        return f"{self.protocol} over {self.family}, {self.site}"


#: The names of the dimensions, those of Setting.
DIMENSIONS: tuple[str, ...] = tuple(field.name for field in fields(Setting))

Pair = tuple[str, object, str, object]


def product(
    protocols: Sequence[Protocol] = PROTOCOLS,
    families: Sequence[Family] = FAMILIES,
    backends: Sequence[Backend] = BACKENDS,
) -> tuple[Setting, ...]:
    """Return every setting there is with those protocols, families and backends, those of one site in a row."""
    sites = itertools.product(backends, WIRINGS, BRIDGE_NF, POLICIES)
    return tuple(
        Setting(protocol, family, bridge_nf, policy, network, backend)
        for backend, network, bridge_nf, policy in sites
        for family in families
        for protocol in protocols
    )


def pairs(setting: Setting) -> frozenset[Pair]:
    """Return each two dimensions with the values that they have here together."""
    return frozenset(
        (one, getattr(setting, one), other, getattr(setting, other))
        for one, other in itertools.combinations(DIMENSIONS, 2)
    )


def pairwise(protocols: Sequence[Protocol] = PROTOCOLS, families: Sequence[Family] = FAMILIES) -> tuple[Setting, ...]:
    """Return few settings in which each pair of values of two dimensions occurs, the same ones each time.

    SCTP only adds to the selection for the others, since many kernels have none: skipping it there loses no other pair.
    So does each backend: with the first alone all other pairs occur already.
    """
    usual = tuple(protocol for protocol in protocols if protocol != "sctp")
    selected: list[Setting] = []
    steps = itertools.product((BACKENDS[:1], BACKENDS), (usual, protocols))
    for candidates in (product(these, families, backends) for backends, these in steps):
        missing = _all_pairs(candidates) - _all_pairs(selected)
        while missing:
            # What a site costs is the node; with the same gain, take one that is there already.
            sites = {setting.site for setting in selected}
            best = max(candidates, key=lambda setting: (len(pairs(setting) & missing), setting.site in sites))
            selected.append(best)
            missing -= pairs(best)
    return tuple(setting for setting in product(protocols, families) if setting in selected)


def _all_pairs(settings: Iterable[Setting]) -> set[Pair]:
    return {pair for setting in settings for pair in pairs(setting)}


def lacking(protocol: Protocol) -> str | None:
    """Return why this machine cannot try a protocol, None where it can."""
    kind, proto = SOCKETS[protocol]
    try:
        socket.socket(socket.AF_INET, kind, proto).close()
    except OSError as error:
        return f"the kernel has no {protocol} ({error.strerror})"
    return None
