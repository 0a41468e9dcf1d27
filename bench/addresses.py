"""When a container on a node got its address: the kernel's own announcement, from within its network namespace.

The time is read where the announcement is received, as with ``bench.commits``.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from ipaddress import ip_address

from ctrport.scheduling import ask_for_short_turns
from embedded.host import Host, inside
from embedded.wait import eventually

_SOL_NETLINK, _LISTEN_ALL_NSID = 270, 8  # linux/socket.h, linux/netlink.h: other namespaces', too
_RTMGRP_IPV4_IFADDR, _RTM_NEWADDR, _IFA_LOCAL = 0x10, 20, 2  # linux/rtnetlink.h, linux/if_addr.h


class Addresses:
    """Listens to the addresses that come in a host's network namespace, and in those that it has an id for.

    To be used as a context manager.
    """

    def __init__(self, host: Host) -> None:
        self._seen: list[tuple[int, str]] = []
        self._socket = inside(host.pid, ("net",), _listening)
        self._socket.settimeout(0.2)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Addresses:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()
        self._socket.close()

    def at(self, address: str, since: int) -> int:
        """Return when an address first came since a time, in ns since the epoch. Raises ``AssertionError`` without."""
        seen = eventually(
            lambda: [at for at, its in tuple(self._seen) if its == address and at >= since],
            within=5,
            what=f"the announcement of {address}",
        )
        return seen[0]

    def _listen(self) -> None:
        ask_for_short_turns()  # for this thread alone, so that what is heard is not late
        while not self._end.is_set():
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            at = time.time_ns()
            self._seen += ((at, address) for address in _came(data))


def _listening() -> socket.socket:
    listening = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    listening.setsockopt(_SOL_NETLINK, _LISTEN_ALL_NSID, 1)
    listening.bind((0, _RTMGRP_IPV4_IFADDR))
    return listening


def _came(data: bytes) -> list[str]:
    """Return the addresses that came, by what was received: headers of 16 bytes, then of 8, then attributes."""
    found = []
    while len(data) >= 16:
        length, kind = struct.unpack_from("=IH", data)
        if length < 16:
            break
        if kind == _RTM_NEWADDR:
            found += _local(data[24:length])
        data = data[length + 3 & ~3 :]
    return found


def _local(attributes: bytes) -> list[str]:
    while len(attributes) >= 4:
        length, kind = struct.unpack_from("=HH", attributes)
        if length < 4:
            break
        if kind == _IFA_LOCAL:
            return [str(ip_address(attributes[4:length]))]
        attributes = attributes[length + 3 & ~3 :]
    return []
