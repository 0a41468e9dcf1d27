"""Which backend this node's tables are written with, and for which families.

The backend is the one that the kubelet writes with, so that there is one truth.

The kubelet leaves a chain in ``mangle`` for others to see: KUBE-IPTABLES-HINT (since 1.24) or KUBE-KUBELET-CANARY. The
nft tables are asked first, and the legacy ones only where they exist already: to ask for one would create it.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from ..model import Family
from ..programs import ProgramError, run
from . import Unusable

log = logging.getLogger(__name__)

#: Seconds that asking may take.
TIMEOUT = 30.0

HINTS = ("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY")


async def detect() -> str:
    """Return why ``auto`` takes iptables-nft here, in words for the log. Raises ``Unusable`` where it must not."""
    if await _hinted("iptables-nft-save"):
        return "the kubelet writes nft tables"
    if _legacy_mangle_exists() and await _hinted("iptables-legacy-save"):
        raise Unusable(
            "this node's kubelet writes legacy tables, which cannot be done yet; "
            "firewall.backend: iptables-nft writes nft tables all the same"
        )
    return "no kubelet has left a hint"


async def families() -> tuple[Family, ...]:
    """Return the families that can be served here: IPv4, and IPv6 where the kernel and iptables have it."""
    if not _has_ipv6():
        log.info("IPv6 is not served: this kernel has none, or it is switched off")
        return (Family.IPV4,)
    try:
        ended = await run("ip6tables-nft-save", "-t", "nat", timeout=TIMEOUT)
    except ProgramError as error:
        if shutil.which("iptables-nft") is not None:  # or nothing can be served at all, which is said where it shows
            log.warning("IPv6 is not served: %s", error)
        return (Family.IPV4,)
    if ended.status != 0:
        log.warning("IPv6 is not served: ip6tables-nft-save: %s", " ".join(ended.err.split()))
        return (Family.IPV4,)
    return (Family.IPV4, Family.IPV6)


def _has_ipv6() -> bool:
    return Path("/proc/sys/net/ipv6").exists()


def _legacy_mangle_exists() -> bool:
    try:
        return "mangle" in Path("/proc/net/ip_tables_names").read_text().split()
    except OSError:
        return False


async def _hinted(program: str) -> bool:
    try:
        ended = await run(program, "-t", "mangle", timeout=TIMEOUT)
    except ProgramError:
        return False  # what cannot be asked gives no hint; that it cannot be used is said where it is used
    chains = {line[1:].split(" ")[0] for line in ended.out.splitlines() if line.startswith(":")}
    return not chains.isdisjoint(HINTS)
