"""Who else on this node translates ports, filters what is forwarded, or writes the tables: for whoever reads the log.

Looked for by the names of processes, of chains and of devices. Nothing depends on it: who holds a host port is seen
elsewhere, and by other means.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from pathlib import Path

from .netlink import Netlink
from .nfnetlink import NfTables
from .nlmsg import Interrupted
from .node import CILIUM_DEVICE, IPVS_DEVICE

#: Processes by the name that they have for the kernel, at most 15 characters. k3s and RKE2 have kube-proxy in theirs.
_PROCESSES = {
    "kube-proxy": "kube-proxy",
    "k3s-server": "k3s",
    "k3s-agent": "k3s",
    "dockerd": "dockerd",
    "cilium-agent": "cilium",
    "calico-node": "calico",
    "flanneld": "flannel",
    "firewalld": "firewalld",
}
_INET = 1  # NFPROTO_INET, both families in one table (linux/netfilter.h)
#: Chains in tables of iptables, by how their names begin.
_CHAINS = {"KUBE-SERVICES": "kube-proxy", "cali-": "calico", "CILIUM_": "cilium", "FLANNEL-": "flannel"}
#: Tables of nf_tables.
_TABLES = {"kube-proxy": "kube-proxy", "firewalld": "firewalld"}
_DEVICES = {IPVS_DEVICE: "kube-proxy", CILIUM_DEVICE: "cilium"}


def found() -> dict[str, str]:
    """Return who is there, and by what that was seen."""
    seen: dict[str, list[str]] = {}
    for pid, name in _processes():
        seen.setdefault(_PROCESSES[name], []).append(f"pid {pid}")
    for its, name in _by_chains(_chains()):
        seen.setdefault(its, []).append(name)
    for its, name in _by_devices():
        seen.setdefault(its, []).append(name)
    return {its: ", ".join(signs) for its, signs in sorted(seen.items())}


def _processes() -> list[tuple[int, str]]:
    processes: list[tuple[int, str]] = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            name = path.read_text().rstrip("\n")
            if name in _PROCESSES:
                processes.append((int(path.parent.name), name))
    return sorted(processes)


def _chains() -> set[tuple[str, str]]:
    """Return the chains of all families, as far as the kernel tells, each behind its table's name."""
    chains = set[tuple[str, str]]()
    for family in (_INET, socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, Interrupted), contextlib.closing(NfTables()) as tables:
            chains |= tables.chains(family)
    return chains


def _by_chains(chains: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return whose chains there are, and of which sort, whatever their number."""
    signs = set[tuple[str, str]]()
    for table, chain in chains:
        if table in _TABLES:
            signs.add((_TABLES[table], f"table {table}"))
        signs |= {(its, f"chains {begin}*") for begin, its in _CHAINS.items() if chain.startswith(begin)}
    return sorted(signs)


def _by_devices() -> list[tuple[str, str]]:
    signs: list[tuple[str, str]] = []
    with contextlib.suppress(OSError), contextlib.closing(Netlink()) as netlink:
        for device, its in _DEVICES.items():
            with contextlib.suppress(OSError):
                signs.append((its, f"device {netlink.link(name=device).name}"))
    return signs
