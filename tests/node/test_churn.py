"""Many containers at once: all converge, none wrong, and a burst is a few transactions."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ctrport.reconcile import BURST, INTERVAL
from embedded.container import Container
from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, eventually, probe_tcp
from tests.node.daemon import Ctrport

MANY = 50
NAMESPACES = ("default", "shop", "k8s.io", "team-a", "team-b")
T = TypeVar("T")


def at_once(work: Callable[[T], object], items: Iterable[T]) -> list[object]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(work, items))


def config(*names: str) -> str:
    lines = ["publish:"]
    for first, name in zip((20000, 21000), names, strict=False):
        for number in range(MANY):
            lines.append(f"  - match: {{namespace: {NAMESPACES[number % 5]}, container: {name}-{number}}}")
            lines.append(f'    ports: ["{first + number}:80"]')
    return "\n".join(lines) + "\n"


def test_fifty_start_and_fifty_die_at_once(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(config("old", "new"))
    ctrport.start()
    containers: dict[str, Container] = {}

    def start(name: str) -> None:
        namespace = NAMESPACES[int(name.split("-")[1]) % 5]
        containers[name] = node.start(name, namespace=namespace)
        Server(containers[name], 80, name=name)

    def kill(name: str) -> None:
        node.kill(containers[name])

    old, new = ([f"{name}-{number}" for number in range(MANY)] for name in ("old", "new"))
    at_once(start, old)
    eventually(lambda: active(ctrport) == set(old), within=20, what="all of the old being active")
    before, began = ctrport.status(), time.monotonic()
    steps: list[tuple[Callable[[str], None], str]] = []
    for dying, coming in zip(old, new, strict=True):
        steps += [(kill, dying), (start, coming)]
    at_once(lambda step: step[0](step[1]), steps)
    eventually(lambda: active(ctrport) == set(new), within=30, what="the new being active and the old gone")
    for number, name in enumerate(new):
        reply = probe_tcp(node.client, node.address, 21000 + number)
        assert isinstance(reply, Reply), f"{name}: {reply}"
        assert reply.name == name
        assert isinstance(probe_tcp(node.client, node.address, 20000 + number), Refused)
    after = ctrport.status()
    events, transactions = (after[what] - before[what] for what in ("events", "transactions"))
    assert events >= 2 * MANY  # 50 starts and 50 exits at the least
    # It took some seconds to start them all; in each, no more than the pace allows.
    allowed = BURST + (time.monotonic() - began) / INTERVAL
    assert transactions <= min(allowed, events * 0.75), f"{transactions} transactions for {events} events"
    wanted = {str(containers[name].address) for name in new}
    tables = node.tables()
    assert set(re.findall(r"--to-destination ([0-9.]+):80", tables)) == wanted
    print(f"{events} events, {transactions} transactions")


def active(ctrport: Ctrport) -> set[str]:
    return {p["container"] for p in ctrport.status()["publications"] if p["state"] == "active"}


def test_a_burst_of_events_is_one_transaction(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(config("web"))
    ctrport.start()
    with ctrport.frozen():
        # What comes while it cannot look is there all together when it can.
        for number in range(10):
            node.start(f"web-{number}", namespace=NAMESPACES[number % 5])
    eventually(lambda: len(active(ctrport)) == 10, what="all ten being active")
    before = ctrport.status()
    with ctrport.frozen():
        at_once(lambda number: node.start(f"web-{number}", namespace=NAMESPACES[number % 5]), range(10, MANY))
    eventually(lambda: len(active(ctrport)) == MANY, within=20, what="all being active")
    after = ctrport.status()
    assert after["events"] - before["events"] >= MANY - 10
    assert after["transactions"] - before["transactions"] <= 5
