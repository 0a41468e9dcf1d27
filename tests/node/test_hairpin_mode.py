"""The hairpin mode of bridge ports as the daemon keeps it: on where a published container needs it, and put back."""

from __future__ import annotations

import pytest

from ctrport import hairpin
from ctrport.model import Endpoint
from embedded.container import Container
from embedded.node import Node
from embedded.traffic import BOTH_FAMILIES, Reply, eventually, probe_tcp, probe_udp, serve
from tests.node.daemon import Ctrport, publish, wait_open
from tests.node.modules import call, find

pytestmark = pytest.mark.docker0(subnet6="fd00:17::/64", hairpin=False)  # its plugin switches no hairpin mode on

SECOND = "198.51.100.3"
LATER = ("{container: later}", "8081:80")
SWITCHES = ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables")


@pytest.fixture
def node(node: Node) -> Node:
    """That node, where iptables is asked about bridged frames."""
    set_switches(node, 1)
    return node


def set_switches(node: Node, value: int) -> None:
    for switch in SWITCHES:
        node.sysctl(f"net/bridge/{switch}", value)


def port_of(node: Node, container: Container) -> str:
    found = find(node, container)
    assert isinstance(found, Endpoint)
    port = found.attachments[0].port
    assert port is not None
    return port


def is_on(node: Node, port: str) -> bool:
    return call(node, hairpin.is_on, port)


def test_a_container_reaches_its_own_port_where_bridged_frames_are_asked_about(node: Node, ctrport: Ctrport) -> None:
    web, bystander = node.start("web"), node.start("bystander")
    serve(web, 80, addresses=BOTH_FAMILIES)
    ctrport.configure(publish(*(("{container: web}", f"8080:80/{kind}") for kind in ("tcp", "udp")), LATER))
    port, its = port_of(node, web), port_of(node, bystander)
    assert not is_on(node, port)
    ctrport.start()
    assert is_on(node, port)
    assert not is_on(node, its)  # who is not published keeps it as it was
    for reply in (
        probe_tcp(web, node.address, 8080),
        probe_tcp(web, node.address6, 8080),
        probe_udp(web, node.address, 8080),
    ):
        assert isinstance(reply, Reply)
        assert reply.name == "web"
    later = node.start("later")
    serve(later, 80, addresses=BOTH_FAMILIES)
    ctrport.wait_for("8081:80/tcp", "active")
    assert is_on(node, port_of(node, later))
    assert isinstance(probe_tcp(later, node.address, 8081), Reply)


def test_it_is_on_until_the_last_mapping_leaves(node: Node, ctrport: Ctrport) -> None:
    for address in (SECOND, "2001:db8:51::3"):
        node.add_address(address)
    web = node.start("web")
    serve(web, 80, addresses=BOTH_FAMILIES)
    port = port_of(node, web)
    one, other = f"{SECOND}:8080:80", "[2001:db8:51::3]:8081:80"
    ctrport.configure(publish(("{container: web}", one), ("{container: web}", other)))
    ctrport.start()
    assert is_on(node, port)
    node.run("ip", "address", "delete", f"{SECOND}/24", "dev", "eth0")
    ctrport.wait_for(f"{one}/tcp", "waiting")
    assert is_on(node, port)
    node.run("ip", "address", "delete", "2001:db8:51::3/64", "dev", "eth0")
    ctrport.wait_for(f"{other}/tcp", "waiting")
    eventually(lambda: not is_on(node, port), what="it being off again")
    node.add_address(SECOND)
    ctrport.wait_for(f"{one}/tcp", "active")
    assert is_on(node, port)


def test_it_stays_on_where_it_was_on_before(node: Node, ctrport: Ctrport) -> None:
    node.add_address(SECOND)
    web = node.start("web", network=node.add_network("cni1", subnet="172.18.0.0/16", hairpin=True))
    port = port_of(node, web)
    assert is_on(node, port)
    ctrport.configure(publish(("{container: web}", f"{SECOND}:8080:80")))
    ctrport.start()
    node.run("ip", "address", "delete", f"{SECOND}/24", "dev", "eth0")
    ctrport.wait_for(f"{SECOND}:8080:80/tcp", "waiting")
    assert is_on(node, port)
    assert ctrport.stop() == 0
    ctrport.run("clean")
    assert is_on(node, port)


@pytest.mark.parametrize(
    ("asked", "mappings"), [(0, ["127.0.0.1:8080:80", "[2001:db8:51::1]:8080:80"]), (1, ["0.0.0.0:8080:80"])]
)
def test_it_is_left_alone_where_it_is_not_needed(node: Node, ctrport: Ctrport, asked: int, mappings: list[str]) -> None:
    # Asked about the one family alone, and published on the other, or where no container can call.
    node.sysctl(f"net/bridge/{SWITCHES[1 - asked]}", 0)
    web = node.start("web")
    ctrport.configure(publish(*(("{container: web}", mapping) for mapping in mappings)))
    ctrport.start()
    for mapping in mappings:
        ctrport.wait_for(f"{mapping}/tcp", "active")
    assert not is_on(node, port_of(node, web))


def test_it_is_left_alone_where_bridged_frames_are_not_asked_about(node: Node, ctrport: Ctrport) -> None:
    set_switches(node, 0)
    web = node.start("web")
    serve(web, 80, addresses=BOTH_FAMILIES)
    ctrport.configure(publish(("{container: web}", "8080:80")))
    ctrport.start()
    wait_open(node, 8080, "web")
    assert not is_on(node, port_of(node, web))
    for address in (node.address, node.address6):
        assert isinstance(probe_tcp(web, address, 8080), Reply)


def test_plan_shows_it(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web")
    port = port_of(node, web)
    ctrport.configure(publish(("{container: web}", "8080:80")))
    line = f"+ bridge link set dev {port} hairpin on"

    def plan() -> tuple[int, list[str]]:
        ended = ctrport.run("plan", "--config", str(ctrport.config), check=False)
        return ended.returncode, ended.stdout.splitlines()

    code, lines = plan()
    assert (code, lines[-1]) == (3, line)
    assert not is_on(node, port)  # it was only asked
    ctrport.start()
    assert plan() == (0, ["nothing to change"])
    node.run("bridge", "link", "set", "dev", port, "hairpin", "off")
    assert plan() == (3, [line])
