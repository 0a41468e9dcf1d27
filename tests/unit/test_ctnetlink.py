"""What is said to the kernel about flows, and what it says, as bytes: a kernel of its own is asked in tests/node."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ctrport import ctnetlink
from ctrport.ctnetlink import Flow, Flows, GivenUp, Key, Patience, Ports, flow, question, removal
from ctrport.model import Address, Family, PortRange, Protocol
from ctrport.nlmsg import Interrupted, read_attributes
from tests.unit import strategies

# As Linux 6.18 sends them, without the message's head: 10.0.3.7:2106 asks 192.0.2.1:1234 by UDP.
SIDES = (
    "34000180 14000180 08000100 0a000307 08000200 c0000201 "
    "1c000280 05000100 11000000 06000200 083a0000 06000300 04d20000 "
    "34000280 14000180 08000100 c0000201 08000200 0a000307 "
    "1c000280 05000100 11000000 06000200 04d20000 06000300 083a0000"
)
REST = "08000300 00000008 08000800 00000000 08000c00 0c91e45f 08000b00 00000001 08000700 0000012a"
SENT = bytes.fromhex(f"02000000 {SIDES} {REST}")
IN_ZONE = bytes.fromhex(f"02000000 {SIDES} 06001200 00070000 {REST}")
ORIGINAL = SENT[8:56]
FLOW = Flow(
    Protocol.UDP, ip_address("192.0.2.1"), 1234, ip_address("192.0.2.1"), 1234, Key(ORIGINAL, None, b"\x0c\x91\xe4\x5f")
)

DOMAINS = {Family.IPV4: 2, Family.IPV6: 10}
NUMBERS = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}


def part(kind: int, *values: bytes) -> bytes:
    """An attribute, as the kernel lays it out: its length, its kind, the value, and zeros up to four bytes."""
    value = b"".join(values)
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def side(kind: int, number: int, source: tuple[Address, int], destination: tuple[Address, int]) -> bytes:
    first = 1 if source[0].version == 4 else 3
    addresses = part(1 | 0x8000, part(first, source[0].packed), part(first + 1, destination[0].packed))
    ports = (part(2, source[1].to_bytes(2, "big")), part(3, destination[1].to_bytes(2, "big")))
    return part(kind | 0x8000, addresses, part(2 | 0x8000, part(1, bytes([number])), *ports))


def sent(number: int, *ends: tuple[Address, int], rest: bytes = b"") -> bytes:
    """A flow as the kernel sends it: client and server of the first packet, then those of the answer."""
    client, server, answering, answered = ends
    family = Family.of(client[0])
    head = struct.pack("=BBH", DOMAINS[family], 0, 0)
    return head + side(1, number, client, server) + side(2, number, answering, answered) + rest


def test_a_flow_is_read_as_the_kernel_sends_it() -> None:
    assert flow(SENT, Family.IPV4) == FLOW
    assert flow(SENT, Family.IPV6) is None
    there = flow(IN_ZONE, Family.IPV4)
    assert there is not None
    assert there.key == Key(ORIGINAL, b"\0\7", b"\x0c\x91\xe4\x5f")


ANY_PORT = st.integers(0, 65535)
ENDS = {version: st.tuples(*[st.tuples(st.ip_addresses(v=version), ANY_PORT) for _ in range(4)]) for version in (4, 6)}
# A later kernel may send more of a flow, or in another order: these are of kinds that none of ours is.
OTHERS = st.lists(st.tuples(st.sampled_from([3, 5, 7, 40]), st.binary(max_size=9)), max_size=3).map(
    lambda those: b"".join(part(kind, value) for kind, value in those)
)


@given(st.sampled_from(Protocol), ENDS[4] | ENDS[6], OTHERS, st.none() | st.binary(min_size=2, max_size=2))
def test_what_is_read_of_a_flow_names_it_to_the_kernel(
    protocol: Protocol, ends: tuple[tuple[Address, int], ...], others: bytes, zone: bytes | None
) -> None:
    rest = (part(18, zone) if zone is not None else b"") + others + part(12, b"\1\2\3\4")
    message = sent(NUMBERS[protocol], *ends, rest=rest)
    family = Family.of(ends[0][0])
    found = flow(message, family)
    assert found is not None
    _, (destination, port), (reply_source, reply_port), _ = ends
    assert (found.protocol, found.destination, found.port) == (protocol, destination, port)
    assert (found.reply_source, found.reply_port) == (reply_source, reply_port)
    # The removal is of a flow of that family, and has those bytes of it that name it.
    named = removal(found)
    assert named[:4] == message[:4]
    assert named[4:].startswith(side(1, NUMBERS[protocol], *ends[:2]))
    its = read_attributes(named[4:])
    assert (its.get(18), its[12]) == (zone, b"\1\2\3\4")


@given(st.binary(max_size=300) | st.binary(max_size=60).map(lambda some: SENT[: -len(some) or None] + some))
@example(SENT[:30])
@example(SENT.replace(b"\x11", b"\x01"))  # ICMP
@example(SENT[:4] + part(1 | 0x8000, b"") + part(2 | 0x8000, b""))
@example(SENT.replace(bytes.fromhex("05000100 11000000"), part(1, b"")))
@example(SENT.replace(bytes.fromhex("08000200 c0000201"), part(2, b"\1\2")))
def test_what_is_no_flow_with_ports_is_none(message: bytes) -> None:
    found = flow(message, Family.IPV4)
    assert found is None or found.protocol in Protocol


def test_a_removal_names_the_flow_whatever_is_known_of_it() -> None:
    # Without the addresses it would be the removal of all flows.
    for key in (Key(b""), Key(b"", b"\0\1", b"\0\0\0\1"), FLOW.key):
        assert 1 in read_attributes(removal(Flow(*_fields(FLOW), key))[4:])
    assert removal(FLOW) == bytes([2, 0, 0, 0]) + SENT[4:56] + part(12, b"\x0c\x91\xe4\x5f")


def _fields(one: Flow) -> tuple[Protocol, Address, int, Address, int]:
    return one.protocol, one.destination, one.port, one.reply_source, one.reply_port


# What is asked


UDP, TCP, SCTP = Protocol.UDP, Protocol.TCP, Protocol.SCTP
ONE, TWO = PortRange(1234, 1234), PortRange(1235, 1235)
SOME = PortRange(1234, 1239)

ASKED: list[tuple[Ports, str]] = [
    # Everything of the family.
    ({}, ""),
    ({UDP: [ONE], TCP: [ONE]}, ""),
    # One protocol: its number, and that it counts.
    ({UDP: [ONE, TWO]}, "10000180 0c000280 05000100 11000000 0c001980 08000100 [08]"),
    ({UDP: [SOME]}, "10000180 0c000280 05000100 11000000 0c001980 08000100 [08]"),
    ({TCP: [SOME]}, "10000180 0c000280 05000100 06000000 0c001980 08000100 [08]"),
    # And one port of it.
    ({UDP: [ONE]}, "18000180 14000280 05000100 11000000 06000300 04d20000 0c001980 08000100 [28]"),
    ({UDP: [ONE, ONE]}, "18000180 14000280 05000100 11000000 06000300 04d20000 0c001980 08000100 [28]"),
    ({SCTP: [ONE]}, "18000180 14000280 05000100 84000000 06000300 04d20000 0c001980 08000100 [28]"),
]


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize(("ports", "expected"), ASKED)
def test_a_list_is_narrowed_to_one_protocol_and_one_port(family: Family, ports: Ports, expected: str) -> None:
    text, _, flags = expected.partition("[")
    said = bytes.fromhex(text) + (struct.pack("=I", int(flags[:2], 16)) if flags else b"")
    assert question(family, ports) == bytes([DOMAINS[family], 0, 0, 0]) + said


# What comes of it


class Told(Flows):
    """Flows of a kernel that sends these messages, whatever it is asked; ``refused`` is what it will not understand."""

    def __init__(self, *messages: bytes, refused: int = 0) -> None:
        self.messages, self.refused = messages, refused
        self.asked: list[bytes] = []
        self.interrupted = False

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        assert kind == 0x101  # IPCTNL_MSG_CT_GET of NFNL_SUBSYS_CTNETLINK
        self.asked.append(body)
        if self.refused and len(body) > 4:
            raise OSError(self.refused, os.strerror(self.refused))
        yield from self.messages
        if self.interrupted:
            raise Interrupted

    def ask(self, kind: int, body: bytes, flags: int = 0) -> bytes:
        assert (kind, flags) == (0x102, 5)  # IPCTNL_MSG_CT_DELETE; NLM_F_REQUEST | NLM_F_ACK
        self.asked.append(body)
        if self.refused:
            raise OSError(self.refused, os.strerror(self.refused))
        return b""


def patience() -> Patience:
    return Patience(60)


@given(
    st.lists(st.tuples(st.sampled_from([*NUMBERS.values(), 1]), ENDS[4]), max_size=5),
    st.dictionaries(st.sampled_from(Protocol), st.lists(strategies.port_ranges(), min_size=1, max_size=3)),
    st.booleans(),
)
def test_of_all_that_a_kernel_sends_only_what_was_asked_for_is_taken(
    those: list[tuple[int, tuple[tuple[Address, int], ...]]], ports: Ports, another_order: bool
) -> None:
    # Where the reply comes first the shape is not the usual one, and all of it has to be read.
    messages = [sent(number, *ends) for number, ends in those]
    if another_order:
        messages = [each[:4] + each[56:108] + each[4:56] + each[108:] for each in messages]
    wanted = [
        (number, ends[1])
        for number, ends in those
        for protocol, ranges in ports.items()
        if NUMBERS[protocol] == number and any(each.first <= ends[1][1] <= each.last for each in ranges)
    ]
    found = list(Told(*messages).to(Family.IPV4, ports, patience()))
    assert [(NUMBERS[each.protocol], (each.destination, each.port)) for each in found] == wanted


def test_most_flows_are_passed_over_without_being_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []

    def reads(message: bytes, family: Family) -> Flow | None:
        read.append(message)
        return flow(message, family)

    monkeypatch.setattr(ctnetlink, "flow", reads)
    over6 = sent(17, *[(ip_address(f"2001:db8::{number}"), 1000 + number) for number in range(4)])
    for family, message, port in ((Family.IPV4, SENT, 1234), (Family.IPV6, over6, 1001)):
        read.clear()
        [found] = Told(message).to(family, {UDP: [PortRange(port, port)]}, patience())
        assert found.port == port
        assert read == [message]
        for others in ({UDP: [PortRange(port + 1, 65535), PortRange(1, port - 1)]}, {TCP: [PortRange(1, 65535)]}):
            assert list(Told(message).to(family, others, patience())) == []
        assert read == [message]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_kernel_that_refuses_to_narrow_is_asked_for_all(code: int) -> None:
    told = Told(SENT, refused=code)
    assert list(told.to(Family.IPV4, {UDP: [ONE]}, patience())) == [FLOW]
    assert told.asked == [question(Family.IPV4, {UDP: [ONE]}), question(Family.IPV4, {})]


def test_what_else_it_refuses_is_passed_on() -> None:
    with pytest.raises(PermissionError):
        list(Told(SENT, refused=errno.EPERM).to(Family.IPV4, {UDP: [ONE]}, patience()))
    told = Told(SENT)
    told.interrupted = True
    with pytest.raises(Interrupted):
        list(told.to(Family.IPV4, {UDP: [ONE]}, patience()))


def test_a_list_is_given_up_when_its_time_is_over() -> None:
    with pytest.raises(GivenUp):
        list(Told(SENT).to(Family.IPV4, {TCP: [ONE]}, Patience(-1)))
    over = patience()
    flows = Told(SENT, SENT).to(Family.IPV4, {UDP: [ONE]}, over)
    assert next(flows) == FLOW
    over.end()
    with pytest.raises(GivenUp):
        next(flows)


def test_a_flow_that_is_gone_is_none_that_was_removed() -> None:
    told = Told()
    assert told.remove(FLOW)
    assert told.asked == [removal(FLOW)]
    assert not Told(refused=errno.ENOENT).remove(FLOW)
    with pytest.raises(OSError, match="busy"):
        Told(refused=errno.EBUSY).remove(FLOW)
