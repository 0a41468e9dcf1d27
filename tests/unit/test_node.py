"""What the node is like, as its files say."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from ctrport import endpoints, node
from ctrport.endpoints import Gone
from ctrport.model import Family, Protocol
from tests.unit.test_endpoints import JUST_MADE, OF_ALL_KINDS, ON_A_BRIDGE


def pretend(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """Have these files below /proc, and no others."""

    def read(path: str) -> str:
        if path not in files:
            raise Gone(f"{path} is gone") from FileNotFoundError()
        return files[path]

    monkeypatch.setattr(endpoints, "read", read)
    monkeypatch.setattr(node, "read", read)


def test_this_machines_own_addresses_are_read() -> None:
    assert IPv4Address("127.0.0.1") in node.look().facts.addresses


def test_this_machines_own_addresses_of_ipv6_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/self/net/if_inet6": JUST_MADE + OF_ALL_KINDS, "/proc/self/net/fib_trie": ON_A_BRIDGE}
    files |= {"/proc/sys/net/ipv4/ip_forward": "0\n", "/proc/sys/net/ipv6/conf/all/forwarding": "1\n"}
    pretend(monkeypatch, files)
    facts = node.look().facts
    assert facts.forwarding == {Family.IPV6}
    assert {str(each) for each in facts.addresses if each.version == 6} == {
        *("::1", "fd00:17::a", "fd00:17::5", "2001:db8:a::7", "fd00:17::9")
    }
    assert {str(each) for each in facts.addresses if each.version == 4} == {"127.0.0.1", "172.17.0.2"}


def test_a_node_without_ipv6_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"/proc/sys/net/ipv4/ip_forward": "1\n", "/proc/self/net/fib_trie": ON_A_BRIDGE})
    facts = node.look().facts
    assert facts.forwarding == {Family.IPV4}
    assert {each.version for each in facts.addresses} == {4}


def test_a_bridge_that_is_not_there_is_named() -> None:
    found = node.look(["ctrport-none", "lo"])
    assert found.facts.networks == ()
    assert found.amiss == {
        "ctrport-none": "there is no bridge ctrport-none yet",
        "lo": "lo is a physical device and no bridge: nothing is done to it",
    }


def test_where_there_is_no_cilium_there_is_no_warning() -> None:
    assert node.look().warnings == ()


FILES = {
    "/proc/sys/net/ipv4/ip_forward": "1\n",
    "/proc/sys/net/ipv6/conf/all/forwarding": "1\n",
    "/proc/self/net/fib_trie": ON_A_BRIDGE,
    "/proc/self/net/if_inet6": JUST_MADE,
    "/proc/sys/net/ipv4/ip_local_reserved_ports": "\n",
}


@pytest.mark.parametrize("path", FILES)
def test_a_node_that_is_as_it_was_is_made_sense_of_once(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    files = dict(FILES)
    pretend(monkeypatch, files)
    known = node.look()
    assert node.look((), known) is known
    changed = {"/proc/self/net/fib_trie": "", "/proc/self/net/if_inet6": JUST_MADE + OF_ALL_KINDS}
    files[path] = changed.get(path, "0\n")
    found = node.look((), known)
    assert found is not known
    assert found == node.look()
    assert node.look((), found) is found


def test_what_no_file_says_is_looked_at_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, FILES)
    known = node.look()
    found = node.look(["ctrport-none"], known)
    assert list(found.amiss) == ["ctrport-none"]
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr("ctrport.conntrack.tracked", lambda: frozenset({Protocol.SCTP}))
        assert node.look((), known).facts.protocols == {Protocol.SCTP}
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(node, "CILIUM_DEVICE", "lo")
        assert node.look((), known).warnings == (node.CILIUM,)
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(node, "IPVS_DEVICE", "lo")
        assert IPv4Address("127.0.0.1") in node.look((), known).facts.services
    assert node.look((), found) == known


def test_whether_the_node_forwards_is_read_from_the_kernel() -> None:
    with open("/proc/sys/net/ipv4/ip_forward", encoding="ascii") as switch:
        forwards = switch.read().strip() == "1"
    assert (Family.IPV4 in node.look().facts.forwarding) is forwards
