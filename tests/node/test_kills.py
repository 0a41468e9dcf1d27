"""Faults that tests/node/test_lifecycle.py has not: the daemon killed in the midst, events lost, a storm of them.

`make kills` does the first of these 200 times.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage

from ctrport.api import events_pb2, events_pb2_grpc, payloads_pb2
from embedded.node import Node
from embedded.traffic import Reply, Server, eventually, probe_tcp
from tests.faults.kills import tried
from tests.node.daemon import Ctrport, publish, wait_closed, wait_open

KILLS, SEED = 6, 6
PORTS = {"web": 8080, "moved": 8081, "ended": 8082, "new": 8083}


def config(ports: dict[str, int]) -> str:
    return publish(*((f"{{container: {name}}}", f"{port}:80") for name, port in ports.items()))


def test_whenever_it_is_killed_the_next_one_makes_the_tables_right() -> None:
    report = tried(KILLS, SEED)
    print(report)
    assert report.moments.total() >= KILLS
    assert report.left["behind"] + report.left["half written"] > 0, "no kill came when there was something to do"
    assert report.kept > 0


# containerd


def test_what_changed_while_it_was_disconnected_is_made_good(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(config(PORTS))
    ctrport.start()
    before = {name: node.start(name) for name in ("web", "moved", "ended")}
    for name, container in before.items():
        Server(container, 80)
        wait_open(node, PORTS[name], name)
    with ctrport.frozen():
        # Its connection ends with this containerd, and nothing subscribes to the events of the next one.
        node.kill_containerd()
        node.start_containerd()
        for name in ("moved", "ended"):
            node.delete(before[name])
        for name in ("new", "moved"):
            Server(node.start(name), 80, name=f"{name} again".replace(" ", "-"))
        assert isinstance(probe_tcp(node.client, node.address, PORTS["web"]), Reply)
    wait_open(node, PORTS["moved"], "moved-again")
    wait_open(node, PORTS["new"], "new-again")
    wait_open(node, PORTS["web"], "web")
    wait_closed(node, PORTS["ended"])
    eventually(ctrport.in_line, what="the daemon being in line again")
    for name in ("moved", "ended"):
        assert f"{before[name].address}:" not in node.tables()
    assert ctrport.run("plan", "--config", str(ctrport.config)).stdout == "nothing to change\n"


def test_a_socket_that_is_removed_and_made_anew_is_followed(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(config(PORTS))
    ctrport.start()
    web, ended = node.start("web"), node.start("ended")
    for container in (web, ended):
        Server(container, 80)
        wait_open(node, PORTS[container.id], container.id)
    node.run("rm", node.containerd_socket)
    # A connection outlives the name of its socket, and goes on telling what happens.
    ended.end()
    wait_closed(node, PORTS["ended"])
    node.kill_containerd()
    eventually(lambda: "waiting for it" in ctrport.messages, what="the daemon waiting for containerd")
    assert "No such file or directory" in ctrport.messages
    wait_open(node, PORTS["web"], "web")
    node.start_containerd()
    Server(node.start("new"), 80)
    wait_open(node, PORTS["new"], "new")
    wait_open(node, PORTS["web"], "web")
    assert ctrport.messages.count("rules stay as they are") == 1
    assert "Traceback" not in ctrport.messages


# A storm

EVENTS, CONTAINERS = 1000, 30
STORM = {f"storm-{number}": 9000 + number for number in range(CONTAINERS)}


@contextlib.contextmanager
def publisher(node: Node) -> Iterator[events_pb2_grpc.EventsStub]:
    address = f"unix:{node.path(node.containerd_socket)}"
    with grpc.insecure_channel(address, (("grpc.default_authority", "localhost"),)) as channel:
        yield events_pb2_grpc.EventsStub(channel)  # type: ignore[no-untyped-call]


def told(stub: events_pb2_grpc.EventsStub, topic: str, payload: payloads_pb2.TaskExit) -> None:
    event = AnyMessage(type_url=payload.DESCRIPTOR.full_name, value=payload.SerializeToString())
    request = events_pb2.PublishRequest(topic=topic, event=event)
    stub.Publish(request, timeout=5, metadata=(("containerd-namespace", "default"),))


def test_a_storm_of_events_is_a_few_transactions(node: Node, ctrport: Ctrport) -> None:
    """1000 events in a burst, spread by containerd as any: each wrongly says that a container exited.

    In the midst of it 15 containers really exit and 8 start, whose events are among them.
    """
    names = list(STORM)
    ended, stay, come = names[:15], names[15:22], names[22:]
    ctrport.configure(config(STORM) + '  - match: {container: marker}\n    ports: ["9100:80"]\n')
    ctrport.start()
    with ThreadPoolExecutor(8) as pool, publisher(node) as stub:
        containers = dict(zip(ended + stay, pool.map(node.start, ended + stay), strict=True))
        for name in stay:
            Server(containers[name], 80)
        eventually(lambda: active(ctrport) == {*ended, *stay}, within=20, what="all being published")
        before = ctrport.status()
        starting = pool.map(node.start, come)
        ending = pool.map(lambda name: containers[name].end(), ended)
        began = time.monotonic()
        for name, _ in zip(itertools.cycle(ended + stay), range(EVENTS), strict=False):
            told(stub, "/tasks/exit", payloads_pb2.TaskExit(container_id=name, id=name))
        burst = time.monotonic() - began
        assert len([*ending, *starting]) == len(ended) + len(come)
        over = time.monotonic()
        eventually(lambda: active(ctrport) == {*stay, *come}, within=5, what="all being as it is")
        took = time.monotonic() - over
    # What changes nothing is not written down; events come in their order, and so this one is the last.
    marker = node.start("marker")
    eventually(lambda: marker.id in active(ctrport), what="the daemon having seen all events")
    after = ctrport.status()
    events, transactions = (after[what] - before[what] for what in ("events", "transactions"))
    print(f"{EVENTS} events in {burst:.2f} s, all published {took:.2f} s after the last container came")
    print(f"{events} events, {transactions} transactions")
    assert events >= EVENTS + len(ended) + len(come)
    assert transactions < 20
    for name in stay:
        wait_open(node, STORM[name], name)
    for name in ended[:3]:
        wait_closed(node, STORM[name])
    assert ctrport.run("plan", "--config", str(ctrport.config)).stdout == "nothing to change\n"


def active(ctrport: Ctrport) -> set[str]:
    return {p["container"] for p in ctrport.status()["publications"] if p["state"] == "active"}
