"""Pods on the embedded node: a test that fails on them would otherwise look like a fault of the daemon."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from embedded.api import cri_pb2
from embedded.cri import Pod, PodContainer
from embedded.host import Host
from embedded.network import HANDLERS
from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, eventually, probe_tcp, probe_udp
from tests.node.test_embedded_node import machine, processes_of


@pytest.fixture
def node() -> Iterator[Node]:
    """A node whose containerd runs pods, with the network docker0."""
    with Node(cri=True) as node:
        node.start_containerd()
        node.add_network("docker0")
        yield node


def address_of(pod: Pod) -> str:
    assert pod.address is not None
    return pod.address


def namespace_of(container: Pod | PodContainer | Host, kind: str) -> str:
    pid = container.pid if isinstance(container, Host) else container.outer_pid
    return os.readlink(f"/proc/{pid}/ns/{kind}")


def labels_of(node: Node, id: str) -> dict[str, str]:
    info = json.loads(node.run("ctr", "-n", "k8s.io", "containers", "info", id).stdout)
    return dict(info["Labels"])


def sandboxes(node: Node) -> dict[str, cri_pb2.PodSandbox]:
    return {sandbox.id: sandbox for sandbox in node.cri.sandboxes()}


def tasks(node: Node) -> dict[str, str]:
    lines = node.run("ctr", "-n", "k8s.io", "task", "list").stdout.splitlines()[1:]
    return {fields[0]: fields[2] for fields in map(str.split, lines)}


def test_a_pod_runs_and_is_reached_by_the_node_and_the_lan(node: Node) -> None:
    web = node.start_pod("web")
    assert tasks(node) == {web.id: "RUNNING"}
    assert re.match(r"/bin/sleep\0", node.run("cat", f"/proc/{web.pid}/cmdline").stdout)
    with Server(web, 80):
        for place, peer in ((node, "172.17.0.1"), (node.client, node.client_address)):
            answer = probe_tcp(place, address_of(web), 80)
            assert isinstance(answer, Reply)
            assert (answer.name, answer.peer) == ("web", peer)
    assert f"inet {web.address}/16" in web.run("ip", "address", "show", "dev", "eth0").stdout


def test_two_containers_of_a_pod_share_its_network_and_nothing_else(node: Node) -> None:
    shop = node.start_pod("shop")
    web, db = shop.start("web"), shop.start("db")
    assert set(tasks(node)) == {shop.id, web.id, db.id}
    assert namespace_of(web, "net") == namespace_of(db, "net") == namespace_of(shop, "net") != namespace_of(node, "net")
    assert len({namespace_of(container, "pid") for container in (shop, web, db)}) == 3
    assert node.run("cat", f"/proc/{web.pid}/cmdline").stdout == "/bin/sleep\x00600\x00"


def test_labels_are_the_kubelets_and_the_plugins(node: Node) -> None:
    shop = node.start_pod("shop", namespace="prod", labels={"app": "shop"}, annotations={"example.com/note": "a, b"})
    web = shop.start("web")
    identity = {
        "io.kubernetes.pod.name": "shop",
        "io.kubernetes.pod.namespace": "prod",
        "io.kubernetes.pod.uid": shop.uid,
    }
    assert labels_of(node, shop.id) == {"io.cri-containerd.kind": "sandbox", "app": "shop", **identity}
    assert labels_of(node, web.id) == {
        "io.cri-containerd.kind": "container",
        "io.kubernetes.container.name": "web",
        **identity,
    }
    assert (shop.labels, shop.annotations) == ({"app": "shop"}, {"example.com/note": "a, b"})
    assert sandboxes(node)[shop.id].annotations == {"example.com/note": "a, b"}


def test_a_pod_whose_sandbox_ended_gets_another(node: Node) -> None:
    old = node.start_pod("web")
    container = old.start("web")
    node.stop_pod(old)
    assert tasks(node) == {}
    new = node.start_pod("web", uid=old.uid)
    new.start("web")
    assert new.id != old.id
    assert new.address != old.address
    there = {id: (sandbox.state, sandbox.metadata.attempt) for id, sandbox in sandboxes(node).items()}
    assert there == {old.id: (cri_pb2.SANDBOX_NOTREADY, 0), new.id: (cri_pb2.SANDBOX_READY, 1)}
    assert labels_of(node, container.id)["io.kubernetes.pod.uid"] == old.uid
    node.remove_pod(old)
    assert list(sandboxes(node)) == [new.id]


def test_another_pod_of_the_same_name_while_the_first_still_runs(node: Node) -> None:
    old, new = node.start_pod("web"), node.start_pod("web")
    assert old.uid != new.uid
    assert old.address != new.address
    node.remove_pod(old)
    with pytest.raises(RuntimeError, match="web has ended"):
        old.socket()
    with Server(new, 80):
        assert isinstance(probe_tcp(node, address_of(new), 80), Reply)


def test_a_container_ends_and_is_started_again(node: Node) -> None:
    shop = node.start_pod("shop")
    crashed = shop.start("web")
    crashed.stop()
    assert crashed.id not in tasks(node)
    again = shop.start("web")
    assert tasks(node)[again.id] == "RUNNING"
    crashed.remove()
    again.remove()
    assert node.run("ctr", "-n", "k8s.io", "container", "list", "--quiet").stdout.split() == [shop.id]


def test_a_host_network_pod(node: Node) -> None:
    agent = node.start_pod("agent", host_network=True)
    exporter = agent.start("exporter")
    assert (agent.address, agent.network) == (None, None)
    assert namespace_of(exporter, "net") == namespace_of(node, "net")
    with Server(agent, 9100):
        answer = probe_tcp(node.client, node.address, 9100)
    assert isinstance(answer, Reply)
    assert answer.name == "agent"


@pytest.mark.parametrize(("protocol", "kind"), [("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)])
def test_a_host_port_is_forwarded_by_portmap(
    node: Node, protocol: Literal["tcp", "udp"], kind: socket.SocketKind
) -> None:
    web = node.start_pod("web", host_ports=[(8080, 80, protocol)])
    probe = probe_tcp if protocol == "tcp" else probe_udp
    with Server(web, 80, kind=kind):
        answer = probe(node.client, node.address, 8080)
    assert isinstance(answer, Reply)
    assert (answer.name, answer.peer, answer.port) == ("web", node.client_address, 80)
    rules = node.run("iptables-nft", "-t", "nat", "-S").stdout
    chain = re.search(
        rf"-A CNI-HOSTPORT-DNAT -p {protocol} .*{web.id}.* --dports 8080 -j (CNI-DN-[0-9a-f]{{21}})$", rules, re.M
    )
    assert chain is not None
    assert (
        f"-A {chain[1]} -p {protocol} -m {protocol} --dport 8080 -j DNAT --to-destination {web.address}:80\n" in rules
    )
    node.stop_pod(web)
    assert "8080" not in node.run("iptables-nft", "-t", "nat", "-S").stdout
    assert isinstance(probe(node.client, node.address, 8080), Refused)


def test_a_routed_veth_without_a_bridge(node: Node) -> None:
    node.start_pod("elsewhere")
    routed = node.add_network("routed", kind="ptp", subnet="172.18.0.0/16")
    web = node.start_pod("web", network=routed, host_ports=[(8080, 80, "tcp")])
    assert web.address == "172.18.0.2"
    assert re.search(r"^172\.18\.0\.2 dev veth\w+ ", node.run("ip", "route", "get", "172.18.0.2").stdout)
    with Server(web, 80):
        assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)
    node.remove_pod(web)
    assert "172.18" not in node.run("ip", "route").stdout + node.tables()


def test_pods_on_five_networks_under_both_families(node: Node) -> None:
    networks = [
        node.add_network(f"br{number}", subnet=f"172.{17 + number}.0.0/16", subnet6=f"fd00:{17 + number}::/64")
        for number in range(1, len(HANDLERS) + 1)
    ]
    for number, network in enumerate(networks, start=18):
        pod = node.start_pod("web", network=network)
        assert (pod.address, pod.address6) == (f"172.{number}.0.2", f"fd00:{number}::2")
    last = node.add_network("last", subnet="172.30.0.0/16")
    with pytest.raises(RuntimeError, match="network last: there are runtime handlers for 4 more"):
        node.start_pod("web", network=last)
    assert node.start("web", network=last).address == "172.30.0.2"


def test_pods_outlive_containerd(node: Node) -> None:
    shop = node.start_pod("shop", host_ports=[(8080, 80, "tcp")])
    shop.start("web")
    for end in (node.stop_containerd, node.kill_containerd):
        end()
        with Server(shop, 80):
            assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)
        node.start_containerd()
        assert sandboxes(node)[shop.id].state == cri_pb2.SANDBOX_READY
    shop.start("db")
    assert len(tasks(node)) == 3
    node.remove_pod(shop)
    assert tasks(node) == sandboxes(node) == {}


def test_containers_of_ctr_are_beside_pods(node: Node) -> None:
    pod, container = node.start_pod("web"), node.start("web")
    assert (pod.address, container.address) == ("172.17.0.2", "172.17.0.3")
    node.delete(container)
    assert list(tasks(node)) == [pod.id]


def test_nothing_of_a_removed_pod_stays_in_the_node(node: Node) -> None:
    # portmap keeps the chains that are for all pods.
    node.remove_pod(node.start_pod("first", host_ports=[(8080, 80, "tcp")]))
    rules, mounts = node.tables(), node.run("cat", "/proc/self/mounts").stdout
    web = node.start_pod("web", host_ports=[(8080, 80, "tcp")])
    web.start("web")
    assert node.tables() != rules
    node.remove_pod(web)
    assert node.tables() == rules
    assert node.run("cat", "/proc/self/mounts").stdout == mounts
    assert node.run("ctr", "-n", "k8s.io", "container", "list", "--quiet").stdout == ""
    assert not list(node.path("/var/lib/cni/networks/docker0").glob("172.*"))
    assert not list(node.path("/run/netns").iterdir())
    eventually(lambda: "veth" not in node.run("ip", "link").stdout, what="the pod's device is gone")


def test_nothing_is_left_on_the_machine() -> None:
    before = machine()
    with Node(cri=True) as node:
        node.start_containerd()
        node.add_network()
        web = node.start_pod("web", host_ports=[(8080, 80, "tcp")])
        frozen = web.start("frozen")
        node.run("ctr", "-n", "k8s.io", "task", "pause", frozen.id)
        node.start_pod("agent", host_network=True).start("exporter")
        node.stop_pod(node.start_pod("stopped"))
        Server(web, 80)
        assert len(processes_of(node)) >= 4  # init, containerd and a shim a pod
        assert list(Path("/sys/fs/cgroup").glob(f"**/{node.directory.name}/kubepods/pod{web.uid}/{web.id}"))
        assert machine() == before
        pids = [web.outer_pid, frozen.outer_pid, *map(int, processes_of(node))]
    assert machine() == before
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not node.directory.exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{node.directory.name}"))


def test_a_node_without_cri_says_so() -> None:
    with Node() as node, pytest.raises(RuntimeError, match="make it with cri=True"):
        node.start_pod("web")
