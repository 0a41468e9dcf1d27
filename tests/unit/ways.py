"""A node that is made up, for packets to go through: its tables as programs print them, and the answers that it gives.

Its network is that of the node tests: a client on the LAN at eth0, containers behind docker0.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface, ip_network

from ctrport import ports
from ctrport.explain import nftrules, saved
from ctrport.explain.facts import (
    Answer,
    Ask,
    Bridging,
    Declared,
    Facts,
    HolderOf,
    Inhabitant,
    Local,
    Next,
    NoRoute,
    PortOf,
    Question,
    Route,
    RouteTo,
    Setting,
    Socket,
    SocketsAt,
    WhoIsAt,
)
from ctrport.explain.judgement import Judgement, judge
from ctrport.explain.question import Inquiry, inquire, read
from ctrport.explain.ruleset import IPTABLES, LEGACY, Ruleset, Table
from ctrport.explain.sentences import sentence
from ctrport.explain.steps import steps
from ctrport.explain.traverse import Hooks
from ctrport.explain.walk import walk
from ctrport.model import ContainerKey, Protocol

NODE, CLIENT, WEB, SIBLING, OTHER = "198.51.100.1", "198.51.100.2", "172.17.0.2", "172.17.0.3", "172.18.0.2"
NODE6, CLIENT6, WEB6 = "2001:db8:51::1", "2001:db8:51::2", "fd00:17::2"
WEB_KEY = ContainerKey("default", "web")

#: What ctrport keeps for a mapping 8080:80 of default/web, as iptables-nft-save prints it.
OURS = """\
*raw
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A PREROUTING -d 127.0.0.0/8 ! -i lo -m comment --comment "ctrport localhost guard 6857a9d0df39" -j DROP
-A PREROUTING -s 127.0.0.0/8 ! -i lo -m comment --comment "ctrport localhost guard 7a9f84ff776f" -j DROP
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -m comment --comment "ctrport jump d6facdb2c61f" -j DOCKER-USER
-A FORWARD -m comment --comment "ctrport jump 321c34155f0a" -j DOCKER-FORWARD
-A DOCKER -m comment --comment "ctrport chain 17ae01d1accc"
-A DOCKER -d 172.17.0.2/32 -p tcp -m tcp --dport 80 -m conntrack --ctstate DNAT --ctorigdstport 8080 \
-m comment --comment "ctrport default/web 8080:80/tcp d71900ba8cee" -j ACCEPT
-A DOCKER-FORWARD -m comment --comment "ctrport chain 8ea7286459f6"
-A DOCKER-FORWARD -i docker0 -m conntrack --ctstate RELATED,ESTABLISHED -m conntrack --ctstate DNAT \
-m comment --comment "ctrport device docker0 1caa2bb39397" -j ACCEPT
-A DOCKER-FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -m conntrack --ctstate DNAT \
-m comment --comment "ctrport device docker0 ba8d1870ef4f" -j ACCEPT
-A DOCKER-FORWARD -m conntrack --ctstate DNAT --ctorigdst 198.51.100.1 \
-m comment --comment "ctrport node 198.51.100.1 c0a750f36916" -j DOCKER
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-HAIRPIN - [0:0]
:DOCKER-POSTROUTING - [0:0]
-A PREROUTING ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -m comment --comment "ctrport jump 56003c5aa0b9" -j DOCKER
-A OUTPUT -m addrtype --dst-type LOCAL -m comment --comment "ctrport jump b3f400bcf21c" -j DOCKER
-A POSTROUTING -m comment --comment "ctrport jump ed008e996386" -j DOCKER-POSTROUTING
-A DOCKER -m comment --comment "ctrport chain 17ae01d1accc"
-A DOCKER -p tcp -m tcp --dport 8080 -m comment --comment "ctrport default/web 8080:80/tcp 9b6a0d4ce34e" \
-j DNAT --to-destination 172.17.0.2:80
-A DOCKER-HAIRPIN -m comment --comment "ctrport chain e7ead11f92bb"
-A DOCKER-HAIRPIN -s 172.17.0.0/16 -d 172.17.0.2/32 -p tcp -m tcp --dport 80 -m conntrack --ctstate DNAT \
--ctorigdstport 8080 -m comment --comment "ctrport default/web 8080:80/tcp dab1bb52607c" -j MASQUERADE
-A DOCKER-POSTROUTING -m comment --comment "ctrport chain 1327e80755ba"
-A DOCKER-POSTROUTING -s 127.0.0.0/8 -o docker0 \
-m comment --comment "ctrport device docker0 route_localnet=set 0d56b3fbc4d6" -j MASQUERADE
-A DOCKER-POSTROUTING -m conntrack --ctstate DNAT --ctorigdst 198.51.100.1 \
-m comment --comment "ctrport node 198.51.100.1 093fc021fd85" -j DOCKER-HAIRPIN
COMMIT
"""

_ADDRESSES = (
    *(("lo", "127.0.0.1/8"), ("lo", "::1/128"), ("eth0", f"{NODE}/24"), ("eth0", f"{NODE6}/64")),
    *(("docker0", "172.17.0.1/16"), ("docker0", "fd00:17::1/64"), ("net1", "172.18.0.1/16")),
)
_LOCALS = (
    Local(ip_network("127.0.0.0/8"), "lo"),
    *(Local(ip_network(ip_interface(text).ip), name) for name, text in _ADDRESSES),
    Local(ip_network("198.51.100.255"), "eth0", "broadcast"),
)
ACTIVE = Declared("default/web", WEB_KEY, ports.parse("8080:80"), ports.parse("8080:80"), "active")


def inhabitant(
    name: str = "web", *listens: str, gateway: str | None = "172.17.0.1", paused: bool = False
) -> Inhabitant:
    """Return a container behind docker0 that listens at those addresses and ports of tcp."""
    sockets = []
    for number, text in enumerate(listens or ("0.0.0.0:80",)):
        address, _, port = text.rpartition(":")
        sockets.append((Protocol.TCP, Socket(ip_address(address.strip("[]")), int(port), 100 + number)))
    routes = [Next(ip_network("172.17.0.0/16"), None, "eth0"), Next(ip_network("fd00:17::/64"), None, "eth0")]
    if gateway is not None:
        routes.append(Next(ip_network("0.0.0.0/0"), ip_address(gateway), "eth0"))
        routes.append(Next(ip_network("::/0"), ip_address("fd00:17::1"), "eth0"))
    keys = frozenset({ContainerKey("default", name)})
    return Inhabitant(f"default/{name}", keys, 4711, paused, tuple(sockets), tuple(routes))


def tables(text: str, *, legacy: str = "", nft: str = "", family: str = "ip") -> Ruleset:
    """Return the tables that programs print: iptables-nft-save, iptables-legacy-save, nft --json."""
    found: list[Table] = saved.tables(text, IPTABLES, family) + saved.tables(legacy, LEGACY, family)
    if nft:
        objects = nftrules.parse(nft)
        found += nftrules.tables(objects, nftrules.base_chains(objects))
    return Ruleset(found)


class World:
    """A node, and how it answers. ``answers`` come before those that it has of itself."""

    def __init__(self, text: str = OURS, *, legacy: str = "", nft: str = "", family: str = "ip") -> None:
        self.facts = Facts(
            rules=tables(text, legacy=legacy, nft=nft, family=family),
            locals=_LOCALS,
            addresses=tuple((name, ip_interface(its)) for name, its in _ADDRESSES),
            declared=(ACTIVE,),
            bridges=frozenset({"docker0", "net1"}),
        )
        self.inhabitants: dict[str, Inhabitant | None] = {WEB: inhabitant(), WEB6: inhabitant()}
        self.inhabitants |= {SIBLING: inhabitant("sibling"), OTHER: inhabitant("other")}
        self.settings: dict[str, str] = {
            "net/ipv4/conf/docker0/route_localnet": "1",
            "net/ipv4/conf/eth0/forwarding": "1",
            "net/ipv6/conf/all/forwarding": "1",
        }
        self.sockets: tuple[Socket, ...] = ()
        self.holders: dict[int, str] = {100: "nginx (pid 4712) in container default/web", 7: "sshd (pid 7)"}
        self.bridging = Bridging(bridge=True, filtered=False)
        self.answers: Mapping[Question, Answer] = {}

    def answer(self, question: Question) -> Answer:
        if question in self.answers:
            return self.answers[question]
        match question:
            case RouteTo():
                return self._route(question)
            case Setting(path):
                return self.settings.get(path)
            case SocketsAt():
                return tuple(its for its in self.sockets if its.port == question.port)
            case HolderOf(inode):
                return self.holders.get(inode, "another process")
            case WhoIsAt(address):
                return self.inhabitants.get(str(address))
            case PortOf():
                return self.bridging

    def _route(self, question: RouteTo) -> Route | NoRoute:
        destination = question.destination
        if self.facts.is_own(destination):
            return Route("local", "lo", None, destination)
        from_loopback = question.source is not None and question.source.is_loopback and question.in_device is None
        if from_loopback and self.settings.get("net/ipv4/conf/docker0/route_localnet") != "1":
            return NoRoute(errno.EINVAL)
        for name, its in self.facts.addresses:
            if destination in its.network and name != "lo":
                return Route("unicast", name, None, its.ip)
        gateway = ip_address(CLIENT if destination.version == 4 else CLIENT6)
        return Route("unicast", "eth0", gateway, ip_address(NODE if destination.version == 4 else NODE6))

    def with_answers(self, answers: Mapping[Question, Answer]) -> World:
        self.answers = answers
        return self

    def explain(self, port: str = "8080", source: str | None = None) -> Said:
        """Ask, answer what is asked in return, and return what is said then."""
        asked = read(port, source)
        hooks = Hooks(self.facts.rules)
        facts = self.facts
        for _ in range(100):
            try:
                inquiry = inquire(asked, facts)
                return Said(inquiry, facts, judge(inquiry, facts, walk(inquiry, facts, hooks)))
            except Ask as ask:
                answers = {**facts.answers, ask.question: self.answer(ask.question)}
                facts = replace(facts, answers=answers)
        raise AssertionError("it asks and asks")


class Said:
    """What was said of a packet. ``sentence`` and ``mend`` may ask once more, as ``Ask``."""

    def __init__(self, inquiry: Inquiry, facts: Facts, judgement: Judgement) -> None:
        self.outcome = judgement.outcome.value
        self.cause = judgement.cause.value
        self.sentence, self.mend = sentence(inquiry, facts, judgement)
        self.steps = steps(inquiry, facts, judgement.fate)

    @property
    def transcript(self) -> str:
        """All of it as lines, without what a terminal makes of them."""
        rows = [(step.where, step.what, step.whose) for step in self.steps]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        return "\n".join([*lines, self.sentence]) + "\n"


def addresses(*texts: str) -> list[IPv4Address | IPv6Address]:
    return [ip_address(text) for text in texts]
