"""Who has a host port that is wanted: other processes, and connections, judged by what the kernel lets anybody bind."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import struct
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest

from ctrport.hostports import Held, Reservations
from ctrport.listeners import ALL_PORTS, Bound, entries, holder
from ctrport.model import Protocol
from embedded.host import Host, inside
from tests.node.ports import KINDS, PORT, Foreign, Room, can_serve, claim


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
        assert room.in_use(claim(ours, protocol=protocol)) == [(ours, PORT)]
    assert room.in_use(claim(ours, protocol=protocol)) == []
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
        assert room.in_use(claim(ours)) == []
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
    assert room.in_use(wanted) == [("0.0.0.0", port)]
    assert room.take("web", wanted) == f"not reserved: connections that have ended are still on port {port}"
    assert len(room.reservations) == 1  # there are none over IPv6
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


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
def test_beside_sockets_of_our_own_another_process_is_seen(room: Room, protocol: Protocol) -> None:
    room.take("old", claim("10.1.2.3", protocol=protocol))
    with Foreign(room.host, "127.0.0.1", "SO_REUSEADDR", protocol=protocol) as foreign:
        assert foreign.serves
        with pytest.raises(Held, match=f"webserver .pid {foreign.pid}"):
            room.take("new", claim("0.0.0.0", protocol=protocol))
        assert not can_serve(room.host, "10.1.2.3", "SO_REUSEADDR", protocol=protocol)


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
def test_in_use_is_what_others_have_at_each_address_and_port(room: Room, protocol: Protocol) -> None:
    def in_use(*addresses: str) -> list[tuple[str, int]]:
        return room.in_use(claim(*addresses, last=PORT + 9, protocol=protocol))

    assert in_use("0.0.0.0", "::") == []
    with (
        Foreign(room.host, "127.0.0.1", port=PORT + 1, protocol=protocol),
        Foreign(room.host, "0.0.0.0", port=PORT + 2, protocol=protocol),
        Foreign(room.host, "::", port=PORT + 3, protocol=protocol),
        Foreign(room.host, "::1", port=PORT + 4, protocol=protocol),
    ):
        ipv4 = [("0.0.0.0", PORT + number) for number in (1, 2, 3)]
        assert in_use("0.0.0.0", "::") == [*ipv4, *(("::", PORT + number) for number in (3, 4))]
        assert in_use("10.1.2.3") == [("10.1.2.3", PORT + number) for number in (2, 3)]
        assert in_use("127.0.0.1", "::1") == [
            *(("127.0.0.1", PORT + number) for number in (1, 2, 3)),
            *(("::1", PORT + number) for number in (3, 4)),
        ]
    assert in_use("0.0.0.0", "::") == []
    assert len(room.reservations) == 0


def test_sockets_of_our_own_are_in_no_use(room: Room) -> None:
    room.take("web", claim("127.0.0.1", last=PORT + 1))
    for address in ("127.0.0.1", "0.0.0.0", "10.1.2.3"):
        assert room.in_use(claim(address, last=PORT + 1)) == []
    with Foreign(room.host, "0.0.0.0", port=PORT + 2):
        assert room.in_use(claim("127.0.0.1", last=PORT + 2)) == [("127.0.0.1", PORT + 2)]
    # Of the port's other protocol there is none.
    with Foreign(room.host, "0.0.0.0", protocol=Protocol.UDP):
        assert room.in_use(claim("127.0.0.1", protocol=Protocol.UDP)) == [("127.0.0.1", PORT)]


def test_at_an_address_that_is_not_on_the_node_nothing_is_in_use(room: Room) -> None:
    with Foreign(room.host, "0.0.0.0"), Foreign(room.host, "::", "v6only"):
        assert room.in_use(claim("192.0.2.1", "2001:db8::2")) == []
