"""Behaviour over time: containers, containerd and the daemon itself come and go, and the ports follow."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from embedded.host import Place
from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, TimedOut, eventually, probe_tcp
from tests.node.daemon import Ctrport, publish, wait_closed, wait_open

WEB = publish(("{container: web}", "8080:80"))
#: With a second container, whose publication shows that the daemon has seen all that happened before it.
WEB_AND_MARKER = publish(("{container: web}", "8080:80"), ("{container: marker}", "9000:80"))
SHOP = publish(("{labels: {app: shop}}", "8080:80"))
APP_SHOP = {"app": "shop"}

MAPPING = "8080:80/tcp"
MARKER = "9000:80/tcp"

#: What answers from inside the container, and so stands still while that is paused.
ANSWERING = ("/bin/nc", "-ll", "-p", "80", "-e", "/bin/echo", "here")

#: Seconds in which everything that sends no event is noticed: the daemon looks every 10 s, and gives containerd 3 s.
TICK = 15.0


@contextlib.contextmanager
def connected(place: Place, address: str, port: int) -> Iterator[Callable[[], bool]]:
    """Keep a connection; what is given says whether it is still answered, and by the same server."""
    with place.socket() as client:
        client.settimeout(2)
        client.connect((address, port))
        first = client.recv(100)

        def answered() -> bool:
            client.sendall(b"still there?\n")
            return client.recv(100) == first

        yield answered


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


def transactions(ctrport: Ctrport) -> int:
    return int(ctrport.status()["transactions"])


def marked(node: Node, ctrport: Ctrport) -> None:
    """Return when the daemon has seen what happened until now: events come in their order."""
    node.start("marker")
    ctrport.wait_for(MARKER, "active")


# Containers


def test_what_runs_already_is_published_at_the_start(node: Node, ctrport: Ctrport) -> None:
    Server(node.start("web"), 80)
    ctrport.configure(WEB)
    ctrport.start()
    assert wait_open(node, 8080, "web").peer == node.client_address


def test_what_starts_later_is_published_by_its_event(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(WEB)
    ctrport.start()
    assert ctrport.publication(MAPPING)["state"] == "waiting"
    Server(node.start("web"), 80)
    begun = time.monotonic()
    wait_open(node, 8080, "web")
    assert time.monotonic() - begun < 3, "it was found by the tick, not by the event"


def test_a_killed_container_loses_its_port_before_its_task_is_deleted(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(WEB)
    ctrport.start()
    web = node.start("web")
    Server(web, 80)
    wait_open(node, 8080, "web")
    node.kill(web)
    wait_closed(node, 8080)
    assert node.status(web) == "STOPPED"
    assert ctrport.wait_for(MAPPING, "waiting")["reason"] == "no running container matches container=web"


def test_a_deleted_task_loses_its_port(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(WEB)
    ctrport.start()
    Server(node.start("web"), 80)
    wait_open(node, 8080, "web")
    node.run("ctr", "task", "delete", "--force", "web")
    wait_closed(node, 8080)


def test_a_command_execd_in_a_container_changes_nothing_by_its_end(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(WEB_AND_MARKER)
    ctrport.start()
    web = node.start("web")
    Server(web, 80)
    wait_open(node, 8080, "web")
    ctrport.wait_for(MAPPING, "active")
    before = ctrport.status()
    with connected(node.client, node.address, 8080) as answered:
        for _ in range(3):
            node.exec(web, "true")
            assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)
        marked(node, ctrport)
        assert answered()
    after = ctrport.status()
    # The marker's own; an event that names the container would be no harm, but is not worth a look.
    assert (after["transactions"], after["events"]) == (before["transactions"] + 1, before["events"] + 1)
    assert "withdrawn" not in ctrport.messages


def test_a_paused_container_keeps_its_mapping(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(WEB_AND_MARKER)
    ctrport.start()
    web = node.start("web", command=ANSWERING)
    wait_open(node, 8080)
    node.pause(web)
    before = node.tables()
    assert isinstance(probe_tcp(node.client, node.address, 8080, timeout=0.3), TimedOut)
    marked(node, ctrport)
    ours = [line for line in before.splitlines() if "ctrport" in line]
    assert set(ours) <= set(node.tables().splitlines())
    assert ctrport.publication(MAPPING)["state"] == "active"
    node.resume(web)
    assert wait_open(node, 8080).text == "here"
    assert "withdrawn" not in ctrport.messages


@pytest.mark.parametrize("at_once", [False, True], ids=["event-by-event", "all-events-at-once"])
def test_a_container_that_returns_elsewhere_is_followed(node: Node, ctrport: Ctrport, at_once: bool) -> None:
    ctrport.configure(WEB)
    ctrport.start()
    web = node.start("web")
    Server(web, 80, name="before")
    wait_open(node, 8080, "before")
    with ctrport.frozen() if at_once else contextlib.nullcontext():
        node.delete(web)
        again = node.start("web")
        Server(again, 80, name="after")
    assert again.address != web.address
    wait_open(node, 8080, "after")
    assert str(web.address) not in node.tables()
    assert ctrport.wait_for(MAPPING, "active")["addresses"] == [again.address]


def test_a_container_that_comes_and_goes_many_times_ends_where_it_is(node: Node, ctrport: Ctrport) -> None:
    node.delete(node.start("first"))  # leaves the bridge, whose address is one more of the node's
    ctrport.configure(WEB)
    ctrport.start()
    before = node.tables()
    for _ in range(12):
        node.delete(node.start("web"))
    web = node.start("web")
    Server(web, 80)
    wait_open(node, 8080, "web")
    targets = [line for line in node.tables().splitlines() if "DNAT --to" in line]
    assert len(targets) == 1
    assert f"--to-destination {web.address}:80" in targets[0]
    node.delete(web)

    def as_before() -> bool:
        differing = set(node.tables().splitlines()) ^ set(before.splitlines())
        assert node.tables() == before, sorted(differing)
        return True

    eventually(as_before, what="the tables being as before")
    assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)


def test_containers_that_start_and_die_together_are_all_followed(node: Node, ctrport: Ctrport) -> None:
    names = [f"web{number}" for number in range(8)]
    ctrport.configure(publish(*((f"{{container: {name}}}", f"{8080 + n}:80") for n, name in enumerate(names))))
    ctrport.start()
    with ThreadPoolExecutor(len(names)) as together:
        containers = list(together.map(node.start, names))
        for container in containers:
            Server(container, 80)
        for n, name in enumerate(names):
            wait_open(node, 8080 + n, name)
        list(together.map(node.kill, containers))
    for n in range(len(names)):
        wait_closed(node, 8080 + n)
    # A port of a container that died is closed before its rules are gone.
    eventually(lambda: "DNAT --to" not in node.tables(), what="the rules being gone")


# Which containers are meant


def test_equal_ids_in_two_namespaces_are_told_apart(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(
        publish(("{namespace: default, container: web}", "8080:80"), ("{namespace: k8s.io, container: web}", "8081:80"))
    )
    ctrport.start()
    here, there = node.start("web"), node.start("web", namespace="k8s.io")
    Server(here, 80, name="here")
    Server(there, 80, name="there")
    wait_open(node, 8080, "here")
    wait_open(node, 8081, "there")
    node.kill(there)
    wait_closed(node, 8081)
    assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)


def test_a_namespace_that_is_not_listed_is_not_looked_at(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(publish(("{container: web}", "8080:80"), settings="containerd: {namespaces: [k8s.io]}"))
    ctrport.start()
    Server(node.start("web", namespace="default"), 80, name="default")
    Server(node.start("web", namespace="k8s.io"), 80, name="k8s.io")
    wait_open(node, 8080, "k8s.io")
    assert ctrport.wait_for(MAPPING, "active")["namespace"] == "k8s.io"


@pytest.mark.parametrize("match", ['{container: "w*"}', '{container: "w*", namespace: "mob[y]"}'], ids=["any", "glob"])
def test_what_dockerd_publishes_itself_is_left_to_it(node: Node, ctrport: Ctrport, match: str) -> None:
    ctrport.configure(publish((match, "8080:80"), ("{container: marker}", "9000:80")))
    already = node.start("web", namespace="moby")
    ctrport.start()
    Server(already, 80)
    Server(node.start("web2", namespace="moby"), 80)
    marked(node, ctrport)
    assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)
    assert ctrport.publication(MAPPING)["container"] == ""


@pytest.mark.parametrize(
    ("match", "settings"),
    [("{container: web, namespace: moby}", ""), ("{container: web}", "containerd: {namespaces: [default, moby]}")],
    ids=["by-a-match", "in-the-list"],
)
def test_dockerds_namespace_is_served_where_it_is_named(
    node: Node, ctrport: Ctrport, match: str, settings: str
) -> None:
    ctrport.configure(publish((match, "8080:80"), settings=settings))
    ctrport.start()
    Server(node.start("web", namespace="moby"), 80)
    wait_open(node, 8080, "web")


def test_labels_and_globs_select(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(
        publish(
            ('{labels: {app: shop, tier: "1"}}', "8080:80"),
            ('{container: "db-[0-9]"}', "8081:80"),
            ('{container: "web-?", namespace: "k8s.*"}', "8082:80"),
        )
    )
    ctrport.start()
    for other in ("db-x", "db-10", "web-1"):
        Server(node.start(other), 80)
    Server(node.start("half", labels={"app": "shop"}), 80)
    Server(node.start("whole", labels={"app": "shop", "tier": "1", "more": "yes"}), 80)
    Server(node.start("db-7"), 80)
    Server(node.start("web-1", namespace="k8s.io"), 80, name="web-1-of-k8s.io")
    wait_open(node, 8080, "whole")
    wait_open(node, 8081, "db-7")
    wait_open(node, 8082, "web-1-of-k8s.io")
    for mapping, container in ((MAPPING, "whole"), ("8081:80/tcp", "db-7"), ("8082:80/tcp", "web-1")):
        ctrport.wait_for(mapping, "active", container)
    assert len(ctrport.status()["publications"]) == 3


# Two for one port


@pytest.mark.parametrize("daemon_first", [True, False], ids=["daemon-first", "daemon-last"])
@pytest.mark.parametrize(("first", "second"), [("aa", "zz"), ("zz", "aa")])
def test_of_two_for_one_port_the_first_to_start_has_it(
    node: Node, ctrport: Ctrport, first: str, second: str, daemon_first: bool
) -> None:
    ctrport.configure(SHOP)
    if daemon_first:
        ctrport.start()
    for name in (first, second):
        Server(node.start(name, labels=APP_SHOP), 80)
    if not daemon_first:
        ctrport.start()
    loser = ctrport.wait_for(MAPPING, "conflict", second)
    assert loser["reason"] == f"host port 8080/tcp is held by default/{first} (8080:80/tcp)"
    assert loser["addresses"] == []
    wait_open(node, 8080, first)
    assert ctrport.publication(MAPPING, first)["state"] == "active"


def test_a_port_goes_on_to_the_next_and_not_back(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(SHOP)
    ctrport.start()
    one = node.start("one", labels=APP_SHOP)
    Server(one, 80)
    Server(node.start("two", labels=APP_SHOP), 80)
    ctrport.wait_for(MAPPING, "conflict", "two")
    wait_open(node, 8080, "one")
    node.delete(one)
    wait_open(node, 8080, "two")
    ctrport.wait_for(MAPPING, "active", "two")
    Server(node.start("one", labels=APP_SHOP), 80)
    assert "held by default/two" in ctrport.wait_for(MAPPING, "conflict", "one")["reason"]
    assert isinstance(reply := probe_tcp(node.client, node.address, 8080), Reply)
    assert reply.name == "two"


def test_who_has_a_port_keeps_it_when_the_daemon_restarts(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(SHOP)
    ctrport.start()
    for name in ("zz", "aa"):
        Server(node.start(name, labels=APP_SHOP), 80)
    ctrport.wait_for(MAPPING, "conflict", "aa")
    wait_open(node, 8080, "zz")
    with connected(node.client, node.address, 8080) as answered:
        ctrport.stop()
        ctrport.start()
        assert answered()
    wait_open(node, 8080, "zz")
    assert transactions(ctrport) == 0


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
    # So both are made to happen at once: while the daemon is frozen it is told to end, and its conntrack ends.
    programs = node.directory / "programs"
    programs.mkdir()
    begun, goes_on = programs / "begun", programs / "goes-on"
    conntrack = programs / "conntrack"
    conntrack.write_text(f"#!/bin/sh\n: >{begun}\nuntil [ -e {goes_on} ]; do sleep 0.01; done\nexit 0\n")
    conntrack.chmod(0o755)
    ctrport.configure(WEB)
    ctrport.start(env={"PATH": f"{programs}:{os.environ['PATH']}"})
    node.start("web")
    eventually(begun.exists, what="the daemon waiting for conntrack")
    with ctrport.frozen():
        node.run("kill", "-TERM", str(ctrport.status()["pid"]))
        goes_on.touch()
        eventually(lambda: str(conntrack) not in node.run("ps", "-eo", "args").stdout, what="conntrack being over")
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
    assert transactions(ctrport) == 0
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
        f"cannot be reached at {node.containerd_socket}: No such file or directory; waiting for it"
    )
    assert waiting[1].endswith(f"answers at {node.containerd_socket}")
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
    ctrport.start()
    Server(node.start("web"), 80)
    wait_open(node, 8080, "web")
    with connected(node.client, node.address, 8080) as answered:
        with unwritten(node):
            node.pause_containerd()
            said = f"containerd at {node.containerd_socket} did not answer within 3 s; rules stay as they are"
            eventually(lambda: said in ctrport.messages, within=TICK, what="the daemon saying that containerd hangs")
            eventually(lambda: "did not answer" in ctrport.status()["containerd"], what="the status saying so, too")
            wait_open(node, 8080, "web")
            node.continue_containerd()
            eventually(ctrport.in_line, what="the daemon being in line again")
        Server(node.start("shop"), 80)
        wait_open(node, 8081, "shop")
        assert answered()
    assert "Traceback" not in ctrport.messages
