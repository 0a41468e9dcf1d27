"""What is found out of containers ahead of their start, and never used when it may be something else by now."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ctrport import endpoints
from ctrport.containerd import NotFound
from ctrport.endpoints import Gone
from ctrport.expected import MOST, MOST_ASKED, TRIES, Expected
from ctrport.listed import Listed
from ctrport.model import Attachment, ContainerKey, Endpoint, Obstacle, State
from ctrport.pods import Running
from ctrport.taskevents import CREATED, DELETED, TASK_CREATED, UPDATED, TaskEvent

WEB, PID, STARTED = ContainerKey("default", "web"), 4711, 100
NOT_YET = Obstacle(State.WAITING, "it has no address")
THERE = Endpoint((Attachment(ip_address("172.17.0.2"), "docker0", ip_network("172.17.0.0/16")),))
BOTH = Endpoint((*THERE.attachments, Attachment(ip_address("fd00::2"), "docker0", ip_network("fd00::/64"))))


class Node:
    """A containerd that answers when it is let, each time with another label, and the processes of a node."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.let = asyncio.Event()
        self.asked = 0
        self.cgroup = "/default/web"
        self.fails = False
        #: By process: when it started, and its cgroup.
        self.processes = {PID: (STARTED, "/default/web")}
        self.endpoint: Endpoint | Obstacle = NOT_YET
        self.found = 0
        self.netns = 7  # as ours numbers it
        self.matters = True
        self.told = 0
        monkeypatch.setattr(endpoints, "started", lambda pid: self._process(pid)[0])
        monkeypatch.setattr(endpoints, "netns", lambda pid: (1, self._process(pid)[0]))
        monkeypatch.setattr(endpoints, "read", lambda path: f"0::{self._process(int(path.split('/')[2]))[1]}\n")
        itself: Any = self
        self.expected = Expected(itself, itself, lambda _: self.matters, self._tell)

    async def stored(self, key: ContainerKey, *, annotations: bool) -> Listed:
        self.asked += 1
        label = str(self.asked)
        await self.let.wait()
        if self.fails:
            raise NotFound("no such container")
        return Listed(key, None, {"asked": label}, cgroup=self.cgroup, runs=False)

    def _tell(self) -> None:
        self.told += 1

    def heard_of(self, pid: int) -> int:
        self._process(pid)
        return self.netns

    def find(self, pid: int, nsid: int | None = None) -> Endpoint | Obstacle:
        self._process(pid)
        self.found += 1
        return self.endpoint

    def _process(self, pid: int) -> tuple[int, str]:
        if pid not in self.processes:
            raise Gone(f"process {pid} ended")
        return self.processes[pid]

    def tell(self, *topics: str, key: ContainerKey = WEB) -> None:
        for topic in topics:
            pid = PID if topic == TASK_CREATED else None
            self.expected.take(TaskEvent(key, topic, pid), annotations=False)

    async def answered(self) -> None:
        self.let.set()
        await settled()

    def label(self, key: ContainerKey = WEB) -> str | None:
        stored = self.expected.stored(key)
        return None if stored is None else stored.labels["asked"]


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(monkeypatch)


def run(work: Coroutine[object, object, None]) -> None:
    asyncio.run(work)


def test_what_is_stored_is_known_when_the_answer_is_there(node: Node) -> None:
    async def work() -> None:
        node.tell(CREATED)
        await settled()
        assert node.label() is None
        assert node.expected.started(WEB, PID) is None
        await node.answered()
        assert node.label() == "1"
        assert node.expected.started(WEB, PID) == (Running(WEB, PID, STARTED, (1, STARTED), {"asked": "1"}), None)
        node.tell(DELETED)
        assert node.label() is None
        assert node.expected.started(WEB, PID) is None

    run(work())


def test_where_it_is_is_known_as_soon_as_its_network_is_there(node: Node) -> None:
    async def work() -> None:
        node.tell(CREATED)
        await node.answered()
        node.tell(TASK_CREATED)
        assert node.found == 1
        node.expected.network_changed(node.netns + 1)
        assert node.found == 1  # somebody else's
        node.expected.network_changed(node.netns)
        assert node.found == 2
        started = node.expected.started(WEB, PID)
        assert started is not None
        assert started[1] is None  # that it has no address is no news when it starts
        assert (node.told, node.expected.ready) == (0, {})
        node.endpoint = THERE
        node.expected.network_changed(None)  # the host has its own address on that network by now
        assert node.expected.started(WEB, PID) == (started[0], THERE)
        assert (node.told, list(node.expected.ready)) == (1, [WEB])
        node.expected.network_changed(None)
        assert node.found == 3
        node.endpoint = BOTH
        node.expected.network_changed(node.netns)
        assert node.expected.started(WEB, PID) == (started[0], BOTH)
        assert node.told == 2

    run(work())


def test_what_is_nowhere_is_not_looked_for_for_ever(node: Node) -> None:
    async def work() -> None:
        node.tell(CREATED)
        await node.answered()
        node.tell(TASK_CREATED)
        for _ in range(2 * TRIES):
            node.expected.network_changed(node.netns)
        assert node.found == TRIES

    run(work())


def test_an_address_that_the_host_has_no_route_to_yet_is_looked_for_again_soon(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctrport.expected.PAUSES", (0.001, 0.002))

    async def work() -> None:
        node.tell(CREATED)
        await node.answered()
        node.tell(TASK_CREATED)
        node.expected.network_changed(node.netns)
        await asyncio.sleep(0.05)
        assert node.found == 1 + 1 + 2
        node.expected.network_changed(node.netns)
        node.endpoint = THERE
        await asyncio.sleep(0.05)
        assert (node.found, node.told) == (4 + 2, 1)
        node.endpoint = NOT_YET
        node.expected.network_changed(node.netns)
        node.expected.forget(WEB)
        await asyncio.sleep(0.05)
        assert node.found == 7

    run(work())


def test_what_nobody_publishes_is_not_looked_at(node: Node) -> None:
    async def work() -> None:
        node.matters, node.endpoint = False, THERE
        node.tell(CREATED)
        await node.answered()
        node.tell(TASK_CREATED)
        node.expected.network_changed(node.netns)
        assert (node.found, node.told) == (0, 0)
        assert node.expected.started(WEB, PID) is not None

    run(work())


def test_a_container_that_was_made_long_ago_is_asked_for_when_its_task_is_made(node: Node) -> None:
    async def work() -> None:
        node.endpoint = THERE
        node.tell(TASK_CREATED)
        await node.answered()
        assert (node.asked, node.told, list(node.expected.ready)) == (1, 1, [WEB])
        node.tell(UPDATED)  # with another label, and the same process
        assert node.expected.ready == {}
        await settled()
        assert (node.asked, node.label(), node.told, list(node.expected.ready)) == (2, "2", 2, [WEB])
        node.tell(DELETED)
        assert node.expected.ready == {}

    run(work())


def test_of_a_task_that_was_not_started_nothing_is_left_for_the_next(node: Node) -> None:
    async def work() -> None:
        node.tell(CREATED)
        await node.answered()
        node.endpoint = THERE
        node.tell(TASK_CREATED)
        assert node.expected.about_to_start(WEB) is not None
        node.processes = {PID + 1: (STARTED + 1, "/default/web")}
        node.netns, node.endpoint = 8, NOT_YET
        node.expected.take(TaskEvent(WEB, TASK_CREATED, PID + 1), annotations=False)
        assert (node.expected.ready, node.expected.about_to_start(WEB)) == ({}, None)
        node.endpoint = BOTH
        node.expected.network_changed(7)
        assert node.expected.ready == {}
        node.expected.network_changed(8)
        near = node.expected.about_to_start(WEB)
        assert near is not None
        assert (near[0].pid, near[1]) == (PID + 1, BOTH)

    run(work())


def test_an_answer_that_comes_behind_the_process_is_as_good(node: Node) -> None:
    async def work() -> None:
        node.tell(CREATED)
        node.endpoint = THERE
        node.tell(TASK_CREATED)
        assert node.found == 0
        await node.answered()
        assert node.found == 1
        started = node.expected.started(WEB, PID)
        assert started is not None
        assert started[1] == THERE

    run(work())


@pytest.mark.parametrize("process", [(STARTED, "/default/other"), (STARTED, "/default/web/below"), None])
def test_a_process_that_is_not_in_the_containers_cgroup_counts_for_nothing(
    node: Node, process: tuple[int, str] | None
) -> None:
    async def work() -> None:
        node.endpoint = THERE
        node.processes = {} if process is None else {PID: process}
        node.tell(CREATED)
        await node.answered()
        node.tell(TASK_CREATED)
        assert node.found == 0
        assert node.expected.started(WEB, PID) is None

    run(work())


def test_another_process_than_the_one_that_was_looked_at_is_looked_at_anew(node: Node) -> None:
    async def work() -> None:
        node.endpoint = THERE
        node.tell(CREATED)
        await node.answered()
        node.tell(TASK_CREATED)
        node.processes[PID + 1] = (STARTED + 1, "/default/web")
        started = node.expected.started(WEB, PID + 1)
        assert started is not None
        assert (started[0].pid, started[1]) == (PID + 1, None)
        node.processes[PID] = (STARTED + 2, "/default/other")  # its number is another's by now
        assert node.expected.started(WEB, PID) is None

    run(work())


def test_what_may_have_changed_is_asked_for_anew_and_an_answer_from_before_is_dropped(node: Node) -> None:
    async def work() -> None:
        node.tell(UPDATED)
        await settled()
        assert node.asked == 0  # not one that is expected to start
        node.tell(CREATED)
        await settled()
        node.tell(UPDATED)
        await node.answered()
        assert (node.asked, node.label()) == (2, "2")
        node.let.clear()
        node.tell(UPDATED)
        assert node.label() is None  # what was known may be something else by now
        await settled()
        node.expected.forget_all()
        await node.answered()
        assert node.label() is None

    run(work())


def test_what_is_gone_or_has_no_cgroup_is_not_known_ahead(node: Node) -> None:
    async def work() -> None:
        node.cgroup = ""
        node.tell(CREATED)
        await node.answered()
        assert node.label() is None
        node.cgroup, node.fails = "/default/web", True
        node.tell(CREATED)
        await node.answered()
        assert node.label() is None

    run(work())


def test_a_start_is_near_for_a_while_after_a_container_was_made(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        assert not node.expected.soon()
        node.tell(CREATED)
        assert node.expected.soon()
        monkeypatch.setattr("ctrport.expected.SOON", 0.0)
        assert not node.expected.soon()
        monkeypatch.undo()
        node.expected.forget(WEB)
        assert not node.expected.soon()

    run(work())


def test_no_more_are_asked_for_or_remembered_than_is_worth_it(node: Node) -> None:
    async def work() -> None:
        keys = [ContainerKey("default", f"web-{number}") for number in range(MOST + 5)]
        for key in keys[: MOST_ASKED + 3]:
            node.tell(CREATED, key=key)
        await settled()
        assert node.asked == MOST_ASKED
        # Who is no longer waited for is asked all the same until the answer is there.
        node.expected.forget_all()
        node.tell(CREATED)
        await settled()
        assert node.asked == MOST_ASKED
        await node.answered()
        for key in keys:
            node.tell(CREATED, key=key)
            await settled()
        assert [key for key in keys if node.label(key) is None] == keys[:5]

    run(work())
