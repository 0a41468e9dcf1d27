"""The hairpin mode of one bridge port: whether the bridge sends a frame back through the port that it came by.

A container that calls its own published port needs it where iptables is asked about bridged frames too (the module
``br_netfilter``): its packet is translated on the bridge, as a frame, and goes back to where it came from. Otherwise
the packet is routed, and the bridge is none the wiser.

It has a price: the container hears its own multicasts, and among them its own question whether another has the IPv6
address that it is about to take. Linux knows its own question by a nonce (``enhanced_dad``, RFC 7527, the default since
4.10, and ctrport needs 4.15) and takes the address all the same. Only in a container that has switched that off, in
``all`` and on the device, an address that comes while the hairpin mode is on fails as a duplicate. So the mode is
switched on, but not where it is not needed.

Asked and set over netlink: sysfs shows the devices of the network namespace that it was mounted in, which need not be
this one, and is read-only below the unit's ``ProtectKernelTunables``.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Collection
from pathlib import Path

from .model import Family
from .netlink import Bridging, Netlink

_SWITCHES = {
    Family.IPV4: Path("/proc/sys/net/bridge/bridge-nf-call-iptables"),
    Family.IPV6: Path("/proc/sys/net/bridge/bridge-nf-call-ip6tables"),
}
#: From so many ports on they are asked for all at once, which takes a tenth of what that many questions take.
MANY = 8
#: What the kernel says of a port that is gone, or is no bridge's port any more.
_GONE = (errno.ENODEV, errno.EOPNOTSUPP)


def is_needed(bridge: str, family: Family) -> bool:
    """Whether the ports of ``bridge`` need it, for a container to reach its own published port in that family.

    Raises ``OSError``.
    """
    try:
        everywhere = _SWITCHES[family].read_text().strip() != "0"
    except FileNotFoundError:
        return False  # without br_netfilter what a bridge says for itself has no effect either
    if everywhere:
        return True
    with contextlib.closing(Netlink()) as netlink:
        found = _bridging(netlink, bridge)
    if found is None:
        return False
    return found.calls_iptables if family is Family.IPV4 else found.calls_ip6tables


def is_on(port: str) -> bool:
    """Whether it is on for ``port``; False where there is no such port. Raises ``OSError``."""
    with contextlib.closing(Netlink()) as netlink:
        found = _bridging(netlink, port)
    return found is not None and found.hairpin is True


def lacking(ports: Collection[str]) -> list[str]:
    """Return those of ``ports`` for which it is not on, or that are not there. Raises ``OSError``."""
    if len(ports) < MANY:
        return [port for port in ports if not is_on(port)]
    with contextlib.closing(Netlink()) as netlink:
        on = netlink.hairpins()
    return [port for port in ports if port not in on]


def switch(port: str, on: bool) -> bool:
    """Switch it for ``port``, and return whether that changed anything. Raises ``OSError``.

    A port that is gone, or that its bridge was taken from, took the mode along, which is no error.
    """
    with contextlib.closing(Netlink()) as netlink:
        found = _bridging(netlink, port)
        if found is None or found.hairpin is None or found.hairpin is on:
            return False
        try:
            netlink.set_hairpin(found.index, on)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return False
    return True


def _bridging(netlink: Netlink, name: str) -> Bridging | None:
    try:
        return netlink.bridging(name)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return None
