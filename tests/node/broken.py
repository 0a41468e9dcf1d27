"""Nodes that are broken in one way each: how, whose packets show it, and what `ctrport explain` is to say of it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import portmap
from embedded.container import Container
from embedded.host import Place
from embedded.node import Node
from embedded.traffic import Outcome, Refused, Reply, TimedOut, eventually, probe_tcp, probe_udp
from tests.node.daemon import OFTEN, Ctrport, Listener

RULESETS = Path(__file__).parent / "rulesets"
CLIENT, NODE, NODE6, SECOND = Node.client_address, Node.address, Node.address6, "198.51.100.7"

CONFIG = f"""
networks: [{{bridge: docker0}}, {{bridge: net1}}]
publish:
  - match: {{container: web}}
    ports: ["8080:80", "8081:81", "8082:82", "30080:80", "9090:80", "8086:80", "{SECOND}:8085:80", "5353:53/udp"]
  - {{match: {{container: web}}, ports: ["8083:80", "8083:53/udp"], sources: [203.0.113.0/24]}}
  - {{match: {{container: web}}, ports: ["8084:80"], interface: docker0}}
  - {{match: {{container: shop}}, ports: ["8088:80"]}}
  - {{match: {{container: brief}}, ports: ["8089:80"]}}
  - {{match: {{container: nobody}}, ports: ["8087:80"]}}
"""


class Stage(Node):
    """A node that publishes ports of ``web``; ``sibling`` is beside it, ``other`` on another network.

    ``service`` is on a network that ctrport does not run, for ports that others publish. In ``shop`` a real program
    listens.
    """

    web: Container
    sibling: Container
    other: Container
    service: Container
    shop: Container
    ctrport: Ctrport
    commands: subprocess.Popen[str]


# What sends packets


Probe = Callable[[Stage], Outcome]


def sent(sender: str = "client", port: int = 8080, address: str = NODE, *, udp: bool = False) -> Probe:
    """Return what sends from there, and says what became of it."""

    def probe(stage: Stage) -> Outcome:
        place: Place = stage if sender == "node" else getattr(stage, sender)
        return (probe_udp if udp else probe_tcp)(place, address, port, timeout=0.4)

    return probe


def answered_by_another(port: int) -> Probe:
    """Return what sees that somebody else answers, which is no answer of who is to have the port."""

    def probe(stage: Stage) -> Outcome:
        outcome = probe_tcp(stage.client, NODE, port, timeout=1)
        assert isinstance(outcome, Reply), outcome
        assert outcome.name == "service", outcome
        return Refused("another answered")

    return probe


def asked_for_a_page(stage: Stage) -> Outcome:
    """Ask the program in ``shop``: of one that is paused the kernel takes connections yet."""
    with stage.client.socket() as client:
        client.settimeout(0.4)
        try:
            client.connect((NODE, 8088))
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return Reply(client.recv(100).decode(), ("", 0))
        except TimeoutError as error:
            return TimedOut(str(error))


# What breaks a node, and mends it


Break = Callable[[Stage], contextlib.AbstractContextManager[None]]


def shell(breaks: str, mends: str, *, frozen: bool = False, on: str = "node") -> Break:
    """Break and mend by lines of shell, on the node or in a container's network.

    ``frozen`` holds the daemon still, which would mend it; afterwards the tables are as they were.
    """

    @contextlib.contextmanager
    def broken(stage: Stage) -> Iterator[None]:
        place: Place = stage if on == "node" else getattr(stage, on)
        before = stage.tables()
        with stage.ctrport.frozen() if frozen else contextlib.nullcontext():
            place.run("sh", "-ec", breaks)
            try:
                yield
            finally:
                place.run("sh", "-ec", mends)
        eventually(lambda: stage.tables() == before, what="the tables being as they were")

    return broken


def iptables(rule: str, *, frozen: bool = False, program: str = "iptables-nft", table: str = "filter") -> Break:
    """Have a rule, given as what stands behind -A or -I, and delete it."""
    how, _, rest = rule.partition(" ")
    return shell(f"{program} -t {table} {how} {rest}", f"{program} -t {table} -D {rest}", frozen=frozen)


def nft(table: str, text: str) -> Break:
    """Have a table of somebody's."""
    return shell(f"nft -f - <<'END'\ntable {table} {{\n{text}\n}}\nEND", f"nft delete table {table}")


def setting(path: str, value: int, usual: int) -> Break:
    return shell(f"echo {value} >/proc/sys/net/{path}", f"echo {usual} >/proc/sys/net/{path}", frozen=True)


@contextlib.contextmanager
def stopped_and_flushed(stage: Stage) -> Iterator[None]:
    stage.ctrport.stop()
    stage.ctrport.run("clean")
    yield
    stage.ctrport.start(tick=OFTEN)


@contextlib.contextmanager
def container_gone(stage: Stage) -> Iterator[None]:
    """Have rules for a container that ended while no daemon ran."""
    brief = stage.start("brief")
    stage.ctrport.wait_for("8089:80/tcp", "active")
    stage.ctrport.stop()
    stage.delete(brief)
    yield
    stage.ctrport.start(tick=OFTEN)


def kube_proxy(mode: str) -> Break:
    """Have what kube-proxy keeps, with ``service`` for the endpoint of NodePort 30080."""

    @contextlib.contextmanager
    def broken(stage: Stage) -> Iterator[None]:
        file, program = {
            "iptables": ("kube-proxy.iptables", ("iptables-nft-restore", "--noflush")),
            "nftables": ("kube-proxy.nft", ("nft", "-f", "-")),
        }[mode]
        text = (RULESETS / file).read_text().replace("@ENDPOINT@", str(stage.service.address)).replace("@NODE@", NODE)
        before = stage.run("iptables-nft-save").stdout
        stage.run(*program, input=text)
        try:
            stage.ctrport.wait_for("30080:80/tcp", "conflict", within=20)
            yield
        finally:
            with stage.ctrport.frozen():
                stage.run("nft", "delete", "table", "ip", "kube-proxy", check=mode == "nftables")
                stage.run("iptables-nft-restore", input=before)
            stage.ctrport.wait_for("30080:80/tcp", "active", within=20)

    return broken


@contextlib.contextmanager
def host_port(stage: Stage) -> Iterator[None]:
    portmap.call(stage, "ADD", stage.service, {9090: 80})
    try:
        stage.ctrport.wait_for("9090:80/tcp", "conflict", within=20)
        yield
    finally:
        portmap.call(stage, "DEL", stage.service, {9090: 80})
        stage.ctrport.wait_for("9090:80/tcp", "active", within=20)


@contextlib.contextmanager
def program_before_us(stage: Stage) -> Iterator[None]:
    stage.ctrport.stop()
    with Listener(stage, 8086):
        stage.ctrport.start(tick=OFTEN)
        yield
    stage.ctrport.wait_for("8086:80/tcp", "active", within=20)


@contextlib.contextmanager
def program_behind_a_drop(stage: Stage) -> Iterator[None]:
    """Have a program of the node's own, on a port that nobody publishes and that INPUT drops."""
    with Listener(stage, 8022), iptables("-I INPUT -p tcp --dport 8022 -j DROP")(stage):
        yield


@contextlib.contextmanager
def paused(stage: Stage) -> Iterator[None]:
    stage.pause(stage.shop)
    try:
        yield
    finally:
        stage.resume(stage.shop)


_PORTS = "for port in /sys/class/net/docker0/brif/*; do bridge link set dev ${port##*/} hairpin "
_JUMP = "iptables-nft-save -t filter | sed -n 's/^-A \\(FORWARD .*-j DOCKER-FORWARD\\)$/*filter\\n-D \\1\\nCOMMIT/p'"


@dataclass(frozen=True)
class Case:
    """A broken node: how it is broken, what is asked, which cause is named, in which words, and whose packets show it.

    ``breaks`` is None for what is so on the node as it is.
    """

    name: str
    breaks: Break | None
    asked: tuple[str, ...]
    cause: str
    words: tuple[str, ...]
    probe: Probe


CASES = [
    Case(
        "daemon-stopped-rules-flushed",
        stopped_and_flushed,
        ("8080",),
        "not-in-the-kernel",
        ("default/web 8080:80/tcp", "no daemon runs: systemctl start ctrport"),
        sent(),
    ),
    Case(
        "nothing-there",
        None,
        ("8999",),
        "nobody-listens",
        ("nothing is published on port 8999/tcp, and no program",),
        sent(port=8999),
    ),
    Case("no-container", None, ("8087",), "not-active", ("no running container matches",), sent(port=8087)),
    Case(
        "container-gone",
        container_gone,
        ("8089",),
        "container-gone",
        ("the rule of default/brief 8089:80/tcp still leads to 172.17.0.",),
        sent(port=8089),
    ),
    Case(
        "not-listening",
        None,
        ("8081",),
        "container-does-not-listen",
        ("nobody in container default/web listens on 81/tcp (but on 53, 80)",),
        sent(port=8081),
    ),
    Case(
        "listens-on-loopback",
        None,
        ("8082",),
        "container-listens-on-loopback",
        ("in container default/web listens on port 82 of 127.0.0.1 only",),
        sent(port=8082),
    ),
    Case(
        "operators-drop",
        iptables("-A DOCKER-USER -p tcp --dport 80 -j DROP"),
        ("8080",),
        "dropped",
        ("-A DOCKER-USER -p tcp -m tcp --dport 80 -j DROP", "that chain is yours"),
        sent(),
    ),
    Case(
        "policy-drop-and-our-jump-gone",
        shell(
            f"iptables-nft -P FORWARD DROP; {_JUMP} | iptables-nft-restore --noflush",
            "iptables-nft -P FORWARD ACCEPT",
            frozen=True,
        ),
        ("8080",),
        "dropped",
        ("the policy DROP of filter FORWARD", "ctrport's jump to DOCKER-FORWARD is not in there"),
        sent(),
    ),
    Case(
        "reject-above-us",
        iptables("-I FORWARD -i eth0 -j REJECT", frozen=True),
        ("8080",),
        "rejected",
        ("-A FORWARD -i eth0 -j REJECT", "it stands before ctrport's jump"),
        sent(),
    ),
    Case(
        "policy-of-another-table",
        nft("inet other", "chain forward {\ntype filter hook forward priority 10; policy drop;\n}"),
        ("8080",),
        "dropped",
        ("the policy DROP of inet other forward", "nft insert rule inet other forward"),
        sent(),
    ),
    Case(
        "rule-of-another-table",
        nft(
            "inet other",
            "set ports {\ntype inet_service; flags interval; elements = { 79-81 }\n}\n"
            "chain forward {\ntype filter hook forward priority 10;\n"
            "ip daddr 172.17.0.0/16 tcp dport @ports counter drop\n}",
        ),
        ("8080",),
        "dropped",
        ("'ip daddr 172.17.0.0/16 tcp dport @ports drop'", "nft delete rule inet other forward handle"),
        sent(),
    ),
    Case(
        "forwarding-off",
        setting("ipv4/ip_forward", 0, 1),
        ("8080",),
        "forwarding-off",
        ("net.ipv4.ip_forward is 0", "sysctl -w net.ipv4.ip_forward=1"),
        sent(),
    ),
    Case(
        "rp-filter",
        shell(
            "echo 1 >/proc/sys/net/ipv4/conf/eth0/rp_filter; ip route add 198.51.100.2/32 dev net1",
            "echo 0 >/proc/sys/net/ipv4/conf/eth0/rp_filter; ip route del 198.51.100.2/32 dev net1",
        ),
        ("8080", "--from", CLIENT),
        "rp-filter",
        ("drops what comes from 198.51.100.2 by eth0, as the node's route to 198.51.100.2 is by net1",),
        sent(),
    ),
    Case(
        "default-route-elsewhere",
        shell("ip route replace default via 172.17.0.3", "ip route replace default via 172.17.0.1", on="web"),
        ("8080",),
        "no-way-back",
        ("through 172.17.0.3, which is not this node", "firewall.masquerade: all"),
        sent(),
    ),
    Case(
        "no-default-route",
        shell("ip route del default", "ip route add default via 172.17.0.1", on="web"),
        ("8080",),
        "no-way-back",
        ("container default/web has no route to 198.51.100.254",),
        sent(),
    ),
    Case(
        "not-among-sources",
        None,
        ("8083", "--from", CLIENT),
        "not-among-sources",
        (f"{CLIENT} is not among the `sources` of default/web 8083:80/tcp",),
        sent(port=8083),
    ),
    Case(
        "not-among-sources-of-udp",
        None,
        ("8083/udp",),
        "not-among-sources",
        ("of default/web 8083:53/udp",),
        sent(port=8083, udp=True),
    ),
    Case(
        "another-interface",
        None,
        ("8084", "--from", CLIENT),
        "another-interface",
        ("it comes in by eth0, and the `interface` of default/web 8084:80/tcp",),
        sent(port=8084),
    ),
    Case(
        "another-address",
        None,
        ("8085",),
        "another-host-address",
        (f"is published on {SECOND} alone, and not on {NODE}",),
        sent(port=8085),
    ),
    Case(
        "udp-and-not-tcp",
        None,
        ("5353",),
        "another-protocol",
        ("port 5353 is published for udp (default/web 5353:53/udp) and not for tcp",),
        sent(port=5353),
    ),
    Case(
        "route-localnet-off",
        setting("ipv4/conf/docker0/route_localnet", 0, 1),
        ("8080", "--from", "127.0.0.1"),
        "route-localnet-off",
        ("net.ipv4.conf.docker0.route_localnet is 0",),
        sent("node", address="127.0.0.1"),
    ),
    Case(
        "isolation",
        None,
        ("172.17.0.2:80", "--from", "172.18.0.2"),
        "isolated",
        ("172.17.0.2 is on one of ctrport's `networks`", "publish the port"),
        sent("other", 80, "172.17.0.2"),
    ),
    Case(
        "unpublished-from-the-lan",
        None,
        ("172.17.0.2:80",),
        "isolated",
        ("which let in what is published and nothing else",),
        sent(port=80, address="172.17.0.2"),
    ),
    Case(
        "hairpin-off",
        shell(
            f"echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables; {_PORTS} off; done",
            f"{_PORTS} on; done; echo 0 >/proc/sys/net/bridge/bridge-nf-call-iptables",
            frozen=True,
        ),
        ("8080", "--from", "172.17.0.2"),
        "hairpin-off",
        ("of container default/web (hairpin mode is off",),
        sent("web"),
    ),
    Case(
        "raw-drop",
        iptables("-A PREROUTING -p tcp --dport 8080 -j DROP", table="raw"),
        ("8080",),
        "dropped",
        ("in raw PREROUTING", "--dport 8080 -j DROP"),
        sent(),
    ),
    Case(
        "mangle-drop",
        iptables("-A FORWARD -o docker0 -j DROP", table="mangle"),
        ("8080",),
        "dropped",
        ("'-A FORWARD -o docker0 -j DROP' in mangle FORWARD",),
        sent(),
    ),
    Case(
        "not-tracked",
        iptables("-A PREROUTING -p tcp --dport 8080 -j CT --notrack", table="raw"),
        ("8080",),
        "not-tracked",
        ("-j CT --notrack", "what is not tracked is not translated"),
        sent(),
    ),
    Case(
        "legacy-tables-drop",
        iptables("-A FORWARD -p tcp -m multiport --dports 79,80 -j DROP", program="iptables-legacy"),
        ("8080",),
        "dropped",
        ("in filter FORWARD (legacy)", "iptables-legacy -t filter -S FORWARD"),
        sent(),
    ),
    Case(
        "answer-dropped",
        nft(
            "ip other",
            "chain forward {\ntype filter hook forward priority -5;\n"
            'iifname "docker*" ct state established,related drop\n}',
        ),
        ("8080",),
        "answer-dropped",
        ("in ip other forward stops the answer",),
        sent(),
    ),
    Case(
        "blackhole",
        shell("ip route add blackhole 172.17.0.2/32", "ip route del blackhole 172.17.0.2/32", frozen=True),
        ("8080",),
        "no-route",
        ("the node has no way for packets to 172.17.0.2",),
        sent(),
    ),
    Case(
        "masquerade-missing",
        shell("iptables-nft -t nat -F DOCKER-HAIRPIN", ":", frozen=True),
        ("8080", "--from", "172.17.0.3"),
        "answers-past-the-node",
        ("answers 172.17.0.3 on their own link, past the node",),
        sent("sibling"),
    ),
    Case(
        "paused",
        paused,
        ("8088",),
        "container-paused",
        ("container default/shop is paused: `ctr --namespace default tasks resume shop`",),
        asked_for_a_page,
    ),
    Case(
        "node-port",
        kube_proxy("iptables"),
        ("30080",),
        "taken-by-another",
        ("kube-proxy (shop/web:http) has port 30080/tcp, and default/web",),
        answered_by_another(30080),
    ),
    Case(
        "node-port-of-nftables-mode",
        kube_proxy("nftables"),
        ("30080",),
        "taken-by-another",
        ("kube-proxy (shop/web:http) has port 30080/tcp, and default/web",),
        answered_by_another(30080),
    ),
    Case(
        "host-port-of-portmap",
        host_port,
        ("9090",),
        "taken-by-another",
        ("CNI portmap has port 9090/tcp, and default/web",),
        answered_by_another(9090),
    ),
    Case(
        "program-of-the-node",
        program_before_us,
        ("8086",),
        "taken-by-another",
        ("webserver (pid", "has port 8086/tcp, and default/web"),
        sent(port=8086),
    ),
    Case(
        "program-behind-a-drop",
        program_behind_a_drop,
        ("8022",),
        "dropped",
        ("'-A INPUT -p tcp -m tcp --dport 8022 -j DROP' in filter INPUT",),
        sent(port=8022),
    ),
    Case(
        "somebodys-dnat",
        iptables("-I PREROUTING -p tcp --dport 8080 -j DNAT --to-destination 172.19.0.2:80", table="nat"),
        ("8080",),
        "taken-by-another",
        ("--dport 8080 -j DNAT --to-destination 172.19.0.2:80",),
        answered_by_another(8080),
    ),
    Case(
        "ipv6-drop",
        iptables("-I FORWARD -o docker0 -j DROP", program="ip6tables-nft", frozen=True),
        (f"[{NODE6}]:8080",),
        "dropped",
        ("-A FORWARD -o docker0 -j DROP",),
        sent(address=NODE6),
    ),
    Case(
        "ipv6-forwarding-off",
        setting("ipv6/conf/all/forwarding", 0, 1),
        (f"[{NODE6}]:8080",),
        "forwarding-off",
        ("the node does not forward IPv6",),
        sent(address=NODE6),
    ),
    Case("ipv6-loopback", None, ("[::1]:8080",), "ipv6-loopback", ("use 127.0.0.1",), sent("node", address="::1")),
]
