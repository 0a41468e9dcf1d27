"""Host ports that are reserved, and those that somebody has already: with the daemon, other processes and packets.

All share one node, whose containers run already when the daemon starts: web with IPv4 alone, dual with IPv6 too.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from functools import partial

import pytest

from embedded.container import Container
from embedded.host import Place
from embedded.network import Network
from embedded.node import Node
from embedded.traffic import (
    BOTH_FAMILIES,
    Outcome,
    Refused,
    Reply,
    Server,
    TimedOut,
    eventually,
    probe_tcp,
    probe_udp,
    serve,
)
from tests.node.daemon import OFTEN, Ctrport, Listener, publish, wait_open

pytestmark = pytest.mark.node_of_many

SECOND = "198.51.100.3"  # another address of the node on the LAN
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
WEB, DUAL = "{container: web}", "{container: dual}"
NOTHING = "nothing to change\n"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A node with the containers web and dual, and room for pods."""
    with Node(cri=True) as node:
        node.sysctl("net/ipv4/icmp_ratelimit", 0)  # or a client is told only once a second that a UDP port is closed
        node.sysctl("net/ipv6/icmp/ratelimit", 0)
        node.start_containerd()
        node.add_address(SECOND)
        node.add_network("docker0")
        node.add_network("dual0", subnet="172.18.0.0/16", subnet6="fd00:18::/64")
        started(node, "web")
        started(node, "dual", node.networks[1])
        yield node


def started(node: Node, name: str, network: Network | None = None) -> Container:
    """Start a container that serves TCP and UDP, on IPv4 and IPv6."""
    container = node.start(name, network=network or node.networks[0])
    serve(container, *range(80, 90), addresses=BOTH_FAMILIES)
    return container


def can_bind(node: Node, port: int, address: str, kind: socket.SocketKind, *options: int) -> bool:
    """Whether another process of the node can have a port."""
    with node.socket(kind, socket.AF_INET6 if ":" in address else socket.AF_INET) as other:
        for option in options:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            other.bind((address, port))
        except OSError:
            return False
        return True


def bindable(node: Node, port: int) -> set[tuple[str, str]]:
    """Return on which addresses others can have a port, and with what protocol; however they ask for it."""
    asked = ((), (socket.SO_REUSEADDR,), (socket.SO_REUSEPORT,))
    return {
        (address, "tcp" if kind is TCP else "udp")
        for address in ("0.0.0.0", "127.0.0.1", node.address, "::", "::1")
        for kind in (TCP, UDP)
        if any(can_bind(node, port, address, kind, *options) for options in asked)
    }


EVERYWHERE = {(a, p) for a in ("0.0.0.0", "127.0.0.1", Node.address, "::", "::1") for p in ("tcp", "udp")}


def at_once(place: Place, address: str, port: int) -> Outcome:
    """Connect, and see that the answer, whatever it is, is there at once."""
    began = time.monotonic()
    outcome = probe_tcp(place, address, port)
    assert time.monotonic() - began < 1  # one that is dropped takes two seconds to be given up
    return outcome


def rules(node: Node, mapping: str) -> list[str]:
    """Return the rules of a mapping, as they are saved, with their counters."""
    saved = node.run("iptables-nft-save", "-c").stdout.splitlines()
    return [line for line in saved if '"ctrport default/' in line and f" {mapping} " in line]


def plan(ctrport: Ctrport) -> tuple[int, str]:
    ended = ctrport.run("plan", "--config", str(ctrport.config), check=False)
    return ended.returncode, ended.stdout


# Reserved


def test_nobody_else_gets_a_published_port_until_its_end(node: Node, ctrport: Ctrport) -> None:
    short = started(node, "short", node.networks[1])
    entries = [(WEB, "8080:80"), (DUAL, "8081:80"), ("{container: short}", "8082:80")]
    ctrport.configure(publish(*((match, f"{ports}/{p}") for match, ports in entries for p in ("tcp", "udp"))))
    assert all(bindable(node, port) == EVERYWHERE for port in (8080, 8081, 8082))
    ctrport.start()
    for _, ports in entries:
        assert ctrport.wait_for(f"{ports}/tcp", "active")["reason"] == ""
        assert ctrport.wait_for(f"{ports}/udp", "active")["reason"] == ""
    # What serves no IPv6 keeps nobody from it: only who wants both families at once, as "::" does here.
    assert bindable(node, 8080) == {("::1", "tcp"), ("::1", "udp")}
    assert bindable(node, 8081) == set()
    assert bindable(node, 8082) == set()
    assert plan(ctrport) == (0, NOTHING)
    node.delete(short)
    eventually(lambda: bindable(node, 8082) == EVERYWHERE, what="the port of a container that ended being free")
    assert bindable(node, 8081) == set()
    ctrport.stop()
    assert bindable(node, 8080) == bindable(node, 8081) == EVERYWHERE


def test_a_port_that_was_reserved_and_then_decided_otherwise_is_let_go(node: Node, ctrport: Ctrport) -> None:
    # The older takes 8001, for 8000 is wanted by name, and the newer 8000. But 8001 is held, so the older has 8000.
    older, newer = started(node, "older"), started(node, "newer")
    ctrport.configure(publish(("{container: older}", "8000-8001:80"), ("{container: newer}", "8000:80")))
    with Listener(node, 8001):
        ctrport.start()
        assert ctrport.wait_for("8000-8001:80/tcp", "active")["bound"] == "8000:80/tcp"
        reason = ctrport.wait_for("8000:80/tcp", "conflict")["reason"]
        assert reason == "host port 8000/tcp is held by default/older (8000:80/tcp)"
        node.delete(newer)
        node.delete(older)
        ctrport.wait_for("8000-8001:80/tcp", "waiting")
        eventually(lambda: bindable(node, 8000) == EVERYWHERE, within=3, what="the port being free")


def test_a_client_that_reaches_the_socket_is_refused_at_once(node: Node, ctrport: Ctrport) -> None:
    settings = "firewall: {localhost: false}"
    entries = [
        (match, f"{ports}/{p}") for match, ports in ((WEB, "8060:80"), (DUAL, "8061:80")) for p in ("tcp", "udp")
    ]
    ctrport.configure(publish(*entries, settings=settings))
    # Without the sockets, who asks by UDP is told by ICMP.
    assert isinstance(probe_udp(node, "127.0.0.1", 8060), Refused)
    assert isinstance(probe_udp(node, "::1", 8061), Refused)
    ctrport.start()
    wait_open(node, 8060, "web")
    wait_open(node, 8061, "dual", address=node.address6)
    for port in (8060, 8061):
        assert isinstance(at_once(node, "127.0.0.1", port), Refused)
        assert isinstance(at_once(node, "::1", port), Refused)
        assert isinstance(probe_udp(node, "127.0.0.1", port, timeout=0.3), TimedOut)
    assert isinstance(probe_udp(node, "::1", 8061, timeout=0.3), TimedOut)
    assert isinstance(probe_udp(node, "::1", 8060), Refused)  # nothing of ours is there
    assert isinstance(probe_udp(node.client, node.address, 8060), Reply)


def test_with_localhost_on_only_the_ipv6_loopback_reaches_the_socket(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(publish((WEB, "8080:80"), (DUAL, "8081:80")))
    ctrport.start()
    wait_open(node, 8080, "web")
    wait_open(node, 8081, "dual")
    for port in (8080, 8081):
        assert isinstance(at_once(node, "127.0.0.1", port), Reply)
        assert isinstance(at_once(node, "::1", port), Refused)


# firewall.reserve_limit


def test_beyond_the_limit_a_port_is_served_and_said_not_to_be_reserved(node: Node, ctrport: Ctrport) -> None:
    settings = "firewall: {reserve_limit: 2}"
    # What counts are ports: 8080 takes two sockets, as dual has IPv6 too.
    ctrport.configure(
        publish((DUAL, "8080:80"), (WEB, "8081:80"), (WEB, "8082:80"), (WEB, "8083:80"), settings=settings)
    )
    with Listener(node, 8083) as webserver:
        ctrport.start()
        reasons = {port: ctrport.wait_for(f"{port}:80/tcp", "active")["reason"] for port in (8080, 8081, 8082)}
        beyond = [port for port, reason in reasons.items() if reason]
        assert len(beyond) == 1
        said = "not reserved, only looked at: firewall.reserve_limit (2) is reached"
        assert reasons[beyond[0]] == said
        assert re.search(rf'mapping={beyond[0]}:80/tcp .*remark="{re.escape(said)}"', ctrport.messages)
        assert said in ctrport.run("ps").stdout
        assert {port for port in reasons if can_bind(node, port, "0.0.0.0", TCP)} == {beyond[0]}
        wait_open(node, beyond[0])
        assert ctrport.wait_for("8083:80/tcp", "conflict")["reason"] == f"host port 8083/tcp is held by {webserver}"


def test_with_limit_0_nothing_is_reserved(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(publish((WEB, "8080:80"), (WEB, "8081:80"), settings="firewall: {reserve_limit: 0}"))
    with Listener(node, 8081):
        ctrport.start()
        for port in (8080, 8081):
            assert ctrport.wait_for(f"{port}:80/tcp", "active")["reason"] == ""
            wait_open(node, port, "web")
        assert bindable(node, 8080) == EVERYWHERE


# Held by somebody else


NODE_PORT = """
iptables-nft -t nat -N KUBE-EXT-A
iptables-nft -t nat -N KUBE-NODEPORTS
iptables-nft -t nat -A KUBE-NODEPORTS -p tcp -m comment --comment shop/web:http -m tcp --dport 8086 -j KUBE-EXT-A
"""
NO_NODE_PORT = """
iptables-nft -t nat -F KUBE-NODEPORTS
iptables-nft -t nat -X KUBE-NODEPORTS
iptables-nft -t nat -X KUBE-EXT-A
"""


def test_who_holds_a_port_is_named_and_it_is_had_when_they_end(node: Node, ctrport: Ctrport) -> None:
    wanted = (*(f"{port}:{port - 8000}" for port in (8080, 8081, 8082, 8084, 8085, 8086)), "8083:83/udp")
    ctrport.configure(publish((DUAL, "8089:89"), *((WEB, mapping) for mapping in wanted), (WEB, "8087-8087:87")))
    nc = ("/bin/nc", "-ll", "-p", "8084", "-e", "/bin/echo", "here")
    on_host = node.start("on-host", network="host", command=nc)
    pod = node.start_pod("on-host", host_network=True)
    member = pod.start("nc", command=("/bin/nc", "-ll", "-p", "8085", "-e", "/bin/echo", "here"))
    node.script(NODE_PORT)
    with contextlib.ExitStack() as held:
        wildcard = held.enter_context(Listener(node, 8080))
        loopback = held.enter_context(Listener(node, 8081, address="127.0.0.1", name="sidecar"))
        both = held.enter_context(Listener(node, 8082, address="::"))
        datagrams = held.enter_context(Listener(node, 8083, kind=UDP, name="dnsmasq"))
        pooled = held.enter_context(Listener(node, 8087))
        for port in (8084, 8085):
            eventually(partial(probe_tcp, node, "127.0.0.1", port), what=f"port {port} being served")
        assert not any(" 8080" in line for line in plan(ctrport)[1].splitlines() if line.startswith("+"))
        holders = {
            "8080:80/tcp": f"host port 8080/tcp is held by {wildcard}",
            "8081:81/tcp": f"host port 8081/tcp is held by {loopback}",
            "8082:82/tcp": f"host port 8082/tcp is held by {both}",
            "8083:83/udp": f"host port 8083/udp is held by {datagrams}",
            "8084:84/tcp": f"host port 8084/tcp is held by nc (pid {on_host.pid}) in container default/on-host",
            "8085:85/tcp": f"host port 8085/tcp is held by nc (pid {member.pid}) in container k8s.io/{member.id}",
            "8086:86/tcp": "host port 8086/tcp is held by KUBE-NODEPORTS (shop/web:http)",
            "8087:87/tcp": f"host port 8087/tcp is held by {pooled}",
        }
        ctrport.start(tick=OFTEN)
        for mapping, reason in holders.items():
            assert ctrport.wait_for(mapping, "conflict", "web")["reason"] == reason
            assert f"mapping={mapping} source=" in ctrport.messages
            assert f'reason="{reason}"' in ctrport.messages
            assert rules(node, mapping) == []
        with node.client.socket() as client:
            client.settimeout(2)
            client.connect((node.address, 8089))
            hello = client.recv(100)
            undisturbed = rules(node, "8089:89/tcp")
            held.close()
            node.delete(on_host)
            node.remove_pod(pod)
            node.script(NO_NODE_PORT)
            for mapping in holders:
                ctrport.wait_for(mapping, "active", "web")
            assert rules(node, "8089:89/tcp") == undisturbed
            client.sendall(b"still there?\n")
            assert client.recv(100) == hello
    for mapping in holders:
        port = int(mapping[:4])
        outcome = (probe_udp if mapping.endswith("udp") else probe_tcp)(node.client, node.address, port)
        assert isinstance(outcome, Reply), (mapping, outcome)
        assert (outcome.name, outcome.port) == ("web", port - 8000)
    assert ctrport.messages.count(" conflict ") == len(holders)  # said once each, however often it was tried


def test_a_port_that_was_taken_while_the_daemon_was_away_is_withdrawn(node: Node, ctrport: Ctrport) -> None:
    pool = "8090-8091:81/tcp"
    ctrport.configure(publish((WEB, "8080:80"), (WEB, "8090-8091:81"), (DUAL, "8081:80")))
    ctrport.start()
    wait_open(node, 8080, "web")
    wait_open(node, 8081, "dual")
    assert ctrport.wait_for(pool, "active")["bound"] == "8090:81/tcp"
    ctrport.stop()
    with Listener(node, 8080) as webserver, Listener(node, 8090):
        reason = f"host port 8080/tcp is held by {webserver}"
        code, planned = plan(ctrport)
        assert code == 3
        gone, come = ([line for line in planned.splitlines() if line.startswith(sign)] for sign in "-+")
        assert all(" 8080:80/tcp " in line or " 8090:81/tcp of " in line for line in gone)
        assert any(" 8080:80/tcp " in line for line in gone)
        assert come
        assert all(" 8091:81/tcp of " in line for line in come)
        assert reason in ctrport.run("ps", "--config", str(ctrport.config)).stdout
        kept = rules(node, "8081:80/tcp")
        ctrport.start()
        assert ctrport.wait_for("8080:80/tcp", "conflict")["reason"] == reason
        assert f'reason="{reason}"' in ctrport.messages
        assert rules(node, "8080:80/tcp") == []
        assert rules(node, "8081:80/tcp") == kept
        assert ctrport.wait_for(pool, "active")["bound"] == "8091:81/tcp"
        assert wait_open(node, 8091, "web").port == 81
        # What is at the port is the process that has it.
        with node.client.socket() as client:
            client.connect((node.address, 8080))


# What overlaps


def test_overlap_is_what_the_kernel_says(node: Node, ctrport: Ctrport) -> None:
    served = [
        (WEB, "127.0.0.1:8080:80"),
        (DUAL, f"{Node.address}:8080:81"),
        (WEB, "8000-8005:80-85"),
        (DUAL, "8006-8010:80-84"),
        (WEB, "8053:82/tcp"),
        (DUAL, "8053:83/udp"),
        (WEB, f"{Node.address}:8070:84"),
        (WEB, "0.0.0.0:8071:84"),
    ]
    refused = [
        (DUAL, "127.0.0.1:8071:80", "host port 8071/tcp is held by default/web (0.0.0.0:8071:84/tcp)"),
        (DUAL, "8005:80", "host port 8005/tcp is held by default/web (8000-8005:80-85/tcp)"),
        (DUAL, "8010-8012:80-82", "host port 8010/tcp is held by default/dual (8006-8010:80-84/tcp)"),
        (DUAL, "8070:80", f"host port 8070/tcp is held by default/web ({Node.address}:8070:84/tcp)"),
    ]
    ctrport.configure(publish(*served, *((match, mapping) for match, mapping, _ in refused)))
    # Beside a mapping of one address, others are as free as before.
    with Server(node, 8070, address=SECOND, name="other"):
        ctrport.start()
        for match, mapping in served:
            ctrport.wait_for(mapping if "/" in mapping else f"{mapping}/tcp", "active", match[12:-1])
        for match, mapping, reason in refused:
            assert ctrport.wait_for(f"{mapping}/tcp", "conflict", match[12:-1])["reason"] == reason
        assert answer(probe_tcp(node.client, SECOND, 8070)) == ("other", 8070)
        assert answer(probe_tcp(node.client, node.address, 8070)) == ("web", 84)
    assert answer(probe_tcp(node, "127.0.0.1", 8080)) == ("web", 80)
    assert answer(probe_tcp(node.client, node.address, 8080)) == ("dual", 81)
    for offset in range(11):
        expected = ("web", 80 + offset) if offset < 6 else ("dual", 74 + offset)
        assert answer(probe_tcp(node.client, node.address, 8000 + offset)) == expected
    assert answer(probe_tcp(node.client, node.address, 8053)) == ("web", 82)
    assert answer(probe_udp(node.client, node.address, 8053)) == ("dual", 83)


def answer(outcome: Outcome) -> tuple[str, int]:
    """Return who answered, and at which port of its own."""
    assert isinstance(outcome, Reply), outcome
    return outcome.name, outcome.port
