"""Pods of a real CRI, published once each; beside a policy that closes them, and others who have the host port."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from embedded.cri import Pod
from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, TimedOut, eventually, probe_tcp
from tests.node.daemon import OFTEN, Ctrport, publish, wait_closed, wait_open


@pytest.fixture
def node() -> Iterator[Node]:
    """A node that runs pods: on the bridge cbr0, and on routed devices without one as Calico has them."""
    with Node(cri=True) as node:
        node.start_containerd()
        node.add_network("cbr0", subnet="10.244.0.0/24")
        node.add_network("routed", subnet="10.245.0.0/24", kind="ptp")
        yield node


def started(ctrport: Ctrport, *entries: tuple[str, str], tick: float | None = None) -> None:
    ctrport.configure(publish(*entries))
    ctrport.start(tick=tick)


def pods(ctrport: Ctrport) -> list[tuple[str, str]]:
    """Return what is published of which pod."""
    return [(p["pod"], p["mapping"]) for p in ctrport.status()["publications"] if p["state"] == "active"]


@pytest.mark.parametrize("network", [0, 1], ids=["bridge", "routed"])
def test_a_pod_is_published_once_whichever_of_its_containers_matches(
    node: Node, ctrport: Ctrport, network: int
) -> None:
    started(ctrport, ("{container: redis}", "6379:80"), ('{pod: {name: "redis-*"}}', "6379:80"))
    pod = node.start_pod("redis-0", namespace="prod", network=node.networks[network])
    Server(pod, 80)
    wait_open(node, 6379, "redis-0")  # the pod as such matches by its name already
    for name in ("redis", "exporter"):
        pod.start(name)
    publication = ctrport.wait_for("6379:80/tcp", "active")
    assert (publication["pod"], publication["container"], publication["namespace"]) == (
        "prod/redis-0",
        pod.id,
        "k8s.io",
    )
    for policy in ("ACCEPT", "DROP"):
        node.run("iptables-nft", "-P", "FORWARD", policy)
        reply = probe_tcp(node.client, node.address, 6379)
        assert isinstance(reply, Reply), policy
        assert reply.peer == node.client_address
        for host, address in ((node, "127.0.0.1"), (node, node.address), (pod, node.address)):
            assert isinstance(probe_tcp(host, address, 6379), Reply), (policy, host.name, address)
    for sender in (node.client_address, "127.0.0.1"):
        said = ctrport.run("explain", "6379", "--from", sender, "--config", str(ctrport.config))
        assert f"{pod.address}:80 in container pod:prod/redis-0" in said.stdout.splitlines()[-1], sender
    assert "pod:prod/redis-0" in ctrport.run("ps").stdout
    node.remove_pod(pod)
    wait_closed(node, 6379)
    assert ctrport.stop() == 0
    ctrport.run("clean")
    assert "ctrport" not in node.tables()


def test_a_mapping_by_a_containers_name_is_there_while_that_container_runs(node: Node, ctrport: Ctrport) -> None:
    started(ctrport, ("{container: web, pod: {namespace: prod}}", "8080:80"))
    pod, other = node.start_pod("shop", namespace="prod"), node.start_pod("shop", namespace="test")
    Server(pod, 80)
    pod.start("sidecar")
    other.start("web")
    assert ctrport.publication("8080:80/tcp")["state"] == "waiting"
    web = pod.start("web")
    wait_open(node, 8080, "shop")
    web.stop()
    wait_closed(node, 8080)
    pod.start("web")
    wait_open(node, 8080, "shop")


def test_pods_are_selected_by_namespace_name_and_labels(node: Node, ctrport: Ctrport) -> None:
    started(
        ctrport,
        ("{pod: {namespace: prod, labels: {app: redis}}}", "7001:80"),
        ('{pod: {name: "*-1"}}', "7002:80"),
        ("{pod: {labels: {app: web, tier: front}}}", "7003:80"),
        ("{container: redis-1}", "7004:80"),  # a pod's name is not a container's
    )
    node.start_pod("redis-0", namespace="prod", labels={"app": "redis"})
    node.start_pod("redis-1", namespace="test", labels={"app": "redis"})
    node.start_pod("web", namespace="prod", labels={"app": "web"})
    expected = [("prod/redis-0", "7001:80/tcp"), ("test/redis-1", "7002:80/tcp")]
    eventually(lambda: sorted(pods(ctrport)) == expected, what="two pods being published")
    node.start_pod("web-2", namespace="prod", labels={"app": "web", "tier": "front"})
    expected.append(("prod/web-2", "7003:80/tcp"))
    eventually(lambda: sorted(pods(ctrport)) == sorted(expected), what="the third")


@pytest.mark.parametrize("same_uid", [True, False], ids=["another sandbox", "another pod"])
def test_a_pod_that_is_made_anew_under_its_name_moves_its_mapping(node: Node, ctrport: Ctrport, same_uid: bool) -> None:
    started(ctrport, ("{pod: {namespace: prod, name: redis-0}}", "6379:80"))
    old = node.start_pod("redis-0", namespace="prod")
    Server(old, 80, name="old")
    wait_open(node, 6379, "old")
    if not same_uid:
        # The kubelet starts the next only when the old is gone, but nobody else need to.
        new = node.start_pod("redis-0", namespace="prod")
        Server(new, 80, name="new")
        assert wait_open(node, 6379).name == "old"
        node.stop_pod(old)
    else:
        node.stop_pod(old)
        new = node.start_pod("redis-0", namespace="prod", uid=old.uid)
        Server(new, 80, name="new")
    assert (new.id, new.address) != (old.id, old.address)
    wait_open(node, 6379, "new")
    ctrport.wait_for("6379:80/tcp", "active", new.id)


def test_a_pod_whose_sandbox_dies_is_withdrawn(node: Node, ctrport: Ctrport) -> None:
    started(ctrport, ("{container: web}", "8080:80"))
    pod = node.start_pod("shop")
    pod.start("web")
    ctrport.wait_for("8080:80/tcp", "active")
    os.kill(pod.outer_pid, signal.SIGKILL)
    eventually(lambda: pods(ctrport) == [], what="the mapping being withdrawn")
    wait_closed(node, 8080)


def test_pods_that_run_already_are_published_at_the_start(node: Node, ctrport: Ctrport) -> None:
    pod = node.start_pod("shop", namespace="prod")
    pod.start("web")
    Server(pod, 80)
    started(ctrport, ("{container: web}", "8080:80"))
    wait_open(node, 8080, "shop")


def test_a_pod_on_the_hosts_network_needs_no_mapping(node: Node, ctrport: Ctrport) -> None:
    started(ctrport, ("{container: web}", "8080:80"))
    pod = node.start_pod("agent", host_network=True)
    pod.start("web")
    publication = ctrport.wait_for("8080:80/tcp", "unsupported")
    assert publication["pod"] == "default/agent"
    assert "host's network" in publication["reason"]
    assert "no mapping" in publication["reason"]


# Others who have the host port


def test_a_host_port_of_a_pod_is_a_conflict_that_is_named(node: Node, ctrport: Ctrport) -> None:
    other = node.start_pod("gateway", host_ports=[(8080, 80, "tcp")])
    Server(other, 80)
    pod = node.start_pod("shop")
    Server(pod, 80)
    started(ctrport, ("{pod: {name: shop}}", "8080:80"), ("{pod: {name: shop}}", "8081:80"), tick=OFTEN)
    publication = ctrport.wait_for("8080:80/tcp", "conflict")
    assert publication["reason"] == "host port 8080/tcp is held by CNI-HOSTPORT-DNAT"
    wait_open(node, 8080, "gateway")
    wait_open(node, 8081, "shop")
    node.remove_pod(other)
    ctrport.wait_for("8080:80/tcp", "active")  # there is no event of it: the tick sees it
    wait_open(node, 8080, "shop")


NODE_PORT = """
iptables-nft -t nat -N KUBE-NODEPORTS
iptables-nft -t nat -N KUBE-EXT-A
iptables-nft -t nat -A KUBE-EXT-A -p tcp -j DNAT --to-destination $1:80
iptables-nft -t nat -A KUBE-NODEPORTS -p tcp -m comment --comment "shop/web:http" -m tcp --dport 30080 -j KUBE-EXT-A
iptables-nft -t nat -I PREROUTING -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
"""


def test_a_node_port_is_a_conflict_that_is_named(node: Node, ctrport: Ctrport) -> None:
    service, pod = node.start_pod("service"), node.start_pod("shop")
    Server(service, 80)
    Server(pod, 80)
    node.script(NODE_PORT, address_of(service))
    started(ctrport, ("{pod: {name: shop}}", "30080:80"), ("{pod: {name: shop}}", "30081:80"))
    reason = ctrport.wait_for("30080:80/tcp", "conflict")["reason"]
    assert reason == "host port 30080/tcp is held by KUBE-NODEPORTS (shop/web:http)"
    wait_open(node, 30080, "service")
    wait_open(node, 30081, "shop")


# Policies: what they close stays closed

CALICO = """
iptables-nft -N cali-FORWARD
iptables-nft -N cali-tw-shop
iptables-nft -I FORWARD -m comment --comment "cali:wUHhoiAYhphO9Mso" -j cali-FORWARD
iptables-nft -A cali-FORWARD -d $1/32 -j cali-tw-shop
iptables-nft -A cali-tw-shop -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables-nft -A cali-tw-shop -s 198.51.100.3/32 -j ACCEPT
iptables-nft -A cali-tw-shop -m comment --comment "cali:drop if no policies passed packet" -j DROP
"""
KUBE_ROUTER = """
iptables-nft -N KUBE-ROUTER-FORWARD
iptables-nft -N KUBE-POD-FW-SHOP
iptables-nft -I FORWARD -m comment --comment "kube-router netpol" -j KUBE-ROUTER-FORWARD
iptables-nft -A KUBE-ROUTER-FORWARD -d $1/32 -m comment --comment "rule to jump traffic to POD" -j KUBE-POD-FW-SHOP
iptables-nft -A KUBE-POD-FW-SHOP -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables-nft -A KUBE-POD-FW-SHOP -s 198.51.100.3/32 -j ACCEPT
iptables-nft -A KUBE-POD-FW-SHOP -j REJECT --reject-with icmp-port-unreachable
"""


@pytest.mark.parametrize("network", [0, 1], ids=["bridge", "routed"])
@pytest.mark.parametrize("agent", [CALICO, KUBE_ROUTER], ids=["calico", "kube-router"])
@pytest.mark.parametrize("first", ["agent", "ctrport"])
def test_what_a_network_policy_closes_stays_closed(
    node: Node, ctrport: Ctrport, agent: str, first: str, network: int
) -> None:
    node.client.run("ip", "address", "add", "198.51.100.3/24", "dev", "eth0")
    pod = node.start_pod("shop", network=node.networks[network])
    Server(pod, 80)
    ctrport.configure(publish(("{pod: {name: shop}}", "8080:80")))
    if first == "ctrport":
        ctrport.start()
        wait_open(node, 8080, "shop")
    node.script(agent, address_of(pod))
    if first == "agent":
        ctrport.start()
        ctrport.wait_for("8080:80/tcp", "active")
    refused = probe_tcp(node.client, node.address, 8080, source=(node.client_address, 0), timeout=0.5)
    assert not refused, refused
    allowed = probe_tcp(node.client, node.address, 8080, source=("198.51.100.3", 0))
    assert isinstance(allowed, Reply)
    assert allowed.peer == "198.51.100.3"


def test_an_agent_whose_jump_comes_last_is_asked_first_after_a_restart(node: Node, ctrport: Ctrport) -> None:
    pod = node.start_pod("shop")
    Server(pod, 80)
    ctrport.configure(publish(("{pod: {name: shop}}", "8080:80")))
    ctrport.start()
    wait_open(node, 8080, "shop")
    node.script(CALICO.replace("-I FORWARD", "-A FORWARD"), address_of(pod))
    ctrport.stop()
    ctrport.start()
    assert isinstance(probe_tcp(node.client, node.address, 8080, timeout=0.5), TimedOut)


def address_of(pod: Pod) -> str:
    assert pod.address is not None
    return pod.address


def test_a_packet_to_a_closed_port_of_a_pod_is_refused(node: Node, ctrport: Ctrport) -> None:
    started(ctrport, ("{pod: {name: shop}}", "8080:80"))
    node.start_pod("shop")
    ctrport.wait_for("8080:80/tcp", "active")
    assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)
