"""Which backend this node's tables are written with: where the kubelet writes, so that there is one truth.

The kubelet leaves a chain in ``mangle`` for others to see: KUBE-IPTABLES-HINT (since 1.24) or KUBE-KUBELET-CANARY. The
nft tables are asked first, and the legacy ones only where they exist already: to ask for one would create it.
"""

from __future__ import annotations

from pathlib import Path

from ..programs import ProgramError, run
from . import Unusable

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
