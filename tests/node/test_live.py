"""`ctrport publish` and `ctrport unpublish`: ports of what runs, with packets as soon as a command has ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctrport import live
from ctrport.api import containers_pb2
from ctrport.config import Config
from ctrport.containerd import Containerd
from ctrport.model import ContainerKey
from ctrport.run import STATUS_PAUSE
from ctrport.schema import Containerd as Settings
from ctrport.stored import EXTENSION
from embedded.container import Container
from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, eventually, probe_tcp, probe_udp
from tests.node.daemon import Ctrport, publish, wait_closed, wait_open

NOTHING = "publish: []\n"
WEB = ContainerKey("default", "web")
DOWN = "the daemon is down: nothing is published or withdrawn until it runs (systemctl start ctrport)"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node(cri=True) as node:
        node.sysctl("net/ipv4/icmp_ratelimit", 0)
        node.start_containerd()
        node.add_network("cbr0", subnet="10.244.0.0/24")
        node.delete(node.start("first"))  # the bridge comes with it, and stays
        yield node


@pytest.fixture(scope="module")
def running(node: Node) -> Iterator[Ctrport]:
    """The daemon that the tests share; when it is gone the tables are as before."""
    before = node.tables()
    ctrport = Ctrport(node)
    ctrport.configure(NOTHING)
    ctrport.start()
    yield ctrport
    ctrport.stop()
    ctrport.run("clean")
    assert node.tables() == before


@pytest.fixture
def daemon(node: Node, running: Ctrport) -> Iterator[Ctrport]:
    """The daemon, with nothing declared in the file; after each test the tables are as before it."""
    before = node.tables()
    yield running
    running.configure(NOTHING)
    eventually(lambda: node.tables() == before, what="the rules of the test being gone")


class Start:
    """Starts containers, each with a server on its port 80, that go with the test."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._servers: dict[Container, Server] = {}

    def __call__(self, name: str, **options: Any) -> Container:
        container = self._node.start(name, **options)
        self._servers[container] = Server(container, 80)
        return container

    def delete(self, container: Container) -> None:
        self._servers.pop(container).close()
        self._node.delete(container)

    def close(self) -> None:
        for container in [*self._servers]:
            self.delete(container)


@pytest.fixture
def start(node: Node, daemon: Ctrport) -> Iterator[Start]:
    start = Start(node)
    yield start
    start.close()


@pytest.fixture
def web(start: Start) -> Container:
    return start("web")


def command(ctrport: Ctrport, *arguments: str) -> Any:
    return ctrport.run(*arguments, "--config", str(ctrport.config), check=False)


def done(ctrport: Ctrport, *arguments: str) -> str:
    """Return what a command printed that did all of what it was to do."""
    ended = command(ctrport, *arguments)
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    return str(ended.stdout)


def refused(ctrport: Ctrport, *arguments: str, status: int = 1) -> str:
    """Return why a command did nothing."""
    ended = command(ctrport, *arguments)
    assert (ended.returncode, ended.stdout) == (status, ""), ended
    [line] = ended.stderr.splitlines()
    assert line.startswith("ctrport: ")
    return str(line.removeprefix("ctrport: "))


def changed(node: Node, change: Any, *arguments: str) -> live.Outcome:
    """Do what a command does, in this process: that takes no second to start."""
    name, *mappings = arguments
    config = Config(Settings(there(node)))
    outcome: live.Outcome = asyncio.run(change(config, node.path("/run/ctrport"), name, mappings))
    return outcome


def answers(node: Node, port: int) -> str:
    """Return who answers at a port now, and not only later."""
    outcome = probe_tcp(node.client, node.address, port)
    assert isinstance(outcome, Reply), outcome
    return outcome.name


def is_closed(node: Node, port: int) -> bool:
    return isinstance(probe_tcp(node.client, node.address, port), Refused)


def there(node: Node) -> str:
    return str(node.path(node.containerd_socket))


def kept(node: Node, key: ContainerKey = WEB) -> list[str]:
    """Return what containerd keeps with a container of the operator's word."""

    async def ask() -> list[str]:
        async with Containerd(there(node)) as containerd:
            its = await containerd.live(key)
            return [] if its is None else [*map(str, its.mappings)]

    return asyncio.run(ask())


# Open and closed


def test_a_port_is_open_when_the_command_ends_and_closed_when_the_next_one_does(
    node: Node, daemon: Ctrport, web: Container
) -> None:
    before = node.tables()
    shown = done(daemon, "publish", "web", "8080:80", "5353:53/udp").splitlines()
    assert answers(node, 8080) == "web"
    assert [line.split()[:4] for line in shown] == [
        ["CONTAINER", "MAPPING", "ADDRESS", "STATE"],
        ["default/web", "8080:80/tcp", web.address, "active"],
        ["default/web", "5353:53/udp", web.address, "active"],
    ]
    [same] = [line for line in daemon.run("ps").stdout.splitlines() if "8080" in line]
    assert same.split()[:4] == shown[1].split()[:4]
    assert daemon.publication("8080:80/tcp")["source"] == "ctrport publish"
    with Server(web, 53, kind=socket.SOCK_DGRAM):
        assert isinstance(probe_udp(node.client, node.address, 5353), Reply)
    assert done(daemon, "unpublish", "web", "8080") == "default/web 8080:80/tcp is withdrawn\n"
    assert is_closed(node, 8080)
    assert kept(node) == ["5353:53/udp"]
    for _ in range(10):
        assert [one.state for one in changed(node, live.publish, "web", "8080:80").publications] == ["active"]
        assert answers(node, 8080) == "web"
        assert changed(node, live.unpublish, "web", "8080:80").withdrawn == ["8080:80/tcp"]
        assert is_closed(node, 8080)
    assert done(daemon, "unpublish", "web") == "default/web 5353:53/udp is withdrawn\n"
    assert isinstance(probe_udp(node.client, node.address, 5353), Refused)
    assert daemon.status()["publications"] == []
    assert node.tables() == before
    assert done(daemon, "unpublish", "web") == "default/web was given nothing by ctrport publish\n"


def test_what_it_says_is_json_for_programs(node: Node, daemon: Ctrport, web: Container) -> None:
    said = json.loads(done(daemon, "publish", "web", "8080:80", "--json"))
    assert said == {
        "container": "default/web",
        "publications": daemon.status()["publications"],
        "withdrawn": [],
        "problems": [],
    }
    ended = command(daemon, "publish", "web", "[::1]:8081:80", "--json")
    said = json.loads(ended.stdout)
    assert (ended.returncode, [one["state"] for one in said["publications"]]) == (1, ["unsupported"])
    assert said["problems"] == [ended.stderr.removeprefix("ctrport: ").rstrip("\n")]
    said = json.loads(done(daemon, "unpublish", "web", "--json"))
    assert (said["withdrawn"], said["problems"]) == (["8080:80/tcp", "[::1]:8081:80/tcp"], [])


def test_a_host_port_that_was_chosen_is_kept_over_restarts_and_taken_back_by_its_number(
    node: Node, daemon: Ctrport, web: Container
) -> None:
    said = json.loads(done(daemon, "publish", "web", "80", "--json"))
    port = int(said["publications"][0]["bound"].split(":")[0])
    assert answers(node, port) == "web"
    for number in (signal.SIGTERM, signal.SIGKILL):
        daemon.stop(number)
        daemon.start()
        assert answers(node, port) == "web"
    node.stop_containerd()
    assert answers(node, port) == "web"
    node.start_containerd()
    eventually(daemon.in_line, what="the daemon being in line again")
    done(daemon, "publish", "web", "8080:80")
    assert (answers(node, port), answers(node, 8080)) == ("web", "web")
    assert done(daemon, "unpublish", "web", str(port)) == "default/web 80/tcp is withdrawn\n"
    assert is_closed(node, port)
    assert answers(node, 8080) == "web"


def test_it_lives_as_long_as_the_container_and_no_longer(node: Node, daemon: Ctrport, start: Start) -> None:
    for _ in range(2):
        container = start("brief")
        wait_closed(node, 8080)
        done(daemon, "publish", "brief", "8080:80")
        assert answers(node, 8080) == "brief"
        node.kill(container)
        wait_closed(node, 8080)
        assert "default/brief has no running task" in refused(daemon, "publish", "brief", "8081:80")
        assert kept(node, ContainerKey("default", "brief")) == ["8080:80/tcp"]
        assert done(daemon, "unpublish", "brief") == "default/brief 8080:80/tcp is withdrawn\n"
        start.delete(container)


def test_it_is_kept_from_one_task_of_the_container_to_the_next(node: Node, daemon: Ctrport, start: Start) -> None:
    container = start("alone", network=None)
    ended = command(daemon, "publish", "alone", "8080:80")
    assert ended.returncode == 1
    assert "8080:80/tcp of default/alone is not published: it has only a loopback address" in ended.stderr
    node.kill(container)
    eventually(lambda: daemon.status()["publications"] == [], what="it being over")
    node.run("ctr", "task", "delete", "alone")
    node.run("ctr", "task", "start", "--detach", "alone")
    daemon.wait_for("8080:80/tcp", "waiting", "alone")
    node.run("ctr", "task", "kill", "--signal", "KILL", "alone")
    eventually(lambda: node.status(container) == "STOPPED", what="its end")


# Pods


def test_a_pod_is_given_ports_by_its_sandbox_and_the_cri_plugin_lives_with_it(node: Node, daemon: Ctrport) -> None:
    pod = node.start_pod("web-0", namespace="shop", annotations={"app": "shop"})
    member = pod.start("main")
    with Server(pod, 80, name="shop"):
        shown = done(daemon, "publish", "pod:shop/web-0", "8080:80")
        assert shown.splitlines()[1].startswith("pod:shop/web-0  8080:80/tcp  10.244.0.")
        assert answers(node, 8080) == "shop"
        said = refused(daemon, "publish", member.id[:12], "8081:80")
        assert said == f"k8s.io/{member.id} is part of the pod shop/web-0, which is published as one: name the pod"
        for restart in (node.stop_containerd, node.kill_containerd):
            restart()
            node.start_containerd()
            status, pid = node.cri.sandbox(pod.id)
            assert (status.state, pid, [one.id for one in node.cri.sandboxes()]) == (0, pod.pid, [pod.id])
        info = json.loads(node.run("ctr", "--namespace", "k8s.io", "containers", "info", pod.id).stdout)
        assert {*info["Extensions"]} == {EXTENSION, "io.cri-containerd.sandbox.metadata"}
        assert info["Labels"]["io.kubernetes.pod.name"] == "web-0"
        eventually(daemon.in_line, what="the daemon being in line again")
        assert answers(node, 8080) == "shop"
        assert done(daemon, "unpublish", pod.id[:12]) == "pod:shop/web-0 8080:80/tcp is withdrawn\n"
        assert is_closed(node, 8080)
        done(daemon, "publish", f"k8s.io/{pod.id}", "8080:80")
        assert answers(node, 8080) == "shop"
        pod.start("second")
    node.stop_pod(pod)
    wait_closed(node, 8080)
    assert refused(daemon, "publish", "pod:shop/web-0", "8080:80").startswith("pod:shop/web-0 has no running task")
    node.remove_pod(pod)
    assert refused(daemon, "publish", "pod:shop/web-0", "8080:80").startswith("no container is called 'pod:shop/web-0'")


# Names


def test_a_name_that_means_several_or_none_is_told_with_what_there_is(
    node: Node, daemon: Ctrport, start: Start, web: Container
) -> None:
    start("web-2", labels={"nerdctl/name": "shop"})
    start("web", namespace="test")
    said = refused(daemon, "publish", "web", "8080:80")
    assert said == "'web' may be default/web or test/web: expected the whole of one, NAMESPACE/ID"
    said = refused(daemon, "publish", "we", "8080:80")
    assert said.startswith("'we' may be default/web, default/web-2 (shop) or test/web: ")
    assert refused(daemon, "unpublish", "web2") == "no container is called 'web2'; did you mean web-2 or web?"
    done(daemon, "publish", "shop", "8080:80")
    done(daemon, "publish", "test/we", "8081:80")
    done(daemon, "publish", "default/web", "8082:80")
    its = {(one["namespace"], one["container"]): one["mapping"] for one in daemon.status()["publications"]}
    assert its == {
        ("default", "web-2"): "8080:80/tcp",
        ("test", "web"): "8081:80/tcp",
        ("default", "web"): "8082:80/tcp",
    }
    assert answers(node, 8082) == "web"


def test_a_namespace_that_is_not_looked_at_is_said(node: Node, daemon: Ctrport, web: Container) -> None:
    daemon.configure("containerd: {namespaces: [k8s.io]}\n")
    said = refused(daemon, "publish", "web", "8080:80")
    assert said == "nothing of the namespace default is published (containerd.namespaces)"


# Others for the same port


def test_a_port_that_another_has_is_taken_over_when_that_ends(
    node: Node, daemon: Ctrport, start: Start, web: Container
) -> None:
    first = start("first")
    daemon.configure(publish(("{container: first}", "8080:80")))
    wait_open(node, 8080, "first")
    # As among entries of the file, who started first has it, and that is web.
    done(daemon, "publish", "web", "8080:80")
    assert answers(node, 8080) == "web"
    done(daemon, "unpublish", "web")
    assert answers(node, 8080) == "first"
    start("late")
    ended = command(daemon, "publish", "late", "8080:80", "8081:80")
    assert [line.split()[1:4:2] for line in ended.stdout.splitlines()[1:]] == [
        ["8080:80/tcp", "conflict"],
        ["8081:80/tcp", "active"],
    ]
    assert ended.returncode == 1
    assert ended.stderr == (
        "ctrport: 8080:80/tcp of default/late is not published: host port 8080/tcp is held by default/first "
        "(8080:80/tcp). It stays declared, and is published as soon as it can be; "
        "to take it back: ctrport unpublish default/late 8080:80/tcp\n"
    )
    assert (answers(node, 8080), answers(node, 8081)) == ("first", "late")
    node.kill(first)
    wait_open(node, 8080, "late")


def test_the_operators_word_comes_before_what_containers_declare(
    node: Node, daemon: Ctrport, start: Start, web: Container
) -> None:
    daemon.configure("containers_may_publish: [{kinds: [label], host_ports: ['8080']}]\n")
    start("other", labels={"ctrport/ports": "8080:80,8081:80"})
    wait_open(node, 8080, "other")
    done(daemon, "publish", "web", "8080:80")
    assert answers(node, 8080) == "web"
    said = refused(daemon, "unpublish", "other", "8080", status=2)
    where = "is declared elsewhere (label ctrport/ports), and stays: it is changed there"
    assert said == f"8080:80/tcp of default/other {where}"
    done(daemon, "publish", "other", "8081:80")  # no rule allows that
    assert answers(node, 8081) == "other"
    done(daemon, "unpublish", "other")
    assert is_closed(node, 8081)
    done(daemon, "unpublish", "web")
    assert answers(node, 8080) == "other"


def test_what_the_file_declares_too_is_the_files(node: Node, daemon: Ctrport, web: Container) -> None:
    daemon.configure(publish(("{container: web}", "8080:80")))
    wait_open(node, 8080, "web")
    source = f"{daemon.config}:3"
    done(daemon, "publish", "web", "8080:80")
    assert [one["source"] for one in daemon.status()["publications"]] == [source]
    ended = command(daemon, "unpublish", "web", "8080")
    said = f"8080:80/tcp of default/web is declared elsewhere ({source}), and stays"
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", f"ctrport: {said}\n")
    assert kept(node) == []
    assert refused(daemon, "unpublish", "web", "8080", status=2) == f"{said}: it is changed there"
    assert answers(node, 8080) == "web"
    for mapping in ("8080:81", "127.0.0.1:8080:80"):
        said = refused(daemon, "publish", "web", mapping, status=2)
        assert said.endswith(f"claims a host port that {source} declares for default/web, as 8080:80/tcp")
    done(daemon, "publish", "web", "8081:80", "8080:80")
    daemon.configure(NOTHING)
    eventually(
        lambda: daemon.publication("8080:80/tcp")["source"] == "ctrport publish", what="the other standing for it"
    )
    assert (answers(node, 8080), answers(node, 8081)) == ("web", "web")


# What is wrong


def test_what_is_wrong_is_said_before_anything_is_kept(node: Node, daemon: Ctrport, web: Container) -> None:
    done(daemon, "publish", "web", "8080:80")
    for mappings, said in (
        (["8081:80", "x"], "'x' has the container port 'x'; expected a number from 1 to 65535"),
        (["8081:80", "0.0.0.0:8081:81"], "8081:80/tcp and 0.0.0.0:8081:81/tcp claim the same host port; expected"),
        (
            ["8080-8081:80-81"],
            "8080-8081:80-81/tcp claims a host port that default/web was given as 8080:80/tcp already",
        ),
        ([f"{port}:80" for port in range(9000, 9064)], "default/web cannot be given that much: it has 65 mappings;"),
    ):
        assert refused(daemon, "publish", "web", *mappings, status=2).startswith(said)
    for port, said in (("9090", "'9090' is nothing that `ctrport publish` gave default/web, which is 8080:80/tcp"),):
        assert refused(daemon, "unpublish", "web", "8080", port, status=2) == said
    assert kept(node) == ["8080:80/tcp"]
    assert answers(node, 8080) == "web"
    assert "needs root" in daemon.run_as_nobody("publish", "web", "8081:80", "--config", str(daemon.config)).stderr


def test_an_extension_of_somebody_else_is_that_containers_affair(
    node: Node, daemon: Ctrport, start: Start, web: Container
) -> None:
    async def write(kind: str, value: bytes) -> None:
        async with Containerd(there(node)) as containerd:
            container = containers_pb2.Container(id="web")
            container.extensions[EXTENSION].type_url, container.extensions[EXTENSION].value = kind, value
            request = containers_pb2.UpdateContainerRequest(container=container)
            request.update_mask.paths.append(f"extensions.{EXTENSION}")
            await containerd._call(containerd._update, request, "default")

    start("other")
    asyncio.run(write("text/plain", b"8080:80\x1b[2J"))
    said = daemon.wait_for("'8080:80\\x1b[2J'", "refused")["reason"]
    why = "it is of the type 'text/plain'; expected ctrport/ports.v1"
    assert said == f"the extension ctrport/ports is not as ctrport writes it: {why}"
    done(daemon, "publish", "other", "8081:80")
    assert answers(node, 8081) == "other"
    said = refused(daemon, "publish", "web", "8080:80", status=2)
    assert said.startswith("what default/web was given cannot be read, and so not be changed: ")
    assert done(daemon, "unpublish", "web") == "default/web '8080:80\\x1b[2J' is withdrawn\n"
    done(daemon, "publish", "web", "8080:80")
    assert answers(node, 8080) == "web"
    asyncio.run(write("", b""))  # what deleting it makes of it
    wait_closed(node, 8080)
    assert "default/web" not in daemon.run("ps").stdout


# The daemon is away


def test_without_the_daemon_it_is_kept_and_published_when_that_runs(
    node: Node, daemon: Ctrport, web: Container
) -> None:
    daemon.stop()
    ended = command(daemon, "publish", "web", "8080:80")
    undo = "to take it back: ctrport unpublish default/web 8080:80/tcp"
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"ctrport: 8080:80/tcp is declared for default/web, but {DOWN}; {undo}\n"
    assert is_closed(node, 8080)
    shown = daemon.run("ps", "--config", str(daemon.config)).stdout
    assert "default/web  8080:80/tcp  -        waiting" in shown
    daemon.start()
    assert answers(node, 8080) == "web"
    daemon.stop()
    said = json.loads(command(daemon, "unpublish", "web", "8080", "--json").stdout)
    assert said["problems"] == [f"8080:80/tcp is no longer declared for default/web, but {DOWN}"]
    assert said["withdrawn"] == []
    assert answers(node, 8080) == "web"  # as its rules stay
    daemon.start()
    assert is_closed(node, 8080)


def test_a_daemon_that_does_not_come_round_is_waited_for_no_longer_than_that(
    node: Node, daemon: Ctrport, web: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "WITHIN", 1.0)
    with daemon.frozen():
        [problem] = changed(node, live.publish, "web", "8080:80").problems
        [other] = asyncio.run(taken_back_meanwhile(node)).problems
    assert "8081:80/tcp is declared for default/web, but another command has changed that meanwhile; to take" in other
    assert problem.startswith(
        "8080:80/tcp is declared for default/web, but the daemon has not carried that out within 1 s;"
    )
    wait_open(node, 8080, "web")


async def taken_back_meanwhile(node: Node) -> live.Outcome:
    """Publish 8081, and have somebody write what there was before over that."""
    publishing = live.publish(Config(Settings(there(node))), node.path("/run/ctrport"), "web", ["8081:80"])
    task = asyncio.create_task(publishing)
    async with Containerd(there(node)) as containerd:
        before = await containerd.live(WEB)
        assert before is not None
        while await containerd.live(WEB) == before:
            assert not task.done()
            await asyncio.sleep(0.01)
        await containerd.keep_live(WEB, before.mappings, before.revision)
    return await task


# At once


def test_commands_at_once_lose_nothing_of_each_other(node: Node, daemon: Ctrport, web: Container) -> None:
    ports = range(8080, 8092)
    config, directory = Config(Settings(there(node))), node.path("/run/ctrport")

    async def at_once() -> list[live.Outcome]:
        return await asyncio.gather(*(live.publish(config, directory, "web", [f"{port}:80"]) for port in ports))

    outcomes = asyncio.run(at_once())
    assert [problem for outcome in outcomes for problem in outcome.problems] == []
    assert {one.state for outcome in outcomes for one in outcome.publications} == {"active"}
    assert sorted(kept(node)) == [f"{port}:80/tcp" for port in ports]
    assert {answers(node, port) for port in ports} == {"web"}

    async def and_back() -> list[live.Outcome]:
        changes = [live.unpublish(config, directory, "web", [f"{port}"]) for port in ports]
        return await asyncio.gather(*changes, live.publish(config, directory, "web", ["9090:80"]))

    assert [problem for outcome in asyncio.run(and_back()) for problem in outcome.problems] == []
    assert kept(node) == ["9090:80/tcp"]
    assert all(is_closed(node, port) for port in ports)


def test_two_commands_for_one_port_are_told_apart(node: Node, daemon: Ctrport, start: Start, web: Container) -> None:
    start("other")
    argv = [daemon._argv(*("publish", name, "8080:80", "--config", str(daemon.config))) for name in ("other", "web")]
    processes = [node.spawn(*each, env=daemon._environment(), stdout=-1, stderr=-1) for each in argv]
    said = [process.communicate(timeout=30) for process in processes]
    states = {one["container"]: one["state"] for one in daemon.status()["publications"]}
    assert states == {"other": "conflict", "web": "active"}
    assert answers(node, 8080) == "web"
    # Whichever was first: web started first and has it in the end, and other may have had it for a moment.
    assert processes[1].returncode == 0, said


def test_nothing_is_called_open_before_the_kernel_has_it(node: Node, daemon: Ctrport, web: Container) -> None:
    done(daemon, "publish", "web", "8081:80")
    with stopped_restores(daemon):
        argv = daemon._argv("publish", "web", "8080:80", "--config", str(daemon.config))
        process = node.spawn(*argv, env=daemon._environment(), stdout=-1, stderr=-1)
        eventually(lambda: kept(node) == ["8081:80/tcp", "8080:80/tcp"], what="it being kept")
        # The daemon has a reason to say something meanwhile.
        daemon.configure("no: such key\n")
        eventually(lambda: " not-reloaded " in daemon.messages, what="the daemon complaining")
        time.sleep(3 * STATUS_PAUSE)
        assert [one["mapping"] for one in daemon.status()["publications"]] == ["8081:80/tcp"]
        assert is_closed(node, 8080)
        assert process.poll() is None
    assert process.wait(10) == 0
    assert answers(node, 8080) == "web"
    assert "no" in daemon.status()["config"]


@contextlib.contextmanager
def stopped_restores(daemon: Ctrport) -> Iterator[None]:
    """Have what writes the daemon's next change stand still: the processes that wait for it already."""

    def waiting() -> list[int]:
        found = []
        for task in Path(f"/proc/{daemon.pid}/task").iterdir():
            for pid in map(int, (task / "children").read_text().split()):
                if "tables-nft-restore" in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
        return found

    pids = eventually(lambda: its if len(its := waiting()) == 2 else None, what="two that wait for the next change")
    assert pids is not None
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
