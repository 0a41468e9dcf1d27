"""What the node tests share: a node of their own each, torn down whatever happens."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from embedded.node import Node, missing
from tests.node.daemon import Ctrport


@pytest.fixture(scope="session", autouse=True)
def able() -> None:
    """Skip where no node can be made, but never in CI: there a skipped node test would pass for a passed one."""
    reason = missing()
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def node() -> Iterator[Node]:
    """A node with containerd started and the network docker0."""
    with Node() as node:
        node.start_containerd()
        node.add_network("docker0")
        yield node


@pytest.fixture
def ctrport(node: Node) -> Ctrport:
    """ctrport on that node, not started yet."""
    return Ctrport(node)
