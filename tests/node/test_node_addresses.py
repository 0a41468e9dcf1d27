"""An address that comes to the node while the daemon runs, as one that fails over from another node does."""

from __future__ import annotations

from embedded.node import Node
from embedded.traffic import Reply, Server, eventually, probe_tcp
from tests.node.daemon import Ctrport


def test_a_port_is_open_on_a_new_address_at_once(node: Node, ctrport: Ctrport) -> None:
    node.run("iptables-nft", "-P", "FORWARD", "DROP")
    ctrport.configure('publish:\n  - match: {container: web}\n    ports: ["8080:80"]\n')
    web = node.start("web")
    ctrport.start()
    with Server(web, 80, name="web"):
        node.add_address("198.51.100.77")
        # Well below the tick: it is the kernel's announcement that counts.
        within = 3.0
        reply = eventually(
            lambda: probe_tcp(node.client, "198.51.100.77", 8080, timeout=0.3), within=within, what="the new address"
        )
        assert isinstance(reply, Reply)
        node.run("ip", "address", "delete", "198.51.100.77/24", "dev", "eth0")
        eventually(
            lambda: "198.51.100.77" not in node.tables(), within=within, what="no rule being left for the old address"
        )
