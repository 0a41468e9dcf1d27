"""What is said of packets to a made-up node. The golden transcripts are written anew with ``UPDATE_GOLDEN=1``."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from ctrport import ports
from ctrport.explain import sentences
from ctrport.explain.facts import Bridging, Declared, Next, NoRoute, OldFlow, Route, RouteTo, Socket
from ctrport.explain.fate import Cause
from ctrport.explain.whose import chain_owner
from ctrport.model import Access, ContainerKey, Family, Protocol
from tests.unit.ways import ACTIVE, CLIENT, NODE, NODE6, OURS, SIBLING, WEB, WEB6, World, inhabitant

GOLDEN = Path(__file__).with_name("golden") / "explain"

KUBE = (Path(__file__).parents[1] / "node" / "rulesets" / "kube-proxy.iptables").read_text()


def saved(restore: str) -> str:
    """Return what iptables-save would print of what iptables-restore was given: the kernel's own chains are in it."""
    own = {"nat": ("PREROUTING", "OUTPUT", "POSTROUTING"), "filter": ("INPUT", "FORWARD", "OUTPUT"), "mangle": ()}
    text = restore.replace("@ENDPOINT@", SIBLING)
    for table, chains in own.items():
        text = text.replace(f"*{table}\n", f"*{table}\n" + "".join(f":{chain} ACCEPT [0:0]\n" for chain in chains))
    return text


def with_rule(place: str, rule: str, *, first: bool = False, text: str = OURS) -> str:
    """Return tables with one rule more in ``place``, a table: behind all others there, or before them."""
    head, _, rest = text.partition(f"*{place}\n")
    body, _, tail = rest.partition("COMMIT\n")
    lines = body.splitlines()
    at = next((i for i, line in enumerate(lines) if line.startswith("-A")), len(lines)) if first else len(lines)
    lines.insert(at, rule)
    return f"{head}*{place}\n" + "\n".join(lines) + f"\nCOMMIT\n{tail}"


def nft(hook: str, *rules: object, family: str = "inet", policy: str = "accept", priority: int = 10) -> str:
    """Return a table of somebody's with one chain, as nft prints it."""
    where = {"family": family, "table": "other", "chain": hook}
    base = {"type": "filter", "hook": hook, "prio": priority, "policy": policy}
    objects: list[object] = [
        {"metainfo": {"version": "1.0.6"}},
        {"table": {"family": family, "name": "other", "handle": 1}},
        {"chain": {"family": family, "table": "other", "name": hook, "handle": 1, **base}},
    ]
    objects += [{"rule": {**where, "handle": 5 + at, "expr": rule}} for at, rule in enumerate(rules)]
    return json.dumps({"nftables": objects})


def changed(**changes: object) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.facts = replace(world.facts, **changes)  # type: ignore[arg-type]

    return change


def declared(*publications: Declared) -> Callable[[World], None]:
    return changed(declared=publications)


def publication(mapping: str, state: str = "active", reason: str = "", **more: object) -> Declared:
    bound = ports.parse(mapping) if state == "active" else None
    key = ContainerKey("default", "web")
    return Declared("default/web", key, ports.parse(mapping), bound, state, reason, **more)  # type: ignore[arg-type]


def lives(address: str, name: str = "web", *listens: str, **more: object) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.inhabitants[address] = inhabitant(name, *listens, **more)  # type: ignore[arg-type]

    return change


def nobody_at(address: str) -> Callable[[World], None]:
    return lambda world: world.inhabitants.update({address: None})


def setting(path: str, value: str) -> Callable[[World], None]:
    return lambda world: world.settings.update({path: value})


def listens(port: int, address: str = "0.0.0.0", holder: str = "sshd (pid 7)") -> Callable[[World], None]:
    def change(world: World) -> None:
        world.sockets += (Socket(ip_address(address), port, 7),)
        world.holders[7] = holder

    return change


def routed(question: RouteTo, answer: Route | NoRoute) -> Callable[[World], None]:
    return lambda world: world.answers.update({question: answer})  # type: ignore[attr-defined]


def both(*changes: Callable[[World], None]) -> Callable[[World], None]:
    def change(world: World) -> None:
        for each in changes:
            each(world)

    return change


def to(destination: str, source: str | None = None, by: str | None = None) -> RouteTo:
    return RouteTo(ip_address(destination), None if source is None else ip_address(source), by)


IN = (WEB, "198.51.100.254", "eth0")
OURS6 = (
    OURS.split("*filter")[1]
    .join(["*filter", ""])
    .replace("172.17.0.2/32", f"{WEB6}/128")
    .replace(f"--ctorigdst {NODE} ", f"--ctorigdst {NODE6} ")
    .replace("--to-destination 172.17.0.2:80", f"--to-destination [{WEB6}]:80")
    .replace("! -d 127.0.0.0/8", "! -d ::1/128")
    .replace("-A OUTPUT -m addrtype", "-A OUTPUT ! -d ::1/128 -m addrtype")
)
OURS6 = (
    "\n".join(line for line in OURS6.splitlines() if "127.0.0.0/8" not in line and "172.17.0.0/16" not in line) + "\n"
)
SOURCES = with_rule(
    "nat",
    "-A DOCKER -s 203.0.113.0/24 -p tcp -m tcp --dport 8083 "
    '-m comment --comment "ctrport default/web 8083:80/tcp 9b6a0d4ce34e" -j DNAT --to-destination 172.17.0.2:80',
)
INTERFACE = SOURCES.replace("-s 203.0.113.0/24", "-i docker0")
ADDRESSED = SOURCES.replace("-s 203.0.113.0/24", "-d 198.51.100.7/32")
NETWORK = with_rule(
    "filter",
    '-A DOCKER-FORWARD ! -i docker0 -o docker0 -m comment --comment "ctrport network docker0 0a12b3c4d5e6" -j DROP',
)
LEGACY_DROP = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"
STANDS_IN = with_rule(
    "nat", "-A PREROUTING -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.3:80", first=True
)


@dataclass(frozen=True)
class Case:
    """What is asked of which node, and what is said."""

    outcome: str
    cause: Cause
    asked: tuple[str, ...] = ("8080",)
    text: str = OURS
    nft: str = ""
    legacy: str = ""
    change: Callable[[World], None] | None = None
    family: str = "ip"


MATCH = {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 80}}
CASES: dict[str, Case] = {
    "works": Case("works", Cause.CONTAINER),
    "works-from-the-node": Case("works", Cause.CONTAINER, ("8080", NODE)),
    "works-at-localhost": Case("works", Cause.CONTAINER, ("127.0.0.1:8080",)),
    "works-from-a-sibling": Case("works", Cause.CONTAINER, ("8080", SIBLING)),
    "works-from-itself": Case("works", Cause.CONTAINER, ("8080", WEB)),
    "works-over-ipv6": Case(
        "works", Cause.CONTAINER, (f"[{NODE6}]:8080",), OURS6, family="ip6", change=lives(WEB6, "web", "[::]:80")
    ),
    "works-on-a-bridge-that-asks": Case(
        "works",
        Cause.CONTAINER,
        ("8080", SIBLING),
        change=lambda w: setattr(w, "bridging", Bridging(True, True, "veth1", True)),
    ),
    "works-by-a-routed-veth": Case(
        "works", Cause.CONTAINER, change=both(changed(bridges=frozenset()), lives(WEB, gateway="169.254.1.1"))
    ),
    "works-for-a-socket-of-both-families": Case("works", Cause.CONTAINER, change=lives(WEB, "web", "[::]:80")),
    "works-with-a-program-of-the-node": Case("works", Cause.PROGRAM, ("22",), change=listens(22)),
    "works-with-a-program-of-the-node-at-localhost": Case(
        "works", Cause.PROGRAM, ("127.0.0.1:22",), change=listens(22)
    ),
    "works-as-a-node-port": Case("works", Cause.CONTAINER, ("30080",), saved(KUBE), change=declared()),
    "works-past-the-node": Case("works", Cause.CONTAINER, (f"{WEB}:80", SIBLING)),
    "nobody-listens": Case("fails", Cause.NOBODY, ("8999",)),
    "another-protocol": Case("fails", Cause.PROTOCOL, ("8080/udp",)),
    "another-host-address": Case(
        "fails", Cause.HOST_ADDRESS, ("8083",), ADDRESSED, change=declared(publication("198.51.100.7:8083:80"))
    ),
    "service-address": Case(
        "fails", Cause.HOST_ADDRESS, text=ADDRESSED, asked=("8083",), change=declared(publication("8083:80"))
    ),
    "another-address-family": Case(
        "fails",
        Cause.ANOTHER_FAMILY,
        (f"[{NODE6}]:8080",),
        OURS6.replace("--dport 8080", "--dport 8090"),
        family="ip6",
        change=declared(replace(ACTIVE, families=frozenset({Family.IPV4}))),
    ),
    "not-among-sources": Case("fails", Cause.SOURCES, ("8083",), SOURCES, change=declared(publication("8083:80"))),
    "another-interface": Case("fails", Cause.INTERFACE, ("8083",), INTERFACE, change=declared(publication("8083:80"))),
    "another-interface-for-the-node": Case(
        "fails", Cause.INTERFACE, ("8083", NODE), INTERFACE, change=declared(publication("8083:80"))
    ),
    "not-active": Case(
        "fails",
        Cause.NOT_ACTIVE,
        ("8087",),
        change=declared(
            replace(publication("8087:80", "waiting", "no running container matches container=no"), container=None)
        ),
    ),
    "not-active-for-another-reason": Case(
        "fails", Cause.NOT_ACTIVE, ("8087",), change=declared(publication("8087:80", "refused", "it is not allowed"))
    ),
    "forwarding-off-for-the-daemon": Case(
        "fails",
        Cause.FORWARDING,
        ("8087",),
        change=declared(publication("8087:80", "waiting", "the node does not forward IPv4")),
    ),
    "not-in-the-kernel": Case("fails", Cause.NOT_INSTALLED, ("8087",), change=declared(publication("8087:80"))),
    "not-in-the-kernel-and-no-daemon": Case(
        "fails",
        Cause.NOT_INSTALLED,
        ("8087",),
        change=declared(publication("8087:80", "waiting", "gone", missing=True)),
    ),
    "ipv6-loopback": Case("fails", Cause.LOOPBACK6, ("[::1]:8080",), OURS6, family="ip6"),
    "localhost-off": Case(
        "fails",
        Cause.LOCALHOST,
        ("127.0.0.1:8080",),
        OURS.replace("-A OUTPUT -m addr", "-A OUTPUT ! -d 127.0.0.0/8 -m addr"),
        change=changed(localhost=False),
    ),
    "kept-for-nobody": Case(
        "fails",
        Cause.SOURCES,
        ("8083",),
        SOURCES,
        change=both(
            declared(publication("8083:80")),
            listens(8083, holder="python3 (pid 77)"),
            changed(keepers=((Protocol.TCP, "(pid 77)"),)),
        ),
    ),
    "taken-by-a-node-port": Case(
        "fails",
        Cause.TAKEN,
        ("30080",),
        saved(KUBE),
        change=declared(
            publication("30080:80", "conflict", "host port 30080/tcp is held by KUBE-NODEPORTS (shop/web:http)")
        ),
    ),
    "taken-by-a-program": Case(
        "fails",
        Cause.TAKEN,
        ("8086",),
        change=both(declared(publication("8086:80", "conflict", "held")), listens(8086)),
    ),
    "taken-by-somebodys-rule": Case("fails", Cause.TAKEN, text=STANDS_IN),
    "not-tracked": Case("fails", Cause.UNTRACKED, text=with_rule("raw", "-A PREROUTING -p tcp -j CT --notrack")),
    "not-tracked-answer": Case(
        "fails",
        Cause.UNTRACKED,
        text=with_rule("raw", "-A PREROUTING -i docker0 -j CT --notrack").replace(":FORWARD DROP", ":FORWARD ACCEPT"),
    ),
    "not-tracked-program": Case(
        "unknown", Cause.UNTRACKED, ("22",), with_rule("raw", "-A PREROUTING -p tcp -j NOTRACK"), change=listens(22)
    ),
    "dropped-by-the-operator": Case(
        "fails", Cause.DROPPED, text=with_rule("filter", "-A DOCKER-USER -p tcp -m tcp --dport 80 -j DROP")
    ),
    "dropped-in-raw": Case(
        "fails", Cause.DROPPED, text=with_rule("raw", "-A PREROUTING -p tcp -m tcp --dport 8080 -j DROP")
    ),
    "dropped-by-a-policy": Case(
        "fails",
        Cause.DROPPED,
        text="".join(line for line in OURS.splitlines(True) if not line.endswith("-j DOCKER-FORWARD\n")),
    ),
    "dropped-as-our-rule-is-gone": Case(
        "fails",
        Cause.DROPPED,
        text="".join(line for line in OURS.splitlines(True) if "-d 172.17.0.2/32 -p tcp" not in line),
    ),
    "dropped-by-a-policy-of-theirs": Case("fails", Cause.DROPPED, (f"{WEB}:81",)),
    "dropped-in-legacy-tables": Case("fails", Cause.DROPPED, legacy=LEGACY_DROP),
    "dropped-by-another-table": Case("fails", Cause.DROPPED, nft=nft("forward", policy="drop")),
    "dropped-by-a-rule-of-another-table": Case("fails", Cause.DROPPED, nft=nft("forward", [MATCH, {"drop": None}])),
    "dropped-by-kube-proxy": Case("fails", Cause.REJECTED, ("30081",), saved(KUBE), change=declared()),
    "dropped-at-a-program": Case(
        "fails",
        Cause.DROPPED,
        ("22",),
        with_rule("filter", "-A INPUT -p tcp -m tcp --dport 22 -j DROP"),
        change=listens(22),
    ),
    "dropped-at-ingress": Case("unknown", Cause.UNTOLD, nft=nft("ingress", [{"drop": None}], family="netdev")),
    "dropped-on-the-way-out": Case(
        "fails", Cause.DROPPED, ("8080", NODE), with_rule("filter", "-A OUTPUT -o lo -j DROP")
    ),
    "dropped-at-the-end": Case("fails", Cause.DROPPED, nft=nft("postrouting", [MATCH, {"drop": None}])),
    "dropped-on-lo": Case(
        "fails", Cause.DROPPED, ("127.0.0.1:22",), with_rule("filter", "-A INPUT -i lo -j DROP"), change=listens(22)
    ),
    "rejected-above-us": Case(
        "fails",
        Cause.REJECTED,
        text=with_rule("filter", "-A FORWARD -i eth0 -j REJECT --reject-with icmp-port-unreachable", first=True),
    ),
    "rejected-behind-us": Case(
        "fails",
        Cause.REJECTED,
        (f"{WEB}:81",),
        with_rule("filter", "-A FORWARD -i eth0 -j REJECT --reject-with icmp-port-unreachable"),
    ),
    "isolated": Case("fails", Cause.ISOLATED, (f"{WEB}:81",), NETWORK),
    "answer-dropped": Case(
        "fails", Cause.ANSWER_DROPPED, text=with_rule("filter", "-A FORWARD -i docker0 -j DROP", first=True)
    ),
    "answer-dropped-of-a-program": Case(
        "fails",
        Cause.ANSWER_DROPPED,
        ("22",),
        with_rule("filter", "-A OUTPUT -p tcp -m tcp --sport 22 -j DROP"),
        change=listens(22),
    ),
    "next-packet-dropped": Case(
        "fails",
        Cause.LATER_DROPPED,
        text=with_rule("filter", "-A FORWARD -i eth0 -m conntrack --ctstate ESTABLISHED -j DROP", first=True),
    ),
    "no-route": Case("fails", Cause.NO_ROUTE, change=routed(to(*IN), NoRoute(errno.ENETUNREACH))),
    "no-route-but-a-broadcast": Case("fails", Cause.NO_ROUTE, change=routed(to(*IN), Route("broadcast", "docker0"))),
    "no-route-of-the-node": Case(
        "fails", Cause.NO_ROUTE, (f"{WEB}:80", NODE), change=routed(to(WEB, NODE), NoRoute(errno.EACCES))
    ),
    "no-route-once-translated": Case(
        "fails", Cause.NO_ROUTE, ("8080", NODE), change=routed(to(WEB, NODE), NoRoute(errno.EHOSTUNREACH))
    ),
    "no-route-but-a-broadcast-of-the-node": Case(
        "fails", Cause.NO_ROUTE, (f"{WEB}:80", NODE), change=routed(to(WEB, NODE), Route("broadcast", "docker0"))
    ),
    "forwarding-off": Case(
        "fails",
        Cause.FORWARDING,
        change=both(routed(to(*IN), NoRoute(errno.EHOSTUNREACH)), setting("net/ipv4/conf/eth0/forwarding", "0")),
    ),
    "forwarding-off-on-a-device": Case(
        "fails",
        Cause.FORWARDING,
        change=both(
            routed(to(*IN), NoRoute(errno.EHOSTUNREACH)),
            setting("net/ipv4/conf/eth0/forwarding", "0"),
            setting("net/ipv4/ip_forward", "1"),
        ),
    ),
    "forwarding-off-of-ipv6": Case(
        "fails",
        Cause.FORWARDING,
        (f"[{NODE6}]:8080",),
        OURS6,
        family="ip6",
        change=setting("net/ipv6/conf/all/forwarding", "0"),
    ),
    "rp-filter": Case(
        "fails",
        Cause.RP_FILTER,
        ("8080", CLIENT),
        change=both(
            setting("net/ipv4/conf/eth0/rp_filter", "1"),
            routed(to(WEB, CLIENT, "eth0"), NoRoute(errno.EXDEV)),
            routed(to(CLIENT), Route("unicast", "net1")),
        ),
    ),
    "rp-filter-loose": Case(
        "fails",
        Cause.RP_FILTER,
        ("8080", CLIENT),
        change=both(
            setting("net/ipv4/conf/all/rp_filter", "2"),
            routed(to(WEB, CLIENT, "eth0"), NoRoute(errno.EINVAL)),
            routed(to(CLIENT), NoRoute(errno.ENETUNREACH)),
        ),
    ),
    "no-route-blackhole": Case("fails", Cause.NO_ROUTE, change=routed(to(*IN), NoRoute(errno.EINVAL))),
    "route-localnet-off": Case(
        "fails", Cause.ROUTE_LOCALNET, ("127.0.0.1:8080",), change=setting("net/ipv4/conf/docker0/route_localnet", "0")
    ),
    "route-localnet-off-for-the-answer": Case(
        "fails",
        Cause.ROUTE_LOCALNET,
        ("127.0.0.1:8080",),
        change=both(
            setting("net/ipv4/conf/docker0/route_localnet", "0"),
            routed(to(WEB, "127.0.0.1"), Route("unicast", "docker0")),
            routed(to("127.0.0.1", WEB, "docker0"), NoRoute(errno.EINVAL)),
        ),
    ),
    "route-localnet-off-for-others": Case(
        "fails",
        Cause.ROUTE_LOCALNET,
        ("127.0.0.1:22", CLIENT),
        "",
        change=routed(to("127.0.0.1", CLIENT, "eth0"), NoRoute(errno.EINVAL)),
    ),
    "hairpin-off": Case(
        "fails",
        Cause.HAIRPIN,
        ("8080", WEB),
        change=lambda w: setattr(w, "bridging", Bridging(True, True, "veth1", False)),
    ),
    "container-gone": Case("fails", Cause.GONE, change=nobody_at(WEB)),
    "container-gone-and-another-there": Case("fails", Cause.GONE, change=lives(WEB, "late")),
    "nobody-known": Case("unknown", Cause.STRANGER, ("172.17.0.9:80", NODE)),
    "ipvs": Case("unknown", Cause.IPVS, ("30080",), change=changed(ipvs=frozenset({(Protocol.TCP, 30080)}))),
    "leaves-the-node": Case("unknown", Cause.BEYOND, ("203.0.113.9:80", NODE)),
    "container-paused": Case("fails", Cause.PAUSED, change=lives(WEB, paused=True)),
    "container-does-not-listen": Case(
        "fails", Cause.NOT_LISTENING, change=lives(WEB, "web", *(f"0.0.0.0:{port}" for port in range(90, 97)))
    ),
    "container-does-not-listen-at-all": Case("fails", Cause.NOT_LISTENING, change=lives(WEB, "web", "127.0.0.1:81")),
    "container-listens-on-loopback": Case("fails", Cause.LOOPBACK_ONLY, change=lives(WEB, "web", "127.0.0.1:80")),
    "sockets-not-seen": Case(
        "unknown",
        Cause.SOCKETS_UNSEEN,
        ("8080/sctp",),
        OURS.replace("-p tcp -m tcp", "-p sctp -m sctp").replace("/tcp ", "/sctp "),
        change=declared(publication("8080:80/sctp")),
    ),
    "no-way-back": Case("fails", Cause.NO_WAY_BACK, change=lives(WEB, gateway=None)),
    "no-way-back-through-another": Case("fails", Cause.NO_WAY_BACK, change=lives(WEB, gateway=SIBLING)),
    "no-way-back-from-the-node": Case(
        "fails",
        Cause.NO_WAY_BACK,
        ("22", "203.0.113.9"),
        change=both(listens(22), routed(to("203.0.113.9", NODE), NoRoute(errno.ENETUNREACH))),
    ),
    "answers-past-the-node": Case(
        "fails",
        Cause.PAST_NODE,
        ("8080", SIBLING),
        "".join(line for line in OURS.splitlines(True) if "172.17.0.0/16" not in line),
    ),
    "source-is-the-container": Case(
        "fails",
        Cause.OWN_ADDRESS,
        ("8080", WEB),
        "".join(line for line in OURS.splitlines(True) if "172.17.0.0/16" not in line),
    ),
    "rule-not-understood": Case(
        "unknown", Cause.UNTOLD, text=with_rule("filter", "-A DOCKER-USER -m set --match-set bad src -j DROP")
    ),
    "target-not-understood": Case(
        "unknown", Cause.UNTOLD, text=with_rule("filter", "-A DOCKER-USER -j NFQUEUE --queue-num 3")
    ),
    "rule-that-does-not-matter": Case(
        "works", Cause.CONTAINER, text=with_rule("filter", "-A DOCKER-USER -m limit --limit 1/sec -j RETURN")
    ),
    "not-all-can-be-seen": Case(
        "unknown", Cause.UNSEEN, change=changed(unseen=("nft is not installed, and there is a table inet fw",))
    ),
    "table-of-flows-full": Case(
        "unknown",
        Cause.TABLE_FULL,
        change=both(setting("net/netfilter/nf_conntrack_count", "9"), setting("net/netfilter/nf_conntrack_max", "9")),
    ),
    "frames-not-looked-into": Case("unknown", Cause.UNSEEN, nft=nft("forward", [{"drop": None}], family="bridge")),
}


def world(case: Case) -> World:
    found = World(case.text, nft=case.nft, legacy=case.legacy, family=case.family)
    found.answers = {}
    if case.change is not None:
        case.change(found)
    return found


@pytest.mark.parametrize("name", CASES)
def test_what_is_said(name: str) -> None:
    case = CASES[name]
    said = world(case).explain(*case.asked)
    assert (said.outcome, said.cause) == (case.outcome, case.cause.value), said.transcript
    beginning = {"works": "works: ", "fails": "does not work, because ", "unknown": "cannot be told, because "}
    assert said.sentence.startswith(beginning[case.outcome])
    assert said.mend in said.sentence
    assert "\n" not in said.sentence
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(said.transcript)
    assert said.transcript == path.read_text()


def test_every_golden_transcript_has_its_case() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


def test_every_cause_is_tried() -> None:
    assert {case.cause for case in CASES.values()} == set(Cause)


# ctrport's own nft tables, and others', as nft prints them


def own_table(*elements: object) -> str:
    """Return a table as ctrport keeps one: a map from what is asked for to where it is."""
    where = {"family": "ip", "table": "ctrport"}
    key = {"concat": [{"meta": {"key": "l4proto"}}, {"payload": {"protocol": "th", "field": "dport"}}]}
    local = {"match": {"op": "==", "left": {"fib": {"result": "type", "flags": ["daddr"]}}, "right": "local"}}
    tcp = {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": {"set": ["tcp", "udp"]}}}
    dnat = {"dnat": {"family": "ip", "addr": {"map": {"key": key, "data": "@anywhere"}}}}
    base = {"type": "nat", "hook": "prerouting", "prio": -90, "policy": "accept"}
    kinds = {"type": ["inet_proto", "inet_service"], "map": "ipv4_addr . inet_service", "flags": ["interval"]}
    objects = [
        {"table": {"family": "ip", "name": "ctrport", "handle": 1}},
        {"map": {**where, "name": "anywhere", "handle": 2, **kinds, "elem": list(elements)}},
        {"chain": {**where, "name": "prerouting", "handle": 3, **base}},
        {"rule": {**where, "chain": "prerouting", "handle": 4, "expr": [tcp, local, dnat]}},
    ]
    return json.dumps({"nftables": objects})


ELEMENT = [{"concat": ["tcp", {"range": [8080, 8083]}]}, {"concat": [WEB, 80]}]
WITHOUT_US = OURS.replace("-A PREROUTING ! -d", "-A PREROUTING -p udp ! -d").replace(":FORWARD DROP", ":FORWARD ACCEPT")


def test_our_own_nft_tables_are_ours() -> None:
    said = World(WITHOUT_US, nft=own_table(ELEMENT)).explain("8080")
    assert (said.outcome, said.cause) == ("works", "container-answers")
    [step] = [step for step in said.steps if step.does == "dnat"]
    assert (step.where, step.whose) == ("ip ctrport prerouting", "ctrport")
    assert said.sentence == f"works: 198.51.100.254 reaches {WEB}:80 in container default/web"


def test_a_map_of_ours_that_leads_to_nobody() -> None:
    world = World(WITHOUT_US, nft=own_table(ELEMENT))
    world.inhabitants[WEB] = None
    said = world.explain("8080")
    assert said.cause == "container-gone"
    assert "the rule of default/web 8080:80/tcp still leads to" in said.sentence


@pytest.mark.parametrize(
    ("access", "source", "cause"),
    [
        (Access(sources=(ip_network("203.0.113.0/24"),)), CLIENT, "not-among-sources"),
        (Access(sources=(ip_network("2001:db8::/32"),)), CLIENT, "not-among-sources"),
        (Access(interface="docker0"), CLIENT, "another-interface"),
        (Access(sources=(ip_network("198.51.100.0/24"),)), CLIENT, "not-in-the-kernel"),
        (Access(), CLIENT, "not-in-the-kernel"),
    ],
)
def test_where_rules_do_not_say_who_is_let_in_the_configuration_does(access: Access, source: str, cause: str) -> None:
    world = World(WITHOUT_US, nft=own_table())
    world.facts = replace(world.facts, declared=(replace(publication("8090:80"), access=access),))
    assert world.explain("8090", source).cause == cause


def test_kube_proxy_chooses_by_chance_and_it_is_its_port_whichever() -> None:
    one, other = (
        f"-A KUBE-SEP-A -p tcp -j DNAT --to-destination {WEB}:80",
        f"-A KUBE-SEP-B -p tcp -j DNAT --to-destination {SIBLING}:80",
    )
    text = (
        "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-SEP-A - [0:0]\n:KUBE-SEP-B - [0:0]\n"
        "-A PREROUTING -j KUBE-NODEPORTS\n"
        "-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -m statistic --mode random --probability 0.5 -j KUBE-SEP-A\n"
        f"-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-SEP-B\n{one}\n{other}\nCOMMIT\n"
    )
    world = World(text)
    world.facts = replace(world.facts, declared=())
    said = world.explain("30080")
    assert said.outcome == "works"
    assert "sent there by kube-proxy and not by ctrport" in said.sentence
    world.inhabitants[SIBLING] = inhabitant("sibling", "0.0.0.0:81")
    said = world.explain("30080")
    assert (said.outcome, said.cause) == ("unknown", "rule-not-understood")
    assert "if it matches, it works, and if not, nobody in container default/sibling listens on 80/tcp" in said.sentence
    world.inhabitants[WEB] = inhabitant("web", "0.0.0.0:81")
    assert world.explain("30080").outcome == "fails"


def test_two_doubts_that_fail_alike_are_a_failure() -> None:
    text = with_rule("filter", "-A DOCKER-USER -m set --match-set bad src -j DROP")
    text = with_rule("filter", "-A DOCKER-USER -j DROP", text=text)
    assert World(text).explain().outcome == "fails"


def test_a_mark_that_the_first_answer_leaves_meets_the_second() -> None:
    text = with_rule("filter", "-A FORWARD -i docker0 -m connmark --mark 0x1 -j DROP", first=True)
    text += "*mangle\n:POSTROUTING ACCEPT [0:0]\n"
    text += "-A POSTROUTING -m conntrack --ctdir REPLY -j CONNMARK --set-xmark 0x1/0x1\n"
    said = World(f"{text}COMMIT\n").explain()
    assert said.cause == "answer-dropped"
    assert "-m connmark --mark 0x1 -j DROP" in said.sentence


def test_flows_that_go_elsewhere_are_told_and_others_not() -> None:
    world = World()
    flows = [
        OldFlow(Protocol.UDP, ip_address(NODE), 8080, ip_address(SIBLING), 80),
        OldFlow(Protocol.UDP, ip_address(NODE), 8080, ip_address(SIBLING), 80),
        OldFlow(Protocol.UDP, ip_address(NODE), 8080, ip_address(WEB), 80),
        OldFlow(Protocol.UDP, ip_address("198.51.100.7"), 8080, ip_address(SIBLING), 80),
    ]
    world.facts = replace(world.facts, flows=tuple(flows))
    told = [step.what for step in world.explain().steps if step.where == "tracked flows"]
    assert told == [f"one that was sent to {NODE}:8080 goes on to {SIBLING}:80"]


def test_a_long_rule_is_cut() -> None:
    said = World(with_rule("filter", f'-A DOCKER-USER -m comment --comment "{"x" * 200}" -j DROP')).explain()
    assert "xxx...'" in said.sentence
    assert len(said.sentence) < 500


def test_a_container_on_two_networks_answers_by_the_nearer_where_nothing_lets_it_through() -> None:
    world = World()
    web = inhabitant()
    near = Next(ip_network("198.51.100.0/24"), ip_address("172.18.0.1"), "eth1")
    world.inhabitants[WEB] = replace(web, routes=(*web.routes, near))
    assert world.explain().cause == "answer-dropped"


def test_a_paused_container_that_nobody_knows_cannot_be_resumed_by_its_name() -> None:
    world = World()
    world.inhabitants[WEB] = replace(inhabitant(paused=True), keys=frozenset())
    said = world.explain()
    assert (said.cause, said.mend) == ("container-paused", "")


@pytest.mark.parametrize(
    ("chain", "whose"),
    [
        ("KUBE-SERVICES", "kube-proxy"),
        ("KUBE-FIREWALL", "the kubelet"),
        ("CNI-HOSTPORT-DNAT", "CNI portmap"),
        ("CNI-37eec1f0920c4bc6641e4fea", "CNI"),
        ("cali-FORWARD", "Calico"),
        ("DOCKER", "dockerd"),
        ("DOCKER-USER", "the operator"),
        ("CTRPORT", "ctrport"),
        ("CTRPORT-FORWARD", "ctrport"),
        ("CTRPORTS", ""),
        ("mine", ""),
    ],
)
def test_whose_a_chain_is(chain: str, whose: str) -> None:
    assert chain_owner(chain, "CTRPORT") == whose


def test_each_cause_has_its_words() -> None:
    assert set(sentences._SAID) == set(Cause)
