"""The hairpin mode of a bridge port: when a container needs it to reach its own published port, and what it costs."""

from __future__ import annotations

import json

import pytest

from ctrport import hairpin
from ctrport.model import Endpoint, Family
from embedded.container import Container
from embedded.node import Node
from embedded.traffic import Outcome, Server, eventually, probe_tcp
from tests.node.modules import call, call_each, find

pytestmark = pytest.mark.docker0(subnet6="fd00:17::/64", hairpin=False)  # its plugin switches no hairpin mode on

SWITCHES = {Family.IPV4: "bridge-nf-call-iptables", Family.IPV6: "bridge-nf-call-ip6tables"}
OF_THE_BRIDGE = {Family.IPV4: "nf_call_iptables", Family.IPV6: "nf_call_ip6tables"}
OTHER = {Family.IPV4: Family.IPV6, Family.IPV6: Family.IPV4}


@pytest.fixture
def node(node: Node) -> Node:
    """That node, where iptables is not asked about bridged frames."""
    for switch in SWITCHES.values():
        node.sysctl(f"net/bridge/{switch}", 0)
    return node


def publish(node: Node, web: Container) -> None:
    """Publish port 80 as 8080 in both families, by hand."""
    for program, own, public in (
        ("iptables-nft", web.address, node.address),
        ("ip6tables-nft", web.address6, node.address6),
    ):
        assert own is not None
        to = f"[{own}]:80" if ":" in own else f"{own}:80"
        node.run(program, *f"-t nat -A PREROUTING -d {public} -p tcp --dport 8080 -j DNAT --to {to}".split())
        node.run(program, *f"-t nat -I POSTROUTING -s {own} -d {own} -p tcp --dport 80 -j MASQUERADE".split())


def port_of(node: Node, web: Container) -> str:
    found = find(node, web)
    assert isinstance(found, Endpoint)
    port = found.attachments[0].port
    assert port is not None
    return port


def reach_oneself(node: Node, web: Container, family: Family) -> Outcome:
    return probe_tcp(web, node.address if family is Family.IPV4 else node.address6, 8080, timeout=0.3)


@pytest.mark.parametrize("family", Family)
def test_a_container_reaches_its_own_port_only_with_it_where_it_is_needed(node: Node, family: Family) -> None:
    web = node.start("web")
    Server(web, 80)
    Server(web, 80, address="::")
    publish(node, web)
    port = port_of(node, web)

    def needed(*families: Family) -> list[bool]:
        return call_each(node, *((hairpin.is_needed, "docker0", each) for each in families))

    assert needed(family) == [False]
    assert not call(node, hairpin.is_on, port)
    assert reach_oneself(node, web, family)

    def only_with_it() -> None:
        assert needed(family, OTHER[family]) == [True, False]
        assert not reach_oneself(node, web, family)
        nobody = [f"none{number}" for number in range(hairpin.MANY)]
        many = (hairpin.lacking, [port, *nobody])
        assert call_each(node, many) == [[port, *nobody]]
        assert call_each(node, (hairpin.switch, port, True), (hairpin.is_on, port), many) == [True, True, nobody]
        assert reach_oneself(node, web, family)
        again = (hairpin.switch, port, True)
        off = (hairpin.switch, port, False)
        assert call_each(node, again, off, (hairpin.is_on, port)) == [False, True, False]

    node.sysctl(f"net/bridge/{SWITCHES[family]}", 1)
    only_with_it()
    node.sysctl(f"net/bridge/{SWITCHES[family]}", 0)
    assert reach_oneself(node, web, family)
    node.run("ip", "link", "set", "docker0", "type", "bridge", OF_THE_BRIDGE[family], "1")
    only_with_it()


def test_switching_it_changes_nothing_else_of_the_port(node: Node) -> None:
    port = port_of(node, node.start("web"))
    node.run("ip", "link", "set", port, "type", "bridge_slave", "isolated", "on", "cost", "77", "mcast_flood", "off")

    def settings() -> dict[str, object]:
        link = json.loads(node.run("ip", "-json", "-details", "link", "show", "dev", port).stdout)[0]
        found: dict[str, object] = link["linkinfo"]["info_slave_data"]
        return {key: value for key, value in found.items() if "timer" not in key}

    before = settings()
    assert (before["cost"], before["isolated"], before["hairpin"]) == (77, True, False)
    assert call(node, hairpin.switch, port, True)
    assert settings() == before | {"hairpin": True}


def test_what_is_gone_or_no_port_has_none(node: Node) -> None:
    port = port_of(node, node.start("web"))
    assert call(node, hairpin.switch, port, True)
    node.run("ip", "link", "set", port, "nomaster")
    for name in (port, "docker0", "eth0", "lo", "nowhere"):
        asked = ((hairpin.is_on, name), (hairpin.switch, name, True), (hairpin.switch, name, False))
        assert call_each(node, *asked) == [False, False, False]
    assert not call(node, hairpin.is_needed, "nowhere", Family.IPV6)


def test_a_container_takes_an_address_though_it_hears_its_own_question(node: Node) -> None:
    web = node.start("web")
    assert call(node, hairpin.switch, port_of(node, web), True)
    conf = "/proc/sys/net/ipv6/conf"
    web.run("sh", "-ec", f"echo 1 >{conf}/eth0/accept_dad")

    def taken(address: str, *, nonce: bool) -> bool:
        web.run("sh", "-ec", f"for conf in all eth0; do echo {nonce:d} >{conf}/$conf/enhanced_dad; done")
        web.run("ip", "address", "add", f"{address}/64", "dev", "eth0")
        shown = ("ip", "-6", "-json", "address", "show", "dev", "eth0")

        def decided() -> str:
            infos = [info for link in json.loads(web.run(*shown).stdout) for info in link.get("addr_info", ())]
            its = next(info for info in infos if info["local"] == address)
            return "no" if "dadfailed" in its else "" if "tentative" in its else "yes"

        return eventually(decided, what=f"{address} being taken or not") == "yes"

    assert taken("fd00:17::77", nonce=True)
    assert not taken("fd00:17::78", nonce=False)  # what the module warns of
