"""Which host ports others answer on where they write nftables themselves: CNI's portmap plugin, and dockerd.

Each has a table of its own, with a rule a port in chains whose names are always the same. Read over netlink, without a
program: what is looked for in a rule is a protocol, a port, perhaps an address, and that it translates. kube-proxy has
a map instead (``nodeports``).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from ipaddress import ip_address

from .model import Family, Holder, Mapping, PortRange, Protocol
from .nfnetlink import NfTables, expressions
from .nlmsg import Interrupted, read_attributes

#: Tables and the chains in them.
CHAINS = {
    "cni_hostport": ("hostip_hostports", "hostports"),  # portmap, with "backend": "nftables"
    "docker-bridges": ("nat-prerouting-and-output",),  # dockerd 29, with "firewall-backend": "nftables"
}

_PROTOCOLS = {6: Protocol.TCP, 17: Protocol.UDP, 132: Protocol.SCTP}
# linux/netfilter/nf_tables.h: where a payload is taken from, a kind of meta, comparisons.
_NETWORK, _TRANSPORT, _L4PROTO = 1, 2, 16
_EQUAL, _AT_LEAST, _AT_MOST = 0, 5, 3
#: Where the destination address stands in a packet, and its length.
_DESTINATION = {Family.IPV4: (16, 4), Family.IPV6: (24, 16)}


class Unknown(Exception):
    """What these tables hold could not be seen; the message is one sentence for people."""


def holders(family: Family) -> list[Holder]:
    """Return the host ports of one family; none where there are no such tables. Raises ``Unknown``."""
    domain = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
    found: list[Holder] = []
    try:
        with contextlib.closing(NfTables()) as tables:
            for table, chains in CHAINS.items():
                for chain in chains:
                    for rule in tables.rules(domain, table, chain) or ():
                        found += _holder(rule, table, family)
    except (OSError, Interrupted) as error:
        raise Unknown(f"the tables of portmap and dockerd: {error!r}") from error
    return found


def _holder(rule: bytes, name: str, family: Family) -> Iterator[Holder]:
    """Yield who answers by a rule; nobody where it is not about one port, or some in a row, and translates."""
    address, protocol = family.unspecified, 0
    first, last = 0, 0
    loaded: tuple[int, ...] = ()
    translates = False
    for kind, data in expressions(rule):
        match kind:
            case "meta":
                loaded = (_number(data.get(2)),)
            case "payload":
                loaded = (_number(data.get(2)) + 100, _number(data.get(3)), _number(data.get(4)))
            case "cmp":
                how, value = _number(data.get(2)), read_attributes(data.get(3, b"")).get(1, b"")
                if loaded == (_L4PROTO,) and how == _EQUAL:
                    protocol = value[0]
                elif loaded == (100 + _TRANSPORT, 2, 2):
                    first = _number(value) if how in (_EQUAL, _AT_LEAST) else first
                    last = _number(value) if how in (_EQUAL, _AT_MOST) else last
                elif loaded == (100 + _NETWORK, *_DESTINATION[family]) and how == _EQUAL:
                    address = ip_address(value)
            case "nat":
                translates = True
    if translates and protocol in _PROTOCOLS and 1 <= first <= last:
        ports = PortRange(first, last)
        yield Holder(name, Mapping(address, ports, ports, _PROTOCOLS[protocol]))


def _number(value: bytes | None) -> int:
    return int.from_bytes(value or b"", "big")
