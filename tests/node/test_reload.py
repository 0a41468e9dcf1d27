"""The configuration changes under a running daemon: what did not change is not touched, what did is applied at once."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator

import pytest

from embedded.container import Container
from embedded.node import Node
from embedded.traffic import Server, eventually, probe_tcp
from tests.node.daemon import Ctrport, wait_closed, wait_open

WEB = '  - match: {container: web}\n    ports: ["8080:80"]\n'
DB = '  - match: {container: db}\n    ports: ["9000:90", "91"]\n'
PUBLISH = f"publish:\n{WEB}{DB}"


class World:
    """A node with a web and a db, and a daemon that publishes them."""

    def __init__(self, node: Node) -> None:
        self.node = node
        node.add_network("docker0", ip_masq=False)
        self.web, self.db = self._start("web", 80, 81), self._start("db", 90, 91)
        self.ctrport = Ctrport(node)
        self.ctrport.configure(PUBLISH)
        self.ctrport.start()
        self.open()

    def _start(self, name: str, *ports: int) -> Container:
        container = self.node.start(name)
        Server(container, ports)
        return container

    def open(self) -> None:
        wait_open(self.node, 8080, "web")
        wait_open(self.node, 9000, "db")

    def configure(self, text: str) -> None:
        """As an editor does: written beside it, and renamed into place."""
        new = self.ctrport.config.with_suffix(".new")
        new.write_text(text)
        new.rename(self.ctrport.config)

    def chosen(self) -> int:
        bound = str(self.ctrport.publication("91/tcp")["bound"])
        return int(bound.partition(":")[0])

    def read_anew(self) -> int:
        return self.ctrport.messages.count(" reloaded ")

    def told(self, times: int) -> None:
        eventually(lambda: self.read_anew() == times, what="the configuration being read anew")


@pytest.fixture
def world(node: Node) -> World:
    return World(node)


@pytest.fixture
def node() -> Iterator[Node]:
    with Node() as node:
        node.start_containerd()
        yield node


class Connection:
    """A connection of the LAN client's, that says whether it is alive."""

    def __init__(self, node: Node, port: int) -> None:
        self._socket = node.client.socket()
        self._socket.settimeout(2)
        self._socket.connect((node.address, port))

    def answers(self) -> bool:
        try:
            self._socket.sendall(b"who?\n")
            return bool(self._socket.recv(200))
        except OSError:
            return False

    def close(self) -> None:
        self._socket.close()


def counters(node: Node, chain: str = "DOCKER") -> dict[str, str]:
    """What each rule of a mapping has counted in nat."""
    listed = node.run("iptables-nft", "-t", "nat", "-vnxL", chain).stdout
    return {line.split("/*")[1].split("*/")[0]: line.split()[0] for line in listed.splitlines() if "default/" in line}


def test_what_is_added_is_published_and_the_rest_not_touched(world: World) -> None:
    node, port = world.node, world.chosen()
    connection = Connection(node, 8080)
    before, transactions = counters(node), world.ctrport.status()["transactions"]
    assert any(int(count) for count in before.values())
    world.configure(f'{PUBLISH}  - match: {{container: web}}\n    ports: ["8081:81"]\n')
    wait_open(node, 8081, "web")
    world.told(1)
    after = counters(node)
    assert {its: after[its] for its in before} == before
    eventually(lambda: world.ctrport.status()["transactions"] == transactions + 1, what="the status being written")
    assert world.chosen() == port
    assert connection.answers()
    published = [line for line in world.ctrport.messages.splitlines() if "published " in line]
    assert sum("mapping=8080" in line for line in published) == 1  # what was so is not told again

    # And taken away again: the port is closed, and what came by it is gone.
    late = Connection(node, 8081)
    world.configure(PUBLISH)
    wait_closed(node, 8081)
    world.told(2)
    eventually(lambda: not late.answers(), what="its connection being dead")
    assert connection.answers()
    assert {its: counters(node)[its] for its in before} == before
    assert "withdrawn container=default/web mapping=8081:81/tcp" in world.ctrport.messages
    late.close()
    connection.close()


def test_a_mapping_that_leads_elsewhere_takes_its_connections_along(world: World) -> None:
    connection = Connection(world.node, 8080)
    other = Connection(world.node, 9000)
    world.configure(PUBLISH.replace("8080:80", "8080:81"))
    world.told(1)
    outcome = wait_open(world.node, 8080, "web")
    assert outcome.text.split()[-1] == "81", outcome
    eventually(lambda: not connection.answers(), what="the old connection being dead")
    assert other.answers()
    connection.close()
    other.close()


BAD = [
    ("publish: [", r"config.yaml:1:\d+: "),
    (PUBLISH.replace("8080:80", "8080:http"), r"config.yaml:3:13: .*8080:http"),
    ("publish:\n  - match: {}\n    ports: [x, y]\n", r"config.yaml:2:12: .*, and 2 more: ctrport check"),
]


@pytest.mark.parametrize(("text", "said"), BAD)
def test_a_bad_file_changes_nothing_and_is_named_until_it_is_mended(world: World, text: str, said: str) -> None:
    before, tables = world.ctrport.status(), world.node.tables()
    world.configure(text)
    stale = eventually(lambda: world.ctrport.status()["config"], what="the problem being told")
    assert re.search(said, stale), stale
    assert world.ctrport.messages.count(" not-reloaded ") == 1
    ps = world.ctrport.run("ps")
    assert f"warning: an older configuration is in use: {stale}" in ps.stderr
    assert world.node.tables() == tables
    assert world.ctrport.status()["transactions"] == before["transactions"]
    world.open()
    # The same again on a signal is not said again; the old file, back again, is nothing to do.
    os.kill(world.ctrport.pid, signal.SIGHUP)
    world.configure(PUBLISH)
    eventually(lambda: not world.ctrport.status()["config"], what="the problem being over")
    assert world.ctrport.messages.count(" not-reloaded ") == 1
    assert world.read_anew() == 0
    assert world.ctrport.status()["transactions"] == before["transactions"]


def test_systemd_is_told_that_an_older_configuration_is_in_use(world: World) -> None:
    address = world.node.directory / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.setblocking(False)
        assert world.ctrport.stop() == 0
        world.ctrport.start(env={"NOTIFY_SOCKET": str(address)})
        world.configure("publish: [")
        eventually(lambda: world.ctrport.status()["config"], what="the file being read")
        assert "; an older configuration is in use: " in _statuses(manager)[-1]
        world.configure(PUBLISH)
        eventually(lambda: not world.ctrport.status()["config"], what="the file being read")
        assert re.fullmatch(r"STATUS=3 of 3 publications active", _statuses(manager)[-1])


def _statuses(manager: socket.socket) -> list[str]:
    lines: list[str] = []
    with contextlib.suppress(BlockingIOError):
        while True:
            lines += manager.recv(1 << 16).decode().splitlines()
    return [line for line in lines if line.startswith("STATUS=")]


def test_a_file_that_is_gone_changes_nothing(world: World) -> None:
    world.ctrport.config.unlink()
    stale = eventually(lambda: world.ctrport.status()["config"], what="the problem being told")
    assert stale.endswith("No such file or directory; expected a configuration file (--config)")
    world.open()


def test_a_part_beside_the_file_is_seen_when_it_comes(world: World) -> None:
    parts = world.ctrport.config.parent / "conf.d"
    parts.mkdir()
    (parts / "more.yaml").write_text('publish:\n  - match: {container: web}\n    ports: ["8081:81"]\n')
    wait_open(world.node, 8081, "web")
    (parts / "more.yaml").write_text('publish:\n  - match: {container: web}\n    ports: ["8082:81"]\n')
    wait_open(world.node, 8082, "web")
    wait_closed(world.node, 8081)
    (parts / "more.yaml").unlink()
    wait_closed(world.node, 8082)
    world.open()


def test_a_signal_reads_it_too(world: World) -> None:
    """Where it is a link to another directory nothing is announced here."""
    elsewhere = world.node.directory / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "real.yaml").write_text(PUBLISH)
    world.ctrport.config.unlink()
    world.ctrport.config.symlink_to(elsewhere / "real.yaml")
    (elsewhere / "real.yaml").write_text(PUBLISH.replace("8080:", "8088:"))
    os.kill(world.ctrport.pid, signal.SIGHUP)
    wait_open(world.node, 8088, "web")
    wait_closed(world.node, 8080)


@pytest.mark.parametrize(
    "settings",
    [
        "firewall: {chain: CTRPORT}",
        "firewall: {backend: iptables-legacy}",
        "firewall: {localhost: false}",
        "firewall: {position: last, masquerade: all, reserve_limit: 0}",
        "networks: [{bridge: docker0}]",
        "containerd: {namespaces: [default]}",
    ],
)
def test_every_setting_is_taken_up_and_given_back_and_no_port_is_dark_meanwhile(world: World, settings: str) -> None:
    node, port = world.node, world.chosen()
    node.run("iptables-nft", "-A", "DOCKER-USER", "-s", "203.0.113.7", "-j", "DROP")
    before = sorted(node.tables().splitlines())
    connection = Connection(node, 8080)
    since = world.ctrport.publication("8080:80/tcp")["since"]
    world.ctrport.log.write_text("")
    with Knocking(node, 8080) as knocking:
        world.configure(f"{settings}\n{PUBLISH}")
        world.told(1)
        world.open()
        assert is_in_line(world)
        assert "-A DOCKER-USER -s 203.0.113.7/32 -j DROP" in node.tables()
        world.configure(PUBLISH)
        world.told(2)
        world.open()
        eventually(lambda: sorted(node.tables().splitlines()) == before, what="the tables being as before")
    assert "legacy" not in settings or "ctrport" not in node.tables(backend="legacy")
    assert knocking.refused == []
    assert knocking.answered > 10
    assert connection.answers()
    assert world.chosen() == port
    assert world.ctrport.publication("8080:80/tcp")["since"] == since
    assert "mapping=8080:80" not in world.ctrport.messages  # though it stands in another line
    connection.close()


def is_in_line(world: World) -> bool:
    ended = world.ctrport.run("plan", "--config", str(world.ctrport.config), check=False)
    assert ended.returncode == 0, ended
    return True


def test_what_cannot_be_used_here_leaves_it_as_it_is(world: World) -> None:
    world.node.run("iptables-nft", "-t", "nat", "-N", "MINE")
    world.node.run("iptables-nft", "-t", "nat", "-A", "MINE", "-j", "RETURN")
    tables = world.node.tables()
    world.configure(f"firewall: {{chain: MINE}}\n{PUBLISH}")
    stale = eventually(lambda: world.ctrport.status()["config"], what="the problem being told")
    assert "the chain MINE of the table nat is somebody else's" in stale
    world.configure(f"containerd: {{address: /run/other.sock}}\n{PUBLISH}")
    eventually(lambda: "containerd.address" in world.ctrport.status()["config"], what="the other problem being told")
    assert world.node.tables() == tables
    world.open()
    world.configure(PUBLISH)
    eventually(lambda: not world.ctrport.status()["config"], what="the problem being over")


def test_containers_of_a_namespace_that_is_not_watched_any_more_are_withdrawn(world: World) -> None:
    world.configure(f"containerd: {{namespaces: [k8s.io]}}\n{PUBLISH}")
    wait_closed(world.node, 8080)
    wait_closed(world.node, 9000)
    world.configure(PUBLISH)
    world.open()


class Knocking:
    """A client that connects again and again, and keeps who was not answered."""

    def __init__(self, node: Node, port: int) -> None:
        self._node, self._port = node, port
        self.answered = 0
        self.refused: list[str] = []

    def __enter__(self) -> Knocking:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._knock, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _knock(self) -> None:
        while not self._end.wait(0.01):
            outcome = probe_tcp(self._node.client, self._node.address, self._port, timeout=1)
            if getattr(outcome, "name", "") == "web":
                self.answered += 1
            else:
                self.refused.append(str(outcome))
