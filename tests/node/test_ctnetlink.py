"""Flows asked of the real kernel, and removed by it, in a network namespace of its own.

The program conntrack is the other witness: by it flows are made that no packet makes here, and seen what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import TypeVar

import pytest

from ctrport import conntrack, ctnetlink, ports
from ctrport.conntrack import Closed, ConntrackError, Opened
from ctrport.ctnetlink import Flow, Flows, Key, Patience, Ports, question
from ctrport.model import Attachment, Family, PortRange, Protocol
from ctrport.nlmsg import Conversation
from embedded.host import Host, inside
from tests.node.modules import ENVIRONMENT

T = TypeVar("T")

TCP, UDP, SCTP = Protocol.TCP, Protocol.UDP, Protocol.SCTP
#: Addresses of the fixture host.
NODE = {Family.IPV4: ip_address("10.1.2.3"), Family.IPV6: ip_address("2001:db8::1")}
CONTAINER = ip_address("172.17.0.2")
ALL: Ports = {each: [PortRange(1, 65535)] for each in Protocol}
# As an older kernel does with CTA_FILTER, every kernel does with an attribute that none has: it takes no notice.
UNKNOWN = 60


@pytest.fixture
def tracked(host: Host) -> Iterator[Host]:
    """The host, which tracks flows as a rule asks for it, and none that is older than the test."""
    host.run("nft", "-f", "-", input=RULES)
    host.run("conntrack", "-F")
    yield host
    host.run("nft", "delete", "table", "inet", "tracking")


RULES = """table inet tracking {
    chain seen { type filter hook output priority 0; ct state new accept; }
    chain translated { type nat hook output priority -100; udp dport 5353 dnat ip to 127.0.0.9:53; }
}
"""


def asking(host: Host, work: Callable[[Flows], T]) -> T:
    def ask() -> T:
        with contextlib.closing(Flows()) as flows:
            return work(flows)

    return inside(host.pid, ("net",), ask)


def listed(host: Host, family: Family, ports: Ports) -> list[Flow]:
    return asking(host, lambda flows: list(flows.to(family, ports, Patience(30))))


def sent(host: Host, family: Family, ports: Ports) -> int:
    """How many flows the kernel sends who asks for these."""
    return asking(host, lambda flows: sum(1 for _ in flows.dump(0x101, question(family, ports))))


def drop(host: Host, *touched: Opened | Closed) -> int:
    node = frozenset(NODE.values())
    return inside(host.pid, ("net",), lambda: asyncio.run(conntrack.drop_stale(touched, node)))


def witness(host: Host, *which: str) -> set[str]:
    """What conntrack lists, of each flow: where it was sent, where its answers come from, and its id."""
    lines = [line for family in ("ipv4", "ipv6") for line in _lines(host, "-f", family, *which)]
    found = [_LINE.match(line) for line in lines]
    assert all(found), lines
    return {" ".join(each.groups()) for each in found if each}


_LINE = re.compile(
    r"(\S+) .*?src=\S+ dst=(\S+) sport=\d+ dport=(\d+) .*?src=(\S+) dst=\S+ sport=(\d+) dport=\d+ .*\bid=(\d+)"
)


def _lines(host: Host, *which: str) -> list[str]:
    said = host.run("conntrack", "-L", "-o", "id", *which).stdout.splitlines()
    return [line for line in said if "sport=" in line]  # it lists ICMP as well


def as_witnessed(flows: list[Flow]) -> set[str]:
    return {
        f"{one.protocol} {one.destination} {one.port} {one.reply_source} {one.reply_port} "
        f"{int.from_bytes(one.key.id or b'', 'big')}"
        for one in flows
    }


def made(host: Host, port: int, protocol: str = "udp", client: int = 40000, *zone: str, answered: int = 0) -> None:
    """Make a flow from a client to a port of the node, translated to the container's port 53.

    No other flow of its zone is answered at the same port (``answered``).
    """
    ends = f"-s 198.51.100.7 -d {NODE[Family.IPV4]} -r {CONTAINER} -q 198.51.100.7".split()
    its = f"-p {protocol} --sport {client} --dport {port} --reply-port-src 53 -t 300".split()
    its += ["--reply-port-dst", str(answered or client)]
    its += ["--state", "ESTABLISHED", "-u", "SEEN_REPLY"] if protocol == "tcp" else []
    host.run("conntrack", "-I", *ends, *its, *zone)


def test_what_packets_began_is_listed_as_it_is_tracked(tracked: Host) -> None:
    open_ones = []
    for family, domain in ((Family.IPV4, socket.AF_INET), (Family.IPV6, socket.AF_INET6)):
        address = str(NODE[family])
        listening, connecting = tracked.sockets(2, socket.SOCK_STREAM, domain)
        open_ones += [listening, connecting]
        listening.bind((address, 8080))
        listening.listen()
        connecting.connect((address, 8080))
        for port in (53, 5353):
            asking_it = tracked.socket(socket.SOCK_DGRAM, domain)
            open_ones.append(asking_it)
            asking_it.connect((address, port))
            asking_it.send(b"who?\n")
    over = {family: listed(tracked, family, ALL) for family in Family}
    for one in open_ones:
        one.close()
    assert [
        (one.protocol, one.destination, one.port, one.reply_source, one.reply_port)
        for one in sorted(over[Family.IPV4], key=lambda one: (one.protocol, one.port))
    ] == [
        (TCP, NODE[Family.IPV4], 8080, NODE[Family.IPV4], 8080),
        (UDP, NODE[Family.IPV4], 53, NODE[Family.IPV4], 53),
        (UDP, NODE[Family.IPV4], 5353, ip_address("127.0.0.9"), 53),
    ]
    assert [one.translated for one in over[Family.IPV6]] == [False] * 3
    assert as_witnessed([one for family in Family for one in over[family]]) == witness(tracked)


LOOKS: list[tuple[Ports, set[tuple[Protocol, int]], int]] = [
    # What is looked for, what there is of it, and how many flows a kernel that narrows sends for that.
    ({UDP: [PortRange(53, 53)]}, {(UDP, 53)}, 2),
    ({TCP: [PortRange(53, 53)]}, {(TCP, 53)}, 1),
    ({UDP: [PortRange(55, 55)]}, set(), 0),
    ({UDP: [PortRange(53, 54)]}, {(UDP, 53), (UDP, 54)}, 3),
    ({TCP: [PortRange(54, 60000)]}, {(TCP, 8080)}, 2),
    ({UDP: [PortRange(54, 54)], TCP: [PortRange(53, 53)]}, {(UDP, 54), (TCP, 53)}, 5),
    (ALL, {(UDP, 53), (UDP, 54), (TCP, 53), (TCP, 8080)}, 5),
]
NAMES = ["one of UDP", "one of TCP", "one that is not there", "some of UDP", "some of TCP", "both", "all"]


@pytest.fixture
def five(tracked: Host) -> Host:
    made(tracked, 53, "udp", 40000)
    made(tracked, 53, "udp", 40001)
    made(tracked, 54, "udp", 40002)
    made(tracked, 53, "tcp", 40000)
    made(tracked, 8080, "tcp", 53)  # from there, not to there
    return tracked


@pytest.mark.parametrize("look", LOOKS, ids=NAMES)
def test_the_kernel_narrows_what_it_sends(five: Host, look: tuple[Ports, set[tuple[Protocol, int]], int]) -> None:
    asked, there, count = look
    found = listed(five, Family.IPV4, asked)
    assert {(one.protocol, one.port) for one in found} == there
    assert sent(five, Family.IPV4, asked) == count
    assert sent(five, Family.IPV6, asked) == 0


@pytest.mark.parametrize("look", LOOKS, ids=NAMES)
def test_a_kernel_that_does_not_narrow_is_no_obstacle(
    five: Host, look: tuple[Ports, set[tuple[Protocol, int]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, _, _ = look
    found = listed(five, Family.IPV4, asked)
    monkeypatch.setattr(ctnetlink, "_FILTER", UNKNOWN)
    assert sent(five, Family.IPV4, asked) == 5
    assert as_witnessed(listed(five, Family.IPV4, asked)) == as_witnessed(found)


def test_a_flow_is_removed_and_no_other(five: Host) -> None:
    before = witness(five)
    # One more of each zone, which only that tells from the first.
    made(five, 53, "udp", 40000, "--zone", "7")
    made(five, 53, "udp", 40000, "--orig-zone", "8", answered=40003)
    found = listed(five, Family.IPV4, {UDP: [PortRange(53, 53)]})
    assert len(found) == 4
    assert as_witnessed(found) == witness(five, "-p", "udp", "--orig-port-dst", "53")
    for one in found:
        there = witness(five)
        assert asking(five, lambda flows, one=one: flows.remove(one))  # type: ignore[misc]
        assert there - witness(five) == as_witnessed([one])
        assert not asking(five, lambda flows, one=one: flows.remove(one))  # type: ignore[misc]
    assert witness(five) == before - as_witnessed(found)


def test_a_later_flow_with_the_same_addresses_is_another(five: Host) -> None:
    [old] = listed(five, Family.IPV4, {UDP: [PortRange(54, 54)]})
    for client in range(41000, 41050):
        five.run("conntrack", "-D", "-p", "udp", "--orig-port-dst", "54")
        # Where it gets the place in memory of the first it gets its id as well, so another one is to take that place.
        made(five, 55, "udp", client)
        made(five, 54, "udp", 40002)
        if not as_witnessed([old]) & witness(five):
            break
    there = witness(five)
    assert not asking(five, lambda flows: flows.remove(old))
    assert witness(five) == there


def test_a_removal_that_names_nothing_is_refused(five: Host) -> None:
    # The kernel takes one without addresses for the removal of all flows; ours has them always, be they empty.
    before = witness(five)
    [one] = listed(five, Family.IPV4, {UDP: [PortRange(54, 54)]})
    for key in (Key(b""), Key(b"", one.key.zone, one.key.id)):
        with pytest.raises(OSError) as raised:
            asking(five, lambda flows, key=key: flows.remove(replace(one, key=key)))  # type: ignore[misc]
        assert raised.value.errno == errno.EINVAL
    assert witness(five) == before


def opened(text: str, address: str = "172.17.0.9") -> Opened:
    return Opened(ports.parse(text), Attachment(ip_address(address), "docker0", ip_network("172.17.0.0/16")))


def test_what_is_stale_goes_each_flow_of_it(five: Host) -> None:
    made(five, 53, "udp", 40002, "--zone", "7")
    assert drop(five, opened("53:53/udp", str(CONTAINER))) == 0  # it leads there already
    assert drop(five, opened("53:53/udp")) == 3
    assert drop(five, opened("53:53/udp")) == 0
    assert len(witness(five)) == 3
    assert drop(five, opened("53-54:53-54/udp"), opened("53:53/tcp")) == 2
    assert len(witness(five)) == 1


#: More than come in one go, by far: the kernel sends some 170 at once.
MANY = 30_000


def test_many_flows_are_removed_while_the_event_loop_goes_on(tracked: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = f"-s 198.51.{{}}.7 -d {NODE[Family.IPV4]} -r {CONTAINER} -q 198.51.{{}}.7"
    lines = [
        f"-I {ends.format(number >> 14, number >> 14)} -p udp --sport {1024 + number % 16384} --dport 53 "
        f"--reply-port-src 53 --reply-port-dst {1024 + number % 16384} -t 300\n"
        for number in range(MANY)
    ]
    tracked.run("conntrack", "-R", "-", input="".join(lines))
    made(tracked, 54, "udp", 1)
    monkeypatch.setattr(ctnetlink, "_FILTER", UNKNOWN)  # all are sent, whatever is asked for
    turns, longest, took = inside(tracked.pid, ("net",), lambda: asyncio.run(_beside()))
    assert len(witness(tracked)) == 1
    # The whole takes half a second and more; a turn of the loop meanwhile, what a busy machine makes of 1 ms.
    assert turns > 20
    assert longest < took / 2, f"{longest * 1e3:.0f} ms of {took * 1e3:.0f}"


async def _beside() -> tuple[int, float, float]:
    """Drop flows; return how many turns the event loop had, the longest wait for one, and how long all took."""
    began = last = time.monotonic()
    longest, turns = 0.0, 0
    dropping = asyncio.create_task(conntrack.drop_stale([opened("53:53/udp")], frozenset(NODE.values())))
    while not dropping.done():
        await asyncio.sleep(0.001)
        last, before = time.monotonic(), last
        longest, turns = max(longest, last - before), turns + 1
    assert dropping.result() == MANY
    return turns, longest, last - began


def test_without_the_right_to_it_the_reason_is_given(five: Host) -> None:
    script = (
        "import asyncio\n"
        "from ctrport import conntrack, model\n"
        "asyncio.run(conntrack.to_port(model.Protocol.UDP, model.Family.IPV4, 53))\n"
    )
    without = ("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin")
    ended = five.run(*without, sys.executable, "-c", script, env=ENVIRONMENT, check=False)
    assert ended.stderr.splitlines()[-1] == (
        "ctrport.conntrack.ConntrackError: flows of IPv4 could not be looked at: it takes CAP_NET_ADMIN: "
        "UDP flows may go on where their mapping no longer leads"
    )


def test_a_kernel_without_ctnetlink_is_known_by_what_it_says(five: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctnetlink, "_GET", 200 << 8)  # a part of nfnetlink that no kernel has
    with pytest.raises(ConntrackError, match=r"IPv4 could not be looked at: this kernel has no ctnetlink \(module "):
        drop(five, opened("53:53/udp"))
    monkeypatch.undo()
    # And one without nfnetlink at all: a protocol of netlink that no kernel has.
    monkeypatch.setattr(Flows, "__init__", lambda self: Conversation.__init__(self, 31))
    with pytest.raises(ConntrackError, match=r"IPv4 could not be looked at: this kernel has no ctnetlink \(module "):
        drop(five, opened("53:53/udp"))
