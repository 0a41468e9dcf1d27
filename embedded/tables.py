"""The text of iptables-save, made fit for comparing."""

from __future__ import annotations

import re

TABLES = ("raw", "mangle", "nat", "filter")

_COUNTERS = re.compile(r" ?\[\d+:\d+\]")
_IDLE_CHAIN = re.compile(r":\S+ ACCEPT")


def comparable(saved: str, title: str) -> list[str]:
    """Return the lines of each table after one of ``title`` and its name: no counters, no comments.

    A table that does nothing, with built-in chains only, all empty and ACCEPT, is left out: the nft backend makes such
    a table of one that somebody looked at.
    """
    lines: list[str] = []
    for table in TABLES:
        found = re.search(rf"^\*{table}\n(.*?)^COMMIT$", saved, re.MULTILINE | re.DOTALL)
        content = [_COUNTERS.sub("", line) for line in found[1].splitlines()] if found else []
        if not all(_IDLE_CHAIN.fullmatch(line) for line in content):
            lines += [f"{title} {table}", *content, ""]
    return lines
