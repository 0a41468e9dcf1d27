"""Host ports stay reserved from one daemon to the next, by the sockets that systemd holds meanwhile.

All share one node and its containers, web with IPv4 alone and dual with IPv6 too; each test has a systemd of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ctrport.portsockets import OTHER_FILES
from embedded.container import Container
from embedded.host import end_process
from embedded.network import Network
from embedded.node import Node
from embedded.traffic import Reply, Server, probe_tcp, probe_udp
from embedded.wait import eventually
from tests.node.daemon import Ctrport, publish, wait_closed, wait_open
from tests.systemd import Systemd

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
WEB, DUAL = "{container: web}", "{container: dual}"
ANY4, ANY6 = "0.0.0.0", "::"

# Tries to have ports, again and again, in every way there is; says which it had, and how often it tried each.
_TAKER = """
import select, socket, sys
ports, had, tries = [int(port) for port in sys.argv[1:]], set(), 0
ways = [(f, k, o) for f in (socket.AF_INET, socket.AF_INET6) for k in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        for o in (None, socket.SO_REUSEADDR, socket.SO_REUSEPORT)]
print("begins", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    tries += 1
    for family, kind, option in ways:
        for port in ports:
            with socket.socket(family, kind) as one:
                if option is not None:
                    one.setsockopt(socket.SOL_SOCKET, option, 1)
                try:
                    one.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
                except OSError:
                    continue
                had.add(port)
print(tries, *sorted(had))
"""


class Taker:
    """Another process of the node, that tries to have ports until it is asked which it had."""

    def __init__(self, node: Node, *ports: int) -> None:
        argv = (sys.executable, "-I", "-S", "-c", _TAKER, *map(str, ports))
        self._process = node.spawn(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "begins\n"

    def __enter__(self) -> Taker:
        return self

    def __exit__(self, *exception: object) -> None:
        end_process(self._process)

    def had(self) -> tuple[int, set[int]]:
        """End it; return how often it tried, and which ports it had at least once."""
        out, _ = self._process.communicate("\n", timeout=5)
        tries, *ports = map(int, out.split())
        return tries, set(ports)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as node:
        node.start_containerd()
        node.add_network("docker0")
        node.add_network("dual0", subnet="172.18.0.0/16", subnet6="fd00:18::/64")
        started(node, "web")
        started(node, "dual", node.networks[1])
        yield node


@pytest.fixture
def ctrport(node: Node) -> Iterator[Ctrport]:
    ctrport = Ctrport(node)
    yield ctrport
    ctrport.close()


@pytest.fixture
def systemd(node: Node) -> Iterator[Systemd]:
    address = node.directory / "notify"
    with Systemd(address) as systemd:
        yield systemd
    address.unlink()


def started(node: Node, name: str, network: Network | None = None) -> Container:
    container = node.start(name, network=network or node.networks[0])
    for kind in (TCP, UDP):
        Server(container, range(80, 84), kind=kind)
    return container


def start(ctrport: Ctrport, systemd: Systemd, *behind: str) -> None:
    """Start the daemon with what systemd keeps for it."""
    handing_over, files = systemd.handover()
    before = ctrport.messages.count(" in-line ")  # one that was killed has left its status behind
    env = {"NOTIFY_SOCKET": str(systemd.address)}
    ctrport.start(wait=False, env=env, behind=(*handing_over, *behind), files=files)
    eventually(lambda: ctrport.messages.count(" in-line ") > before, what="the daemon being in line")
    eventually(ctrport.in_line, what="its status saying so")


def kept(systemd: Systemd, *cells: tuple[str, int, str]) -> bool:
    """Wait until these are what systemd keeps, and no others."""
    return eventually(lambda: systemd.cells == set(cells), what=f"{cells} being kept")


def can_bind(node: Node, port: int, kind: socket.SocketKind = TCP) -> bool:
    with node.socket(kind) as other:
        try:
            other.bind((ANY4, port))
        except OSError:
            return False
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nobody_gets_a_published_port_while_the_daemon_restarts(
    node: Node, ctrport: Ctrport, systemd: Systemd, number: signal.Signals
) -> None:
    short = started(node, "short", node.networks[1])
    ctrport.configure(
        publish(
            (DUAL, "8080:80"), (DUAL, "8080:80/udp"), (WEB, "8081:81/udp"), ("{container: short}", "8082-8083:82-83")
        )
    )
    start(ctrport, systemd)
    both = [("tcp", 8080, ANY4), ("tcp", 8080, ANY6), ("udp", 8080, ANY4), ("udp", 8080, ANY6), ("udp", 8081, ANY4)]
    brief = [("tcp", port, address) for port in (8082, 8083) for address in (ANY4, ANY6)]
    assert kept(systemd, *both, *brief)
    assert len(systemd.told("FDSTORE=1")) == 4  # a message a mapping
    with Taker(node, 8080) as taker:
        ctrport.stop(number)
        assert not can_bind(node, 8080)
        assert not can_bind(node, 8081, UDP)
        assert not can_bind(node, 8083)
        # It is served on, and the commands do not take systemd for another program that has the ports.
        assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)
        assert "conflict" not in ctrport.run("ps", "--config", str(ctrport.config)).stdout
        assert ctrport.run("plan", "--config", str(ctrport.config)).stdout == "nothing to change\n"
        start(ctrport, systemd)
        for mapping in ("8080:80/tcp", "8080:80/udp", "8081:81/udp", "8082-8083:82-83/tcp"):
            assert ctrport.wait_for(mapping, "active")["reason"] == ""
        tries, had = taker.had()
    assert had == set()
    assert tries > 100
    assert " kept=9\n" in ctrport.messages
    assert kept(systemd, *both, *brief)
    assert len(systemd.told("FDSTORE=1")) == 4
    assert isinstance(probe_udp(node.client, node.address, 8081), Reply)
    # Let go when its container ends, by both.
    node.delete(short)
    assert kept(systemd, *both)
    eventually(lambda: can_bind(node, 8083), what="the port being free")
    assert not can_bind(node, 8080)


def test_the_port_of_a_container_that_ended_meanwhile_is_let_go(node: Node, ctrport: Ctrport, systemd: Systemd) -> None:
    short = started(node, "short")
    ctrport.configure(publish((WEB, "8080:80"), ("{container: short}", "8081:80"), (DUAL, "8082:80")))
    start(ctrport, systemd)
    dual = [("tcp", 8082, ANY4), ("tcp", 8082, ANY6)]
    assert kept(systemd, ("tcp", 8080, ANY4), ("tcp", 8081, ANY4), *dual)
    ctrport.stop(signal.SIGKILL)
    node.delete(short)
    # Nor does who is to have other ports by now keep the old ones.
    ctrport.configure(publish((WEB, "127.0.0.1:8080:80"), ("{container: short}", "8081:80"), (DUAL, "8083:80")))
    assert not can_bind(node, 8081)
    start(ctrport, systemd)
    ctrport.wait_for("127.0.0.1:8080:80/tcp", "active")
    assert kept(systemd, ("tcp", 8080, "127.0.0.1"), ("tcp", 8083, ANY4), ("tcp", 8083, ANY6))
    eventually(lambda: can_bind(node, 8081) and can_bind(node, 8082), what="the ports being free")
    wait_closed(node, 8082)
    assert not can_bind(node, 8080)


def test_garbage_stops_nothing(node: Node, ctrport: Ctrport, systemd: Systemd) -> None:
    ctrport.configure(publish((WEB, "8080:80")))
    with contextlib.ExitStack() as opened:
        for file in os.pipe():
            opened.callback(os.close, file)
            systemd.put("pipe", file)
        server = opened.enter_context(node.socket())
        server.bind((ANY4, 8080))
        server.listen()
        systemd.put("tcp-8080", server.fileno())
        file = os.open("/dev/null", os.O_RDONLY)
        opened.callback(os.close, file)
        systemd.put("null", file)
    assert not can_bind(node, 8080)
    start(ctrport, systemd)
    assert ctrport.wait_for("8080:80/tcp", "active")["reason"] == ""
    assert kept(systemd, ("tcp", 8080, ANY4))
    wait_open(node, 8080, "web")
    assert " kept=0\n" in ctrport.messages


def test_with_on_stop_remove_the_sockets_go_with_the_rules(node: Node, ctrport: Ctrport, systemd: Systemd) -> None:
    ctrport.configure(publish((WEB, "8080:80"), (DUAL, "8081:80"), settings="firewall: {on_stop: remove}"))
    start(ctrport, systemd)
    assert kept(systemd, ("tcp", 8080, ANY4), ("tcp", 8081, ANY4), ("tcp", 8081, ANY6))
    assert ctrport.stop() == 0
    assert kept(systemd)
    assert can_bind(node, 8080)
    assert can_bind(node, 8081)


def test_no_more_is_kept_than_the_daemon_can_be_started_with(node: Node, ctrport: Ctrport, systemd: Systemd) -> None:
    usual, units = "--nofile=1024:20000", "--nofile=16384:20000"
    ctrport.configure(publish((DUAL, "10000-10599:80-679")))
    start(ctrport, systemd, "prlimit", usual)
    eventually(lambda: len(systemd.names) == 1024 - OTHER_FILES, what="as many sockets being kept as fit")
    ctrport.stop(signal.SIGKILL)
    start(ctrport, systemd, "prlimit", usual)
    assert ctrport.wait_for("10000-10599:80-679/tcp", "active")["reason"] == ""
    assert f" kept={1024 - OTHER_FILES}\n" in ctrport.messages
    ctrport.stop()
    systemd.drop()
    systemd.messages.clear()
    start(ctrport, systemd, "prlimit", units)
    eventually(lambda: len(systemd.names) == 1200, what="all sockets being kept")
    assert len(systemd.told("FDSTORE=1")) == 5
    ctrport.stop(signal.SIGKILL)
    start(ctrport, systemd, "prlimit", units)
    assert ctrport.wait_for("10000-10599:80-679/tcp", "active")["reason"] == ""
    assert " kept=1200\n" in ctrport.messages
