"""Host ports that systemd holds from one run of the daemon to the next."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctrport.hostports import Claim, Held, Reservations
from ctrport.model import Protocol
from ctrport.systemd import FileStore
from embedded.host import Host
from embedded.traffic import Refused, TimedOut, probe_tcp, probe_udp
from tests.node.ports import KINDS, PORT, Foreign, Room, can_serve, claim
from tests.systemd import Systemd


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
