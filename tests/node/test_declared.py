"""What containers declare by themselves, with real labels and annotations: published, refused, followed, left alone."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from embedded.container import Container
from embedded.node import Node
from embedded.traffic import Refused, Server, eventually, probe_tcp, probe_udp
from tests.node.daemon import Ctrport, publish, wait_closed, wait_open

RULES = """
containers_may_publish:
  - kinds: [label]
    namespace: default
    host_ports: ["8000-8099"]
  - kinds: [annotation]
    host_ports: ["8100-8199"]
    pod_namespace: shop
  - kinds: [annotation]
    host_ports: ["8200-8299"]
    namespace: default
"""
NAME = "ctrport/ports"

pytestmark = pytest.mark.node_of_many


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node(cri=True) as node:
        node.sysctl("net/ipv4/icmp_ratelimit", 0)
        node.start_containerd()
        node.add_network("cbr0", subnet="10.244.0.0/24")
        yield node


@pytest.fixture
def daemon(node: Node, ctrport: Ctrport) -> Iterator[Ctrport]:
    """The daemon with these rules; when it is gone the tables are as before."""
    before = node.tables()
    ctrport.configure(RULES)
    ctrport.start()
    yield ctrport
    ctrport.stop()
    ctrport.run("clean")
    assert node.tables() == before


def label(node: Node, container: Container, value: str) -> None:
    node.run("ctr", "--namespace", container.namespace, "containers", "label", container.id, f"{NAME}={value}")


def test_a_label_is_published_and_followed_while_the_container_runs(node: Node, daemon: Ctrport) -> None:
    web = node.start("labelled", labels={NAME: "8080:80,8053:53/udp"})
    with Server(web, 80), Server(web, 53, kind=socket.SOCK_DGRAM):
        wait_open(node, 8080, "labelled")
        assert daemon.wait_for("8080:80/tcp", "active")["source"] == f"label {NAME}"
        eventually(lambda: probe_udp(node.client, node.address, 8053), what="8053/udp being answered")
        label(node, web, "8081:80,22:80,x")
        wait_open(node, 8081, "labelled")
        wait_closed(node, 8080)
        said = daemon.wait_for("22:80/tcp", "refused")["reason"]
        where = f"{daemon.config}:3"
        assert said == f"the rule of containers_may_publish at {where} allows the host ports 8000-8099, not 22"
        assert isinstance(probe_tcp(node.client, node.address, 22), Refused)
        said = daemon.wait_for("'x'", "refused")["reason"]
        assert said.startswith("'x' has the container port 'x'; expected a number")
        assert "refused" in daemon.run("ps").stdout
        label(node, web, "none")
        wait_closed(node, 8081)
        eventually(lambda: daemon.status()["publications"] == [], what="nothing being said of it any more")
        node.delete(web)


def test_of_a_pod_the_annotation_is_published_and_only_where_a_rule_allows_it(node: Node, daemon: Ctrport) -> None:
    allowed = node.start_pod("web-0", namespace="shop", annotations={NAME: "8180:80,8080:80"})
    other = node.start_pod("web-0", namespace="test", annotations={NAME: "8181:80"})
    with Server(allowed, 80, name="shop"), Server(other, 80):
        wait_open(node, 8180, "shop")
        publication = daemon.wait_for("8180:80/tcp", "active")
        assert (publication["pod"], publication["source"]) == ("shop/web-0", f"annotation {NAME}")
        refused = daemon.wait_for("8181:80/tcp", "refused")
        assert refused["reason"] == "no rule of containers_may_publish allows it"
        assert "allows the host ports 8100-8199, not 8080" in daemon.wait_for("8080:80/tcp", "refused")["reason"]
        for port in (8080, 8181):
            assert isinstance(probe_tcp(node.client, node.address, port), Refused)
    node.remove_pod(allowed)
    wait_closed(node, 8180)
    node.remove_pod(other)


def test_an_oci_annotation_is_published_also_after_a_rule_was_added(node: Node, daemon: Ctrport) -> None:
    daemon.configure("")
    eventually(lambda: " reloaded " in daemon.messages, what="the rules being gone")
    web = node.start("annotated", options=("--annotation", f"{NAME}=8280:80"))
    with Server(web, 80):
        daemon.configure(RULES)
        wait_open(node, 8280, "annotated")
        daemon.configure("")
        wait_closed(node, 8280)
    node.delete(web)


def test_without_a_rule_and_under_nerdctl_nothing_is_published(node: Node, daemon: Ctrport) -> None:
    ports = '[{"HostPort":8080,"ContainerPort":80,"Protocol":"tcp","HostIP":"0.0.0.0"}]'
    nerdctls = node.start("nerdctls", labels={NAME: "8081:80", "nerdctl/ports": ports})
    with Server(nerdctls, 80):
        assert daemon.wait_for("8081:80/tcp", "refused")["reason"].startswith("nerdctl publishes ports of this")
        assert isinstance(probe_tcp(node.client, node.address, 8081), Refused)
        label(node, nerdctls, "none")
        eventually(lambda: daemon.status()["publications"] == [], what="it being none of ours")
    node.delete(nerdctls)
    web = node.start("ruled", labels={NAME: "8080:80"})
    with Server(web, 80):
        wait_open(node, 8080, "ruled")
        daemon.configure(publish(("{container: nobody}", "1:1")))
        refused = daemon.wait_for("8080:80/tcp", "refused")
        assert refused["reason"] == "no rule of containers_may_publish allows it"
        wait_closed(node, 8080)
    node.delete(web)
