"""Which backend this node's tables are written with, and for which families.

The backend is the one that the kubelet writes with, so that there is one truth.

The kubelet leaves a chain in ``mangle`` for others to see: KUBE-IPTABLES-HINT (since 1.24) or KUBE-KUBELET-CANARY. The
nft tables are asked first, and the legacy ones only where they exist already: to ask for one would create it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from ..model import Family
from ..nfnetlink import NfTables
from ..programs import Ended, NotInstalled, ProgramError, run
from . import FirewallError
from .commands import failure
from .sets import TABLE
from .text import printed

log = logging.getLogger(__name__)

#: Seconds that asking may take.
TIMEOUT = 30.0

HINTS = ("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY")


@dataclass(frozen=True)
class Choice:
    """The backend to write with, and why, in words for the log."""

    backend: str
    reason: str


async def choose(asked: str) -> Choice:
    """Return which backend ``firewall.backend`` means here. Loads nothing, and makes no table.

    Raises ``FirewallError`` where that cannot be told now.
    """
    if asked != "auto":
        return Choice(asked, "firewall.backend says so")
    if await _hinted("iptables-nft-save"):
        return Choice("iptables-nft", "the kubelet writes nft tables")
    if "mangle" in legacy_tables(Family.IPV4) and await _hinted("iptables-legacy-save"):
        return Choice("iptables-legacy", "the kubelet writes legacy tables")
    return Choice("iptables-nft", "no kubelet has left a hint")


#: What is asked, by backend, to see whether it serves IPv6. A legacy table is not asked for: that would make it.
_QUESTIONS = {
    "iptables-nft": ("ip6tables-nft-save", "-t", "nat"),
    "iptables-legacy": ("ip6tables-legacy-save", "-V"),
    "nftables": ("nft", "list", "tables", "ip6"),
}


async def families(backend: str) -> tuple[Family, ...]:
    """Return the families that can be served here: IPv4, and IPv6 where the kernel and iptables have it.

    Raises ``FirewallError`` where that cannot be told now: what is served already is not to be given up for that.
    """
    if not _has_ipv6():
        log.info("IPv6 is not served: this kernel has none, or it is switched off")
        return (Family.IPV4,)
    program = "nft" if backend == "nftables" else backend
    try:
        ended = await run(*(question := _QUESTIONS[backend]), timeout=TIMEOUT)
    except NotInstalled as error:
        if shutil.which(program) is not None:  # or nothing can be served at all, which is said where it shows
            log.warning("IPv6 is not served: %s", error)
        return (Family.IPV4,)
    except ProgramError as error:
        raise FirewallError(f"whether IPv6 can be served cannot be told: {error}") from error
    if ended.status != 0 and not _is_lasting(ended):
        raise failure(f"whether IPv6 can be served cannot be told: {question[0]}", ended)
    if ended.status != 0:
        log.warning("IPv6 is not served: %s: %s", question[0], " ".join(ended.err.split()))
        return (Family.IPV4,)
    return (Family.IPV4, Family.IPV6)


#: What iptables and nft say of a kernel that does not have what they ask for, and iptables of tables that only nft can
#: have made. The errors of the kernel are those of errno(3): EPROTONOSUPPORT, EOPNOTSUPP, EAFNOSUPPORT, ENOSYS.
_LASTING = ("not supported", "Function not implemented", "do you need to insmod", "incompatible")


def _is_lasting(ended: Ended) -> bool:
    """Whether what a program failed for is how this node is, and not how it is just now."""
    return any(words in ended.err for words in _LASTING)


def legacy_tables(family: Family) -> set[str]:
    """Return the names of the legacy tables that there are, without making one by asking.

    Raises ``OSError`` where no more files may be open.
    """
    name = "ip_tables_names" if family is Family.IPV4 else "ip6_tables_names"
    try:
        return set(Path(f"/proc/thread-self/net/{name}").read_text().split())
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # or a table that is there would be taken for one that is not
        return set()  # the module is not loaded


def own_tables() -> tuple[Family, ...]:
    """Return the families in which there is a table of our name in nf_tables, whosever it is."""
    return tuple(family for family in Family if _has_table(family, TABLE))


def may_have_iptables_nft() -> bool:
    """Whether iptables-nft is installed, or there are tables that it may have written."""
    names = ("nat", "filter", "raw")
    return shutil.which("iptables-nft-save") is not None or any(
        _has_table(family, name) for family in Family for name in names
    )


def _has_table(family: Family, name: str) -> bool:
    try:
        with contextlib.closing(NfTables()) as tables:
            return tables.has_table(_DOMAINS[family], name)
    except OSError:
        return False  # there is no nf_tables, or not for that family


_DOMAINS = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}


def _has_ipv6() -> bool:
    return Path("/proc/sys/net/ipv6").exists()


async def _hinted(program: str) -> bool:
    try:
        ended = await run(program, "-t", "mangle", timeout=TIMEOUT)
    except NotInstalled:
        return False  # it gives no hint; that it cannot be used is said where it is used
    except ProgramError as error:
        raise FirewallError(f"which backend the kubelet writes with cannot be told: {error}") from error
    if ended.status != 0 and not _is_lasting(ended):
        raise failure(f"which backend the kubelet writes with cannot be told: {program}", ended)
    chains = {line[1:].split(" ")[0] for line in printed(ended.out) if line.startswith(":")}
    return not chains.isdisjoint(HINTS)
