"""Passing 127.0.0.0/8 from host to host, which a kernel refuses unless it is told otherwise (CVE-2020-8558)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from embedded.host import Place

_OUT = """
echo 1 >/proc/sys/net/ipv4/conf/eth0/route_localnet
ip address del 127.0.0.1/8 dev lo
ip route add 127.0.0.0/8 via "$1"
"""
_BACK = """
ip route del 127.0.0.0/8
ip address add 127.0.0.1/8 dev lo
echo 0 >/proc/sys/net/ipv4/conf/eth0/route_localnet
"""


@contextlib.contextmanager
def loopback_goes_to(gateway: str, place: Place) -> Iterator[None]:
    """Make a place an attacker: it sends what is for 127.0.0.1 to ``gateway``, and takes the answers from there."""
    place.run("sh", "-ec", _OUT, "sh", gateway)
    try:
        yield
    finally:
        place.run("sh", "-ec", _BACK)


@contextlib.contextmanager
def loopback_leaves(place: Place) -> Iterator[None]:
    """Let a place send from an address in 127.0.0.0/8, such as 127.0.0.5: from 127.0.0.1 no other host takes it."""
    place.run("sh", "-ec", "echo 1 >/proc/sys/net/ipv4/conf/eth0/route_localnet")
    try:
        yield
    finally:
        place.run("sh", "-ec", "echo 0 >/proc/sys/net/ipv4/conf/eth0/route_localnet")
