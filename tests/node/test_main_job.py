"""The main job: a container starts and its port works; it ends and the port is closed."""

from __future__ import annotations

from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, eventually, probe_tcp
from tests.node.daemon import Ctrport


def test_a_port_is_open_while_its_container_runs(node: Node, ctrport: Ctrport) -> None:
    before = node.tables()
    ctrport.configure('publish:\n  - match: {container: web}\n    ports: ["8080:80"]\n')
    ctrport.start()
    assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)
    web = node.start("web")
    with Server(web, 80, name="web"):
        reply = eventually(lambda: probe_tcp(node.client, node.address, 8080), what="the port being open")
        assert isinstance(reply, Reply)
        assert (reply.name, reply.peer) == ("web", node.client_address)
    node.delete(web)
    eventually(lambda: isinstance(probe_tcp(node.client, node.address, 8080), Refused), what="the port being closed")
    assert ctrport.stop() == 0
    ctrport.run("clean")
    assert node.tables() == before
