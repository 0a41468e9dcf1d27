"""Host ports that are chosen: out of a pool, or out of the kernel's own range; and the same ones after a restart.

All share one node, whose containers run already when the daemon starts.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from embedded.container import Container
from embedded.node import Node
from embedded.traffic import Refused, Reply, probe_tcp, probe_udp, serve
from tests.node.daemon import Ctrport, Listener, publish

pytestmark = pytest.mark.node_of_many

SHOP = "{labels: {app: shop}}"
REMOVE = "firewall: {on_stop: remove}"
NOTHING = "nothing to change\n"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A node with the containers a and b."""
    with Node() as node:
        node.start_containerd()
        node.add_network("docker0")
        for name in ("a", "b"):
            started(node, name)
        yield node


@pytest.fixture
def ctrport(node: Node, ctrport: Ctrport) -> Iterator[Ctrport]:
    """ctrport on that node: none of its ports is there for the next to recover."""
    yield ctrport
    ctrport.close()
    if rules(node):
        ctrport.run("clean")


def started(node: Node, name: str) -> Container:
    """Start a container of the shop; it serves TCP and UDP on two ports."""
    container = node.start(name, labels={"app": "shop"})
    serve(container, 80, 81)
    return container


def to_choose_from(node: Node, ports: str, reserved: str = "") -> None:
    """Say from what ports the kernel takes those that a socket asks for, and which of them it keeps."""
    node.sysctl("net/ipv4/ip_local_port_range", ports)
    node.sysctl("net/ipv4/ip_local_reserved_ports", reserved)


def host_port(publication: dict[str, Any]) -> int:
    """Return the host port that a publication is said to have, the first where it has several."""
    return int(publication["bound"].split(":")[-2].split("-")[0])


def served(node: Node, ctrport: Ctrport, mapping: str, container: str, *, address: str | None = None) -> int:
    """See that a mapping is active, and answered where its status says; return that host port.

    At ``address`` by the node itself, else by the LAN.
    """
    port = host_port(ctrport.wait_for(mapping, "active", container))
    probe = probe_udp if mapping.endswith("/udp") else probe_tcp
    outcome = probe(node if address else node.client, address or node.address, port)
    assert isinstance(outcome, Reply), (mapping, port, outcome)
    assert (outcome.name, outcome.port) == (container, 80)
    return port


def bound(publications: Sequence[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """Return what host ports each mapping of each container has."""
    return {(each["container"], each["mapping"]): each["bound"] for each in publications}


def rules(node: Node) -> list[str]:
    """Return the rules of what is published, as they are saved, with their counters."""
    return [
        line
        for program in ("iptables-nft-save", "ip6tables-nft-save")
        for line in node.run(program, "-c").stdout.splitlines()
        if '"ctrport default/' in line
    ]


# Choosing


def test_each_container_has_a_port_of_the_pool_to_itself(node: Node, ctrport: Ctrport) -> None:
    pool = "8000-8003:80/tcp"
    short = started(node, "short")
    ctrport.configure(publish((SHOP, "8000-8003:80"), settings=REMOVE))
    with Listener(node, 8001):
        ctrport.start()
        ports = {name: served(node, ctrport, pool, name) for name in ("a", "b", "short")}
        assert sorted(ports.values()) == [8000, 8002, 8003]
        shown = ctrport.run("ps").stdout
        for name, port in ports.items():
            assert f"default/{name}" in shown
            assert f" {port}:80/tcp " in shown
        late = started(node, "late")
        said = ctrport.wait_for(pool, "conflict", "late")
        assert (said["reason"], said["bound"]) == ("every host port of 8000-8003/tcp is held", "")
        node.delete(short)
        assert served(node, ctrport, pool, "late") == ports["short"]
        assert {name: served(node, ctrport, pool, name) for name in ("a", "b")} == {n: ports[n] for n in ("a", "b")}
    node.delete(late)


def test_a_random_port_is_one_that_the_kernel_would_give_and_nobody_has(node: Node, ctrport: Ctrport) -> None:
    to_choose_from(node, "40000 40009", reserved="40000-40004,40008")
    short = started(node, "short")
    ctrport.configure(publish((SHOP, "80"), ("{container: a}", "80/udp"), settings=REMOVE))
    with Listener(node, 40006), Listener(node, 40005, kind=socket.SOCK_DGRAM):
        ctrport.start()
        ports = {name: served(node, ctrport, "80/tcp", name) for name in ("a", "b", "short")}
        assert sorted(ports.values()) == [40005, 40007, 40009]
        assert served(node, ctrport, "80/udp", "a") in {40006, 40007, 40009}
        late = started(node, "late")
        said = ctrport.wait_for("80/tcp", "conflict", "late")
        assert said["reason"] == "there is no free host port in 40005-40007, 40009"
        node.delete(short)
        assert served(node, ctrport, "80/tcp", "late") == ports["short"]
    node.delete(late)


@pytest.mark.parametrize("limit", [0, 1], ids=["nothing-reserved", "beyond-the-limit"])
def test_what_is_chosen_is_free_though_it_is_not_reserved(node: Node, ctrport: Ctrport, limit: int) -> None:
    to_choose_from(node, "40000 40001")
    entries = (("{container: a}", "8090:80"), ("{container: b}", "127.0.0.1::80"))
    ctrport.configure(publish(*entries, settings=f"firewall: {{reserve_limit: {limit}, on_stop: remove}}"))
    with Listener(node, 40000, address="127.0.0.1"):
        planned = ctrport.run("plan", "--config", str(ctrport.config), check=False).stdout
        assert " 127.0.0.1:40001:80/tcp of any " in planned
        assert "40000" not in planned
        ctrport.start()
        served(node, ctrport, "8090:80/tcp", "a")
        assert served(node, ctrport, "127.0.0.1::80/tcp", "b", address="127.0.0.1") == 40001
        assert ctrport.publication("127.0.0.1::80/tcp")["bound"] == "127.0.0.1:40001:80/tcp"
        assert isinstance(probe_tcp(node.client, node.address, 40001), Refused)
        with Listener(node, 40001, address="127.0.0.1"):
            pass  # which it could not have if the port was reserved


# The same again


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_recovers_the_ports_from_the_rules(node: Node, ctrport: Ctrport, number: signal.Signals) -> None:
    to_choose_from(node, "40000 40019")
    pool = "8000-8003:80/tcp"
    of_a = ("80", "80/udp", "127.0.0.1::80", "80-81")
    ctrport.configure(publish((SHOP, "8000-8003:80"), *(("{container: a}", mapping) for mapping in of_a)))
    # While these are there the choice falls on others than it would after the restart, were it made anew.
    with Listener(node, 8000), Listener(node, 40000), Listener(node, 40000, kind=socket.SOCK_DGRAM):
        ctrport.start()
        port = served(node, ctrport, pool, "a")
    before = bound(ctrport.status()["publications"])
    assert len(before) == 6
    assert all(before.values())
    assert not any(each.startswith(("8000:", "40000:")) for each in before.values())
    with node.client.socket() as client:
        client.settimeout(2)
        client.connect((node.address, port))
        hello = client.recv(100)
        rules_before = rules(node)
        assert any(not line.startswith("[0:0] ") for line in rules_before)
        ctrport.stop(number)
        ctrport.forget()
        seen = json.loads(ctrport.run("ps", "--json", "--config", str(ctrport.config)).stdout)
        assert bound(seen["publications"]) == before
        planned = ctrport.run("plan", "--config", str(ctrport.config), check=False)
        assert (planned.returncode, planned.stdout) == (0, NOTHING)
        ctrport.start()
        status = ctrport.status()
        assert bound(status["publications"]) == before
        assert status["transactions"] == 0
        assert rules(node) == rules_before
        client.sendall(b"still there?\n")
        assert client.recv(100) == hello
    assert served(node, ctrport, pool, "a") == port
    served(node, ctrport, "80/udp", "a")
    served(node, ctrport, "127.0.0.1::80/tcp", "a", address="127.0.0.1")
    for offset, first in enumerate([served(node, ctrport, "80-81/tcp", "a")] * 2):
        outcome = probe_tcp(node.client, node.address, first + offset)
        assert isinstance(outcome, Reply)
        assert outcome.port == 80 + offset


def test_a_recovered_port_is_kept_from_a_container_that_is_older(node: Node, ctrport: Ctrport) -> None:
    to_choose_from(node, "40000 40001")
    ctrport.configure(publish(("{container: b}", "8100-8101:80"), ("{container: b}", "80")))
    ctrport.start()
    assert served(node, ctrport, "8100-8101:80/tcp", "b") == 8100
    assert served(node, ctrport, "80/tcp", "b") == 40000
    ctrport.stop()
    ctrport.configure(publish((SHOP, "8100-8101:80"), (SHOP, "80")))
    ctrport.start()
    ports = [served(node, ctrport, mapping, name) for mapping in ("8100-8101:80/tcp", "80/tcp") for name in ("b", "a")]
    assert ports == [8100, 8101, 40000, 40001]
    planned = ctrport.run("plan", "--config", str(ctrport.config), check=False)
    assert (planned.returncode, planned.stdout) == (0, NOTHING)
