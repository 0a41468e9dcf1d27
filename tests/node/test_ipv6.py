"""IPv6 with real packets: which family a mapping serves, and a node whose IPv6 comes, goes or is not there at all."""

from __future__ import annotations

import json
import shutil
import socket

import pytest

from embedded.node import Node
from embedded.traffic import BOTH_FAMILIES, Refused, Reply, Server, eventually, probe_tcp, probe_udp, serve
from tests.node.daemon import OFTEN, Ctrport, publish, wait_closed, wait_open

pytestmark = pytest.mark.docker0(subnet6="fd00:17::/64")

ADDRESS6 = Node.address6
COMING = "2001:db8:51::77"


def served(node: Node, port: int) -> dict[str, str]:
    """Return who answers the LAN at a port of the node, by family; who is not answered is refused at once."""
    answers = {}
    for family, address in (("IPv4", node.address), ("IPv6", ADDRESS6)):
        outcome = probe_tcp(node.client, address, port, timeout=1)
        assert isinstance(outcome, Reply | Refused), (address, port, outcome)
        if isinstance(outcome, Reply):
            answers[family] = outcome.name
    return answers


def test_a_mapping_serves_each_family_that_the_container_has_and_the_host_ip_is_of(
    node: Node, ctrport: Ctrport
) -> None:
    before = node.tables()
    four = node.add_network("four0", subnet="172.18.0.0/16")
    six = node.add_network("six0", subnet="fd00:18::/64")
    networks = {"dual": node.networks[0], "four": four, "six": six}
    containers = [node.start(name, network=network) for name, network in networks.items()]
    for container in containers:
        serve(container, 80, addresses=BOTH_FAMILIES)
    ctrport.configure(
        publish(
            ("{container: dual}", "8080:80"),
            ("{container: four}", "8081:80"),
            ("{container: six}", "8082:80"),
            ("{container: dual}", "[::]:8083:80"),
            ("{container: dual}", f"[{ADDRESS6}]:8084:80"),
            ("{container: dual}", "0.0.0.0:8085:80"),
            # One port, of which each has a family.
            ("{container: four}", "0.0.0.0:8086:80"),
            ("{container: six}", "[::]:8086:80"),
            ("{container: four}", "[::]:8087:80"),
            ("{container: dual}", "[::1]:8088:80"),
            ("{container: dual}", "8089-8091:80/udp"),
        )
    )
    ctrport.start()
    assert served(node, 8080) == {"IPv4": "dual", "IPv6": "dual"}
    assert served(node, 8081) == {"IPv4": "four"}
    assert served(node, 8082) == {"IPv6": "six"}
    assert served(node, 8083) == {"IPv6": "dual"}
    assert served(node, 8084) == {"IPv6": "dual"}
    assert served(node, 8085) == {"IPv4": "dual"}
    assert served(node, 8086) == {"IPv4": "four", "IPv6": "six"}
    assert served(node, 8087) == {}
    assert served(node, 8088) == {}
    publication = ctrport.publication("[::]:8087:80/tcp")
    assert publication["state"] == "waiting"
    assert publication["reason"] == "the container has no IPv6 address that the host can reach"
    publication = ctrport.publication("[::1]:8088:80/tcp")
    assert publication["state"] == "unsupported"
    assert publication["reason"] == "the kernel sends nothing on that was sent to ::1: publish on 127.0.0.1"
    assert {len(p["addresses"]) for p in ctrport.status()["publications"] if p["mapping"] == "8080:80/tcp"} == {2}

    # The node itself: at its address, and at ::1 never, so that clients go on to 127.0.0.1.
    for port in (8080, 8082, 8083, 8084):
        assert isinstance(probe_tcp(node, ADDRESS6, port), Reply), port
    for port in (8080, 8083, 8084, 8088):
        assert isinstance(probe_tcp(node, "::1", port, timeout=0.5), Refused), port
    assert isinstance(probe_tcp(node, "127.0.0.1", 8080), Reply)
    reply = probe_udp(node.client, ADDRESS6, int(ctrport.publication("8089-8091:80/udp")["bound"].split(":")[0]))
    assert isinstance(reply, Reply)
    assert (reply.name, reply.peer) == ("dual", node.client_address6)

    # What comes from the address of a link alone could not be sent on: it is refused at once, not lost.
    assert not answered_at_link(node, 8080)
    assert answered_at_link(node, 22)

    assert ctrport.stop() == 0
    assert "DOCKER" in node.run("ip6tables-nft", "-t", "nat", "-S").stdout
    ctrport.run("clean")
    assert served(node, 8080) == {}
    for container in containers:
        node.delete(container)
    assert node.tables() == before


def answered_at_link(node: Node, port: int) -> bool:
    """Whether the client is answered, and not refused, by the address that the node has on the link alone.

    At port 22 the node itself serves there.
    """
    links = json.loads(node.run("ip", "-6", "-json", "address", "show", "dev", "eth0").stdout)
    address = next(a["local"] for link in links for a in link.get("addr_info", ()) if a["scope"] == "link")
    index = int(node.client.run("cat", "/sys/class/net/eth0/ifindex").stdout)
    if port == 22:
        Server(node, 22, address="::")
    with node.client.socket(family=socket.AF_INET6) as client:
        client.settimeout(2)
        try:
            client.connect((address, port, 0, index))
        except ConnectionRefusedError:
            return False
        return client.recv(1) != b""


def test_plan_shows_what_it_would_change_of_ipv6(node: Node, ctrport: Ctrport) -> None:
    def plan() -> list[str]:
        lines: list[str] = ctrport.run("plan", "--config", str(ctrport.config), check=False).stdout.splitlines()
        return lines

    web = node.start("web")
    ctrport.configure(publish(("{container: web}", f"[{ADDRESS6}]:8080:80")))
    dnat = f"DOCKER ! -s fe80::/10 -d {ADDRESS6}/128 -p tcp -m tcp --dport 8080 "
    [line] = [line for line in plan() if "-j DNAT" in line]
    assert line.startswith(f"+ -A {dnat}")
    assert line.endswith(f"-j DNAT --to-destination [{web.address6}]:80")
    ctrport.start()
    assert plan() == ["nothing to change"]
    with ctrport.frozen():
        node.run("ip6tables-nft", "-t", "nat", "-F", "DOCKER")
        assert len([line for line in plan() if "-j DNAT" in line and line.startswith("+ ")]) == 1
    eventually(lambda: plan() == ["nothing to change"], what="the daemon having mended it")
    ctrport.stop()
    node.delete(web)
    [line] = [line for line in plan() if "-j DNAT" in line]
    assert line.startswith(f"- -D {dnat}")


def test_a_node_that_forwards_no_ipv6_serves_ipv4_until_it_does(node: Node, ctrport: Ctrport) -> None:
    serve(node.start("web"), 80, addresses=BOTH_FAMILIES)
    node.sysctl("net/ipv6/conf/all/forwarding", 0)  # CNI has just switched it on
    ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: web}", "[::]:8081:80")))
    ctrport.start(tick=OFTEN)
    assert served(node, 8080) == {"IPv4": "web"}
    assert served(node, 8081) == {}
    publication = ctrport.wait_for("[::]:8081:80/tcp", "waiting")
    assert publication["reason"] == "the node does not forward IPv6: sysctl -w net.ipv6.conf.all.forwarding=1"
    assert ctrport.publication("8080:80/tcp")["addresses"] == ["172.17.0.2"]
    assert "-j DNAT" not in node.run("ip6tables-nft", "-t", "nat", "-S", "DOCKER").stdout
    with node.client.socket() as client:  # which goes on throughout
        client.settimeout(2)
        client.connect((node.address, 8080))
        said = client.recv(200)
        node.sysctl("net/ipv6/conf/all/forwarding", 1)
        ctrport.wait_for("[::]:8081:80/tcp", "active")  # seen at the next tick
        client.send(b"more\n")
        assert client.recv(200) == said
    assert served(node, 8080) == {"IPv4": "web", "IPv6": "web"}
    assert served(node, 8081) == {"IPv6": "web"}


def test_a_node_without_ip6tables_serves_ipv4_and_says_so(node: Node, ctrport: Ctrport) -> None:
    programs = node.directory / "programs"
    programs.mkdir()
    for name in ("iptables-nft", "iptables-nft-save", "iptables-nft-restore"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    serve(node.start("web"), 80, addresses=BOTH_FAMILIES)
    ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: web}", "[::]:8081:80")))
    without = {"PATH": str(programs)}
    ctrport.start(env=without)
    assert 'WARNING note text="IPv6 is not served: ip6tables-nft-save is not installed' in ctrport.messages
    assert served(node, 8080) == {"IPv4": "web"}
    publication = ctrport.publication("[::]:8081:80/tcp")
    assert (publication["state"], publication["reason"]) == ("unsupported", "this node cannot publish on IPv6")
    # A command says it too, and does what it can.
    ended = ctrport.run("clean", "--force", env=without)
    assert ended.stdout == "every rule of ctrport is removed\n"
    assert "Traceback" not in ctrport.messages


def test_a_mapping_follows_an_address_of_the_node_that_comes_and_goes(node: Node, ctrport: Ctrport) -> None:
    mapping = f"[{COMING}]:8080:80"
    serve(node.start("web"), 80, addresses=BOTH_FAMILIES)
    ctrport.configure(publish(("{container: web}", mapping), ("{container: web}", "8081:80")))
    ctrport.start()
    assert ctrport.publication(f"{mapping}/tcp")["reason"] == f"{COMING} is not an address of this node"
    for _ in range(2):
        node.add_address(COMING)
        wait_open(node, 8080, "web", address=COMING)
        wait_open(node, 8081, "web", address=COMING)
        assert isinstance(probe_tcp(node.client, ADDRESS6, 8080), Refused)  # it is that address alone
        ctrport.wait_for(f"{mapping}/tcp", "active")
        node.run("ip", "address", "delete", f"{COMING}/64", "dev", "eth0")
        ctrport.wait_for(f"{mapping}/tcp", "waiting")
        for table in ("nat", "filter"):
            left = node.run("ip6tables-nft", "-t", table, "-S").stdout
            eventually(lambda left=left: COMING not in left, what=f"its rules of {table} being gone")  # type: ignore[misc]
    assert served(node, 8081) == {"IPv4": "web", "IPv6": "web"}


def test_the_end_of_a_container_closes_both_families(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web")
    serve(web, 80, addresses=BOTH_FAMILIES)
    ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: web}", "8080:80/udp")))
    ctrport.start()
    with node.client.socket(socket.SOCK_DGRAM, socket.AF_INET6) as client:
        assert isinstance(probe_udp(node.client, ADDRESS6, 8080, over=client), Reply)
    assert web.address6 is not None
    assert web.address6 in node.run("conntrack", "-L", "-f", "ipv6").stdout
    node.kill(web)
    wait_closed(node, 8080)
    eventually(
        lambda: "ctrport default/web" not in node.run("ip6tables-nft-save").stdout, what="the rules of IPv6 being gone"
    )
    assert served(node, 8080) == {}
    eventually(
        lambda: "dport=8080" not in node.run("conntrack", "-L", "-f", "ipv6", "-p", "udp").stdout,
        what="no flow being left",
    )
