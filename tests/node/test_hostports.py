"""Host ports that are held by sockets, judged by what the kernel lets other processes do with them."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from ctrport import hostports
from ctrport.hostports import Held, NotOnNode, Reservations
from ctrport.listeners import ALL_PORTS, entries
from ctrport.model import Protocol
from embedded.host import Host
from embedded.traffic import Outcome, Refused, TimedOut, probe_tcp, probe_udp
from tests.node.ports import PORT, Foreign, Room, can_serve, claim

DAEMON = Path(hostports.__file__).parents[1]


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
        assert room.in_use(claim("0.0.0.0")) == [("0.0.0.0", PORT)]
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
from ctrport.portsockets import *
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
