"""What is said of containers that cannot be reached, and what becomes of them once they can."""

from __future__ import annotations

import pytest

from embedded.container import Container
from embedded.host import Place
from embedded.node import Node
from embedded.traffic import Refused, Server, eventually, probe_tcp
from tests.node.daemon import OFTEN, Ctrport, publish, wait_open

WEB = publish(("{container: web}", "8080:80"))
MAPPING = "8080:80/tcp"

#: Seconds in which everything that sends no event is noticed: the daemon looks every 10 s.
TICK = 15.0


def plug_in(container: Container, address: str, *, gateway: str | None = None) -> None:
    """Give a container's eth0 an address, and switch it on."""
    container.run("ip", "address", "add", address, "dev", "eth0")
    container.run("ip", "link", "set", "eth0", "up")
    if gateway is not None:
        container.run("ip", "route", "add", "default", "via", gateway)


def veth(node: Node, container: Container) -> None:
    """Connect a container to the node: eth0 inside, its other end veth1 outside."""
    link = f"link add veth1 type veth peer name eth0 netns {container.pid}"
    node.run("ip", *link.split())


def veth_of_another_host(node: Node, container: Container) -> None:
    """Connect a container to the LAN client, past the node."""
    veth(node, container)
    # The client's namespace is named by a pid of the outside.
    Place(node.name, node.pid, ["net"]).run("ip", "link", "set", "veth1", "netns", str(node.client.pid))


def in_vain(node: Node, ctrport: Ctrport, state: str) -> str:
    """Start the daemon; return the reason why the mapping is not active, after a check that it does nothing either."""
    ctrport.configure(WEB)
    ctrport.start()
    said = ctrport.wait_for(MAPPING, state, "web", within=3)
    assert said["addresses"] == []
    assert f"{state} container=default/web mapping={MAPPING} source={ctrport.config}:" in ctrport.messages
    assert said["reason"] in ctrport.messages
    tables = node.tables()
    assert "DNAT --to" not in tables
    assert "8080" not in tables
    localnet = node.script("cd /proc/sys/net/ipv4/conf; grep -l 1 */route_localnet || true")
    assert localnet == ""
    assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)
    assert ctrport.status()["transactions"] == 2  # what stands without any mapping, in each family
    return str(said["reason"])


def test_a_declaration_that_matches_nothing_waits(node: Node, ctrport: Ctrport) -> None:
    node.start("other")
    ctrport.configure(
        publish(("{container: web}", "8080:80"), ('{namespace: "k8s*", labels: {app: shop, tier: front}}', "8081:80"))
    )
    ctrport.start()
    assert ctrport.wait_for(MAPPING, "waiting")["reason"] == "no running container matches container=web"
    said = ctrport.wait_for("8081:80/tcp", "waiting")
    assert said["reason"] == "no running container matches namespace=k8s*, label app=shop, label tier=front"
    assert (said["container"], said["namespace"], said["source"]) == ("", "", f"{ctrport.config}:5")


def test_a_container_on_the_hosts_network_needs_no_mapping(node: Node, ctrport: Ctrport) -> None:
    node.start("web", network="host")
    reason = in_vain(node, ctrport, "unsupported")
    assert reason == "it is on the host's network: its ports are the node's own, and need no mapping"


def test_a_container_with_loopback_alone_is_to_be_started_with_cni(node: Node, ctrport: Ctrport) -> None:
    node.start("web", network=None)
    reason = in_vain(node, ctrport, "waiting")
    assert reason == "it has only a loopback address: start it with `ctr run --cni`"


def test_a_container_that_the_host_reaches_through_a_gateway_only(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web", network=None)
    veth_of_another_host(node, web)
    plug_in(web, "10.9.0.2/24", gateway="10.9.0.1")
    reason = in_vain(node, ctrport, "waiting")
    gateway = f"only through the gateway {node.client_address}"
    assert reason == f"the host reaches 10.9.0.2 {gateway}: it is not on one of its own networks"


def test_a_container_that_the_host_has_no_route_to(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web", network=None)
    veth(node, web)
    plug_in(web, "10.9.0.2/24", gateway="10.9.0.1")
    node.run("ip", "route", "delete", "default")
    assert in_vain(node, ctrport, "waiting") == "the host has no route to 10.9.0.2"


def test_a_container_whose_address_the_host_is_told_to_refuse(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web")
    node.run("ip", "route", "add", "blackhole", f"{web.address}/32")
    reason = in_vain(node, ctrport, "waiting")
    assert reason in (
        f"the host has no route to {web.address}",
        f"the host reaches {web.address} by no device of its own: it is not on one of its own networks",
    )


def test_a_container_of_another_host_with_an_address_of_ours(node: Node, ctrport: Ctrport) -> None:
    # The route leads to docker0, where it is not: a rule would send its port to nobody, or to whom it concerns less.
    node.start("sibling")
    web = node.start("web", network=None)
    veth_of_another_host(node, web)
    plug_in(web, "172.17.5.5/16", gateway="172.17.0.1")
    assert in_vain(node, ctrport, "unsupported") == "the other end of its eth0 is not on this host"


def test_a_container_with_an_address_of_another_ones_network(node: Node, ctrport: Ctrport) -> None:
    node.start("sibling")
    web = node.start("web", network=None)
    veth(node, web)
    node.run("ip", "link", "set", "veth1", "up")
    plug_in(web, "172.17.5.5/16", gateway="172.17.0.1")
    reason = in_vain(node, ctrport, "unsupported")
    assert reason == "the host reaches 172.17.5.5 through docker0, which is not the container's own device"


def test_a_container_with_the_nodes_own_address(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web", network=None)
    veth(node, web)
    plug_in(web, f"{node.address}/24")
    assert in_vain(node, ctrport, "unsupported") == f"{node.address} is an address of the node itself"


def test_nothing_is_set_on_the_uplink_for_a_macvlan(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web", network=None)
    uplink = 'ip link add macvlan0 link eth0 type macvlan mode bridge; ip link set macvlan0 netns "$1" name eth0'
    node.script(uplink, str(web.pid))
    plug_in(web, "198.51.100.50/24", gateway=node.client_address)
    server = Server(web, 80)
    assert probe_tcp(node.client, "198.51.100.50", 80)  # it is on the LAN by itself
    assert in_vain(node, ctrport, "unsupported") == "its eth0 is a macvlan device: only veth can be done"
    assert "eth0" not in node.tables()
    assert probe_tcp(node.client, "198.51.100.50", 80)
    server.close()


@pytest.mark.parametrize("kind", ["bridge", "vxlan"])
def test_a_container_with_a_device_of_another_kind(node: Node, ctrport: Ctrport, kind: str) -> None:
    web = node.start("web", network=None)
    more = ["id", "7", "dstport", "4789"] if kind == "vxlan" else []
    web.run("ip", "link", "add", "eth0", "type", kind, *more)
    plug_in(web, "10.9.0.2/24")
    node.run("ip", "route", "add", "10.9.0.0/24", "dev", "eth0")
    assert in_vain(node, ctrport, "unsupported") == f"its eth0 is a {kind} device: only veth can be done"


def test_one_that_cannot_be_reached_keeps_nobody_out(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(publish(('{container: "web*"}', "8080:80")))
    ctrport.start()
    node.start("web1", network=None)
    node.start("web2", network="host")
    Server(node.start("web3"), 80)
    wait_open(node, 8080, "web3")
    ctrport.wait_for(MAPPING, "waiting", "web1")
    ctrport.wait_for(MAPPING, "unsupported", "web2")
    ctrport.wait_for(MAPPING, "active", "web3")


def test_a_container_behind_a_veth_of_its_own_is_published(node: Node, ctrport: Ctrport) -> None:
    # Built by hand, to show that the cases above are refused for their one fault and not for being odd.
    web = node.start("web", network=None)
    veth(node, web)
    node.script("ip address add 10.9.0.1/24 dev veth1; ip link set veth1 up")
    plug_in(web, "10.9.0.2/24", gateway="10.9.0.1")
    Server(web, 80)
    ctrport.configure(WEB)
    ctrport.start()
    wait_open(node, 8080, "web")
    assert ctrport.wait_for(MAPPING, "active")["addresses"] == ["10.9.0.2"]


# What heals without an event, by the tick


def test_a_container_that_gets_its_network_later_is_published_then(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web", network=None)
    Server(web, 80)
    ctrport.configure(WEB)
    ctrport.start(tick=OFTEN)
    ctrport.wait_for(MAPPING, "waiting", "web")
    veth(node, web)
    node.script("ip address add 10.9.0.1/24 dev veth1; ip link set veth1 up")
    plug_in(web, "10.9.0.2/24", gateway="10.9.0.1")
    ctrport.wait_for(MAPPING, "active", "web", within=TICK)
    wait_open(node, 8080, "web")


def test_a_node_that_does_not_forward_is_waited_for(node: Node, ctrport: Ctrport) -> None:
    Server(node.start("web"), 80)
    node.sysctl("net/ipv4/ip_forward", 0)  # after the start: CNI switches it on
    reason = in_vain(node, ctrport, "waiting")
    assert reason == "the node does not forward IPv4: sysctl -w net.ipv4.ip_forward=1"
    node.run("sysctl", "-w", "net.ipv4.ip_forward=1")
    ctrport.wait_for(MAPPING, "active", "web", within=TICK)
    wait_open(node, 8080, "web")


def test_a_host_address_that_the_node_has_not_is_waited_for(node: Node, ctrport: Ctrport) -> None:
    floating = "198.51.100.9"
    Server(node.start("web"), 80)
    ctrport.configure(publish(("{container: web}", f"{floating}:8080:80")))
    ctrport.start()
    mapping = f"{floating}:8080:80/tcp"
    assert ctrport.wait_for(mapping, "waiting")["reason"] == f"{floating} is not an address of this node"
    assert "DNAT --to" not in node.tables()
    node.add_address(floating)
    ctrport.wait_for(mapping, "active", within=TICK)
    wait_open(node, 8080, "web", address=floating)
    assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)


def test_a_mapping_on_any_address_is_served_on_one_that_the_node_gets_later(node: Node, ctrport: Ctrport) -> None:
    floating = "198.51.100.9"
    Server(node.start("web"), 80)
    ctrport.configure(WEB)
    ctrport.start()
    wait_open(node, 8080, "web")
    node.add_address(floating)
    eventually(
        lambda: probe_tcp(node.client, floating, 8080, timeout=0.5), within=TICK, what="that address being served"
    )
