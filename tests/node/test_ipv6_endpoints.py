"""Where containers with IPv6 are found, and what is said of those that are not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

import pytest

from ctrport.endpoints import DUPLICATE, LOOPBACK_ONLY
from ctrport.model import Attachment, Endpoint, Family, Obstacle, State
from ctrport.node import look
from embedded.container import Container
from embedded.node import Node
from embedded.wait import eventually
from tests.node.modules import ENVIRONMENT, call, find


@pytest.fixture
def node() -> Iterator[Node]:
    """A node whose networks have both families: a bridge, the first, and a routed veth for each container."""
    with Node() as node:
        node.start_containerd()
        node.add_network("docker0", subnet6="fd00:17::/64")
        node.add_network("ptp", kind="ptp", subnet="172.18.0.0/16", subnet6="fd00:18::/64")
        yield node


def attachment(address: str | None, device: str, subnet: str, port: str | None = None) -> Attachment:
    assert address is not None
    return Attachment(ip_address(address), device, ip_network(subnet), port)


def host_end(node: Node, container: Container, device: str = "eth0") -> str:
    """Return the name of the host's end of a container's veth."""
    shown = json.loads(container.run("ip", "-json", "link", "show", "dev", device).stdout)
    links = json.loads(node.run("ip", "-json", "link", "show").stdout)
    return next(str(link["ifname"]) for link in links if link["ifindex"] == shown[0]["link_index"])


def without_ipv4(container: Container) -> Container:
    container.run("ip", "-4", "address", "flush", "dev", "eth0")
    return container


def ask_others(container: Container, *, times: int = 1) -> None:
    """Have a container ask whether another has its next address: CNI switches that off below a hairpin port."""
    conf = "/proc/sys/net/ipv6/conf/eth0"
    container.run("sh", "-ec", f"echo 1 >{conf}/accept_dad; echo {times} >{conf}/dad_transmits")


def flags(container: Container, address: str) -> set[str]:
    """Return the states of an address that ip(8) would show."""
    shown = json.loads(container.run("ip", "-6", "-json", "address", "show", "dev", "eth0").stdout)
    infos = [info for link in shown for info in link.get("addr_info", ()) if info["local"] == address]
    return {key for info in infos for key, value in info.items() if value is True}


def veth(node: Node, container: Container, name: str = "veth1", inside: str = "eth0") -> None:
    """Connect a container to the node by hand, its end up."""
    node.run("ip", *f"link add {name} type veth peer name {inside} netns {container.pid}".split())
    node.run("ip", "link", "set", name, "up")
    container.run("ip", "link", "set", inside, "up")


def test_a_container_on_a_bridge_is_found_in_both_families_at_one_port(node: Node) -> None:
    web = node.start("web")
    port = host_end(node, web)
    assert find(node, web) == Endpoint(
        (
            attachment(web.address, "docker0", "172.17.0.0/16", port),
            attachment(web.address6, "docker0", "fd00:17::/64", port),
        )
    )


def test_a_container_behind_a_routed_veth_is_found_in_both_families(node: Node) -> None:
    web = node.start("web", network=node.networks[1])
    veth = host_end(node, web)
    assert find(node, web) == Endpoint(
        (
            attachment(web.address, veth, f"{web.address}/32"),
            attachment(web.address6, veth, f"{web.address6}/128"),
        )
    )


@pytest.mark.parametrize("network", [0, 1], ids=["bridge", "ptp"])
def test_a_container_with_ipv6_alone_is_found(node: Node, network: int) -> None:
    web = without_ipv4(node.start("web", network=node.networks[network]))
    port = host_end(node, web)
    expected = [
        attachment(web.address6, "docker0", "fd00:17::/64", port),
        attachment(web.address6, port, f"{web.address6}/128"),
    ]
    assert find(node, web) == Endpoint((expected[network],))


def test_a_bridges_port_with_an_odd_name_is_not_named(node: Node) -> None:
    web = node.start("web")
    port = host_end(node, web)
    node.script('ip link set "$1" down; ip link set "$1" name "odd;name"; ip link set "odd;name" up', port)
    found = find(node, web)
    assert isinstance(found, Endpoint)
    assert [one.port for one in found.attachments] == [None, None]


def test_an_address_that_is_tentative_still_is_taken_at_once(node: Node) -> None:
    web = node.start("web")
    web.run("ip", "-6", "address", "flush", "dev", "eth0", "scope", "global")
    ask_others(web, times=60)
    web.run("ip", "address", "add", "fd00:17::77/64", "dev", "eth0")
    found = find(node, web)
    assert flags(web, "fd00:17::77") == {"tentative"}
    assert isinstance(found, Endpoint)
    assert found.at(Family.IPV6) == attachment("fd00:17::77", "docker0", "fd00:17::/64", host_end(node, web))
    assert found.at(Family.IPV4) is not None


def test_an_address_that_another_has_is_not_taken(node: Node) -> None:
    web = node.start("web")
    web.run("ip", "-6", "address", "flush", "dev", "eth0", "scope", "global")
    ask_others(web)
    web.run("ip", "address", "add", "fd00:17::1/64", "dev", "eth0")  # the bridge's own
    eventually(lambda: "dadfailed" in flags(web, "fd00:17::1"), what="the address being found to be another's")
    found = find(node, web)
    assert isinstance(found, Endpoint)
    assert [one.address.version for one in found.attachments] == [4]
    assert find(node, without_ipv4(web)) == DUPLICATE


def test_addresses_of_the_link_alone_are_no_way_to_reach_it(node: Node) -> None:
    web = node.start("web", network=None)
    veth(node, web)
    assert flags(web, "fe80::1") == set()
    assert "fe80" in web.run("ip", "-6", "address", "show", "dev", "eth0").stdout
    assert find(node, web) == LOOPBACK_ONLY


def test_of_two_networks_it_is_found_at_that_of_the_default_route(node: Node) -> None:
    web = node.start("web")
    veth(node, web, "veth2", "eth1")
    node.run("ip", "address", "add", "fd00:5::1/64", "dev", "veth2", "nodad")
    web.run("ip", "address", "add", "fd00:5::2/64", "dev", "eth1", "nodad")  # lower than that of eth0
    port = host_end(node, web)
    found = find(node, web)
    assert isinstance(found, Endpoint)
    assert found.at(Family.IPV6) == attachment(web.address6, "docker0", "fd00:17::/64", port)
    web.run("ip", "-6", "route", "replace", "default", "via", "fd00:5::1", "dev", "eth1")
    web.run("ip", "-6", "route", "delete", "default", "dev", "eth0", check=False)
    found = find(node, web)
    assert isinstance(found, Endpoint)
    assert found.at(Family.IPV6) == attachment("fd00:5::2", "veth2", "fd00:5::/64")
    assert found.at(Family.IPV4) == attachment(web.address, "docker0", "172.17.0.0/16", port)


def test_a_default_route_of_another_table_does_not_decide(node: Node) -> None:
    # As CNI's plugin for source-based routing leaves it.
    web = node.start("web")
    veth(node, web, "veth2", "eth1")
    node.run("ip", "address", "add", "fd00:5::1/64", "dev", "veth2", "nodad")
    web.run("ip", "address", "add", "fd00:5::2/64", "dev", "eth1", "nodad")
    web.run("ip", "-6", "route", "add", "default", "via", "fd00:5::1", "dev", "eth1", "table", "100")
    found = find(node, web)
    assert isinstance(found, Endpoint)
    assert found.at(Family.IPV6) == attachment(web.address6, "docker0", "fd00:17::/64", host_end(node, web))


# A family that cannot be reached


def test_an_obstacle_in_one_family_does_not_keep_the_other_back(node: Node) -> None:
    web = node.start("web")
    node.run("ip", "-6", "route", "add", "unreachable", f"{web.address6}/128")
    found = find(node, web)
    assert isinstance(found, Endpoint)
    assert [str(one.address) for one in found.attachments] == [web.address]
    node.run("ip", "-6", "route", "delete", f"{web.address6}/128")
    node.run("ip", "route", "add", "unreachable", f"{web.address}/32")
    found = find(node, web)
    assert isinstance(found, Endpoint)
    assert [str(one.address) for one in found.attachments] == [web.address6]


def test_of_obstacles_in_both_families_that_of_ipv4_is_said(node: Node) -> None:
    web = node.start("web")
    node.run("ip", "route", "add", "unreachable", f"{web.address}/32")
    node.run("ip", "-6", "route", "add", "unreachable", f"{web.address6}/128")
    assert find(node, web) == Obstacle(State.WAITING, f"the host has no route to {web.address}")


def test_a_container_with_ipv6_alone_is_told_what_keeps_it_from_being_reached(node: Node) -> None:
    web = node.start("web", network=None)
    veth(node, web)
    web.run("ip", "address", "add", "fd00:9::2/64", "dev", "eth0", "nodad")
    gateway = f"only through the gateway {node.client_address6}"
    reason = f"the host reaches fd00:9::2 {gateway}: it is not on one of its own networks"
    assert find(node, web) == Obstacle(State.WAITING, reason)
    node.run("ip", "-6", "route", "delete", "default")
    assert find(node, web) == Obstacle(State.WAITING, "the host has no route to fd00:9::2")
    node.run("ip", "address", "add", "fd00:9::2/128", "dev", "lo")
    assert find(node, web) == Obstacle(State.UNSUPPORTED, "fd00:9::2 is an address of the node itself")


def test_a_container_with_an_address_of_another_ones_network(node: Node) -> None:
    node.start("sibling")
    web = node.start("web", network=None)
    veth(node, web)
    web.run("ip", "address", "add", "fd00:17::99/64", "dev", "eth0", "nodad")
    reason = "the host reaches fd00:17::99 through docker0, which is not the container's own device"
    assert find(node, web) == Obstacle(State.UNSUPPORTED, reason)


def test_a_container_whose_device_is_no_veth(node: Node) -> None:
    web = node.start("web", network=None)
    web.run("ip", "link", "add", "eth0", "type", "bridge")
    web.run("ip", "link", "set", "eth0", "up")
    web.run("ip", "address", "add", "fd00:9::2/64", "dev", "eth0", "nodad")
    node.run("ip", "route", "add", "fd00:9::/64", "dev", "eth0")
    assert find(node, web) == Obstacle(State.UNSUPPORTED, "its eth0 is a bridge device: only veth can be done")


def test_a_node_with_ipv6_switched_off_has_ipv4_as_before(node: Node) -> None:
    web = node.start("web")
    node.sysctl("net/ipv6/conf/all/disable_ipv6", 1)
    assert find(node, web) == Endpoint((attachment(web.address, "docker0", "172.17.0.0/16", host_end(node, web)),))
    facts = call(node, look).facts
    assert {str(each) for each in facts.addresses if each.version == 6} == set()


# The node itself


def test_what_the_node_has_of_ipv6_is_seen(node: Node) -> None:
    node.start("web")
    facts = call(node, look).facts
    assert facts.forwarding == frozenset(Family)
    ipv6 = {str(each) for each in facts.addresses if each.version == 6}
    assert ipv6 == {"::1", node.address6, "fd00:17::1"}
    node.sysctl("net/ipv6/conf/all/forwarding", 0)
    assert call(node, look).facts.forwarding == {Family.IPV4}


_FOLLOW = """
import asyncio
import functools
from ctrport import netlink, node

async def follow():
    asyncio.get_running_loop().call_soon(functools.partial(print, "ready", flush=True))  # when it listens
    await netlink.follow_addresses(tell)

def tell(nsid):
    if nsid is None:
        print(*sorted(map(str, node.look().facts.addresses)), flush=True)
    else:
        print("elsewhere", nsid, flush=True)

asyncio.run(follow())
"""


def test_an_address_of_the_node_is_announced_once_it_is_usable(node: Node) -> None:
    follower = node.spawn(sys.executable, "-c", _FOLLOW, stdout=subprocess.PIPE, env=ENVIRONMENT)
    said = follower.stdout
    assert said is not None
    assert said.readline() == "ready\n"
    # What every container brings, and takes along: no news.
    node.script("ip link add veth8 up type veth peer name veth9; ip link set veth9 up")
    eventually(lambda: "fe80" in node.run("ip", "-6", "address", "show", "dev", "veth8").stdout, what="its address")
    node.run("ip", "link", "delete", "veth8")
    node.sysctl("net/ipv6/conf/eth0/accept_dad", 1)
    own = {"127.0.0.1", node.address, "::1", node.address6}
    node.run("ip", "address", "add", "198.51.100.9/24", "dev", "eth0")
    assert set(said.readline().split()) == own | {"198.51.100.9"}
    node.run("ip", "address", "add", "2001:db8:51::9/64", "dev", "eth0")
    assert "2001:db8:51::9" not in {str(each) for each in call(node, look).facts.addresses}
    assert set(said.readline().split()) == own | {"198.51.100.9", "2001:db8:51::9"}
    node.run("ip", "address", "delete", "2001:db8:51::9/64", "dev", "eth0")
    assert set(said.readline().split()) == own | {"198.51.100.9"}


def test_an_address_that_a_container_gets_is_announced_by_the_id_of_its_namespace(node: Node) -> None:
    web = node.start("web")
    follower = node.spawn(sys.executable, "-c", _FOLLOW, stdout=subprocess.PIPE, env=ENVIRONMENT)
    # One that may not hear of others hears of the node all the same.
    deaf = node.spawn(
        *("setpriv", "--bounding-set", "-net_broadcast", "--inh-caps", "-net_broadcast"),
        *(sys.executable, "-c", _FOLLOW),
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    for one in (follower, deaf):
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    web.run("ip", "address", "add", "10.9.9.9/24", "dev", "eth0")
    node.run("ip", "address", "add", "198.51.100.9/24", "dev", "eth0")
    of_node = {"127.0.0.1", node.address, "172.17.0.1", "198.51.100.9", "::1", node.address6, "fd00:17::1"}
    assert follower.stdout is not None
    assert re.fullmatch(r"elsewhere \d+\n", follower.stdout.readline())
    assert set(follower.stdout.readline().split()) == of_node
    assert deaf.stdout is not None
    assert set(deaf.stdout.readline().split()) == of_node
