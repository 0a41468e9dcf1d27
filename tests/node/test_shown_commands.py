"""Every command that the documentation shows, as it is shown, on a node where web is published."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest

from embedded.image import make_archive
from embedded.node import Node
from embedded.traffic import Server, probe_tcp
from embedded.wait import eventually
from tests.node.daemon import ROOT, Ctrport, wait_closed, wait_open
from tests.node.prometheus import SETTINGS
from tests.node.terminal import environment, install
from tests.shown import NODE, Way, texts

CONFIG = (
    SETTINGS
    + """
firewall: {backend: %s}
publish:
  - match: {namespace: default, container: web}
    ports: ["8080:80", "8080:80/udp"]
"""
)
IMAGE = "localhost/shown:1"
_ETC = """
cp -a /etc /run/etc
rm -rf /run/etc/ctrport
ln -s "$1" /run/etc/ctrport
mount --bind /run/etc /etc
"""
#: What a command is shown beside: a daemon with this firewall backend, that publishes web, and the first where nothing
#: else is said; a daemon to which nothing is declared; none.
IPTABLES, NFTABLES, NOTHING, STOPPED = "iptables-nft", "nftables", "nothing declared", "no daemon"

_COPY = "cp /etc/ctrport/config.yaml /etc/ctrport/new.yaml"
_MINE = "nft add table ip mine"
_CHAIN = "nft add chain ip mine forward '{ type filter hook forward priority -10 ; }'"
_GIVEN = "ctrport publish web 5353:53/udp"
_TAKEN = "ctrport unpublish web"

WAYS = {
    "ctrport ps": Way(says="active"),
    "ctrport plan": Way(says="nothing to change"),
    "ctrport events": Way(says="published"),
    "ctrport publish web 8080:80 5353:53/udp": Way(NOTHING, after=_TAKEN, says="5353:53/udp"),
    "ctrport publish NAME 8080:80": Way(NOTHING, after=_TAKEN),
    "ctrport unpublish web 8080": Way(NOTHING, before="ctrport publish web 8080:80", says="8080:80/tcp is withdrawn"),
    "ctrport unpublish NAME": Way(before=_GIVEN, says="5353:53/udp is withdrawn"),
    "ctrport ps --watch": Way(until="default/web"),
    "ctrport events --follow": Way(until="published"),
    "ctrport run": Way(STOPPED, until="in-line"),
    "ctrport run --verbose": Way(STOPPED, until="in-line"),
    "ctrport run --log json": Way(STOPPED, until='"in-line"'),
    "ctrport clean": Way(STOPPED, says="every rule of ctrport is removed"),
    "ctrport check --config /etc/ctrport/new.yaml && ctrport plan --config /etc/ctrport/new.yaml": Way(
        before=_COPY, after="rm /etc/ctrport/new.yaml", says="nothing to change"
    ),
    "mv /etc/ctrport/new.yaml /etc/ctrport/config.yaml": Way(before=_COPY),
    "ctr --namespace default containers info web | jq -r '.Extensions[\"ctrport/ports\"].value' | base64 -d": Way(
        before=_GIVEN, after=_TAKEN, says="5353:53/udp"
    ),
    "ctr --namespace NAMESPACE containers label ID ctrport/ports=8080:80": Way(
        says="ctrport/ports=8080:80", after="ctr --namespace default containers label web ctrport/ports="
    ),
    "ctr run --detach --cni IMAGE web": Way(after="ctr task delete --force web && ctr container delete web"),
    "curl --silent http://127.0.0.1:9477/metrics | promtool check metrics": Way(),
    "promtool check config prometheus.yml": Way(before=f"cp {ROOT}/deploy/prometheus/*.y*ml ."),
    "conntrack -L -p tcp --orig-port-dst 8080": Way(says="dport=8080"),
    "bridge -d link show dev VETH": Way(says="hairpin"),
    "nsenter -t PID -n ss -ltnu": Way(says="0.0.0.0:80"),
    "iptables-nft -t nat -vnL DOCKER": Way(says="default/web 8080:80/tcp"),
    "iptables-nft -vnL DOCKER": Way(says="default/web 8080:80/tcp"),
    "iptables-nft -I DOCKER-USER ! -s 198.51.100.0/24 -p tcp -m conntrack --ctstate DNAT --ctdir ORIGINAL "
    "--ctorigdst 192.0.2.7 --ctorigdstport 8080 -j DROP": Way(after="iptables-nft -F DOCKER-USER"),
    "tcpdump -ni any port 8080": Way(until=".8080: Flags"),
    "fuser -v /run/containerd": Way(behind=("flock", "/run/containerd"), says="flock"),
    "fuser -v /run/xtables.lock": Way(behind=("flock", "/run/xtables.lock"), says="flock"),
    "modprobe -a ip_tables ip6_tables": Way(status=(0, 1)),  # 1: a kernel that has all in it, and no file of modules
    "modprobe nf_conntrack_netlink": Way(status=(0, 1)),
    "sysctl net.netfilter.nf_conntrack_count net.netfilter.nf_conntrack_buckets": Way(says="nf_conntrack_count = "),
    "nft list table ip ctrport": Way(NFTABLES, says="default/web 8080:80/tcp"),
    "nft list map ip ctrport host-ports": Way(NFTABLES, says="default/web 8080:80/tcp"),
    "nft get element ip ctrport host-ports '{ tcp . 8080 }'": Way(NFTABLES, says="default/web 8080:80/tcp"),
    "nft list chain ip ctrport published-flows": Way(NFTABLES, says="counter"),
    "nft delete table ip ctrport": Way(NFTABLES),
    "nft flush ruleset": Way(),
    _MINE: Way(NFTABLES, after="nft delete table ip mine"),
    _CHAIN: Way(NFTABLES, before=_MINE, after="nft delete table ip mine"),
    "nft add rule ip mine forward ct status dnat meta l4proto tcp ct original ip daddr 192.0.2.7 ct original "
    "proto-dst 8080 ip saddr != 198.51.100.0/24 drop": Way(
        NFTABLES, before=f"{_MINE}; {_CHAIN}", after="nft delete table ip mine"
    ),
    "nft add table ip watch; nft add chain ip watch pre '{ type filter hook prerouting priority -310 ; }'; "
    "nft add rule ip watch pre tcp dport 8080 meta nftrace set 1; nft monitor trace": Way(
        NFTABLES, until="ip ctrport to-containers", after="nft delete table ip watch"
    ),
    "nft delete table ip watch": Way(NFTABLES, before="nft add table ip watch"),
    "nft insert rule inet other forward ct status dnat accept": Way(
        before="nft add table inet other; nft add chain inet other forward", after="nft delete table inet other"
    ),
    "nft list map ip kube-proxy service-nodeports": Way(
        before="nft add table ip kube-proxy; "
        "nft add map ip kube-proxy service-nodeports '{ type inet_service : verdict ; }'",
        after="nft delete table ip kube-proxy",
    ),
    "nft list table ip cni_hostport": Way(
        before="nft add table ip cni_hostport", after="nft delete table ip cni_hostport"
    ),
}

#: What is between backticks and no whole call: why, or where the whole is tried.
ELSEWHERE = {
    "ctrport publish": "the name of a command",
    "ctrport unpublish": "the name of a command",
    "ctrport explain": "the name of a command",
    "ctrport completion": "the name of a command",
    "ctrport explain PORT": "what is written for a port, as in the lines that have one",
    "ctr run --cni": "as embedded/node.py starts every container",
    "ctr run --label ctrport/ports=8080:80,5353:53/udp": "the one option of it; tests/node/test_declared.py has labels",
    "ctr containers label": "the name of a command; with its arguments on another page",
    "ctr task start": "the name of a command; tests/node/test_live.py starts one anew",
    "ip ctrport": "the name of a table",
    "nft -f": "what the lines of a plan are for; tests/node/test_plan_command.py has it read them",
    "curl -4": "the one option of it",
    "ps --json": "ctrport's, in a page that is of nothing else",
}

SHOWN = texts(NODE)


class World:
    """The node of an operator, with web and its sibling, all that is shown as an address, and the daemon."""

    def __init__(self, node: Node) -> None:
        self.node = node
        node.sysctl("net/ipv4/icmp_ratelimit", 0)
        # An /etc of its own, as files below it are shown.
        node.script(_ETC, str(node.directory))
        node.start_containerd()
        node.add_network("docker0", subnet6="fd00:17::/64", ip_masq=False)
        for address in ("192.0.2.7", "2001:db8::7"):
            node.add_address(address)
        install(node.directory)
        self.web = node.start("web")
        for address in ("0.0.0.0", "::"):
            Server(self.web, 80, address=address)
        Server(self.web, 80, kind=socket.SOCK_DGRAM)
        node.start("sibling")
        self.ctrport = Ctrport(node)
        self.tables = node.tables()
        archive = make_archive(node.directory / "image.tar", node.rootfs, {IMAGE: ("/bin/sleep", "600")})
        self.shell(f"ctr images import {archive}")

    @property
    def environment(self) -> dict[str, str]:
        # Of `ctr` without --namespace: web is a name of its own there, and its control group one of this node's.
        ctr = {"CONTAINERD_NAMESPACE": self.node.directory.name, "CONTAINERD_SNAPSHOTTER": "native"}
        return {**environment(self.node.directory), **ctr}

    def shell(self, text: str, *behind: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run lines of shell as an operator does."""
        argv = (*behind, "sh", "-c", text)
        return self.node.run(*argv, check=check, env=self.environment, cwd=self.node.directory)

    def turn(self, beside: str) -> None:
        """Have the daemon be as a page has it, and the kernel."""
        if beside == STOPPED:
            self.turn(IPTABLES)  # of which the rules stay
            self.ctrport.stop()
            return
        self.ctrport.configure(SETTINGS if beside == NOTHING else CONFIG % beside)
        if not self.ctrport.runs:
            self.ctrport.start()
        if beside == NOTHING:
            wait_closed(self.node, 8080)
            return

        def turned() -> bool:
            return self.ctrport.in_line() and bool(self.ctrport.status()["backend"] == beside)

        eventually(turned, what=f"the daemon with {beside}")
        wait_open(self.node, 8080, "web")

    def meant(self, text: str) -> str:
        """Put in what an operator puts in."""
        route = json.loads(self.node.run("ip", "-json", "link", "show", "master", "docker0").stdout)
        means = {
            "NAMESPACE": "default",
            "ID": "web",
            "NAME": "web",
            "IMAGE": IMAGE,
            "ADDRESS": str(self.web.address),
            "PID": str(self.web.pid),
            "4711": str(self.web.pid),
            "VETH": str(route[0]["ifname"]),
        }
        return re.sub(rf"\b({'|'.join(means)})\b", lambda found: means[found[0]], text)

    def watched(self, text: str, until: str) -> tuple[int, str]:
        """Run what goes on, while a client asks; end it by Ctrl-C when that is seen. Return its status and words."""
        path = self.node.directory / "said"
        with path.open("w") as said:
            process = self.node.spawn(
                *("stdbuf", "--output=L", "sh", "-c", text),
                env=self.environment,
                cwd=self.node.directory,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )

        def seen() -> bool:
            probe_tcp(self.node.client, self.node.address, 8080, timeout=1)
            assert until in path.read_text(), path.read_text()
            return True

        eventually(seen, within=20, what=f"{until} of {text}")
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait(10)
        return 0 if status in (-signal.SIGINT, 128 + signal.SIGINT) else status, path.read_text()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Node() as node:
        world = World(node)
        yield world
        if world.ctrport.runs:
            world.ctrport.stop()
        world.ctrport.run("clean")
        assert node.tables() == world.tables
        tables = re.findall(r"^table \w+ (\w+)", node.run("nft", "list", "tables").stdout, re.MULTILINE)
        assert {*tables} <= {"raw", "mangle", "nat", "filter"}


@pytest.mark.parametrize("text", [text for text in SHOWN if text not in ELSEWHERE])
def test_a_command_works_as_it_is_shown(world: World, text: str) -> None:
    way = WAYS.get(text, Way())
    world.turn(way.beside or IPTABLES)
    if way.before:
        world.shell(way.before)
    try:
        if way.until:
            status, said = world.watched(world.meant(text), way.until)
        else:
            ended = world.shell(world.meant(text), *way.behind, check=False)
            status, said = ended.returncode, ended.stdout + ended.stderr
    finally:
        if way.after:
            world.shell(way.after)
    way.hold(status, said)


def test_whatever_is_said_of_a_command_here_is_of_one_that_is_shown() -> None:
    assert sorted({*WAYS, *ELSEWHERE} - {*SHOWN}) == []
    assert sorted(WAYS.keys() & ELSEWHERE.keys()) == []
