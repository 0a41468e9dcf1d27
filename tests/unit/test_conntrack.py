from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from ipaddress import ip_address

import pytest

from ctrport import conntrack
from ctrport.conntrack import Closed, ConntrackError, Opened
from ctrport.ctnetlink import Flow, Key, Patience, Ports
from ctrport.model import Address, Family, PortRange, Protocol
from ctrport.nlmsg import Interrupted
from ctrport.ports import parse as mapping
from tests.unit import worlds

NODE: set[Address] = {worlds.NODE4, worlds.NODE6}


def flow(
    destination: str, port: int, reply: str, reply_port: int, protocol: Protocol = Protocol.UDP, id: int = 1
) -> Flow:
    key = Key(destination.encode(), None, id.to_bytes(4, "big"))
    return Flow(protocol, ip_address(destination), port, ip_address(reply), reply_port, key)


TRACKED = [
    flow("192.0.2.1", 8080, "172.17.0.2", 80, Protocol.TCP),
    flow("192.0.2.1", 8080, "192.0.2.1", 8080, Protocol.TCP),
    flow("192.0.2.1", 53, "192.0.2.1", 53),
    flow("192.0.2.1", 53, "192.0.2.1", 53, id=2),  # of another client
    flow("192.0.2.1", 53, "172.17.0.2", 5353),
    flow("192.0.2.1", 54, "172.17.0.2", 5353),
    flow("2001:db8::1", 99, "fd00::2", 9, Protocol.SCTP),
    flow("2001:db8::1", 53, "2001:db8::1", 53),
]


def test_a_flow_is_translated_where_another_answers_than_was_asked() -> None:
    assert [each.translated for each in TRACKED] == [True, False, False, False, True, True, True, False]


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


class Kernel:
    """Stands where the kernel is asked: keeps what was asked of it. ``says`` may raise instead of a list."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *tracked: Flow) -> None:
        self.tracked = list(tracked or TRACKED)
        self.asked: list[tuple[Family, Ports]] = []
        self.removed: list[Flow] = []
        self.begun = threading.Event()
        self.open = 0
        self.says: Callable[[Family], None] = lambda family: None
        self.refuses: dict[Flow, int] = {}
        monkeypatch.setattr(conntrack, "Flows", lambda: _Socket(self))


class _Socket:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        kernel.open += 1

    def close(self) -> None:
        self.kernel.open -= 1

    def to(self, family: Family, ports: Ports, patience: Patience) -> Iterator[Flow]:
        self.kernel.asked.append((family, ports))
        self.kernel.begun.set()
        for one in self.kernel.tracked:
            patience.check()
            if Family.of(one.destination) is family:
                wanted = ports.get(one.protocol, ())
                if any(each.first <= one.port <= each.last for each in wanted):
                    yield one
        self.kernel.says(family)

    def remove(self, one: Flow) -> bool:
        if one in self.kernel.refuses:
            raise OSError(self.kernel.refuses[one], os.strerror(self.kernel.refuses[one]))
        self.kernel.removed.append(one)
        there = one in self.kernel.tracked
        self.kernel.tracked = [each for each in self.kernel.tracked if each != one]
        return there


def drop(touched: Sequence[Opened | Closed]) -> int:
    return asyncio.run(conntrack.drop_stale(touched, NODE))


def ports(*texts: str) -> list[PortRange]:
    return [found for text in texts if (found := mapping(text).host_ports) is not None]


def test_only_stale_flows_are_removed_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    assert drop([Opened(mapping("53:53/udp"), worlds.attachment("172.17.0.9"))]) == 3
    assert kernel.asked == [(Family.IPV4, {Protocol.UDP: ports("53:53")})]
    assert kernel.removed == TRACKED[2:5]
    assert drop([Opened(mapping("53:53/udp"), worlds.attachment("172.17.0.9"))]) == 0
    assert kernel.open == 0


def test_of_a_mapping_in_both_families_the_flows_of_both_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    assert drop([Opened(mapping("53:53/udp"), worlds.attachment(each)) for each in ("172.17.0.9", "fd00::9")]) == 4
    assert [family for family, _ in kernel.asked] == [Family.IPV4, Family.IPV6]
    assert kernel.removed[-1] == TRACKED[-1]


@pytest.mark.parametrize(
    ("text", "families"),
    [
        ("8080:80", [Family.IPV4, Family.IPV6]),
        ("192.0.2.1:8080:80", [Family.IPV4]),
        ("[2001:db8::1]:8080:80", [Family.IPV6]),
    ],
)
def test_where_an_earlier_runs_rules_led_to_is_looked_for_in_all_families_of_the_mapping(
    monkeypatch: pytest.MonkeyPatch, text: str, families: list[Family]
) -> None:
    kernel = Kernel(monkeypatch)
    drop([Closed(mapping(text), None)])
    assert [family for family, _ in kernel.asked] == families


@pytest.mark.parametrize(("failing", "dropped"), [(Family.IPV4, TRACKED[-1:]), (Family.IPV6, TRACKED[2:4])])
def test_a_family_that_fails_does_not_keep_the_other_from_being_done(
    monkeypatch: pytest.MonkeyPatch, failing: Family, dropped: list[Flow]
) -> None:
    kernel = Kernel(monkeypatch, *TRACKED[:4], *TRACKED[-1:])

    def fail(family: Family) -> None:
        if family is failing:
            raise OSError(errno.EIO, "Input/output error")

    kernel.says = fail
    with pytest.raises(ConntrackError, match=f"flows of IPv{failing.value} could not be looked at: Input/output error"):
        drop([Opened(mapping("53:53/udp"), worlds.attachment(each)) for each in ("172.17.0.2", "fd00::9")])
    assert kernel.removed == dropped


def test_what_was_touched_is_looked_for_in_one_list_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    here = worlds.attachment()
    touched = [Opened(mapping(text), here) for text in ("1:1", "2:2", "1:1/udp", "5-6:5-6/sctp", "7")]
    assert drop(touched) == 0
    wanted = {Protocol.TCP: ports("1:1", "2:2"), Protocol.UDP: ports("1:1"), Protocol.SCTP: ports("5-6:5-6")}
    assert kernel.asked == [(Family.IPV4, wanted)]


def test_where_nothing_was_touched_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    assert drop([]) == 0
    assert drop([Opened(mapping("8080"), worlds.attachment())]) == 0  # without a host port there is nothing to be stale
    assert kernel.asked == []


def test_one_mapping_closed_and_another_opened_on_the_same_port_is_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    closed = Closed(mapping("8080:80"), worlds.attachment("172.17.0.2"))
    opened = Opened(mapping("8080:80"), worlds.attachment("172.17.0.3"))
    assert drop([closed, opened]) == 1
    assert (len(kernel.asked), kernel.removed) == (1, TRACKED[:1])


TOUCHED = [Opened(mapping("53:53/udp"), worlds.attachment("172.17.0.9"))]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (errno.EPERM, "it takes CAP_NET_ADMIN"),
        (errno.EINVAL, "this kernel has no ctnetlink (module nf_conntrack_netlink)"),
        (errno.EPROTONOSUPPORT, "this kernel has no ctnetlink (module nf_conntrack_netlink)"),
        (errno.EIO, "Input/output error"),
        (None, "the kernel does not answer"),
    ],
)
def test_why_flows_cannot_be_listed_is_said_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, code: int | None, why: str
) -> None:
    kernel = Kernel(monkeypatch)

    def fail(family: Family) -> None:
        raise TimeoutError("timed out") if code is None else OSError(code, os.strerror(code))

    kernel.says = fail
    with pytest.raises(ConntrackError) as raised:
        drop(TOUCHED)
    assert str(raised.value) == (
        f"flows of IPv4 could not be looked at: {why}: UDP flows may go on where their mapping no longer leads"
    )
    assert len(kernel.asked) == 1
    assert (kernel.removed, kernel.open) == ([], 0)


@pytest.mark.parametrize("error", [Interrupted(), OSError(errno.ENOBUFS, "no"), OSError(errno.EINTR, "no")])
def test_a_list_that_something_came_between_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    kernel = Kernel(monkeypatch)
    left = [error] * (conntrack.TRIES - 1)

    def fail(family: Family) -> None:
        if left:
            raise left.pop()

    kernel.says = fail
    assert drop(TOUCHED) == 3
    assert len(kernel.asked) == conntrack.TRIES
    left += [error] * conntrack.TRIES  # but not for ever
    why = "they changed all the while" if isinstance(error, Interrupted) else "no"
    with pytest.raises(ConntrackError, match=f"IPv4 could not be looked at: {why}: "):
        drop(TOUCHED)
    assert len(kernel.asked) == 2 * conntrack.TRIES
    assert kernel.open == 0


def test_a_flow_that_another_removed_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)

    def ended(family: Family) -> None:
        kernel.tracked.remove(TRACKED[2])

    kernel.says = ended
    assert drop(TOUCHED) == 2
    assert kernel.removed == TRACKED[2:5]


def test_a_flow_that_cannot_be_removed_keeps_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    kernel.refuses = {TRACKED[2]: errno.EBUSY}
    with pytest.raises(ConntrackError) as raised:
        drop(TOUCHED)
    assert str(raised.value) == "1 of 3 flows that lead astray could not be removed: Device or resource busy"
    assert kernel.removed == TRACKED[3:5]
    assert kernel.open == 0


def test_a_flow_meets_what_was_touched_of_its_port_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, *[flow("192.0.2.1", 1000 + n % 100, "192.0.2.1", 1000, id=n) for n in range(2000)])
    judged = 0
    is_stale = Opened.is_stale

    def counted(self: Opened, tracked: Flow, node: Collection[Address]) -> bool:
        nonlocal judged
        judged += 1
        return is_stale(self, tracked, node)

    monkeypatch.setattr(Opened, "is_stale", counted)
    here = worlds.attachment()
    assert drop([Opened(mapping(f"{port}:{port}/udp"), here) for port in range(1000, 1400)]) == 2000
    assert len(kernel.removed) == judged == 2000


def endless(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A list that never ends; each flow of it takes its time."""
    kernel = Kernel(monkeypatch)

    class Endless(list[Flow]):
        def __iter__(self) -> Iterator[Flow]:
            while True:
                time.sleep(0.001)
                yield TRACKED[0]

    kernel.tracked = Endless()
    return kernel


def test_a_list_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = endless(monkeypatch)
    monkeypatch.setattr(conntrack, "TIMEOUT", 0.1)
    with pytest.raises(ConntrackError, match="could not be looked at: it took longer than 0 s"):
        drop(TOUCHED)
    assert kernel.open == 0


def test_what_is_cancelled_leaves_no_thread_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = endless(monkeypatch)

    async def cancelled() -> None:
        dropping = asyncio.create_task(conntrack.drop_stale(TOUCHED, NODE))
        assert await asyncio.to_thread(kernel.begun.wait, 5)
        dropping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dropping
        for _ in range(1000):
            if not kernel.open:
                return
            await asyncio.sleep(0.001)
        pytest.fail("the thread goes on")

    asyncio.run(cancelled())


def test_the_event_loop_goes_on_while_flows_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, goes_on = Kernel(monkeypatch), threading.Event()

    def wait(family: Family) -> None:
        assert goes_on.wait(5), "the loop stood still"

    kernel.says = wait

    async def beside() -> int:
        dropping = asyncio.create_task(conntrack.drop_stale(TOUCHED, NODE))
        assert await asyncio.to_thread(kernel.begun.wait, 5)
        goes_on.set()
        return await dropping

    assert asyncio.run(beside()) == 3


def test_the_end_of_a_mapping_does_not_cut_what_one_that_came_after_it_serves() -> None:
    here, patience = worlds.attachment(), Patience(10)
    through = flow("192.0.2.1", 8080, "172.17.0.2", 80, Protocol.TCP)
    end, wider = Closed(mapping("8080:80"), here), Opened(mapping("8080-8081:80-81"), here)
    assert conntrack._stale([end], [through], NODE, patience) == [through]
    assert conntrack._stale([end, wider], [through], NODE, patience) == []
    assert conntrack._stale([wider, end], [through], NODE, patience) == [through]
    elsewhere = Opened(mapping("192.0.2.2:8080:80"), here)  # another address of the node
    assert conntrack._stale([end, elsewhere], [through], NODE, patience) == [through]
