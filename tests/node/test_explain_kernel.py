"""The walk against the kernel: rules at random, one packet through them, and what becomes of it said beforehand.

The rules are such as the walk knows, so it may not say that it cannot tell. ``HOSTILE=30`` tries thirty times as many,
other ones each time; what that finds goes into ``FOUND``, to stay.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from embedded.container import Container
from embedded.host import Place
from embedded.node import Node
from embedded.traffic import Reply, Server, probe_tcp
from tests.node.modules import ENVIRONMENT

TIMES = int(os.environ.get("HOSTILE", "0"))
ROUNDS = 40
#: Rules of which something else was said once.
FOUND = (9, 201029845, 520650022, 2244872676, 1342206694)
SEEDS = [random.randrange(1 << 32) for _ in range(ROUNDS * TIMES)] if TIMES else [*range(ROUNDS), *FOUND]

CLIENT, NODE, WEB, SIBLING = Node.client_address, Node.address, "172.17.0.2", "172.17.0.3"

#: What else may be one way or the other.
SETTINGS = {
    "net/bridge/bridge-nf-call-iptables": ("0", "1"),
    "net/ipv4/conf/docker0/route_localnet": ("0", "1", "1"),
    "net/ipv4/conf/all/rp_filter": ("0", "1", "2"),
}

_ASKED = """
import asyncio, json, sys
from ctrport.config import parse
from ctrport.explain.answer import explain
from ctrport.explain.question import read
for line in sys.stdin:
    port, source = json.loads(line)
    said = asyncio.run(explain(read(port, source), None, parse("", "")))
    print(json.dumps(json.loads(said.to_json())), flush=True)
"""


@dataclass
class Bench:
    """A node, and a process on it that explains."""

    node: Node
    web: Container
    sibling: Container
    asked: subprocess.Popen[str]

    def explain(self, port: str, source: str) -> dict[str, Any]:
        assert self.asked.stdin is not None
        assert self.asked.stdout is not None
        print(json.dumps([port, source]), file=self.asked.stdin, flush=True)
        said: dict[str, Any] = json.loads(self.asked.stdout.readline())
        return said


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Node() as node:
        node.start_containerd()
        node.add_network("docker0", ip_masq=False)
        web, sibling = node.start("web"), node.start("sibling")
        assert (web.address, sibling.address) == (WEB, SIBLING)
        for container in (web, sibling):
            Server(container, (80, 81))
        Server(node, (8080, 8081, 80), name="node")
        argv, pipe = (sys.executable, "-c", _ASKED), subprocess.PIPE
        yield Bench(node, web, sibling, node.spawn(*argv, env=ENVIRONMENT, stdin=pipe, stdout=pipe))


class Author:
    """Writes rules at random, among which packets have a chance."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def one(self, *choices: str) -> str:
        return self._random.choice(choices)

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def packet(self) -> tuple[str, str]:
        """Return who sends it, and to which address."""
        senders = [("client", NODE)] * 3 + [("node", NODE), ("node", "127.0.0.1"), ("sibling", NODE), ("web", NODE)]
        return self._random.choice(senders)

    # iptables

    _ADDRESSES = (CLIENT, "198.51.100.0/24", NODE, "172.17.0.0/16", WEB, "127.0.0.0/8", "0.0.0.0/0")
    _STATES = ("NEW", "ESTABLISHED", "RELATED,ESTABLISHED", "DNAT", "NEW,DNAT", "SNAT", "INVALID", "UNTRACKED")

    def _option(self, option: str, *values: str) -> str:
        return f"{'! ' * self.chance(0.25)}{option} {self.one(*values)}"

    def _matches(self, chain: str) -> str:
        ct = "-m conntrack"
        kinds = [
            self._option("-s", *self._ADDRESSES),
            self._option("-d", *self._ADDRESSES),
            f"-p tcp -m tcp {self._option('--dport', '8080', '80', '8000:8090', '79:80', '443', ':1024')}",
            f"-p tcp -m tcp {self._option('--sport', '1024:65535', '1:1023')}",
            f"-p tcp -m multiport {self._option('--dports', '80,8080', '79,81:90', '8081')}",
            f"-p {self.one('tcp', 'udp', 'icmp', 'sctp', '6', '17')}",
            "-p tcp -m tcp --syn",
            f"-p tcp -m tcp --tcp-flags {self.one('SYN,RST SYN', 'ALL SYN', 'SYN,ACK SYN,ACK', 'FIN FIN')}",
            f"-m mark {self._option('--mark', '0x1', '0x2/0x2', '0x0', '0x3')}",
            f"-m connmark {self._option('--mark', '0x1', '0x0')}",
            f"-m iprange {self._option('--src-range', '198.51.100.1-198.51.100.9', f'{WEB}-{SIBLING}')}",
            f"-m addrtype {self._option('--dst-type', 'LOCAL', 'UNICAST', 'LOCAL,BROADCAST')}",
            f"-m addrtype {self._option('--src-type', 'LOCAL', 'UNICAST')}",
            f"{ct} {self._option('--ctstate', *self._STATES)}",
            f"{ct} --ctstate DNAT {self._option('--ctorigdstport', '8080', '8081', '8000:8099')}",
            f"{ct} {self._option('--ctorigdst', NODE, '198.51.100.7', '127.0.0.1')}",
            f"{ct} {self._option('--ctreplsrc', WEB, NODE, '172.17.0.0/16')}",
            f"{ct} --ctdir {self.one('ORIGINAL', 'REPLY')}",
            f"{ct} {self._option('--ctstatus', 'SEEN_REPLY', 'CONFIRMED')}",
            f"-m state --state {self.one('NEW', 'ESTABLISHED')}",
        ]
        if chain in ("PREROUTING", "INPUT", "FORWARD"):
            kinds += [self._option("-i", "eth0", "docker0", "lo", "eth+", "veth+")] * 2
            kinds.append(f"-m pkttype {self._option('--pkt-type', 'unicast', 'broadcast')}")
        if chain in ("FORWARD", "OUTPUT", "POSTROUTING"):
            kinds += [self._option("-o", "eth0", "docker0", "lo", "d+")] * 2
        chosen = self._random.sample(kinds, self._random.choice((1, 1, 2)))
        if sum(kind.startswith("-p") for kind in chosen) > 1:
            del chosen[1:]
        return " ".join(chosen)

    def _rules(self, table: str, chain: str, users: list[str], count: int) -> Iterator[str]:
        for _ in range(count):
            ends = ["ACCEPT", "RETURN", "MARK", "CONNMARK", *users, *users]
            if table != "nat" and self.chance(0.4):
                ends += ["DROP", "REJECT"] if table == "filter" else ["DROP"]
            target = self.one(*ends)
            how = "-g" if target in users and self.chance(0.3) else "-j"
            if target == "CONNMARK" and self.chance(0.5):
                target = f"CONNMARK {self.one('--save-mark', '--restore-mark', '--save-mark --mask 0x1')}"
            elif target in ("MARK", "CONNMARK"):
                target += f" --set-xmark {self.one('0x1/0xffffffff', '0x2/0x2', '0x0/0x1', '0x3/0x1')}"
            yield f"-A {chain} {self._matches(chain)} {how} {target}"

    def _translations(self, chain: str) -> Iterator[str]:
        ours = f"-A {chain} -p tcp -m tcp --dport 8080"
        if chain == "POSTROUTING" and self.chance(0.7):
            which = self.one("-o docker0", "-s 127.0.0.0/8", "-s 172.17.0.0/16", "-m mark --mark 0x1")
            yield f"-A POSTROUTING {which} -j MASQUERADE"
        elif chain != "POSTROUTING" and self.chance(0.8):
            place = self.one(f"{WEB}:80", f"{WEB}:80", f"{SIBLING}:80-81/8080", WEB, f"{NODE}:8081")
            which = self.one("", "", "-m addrtype --dst-type LOCAL", "-s 198.51.100.0/24", "-m mark --mark 0x0")
            yield f"{ours} {which} -j DNAT --to-destination {place}"
        if chain == "PREROUTING" and self.chance(0.2):
            yield f"{ours} -j REDIRECT --to-ports 8081"

    def iptables(self) -> str:
        """Return all tables, for iptables-restore."""
        hooks = {
            "raw": ("PREROUTING", "OUTPUT"),
            "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
            "filter": ("INPUT", "FORWARD", "OUTPUT"),
            "nat": ("PREROUTING", "OUTPUT", "POSTROUTING"),
        }
        lines: list[str] = []
        for table, chains in hooks.items():
            users = ["u1", "u2"] if self.chance(0.7) else []
            lines.append(f"*{table}")
            for chain in chains:
                policy = "DROP" if table == "filter" and self.chance(0.15) else "ACCEPT"
                lines.append(f":{chain} {policy} [0:0]")
            lines += [f":{user} - [0:0]" for user in users]
            for chain in chains:
                if self.chance(0.3 if table == "nat" else 0.5):
                    lines += self._rules(table, chain, users, self._random.randint(1, 3))
                if table == "raw" and self.chance(0.05):
                    lines.append(f"-A {chain} {self._matches(chain)} -j CT --notrack")
                if table == "nat":
                    lines += self._translations(chain)
            if users:
                lines += [*self._rules(table, "u1", ["u2"], 2), *self._rules(table, "u2", [], 2)]
            lines.append("COMMIT")
        return "\n".join(lines) + "\n"

    # nft

    _SETS = """
        set hosts { type ipv4_addr; flags interval; elements = { 198.51.100.0/30, 172.17.0.2-172.17.0.9 }
        }
        set ports { type inet_service; flags interval; elements = { 80, 8000-8090 }
        }
        set pairs { type ipv4_addr . inet_service; elements = { 198.51.100.1 . 8080, 172.17.0.2 . 80 }
        }
        map verdicts { type inet_service : verdict; flags interval; elements = { 79-80 : accept, 8080 : jump u1 }
        }
        map places { type inet_proto . inet_service : ipv4_addr . inet_service; flags interval
            elements = { tcp . 8080 : 172.17.0.2 . 80, tcp . 8081-8082 : 172.17.0.3 . 80 }
        }
        map hosted { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
            elements = { 198.51.100.1 . tcp . 8080 : 172.17.0.3 . 81, 127.0.0.1 . tcp . 8080 : 172.17.0.2 . 80 }
        }
        map marks { type inet_service : mark; elements = { 80 : 0x1 }
        }
    """

    def _compared(self, left: str, *values: str) -> str:
        return f"{left} {'!= ' * self.chance(0.25)}{self.one(*values)}"

    def _expressions(self, chain: str) -> str:
        tcp = "meta l4proto tcp "
        kinds = [
            self._compared("ip saddr", CLIENT, "198.51.100.0/24", "@hosts", "{ 10.0.0.0/8, 172.17.0.3 }"),
            self._compared("ip daddr", NODE, "172.17.0.0/16", "@hosts", "127.0.0.1"),
            self._compared("tcp dport", "8080", "80-81", "@ports", "{ 22, 80 }", "443"),
            f"{tcp}{self._compared('th dport', '8080', '80')}",
            f"tcp dport {self.one('<', '>', '<=', '>=')} {self.one('80', '1024', '8080')}",
            self._compared("tcp sport", "1024-65535", "{ 22, 80 }"),
            self._compared("ip daddr . tcp dport", "@pairs", "{ 198.51.100.1 . 8000-8090 }"),
            self._compared("meta l4proto", "tcp", "udp", "{ tcp, udp }"),
            self._compared("ip protocol", "tcp", "{ udp, icmp }"),
            self._compared("meta mark", "0x1", "{ 0x1, 0x3 }", "0"),
            self._compared("meta mark & 0x2", "0x2", "0x0"),
            self._compared("ct mark", "0x1", "0x0"),
            f"ct state {self.one('new', 'established,related', '{ new, established }', 'invalid', '!= new')}",
            f"ct status {self.one('dnat', 'snat', 'seen-reply', '! dnat')}",
            f"ct direction {self.one('original', 'reply')}",
            self._compared("ct original ip daddr", NODE, "127.0.0.1"),
            f"{tcp}{self._compared('ct original proto-dst', '8080', '8000-8090')}",
            self._compared("fib daddr type", "local", "{ local, broadcast }", "unicast"),
            self._compared("fib saddr type", "local", "unicast"),
            f"tcp flags {self.one('syn', '& (syn | ack) == syn', '!= syn', 'syn / syn,ack')}",
            "icmp type echo-request",
            "ip6 daddr ::1",
            self.one("meta nfproto ipv4", "meta protocol ip"),
        ]
        if chain in ("prerouting", "input", "forward"):
            kinds += [self._compared("iifname", '"eth0"', '"docker*"', '{ "eth0", "lo" }')] * 2
            kinds.append(self._compared("iif", '"lo"'))
            kinds.append(f"fib daddr . iif type {self.one('local', 'unicast')}")
        if chain == "prerouting":
            kinds.append(f"fib saddr . iif oif {self.one('missing', 'exists')}")
        if chain in ("forward", "output", "postrouting"):
            kinds += [self._compared("oifname", '"eth0"', '"docker*"', '{ "lo", "docker0" }')] * 2
        return " ".join(self._random.sample(kinds, self._random.choice((1, 1, 2))))

    def _statement(self, users: list[str], *, drops: bool = True) -> str:
        kinds = [
            *("accept", "return", "meta mark set 0x1", "meta mark set meta mark or 0x2", "ct mark set meta mark"),
            *("meta mark set ct mark and 0x1", "counter", "meta mark set tcp dport map @marks", "log"),
            *(f"jump {user}" for user in users),
            *(f"goto {user}" for user in users),
        ]
        if drops and self.chance(0.4):
            kinds = ["drop", "drop", "reject with icmpx type admin-prohibited"]
        if users and self.chance(0.2):
            kinds = ["tcp dport vmap @verdicts", "ct state vmap { new : jump u1, invalid : accept }"]
        return self.one(*kinds)

    def nft(self) -> str:
        """Return two tables, for nft."""
        lines = ["table inet other {", self._SETS, "chain u1 {"]
        lines += [f"{self._expressions('u1')} {self._statement([])}" for _ in range(2)]
        lines.append("}")
        for hook in ("prerouting", "input", "forward", "output", "postrouting"):
            priority, policy = self.one("-300", "-150", "-99", "0", "10"), "drop" if self.chance(0.1) else "accept"
            lines.append(f"chain {hook} {{\ntype filter hook {hook} priority {priority}; policy {policy};")
            if self.chance(0.6):
                lines += [
                    f"{self._expressions(hook)} {self._statement(['u1'])}" for _ in range(self._random.randint(1, 3))
                ]
            lines.append("}")
        lines += ["}", "table ip mine {", self._SETS, "chain u1 {", "}"]
        for hook in ("prerouting", "output"):
            lines.append(f"chain {hook} {{\ntype nat hook {hook} priority {self.one('-100', '-90', '-110')};")
            if self.chance(0.3):
                lines.append(f"{self._expressions(hook)} {self._statement(['u1'], drops=False)}")
            key = "meta l4proto . th dport map @places", "ip daddr . meta l4proto . th dport map @hosted"
            to = self.one(*key, "tcp dport map { 8080 : 172.17.0.2 }", WEB)
            lines += [
                f"{self.one('', 'fib daddr type local')} meta l4proto tcp tcp dport 8080 dnat ip to {to}"
            ] * self.chance(0.8)
            lines += ["tcp dport 8080 redirect to :8081"] * self.chance(0.3)
            lines.append("}")
        lines.append(f"chain postrouting {{\ntype nat hook postrouting priority {self.one('100', '90')};")
        lines += [f"{self.one('oifname docker0', 'ip saddr 127.0.0.0/8', 'ip saddr @hosts')} masquerade"] * self.chance(
            0.7
        )
        return "\n".join([*lines, "}", "}"]) + "\n"


def write(node: Node, author: Author) -> str:
    """Have rules on the node, of one program or of both, and return them."""
    node.run("nft", "flush", "ruleset")
    kinds = author.one("iptables", "nft", "both")
    text = ""
    for program, write in (("iptables-nft-restore", author.iptables), ("nft", author.nft)):
        if kinds == "both" or program.startswith(kinds):
            its = write()
            argv = (program,) if program != "nft" else ("nft", "-f", "-")
            while (failed := node.run(*argv, input=its, check=False)).returncode:
                assert "syntax error" not in failed.stderr, (failed.stderr, its)
                its = write()  # something in it is in no such chain
            text += its
    return text


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_said_of_a_packet_becomes_of_it(bench: Bench, seed: int) -> None:
    author, node = Author(seed), bench.node
    sender, address = author.packet()
    text = write(node, author)
    for setting, values in SETTINGS.items():
        node.sysctl(setting, value := author.one(*values))
        text += f"{setting} {value}\n"
    places: dict[str, tuple[Place, str]] = {
        "client": (node.client, CLIENT),
        "node": (node, address),
        "sibling": (bench.sibling, SIBLING),
        "web": (bench.web, WEB),
    }
    place, source = places[sender]
    said = bench.explain(f"{address}:8080", source)
    node.run("conntrack", "-F")
    outcome = probe_tcp(place, address, 8080, source=(source, 0), timeout=0.25)
    if said["cause"] == "not-tracked" and said["outcome"] == "unknown":
        return
    seen = outcome.name if isinstance(outcome, Reply) else ""
    can = {"container-answers": ("web", "sibling"), "program-of-the-node-answers": ("node",)}.get(said["cause"], ("",))
    told = f"{sender} to {address}: {outcome}\n{said['sentence']}\n{json.dumps(said['steps'], indent=1)}\n{text}"
    assert seen in can, told
    assert said["outcome"] == ("works" if seen else "fails"), told
