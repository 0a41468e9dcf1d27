"""The daemon and containerd over time: each ends, hangs or starts again, and the ports follow."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, connected, eventually, probe_tcp
from tests.node.daemon import OFTEN, Ctrport, publish, wait_closed, wait_open

WEB = publish(("{container: web}", "8080:80"))
MAPPING = "8080:80/tcp"


@contextlib.contextmanager
def unwritten(node: Node) -> Iterator[None]:
    """Fail where anybody writes to the kernel's tables: as the kernel announces it, whoever it was."""
    seen = node.directory / "monitor.log"
    with seen.open("w") as out:
        monitor = node.spawn("nft", "monitor", stdin=subprocess.DEVNULL, stdout=out)

    def announced(table: str) -> bool:
        # Again and again at the beginning, for nobody says when the monitor listens.
        node.run("nft", f"add table ip {table}; delete table ip {table}")
        return table in seen.read_text()

    eventually(lambda: announced("begin"), what="nft monitor listening")
    yield
    eventually(lambda: announced("end"), what="nft monitor being through")
    monitor.terminate()
    lines = [line for line in seen.read_text().splitlines() if not line.startswith("#")]
    assert {line.split()[-1] for line in lines} == {"begin", "end"}, lines


# The end of the daemon


@contextlib.contextmanager
def busy(node: Node, ctrport: Ctrport) -> Iterator[None]:
    """Keep containers coming and going."""
    enough = threading.Event()

    def churn() -> None:
        while not enough.is_set():
            node.delete(node.start("web"))

    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn)
        try:
            eventually(lambda: ctrport.messages.count("published ") >= 3, what="the daemon being busy")
            yield
        finally:
            enough.set()
        churning.result()


@contextlib.contextmanager
def idle(node: Node, ctrport: Ctrport) -> Iterator[None]:
    yield


@contextlib.contextmanager
def without_containerd(node: Node, ctrport: Ctrport) -> Iterator[None]:
    node.kill_containerd()
    eventually(lambda: "waiting for it" in ctrport.messages, what="the daemon waiting for containerd")
    yield


@contextlib.contextmanager
def while_containerd_hangs(node: Node, ctrport: Ctrport) -> Iterator[None]:
    # What is looked at is what an event named: the look then hangs, for as long as 5 s.
    with ctrport.frozen():
        node.start("web")
        node.pause_containerd()
    yield
    node.continue_containerd()


Situation = Callable[[Node, Ctrport], "contextlib.AbstractContextManager[None]"]


@pytest.mark.parametrize("situation", [idle, busy, without_containerd, while_containerd_hangs])
def test_it_ends_within_a_second(node: Node, ctrport: Ctrport, situation: Situation) -> None:
    ctrport.configure(WEB)
    ctrport.start()
    with situation(node, ctrport):
        begun = time.monotonic()
        assert ctrport.stop() == 0
        took = time.monotonic() - begun
    assert took < 1, f"{took:.2f} s"
    assert "Traceback" not in ctrport.messages
    assert ctrport.status()["running"] is False


def test_it_ends_though_what_it_waits_for_comes_in_the_same_moment(node: Node, ctrport: Ctrport) -> None:
    # Before Python 3.12 asyncio.wait_for lets a cancellation fall when what it waits for is there at the same time.
    # So both are made to happen at once: while the daemon is frozen it is told to end, and what it waits for is over.
    programs = node.directory / "programs"
    programs.mkdir()
    begun, goes_on = programs / "begun", programs / "goes-on"
    restore = programs / "iptables-nft-restore"
    restore.write_text(
        "#!/bin/sh\n"
        f"cat >{programs}/$$\n"
        f"if grep -q 8080 {programs}/$$; then\n"
        f"    echo $$ >{begun}.new; mv {begun}.new {begun}\n"
        f"    until [ -e {goes_on} ]; do sleep 0.01; done\n"
        "fi\n"
        f'{shutil.which("iptables-nft-restore")} "$@" <{programs}/$$\n'
    )
    restore.chmod(0o755)
    ctrport.configure(WEB)
    ctrport.start(env={"PATH": f"{programs}:{os.environ['PATH']}"})
    node.start("web")
    eventually(begun.exists, what="the daemon waiting for the rules to be written")
    of_it = ("ps", "-o", "args=", "-p", begun.read_text().strip())
    with ctrport.frozen():
        assert str(restore) in node.run(*of_it).stdout
        node.run("kill", "-TERM", str(ctrport.status()["pid"]))
        goes_on.touch()
        # What has ended is a zombie, for the daemon is frozen.
        eventually(lambda: str(restore) not in node.run(*of_it, check=False).stdout, what="the program being over")
    assert ctrport.stop() == 0


def test_it_ends_while_it_waits_for_a_containerd_that_never_came(node: Node, ctrport: Ctrport) -> None:
    node.stop_containerd()
    ctrport.configure(WEB)
    ctrport.start(wait=False)
    eventually(lambda: "waiting for it" in ctrport.messages, what="the daemon waiting for containerd")
    begun = time.monotonic()
    assert ctrport.stop(signal.SIGINT) == 0
    assert time.monotonic() - begun < 1
    assert "Traceback" not in ctrport.messages


def test_on_stop_keep_lets_the_port_work_without_the_daemon(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(WEB)
    ctrport.start()
    Server(node.start("web"), 80)
    wait_open(node, 8080, "web")
    with unwritten(node):
        assert ctrport.stop() == 0
    assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)
    assert isinstance(probe_tcp(node, "127.0.0.1", 8080), Reply)


def test_on_stop_remove_leaves_everything_as_it_was(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web")
    Server(web, 80)
    before = node.tables()
    ctrport.configure(publish(("{container: web}", "8080:80"), settings="firewall: {on_stop: remove}"))
    ctrport.start()
    wait_open(node, 8080, "web")
    assert node.tables() != before
    assert ctrport.stop() == 0
    assert node.tables() == before
    assert node.run("cat", "/proc/sys/net/ipv4/conf/docker0/route_localnet").stdout == "0\n"
    assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)


def test_a_killed_daemon_leaves_the_port_working(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(WEB)
    ctrport.start()
    Server(node.start("web"), 80)
    wait_open(node, 8080, "web")
    assert ctrport.stop(signal.SIGKILL) == -signal.SIGKILL
    assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)


# The daemon starts again


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_writes_nothing_where_nothing_changed(node: Node, ctrport: Ctrport, number: signal.Signals) -> None:
    ctrport.configure(WEB)
    ctrport.start()
    Server(node.start("web"), 80)
    wait_open(node, 8080, "web")
    ctrport.wait_for(MAPPING, "active")
    former = ctrport.status()["pid"]
    with connected(node.client, node.address, 8080) as answered, unwritten(node):
        ctrport.stop(number)
        ctrport.start(wait=False)
        # The status of a daemon that was killed still says that it runs.
        eventually(lambda: ctrport.status()["pid"] != former and ctrport.in_line(), what="the new daemon in line")
        assert answered()
        wait_open(node, 8080, "web")
    assert ctrport.transactions == 0
    assert ctrport.publication(MAPPING)["state"] == "active"


def test_a_container_that_ended_while_the_daemon_was_down_is_closed_at_the_start(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(WEB)
    ctrport.start()
    web = node.start("web")
    Server(web, 80)
    wait_open(node, 8080, "web")
    ctrport.stop()
    node.delete(web)
    assert str(web.address) in node.tables()
    ctrport.start()
    assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)
    assert str(web.address) not in node.tables()


def test_a_container_that_started_while_the_daemon_was_down_is_opened_at_the_start(
    node: Node, ctrport: Ctrport
) -> None:
    ctrport.configure(WEB)
    ctrport.start()
    ctrport.stop()
    Server(node.start("web"), 80)
    assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)
    ctrport.start()
    wait_open(node, 8080, "web")


def test_a_container_that_moved_while_the_daemon_was_down_is_followed_at_the_start(
    node: Node, ctrport: Ctrport
) -> None:
    ctrport.configure(WEB)
    ctrport.start()
    web = node.start("web")
    Server(web, 80, name="before")
    wait_open(node, 8080, "before")
    ctrport.stop()
    node.delete(web)
    again = node.start("web")
    Server(again, 80, name="after")
    assert again.address != web.address
    ctrport.start()
    wait_open(node, 8080, "after")
    assert str(web.address) not in node.tables()


def test_a_mapping_taken_out_of_the_configuration_is_closed_at_the_start(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web")
    Server(web, 80)
    ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: web}", "8081:80")))
    ctrport.start()
    wait_open(node, 8080, "web")
    wait_open(node, 8081, "web")
    ctrport.stop()
    ctrport.configure(publish(("{container: web}", "8081:80")))
    with connected(node.client, node.address, 8081) as answered:
        ctrport.start()
        assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)
        assert answered()
    assert " 8080" not in node.tables()


# containerd comes and goes


def test_it_waits_for_a_containerd_that_is_not_there_yet(node: Node, ctrport: Ctrport) -> None:
    node.stop_containerd()
    ctrport.configure(WEB)
    ctrport.start(wait=False)
    eventually(lambda: "waiting for it" in ctrport.messages, what="the daemon saying that it waits")
    assert ctrport.status()["containerd"] == "not connected"
    node.start_containerd()
    Server(node.start("web"), 80)
    wait_open(node, 8080, "web")
    waiting = [line for line in ctrport.messages.splitlines() if node.containerd_socket in line]
    assert len(waiting) == 2, waiting
    assert waiting[0].endswith(
        f'cannot be reached at {node.containerd_socket}: No such file or directory; waiting for it"'
    )
    assert f" containerd address={node.containerd_socket} version=" in waiting[1]
    assert "Traceback" not in ctrport.messages


def test_rules_stay_while_containerd_is_away_and_are_followed_again_after(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: shop}", "8081:80")))
    ctrport.start()
    Server(node.start("web"), 80)
    wait_open(node, 8080, "web")
    with connected(node.client, node.address, 8080) as answered:
        with unwritten(node):
            node.kill_containerd()
            eventually(lambda: "waiting for it" in ctrport.messages, what="the daemon noticing that")
            assert ctrport.status()["containerd"].startswith("lost: ")
            wait_open(node, 8080, "web")
            assert ctrport.publication(MAPPING)["state"] == "active"
            node.start_containerd()
            eventually(ctrport.in_line, what="the daemon being in line again")
        Server(node.start("shop"), 80)
        wait_open(node, 8081, "shop")
        assert answered()
    assert ctrport.messages.count("rules stay as they are") == 1
    assert "Traceback" not in ctrport.messages


def test_what_dies_while_containerd_is_away_is_closed_once_it_is_back(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(WEB)
    ctrport.start()
    web = node.start("web")
    Server(web, 80)
    wait_open(node, 8080, "web")
    node.stop_containerd()
    node.kill(web)
    node.start_containerd()
    wait_closed(node, 8080)


def test_containerd_may_restart_many_times(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(WEB)
    ctrport.start()
    for _ in range(5):
        node.kill_containerd()
        node.start_containerd()
    Server(node.start("web"), 80)
    wait_open(node, 8080, "web")
    assert "Traceback" not in ctrport.messages


def test_rules_stay_while_containerd_hangs_and_are_followed_again_after(node: Node, ctrport: Ctrport) -> None:
    # Takes a tick and a deadline: a containerd that hangs sends no event that would say so.
    ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: shop}", "8081:80")))
    ctrport.start(tick=OFTEN)
    Server(node.start("web"), 80)
    wait_open(node, 8080, "web")
    with connected(node.client, node.address, 8080) as answered:
        with unwritten(node):
            node.pause_containerd()
            said = f"containerd at {node.containerd_socket} did not answer within 3 s; rules stay as they are"
            eventually(lambda: said in ctrport.messages, what="the daemon saying that containerd hangs")
            eventually(lambda: "did not answer" in ctrport.status()["containerd"], what="the status saying so, too")
            wait_open(node, 8080, "web")
            node.continue_containerd()
            eventually(ctrport.in_line, what="the daemon being in line again")
        Server(node.start("shop"), 80)
        wait_open(node, 8081, "shop")
        assert answered()
    assert "Traceback" not in ctrport.messages
