"""Which host ports kube-proxy answers on where it runs in its nftables mode, asked with the command nft.

There it has no chain of iptables, but a table of its own in each family, in which a map leads from each NodePort of a
Service that has endpoints to a chain. That chain is named after the Service. On which addresses of the node it answers
(``--nodeport-addresses``) is not asked: the number is the Service's, as it is in the iptables mode.

Whether there is such a table is asked over netlink: most nodes have none, and on these it takes no program.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

from .model import Family, Holder, Mapping, PortRange, Protocol
from .nfnetlink import NfTables
from .programs import NotInstalled, ProgramError, run

#: Seconds that asking may take. A map of 2,000 NodePorts beside 20,000 rules takes 0.02 s, and no table 0.002 s.
TIMEOUT = 10.0

_TABLE = "kube-proxy"
_TABLES = {Family.IPV4: "ip", Family.IPV6: "ip6"}
# Where a node has no /etc/protocols nft says a protocol by its number.
_PROTOCOLS: dict[object, Protocol] = {
    **{protocol.value: protocol for protocol in Protocol},
    6: Protocol.TCP,
    17: Protocol.UDP,
    132: Protocol.SCTP,
}
# external-HASH-NAMESPACE/SERVICE/PROTOCOL/PORT, the last of them empty where the port has no name. Kubernetes allows
# nothing else in names, and 63 characters of it.
_CHAIN = re.compile(r"external-[A-Z0-9]{8}-([a-z0-9.-]{1,63})/([a-z0-9.-]{1,63})/[a-z]+/([a-z0-9-]{0,63})")


class Unknown(Exception):
    """What kube-proxy's map holds could not be seen; the message is one sentence for people."""


async def holders(family: Family) -> list[Holder]:
    """Return the NodePorts of one family; none where there is no such table, or no nft. Raises ``Unknown``."""
    if not _is_there(family):
        return []
    question = f"list map {_TABLES[family]} {_TABLE} service-nodeports"
    try:
        ended = await run("nft", "--json", *question.split(), timeout=TIMEOUT)
    except NotInstalled:
        return []
    except ProgramError as error:
        raise Unknown(str(error)) from error
    if ended.status != 0:
        if "No such file or directory" in ended.err:
            return []
        raise Unknown(f"nft {question}: {' '.join(ended.err.split()) or f'exit status {ended.status}'}")
    try:
        return list(parse(ended.out, family))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise Unknown(f"nft {question}: the answer is not understood: {error!r}") from error


def _is_there(family: Family) -> bool:
    """Whether there is a table of kube-proxy's; where that cannot be told nft is asked, and says why."""
    domain = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
    try:
        with contextlib.closing(NfTables()) as tables:
            return tables.has_table(domain, _TABLE)
    except OSError:
        return True


def parse(answer: str, family: Family) -> Iterator[Holder]:
    """Read what ``nft --json list map`` prints of the map. Raises as what is no such answer makes it."""
    for item in json.loads(answer)["nftables"]:
        for key, verdict in item.get("map", {}).get("elem", ()):
            # An element that has a comment is one level down.
            named, number = key.get("elem", {}).get("val", key)["concat"]
            protocol, port = _PROTOCOLS.get(named), PortRange(number, number)
            if protocol is not None:
                yield Holder(_name(verdict), Mapping(family.unspecified, port, port, protocol))


def _name(verdict: dict[str, Any]) -> str:
    found = _CHAIN.fullmatch(str((verdict.get("goto") or {}).get("target", "")))
    if found is None:
        return "kube-proxy"
    return f"kube-proxy ({found[1]}/{found[2]}{':' if found[3] else ''}{found[3]})"
