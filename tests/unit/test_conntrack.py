from __future__ import annotations

import asyncio
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

import pytest

from ctrport import conntrack
from ctrport.conntrack import Closed, Flow, Opened, parse
from ctrport.model import Address, Protocol
from ctrport.ports import parse as mapping
from tests.unit import worlds

NODE: set[Address] = {worlds.NODE4, worlds.NODE6}

# What conntrack 1.4.7 prints.
LISTED = """\
tcp      6 431995 ESTABLISHED src=198.51.100.7 dst=192.0.2.1 sport=50122 dport=8080 \
src=172.17.0.2 dst=198.51.100.7 sport=80 dport=50122 [ASSURED] mark=0 use=1
tcp      6 117 SYN_SENT src=198.51.100.7 dst=192.0.2.1 sport=50123 dport=8080 [UNREPLIED] \
src=192.0.2.1 dst=198.51.100.7 sport=8080 dport=50123 mark=0 use=1
udp      17 29 src=198.51.100.7 dst=192.0.2.1 sport=40000 dport=53 [UNREPLIED] \
src=192.0.2.1 dst=198.51.100.7 sport=53 dport=40000 mark=0 secctx=null use=1
udp      17 119 src=198.51.100.7 dst=192.0.2.1 sport=40001 dport=53 packets=3 bytes=213 \
src=172.17.0.2 dst=172.17.0.1 sport=5353 dport=40001 packets=3 bytes=300 [ASSURED] mark=0 zone=1 use=2
icmp     1 29 src=198.51.100.7 dst=192.0.2.1 type=8 code=0 id=3 src=192.0.2.1 dst=198.51.100.7 type=0 code=0 id=3 \
mark=0 use=1
sctp     132 3 CLOSED src=2001:db8::7 dst=2001:db8::1 sport=40002 dport=99 \
src=fd00::2 dst=2001:db8::7 sport=9 dport=40002 mark=0 use=1
udp      17 29 src=2001:db8::7 dst=2001:db8::1 sport=34197 dport=53 [UNREPLIED] \
src=2001:db8::1 dst=2001:db8::7 sport=53 dport=34197 mark=0 use=1
"""


def flow(destination: str, port: int, reply: str, reply_port: int, protocol: Protocol = Protocol.UDP) -> Flow:
    return Flow(protocol, ip_address(destination), port, ip_address(reply), reply_port)


def test_a_listing_of_flows_is_read_as_conntrack_prints_it() -> None:
    assert list(parse(LISTED)) == [
        flow("192.0.2.1", 8080, "172.17.0.2", 80, Protocol.TCP),
        flow("192.0.2.1", 8080, "192.0.2.1", 8080, Protocol.TCP),
        flow("192.0.2.1", 53, "192.0.2.1", 53),
        flow("192.0.2.1", 53, "172.17.0.2", 5353),
        flow("2001:db8::1", 99, "fd00::2", 9, Protocol.SCTP),
        flow("2001:db8::1", 53, "2001:db8::1", 53),
    ]
    assert [each.translated for each in parse(LISTED)] == [True, False, False, True, True, False]
    assert list(parse("")) == []


STALE_ONCE_OPEN: list[tuple[str, Flow, bool]] = [
    # UDP that found no rule: the host itself was asked, and would be for ever.
    ("53:53/udp", flow("192.0.2.1", 53, "192.0.2.1", 53), True),
    ("53:53/udp", flow("127.0.0.1", 53, "127.0.0.1", 53), True),
    # It goes where the mapping leads already.
    ("53:53/udp", flow("192.0.2.1", 53, "172.17.0.2", 53), False),
    # It was translated to a container that was there before, or by somebody else.
    ("53:53/udp", flow("192.0.2.1", 53, "172.17.0.9", 53), True),
    ("53:53/tcp", flow("192.0.2.1", 53, "172.17.0.9", 53, Protocol.TCP), True),
    # A connection to a program on the host.
    ("53:53/tcp", flow("192.0.2.1", 53, "192.0.2.1", 53, Protocol.TCP), False),
    # Other people's: a container that asks its name server, another port, another protocol, another address.
    ("53:53/udp", flow("8.8.8.8", 53, "8.8.8.8", 53), False),
    ("53:53/udp", flow("10.96.0.10", 53, "10.244.1.9", 53), False),
    ("53:53/udp", flow("192.0.2.1", 54, "192.0.2.1", 54), False),
    ("53:53/udp", flow("192.0.2.1", 53, "192.0.2.1", 53, Protocol.SCTP), False),
    ("127.0.0.1:53:53/udp", flow("192.0.2.1", 53, "192.0.2.1", 53), False),
    ("127.0.0.1:53:53/udp", flow("127.0.0.1", 53, "127.0.0.1", 53), True),
    # All of a range, and nothing beside it.
    ("52-54:52-54/udp", flow("192.0.2.1", 54, "192.0.2.1", 54), True),
    ("52-54:52-54/udp", flow("192.0.2.1", 52, "192.0.2.1", 52), True),
    ("52-54:52-54/udp", flow("192.0.2.1", 51, "192.0.2.1", 51), False),
    ("52-54:52-54/udp", flow("192.0.2.1", 55, "192.0.2.1", 55), False),
    # Without a host port there is nothing to be stale.
    ("53/udp", flow("192.0.2.1", 53, "192.0.2.1", 53), False),
]


@pytest.mark.parametrize(("text", "tracked", "expected"), STALE_ONCE_OPEN)
def test_what_was_decided_without_the_rule_is_stale_once_there_is_one(text: str, tracked: Flow, expected: bool) -> None:
    assert Opened(mapping(text), worlds.attachment()).is_stale(tracked, NODE) is expected


STALE_ONCE_OPEN_FOR_IPV6: list[tuple[str, Flow, bool]] = [
    ("53:53/udp", flow("2001:db8::1", 53, "2001:db8::1", 53), True),
    ("[::]:53:53/udp", flow("2001:db8::1", 53, "2001:db8::1", 53), True),
    ("[2001:db8::1]:53:53/udp", flow("2001:db8::1", 53, "2001:db8::1", 53), True),
    ("[2001:db8::2]:53:53/udp", flow("2001:db8::1", 53, "2001:db8::1", 53), False),
    ("53:53/udp", flow("2001:db8::1", 53, "fd00::9", 53), True),
    ("53:53/udp", flow("2001:db8::1", 53, "fd00::2", 53), False),
    ("53:53/udp", flow("2001:db8::53", 53, "2001:db8::53", 53), False),
    # No rule sends that anywhere, so it was decided right.
    ("53:53/udp", flow("::1", 53, "::1", 53), False),
    # The other family's mapping has its own rules.
    ("53:53/udp", flow("192.0.2.1", 53, "192.0.2.1", 53), False),
    ("[::]:53:53/udp", flow("127.0.0.1", 53, "127.0.0.1", 53), False),
]


@pytest.mark.parametrize(("text", "tracked", "expected"), STALE_ONCE_OPEN_FOR_IPV6)
def test_for_ipv6_it_is_the_same_but_for_loopback(text: str, tracked: Flow, expected: bool) -> None:
    assert Opened(mapping(text), worlds.attachment("fd00::2")).is_stale(tracked, NODE) is expected


STALE_ONCE_CLOSED: list[tuple[str, Flow, bool]] = [
    ("8080:80", flow("192.0.2.1", 8080, "172.17.0.2", 80, Protocol.TCP), True),
    # What kube-proxy translated to the same container, by another port.
    ("8080:80", flow("192.0.2.1", 8080, "172.17.0.2", 81, Protocol.TCP), False),
    ("8080:80", flow("192.0.2.1", 30080, "172.17.0.2", 80, Protocol.TCP), False),
    ("8080:80", flow("192.0.2.1", 8080, "172.17.0.3", 80, Protocol.TCP), False),
    ("8080:80", flow("192.0.2.1", 8080, "192.0.2.1", 8080, Protocol.TCP), False),
    ("8080:80/udp", flow("192.0.2.1", 8080, "172.17.0.2", 80, Protocol.TCP), False),
    ("8000-8002:9000-9002", flow("192.0.2.1", 8002, "172.17.0.2", 9002, Protocol.TCP), True),
    ("8000-8002:9000-9002", flow("192.0.2.1", 8002, "172.17.0.2", 9001, Protocol.TCP), False),
    ("192.0.2.1:8080:80", flow("192.0.2.2", 8080, "172.17.0.2", 80, Protocol.TCP), False),
]


@pytest.mark.parametrize(("text", "tracked", "expected"), STALE_ONCE_CLOSED)
def test_what_went_through_a_mapping_is_stale_once_it_is_closed(text: str, tracked: Flow, expected: bool) -> None:
    assert Closed(mapping(text), worlds.attachment()).is_stale(tracked, NODE) is expected


def test_what_went_through_a_closed_mapping_is_stale_in_the_family_that_was_closed() -> None:
    over6 = flow("2001:db8::1", 8080, "fd00::2", 80, Protocol.TCP)
    assert Closed(mapping("8080:80"), worlds.attachment("fd00::2")).is_stale(over6, NODE)
    assert not Closed(mapping("8080:80"), worlds.attachment("172.17.0.2")).is_stale(over6, NODE)
    assert Closed(mapping("8080:80"), None).is_stale(over6, NODE)
    assert not Closed(mapping("0.0.0.0:8080:80"), None).is_stale(over6, NODE)


def test_where_others_are_let_in_from_now_on_connections_live_and_datagrams_are_decided_anew() -> None:
    here = worlds.attachment()
    for protocol, stale in ((Protocol.UDP, True), (Protocol.SCTP, True), (Protocol.TCP, False)):
        through = flow("192.0.2.1", 8080, "172.17.0.2", 80, protocol)
        assert Closed(mapping(f"8080:80/{protocol}"), here, connections=False).is_stale(through, NODE) is stale


class Commands:
    """Stands where conntrack is run: keeps what was asked of it, and answers a list with ``LISTED``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: str = "") -> None:
        self.run: list[tuple[str, ...]] = []
        self.failing = failing
        monkeypatch.setattr(conntrack, "_run", self._answer)

    async def _answer(self, *argv: str) -> str:
        self.run.append(argv)
        _, _, family, _, protocol, *_ = argv
        lines = [line for line in LISTED.splitlines(keepends=True) if line.startswith(f"{protocol} ")]
        lines = [line for line in lines if ("::" in line) is (family == "ipv6")]
        if family == self.failing:
            raise conntrack.ConntrackError(f"conntrack failed for {family}")
        return "".join(lines) if argv[0] == "-L" else ""


def drop(touched: Sequence[Opened | Closed]) -> int:
    return asyncio.run(conntrack.drop_stale(touched, NODE))


def test_only_stale_flows_are_removed_each_by_all_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(monkeypatch)
    to_node = ("--orig-port-dst", "53", "--orig-dst", "192.0.2.1")
    assert drop([Opened(mapping("53:53/udp"), worlds.attachment("172.17.0.9"))]) == 2
    assert commands.run == [
        ("-L", "-f", "ipv4", "-p", "udp", "--orig-port-dst", "53"),
        ("-D", "-f", "ipv4", "-p", "udp", *to_node, "--reply-src", "172.17.0.2", "--reply-port-src", "5353"),
        ("-D", "-f", "ipv4", "-p", "udp", *to_node, "--reply-src", "192.0.2.1", "--reply-port-src", "53"),
    ]


def test_of_a_mapping_in_both_families_the_flows_of_both_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(monkeypatch)
    assert drop([Opened(mapping("53:53/udp"), worlds.attachment(each)) for each in ("172.17.0.9", "fd00::9")]) == 3
    assert [argv[:3] for argv in commands.run if argv[0] == "-L"] == [("-L", "-f", "ipv4"), ("-L", "-f", "ipv6")]
    to_node = ("--orig-port-dst", "53", "--orig-dst", "2001:db8::1")
    reply = ("--reply-src", "2001:db8::1", "--reply-port-src", "53")
    assert commands.run[-1] == ("-D", "-f", "ipv6", "-p", "udp", *to_node, *reply)


@pytest.mark.parametrize(
    ("text", "families"),
    [("8080:80", ["ipv4", "ipv6"]), ("192.0.2.1:8080:80", ["ipv4"]), ("[2001:db8::1]:8080:80", ["ipv6"])],
)
def test_where_an_earlier_runs_rules_led_to_is_looked_for_in_all_families_of_the_mapping(
    monkeypatch: pytest.MonkeyPatch, text: str, families: list[str]
) -> None:
    commands = Commands(monkeypatch)
    drop([Closed(mapping(text), None)])
    assert [argv[2] for argv in commands.run if argv[0] == "-L"] == families


@pytest.mark.parametrize(("failing", "dropped"), [("ipv4", "2001:db8::1"), ("ipv6", "192.0.2.1")])
def test_a_family_that_fails_does_not_keep_the_other_from_being_done(
    monkeypatch: pytest.MonkeyPatch, failing: str, dropped: str
) -> None:
    commands = Commands(monkeypatch, failing)
    with pytest.raises(conntrack.ConntrackError, match=f"failed for {failing}"):
        drop([Opened(mapping("53:53/udp"), worlds.attachment(each)) for each in ("172.17.0.2", "fd00::9")])
    assert {argv[argv.index("--orig-dst") + 1] for argv in commands.run if argv[0] == "-D"} == {dropped}


def test_what_was_touched_is_looked_for_once_a_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(monkeypatch)
    here = worlds.attachment()
    touched = [Opened(mapping(text), here) for text in ("1:1", "2:2", "1:1/udp", "5-6:5-6/sctp")]
    assert drop(touched) == 0
    # Conntrack filters by one port or by none.
    assert commands.run == [
        ("-L", "-f", "ipv4", "-p", "sctp"),
        ("-L", "-f", "ipv4", "-p", "tcp"),
        ("-L", "-f", "ipv4", "-p", "udp", "--orig-port-dst", "1"),
    ]


def test_where_nothing_was_touched_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(monkeypatch)
    assert drop([]) == 0
    assert commands.run == []


def test_one_mapping_closed_and_another_opened_on_the_same_port_is_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(monkeypatch)
    closed = Closed(mapping("8080:80"), worlds.attachment("172.17.0.2"))
    opened = Opened(mapping("8080:80"), worlds.attachment("172.17.0.3"))
    assert drop([closed, opened]) == 1
    assert [argv[:1] for argv in commands.run] == [("-L",), ("-D",)]


def test_without_conntrack_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(conntrack.ConntrackError, match="conntrack is not installed"):
        drop([Opened(mapping("8080:80"), worlds.attachment())])


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        # Status 1 with this is its way to say that none matched.
        ("echo 'conntrack v1.4.7 (conntrack-tools): 0 flow entries have been deleted.' >&2; exit 1", None),
        ("exit 0", None),
        ("echo 'Operation failed: sorry,  you must be root' >&2; exit 1", "conntrack -L failed: .*you must be root"),
    ],
)
def test_what_conntrack_says_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, expected: str | None
) -> None:
    program = tmp_path / "conntrack"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    touched = [Opened(mapping("8080:80"), worlds.attachment())]
    if expected is None:
        assert drop(touched) == 0
        return
    with pytest.raises(conntrack.ConntrackError, match=expected):
        drop(touched)
    program.chmod(0o644)
    with pytest.raises(conntrack.ConntrackError, match="conntrack could not be started: Permission denied"):
        drop(touched)


def test_a_conntrack_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "conntrack"
    program.write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(conntrack, "TIMEOUT", 0.1)
    with pytest.raises(conntrack.ConntrackError, match="did not end within"):
        drop([Opened(mapping("8080:80"), worlds.attachment())])
