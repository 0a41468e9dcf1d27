"""Beside kube-proxy in IPVS mode: the addresses of Services are the node's own there, and nobody's to publish on."""

from __future__ import annotations

import pytest

from embedded.node import Node
from embedded.traffic import BOTH_FAMILIES, Reply, eventually, probe_tcp, serve
from tests.node.daemon import Ctrport, publish, wait_open

SERVICES = {4: "10.96.0.10", 6: "fd00:96::a"}


#: By backend: how what keeps mappings off the address of a Service is seen.
SEEN = {
    "iptables-nft": (("ip6tables-nft-save",), f"-A DOCKER -d {SERVICES[6]}/128 "),
    "nftables": (("nft", "list", "set", "ip6", "ctrport", "services"), f"{SERVICES[6]} "),
}


@pytest.mark.parametrize("backend", SEEN)
def test_the_address_of_a_service_is_never_answered(backend: str) -> None:
    with Node() as node:
        node.start_containerd()
        node.add_network("docker0", subnet6="fd00:17::/64")
        web = node.start("web")
        serve(web, 80, addresses=BOTH_FAMILIES)
        node.script("ip link add kube-ipvs0 type bridge; ip address add 10.96.0.10/32 dev kube-ipvs0")
        for service in SERVICES.values():
            via = node.address6 if ":" in service else node.address
            node.client.run("ip", "route", "add", service, "via", via)
        ctrport = Ctrport(node)
        mappings = (("{container: web}", "8080:80"), ("{container: web}", "10.96.0.10:8081:80"))
        ctrport.configure(publish(*mappings, settings=f"firewall: {{backend: {backend}}}"))
        ctrport.start()
        wait_open(node, 8080, "web")
        wait_open(node, 8080, "web", address=node.address6)
        assert not isinstance(probe_tcp(node.client, SERVICES[4], 8080, timeout=0.5), Reply)
        said = ctrport.publication("10.96.0.10:8081:80/tcp")
        assert (said["state"], said["reason"]) == ("waiting", "10.96.0.10 is not an address of this node")

        # One that comes later is left alone as soon as it is announced, and one that goes is the node's affair again.
        node.run("ip", "address", "add", f"{SERVICES[6]}/128", "dev", "kube-ipvs0", "nodad")
        command, rule = SEEN[backend]
        eventually(lambda: rule in node.run(*command).stdout, what="the RETURN of the service")
        assert not isinstance(probe_tcp(node.client, SERVICES[6], 8080, timeout=0.5), Reply)
        node.run("ip", "address", "delete", f"{SERVICES[6]}/128", "dev", "kube-ipvs0")
        eventually(lambda: rule not in node.run(*command).stdout, what="the RETURN being gone")
        assert ctrport.stop() == 0
        ctrport.run("clean")
        assert "ctrport" not in node.run("nft", "list", "ruleset").stdout
