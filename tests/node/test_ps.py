"""`ctrport ps` and the truth: what is declared, what the kernel holds, and where they differ, daemon or not."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ctrport.installed import MISSING
from embedded.host import end_process
from embedded.node import Node
from embedded.traffic import Server
from embedded.wait import eventually
from tests.node.daemon import Ctrport, publish, wait_open

PUBLISH = publish(
    ("{container: web}", "8080:80"),
    ("{container: db}", "9000:80"),
    ("{pod: {namespace: shop}}", "8081:80"),
    ("{container: late}", "8082:80"),
)
DOWN = "the daemon is down"

pytestmark = pytest.mark.node_of_many


class World:
    """A node with a daemon, of which web, db and a pod are published."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.ctrport = Ctrport(node)
        for name in ("web", "db"):
            Server(node.start(name), 80)
        self.pod = node.start_pod("shop-0", namespace="shop")
        self.start()

    def start(self) -> None:
        self.ctrport.configure(PUBLISH)
        self.ctrport.start()
        for mapping in ("8080:80/tcp", "9000:80/tcp", "8081:80/tcp"):
            self.ctrport.wait_for(mapping, "active")

    def ps(self, *options: str) -> dict[str, Any]:
        """What it shows for programs."""
        shown = self.ctrport.run("ps", "--json", "--config", str(self.ctrport.config), *options)
        said: dict[str, Any] = json.loads(shown.stdout)
        return said

    def states(self) -> dict[str, str]:
        return {its["mapping"]: its["state"] for its in self.ps()["publications"]}

    def check(self, *options: str) -> tuple[int, str]:
        """Its exit status, and the one line."""
        ended: subprocess.CompletedProcess[str] = self.ctrport.run(
            "ps", "--check", "--config", str(self.ctrport.config), *options, check=False
        )
        assert ended.stderr == ""
        [line] = ended.stdout.splitlines()
        return ended.returncode, line

    def lose(self, words: str, *, table: str = "nat") -> None:
        """Delete the rules of one table that have these words."""
        for line in self.node.run("iptables-nft", "-t", table, "-S").stdout.splitlines():
            if words in line and line.startswith("-A "):
                self.node.run("iptables-nft", "-t", table, *shlex.split(line.replace("-A", "-D", 1)))


@pytest.fixture(scope="module")
def everything() -> Iterator[World]:
    with Node(cri=True) as node:
        node.sysctl("net/ipv4/icmp_ratelimit", 0)
        node.start_containerd()
        node.add_network("docker0")
        yield World(node)


@pytest.fixture
def world(everything: World) -> Iterator[World]:
    yield everything
    if not everything.ctrport.runs:
        everything.start()
    eventually(lambda: everything.check("--name", "*b")[0] == 0, what="all being as declared again")


def test_connections_are_counted(world: World) -> None:
    def counted() -> dict[str, Any]:
        return {its["mapping"]: its["connections"] for its in world.ps()["publications"]}

    before = counted()
    for _ in range(3):
        wait_open(world.node, 8080, "web")
    after = counted()
    assert after["8080:80/tcp"] == before["8080:80/tcp"] + 3
    assert after["9000:80/tcp"] == before["9000:80/tcp"]
    assert after["8082:80/tcp"] is None  # nothing matches, so there is nothing to count
    assert re.search(r"^default/web +8080:80/tcp .* active +\d+[sm] ago +\d+$", world.ctrport.run("ps").stdout, re.M)


def test_what_the_kernel_lacks_at_this_moment_is_not_active(world: World) -> None:
    assert world.check("--name", "*b") == (0, "ok: 2 of 2 publications are active")
    with world.ctrport.frozen():
        world.lose("default/web 8080:80/tcp")
        assert world.states() == {
            "8080:80/tcp": "waiting",
            "9000:80/tcp": "active",
            "8081:80/tcp": "active",
            "8082:80/tcp": "waiting",
        }
        shown = world.ps()
        assert shown["firewall"] == "in line"  # as far as the daemon knows
        assert shown["kernel"] == "1 mapping is not all there"
        web = next(its for its in shown["publications"] if its["mapping"] == "8080:80/tcp")
        assert (web["reason"], web["installed"], web["connections"]) == (MISSING, False, 0)
        worst = f"the worst: waiting default/web 8080:80/tcp: {MISSING}"
        assert world.check("--name", "web") == (1, f"not ok: 1 of 1 publication is not active, {worst}")
        assert world.check("--name", "db")[0] == 0
        # One that lets through, and one that all of them need.
        world.lose("default/db 9000:80/tcp", table="filter")
        assert world.states()["9000:80/tcp"] == "waiting"
        assert world.states()["8081:80/tcp"] == "active"
        world.node.run("iptables-nft", "-t", "nat", "-F", "PREROUTING")
        assert set(world.states().values()) == {"waiting"}
    eventually(lambda: world.check("--name", "*b")[0] == 0, what="the daemon having put them back")
    assert world.states()["8080:80/tcp"] == "active"


def test_what_nothing_declares_is_shown_where_the_kernel_holds_it(world: World) -> None:
    with world.ctrport.frozen():
        ghost = ("-m", "comment", "--comment", "ctrport default/ghost 7:7/tcp 0123456789ab")
        to = ("-j", "DNAT", "--to-destination", "172.17.0.99:7")
        world.node.run("iptables-nft", "-t", "nat", "-A", "DOCKER", "-p", "tcp", "--dport", "7", *ghost, *to)
        [left] = world.ps()["undeclared"]
        assert (left["namespace"], left["container"], left["mapping"]) == ("default", "ghost", "7:7/tcp")
        line = world.ctrport.run("ps", "--state", "undeclared").stdout.splitlines()[1]
        assert line.split()[:4] == ["default/ghost", "7:7/tcp", "-", "undeclared"]
        assert world.check("--name", "ghost") == (1, "not ok: in the kernel and undeclared: default/ghost 7:7/tcp")
    eventually(lambda: world.ps()["undeclared"] == [], what="the daemon having removed it")


def test_a_pod_is_asked_for_by_its_name(world: World) -> None:
    shown = world.ctrport.run("ps", "--wide", "--name", "pod:shop/*").stdout.splitlines()
    assert len(shown) == 2
    cells = dict(zip(*(re.split(r"\s{2,}", line) for line in shown), strict=False))
    assert (cells["CONTAINER"], cells["STATE"], cells["FROM"]) == ("pod:shop/shop-0", "active", "anywhere")
    assert (cells["SANDBOX"], cells["SOURCE"]) == (f"k8s.io/{world.pod.id}", f"{world.ctrport.config}:7")
    assert [its["pod"] for its in world.ps("--namespace", "k8s.*")["publications"]] == ["shop/shop-0"]


def test_while_containers_come_and_go_nothing_is_said_to_differ(world: World) -> None:
    """What the daemon says is a moment behind what the kernel holds."""

    def come_and_go() -> None:
        for _ in range(8):
            world.node.delete(world.node.start("late"))

    shown = []
    with ThreadPoolExecutor(1) as beside:
        work = beside.submit(come_and_go)
        while not work.done():
            shown.append(world.ps())
        work.result()
    assert len(shown) >= 3
    assert {its["kernel"] for its in shown} == {"in line"}, [its["undeclared"] for its in shown]
    assert {its["installed"] for each in shown for its in each["publications"]} <= {True, None}


def test_with_the_daemon_killed_it_says_so_and_shows_what_works_still(world: World) -> None:
    late = world.node.start("late")
    world.ctrport.wait_for("8082:80/tcp", "active")
    world.ctrport.stop(signal.SIGKILL)
    world.node.delete(late)
    shown = world.ctrport.run("ps", "--config", str(world.ctrport.config))
    assert shown.stderr.startswith(f"{DOWN}; ")
    lines = {tuple(line.split()[1:4:2]): line for line in shown.stdout.splitlines()[1:]}
    assert {state for mapping, state in lines if mapping != "8082:80/tcp"} == {"active"}
    assert ("8082:80/tcp", "waiting") in lines
    assert lines["8082:80/tcp", "undeclared"].startswith("default/late ")
    right, line = world.check()
    assert right == 1
    assert line.startswith(f"not ok: {DOWN}; in the kernel and undeclared: default/late 8082:80/tcp; 1 of 4 ")
    assert world.check("--name", "web") == (1, f"not ok: {DOWN}")  # it follows nobody any more
    world.start()
    eventually(lambda: world.ps()["undeclared"] == [], what="the next daemon having removed it")


def test_with_neither_daemon_nor_containerd_it_is_not_ok(world: World) -> None:
    world.ctrport.stop()
    world.node.stop_containerd()
    right, line = world.check()
    assert (right, line.partition(" at ")[0]) == (1, f"not ok: {DOWN}; containerd cannot be reached")
    world.node.start_containerd()


def test_a_lost_containerd_is_not_ok(world: World) -> None:
    world.node.stop_containerd()
    eventually(lambda: world.check("--name", "web")[1].startswith("not ok: containerd: lost: "), what="its being told")
    world.node.start_containerd()


def test_it_watches_until_it_is_interrupted(world: World) -> None:
    output = world.node.directory / "watched"
    with output.open("w") as file:
        watching = world.node.spawn(
            *Ctrport._argv("ps", "--watch", "--name", "late", "--name", "web"),
            env=Ctrport._environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        eventually(lambda: "default/web" in output.read_text(), what="the first block")
        late = world.node.start("late")
        eventually(lambda: "default/late" in output.read_text(), what="the block with what came")
        world.node.delete(late)
        eventually(lambda: len(output.read_text().split("\n\n")) == 3, what="the block with what went")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(5) == 0
    finally:
        end_process(watching)
    first, second, third = output.read_text().split("\n\n")
    assert [("late" in block, "web" in block) for block in (first, second, third)] == [
        *((False, True), (True, True), (False, True))
    ]
    assert "Traceback" not in output.read_text()


def test_a_table_of_our_own_is_asked_too(world: World) -> None:
    world.ctrport.configure(f"firewall: {{backend: nftables}}\n{PUBLISH}")
    eventually(lambda: world.ps()["backend"] == "nftables", what="the other backend")
    eventually(lambda: world.check("--name", "*b")[0] == 0, what="all being as declared there")
    before = next(its["connections"] for its in world.ps()["publications"] if its["mapping"] == "8080:80/tcp")
    wait_open(world.node, 8080, "web")
    web = next(its for its in world.ps()["publications"] if its["mapping"] == "8080:80/tcp")
    assert (web["state"], web["installed"], web["connections"]) == ("active", True, before + 1)
    with world.ctrport.frozen():
        world.node.run("nft", "delete", "element", "ip", "ctrport", "host-ports", "{ tcp . 8080 }")
        assert {key: world.states()[key] for key in ("8080:80/tcp", "9000:80/tcp")} == {
            "8080:80/tcp": "waiting",
            "9000:80/tcp": "active",
        }
        world.node.run("nft", "delete", "table", "ip", "ctrport")
        assert set(world.states().values()) == {"waiting"}
    eventually(lambda: world.check("--name", "*b")[0] == 0, what="all being there again")
    world.ctrport.configure(PUBLISH)
    eventually(lambda: world.ps()["backend"] == "iptables-nft", what="the other backend again")


def test_legacy_tables_are_asked_too(world: World) -> None:
    world.ctrport.configure(f"firewall: {{backend: iptables-legacy, poll_interval: 60}}\n{PUBLISH}")
    eventually(lambda: world.ps()["backend"] == "iptables-legacy", what="the other backend")
    wait_open(world.node, 8080, "web")
    web = next(its for its in world.ps()["publications"] if its["mapping"] == "8080:80/tcp")
    assert (web["state"], web["installed"]) == ("active", True)
    assert web["connections"] >= 1
    world.node.run("iptables-legacy", "-w", "-t", "nat", "-F", "DOCKER")
    assert world.states()["8080:80/tcp"] == "waiting"  # and it stays so, until the daemon asks
    assert world.check("--name", "web")[0] == 1
    world.ctrport.configure(PUBLISH)
    eventually(lambda: world.ps()["backend"] == "iptables-nft", what="the other backend again")
