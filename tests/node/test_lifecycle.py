"""Containers over time: they come, go and return, two want one port, and the ports follow."""

from __future__ import annotations

import contextlib
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, TimedOut, connected, eventually, probe_tcp
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
    before = ctrport.transactions
    with connected(node.client, node.address, 8080) as answered:
        for _ in range(3):
            node.exec(web, "true")
            assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)
        marked(node, ctrport)
        assert answered()
    assert ctrport.transactions == before + 1  # the marker's own
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
    eventually(lambda: ctrport.publication(MAPPING)["addresses"] == [again.address], what="the address being told")


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
    loser = ctrport.wait_for(MAPPING, "waiting", second)
    assert loser["reason"] == f"default/{first} serves host port 8080/tcp; next in line"
    assert loser["addresses"] == []
    wait_open(node, 8080, first)
    assert ctrport.publication(MAPPING, first)["state"] == "active"


def test_a_port_goes_on_to_the_next_and_not_back(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(SHOP)
    ctrport.start()
    one = node.start("one", labels=APP_SHOP)
    Server(one, 80)
    Server(node.start("two", labels=APP_SHOP), 80)
    ctrport.wait_for(MAPPING, "waiting", "two")
    wait_open(node, 8080, "one")
    node.delete(one)
    wait_open(node, 8080, "two")
    ctrport.wait_for(MAPPING, "active", "two")
    Server(node.start("one", labels=APP_SHOP), 80)
    assert ctrport.wait_for(MAPPING, "waiting", "one")["reason"].startswith("default/two serves ")
    assert isinstance(reply := probe_tcp(node.client, node.address, 8080), Reply)
    assert reply.name == "two"


def test_who_has_a_port_keeps_it_when_the_daemon_restarts(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(SHOP)
    ctrport.start()
    for name in ("zz", "aa"):
        Server(node.start(name, labels=APP_SHOP), 80)
    ctrport.wait_for(MAPPING, "waiting", "aa")
    wait_open(node, 8080, "zz")
    with connected(node.client, node.address, 8080) as answered:
        ctrport.stop()
        ctrport.start()
        assert answered()
    wait_open(node, 8080, "zz")
    assert ctrport.transactions == 0


def restart(ctrport: Ctrport, number: signal.Signals) -> None:
    """End the daemon so, and return when the next one has come round: one that was killed has left its last word."""
    before = ctrport.status()["pid"]
    ctrport.stop(number)
    ctrport.start()
    eventually(lambda: ctrport.status()["pid"] != before and ctrport.in_line(), what="the word of the next one")


def test_who_waits_takes_over_from_a_task_that_was_killed_in_the_order_of_the_start(
    node: Node, ctrport: Ctrport
) -> None:
    ctrport.configure(SHOP)
    ctrport.start()
    containers = {name: node.start(name, labels=APP_SHOP) for name in ("zz", "mm", "aa", "kk")}
    for container in containers.values():
        Server(container, 80)
    line = [*containers]

    def in_order() -> bool:
        """Whether the first of the line serves, and each of the others is told its place."""
        serves, *waiting = line
        for name, place in zip(waiting, ("next", "2nd", "3rd"), strict=False):
            publication = ctrport.publication(MAPPING, name)
            assert publication["state"] == "waiting", publication
            assert publication["reason"] == f"default/{serves} serves host port 8080/tcp; {place} in line"
        assert ctrport.publication(MAPPING, serves)["state"] == "active"
        return True

    eventually(in_order, what="the line")
    shown = [" ".join(row.split()[:4]) for row in ctrport.run("ps").stdout.splitlines()[1:]]
    assert shown == [
        "default/aa 8080:80/tcp - waiting",
        "default/kk 8080:80/tcp - waiting",
        "default/mm 8080:80/tcp - waiting",
        "default/zz 8080:80/tcp 172.17.0.2 active",
    ]
    for number in (signal.SIGTERM, signal.SIGKILL):
        restart(ctrport, number)
        eventually(in_order, what="the line after a restart")
    wait_open(node, 8080, "zz")
    node.kill(containers[line.pop(0)])
    wait_open(node, 8080, "mm")
    eventually(in_order, what="the line, moved up")
    ctrport.stop(signal.SIGKILL)
    node.kill(containers[line.pop(0)])
    ctrport.start()
    wait_open(node, 8080, "aa")
    eventually(in_order, what="the line, moved up while nobody looked")
    assert ctrport.messages.count("waiting container=default/kk ") == 4  # once a daemon, not at each step
