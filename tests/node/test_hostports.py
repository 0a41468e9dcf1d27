"""Host ports that are held by sockets, judged by what the kernel lets other processes do with them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import TypeVar

import pytest

from ctrport import hostports
from ctrport.hostports import Claim, Held, NotOnNode, Reservations
from ctrport.listeners import ALL_PORTS, Bound, entries, holder
from ctrport.model import PortRange, Protocol
from ctrport.systemd import FileStore
from embedded.host import Host, inside
from embedded.traffic import Outcome, Refused, TimedOut, probe_tcp, probe_udp
from tests.systemd import Systemd

T = TypeVar("T")

DAEMON = Path(hostports.__file__).parents[1]
KINDS = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}
PORT = 8080


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host("node") as host:
        host.script("ip address add 10.1.2.3/32 dev lo; ip address add 2001:db8::1/128 dev lo nodad")
        host.sysctl("net/ipv4/icmp_ratelimit", 0)
        yield host


class Room:
    """Reservations that are made in a host's network namespace."""

    def __init__(self, host: Host, reservations: Reservations) -> None:
        self.host = host
        self.reservations = reservations

    def within(self, work: Callable[[], T]) -> T:
        return inside(self.host.pid, ("net",), work)

    def take(self, key: str, wanted: Claim) -> str:
        return self.within(lambda: self.reservations.take(key, wanted))

    def free(self, wanted: Claim) -> bool:
        return self.within(lambda: self.reservations.free(wanted))


@pytest.fixture
def room(host: Host) -> Iterator[Room]:
    reservations = Reservations(2000)
    yield Room(host, reservations)
    reservations.close()
    assert len(reservations) == 0


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


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
@pytest.mark.parametrize("options", [(), ("SO_REUSEADDR",), ("SO_REUSEPORT",), ("SO_REUSEADDR", "SO_REUSEPORT")])
def test_nobody_else_gets_a_port_that_is_held(room: Room, protocol: Protocol, options: tuple[str, ...]) -> None:
    wanted = claim("0.0.0.0", "::", protocol=protocol)
    assert can_serve(room.host, "0.0.0.0", *options, protocol=protocol)
    assert room.take("web", wanted) == ""
    for address in ("0.0.0.0", "127.0.0.1", "::", "::1"):
        assert not can_serve(room.host, address, *options, protocol=protocol), address
    room.reservations.release("web")
    assert can_serve(room.host, "::", *options, protocol=protocol)


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
@pytest.mark.parametrize(
    ("theirs", "options", "ours"),
    [
        ("0.0.0.0", (), "0.0.0.0"),
        ("0.0.0.0", ("SO_REUSEADDR",), "0.0.0.0"),
        ("0.0.0.0", ("SO_REUSEADDR", "SO_REUSEPORT"), "127.0.0.1"),
        ("127.0.0.1", (), "0.0.0.0"),
        ("127.0.0.1", ("SO_REUSEADDR",), "127.0.0.1"),
        ("::", (), "0.0.0.0"),
        ("::", ("SO_REUSEADDR",), "10.1.2.3"),
        ("::", (), "::1"),
        ("::", ("v6only",), "::"),
        ("::1", (), "::"),
        ("::ffff:127.0.0.1", (), "0.0.0.0"),
        ("::ffff:127.0.0.1", (), "127.0.0.1"),
    ],
)
def test_whoever_has_the_port_is_named(
    room: Room, protocol: Protocol, theirs: str, options: tuple[str, ...], ours: str
) -> None:
    with Foreign(room.host, theirs, *options, protocol=protocol) as foreign:
        assert foreign.serves
        with pytest.raises(Held) as held:
            room.take("web", claim(ours, protocol=protocol))
        assert held.value.holder == f"webserver (pid {foreign.pid})"
        assert (held.value.port, held.value.address, held.value.protocol) == (PORT, ip_address(ours), protocol)
        assert str(held.value) == f"host port 8080/{protocol} is held by webserver (pid {foreign.pid})"
        assert not room.free(claim(ours, protocol=protocol))
    assert room.take("web", claim(ours, protocol=protocol)) == ""


@pytest.mark.parametrize(
    ("theirs", "options", "ours"),
    [
        ("127.0.0.1", (), "10.1.2.3"),
        ("::", ("v6only",), "0.0.0.0"),
        ("::1", (), "0.0.0.0"),
        ("::ffff:127.0.0.1", (), "::"),
        ("0.0.0.0", (), "::"),
    ],
)
def test_a_port_on_another_address_is_in_nobodys_way(
    room: Room, theirs: str, options: tuple[str, ...], ours: str
) -> None:
    with Foreign(room.host, theirs, *options) as foreign:
        assert foreign.serves
        assert room.take("web", claim(ours)) == ""


OWN: list[Bound] = [
    *(Bound(IPv4Address(text)) for text in ("0.0.0.0", "127.0.0.1", "10.1.2.3")),
    *(Bound(IPv6Address(text), v6only) for text in ("::", "::1", "2001:db8::1") for v6only in (True, False)),
    *(Bound(IPv6Address(f"::ffff:{text}"), v6only=False) for text in ("0.0.0.0", "127.0.0.1", "10.1.2.3")),
]


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
def test_overlaps_is_what_the_kernel_says(host: Host, protocol: Protocol) -> None:
    def bind(bound: Bound) -> socket.socket:
        family = socket.AF_INET if bound.address.version == 4 else socket.AF_INET6
        one = socket.socket(family, KINDS[protocol])
        try:
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, bound.v6only)
            one.bind((str(bound.address), PORT))
        except OSError:
            one.close()
            raise
        return one

    def refused(one: Bound, other: Bound) -> bool:
        with bind(one):
            try:
                bind(other).close()
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                return True
            return False

    pairs = list(itertools.product(OWN, repeat=2))
    judged = inside(host.pid, ("net",), lambda: [refused(one, other) for one, other in pairs])
    wrong = [pair for pair, kernel in zip(pairs, judged, strict=True) if pair[0].overlaps(pair[1]) is not kernel]
    assert wrong == []
    assert {True, False} == set(judged)


def test_the_container_of_a_process_is_named_by_its_cgroup(host: Host) -> None:
    asked: list[str] = []

    def name(cgroup: str) -> str | None:
        asked.append(cgroup)
        return "k8s.io/abc\x1b"

    room = Room(host, Reservations(10, name))
    with Foreign(host, "0.0.0.0", name="\x1b[31mevil") as foreign, pytest.raises(Held) as held:
        room.take("web", claim("0.0.0.0"))
    assert held.value.holder == f"??31mevil (pid {foreign.pid}) in container k8s.io/abc?"
    assert asked == [Path(f"/proc/{os.getpid()}/cgroup").read_text()]


def test_who_has_bound_without_listening_cannot_be_told(room: Room) -> None:
    with Foreign(room.host, "0.0.0.0", name="silent") as foreign:
        assert foreign.serves
        with pytest.raises(Held, match=r"^host port 8080/tcp is held by another process$"):
            room.take("web", claim("0.0.0.0"))


def test_looking_for_the_process_ends_in_time(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrport.listeners.LOOK_FOR", 0.0)
    with Foreign(room.host, "0.0.0.0"), pytest.raises(Held, match="another process"):
        room.take("web", claim("0.0.0.0"))


def test_a_process_is_named_rather_than_the_one_that_started_it_with_its_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def open_files(pid: int) -> Iterator[str]:
        return iter(["socket:[7]"] if pid in (1, os.getpid()) else [])

    monkeypatch.setattr("ctrport.listeners._open_files", open_files)
    assert f"(pid {os.getpid()})" in holder([7], lambda cgroup: None)


def test_a_tcp_client_is_refused_at_once(room: Room) -> None:
    room.take("web", claim("0.0.0.0", "::"))
    for address in ("127.0.0.1", "10.1.2.3", "::1"):
        began = time.monotonic()
        assert isinstance(probe_tcp(room.host, address, PORT), Refused)
        assert time.monotonic() - began < 0.5


def test_a_udp_datagram_vanishes(room: Room) -> None:
    def probe(address: str) -> Outcome:
        return probe_udp(room.host, address, PORT, timeout=0.3)

    def queues() -> list[tuple[str, str]]:
        text = Path("/proc/thread-self/net/udp").read_text() + Path("/proc/thread-self/net/udp6").read_text()
        return re.findall(rf":{PORT:04X} \S+ 07 (\S+) .* (\d+) *$", text, re.MULTILINE)

    assert isinstance(probe("127.0.0.1"), Refused)  # what ICMP does where nobody has the port
    room.take("dns", claim("0.0.0.0", "::", protocol=Protocol.UDP))
    assert isinstance(probe("127.0.0.1"), TimedOut)
    assert isinstance(probe("::1"), TimedOut)
    assert room.within(queues) == [("00000000:00000000", "1"), ("00000000:00000000", "1")]  # none queued, one dropped
    room.reservations.release("dns")
    assert isinstance(probe("127.0.0.1"), Refused)


def connected(reuse: bool) -> tuple[socket.socket, socket.socket, int]:
    """Return both ends of a connection to a server that has stopped listening, and its port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0], listener.getsockname()[1]


def ended(reuse: bool) -> int:
    """Leave a port in TIME_WAIT, as a server does that ends first, and return it."""
    client, server, port = connected(reuse)
    server.close()
    assert client.recv(1) == b""
    client.close()
    deadline = time.monotonic() + 5
    while not any(entry.inode == 0 for entry in entries(Protocol.TCP, ALL_PORTS).get(port, ())):
        assert time.monotonic() < deadline
    return port


def test_a_server_that_ended_a_moment_ago_holds_nothing(room: Room) -> None:
    port = room.within(lambda: ended(reuse=True))
    wanted = claim("0.0.0.0", port=port)
    with room.host.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("0.0.0.0", port))
    assert room.take("web", wanted) == ""
    assert len(room.reservations) == 1
    for address, options in itertools.product(("0.0.0.0", "127.0.0.1", "::"), ((), ("SO_REUSEADDR",))):
        assert not can_serve(room.host, address, *options, port=port)
    room.reservations.release("web")
    assert can_serve(room.host, "0.0.0.0", "SO_REUSEADDR", port=port)


def test_a_server_that_started_again_has_its_port(room: Room) -> None:
    port = room.within(lambda: ended(reuse=True))
    with Foreign(room.host, "0.0.0.0", "SO_REUSEADDR", port=port) as foreign:
        assert foreign.serves
        with pytest.raises(Held, match=f"webserver .pid {foreign.pid}"):
            room.take("web", claim("127.0.0.1", port=port))


def test_connections_that_cannot_be_bound_beside_are_no_conflict(room: Room) -> None:
    port = room.within(lambda: ended(reuse=False))
    wanted = claim("0.0.0.0", "::", port=port)
    assert room.take("web", wanted) == f"not reserved: connections that have ended are still on port {port}"
    assert len(room.reservations) == 1  # there are none over IPv6
    assert not room.free(wanted)
    room.reservations.release("web")
    full = Room(room.host, Reservations(1))
    assert full.take("other", claim("0.0.0.0", port=8079)) == ""
    assert full.take("web", wanted) == "not reserved, only looked at: firewall.reserve_limit (1) is reached"
    full.reservations.close()


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
def test_a_port_that_a_client_uses_is_reserved_when_it_is_done(room: Room, protocol: Protocol) -> None:
    def client() -> socket.socket:
        one = socket.socket(socket.AF_INET, KINDS[protocol])
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # no TIME_WAIT
        # A UDP socket that would share its port; of TCP there is a bind that works beside such a socket.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, protocol is Protocol.UDP)
        one.connect(("127.0.0.1", PORT))
        return one

    with Foreign(room.host, "127.0.0.1", protocol=protocol):
        one = room.within(client)
        wanted = claim("0.0.0.0", port=one.getsockname()[1], protocol=protocol)
        me = Path("/proc/self/comm").read_text().strip()
        of_me = f"not reserved: connections of {me} (pid {os.getpid()}) are still on port {wanted.ports}"
        assert room.take("web", wanted) == of_me
        one.close()
        assert room.take("web", wanted) == ""
        assert len(room.reservations) == 1


def test_only_one_process_is_looked_for_in_a_range(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []

    def found(inodes: object, name_container: object) -> str:
        looked.append(inodes)
        return "curl (pid 7)"

    monkeypatch.setattr("ctrport.hostports.holder", found)
    with Foreign(room.host, "127.0.0.1"), contextlib.ExitStack() as opened:
        for port in (PORT + 1, PORT + 2):
            client = opened.enter_context(room.host.socket(socket.SOCK_DGRAM))
            client.bind(("127.0.0.1", port))
            client.connect(("127.0.0.1", PORT))
        remark = room.take("web", claim("0.0.0.0", port=PORT, last=PORT + 3, protocol=Protocol.UDP))
    assert remark == "not reserved: connections of curl (pid 7) are still on port 8081, and 1 more"
    assert len(looked) == 1
    assert len(room.reservations) == 2


def test_all_or_nothing(room: Room) -> None:
    with Foreign(room.host, "127.0.0.1", port=PORT + 50):
        with pytest.raises(Held) as held:
            room.take("web", claim("0.0.0.0", "::", last=PORT + 99))
        assert held.value.port == PORT + 50
        assert len(room.reservations) == 0
        assert can_serve(room.host, "0.0.0.0")


def test_a_claim_that_fails_leaves_the_key_what_it_had(room: Room) -> None:
    room.take("web", claim("127.0.0.1"))
    with Foreign(room.host, "127.0.0.1", port=PORT + 1), pytest.raises(Held):
        room.take("web", claim("127.0.0.1", last=PORT + 1))
    assert len(room.reservations) == 1
    assert not can_serve(room.host, "127.0.0.1")


def test_another_claim_keeps_what_both_have(room: Room) -> None:
    assert room.take("web", claim("0.0.0.0", port=8080, last=8082)) == ""
    before = room.within(lambda: entries(Protocol.TCP, ALL_PORTS))
    assert room.take("web", claim("0.0.0.0", port=8082, last=8083)) == ""
    assert room.within(lambda: entries(Protocol.TCP, ALL_PORTS)) == before
    assert len(room.reservations) == 2
    assert [can_serve(room.host, "0.0.0.0", port=port) for port in range(8080, 8084)] == [True, True, False, False]


def test_a_port_goes_from_one_to_the_next_without_a_gap(room: Room) -> None:
    assert room.take("old", claim("0.0.0.0")) == ""
    assert room.take("new", claim("0.0.0.0")) == ""
    assert len(room.reservations) == 1
    room.reservations.release("old")
    assert not can_serve(room.host, "0.0.0.0")
    room.reservations.release("new")
    assert can_serve(room.host, "0.0.0.0")


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
@pytest.mark.parametrize(("first", "second"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"), ("::1", "::")])
@pytest.mark.parametrize("release_first", [True, False])
def test_sockets_of_our_own_are_in_nobodys_way(
    room: Room, protocol: Protocol, first: str, second: str, release_first: bool
) -> None:
    assert room.take("old", claim(first, protocol=protocol)) == ""
    assert room.take("new", claim(second, protocol=protocol)) == ""
    assert len(room.reservations) == 2
    assert not can_serve(room.host, first, "SO_REUSEADDR", protocol=protocol)
    left, released = (second, "old") if release_first else (first, "new")
    room.reservations.release(released)
    assert not can_serve(room.host, left, "SO_REUSEADDR", protocol=protocol)


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
def test_beside_sockets_of_our_own_another_process_is_seen(room: Room, protocol: Protocol) -> None:
    room.take("old", claim("10.1.2.3", protocol=protocol))
    with Foreign(room.host, "127.0.0.1", "SO_REUSEADDR", protocol=protocol) as foreign:
        assert foreign.serves
        with pytest.raises(Held, match=f"webserver .pid {foreign.pid}"):
            room.take("new", claim("0.0.0.0", protocol=protocol))
        assert not can_serve(room.host, "10.1.2.3", "SO_REUSEADDR", protocol=protocol)


def test_free_is_what_neither_we_nor_others_have(room: Room) -> None:
    assert room.free(claim("0.0.0.0", "::", last=PORT + 9))
    room.take("web", claim("127.0.0.1"))
    assert not room.free(claim("127.0.0.1"))
    assert not room.free(claim("0.0.0.0"))
    assert room.free(claim("10.1.2.3"))
    assert not room.free(claim("192.0.2.1"))
    with Foreign(room.host, "0.0.0.0", port=PORT + 1):
        assert not room.free(claim("127.0.0.1", port=PORT + 1))


def test_an_address_that_is_not_on_the_node(room: Room) -> None:
    for address in ("192.0.2.1", "2001:db8::2"):
        with pytest.raises(NotOnNode, match=f"^{address} is not an address of this node$"):
            room.take("web", claim("0.0.0.0", address))
        assert len(room.reservations) == 0


def test_an_address_that_cannot_be_bound_at_all(room: Room) -> None:
    assert room.take("web", claim("fe80::1")) == "not reserved: binding fe80::1 port 8080: Invalid argument"


def test_sctp_is_reserved_where_the_kernel_has_it(room: Room) -> None:
    remark = room.take("sctp", claim("0.0.0.0", protocol=Protocol.SCTP))
    if len(room.reservations):
        assert remark == ""
    else:
        assert remark == "not reserved: this kernel has no SCTP sockets"


def test_beyond_the_limit_ports_are_only_looked_at(host: Host) -> None:
    room = Room(host, Reservations(1))
    beyond = "not reserved, only looked at: firewall.reserve_limit (1) is reached"
    wanted = claim("0.0.0.0", "::", port=8081)
    assert room.take("first", claim("0.0.0.0", "::")) == ""  # one port on two addresses
    assert room.reservations.is_full()
    assert room.take("second", wanted) == beyond
    assert len(room.reservations) == 2
    with Foreign(host, "0.0.0.0", port=8081) as foreign:
        assert foreign.serves
        with pytest.raises(Held, match=f"webserver .pid {foreign.pid}"):
            room.take("second", wanted)
    assert room.take("first", claim("0.0.0.0")) == ""
    assert room.take("second", wanted) == beyond  # the port is still held, on one address
    room.reservations.release("first")
    assert not room.reservations.is_full()
    assert room.take("second", wanted) == ""
    assert len(room.reservations) == 2
    room.reservations.close()


def test_a_claim_that_takes_the_place_of_another_fits_where_that_was(host: Host) -> None:
    room = Room(host, Reservations(1))
    assert room.take("web", claim("0.0.0.0", "::")) == ""
    assert room.take("web", claim("0.0.0.0", "::", port=8081)) == ""
    room.reservations.close()


def test_what_another_key_has_too_makes_no_room(host: Host) -> None:
    room = Room(host, Reservations(1))
    assert [room.take(key, claim("0.0.0.0")) for key in ("one", "other")] == ["", ""]
    assert "firewall.reserve_limit (1)" in room.take("one", claim("0.0.0.0", port=8081))
    assert len(room.reservations) == 1
    room.reservations.close()


def test_with_limit_0_nothing_is_bound_or_looked_at(host: Host) -> None:
    room = Room(host, Reservations(0))
    with Foreign(host, "0.0.0.0"):
        assert room.take("web", claim("0.0.0.0", "192.0.2.1")) == ""
        assert not room.free(claim("0.0.0.0"))
    assert len(room.reservations) == 0


def test_a_range_of_a_thousand_ports_is_quick(room: Room) -> None:
    for protocol in (Protocol.TCP, Protocol.UDP):
        began = time.monotonic()
        room.take("range", claim("0.0.0.0", "::", last=PORT + 999, protocol=protocol))
        assert len(room.reservations) == 2000
        room.reservations.release("range")
        assert time.monotonic() - began < 1


def script(host: Host, text: str) -> str:
    """Run lines of Python with ctrport in a process of their own, and return what they print."""
    head = """
import os, resource
from ipaddress import ip_address
from ctrport.hostports import *
from ctrport.model import *
def claim(first, last):
    return Claim(Protocol.TCP, PortRange(first, last), (ip_address("0.0.0.0"),))
"""
    return host.run(sys.executable, "-c", head + text, env={"PYTHONPATH": str(DAEMON)}).stdout


def test_without_the_right_to_low_ports_the_others_are_reserved(host: Host) -> None:
    said = script(
        host, "os.setuid(65534); r = Reservations(100); print(r.take('web', claim(1022, 1025)), len(r), sep='\\n')"
    )
    may_not = "not reserved: the daemon may not bind port 1022 (CAP_NET_BIND_SERVICE), and 1 more"
    assert said.splitlines() == [may_not, "2"]


def test_without_files_left_ports_are_only_looked_at(host: Host) -> None:
    said = script(
        host,
        """
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
r = Reservations(100)
print(r.take("few", claim(8080, 8089)), len(r))
print(r.take("many", claim(9000, 9049)), len(r))
full = [os.dup(0) for _ in range(50 - len(os.listdir("/proc/self/fd")) + 1)]
print(r.take("many", claim(9000, 9049)), len(r))
os.close(full.pop())
r.release("few")
print(r.take("few", claim(8080, 8089)), len(r))
""",
    )
    reason = "no more sockets can be opened (Too many open files)"
    assert said.splitlines() == [
        " 10",
        f"not reserved, only looked at: {reason} 10",
        f"not reserved, and not looked at: {reason} 10",
        " 10",
    ]


@pytest.mark.parametrize(
    ("soft", "hard", "limit", "expected"),
    [
        (1024, 20000, 4096, "4096 4352"),
        (1024, 2000, 4096, "1744 2000"),
        (5000, 20000, 4096, "4096 5000"),
        (100, 200, 4096, "0 200"),
    ],
)
def test_the_limit_of_open_files_is_raised_as_far_as_needed(
    host: Host, soft: int, hard: int, limit: int, expected: str
) -> None:
    said = script(
        host,
        f"""
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
print(allow_sockets({limit}), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
""",
    )
    assert said.strip() == expected


# Held on by systemd


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    with Systemd(tmp_path / "notify") as systemd:
        yield systemd


class Runs:
    """One run of the daemon after the other, in a host's network namespace."""

    def __init__(self, host: Host, systemd: Systemd) -> None:
        self.host, self.systemd = host, systemd
        self.room = Room(host, Reservations(0))

    def begin(self, limit: int = 100) -> int:
        """End the last run, begin another, and return how many sockets it has got."""
        self.room.reservations.close()
        reservations = Reservations(limit, store=FileStore(str(self.systemd.address), 1000))
        self.room = Room(self.host, reservations)
        _, files = self.systemd.handover()
        return reservations.adopt([(name, os.dup(f)) for name, f in zip(self.systemd.names, files, strict=True)])

    def take(self, key: str, wanted: Claim) -> str:
        return self.room.take(key, wanted)

    def keep(self) -> list[str]:
        """Have all held on, and return the names of what is."""
        asyncio.run(self.room.reservations.keep())
        return self.kept()

    def kept(self) -> list[str]:
        FileStore(str(self.systemd.address)).wait()
        return self.systemd.names


@pytest.fixture
def runs(host: Host, systemd: Systemd) -> Iterator[Runs]:
    runs = Runs(host, systemd)
    runs.begin()
    yield runs
    runs.room.reservations.close()


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
def test_a_port_is_held_from_one_run_to_the_next(runs: Runs, protocol: Protocol) -> None:
    wanted = claim("0.0.0.0", "::", protocol=protocol)
    assert runs.take("web", wanted) == ""
    assert runs.keep() == [f"{protocol}-8080"] * 2
    assert len(runs.systemd.messages) == 2  # with the one that asked whether all is read
    runs.room.reservations.close()
    for options in ((), ("SO_REUSEADDR",), ("SO_REUSEPORT",)):
        assert not can_serve(runs.host, "0.0.0.0", *options, protocol=protocol)
        assert not can_serve(runs.host, "::1", *options, protocol=protocol)
    assert runs.begin() == 2
    assert len(runs.room.reservations) == 0
    assert runs.take("web", wanted) == ""
    assert len(runs.room.reservations) == 2
    assert runs.keep() == [f"{protocol}-8080"] * 2
    assert len(runs.systemd.told("FDSTORE=1")) == 1
    for address in ("127.0.0.1", "::1"):
        probe = probe_udp if protocol is Protocol.UDP else probe_tcp
        outcome = probe(runs.host, address, PORT, timeout=0.2)
        assert isinstance(outcome, TimedOut if protocol is Protocol.UDP else Refused), outcome
    runs.room.reservations.release("web")
    assert runs.kept() == []
    assert can_serve(runs.host, "0.0.0.0", protocol=protocol)


def test_what_nobody_takes_again_is_let_go(runs: Runs) -> None:
    assert runs.take("range", claim("0.0.0.0", "::", port=8000, last=8009)) == ""
    assert runs.take("web", claim("0.0.0.0")) == ""
    assert runs.keep() == ["tcp-8000"] * 20 + ["tcp-8080"]
    assert runs.begin() == 21
    assert runs.take("range", claim("0.0.0.0", port=8000, last=8004)) == ""
    assert not can_serve(runs.host, "0.0.0.0", port=8009)  # held until all is known that is wanted
    assert runs.keep() == ["tcp-8000"] * 5
    assert runs.systemd.cells == {("tcp", port, "0.0.0.0") for port in range(8000, 8005)}
    assert can_serve(runs.host, "0.0.0.0", port=8009)
    assert can_serve(runs.host, "0.0.0.0")
    assert len(runs.room.reservations) == 5


def test_what_two_want_is_held_on_until_both_are_gone(runs: Runs) -> None:
    assert runs.take("old", claim("0.0.0.0", port=8080, last=8081)) == ""
    assert runs.take("new", claim("0.0.0.0", port=8081, last=8082)) == ""
    assert runs.keep() == ["tcp-8080", "tcp-8080", "tcp-8081"]
    runs.room.reservations.release("old")
    runs.keep()
    assert {port for _, port, _ in runs.systemd.cells} == {8081, 8082}
    assert can_serve(runs.host, "0.0.0.0", port=8080)
    runs.room.reservations.release("new")
    assert runs.kept() == []


def garbage(opened: contextlib.ExitStack) -> dict[str, int]:
    """Return files that are no sockets of ours, though some come close."""
    reader, writer = os.pipe()
    opened.callback(os.close, reader)
    opened.callback(os.close, writer)
    found = {"pipe": writer}

    def add(name: str, family: int, kind: int, address: tuple[str, int] | None = None) -> socket.socket:
        one = opened.enter_context(socket.socket(family, kind))
        found[name] = one.fileno()
        if address is not None:
            one.bind(address)
        return one

    add("unix", socket.AF_UNIX, socket.SOCK_STREAM)
    add("unbound", socket.AF_INET, socket.SOCK_STREAM)
    add("both-families", socket.AF_INET6, socket.SOCK_STREAM, ("::", 9001))
    server = add("server", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 9002))
    server.listen()
    add("client", socket.AF_INET, socket.SOCK_STREAM).connect(server.getsockname())
    add("talking", socket.AF_INET, socket.SOCK_DGRAM).connect(("127.0.0.1", 9003))
    return found


def test_garbage_is_closed_and_removed(runs: Runs) -> None:
    assert runs.take("web", claim("0.0.0.0")) == ""
    assert runs.keep() == ["tcp-8080"]
    with contextlib.ExitStack() as opened:
        files = runs.room.within(lambda: garbage(opened))
        for name, file in files.items():
            runs.systemd.put(name, file)
        runs.systemd.put("tcp-8080", files["pipe"])  # is there already: under its first name
    reader, writer = os.pipe()
    runs.systemd.put("tcp-8080", writer)
    os.close(writer)
    assert len(runs.systemd.names) == 9
    assert not can_serve(runs.host, "127.0.0.1", port=9002)
    assert runs.begin() == 1
    assert runs.take("web", claim("0.0.0.0")) == ""
    assert runs.keep() == ["tcp-8080"]
    assert runs.systemd.cells == {("tcp", PORT, "0.0.0.0")}
    assert can_serve(runs.host, "127.0.0.1", port=9002)
    assert select.select([reader], [], [], 1)[0]  # it ends, as nobody has the other end
    os.close(reader)


def test_a_socket_is_had_as_it_is_bound_whatever_was_done_to_it(runs: Runs) -> None:
    # As where the process was killed while it bound another beside it.
    with runs.host.socket(KINDS[Protocol.UDP]) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("0.0.0.0", PORT))
        runs.systemd.put("udp-8080", one.fileno())
    assert can_serve(runs.host, "0.0.0.0", "SO_REUSEADDR", protocol=Protocol.UDP)
    assert runs.begin() == 1
    assert runs.take("web", claim("0.0.0.0", protocol=Protocol.UDP)) == ""
    assert not can_serve(runs.host, "0.0.0.0", "SO_REUSEADDR", protocol=Protocol.UDP)
    assert isinstance(probe_udp(runs.host, "127.0.0.1", PORT, timeout=0.1), TimedOut)
    [held] = [one for by in runs.room.reservations._sockets.values() for one in by.values()]
    with pytest.raises(BlockingIOError):
        held.recv(100, socket.MSG_DONTWAIT)


def test_the_limit_is_for_what_is_taken_again_too(runs: Runs) -> None:
    assert runs.take("a", claim("0.0.0.0", "::", port=8080, last=8082)) == ""
    assert len(runs.keep()) == 6
    assert runs.begin(limit=2) == 6
    # What is left by an earlier run uses up nothing.
    assert runs.take("b", claim("0.0.0.0", port=8090)) == ""
    assert runs.take("c", claim("0.0.0.0", "::", port=8082)) == ""
    assert runs.room.reservations.is_full()
    said = "not reserved, only looked at: firewall.reserve_limit (2) is reached"
    assert runs.take("d", claim("0.0.0.0", port=8080)) == said
    assert len(runs.room.reservations) == 3
    runs.keep()
    assert {port for _, port, _ in runs.systemd.cells} == {8082, 8090}
    assert can_serve(runs.host, "0.0.0.0", port=8080)
    runs.begin(limit=0)
    assert runs.take("c", claim("0.0.0.0", port=8082)) == ""
    assert runs.keep() == []
    assert can_serve(runs.host, "0.0.0.0", port=8082)


def test_another_address_of_a_port_is_had_beside_what_is_left(runs: Runs) -> None:
    assert runs.take("web", claim("0.0.0.0")) == ""
    runs.keep()
    assert runs.begin() == 1
    assert runs.take("web", claim("127.0.0.1")) == ""
    assert not can_serve(runs.host, "0.0.0.0", "SO_REUSEADDR")
    assert not can_serve(runs.host, "10.1.2.3")
    runs.keep()
    assert runs.systemd.cells == {("tcp", PORT, "127.0.0.1")}
    assert can_serve(runs.host, "10.1.2.3")


def test_what_cannot_be_had_as_a_whole_leaves_what_is_left_alone(runs: Runs) -> None:
    assert runs.take("web", claim("0.0.0.0")) == ""
    runs.keep()
    assert runs.begin() == 1
    with Foreign(runs.host, "0.0.0.0", port=PORT + 1), pytest.raises(Held):
        runs.take("web", claim("0.0.0.0", last=PORT + 1))
    assert len(runs.room.reservations) == 0
    assert not can_serve(runs.host, "0.0.0.0")
    assert runs.room.within(lambda: runs.room.reservations.in_use(claim("0.0.0.0"))) == []
    assert runs.take("web", claim("0.0.0.0")) == ""


def test_a_port_that_was_let_go_is_had_again_though_systemd_is_slow(runs: Runs) -> None:
    wanted = claim("0.0.0.0", "::", protocol=Protocol.UDP)
    assert runs.take("web", wanted) == ""
    runs.keep()
    held = threading.Event()

    def keep_busy() -> None:
        with runs.systemd.busy():
            held.set()
            time.sleep(0.2)

    thread = threading.Thread(target=keep_busy)
    thread.start()
    held.wait()
    runs.room.reservations.release("web")
    assert not can_serve(runs.host, "0.0.0.0", protocol=Protocol.UDP)
    assert runs.take("api", claim("127.0.0.1", protocol=Protocol.UDP)) == ""
    thread.join()
    runs.keep()
    assert runs.systemd.cells == {("udp", PORT, "127.0.0.1")}


def test_without_systemd_nothing_is_held_on(host: Host) -> None:
    reservations = Reservations(10)
    room = Room(host, reservations)
    assert room.take("web", claim("0.0.0.0")) == ""
    asyncio.run(reservations.keep())
    reservations.close()
    asyncio.run(reservations.forget())
    assert can_serve(host, "0.0.0.0")
