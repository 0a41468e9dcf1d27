"""firewall.backend changes under a running daemon: what is published stays open, and what was written before goes."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator

import pytest

from embedded.node import Node
from embedded.traffic import Reply, Server, eventually, probe_tcp
from tests.node.daemon import Ctrport, wait_closed, wait_open

PUBLISH = """
firewall: {backend: %s}
publish:
  - match: {container: web}
    ports: ["8080:80", "9000-9003:9000-9003", "9100-9101:9001-9002", "91"]
"""
#: By the policy of FORWARD in nft tables: what follows what. Legacy tables have no say where that drops.
TURNS = {
    "ACCEPT": ("iptables-nft", "nftables", "iptables-legacy", "nftables", "iptables-nft"),
    "DROP": ("iptables-nft", "nftables", "iptables-nft"),
}


class Caller:
    """Opens connections from the LAN, one after the other, and notes each that fails."""

    def __init__(self, node: Node, ports: tuple[int, ...]) -> None:
        self.failed: list[object] = []
        self.opened = 0
        self._node = node
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._call, args=(ports,))

    def _call(self, ports: tuple[int, ...]) -> None:
        places = itertools.cycle(itertools.product(ports, (self._node.address, self._node.address6)))
        while not self._end.is_set():
            port, address = next(places)
            outcome = probe_tcp(self._node.client, address, port, timeout=3)
            self.opened += 1
            if not isinstance(outcome, Reply):
                self.failed.append((port, address, outcome))

    def __enter__(self) -> Caller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def tagged(node: Node, backend: str, lock: dict[str, str]) -> int:
    """How many rules, or elements, with our mark there are where that backend keeps them."""
    if backend == "nftables":
        texts = [node.run("nft", "list", "table", family, "ctrport", check=False).stdout for family in ("ip", "ip6")]
        return sum(text.count('comment "ctrport ') for text in texts)
    programs = [f"{name}-{backend.partition('-')[2]}-save" for name in ("iptables", "ip6tables")]
    texts = [node.run(program, env=lock).stdout for program in programs]
    # But for the one by which FORWARD lets through what our own table has accepted.
    return sum(text.count('comment "ctrport ') - text.count('comment "ctrport nftables ') for text in texts)


@pytest.fixture(params=TURNS)
def policy(request: pytest.FixtureRequest, node: Node) -> str:
    for program in ("iptables-nft", "ip6tables-nft"):
        node.run(program, "-P", "FORWARD", request.param)
    return str(request.param)


@pytest.fixture
def ctrport(node: Node) -> Iterator[Ctrport]:
    ctrport = Ctrport(node)
    yield ctrport
    ctrport.close()
    ctrport.run("clean")


def configure(ctrport: Ctrport, backend: str) -> None:
    """As an editor does: written beside it, and renamed into place."""
    new = ctrport.config.with_suffix(".new")
    new.write_text(PUBLISH % backend)
    new.rename(ctrport.config)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as node:
        node.start_containerd()
        node.add_network("docker0", subnet6="fd00:17::/64", ip_masq=False)
        web = node.start("web")
        for address in ("0.0.0.0", "::"):
            Server(web, [80, 91, *range(9000, 9004)], address=address)
        yield node


def test_no_port_is_dark_while_the_backend_changes_and_nothing_is_left_of_the_one_before(
    node: Node, ctrport: Ctrport, policy: str
) -> None:
    lock, turns = {"XTABLES_LOCKFILE": str(node.directory / "xtables.lock")}, TURNS[policy]
    configure(ctrport, turns[0])
    ctrport.start(env=lock)
    chosen = int(str(ctrport.publication("91/tcp")["bound"]).partition(":")[0])
    ports = (8080, 9002, 9101, chosen)
    for port in ports:
        wait_open(node, port, "web")
        wait_open(node, port, "web", address=node.address6)
    with contextlib.ExitStack() as opened:
        lives = opened.enter_context(node.client.socket())
        lives.settimeout(3)
        lives.connect((node.address, 8080))
        caller = opened.enter_context(Caller(node, ports))
        for turn, (before, after) in enumerate(itertools.pairwise(turns), 1):
            opened_before = caller.opened
            configure(ctrport, after)
            done = f"what another firewall.backend had written is deleted ({before})\n"
            eventually(
                lambda turn=turn: ctrport.messages.count("the configuration was read anew") == turn,  # type: ignore[misc]
                what=f"the change from {before} to {after}",
            )
            assert ctrport.messages.rpartition(f"backend {after}: ")[2].count(done) == 2  # in each family
            assert tagged(node, before, lock) == 0
            assert tagged(node, after, lock) > 0
            # Some go through what is there now alone.
            eventually(lambda at=opened_before: caller.opened > at + 20, what="calls")  # type: ignore[misc]
            lives.sendall(b"are you there?\n")
            assert lives.recv(200)
            assert ctrport.publication("91/tcp")["bound"] == f"{chosen}:91/tcp"
            said = ctrport.run("plan", "--config", str(ctrport.config), env=lock)
            assert said.stdout == "nothing to change\n"
        assert caller.failed == []
        assert caller.opened > 100
    assert "drift" not in ctrport.messages
    ctrport.stop()
    assert ctrport.run("clean", env=lock).stdout == "every rule of ctrport is removed\n"
    wait_closed(node, 8080)
    assert not any(tagged(node, backend, lock) for backend in set(turns))


def test_a_daemon_that_starts_with_another_backend_takes_over(node: Node, ctrport: Ctrport, policy: str) -> None:
    configure(ctrport, "iptables-nft")
    ctrport.start()
    chosen = ctrport.publication("91/tcp")["bound"]
    with Caller(node, (8080, 9002, 9101)) as caller:
        for backend, before in (("nftables", "iptables-nft"), ("iptables-nft", "nftables")):
            ctrport.stop()
            configure(ctrport, backend)
            ctrport.start()
            assert ctrport.publication("91/tcp")["bound"] == chosen
            eventually(lambda its=before: tagged(node, its, dict(os.environ)) == 0, what="it")  # type: ignore[misc]
    assert caller.failed == []
    assert caller.opened > 20
