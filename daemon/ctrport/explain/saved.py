"""Tables out of what ``iptables-save`` prints. Pure.

Most rules are never looked at: a chain's lines are read when a packet comes to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from ..firewall.text import TAG, printed
from .ruleset import Base, Chain, Rule, Table
from .words import read_rule

#: Where the kernel's chains of each table hook in: at what, with which priority (linux/netfilter_ipv4.h), as what.
_BASES: dict[str, dict[str, tuple[str, int, str]]] = {
    "raw": {"PREROUTING": ("prerouting", -300, "filter"), "OUTPUT": ("output", -300, "filter")},
    "mangle": {
        **{name.upper(): (name, -150, "filter") for name in ("prerouting", "input", "forward", "postrouting")},
        "OUTPUT": ("output", -150, "route"),
    },
    "nat": {
        "PREROUTING": ("prerouting", -100, "nat"),
        "INPUT": ("input", 100, "nat"),
        "OUTPUT": ("output", -100, "nat"),
        "POSTROUTING": ("postrouting", 100, "nat"),
    },
    "filter": {name.upper(): (name, 0, "filter") for name in ("input", "forward", "output")},
    "security": {name.upper(): (name, 50, "filter") for name in ("input", "forward", "output")},
}
#: The tables of iptables.
NAMES = tuple(_BASES)

# iptables-nft-save says so of a table that nft has written what it cannot say.
_INCOMPATIBLE = re.compile(r"# Table `(\w+)' (?:is incompatible|contains incompatible base-chains)")


def incompatible(text: str) -> set[str]:
    """Return the names of the tables that the program could not print, or not all of."""
    return {found[1] for line in printed(text) if (found := _INCOMPATIBLE.match(line)) is not None}


def tables(text: str, kept_by: str, family: str) -> list[Table]:
    """Return the tables of one family (ip, ip6) that are in ``text``, but for those that are not all there."""
    found: list[Table] = []
    lines: dict[str, list[str]] = {}
    for line in printed(text):
        if line.startswith("*"):
            found.append(Table(kept_by, family, line[1:].strip()))
            lines = {}
        elif not found:
            continue
        elif line.startswith(":"):
            name, _, policy = line[1:].partition(" ")
            its = lines[name] = []
            table = found[-1]
            table.chains[name] = Chain(name, _base(table.name, name, policy), partial(_rules, its, table))
        elif line.startswith("-A "):
            name = line.split(" ", 2)[1]
            if name in lines:
                lines[name].append(line)
    unusable = incompatible(text)
    return [table for table in found if table.name not in unusable]


def _base(table: str, chain: str, policy: str) -> Base | None:
    where = _BASES.get(table, {}).get(chain)
    if where is None:
        return None
    hook, priority, kind = where
    return Base(hook, priority, kind, "drop" if policy.startswith("DROP") else "accept")


def _rules(lines: Sequence[str], table: Table) -> list[Rule]:
    return [_rule(line, table) for line in lines]


def _rule(line: str, table: Table) -> Rule:
    parts, comment = read_rule(line, table.chains)
    found = TAG.fullmatch(comment)
    return Rule(parts, line, comment, comment if found else None)
