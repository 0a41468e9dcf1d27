"""What the node tests share: a node of their own each, torn down whatever happens."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ctrport.hostports import Reservations
from embedded.host import Host
from embedded.node import Node, missing
from tests.node.daemon import Ctrport
from tests.node.ports import Room


@pytest.fixture(scope="session", autouse=True)
def able() -> None:
    """Skip where no node can be made, but never in CI: there a skipped node test would pass for a passed one."""
    reason = missing()
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def pytest_configure(config: pytest.Config) -> None:
    for mark in (
        "docker0(**options): how the fixture node adds the network docker0",
        "node_of_many: the tests of the module share its fixture node",
    ):
        config.addinivalue_line("markers", mark)


@pytest.fixture
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    """A node with containerd started and the network docker0, as the mark of that name has it."""
    mark = request.node.get_closest_marker("docker0")
    with Node() as node:
        node.sysctl("net/ipv4/icmp_ratelimit", 0)  # or a client is told only once a second that a UDP port is closed
        node.start_containerd()
        node.add_network("docker0", **(mark.kwargs if mark else {}))
        yield node


@pytest.fixture
def ctrport(request: pytest.FixtureRequest, node: Node) -> Iterator[Ctrport]:
    """ctrport on that node, not started yet. On a node of many tests it is ended, else it goes with the node."""
    ctrport = Ctrport(node)
    yield ctrport
    if request.node.get_closest_marker("node_of_many") is not None:
        ctrport.close()


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A host that a module's tests share, without containers: it has two addresses of its own more."""
    with Host("node") as host:
        host.script("ip address add 10.1.2.3/32 dev lo; ip address add 2001:db8::1/128 dev lo nodad")
        host.sysctl("net/ipv4/icmp_ratelimit", 0)
        yield host


@pytest.fixture
def room(host: Host) -> Iterator[Room]:
    """Reservations on that host, of which none is left."""
    reservations = Reservations(2000)
    yield Room(host, reservations)
    reservations.close()
    assert len(reservations) == 0
