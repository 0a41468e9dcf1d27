"""Chains of others that may drop what our own table has let through: whatever one table accepts, any other may drop.

Only those that are called for every packet that the node sends on are looked at, and what is jumped to from there is
not. iptables' own FORWARD is a matter of its own (``door``).
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from ..model import Family
from ..nfnetlink import NfTables, expressions, target
from ..nlmsg import read_attributes
from .sets import TABLE

_FORWARD = 2  # NF_INET_FORWARD
_INET = 1  # NFPROTO_INET: both families
_NAMES = {socket.AF_INET: "ip", socket.AF_INET6: "ip6", _INET: "inet"}
#: Names that can be part of a command which somebody is told to run.
_PLAIN = re.compile(r"[A-Za-z0-9_./-]{1,64}")
#: Expressions that say nothing of a packet.
_NO_CONDITION = ("counter", "log", "immediate", "reject")
_TRANSLATED = "ct status dnat"
_CT_STATUS, _IPS_DST_NAT = 2, 0x20  # linux/netfilter/nf_tables.h, linux/netfilter/nf_conntrack_common.h


@dataclass(frozen=True)
class Dropping:
    """A chain that drops what no rule of it lets through. ``family`` is that of its table, as nft calls it."""

    family: str
    table: str
    chain: str

    def __str__(self) -> str:
        plain = _PLAIN.fullmatch(self.table) and _PLAIN.fullmatch(self.chain)
        table, chain = (self.table, self.chain) if plain else (f"{self.table!a:.80}", f"{self.chain!a:.80}")
        command = f": `nft insert rule {self.family} {table} {chain} ct status dnat accept`" if plain else ""
        return (
            f"the chain {chain} of the table {self.family} {table} drops what it does not let through itself, and what "
            f"is published may be among it{command}"
        )


def dropping(tables: NfTables, family: Family) -> list[Dropping]:
    """Return the chains of others that drop packets of one family on their way through the node. Raises ``OSError``."""
    domain = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
    found = []
    for its in (domain, _INET):
        for base in tables.base_chains(its, _FORWARD):
            if base.table == TABLE or (base.table, base.name) == ("filter", "FORWARD"):
                continue
            rules = tables.rules(its, base.table, base.name)
            if rules is not None and drops(rules, accepts=base.accepts):
                found.append(Dropping(_NAMES[its], base.table, base.name))
    return found


def drops(rules: Iterable[bytes], *, accepts: bool) -> bool:
    """Whether a chain drops whatever it does not let through, and does not let through all that was translated.

    ``accepts`` is its policy.
    """
    for rule in rules:
        conditions, verdict = _read(rule)
        if verdict == "ACCEPT" and conditions in ((), (_TRANSLATED,)):
            return False
        if verdict == "DROP" and not conditions:
            return True
    return not accepts


def _read(rule: bytes) -> tuple[tuple[str, ...], str]:
    """Return what a rule asks of a packet, in words where that matters, and what it does with it."""
    there = list(expressions(rule))
    asked = [(name, data) for name, data in there if name not in _NO_CONDITION]
    goes = "DROP" if any(name == "reject" for name, _ in there) else target(rule)
    if [name for name, _ in asked] == ["ct", "bitwise", "cmp"]:
        ct, bits, compared = (data for _, data in asked)
        mask = int.from_bytes(read_attributes(bits.get(4, b"")).get(1, b""), sys.byteorder)
        about, differs = int.from_bytes(ct.get(2, b""), "big"), int.from_bytes(compared.get(2, b""), "big")
        if (about, mask, differs) == (_CT_STATUS, _IPS_DST_NAT, 1):
            return (_TRANSLATED,), goes
    return tuple(name for name, _ in asked), goes
