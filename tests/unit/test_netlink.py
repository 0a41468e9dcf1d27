"""Which announcements tell of an address, and of whose."""

from __future__ import annotations

import errno
import socket
import struct
from typing import Any

import pytest

from ctrport.netlink import _tell_of_others, _tell_of_own, _tells_of_change, _tells_of_new

NEW, DELETED = 20, 21
UNIVERSE, LINK, HOST = 0, 253, 254
PERMANENT, TENTATIVE = 0x80, 0x40


def announced(kind: int, family: int, *, scope: int = UNIVERSE, flags: int = PERMANENT) -> bytes:
    body = struct.pack("=BBBBI", family, 64, flags, scope, 2) + struct.pack("=HHI", 8, 8, flags)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


LINK_LOCAL = announced(NEW, socket.AF_INET6, scope=LINK)

CHANGES = {
    "an address of IPv4": (announced(NEW, socket.AF_INET), True),
    "one of IPv4 that went": (announced(DELETED, socket.AF_INET), True),
    "one of IPv4 for this link alone": (announced(NEW, socket.AF_INET, scope=LINK), True),
    "an address of IPv6": (announced(NEW, socket.AF_INET6), True),
    "one of IPv6 that went": (announced(DELETED, socket.AF_INET6), True),
    "one that went before it was usable": (announced(DELETED, socket.AF_INET6, flags=TENTATIVE), True),
    "one that is not usable yet": (announced(NEW, socket.AF_INET6, flags=TENTATIVE), False),
    "that of a veth": (LINK_LOCAL, False),
    "that of a veth that went": (announced(DELETED, socket.AF_INET6, scope=LINK), False),
    "several, the last of which counts": (LINK_LOCAL + LINK_LOCAL + announced(NEW, socket.AF_INET6), True),
    "nothing": (b"", False),
    "rubbish": (bytes(40), False),
}


@pytest.mark.parametrize("case", CHANGES)
def test_only_addresses_that_a_mapping_can_have_are_news(case: str) -> None:
    said, expected = CHANGES[case]
    assert _tells_of_change(said) is expected


ELSEWHERE = {
    "an address of IPv4": (announced(NEW, socket.AF_INET), True),
    "an address of IPv6 that may be another's, too": (announced(NEW, socket.AF_INET6, flags=TENTATIVE), True),
    "one that went": (announced(DELETED, socket.AF_INET), False),
    "that of a veth": (LINK_LOCAL, False),
    "that of the loopback device": (announced(NEW, socket.AF_INET, scope=HOST), False),
    "rubbish": (bytes(40), False),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_only_addresses_that_a_container_can_be_reached_by_are_news_of_it(case: str) -> None:
    said, expected = ELSEWHERE[case]
    assert _tells_of_new(said) is expected


class Listener:
    """A socket that was told these, each with an id of a network namespace or without; None is more than it could hold.

    By kernels of other versions than this one, too.
    """

    def __init__(self, *told: tuple[bytes, int | None] | None) -> None:
        self._told = list(told)

    def recvmsg(self, size: int, room: int) -> tuple[bytes, list[tuple[int, int, bytes]], int, None]:
        if not self._told:
            raise BlockingIOError
        one = self._told.pop(0)
        if one is None:
            raise OSError(errno.ENOBUFS, "No buffer space available")
        said, nsid = one
        return said, [] if nsid is None else [(270, 8, struct.pack("=i", nsid))], 0, None


def test_an_address_of_the_node_is_its_own_whatever_id_it_has_in_itself() -> None:
    own, elsewhere = announced(NEW, socket.AF_INET), announced(NEW, socket.AF_INET6)
    told: list[int | None] = []
    listener: Any = Listener((own, None), (LINK_LOCAL, None), None)
    _tell_of_own(listener, told.append)
    assert told == [None, None]
    told.clear()
    listener = Listener((own, None), (own, 1), (elsewhere, 7), (elsewhere, -1), None, (announced(DELETED, 2), 7))
    _tell_of_others(listener, told.append)
    assert told == [1, 7]
