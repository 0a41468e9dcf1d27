"""What an event says is believed ahead of containerd where the kernel bears it out, and nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from ctrport.api import events_pb2, payloads_pb2
from ctrport.cgroups import is_in
from ctrport.containerd import Containerd
from ctrport.model import ContainerKey
from embedded.container import Container
from embedded.cri import CRI_NAMESPACE
from embedded.host import CommandError
from embedded.network import CONFIGS
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


# A CNI plugin behind the one that makes the network: what "ctr run" waits for before it starts the container.
GATE = """#!/usr/bin/python3
import json, os, sys, time
config = json.load(sys.stdin)
if os.environ["CNI_COMMAND"] == "VERSION":
    print(json.dumps({"cniVersion": "0.4.0", "supportedVersions": ["0.4.0"]}))
elif os.environ["CNI_COMMAND"] == "ADD":
    end = time.monotonic() + 20
    open("/run/gate-reached", "w").close()
    while not os.path.exists("/run/gate-open") and time.monotonic() < end:
        time.sleep(0.01)
    with open("/run/gate-open") as file:
        if file.read():
            print(json.dumps({"cniVersion": "0.4.0", "code": 100, "msg": "there is no way"}))
            sys.exit(1)
    print(json.dumps(config.get("prevResult", {"cniVersion": "0.4.0"})))
"""


class Gate:
    """Where a container of ctr waits that has its network, until it is let go on or refused."""

    def __init__(self, node: Node, *, before_network: bool = False) -> None:
        self._node = node
        node.script("mv /opt/cni/bin /opt/cni/were; mkdir /opt/cni/bin; ln -s /opt/cni/were/* /opt/cni/bin")
        plugin = node.path("/opt/cni/bin/gate")
        plugin.write_text(GATE)
        plugin.chmod(0o755)
        [path] = node.path(CONFIGS).glob("*.conflist")
        config = json.loads(path.read_text())
        config["plugins"].insert(0 if before_network else 1, {"type": "gate"})
        path.write_text(json.dumps(config))

    def waiting(self, start: Future[Container]) -> Container:
        """Return ``web``, which is being started, once it waits there."""

        def task() -> Container:
            if start.done():
                start.result()
            lines = map(str.split, self._node.run("ctr", "task", "list").stdout.splitlines())
            pids = [int(pid) for id, pid, status in lines if (id, status) == ("web", "CREATED")]
            assert len(pids) == 1
            assert self._node.path("/run/gate-reached").exists()
            return Container("web", "default", pids[0], self._node.outer_pid("default-web", pids[0]), None)

        container = eventually(task, what="web waiting at the gate")
        assert container is not None
        return container

    def open(self, *, refusing: bool = False) -> None:
        self._node.path("/run/gate-open").write_text("no" if refusing else "")


def of_web(node: Node) -> list[str]:
    """Return the rules that are of a mapping of ``web``."""
    return [line for line in node.run("iptables-save").stdout.splitlines() if '"ctrport default/web ' in line]


@contextlib.contextmanager
def halted(node: Node, ctrport: Ctrport, *, before_network: bool = False) -> Iterator[tuple[Gate, Future[Container]]]:
    """Have the daemon publish ``web``, which is being started and waits at the gate; wait for that at the end."""
    ctrport.configure(publish(("{container: web}", "8080:80")))
    ctrport.start()
    gate = Gate(node, before_network=before_network)
    with ThreadPoolExecutor(1) as threads:
        yield gate, threads.submit(node.start, "web")


def test_a_port_is_open_before_the_first_process_of_its_container_begins(node: Node, ctrport: Ctrport) -> None:
    with halted(node, ctrport) as (gate, start):
        web = gate.waiting(start)
        with Server(web, 80):
            wait_open(node, 8080, "web")
            assert of_web(node)
            assert ctrport.wait_for("8080:80/tcp", "active")["container"] == "web"
            ctrport.stop()  # and one that starts meanwhile sees it as it is
            ctrport.start()
            wait_open(node, 8080, "web")
        web.close()
        assert node.status(web) == "CREATED"
        transactions = ctrport.transactions
        gate.open()
        web = start.result()
    assert node.status(web) == "RUNNING"
    with Server(web, 80):
        wait_open(node, 8080, "web")
    node.delete(web)
    wait_closed(node, 8080)
    eventually(lambda: ctrport.transactions > transactions, what="the end being told")
    assert ctrport.transactions == transactions + 1  # by the end: the start changed nothing any more
    assert ctrport.messages.count("published container=default/web") == 2  # by each of the two daemons
    eventually(lambda: not of_web(node), what="the rules being gone")


def test_a_container_that_is_not_started_after_all_has_no_port(node: Node, ctrport: Ctrport) -> None:
    with halted(node, ctrport) as (gate, start):
        web = gate.waiting(start)
        with Server(web, 80):
            wait_open(node, 8080, "web")
        web.close()
        assert of_web(node)
        gate.open(refusing=True)
        with pytest.raises(CommandError, match="there is no way"):
            start.result()
    node.run("ctr", "task", "delete", "--force", "web", check=False)  # which ctr leaves as it was
    wait_closed(node, 8080)
    eventually(lambda: not of_web(node), what="the rules being gone")
    assert "withdrawn container=default/web" in ctrport.messages


def test_nothing_is_said_of_what_has_no_network_before_it_starts(node: Node, ctrport: Ctrport) -> None:
    with halted(node, ctrport, before_network=True) as (gate, start):
        gate.waiting(start).close()
        ctrport.stop()
        ctrport.start()  # with this as well it looks at what is listed
        [publication] = ctrport.status()["publications"]
        assert publication["container"] == ""
        ended = ctrport.run("publish", "--config", str(ctrport.config), "web", "8081:80", check=False)
        assert (ended.returncode, "web has no running task" in ended.stderr) == (1, True), ended
        gate.open()
        start.result()
    ctrport.wait_for("8080:80/tcp", "active")
    assert "waiting container=default/web" not in ctrport.messages
