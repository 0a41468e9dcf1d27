"""What /proc says of other sockets, as text. The samples are what Linux 6.18 prints."""

from __future__ import annotations

import sys
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrport.listeners import Bound, Entry, parse, printable
from ctrport.model import PortRange, Protocol

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the samples are of a little-endian machine")

TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 558624 1 000000001f9fd097 100
   1: 0100007F:9FCC 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 558625 2 00000000b8d53781 20
   4: 0100007F:1F90 0100007F:9FD4 06 00000000:00000000 03:0000176F 00000000     0        0 0 3 00000000ca4a5149
"""
TCP6 = """\
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when
   0: 00000000000000000000000001000000:1F92 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 \
00000000     0        0 558632 1 000000002f4cf3bf 100 0 0 10 0
   2: 0000000000000000FFFF00000100007F:1F91 0000000000000000FFFF00000100007F:C4B6 01 00000000:00000000 00:00000000 \
00000000     0        0 558631 1 00000000659d8fcc 20 0 0 10 -1
   3: B80D0120000000000000000001000000:1F91 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 \
00000000  1000        0 558640 1 00000000659d8fcc 20 0 0 10 -1
"""
UDP = """\
   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
 4863: 0100007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 558633 2 00000000ec7a9c4a 0
12450: 0100007F:DDD8 0100007F:0035 01 00000000:00000000 00:00000000 00000000     0        0 558634 2 00000000efb0ebd5 0
"""


def bound(address: str, v6only: bool = True) -> Bound:
    return Bound(ip_address(address), v6only)


def entry(address: str, port: int, serving: bool, inode: int) -> Entry:
    return Entry(bound(address, v6only=False), port, serving, inode)


def test_tcp_sockets_serve_when_they_listen() -> None:
    assert list(parse(Protocol.TCP, TCP)) == [
        entry("0.0.0.0", 8080, True, 558624),
        entry("127.0.0.1", 40908, False, 558625),
        entry("127.0.0.1", 8080, False, 0),  # TIME_WAIT
    ]


def test_only_the_ports_asked_for_are_read() -> None:
    assert [entry.port for entry in parse(Protocol.TCP, TCP, PortRange(8080, 40907))] == [8080, 8080]


def test_ipv6_addresses_are_four_words_of_this_machine() -> None:
    assert list(parse(Protocol.TCP, TCP6)) == [
        entry("::1", 8082, True, 558632),
        entry("::ffff:127.0.0.1", 8081, False, 558631),
        entry("2001:db8::1", 8081, True, 558640),
    ]


def test_udp_sockets_serve_until_they_are_connected() -> None:
    assert list(parse(Protocol.UDP, UDP)) == [
        entry("127.0.0.1", 53, True, 558633),
        entry("127.0.0.1", 56792, False, 558634),
    ]


@given(st.text())
def test_what_is_no_entry_is_passed_over(text: str) -> None:
    assert list(parse(Protocol.TCP, text)) == []


@given(st.sampled_from([TCP, TCP6]), st.data())
def test_a_line_cut_off_is_passed_over(text: str, data: st.DataObject) -> None:
    whole = list(parse(Protocol.TCP, text))
    cut = list(parse(Protocol.TCP, text[: data.draw(st.integers(0, len(text)))]))
    assert cut == whole[: len(cut)]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (bound("0.0.0.0"), bound("127.0.0.1"), True),
        (bound("127.0.0.1"), bound("127.0.0.2"), False),
        (bound("0.0.0.0"), bound("::", v6only=False), True),
        (bound("0.0.0.0"), bound("::"), False),
        (bound("127.0.0.1"), bound("::", v6only=False), True),
        (bound("127.0.0.1"), bound("::1", v6only=False), False),
        (bound("127.0.0.1"), bound("::ffff:127.0.0.1", v6only=False), True),
        (bound("::"), bound("::ffff:127.0.0.1", v6only=False), False),
        (bound("::"), bound("::1"), True),
    ],
)
def test_overlaps(one: Bound, other: Bound, expected: bool) -> None:
    assert (one.overlaps(other), other.overlaps(one)) == (expected, expected)


@pytest.mark.parametrize(
    ("comm", "expected"),
    [
        ("nginx", "nginx"),
        ("kworker/0:1-events", "kworker/0:1-events"),
        ("\x1b[31mred", "??31mred"),
        ("x (pid 1)\n", "x ?pid 1??"),
        ("\udcff\u202e", "??"),
        ("  ", ""),
    ],
)
def test_a_command_is_printed_without_what_a_terminal_obeys(comm: str, expected: str) -> None:
    assert printable(comm) == expected


@given(st.text(), st.integers(0, 100))
def test_what_is_printed_is_bounded(text: str, most: int) -> None:
    shown = printable(text, most)
    assert len(shown) <= most
    assert shown.isascii()
    assert not set(shown) & set("[]\x1b\n\\`$()")
