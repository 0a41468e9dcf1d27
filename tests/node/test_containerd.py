"""containerd.py against a real containerd: what it sees, and what it says when containerd dies, hangs or is absent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from ctrport.api import events_pb2, payloads_pb2
from ctrport.containerd import (
    DEADLINE,
    PROBE_DEADLINE,
    SLACK,
    Containerd,
    ContainerdError,
    NotFound,
    Unavailable,
    Unresponsive,
)
from ctrport.listed import Listed
from ctrport.model import ContainerKey
from ctrport.taskevents import TaskEvent
from embedded.container import Container
from embedded.host import stands_still
from embedded.node import Node
from embedded.wait import eventually

pytestmark = pytest.mark.asyncio


def there(node: Node) -> Containerd:
    return Containerd(f"/proc/{node.pid}/root{node.containerd_socket}")


def key(container: Container) -> ContainerKey:
    return ContainerKey(container.namespace, container.id)


async def following(events: AsyncIterator[TaskEvent], count: int = 1) -> list[tuple[str, str]]:
    """Return the next ``count`` events, as id and topic."""
    seen = []
    for _ in range(count):
        event = await asyncio.wait_for(anext(events), 10)
        seen.append((event.key.id, event.topic))
    return seen


def label(node: Node, container: Container, text: str) -> None:
    node.run("ctr", "--namespace", container.namespace, "container", "label", container.id, text)


async def publish_update(containerd: Containerd, of: ContainerKey, number: int) -> None:
    payload = payloads_pb2.ContainerUpdate(id=of.id, labels={"number": str(number)})
    event = AnyMessage(type_url=payload.DESCRIPTOR.full_name, value=payload.SerializeToString())
    request = events_pb2.PublishRequest(topic="/containers/update", event=event)
    await containerd._call(containerd._publish, request, of.namespace)


def shim_of(container: Container) -> int:
    """Return the pid of the process that started the container's first, as this process counts."""
    return int(Path(f"/proc/{container.outer_pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: all(map(stands_still, pids)), what="these processes standing still")
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


async def test_the_life_of_a_container_is_seen_event_by_event(node: Node) -> None:
    async with there(node) as containerd, containerd.events() as events:
        web = node.start("web", network=None, labels={"app": "web"})
        made = [("web", "/containers/create"), ("web", "/tasks/create")]
        assert await following(events, 3) == [*made, ("web", "/tasks/start")]
        assert await containerd.container(key(web)) == Listed(key(web), web.pid, {"app": "web"})
        stored = await containerd.stored(key(web))
        assert stored.labels == {"app": "web"}
        assert await containerd.container(key(web), stored=stored) == replace(stored, pid=web.pid, runs=True)

        node.pause(web)
        assert await following(events) == [("web", "/tasks/paused")]
        assert await containerd.container(key(web)) == Listed(key(web), web.pid, {"app": "web"}, paused=True)
        node.resume(web)
        assert await following(events) == [("web", "/tasks/resumed")]

        node.exec(web, "/bin/true")  # its end is not the container's: the next event is that of the label
        label(node, web, "ports=8080:80")
        assert await following(events) == [("web", "/containers/update")]
        found = await containerd.container(key(web))
        assert found == Listed(key(web), web.pid, {"app": "web", "ports": "8080:80"})
        assert found.labels["ports"] == "8080:80"

        node.kill(web)
        assert await following(events) == [("web", "/tasks/exit")]
        assert await containerd.container(key(web)) is None
        assert await containerd.container(key(web), stored=stored) is None
        node.delete(web)
        assert await following(events, 2) == [("web", "/tasks/delete"), ("web", "/containers/delete")]
        assert await containerd.container(key(web)) is None
        with pytest.raises(NotFound):
            await containerd.stored(key(web))


async def test_a_listing_has_what_runs_or_is_paused_of_that_namespace_with_its_labels(node: Node) -> None:
    web = node.start("web", network=None, labels={"app": "web"})
    frozen = node.start("frozen", network=None)
    node.pause(frozen)
    node.kill(node.start("ended", network=None))
    node.run("ctr", "container", "create", "--rootfs", str(node.rootfs), "idle", "/bin/sleep", "1")
    other = node.start("web", namespace="other", network=None, labels={"app": "other"})
    async with there(node) as containerd:
        assert (await containerd.version()).startswith(("1.", "2.", "v2."))
        assert await containerd.namespaces() == ["default", "other"]
        assert await containerd.containers("default") == [
            Listed(key(frozen), frozen.pid, {}, paused=True),
            Listed(key(web), web.pid, {"app": "web"}),
        ]
        listed = await containerd.containers("other")
        assert [(found.key, found.pid, found.labels) for found in listed] == [(key(other), other.pid, {"app": "other"})]
        assert await containerd.containers("nobody") == []
        for absent in (ContainerKey("default", "idle"), ContainerKey("default", "no"), ContainerKey("nobody", "web")):
            assert await containerd.container(absent) is None
    node.resume(frozen)


async def test_no_event_is_lost_right_after_subscribing(node: Node) -> None:
    # The event is published by the next call on the same connection: none can be sooner. Without the mark that events()
    # waits for, containerd 1.6 loses every second one.
    web = ContainerKey("default", "web")
    async with there(node) as containerd:
        for number in range(50):
            async with containerd.events() as events:
                await publish_update(containerd, web, number)
                assert await following(events) == [("web", "/containers/update")]


async def test_when_an_exit_is_told_the_container_is_listed_no_more(node: Node) -> None:
    containers = [node.start(f"c{number}", network=None) for number in range(8)]
    async with there(node) as containerd, containerd.events() as events:
        for container in containers:
            os.kill(container.outer_pid, signal.SIGKILL)
            assert await following(events) == [(container.id, "/tasks/exit")]
            assert await containerd.container(key(container)) is None
            assert key(container) not in [found.key for found in await containerd.containers("default")]


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_a_containerd_that_dies_is_told_at_once_and_found_again(node: Node, how: str) -> None:
    web = node.start("web", network=None)
    end = {"kill": node.kill_containerd, "stop": node.stop_containerd}[how]
    async with there(node) as containerd:
        for _ in range(2):
            async with containerd.events() as events:
                reading = asyncio.ensure_future(anext(events))
                await asyncio.to_thread(end)
                ended = time.monotonic()
                with pytest.raises(Unavailable, match=node.containerd_socket):
                    await reading
                with pytest.raises(Unavailable):
                    await containerd.version()
                with pytest.raises(Unavailable):
                    await containerd.containers("default")
                assert time.monotonic() - ended < 1
            waiting = asyncio.ensure_future(containerd.connected())
            await asyncio.sleep(0.5)
            assert not waiting.done()
            await asyncio.to_thread(node.start_containerd)
            await asyncio.wait_for(waiting, 10)
            async with containerd.events() as events:
                label(node, web, f"how={how}")
                assert await containerd.containers("default") == [Listed(key(web), web.pid, {"how": how})]


async def test_a_containerd_that_is_absent_at_start_is_waited_for(node: Node) -> None:
    node.stop_containerd()
    async with there(node) as containerd:
        with pytest.raises(Unavailable):
            await containerd.version()
        waiting = asyncio.ensure_future(containerd.connected())
        await asyncio.sleep(1)
        assert not waiting.done()
        await asyncio.to_thread(node.start_containerd)
        await asyncio.wait_for(waiting, 10)
        assert await containerd.containers("default") == []


async def test_a_containerd_that_hangs_is_told_by_the_probe_and_its_events_are_silent(node: Node) -> None:
    async def took(call: asyncio.Future[object]) -> float:
        began = time.monotonic()
        with pytest.raises(Unresponsive):
            await call
        return time.monotonic() - began

    async def subscribed(containerd: Containerd) -> None:
        async with containerd.events():
            pytest.fail("subscribed to a containerd that hangs")

    web = node.start("web", network=None)
    async with there(node) as containerd, there(node) as newcomer, containerd.events() as events:
        reading = asyncio.ensure_future(anext(events))
        node.pause_containerd()
        try:
            calls = [containerd.version(), newcomer.version(), containerd.container(key(web)), subscribed(containerd)]
            times = await asyncio.gather(*(took(asyncio.ensure_future(call)) for call in calls))
            waiting = asyncio.ensure_future(containerd.connected())
            assert not reading.done()
        finally:
            node.continue_containerd()
        assert max(times[:2]) < PROBE_DEADLINE + 1
        assert max(times) < DEADLINE + 1
        await asyncio.wait_for(waiting, 10)
        label(node, web, "a=b")
        assert await asyncio.wait_for(reading, 10) == TaskEvent(key(web), "/containers/update")


async def test_grpcs_threads_are_woken_late_by_the_clock_and_ours_are_not(node: Node) -> None:
    # In a process of its own, as here there are threads of other connections.
    program = """
import asyncio, pathlib, sys, time
from ctrport.containerd import Containerd

async def main():
    began = time.monotonic()
    async with Containerd(sys.argv[1], lasting=True) as there:
        await asyncio.wait_for(there.connected(), 10)
        async with there.events():
            print(time.monotonic() - began)
        await asyncio.to_thread(int)
        for thread in pathlib.Path("/proc/self/task").iterdir():
            slack = pathlib.Path(f"/proc/{thread.name}/timerslack_ns").read_text().strip()
            print((thread / "comm").read_text().strip(), slack)

asyncio.run(main())
"""
    address = f"/proc/{node.pid}/root{node.containerd_socket}"
    ran = await asyncio.to_thread(subprocess.check_output, [sys.executable, "-c", program, address], text=True)
    first, *lines = ran.splitlines()
    assert float(first) < SLACK  # nothing on the way there waits by the clock
    found = [line.rpartition(" ")[::2] for line in lines]
    late = {name for name, slack in found if slack == str(round(SLACK * 1e9))}
    usual = {name for name, slack in found if slack != str(round(SLACK * 1e9))}
    assert {"event_engine", "lifeguard"} <= late
    assert not late & usual - {found[0][0]}  # the name of the program, which some of gRPC's threads have, too
    assert [slack for _, slack in (found[0], found[-1])] == ["50000"] * 2  # the event loop, and a thread of Python's


async def test_a_shim_that_hangs_leaves_its_container_unknown_and_the_others_listed(node: Node) -> None:
    well = node.start("well", network=None)
    hung = [node.start(f"hung{number}", network=None, labels={"a": "b"}) for number in range(3)]
    expected = [Listed(key(container), None, {"a": "b"}) for container in hung] + [Listed(key(well), well.pid, {})]
    async with there(node) as containerd:
        with stopped([shim_of(container) for container in hung]):
            # Three at 2 s each outlast the deadline of the call that asks for all.
            of_one = [asyncio.ensure_future(containerd.container(key(each))) for each in (hung[0], well)]
            assert await containerd.containers("default") == expected
            assert [await each for each in of_one] == [expected[0], expected[-1]]
        found = await containerd.container(key(hung[0]))
        assert found is not None
        assert found.pid == hung[0].pid


async def test_calls_given_up_leave_the_connection_usable(node: Node) -> None:
    web = node.start("web", network=None)
    async with there(node) as containerd:
        for _ in range(20):
            calls = [containerd.version(), containerd.containers("default"), containerd.container(key(web))]
            tasks = [asyncio.ensure_future(call) for call in calls]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert not any(isinstance(answer, ContainerdError) for answer in answers)
        assert await containerd.containers("default") == [Listed(key(web), web.pid, {})]
