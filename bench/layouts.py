"""The rules that peers keep for a mapping, written in their form for thousands where they themselves would take hours.

What is written is read off what the peer has written itself for one port, so that the form is its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from embedded.node import Node

#: How many mappings are written by one ``iptables-restore``.
_AT_ONCE = 2000


def like_docker(node: Node, address: str, known: int, ports: Iterable[int]) -> None:
    """Write for host ports, each onto the same port of ``address``, what dockerd has for ``known``, which is such."""
    templates = {
        "filter": [line for line in _saved(node, "filter") if f"{address}/32" in line and _has(line, known)],
        "nat": [line for line in _saved(node, "nat") if address in line and _has(line, known)],
    }
    if (len(templates["filter"]), len(templates["nat"])) != (1, 2):
        raise RuntimeError(f"the rules of dockerd for port {known} are not as expected: {templates}")
    for some in _lots(ports):
        text = []
        for table, lines in templates.items():
            text += [f"*{table}", *(_for(line, known, port) for port in some for line in lines), "COMMIT"]
        _restore(node, text)


def like_portmap(node: Node, known: int, ports: Iterable[int]) -> None:
    """Write for host ports what portmap has for ``known``, as if each were of a container of its own."""
    saved = _saved(node, "nat")
    entries = [line for line in saved if line.startswith("-A CNI-HOSTPORT-DNAT ") and _has(line, known)]
    if len(entries) != 1:
        raise RuntimeError(f"the rules of portmap for port {known} are not as expected: {entries}")
    chain = entries[0].rpartition(" -j ")[2]
    lines = [line for line in saved if line.startswith(f"-A {chain} ")] + entries
    for some in _lots(ports):
        names = {port: f"CNI-DN-{port:021x}" for port in some}
        text = ["*nat", *(f":{name} - [0:0]" for name in names.values())]
        text += [_for(line.replace(chain, name), known, port) for port, name in names.items() for line in lines]
        _restore(node, [*text, "COMMIT"])


def _saved(node: Node, table: str) -> list[str]:
    saved = node.run("iptables-nft-save", "-t", table).stdout.splitlines()
    return [line for line in saved if line.startswith("-A ")]


def _has(line: str, port: int) -> bool:
    return re.search(rf"(--dports? |:){port}\b", line) is not None


def _for(line: str, known: int, port: int) -> str:
    return re.sub(rf"(--dports? |:){known}\b", rf"\g<1>{port}", line)


def _lots(ports: Iterable[int]) -> Iterator[list[int]]:
    left = list(ports)
    while left:
        yield left[:_AT_ONCE]
        del left[:_AT_ONCE]


def _restore(node: Node, lines: list[str]) -> None:
    node.run("iptables-nft-restore", "--noflush", input="\n".join([*lines, ""]))
