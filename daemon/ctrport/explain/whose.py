"""Whose a table, a chain or a rule is, by the names that programs give theirs. Pure."""

from __future__ import annotations

import re

from ..firewall.text import owner
from ..rules import USER_CHAIN
from .cases import At
from .nftset import service_of
from .ruleset import LEGACY, NFT

OPERATOR = "the operator"
CTRPORT = "ctrport"

#: How chains begin that a program makes in the tables of iptables.
_PREFIXES = {
    "KUBE-": "kube-proxy",
    "CNI-HOSTPORT": "CNI portmap",
    "CNI-DN-": "CNI portmap",
    "CNI-": "CNI",
    "cali-": "Calico",
    "FLANNEL-": "flannel",
    "CILIUM_": "Cilium",
    "ANTREA-": "Antrea",
    "WEAVE": "Weave Net",
    "DOCKER": "dockerd",
    "NETAVARK": "Podman",
    "LIBVIRT_": "libvirt",
    "ufw-": "ufw",
    "ufw6-": "ufw",
    "f2b-": "fail2ban",
    "CRIO-": "CRI-O",
    "IN_": "firewalld",
    "FWD": "firewalld",
    "KUBE-FIREWALL": "the kubelet",
}
#: What tables of nft are called that a program makes.
_TABLES = {
    "firewalld": "firewalld",
    "kube-proxy": "kube-proxy",
    "docker-bridges": "dockerd",
    "netavark": "Podman",
    "cni_hostport": "CNI portmap",
    "crio-hostports": "CRI-O",
    "cilium": "Cilium",
    "libvirt_network": "libvirt",
    "calico": "Calico",
    "fail2ban": "fail2ban",
    "f2b-table": "fail2ban",
    CTRPORT: CTRPORT,
}
# What kube-proxy writes into comments of a Service's rules: namespace/name:port, and words behind it perhaps.
_SERVICE = re.compile(r"([a-z0-9][a-z0-9.-]{0,62}/[a-z0-9][a-z0-9.-]{0,62}(?::[a-z0-9-]{1,63})?)(?= |$)")


def owner_of(at: At, ours: str) -> str:
    """Return who put something there, empty where that cannot be told; ``ours`` is ``Facts.chain``."""
    if at.rule is not None and at.rule.tag is not None:
        its = owner(at.rule.tag)
        return f"{CTRPORT} ({its})" if "/" in its.partition(" ")[0] else CTRPORT
    found = _TABLES.get(at.table.name, "") if at.table.kept_by == NFT else chain_owner(at.chain.name, ours)
    service = _service(at)
    return f"{found} ({service})" if found == "kube-proxy" and service else found


def chain_owner(chain: str, ours: str) -> str:
    """Return whose chain of iptables it is, by its name."""
    if chain == USER_CHAIN:
        return OPERATOR
    if ours and (chain == ours or chain.startswith(f"{ours}-")):
        return CTRPORT
    fitting = [prefix for prefix in _PREFIXES if chain.startswith(prefix)]
    return _PREFIXES[max(fitting, key=len)] if fitting else ""


def _service(at: At) -> str | None:
    if at.table.kept_by == NFT:
        return service_of(at.chain.name)
    found = _SERVICE.match(at.rule.comment) if at.rule is not None else None
    return found[1] if found else None


def is_ours(at: At) -> bool:
    """Whether ctrport put something there: a rule with its comment, or whatever is in its own nft tables."""
    return (at.rule is not None and at.rule.tag is not None) or (at.table.kept_by == NFT and at.table.name == CTRPORT)


def place_of(at: At) -> str:
    """Return where something is: a chain of a table."""
    if at.table.kept_by == NFT:
        return f"{at.table.family} {at.table.name} {at.chain.name}"
    return f"{at.table.name} {at.chain.name}" + (" (legacy)" if at.table.kept_by == LEGACY else "")


def command_of(at: At) -> str:
    """Return the program that lists and changes the table."""
    v6 = at.table.family == "ip6"
    return at.table.kept_by.replace("iptables", "ip6tables") if v6 else at.table.kept_by
