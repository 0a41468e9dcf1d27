"""What an event says is believed ahead of containerd where the kernel bears it out, and nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from ctrport.api import events_pb2, payloads_pb2
from ctrport.cgroups import is_in
from ctrport.containerd import Containerd
from ctrport.model import ContainerKey
from embedded.cri import CRI_NAMESPACE
from embedded.node import Node
from embedded.traffic import Server, eventually
from tests.node.daemon import Ctrport, publish, wait_closed, wait_open

WEB = ContainerKey("default", "web")


@pytest.fixture
def node() -> Iterator[Node]:
    """A node that runs pods, with the network docker0."""
    with Node(cri=True) as node:
        node.start_containerd()
        node.add_network("docker0")
        yield node


def containerd_of(node: Node) -> Containerd:
    return Containerd(f"/proc/{node.pid}/root{node.containerd_socket}")


def announce_start(node: Node, key: ContainerKey, pid: int) -> None:
    """Have containerd tell everybody of a start that was none."""

    async def work() -> None:
        payload = payloads_pb2.TaskStart(container_id=key.id, pid=pid)
        event = AnyMessage(type_url=payload.DESCRIPTOR.full_name, value=payload.SerializeToString())
        async with containerd_of(node) as containerd:
            request = events_pb2.PublishRequest(topic="/tasks/start", event=event)
            await containerd._call(containerd._publish, request, key.namespace)

    asyncio.run(work())


def cgroup_of(node: Node, key: ContainerKey) -> str:
    async def work() -> str:
        async with containerd_of(node) as containerd:
            return (await containerd.stored(key)).cgroup

    return asyncio.run(work())


def test_the_cgroup_that_containerd_has_stored_is_that_of_the_process_and_of_no_other(node: Node) -> None:
    web, other = node.start("web"), node.start("other")
    pod = node.start_pod("shop")
    inside = pod.start("server")
    shown = {(each.namespace, each.id): Path(f"/proc/{each.outer_pid}/cgroup").read_text() for each in (web, other)} | {
        (CRI_NAMESPACE, each.id): Path(f"/proc/{each.outer_pid}/cgroup").read_text() for each in (pod, inside)
    }
    for key in shown:
        cgroup = cgroup_of(node, ContainerKey(*key))
        assert [its for its, text in shown.items() if is_in(cgroup, text)] == [key]


def test_a_start_that_was_none_opens_no_port_whatever_process_it_names(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(publish(("{container: other}", "8081:80"), ("{container: web}", "8080:80")))
    ctrport.start()
    other = node.start("other")
    Server(other, 80)
    wait_open(node, 8081, "other")
    node.run("ctr", "container", "create", "--rootfs", str(node.rootfs), "web", "/bin/sleep", "600")
    events = int(ctrport.status()["events"])
    for pid in (other.pid, 1, 1 << 21):
        announce_start(node, WEB, pid)
    # A third event behind them, which is followed when they have been.
    node.delete(other)
    eventually(lambda: int(ctrport.status()["events"]) >= events + 4, what="the events being followed")
    wait_closed(node, 8081)
    wait_closed(node, 8080)
    assert "published container=default/web" not in ctrport.messages
