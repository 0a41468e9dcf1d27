"""Reservations of host ports on a host without containers, and other processes that want the same ports."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from ipaddress import ip_address
from typing import TypeVar

from ctrport.hostports import Claim, Reservations
from ctrport.model import PortRange, Protocol
from embedded.host import Host, inside

T = TypeVar("T")

KINDS = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}
PORT = 8080


class Room:
    """Reservations that are made in a host's network namespace."""

    def __init__(self, host: Host, reservations: Reservations) -> None:
        self.host = host
        self.reservations = reservations

    def within(self, work: Callable[[], T]) -> T:
        return inside(self.host.pid, ("net",), work)

    def take(self, key: str, wanted: Claim) -> str:
        return self.within(lambda: self.reservations.take(key, wanted))

    def in_use(self, wanted: Claim) -> list[tuple[str, int]]:
        found = self.within(lambda: self.reservations.in_use(wanted))
        return [(str(address), port) for address, port in found]


def claim(*addresses: str, port: int = PORT, last: int | None = None, protocol: Protocol = Protocol.TCP) -> Claim:
    return Claim(protocol, PortRange(port, last or port), tuple(map(ip_address, addresses)))


# Binds like any server, says what came of it, and goes on until it is ended.
_SERVER = """
import socket, sys
name, address, port, kind, options = sys.argv[1:]
open("/proc/self/comm", "wb").write(name.encode())
family = socket.AF_INET6 if ":" in address else socket.AF_INET
server = socket.socket(family, int(kind))
for option in filter(None, options.split(",")):
    if option == "v6only":
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    else:
        server.setsockopt(socket.SOL_SOCKET, getattr(socket, option), 1)
try:
    server.bind((address, int(port)))
    if int(kind) == socket.SOCK_STREAM and "silent" not in name:
        server.listen()
    print("serves", flush=True)
except OSError as error:
    sys.exit(error.strerror)
sys.stdin.read()
"""


class Foreign:
    """Another process that tries to serve; ``serves`` is whether it could."""

    def __init__(
        self,
        host: Host,
        address: str,
        *options: str,
        name: str = "webserver",
        port: int = PORT,
        protocol: Protocol = Protocol.TCP,
    ) -> None:
        argv = (name, address, str(port), str(int(KINDS[protocol])), ",".join(options))
        self._process = host.spawn(
            *(sys.executable, "-I", "-S", "-c", _SERVER, *argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self.serves = self._process.stdout.readline() == "serves\n"

    def __enter__(self) -> Foreign:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate("")


def can_serve(host: Host, address: str, *options: str, protocol: Protocol = Protocol.TCP, port: int = PORT) -> bool:
    with Foreign(host, address, *options, protocol=protocol, port=port) as foreign:
        return foreign.serves
