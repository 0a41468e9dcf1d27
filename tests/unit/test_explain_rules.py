"""Rules as programs print them, asked whether they match: yes, no, or that cannot be told. Never a guess."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrport.explain import nftrules, saved
from ctrport.explain.conditions import Surroundings
from ctrport.explain.nftwords import words_of
from ctrport.explain.packet import CLIENT_PORTS, Field, Packet, Place, Turn
from ctrport.explain.ruleset import (
    ACTIONS,
    End,
    Jump,
    LookUp,
    Mark,
    NewDestination,
    NewSource,
    Perhaps,
    Redirect,
    Return,
    Rule,
    To,
    Toss,
    Untrack,
)
from ctrport.explain.values import Elements, Found, Name, Pattern, compare
from ctrport.model import Address, PortRange, Protocol
from tests.unit.hostile import fuzz, texts
from tests.unit.ways import CLIENT, NODE, NODE6, WEB

FULL = 0xFFFFFFFF


class Around:
    """A node with an address of its own, and a route to the LAN."""

    def type_of(self, address: Address, device: str | None = None) -> str:
        if str(address) in (NODE, NODE6):
            return "local" if device in (None, "eth0") else "unicast"
        return "unicast"

    def device_to(self, address: Address) -> str | None:
        return "eth0" if str(address) == CLIENT else None


AROUND: Surroundings = Around()
FIRST = replace(Packet.first(Protocol.TCP, ip_address(CLIENT), ip_address(NODE), 8080), in_device="eth0").looked_up()
SENT_ON = replace(FIRST.sent_to(Place(ip_address(WEB), PortRange(80, 80))), out_device="docker0")
ANSWER = replace(SENT_ON.answer("docker0").looked_up(), out_device="eth0")
LATER = SENT_ON.later().behind(ANSWER).looked_up()
UNSEEN = replace(Packet.first(Protocol.TCP, ip_address(CLIENT), ip_address(NODE), 8080), in_device="eth0")
UNTRACKED = UNSEEN.untracked()
OWN = Packet.first(Protocol.TCP, ip_address(NODE), ip_address(NODE), 8080).looked_up()
UDP = replace(FIRST, protocol=Protocol.UDP)
MASKED = SENT_ON.from_behind(None)
UNMARKED = replace(FIRST, mark=None)
SIXTH = Packet.first(Protocol.TCP, ip_address("2001:db8:51::2"), ip_address(NODE6), 8080).looked_up()


def read_iptables(words: str) -> Rule:
    text = f"*filter\n:FORWARD ACCEPT [0:0]\n:user - [0:0]\n-A FORWARD {words}\nCOMMIT\n"
    [table] = saved.tables(text, "iptables-nft", "ip")
    [rule] = table.chains["FORWARD"].rules
    return rule


def read_nft(*expressions: Any, sets: Mapping[str, Any] | None = None) -> Rule:
    where = {"family": "inet", "table": "t"}
    objects: list[Any] = [{"table": {"family": "inet", "name": "t"}}, {"chain": {**where, "name": "c"}}]
    for name, its in (sets or {}).items():
        objects.append({"map" if "map" in its else "set": {**where, "name": name, **its}})
    objects.append({"rule": {**where, "chain": "c", "handle": 7, "expr": list(expressions)}})
    [table] = nftrules.tables(objects, {})
    [rule] = table.chains["c"].rules
    return rule


def holds(rule: Rule, packet: Packet) -> bool | None:
    """Whether all that a rule asks is so."""
    answers = [condition.holds(packet, AROUND) for condition in rule.conditions]
    return False if False in answers else None if None in answers else True


# iptables


@pytest.mark.parametrize(
    ("words", "packet", "expected"),
    [
        ("-s 198.51.100.0/24", FIRST, True),
        ("! -s 198.51.100.0/24", FIRST, False),
        ("-s 198.51.100.2/32", FIRST, True),
        ("-d 172.17.0.0/16", FIRST, False),
        ("-d 172.17.0.0/16", SENT_ON, True),
        ("-d 10.0.0.1/255.0.0.255", FIRST, None),
        ("-i eth0", FIRST, True),
        ("-i eth+", FIRST, True),
        ("! -i eth0", FIRST, False),
        ("-i eth", FIRST, False),
        ("-o docker0", FIRST, False),
        ("-o docker0", SENT_ON, True),
        ("-p tcp", FIRST, True),
        ("-p udp", FIRST, False),
        ("-p 6", FIRST, True),
        ("-p all", FIRST, True),
        ("! -p all", FIRST, False),
        ("-p icmp -m icmp --icmp-type 8", FIRST, False),
        ("! -p icmp", FIRST, True),
        ("-p nosuch", FIRST, None),
        ("-f", FIRST, False),
        ("! -f", FIRST, True),
        ("-p tcp -m tcp --dport 8080", FIRST, True),
        ("-p tcp -m tcp --dport 8000:8090", FIRST, True),
        ("-p tcp -m tcp --dport :1024", FIRST, False),
        ("-p tcp -m tcp --dport 1024:", FIRST, True),
        ("-p tcp -m tcp ! --dport 8080", FIRST, False),
        ("-p tcp -m tcp --sport 1024:65535", FIRST, True),
        ("-p tcp -m tcp --sport 1:1023", FIRST, False),
        ("-p tcp -m tcp --sport 40000", FIRST, None),
        ("-p tcp -m tcp ! --sport 40000", FIRST, None),
        ("-p udp -m udp --dport 8080", UDP, True),
        ("-p tcp -m multiport --dports 22,8000:8090", FIRST, True),
        ("-p tcp -m multiport ! --dports 22,80", FIRST, True),
        ("-p tcp -m multiport --sports 22,40000", FIRST, None),
        ("-p tcp -m multiport --ports 8080", FIRST, True),
        ("-p tcp -m multiport --ports 22", FIRST, False),
        ("-p tcp -m multiport ! --ports 22", FIRST, True),
        ("-p tcp -m multiport --ports 22,40000", FIRST, None),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", FIRST, True),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", ANSWER, False),
        ("-p tcp -m tcp --tcp-flags ALL ACK", LATER, True),
        ("-p tcp -m tcp --tcp-flags ALL NONE", FIRST, False),
        ("-p tcp -m tcp --syn", FIRST, True),
        ("-p tcp -m tcp ! --syn", ANSWER, True),
        ("-p tcp -m tcp --tcp-option 8", FIRST, None),
        ("-m conntrack --ctstate NEW", FIRST, True),
        ("-m conntrack ! --ctstate NEW", FIRST, False),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", FIRST, False),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", ANSWER, True),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", LATER, True),
        ("-m conntrack --ctstate DNAT", FIRST, False),
        ("-m conntrack --ctstate DNAT", SENT_ON, True),
        ("-m conntrack --ctstate SNAT", MASKED, True),
        ("-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT", SENT_ON, False),
        ("-m conntrack --ctstate INVALID", UNSEEN, True),
        ("-m conntrack --ctstate UNTRACKED", UNTRACKED, True),
        ("-m conntrack --ctstate DNAT --ctorigdstport 8080", SENT_ON, True),
        ("-m conntrack --ctstate DNAT ! --ctorigdstport 8080", SENT_ON, False),
        ("-m conntrack --ctorigdst 198.51.100.1", SENT_ON, True),
        ("-m conntrack --ctorigsrc 198.51.100.0/24", SENT_ON, True),
        ("-m conntrack --ctreplsrc 172.17.0.2", SENT_ON, True),
        ("-m conntrack --ctreplsrcport 80", SENT_ON, True),
        ("-m conntrack --ctrepldst 198.51.100.2", SENT_ON, True),
        ("-m conntrack --ctrepldst 198.51.100.2", MASKED, None),
        ("-m conntrack --ctrepldstport 40000", MASKED, None),
        ("-m conntrack --ctproto 6", FIRST, True),
        ("-m conntrack --ctdir ORIGINAL", FIRST, True),
        ("-m conntrack --ctdir REPLY", ANSWER, True),
        ("-m conntrack --ctdir ORIGINAL", LATER, True),
        ("-m conntrack ! --ctorigdst 198.51.100.1", UNSEEN, False),  # of no flow nothing can be said
        ("-m conntrack ! --ctorigdst 198.51.100.7", UNSEEN, False),
        ("-m conntrack --ctstatus SEEN_REPLY", FIRST, False),
        ("-m conntrack --ctstatus SEEN_REPLY", LATER, True),
        ("-m conntrack ! --ctstatus CONFIRMED", FIRST, True),
        ("-m conntrack ! --ctstatus CONFIRMED", UNSEEN, False),
        ("-m conntrack --ctstatus ASSURED", FIRST, False),
        ("-m conntrack --ctstatus ASSURED", LATER, None),
        ("-m conntrack --ctstatus EXPECTED", FIRST, None),
        ("-m conntrack --ctexpire 1:10", FIRST, None),
        ("-m state --state NEW", FIRST, True),
        ("-m mark --mark 0x0", FIRST, True),
        ("-m mark --mark 0x4000/0x4000", FIRST, False),
        ("-m mark ! --mark 0x4000/0x4000", FIRST, True),
        ("-m mark --mark 0x1", UNMARKED, None),
        ("-m mark --mark 0x1/0x1", UNMARKED, None),
        ("-m connmark --mark 0x0", FIRST, True),
        ("-m connmark ! --mark 0x1", UNSEEN, False),
        ("-m addrtype --dst-type LOCAL", FIRST, True),
        ("-m addrtype ! --dst-type LOCAL", FIRST, False),
        ("-m addrtype --src-type LOCAL", FIRST, False),
        ("-m addrtype --dst-type LOCAL,NAT", FIRST, None),
        ("-m addrtype --dst-type LOCAL --limit-iface-in", FIRST, None),
        ("-m iprange --src-range 198.51.100.1-198.51.100.9", FIRST, True),
        ("-m iprange ! --dst-range 198.51.100.7", FIRST, True),
        ("-m pkttype --pkt-type unicast", FIRST, True),
        ("-m pkttype --pkt-type multicast", FIRST, False),
        ("-m rpfilter", FIRST, True),
        ("-m rpfilter --invert", FIRST, False),
        ("-m rpfilter --loose", replace(FIRST, in_device="eth9"), True),
        ("-m rpfilter --validmark", replace(FIRST, in_device="eth9"), False),
        ("-m rpfilter", replace(FIRST, in_device="lo"), True),
        ("-m rpfilter --nosuch", FIRST, None),
        ("-m physdev --physdev-is-bridged", FIRST, False),
        ("-m physdev ! --physdev-is-bridged", FIRST, True),
        ("-m physdev --physdev-is-bridged", replace(FIRST, out_device="eth0"), None),
        ("-m owner --uid-owner 0", FIRST, False),
        ("-m owner --uid-owner 0", OWN, None),
        ("-m set --match-set bad src", FIRST, None),
        ("-m limit --limit 5/sec", FIRST, None),
        ("-m nosuch", FIRST, None),
        ('-m comment --comment "-j DROP" -p udp', FIRST, False),
        ("-m comment --comment -j -p udp", FIRST, False),
        ("-s nonsense", FIRST, None),
        ("-d", FIRST, None),
        ("--dport 80", FIRST, None),  # of no protocol that was named
        ("--nosuch", FIRST, None),
        ("-m set --match-set bad src -m mark --mark 0x1", FIRST, False),  # one that is not so decides
    ],
)
def test_a_match_of_iptables(words: str, packet: Packet, expected: bool | None) -> None:
    assert holds(read_iptables(f"{words} -j ACCEPT"), packet) is expected


def to(address: str | None = None, ports: tuple[int, int] | None = None, base: int | None = None) -> To:
    its = None if address is None else (ip_address(address), ip_address(address))
    return To(its, None if ports is None else PortRange(*ports), base)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-j ACCEPT", [End("accept")]),
        ("-j DROP", [End("drop")]),
        ("-j REJECT --reject-with icmp-port-unreachable", [End("reject")]),
        ("-j RETURN", [Return()]),
        ("-j user", [Jump("user")]),
        ("-g user", [Jump("user", goto=True)]),
        ("-j gone", [Perhaps("-j gone")]),
        ('-j LOG --log-prefix "-j DROP "', []),
        ("", []),
        ("-j DNAT --to-destination 172.17.0.2:80", [NewDestination(to(WEB, (80, 80)))]),
        ("-j DNAT --to-destination 172.17.0.2", [NewDestination(to(WEB))]),
        ("-j DNAT --to-destination :80", [NewDestination(to(None, (80, 80)))]),
        ("-j DNAT --to-destination 172.17.0.2:9000-9010/8000", [NewDestination(to(WEB, (9000, 9010), 8000))]),
        ("-j DNAT --to-destination [fd00::2]:80", [NewDestination(to("fd00::2", (80, 80)))]),
        ("-j DNAT --to-destination fd00::2", [NewDestination(to("fd00::2"))]),
        (
            "-j DNAT --to-destination 172.17.0.2-172.17.0.9 --random",
            [NewDestination(To((ip_address(WEB), ip_address("172.17.0.9"))))],
        ),
        ("-j DNAT --to-destination nonsense", [Perhaps("-j DNAT --to-destination nonsense")]),
        ("-j DNAT", [Perhaps("-j DNAT")]),
        ("-j REDIRECT --to-ports 8081", [Redirect(PortRange(8081, 8081))]),
        ("-j REDIRECT --to-ports 8081-8090", [Redirect(PortRange(8081, 8090))]),
        ("-j REDIRECT", [Redirect()]),
        ("-j SNAT --to-source 198.51.100.1", [NewSource(ip_address(NODE))]),
        ("-j SNAT --to-source 198.51.100.1-198.51.100.9", [NewSource()]),
        ("-j SNAT --to-source :1024", [NewSource()]),
        ("-j MASQUERADE --random-fully", [NewSource(device=True)]),
        ("-j MARK --set-xmark 0x4000/0x4000", [Mark(Field.MARK, Field.MARK, FULL & ~0x4000, 0x4000)]),
        ("-j MARK --set-xmark 0x1/0xffffffff", [Mark(Field.MARK, Field.MARK, 0, 1)]),
        ("-j CONNMARK --save-mark", [Mark(Field.CT_MARK, Field.MARK, FULL)]),
        (
            "-j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xf",
            [Mark(Field.MARK, Field.CT_MARK, 0xF, own=FULL & ~0xFF)],
        ),
        ("-j MARK --nosuch 1", [Mark(Field.MARK, None), Mark(Field.CT_MARK, None)]),
        ("-j CT --notrack", [Untrack()]),
        ("-j NOTRACK", [Untrack()]),
        ("-j CT --helper ftp", []),
        ("-j CT --zone 3", [Perhaps("-j CT --zone 3")]),
        ("-j TPROXY --on-port 80", [Perhaps("-j TPROXY --on-port 80")]),
    ],
)
def test_a_target_of_iptables(words: str, expected: list[object]) -> None:
    rule = read_iptables(words)
    assert [part for part in rule.parts if isinstance(part, ACTIONS)] == expected
    assert rule.acts is bool(expected)


def test_our_own_rules_are_known_by_their_comment() -> None:
    rule = read_iptables('-m comment --comment "ctrport default/web 8080:80/tcp 9b6a0d4ce34e" -j ACCEPT')
    assert rule.tag == rule.comment == "ctrport default/web 8080:80/tcp 9b6a0d4ce34e"
    forged = read_iptables('-m comment --comment "x ctrport default/web 8080:80/tcp 9b6a0d4ce34e" -j ACCEPT')
    assert forged.tag is None


def test_a_comment_is_no_rule_whatever_is_in_it() -> None:
    comment = 'a \\"\n-A FORWARD -j DROP\nCOMMIT\n'
    text = f'*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -m comment --comment "{comment}" -j ACCEPT\nCOMMIT\n'
    [table] = saved.tables(text, "iptables-nft", "ip")
    [rule] = table.chains["FORWARD"].rules
    assert rule.parts == (End("accept"),)


@pytest.mark.parametrize(
    "line",
    [
        "# Table `nat' is incompatible, use 'nft' tool.",
        "# Table `nat' contains incompatible base-chains, use 'nft' tool to list them.",
    ],
)
def test_a_table_that_is_not_all_there_is_none(line: str) -> None:
    text = f"{line}\n*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n*filter\n:FORWARD DROP [0:0]\n-A gone -j DROP\nCOMMIT\n"
    [table] = saved.tables(text, "iptables-nft", "ip")
    assert table.name == "filter"
    base = table.chains["FORWARD"].base
    assert base is not None
    assert (base.hook, base.priority, base.type, base.policy) == ("forward", 0, "filter", "drop")


@fuzz(150)
@given(st.lists(texts | st.sampled_from(["-j", "-m", "!", "--comment", "-p", "tcp", "DNAT", "--dport"]), max_size=8))
def test_no_text_of_a_rule_is_too_much(words: list[str]) -> None:
    text = f"*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD {' '.join(words)}\nCOMMIT\n"
    for table in saved.tables(text, "iptables-nft", "ip"):
        for chain in table.chains.values():
            for rule in chain.rules:
                holds(rule, FIRST)


@fuzz(150)
@given(texts)
def test_no_text_at_all_is_too_much(text: str) -> None:
    for table in saved.tables(text, "iptables-nft", "ip"):
        for chain in table.chains.values():
            assert isinstance(list(chain.rules), list)


# nft


def payload(protocol: str, field: str) -> dict[str, Any]:
    return {"payload": {"protocol": protocol, "field": field}}


def meta(key: str) -> dict[str, Any]:
    return {"meta": {"key": key}}


def ct(key: str, direction: str | None = None) -> dict[str, Any]:
    return {"ct": {"key": key, **({"dir": direction} if direction else {})}}


def fib(result: str, *flags: str) -> dict[str, Any]:
    return {"fib": {"result": result, "flags": list(flags)}}


def prefix(address: str, length: int) -> dict[str, Any]:
    return {"prefix": {"addr": address, "len": length}}


DPORT, SADDR = payload("tcp", "dport"), payload("ip", "saddr")
PAIR = {"concat": [payload("ip", "daddr"), DPORT]}
SETS: dict[str, Any] = {
    "hosts": {"type": "ipv4_addr", "elem": [CLIENT, prefix("10.0.0.0", 8), {"range": ["172.17.0.2", "172.17.0.9"]}]},
    "ports": {"type": "inet_service", "elem": [{"elem": {"val": 99, "timeout": 300}}, {"range": [8000, 8090]}]},
    "pairs": {
        "type": ["ipv4_addr", "inet_service"],
        "elem": [{"concat": [NODE, 8080]}, {"concat": [NODE, {"range": [1, 9]}]}],
    },
    "empty": {"type": "ipv4_addr"},
    "odd": {"type": "ifname", "elem": [{"range": ["", ""]}, "lo"]},
    "verdicts": {
        "type": "inet_service",
        "map": "verdict",
        "elem": [[8080, {"drop": None}], [80, {"jump": {"target": "x"}}]],
    },
    "places": {
        "type": ["inet_proto", "inet_service"],
        "map": "ipv4_addr . inet_service",
        "elem": [[{"concat": ["tcp", {"range": [8000, 8090]}]}, {"concat": [WEB, 80]}]],
    },
    "marks": {"type": "inet_service", "map": "mark", "elem": [[8080, 1]]},
}


@pytest.mark.parametrize(
    ("left", "operator", "right", "packet", "expected"),
    [
        (SADDR, "==", CLIENT, FIRST, True),
        (SADDR, "!=", CLIENT, FIRST, False),
        (SADDR, "==", prefix("198.51.100.0", 24), FIRST, True),
        (SADDR, "==", {"range": ["198.51.100.0", "198.51.100.9"]}, FIRST, True),
        (SADDR, "==", {"set": [prefix("10.0.0.0", 8), CLIENT]}, FIRST, True),
        (SADDR, "==", "@hosts", FIRST, True),
        (SADDR, "!=", "@hosts", FIRST, False),
        (SADDR, "==", "@empty", FIRST, False),
        (SADDR, "==", "@gone", FIRST, None),
        (SADDR, "==", CLIENT, SIXTH, False),
        (SADDR, "!=", CLIENT, SIXTH, False),  # what is of IPv4 alone
        (payload("ip6", "daddr"), "==", NODE6, SIXTH, True),
        (payload("ip6", "daddr"), "==", prefix("2001:db8::", 32), SIXTH, True),
        (DPORT, "==", 8080, FIRST, True),
        (DPORT, "==", {"range": [8000, 8090]}, FIRST, True),
        (DPORT, "==", "@ports", FIRST, True),
        (DPORT, "!=", "@ports", FIRST, False),
        (DPORT, "<", 8080, FIRST, False),
        (DPORT, "<=", 8080, FIRST, True),
        (DPORT, ">", 8080, FIRST, False),
        (DPORT, ">=", 8080, FIRST, True),
        (DPORT, "==", 8080, UDP, False),
        (DPORT, "!=", 80, UDP, False),
        (payload("th", "dport"), "==", 8080, UDP, True),
        (payload("tcp", "sport"), "==", 40000, FIRST, None),
        (payload("tcp", "sport"), "==", {"set": [40000, 50000]}, FIRST, None),
        (payload("tcp", "sport"), "==", {"set": [22, 80]}, FIRST, False),
        (payload("tcp", "sport"), "==", {"range": [1024, 65535]}, FIRST, True),
        ({"concat": [payload("ip", "daddr"), DPORT]}, "==", "@pairs", FIRST, True),
        (PAIR, "==", {"set": [{"concat": [NODE]}, {"concat": [NODE, 8080]}]}, FIRST, True),
        (PAIR, "==", {"set": [{"concat": [NODE]}, {"concat": [NODE, 80]}]}, FIRST, None),
        ({"concat": [payload("ip", "daddr"), DPORT]}, "==", {"set": [{"concat": [NODE]}]}, FIRST, None),  # nft lost one
        ({"concat": [payload("ip", "daddr"), DPORT]}, "==", {"concat": [NODE, 8080]}, FIRST, None),
        (meta("l4proto"), "==", "tcp", FIRST, True),
        (meta("l4proto"), "==", 17, FIRST, False),
        (meta("l4proto"), "==", {"set": ["tcp", "udp"]}, FIRST, True),
        (meta("l4proto"), "==", "nosuch", FIRST, None),
        (payload("ip", "protocol"), "==", "icmp", FIRST, False),
        (meta("nfproto"), "==", "ipv4", FIRST, True),
        (meta("protocol"), "==", "ip6", FIRST, False),
        (payload("ip", "version"), "==", 4, FIRST, True),
        (meta("iifname"), "==", "eth0", FIRST, True),
        (meta("iifname"), "==", "eth*", FIRST, True),
        (meta("iif"), "!=", "lo", FIRST, True),
        (meta("oifname"), "==", {"set": ["docker0", "eth1"]}, SENT_ON, True),
        (meta("iifname"), "==", "@odd", FIRST, None),
        (meta("iifname"), "==", "@odd", replace(FIRST, in_device="lo"), True),
        (meta("iifname"), "==", 3, FIRST, None),
        (meta("mark"), "==", 0, FIRST, True),
        (meta("mark"), "==", True, FIRST, None),
        ({"&": [meta("mark"), 16384]}, "==", 16384, FIRST, False),
        ({"&": [meta("mark"), 16384]}, "!=", 16384, FIRST, True),
        ({"&": [meta("mark"), 3]}, "==", {"set": [1, 2]}, FIRST, None),
        (ct("mark"), "==", 0, FIRST, True),
        (ct("mark"), "!=", 1, UNSEEN, False),
        (ct("state"), "in", "new", FIRST, True),
        (ct("state"), "in", ["established", "related"], ANSWER, True),
        (ct("state"), "!=", "new", FIRST, False),
        (ct("state"), "==", {"set": ["new", "established"]}, FIRST, True),
        (ct("state"), "==", "nosuch", FIRST, None),
        (ct("status"), "in", "dnat", SENT_ON, True),
        (ct("status"), "in", "dnat", FIRST, False),
        (ct("status"), "!", "dnat", SENT_ON, False),
        (ct("status"), "!=", "dnat", SENT_ON, None),
        (ct("status"), "in", ["dnat", "snat"], MASKED, True),
        (ct("status"), "in", "dying", FIRST, None),
        (ct("direction"), "==", "original", FIRST, True),
        (ct("ip daddr", "original"), "==", NODE, SENT_ON, True),
        (ct("ip6 daddr", "original"), "==", NODE6, SENT_ON, False),
        (ct("daddr", "original"), "==", NODE, SENT_ON, True),
        (ct("proto-dst", "original"), "==", 8080, SENT_ON, True),
        (ct("ip saddr", "reply"), "==", WEB, SENT_ON, True),
        (ct("proto-src", "reply"), "==", 80, SENT_ON, True),
        (ct("zone"), "==", 3, FIRST, None),
        (ct("nosuch", "original"), "==", 3, FIRST, None),
        (fib("type", "daddr"), "==", "local", FIRST, True),
        (fib("type", "daddr"), "!=", "local", FIRST, False),
        (fib("type", "saddr"), "==", {"set": ["local", "broadcast"]}, FIRST, False),
        (fib("type", "daddr", "iif"), "==", "local", FIRST, True),
        (fib("type", "daddr", "iif"), "==", "local", replace(FIRST, in_device="eth9"), False),
        (fib("type", "daddr"), "==", "nosuch", FIRST, None),
        (fib("type", "daddr", "oif"), "==", "local", FIRST, None),
        ({"fib": {"result": "type", "flags": "daddr"}}, "==", "local", FIRST, True),
        (fib("oif", "saddr", "iif"), "==", False, FIRST, False),
        (fib("oif", "saddr", "iif"), "==", True, FIRST, True),
        (fib("oif", "saddr", "mark", "iif"), "==", 0, replace(FIRST, in_device="eth9"), True),
        (fib("oifname", "saddr", "iif"), "!=", "", FIRST, True),
        (fib("oif", "saddr", "iif"), "==", "eth0", FIRST, None),
        ({"fib": {"result": "oif", "flags": "daddr"}}, "==", False, FIRST, None),
        (payload("tcp", "flags"), "in", "syn", FIRST, True),
        (payload("tcp", "flags"), "in", ["fin", "rst"], FIRST, False),
        (payload("tcp", "flags"), "!", "syn", FIRST, False),
        (payload("tcp", "flags"), "in", [], FIRST, False),
        (payload("tcp", "flags"), "==", "syn", FIRST, True),
        (payload("tcp", "flags"), "!=", "syn", ANSWER, True),
        ({"&": [payload("tcp", "flags"), ["fin", "syn", "rst", "ack"]]}, "==", "syn", FIRST, True),
        ({"&": [payload("tcp", "flags"), {"|": ["syn", "ack"]}]}, "==", {"|": ["syn", "ack"]}, ANSWER, True),
        (payload("icmp", "type"), "==", "echo-request", FIRST, False),
        (payload("icmp", "type"), "!=", "echo-request", FIRST, False),
        (payload("ether", "saddr"), "==", "00:11:22:33:44:55", FIRST, None),
        (meta("pkttype"), "==", "host", FIRST, True),
        (meta("pkttype"), "==", "multicast", FIRST, False),
        (meta("skuid"), "==", 0, FIRST, None),
        (meta("length"), ">", 100, FIRST, None),
        (meta("iifname"), "<", "eth0", FIRST, None),
        (SADDR, "==", "nonsense", FIRST, None),
        (SADDR, "==", prefix("nonsense", 99), FIRST, None),
        (SADDR, "~", CLIENT, FIRST, None),
        ({"rt": {"key": "nexthop"}}, "==", CLIENT, FIRST, None),
        ("tcp dport", "==", 80, FIRST, None),
    ],
)
def test_a_match_of_nft(left: Any, operator: str, right: Any, packet: Packet, expected: bool | None) -> None:
    rule = read_nft({"match": {"op": operator, "left": left, "right": right}}, {"accept": None}, sets=SETS)
    assert holds(rule, packet) is expected
    assert rule.handle == 7


@pytest.mark.parametrize(
    ("expressions", "asks"),
    [
        ([{"limit": {"rate": 10, "burst": 5, "per": "second"}}], True),
        ([{"quota": {"val": 25, "val_unit": "mbytes"}}], True),
        ([{"ct count": {"val": 10}}], True),
        ([{"meter": {"name": "m"}}], True),
        ([{"set": {"op": "add", "elem": SADDR, "set": "@hosts", "stmt": [{"limit": {}}]}}], True),
        ([{"xt": {"type": "match", "name": "addrtype"}}], True),
        ([{"xt": {"type": "target", "name": "DNAT"}}], False),
        ([{"queue": {"num": 3}}], False),
        ([{"tproxy": {"port": 80}}], False),
        ([{"jump": {}}], False),
        ([{"two": 1, "keys": 2}], False),
        (["nonsense"], False),
        ([{"dnat": {"addr": "nonsense"}}], False),
        ([{"dnat": "nonsense"}], False),
        ([{"match": {"op": "==", "left": {"payload": "tcp"}, "right": 1}}], True),
        ([{"dnat": {"addr": {"concat": [WEB]}}}], False),
        ([{"dnat": {"addr": WEB, "port": "http"}}], False),
        ([{"dnat": {"addr": WEB, "port": 0}}], False),
        ([{"dnat": {"addr": {"map": {"key": DPORT, "data": {"set": []}}}, "flags": "netmap"}}], False),
        ([{"dnat": {"addr": {"map": {"key": DPORT, "data": {"set": []}}}, "port": 80}}], False),
        ([{"dnat": {"addr": {"map": {"key": DPORT, "data": {"nosuch": []}}}}}], False),
        ([{"vmap": {"key": meta("cpu"), "data": {"set": []}}}], False),
    ],
)
def test_what_nobody_knows_of_nft(expressions: list[Any], asks: bool) -> None:
    rule = read_nft(*expressions, {"accept": None})
    unknown = [part for part in rule.parts if not isinstance(part, End)]
    assert [isinstance(part, Perhaps) for part in unknown][-1] is not asks
    assert holds(rule, FIRST) in ((None,) if asks else (True, None))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ({"accept": None}, [End("accept")]),
        ({"drop": None}, [End("drop")]),
        ({"reject": {"type": "tcp reset"}}, [End("reject")]),
        ({"return": None}, [Return()]),
        ({"continue": None}, []),
        ({"jump": {"target": "x"}}, [Jump("x")]),
        ({"goto": {"target": "x"}}, [Jump("x", goto=True)]),
        ({"counter": {"packets": 0, "bytes": 0}}, []),
        ({"log": None}, []),
        ({"set": {"op": "add", "elem": SADDR, "set": "@hosts"}}, []),
        ({"notrack": None}, [Untrack()]),
        ({"dnat": {"addr": WEB, "port": 80}}, [NewDestination(to(WEB, (80, 80)))]),
        ({"dnat": {"addr": WEB}}, [NewDestination(to(WEB))]),
        ({"dnat": {"addr": WEB, "port": {"range": [80, 90]}}}, [NewDestination(to(WEB, (80, 90)))]),
        (
            {"dnat": {"addr": {"range": [WEB, "172.17.0.9"]}}},
            [NewDestination(To((ip_address(WEB), ip_address("172.17.0.9"))))],
        ),
        ({"redirect": {"port": 80}}, [Redirect(PortRange(80, 80))]),
        ({"redirect": None}, [Redirect()]),
        ({"masquerade": None}, [NewSource(device=True)]),
        ({"snat": {"addr": NODE}}, [NewSource(ip_address(NODE))]),
        ({"snat": {"addr": {"range": [NODE, CLIENT]}}}, [NewSource()]),
        ({"mangle": {"key": meta("mark"), "value": 16}}, [Mark(Field.MARK, Field.MARK, 0, 16)]),
        (
            {"mangle": {"key": meta("mark"), "value": {"|": [meta("mark"), 4]}}},
            [Mark(Field.MARK, Field.MARK, FULL & ~4, 4)],
        ),
        ({"mangle": {"key": meta("mark"), "value": {"^": [meta("mark"), 4]}}}, [Mark(Field.MARK, Field.MARK, FULL, 4)]),
        ({"mangle": {"key": meta("mark"), "value": {"&": [ct("mark"), 255]}}}, [Mark(Field.MARK, Field.CT_MARK, 255)]),
        ({"mangle": {"key": ct("mark"), "value": meta("mark")}}, [Mark(Field.CT_MARK, Field.MARK)]),
        ({"mangle": {"key": meta("mark"), "value": {"jhash": {}}}}, [Mark(Field.MARK, None)]),
        ({"mangle": {"key": meta("mark"), "value": DPORT}}, [Mark(Field.MARK, None)]),
        ({"mangle": {"key": meta("l4proto"), "value": 1}}, []),
        ({"mangle": {"key": {"tcp option": {"name": "maxseg"}}, "value": 1360}}, []),
    ],
)
def test_a_statement_of_nft(expression: Any, expected: list[object]) -> None:
    assert list(read_nft(expression).parts) == expected


def test_maps_of_nft_are_looked_up() -> None:
    rule = read_nft({"vmap": {"key": DPORT, "data": "@verdicts"}}, sets=SETS)
    look = rule.parts[-1]
    assert isinstance(look, LookUp)
    assert look.map.find([FIRST.readings[Field.DESTINATION_PORT]]).values == (End("drop"),)
    rule = read_nft(
        {"dnat": {"addr": {"map": {"key": {"concat": [meta("l4proto"), payload("th", "dport")]}, "data": "@places"}}}},
        sets=SETS,
    )
    [dnat] = rule.parts
    assert isinstance(dnat, NewDestination)
    assert dnat.map is not None
    assert dnat.map.find([FIRST.readings[its] for its in dnat.key]).values == (to(WEB, (80, 80)),)
    mark = read_nft(
        {"mangle": {"key": meta("mark"), "value": {"map": {"key": DPORT, "data": "@marks"}}}}, sets=SETS
    ).parts[-1]
    assert isinstance(mark, Mark)
    assert mark.map is not None
    assert mark.map.find([(8080, 8080)]).values == (1,)
    odd = {"mangle": {"key": meta("mark"), "value": {"map": {"key": DPORT, "data": {"set": [[80, "x"]]}}}}}
    [*_, mark] = read_nft(odd).parts
    assert isinstance(mark, Mark)
    assert mark.map is not None
    assert not mark.map.find([(80, 80)]).sure


def test_what_is_tossed_may_be_any() -> None:
    numgen = {"numgen": {"mode": "random", "mod": 2, "offset": 0}}
    rule = read_nft({"vmap": {"key": numgen, "data": {"set": [[0, {"accept": None}], [1, {"continue": None}]]}}})
    assert rule.parts == (Toss((End("accept"), None)),)
    rule = read_nft({"dnat": {"addr": {"map": {"key": numgen, "data": {"set": [[0, WEB], [1, CLIENT]]}}}}})
    assert rule.parts == (Toss((NewDestination(to(WEB)), NewDestination(to(CLIENT)))),)


def test_the_chains_that_hook_in_come_in_their_turn() -> None:
    objects = [
        {"chain": {"family": "inet", "table": "t", "name": "user"}},
        {
            "chain": {
                "family": "inet",
                "table": "t",
                "name": "a",
                "hook": "forward",
                "prio": 0,
                "type": "filter",
                "policy": "drop",
            }
        },
        {
            "chain": {
                "family": "inet",
                "table": "t",
                "name": "b",
                "hook": "ingress",
                "prio": 5,
                "type": "filter",
                "dev": "eth0",
            }
        },
        {"chain": {"family": "inet", "table": "t", "name": "odd", "hook": "forward", "prio": "x"}},
        "nonsense",
    ]
    turns = nftrules.base_chains(objects)
    [table] = nftrules.tables(objects, turns)
    bases = {name: chain.base for name, chain in table.chains.items()}
    assert bases["user"] is None
    assert bases["odd"] is None
    first, second = bases["a"], bases["b"]
    assert first is not None
    assert second is not None
    assert (first.policy, first.turn, second.turn, set(second.devices)) == ("drop", 0, 1, {"eth0"})


@pytest.mark.parametrize("answer", ["", "[]", "{}", '{"nftables": 1}', "[" * 100_000])
def test_what_is_no_answer_of_nft(answer: str) -> None:
    with pytest.raises(ValueError):
        nftrules.parse(answer)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | texts | st.sampled_from(["@hosts", CLIENT, "tcp", "new"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "match",
                    "op",
                    "left",
                    "right",
                    "payload",
                    "protocol",
                    "field",
                    "set",
                    "elem",
                    "val",
                    "concat",
                    "range",
                ]
            )
            | st.sampled_from(
                ["prefix", "addr", "len", "ct", "key", "dir", "meta", "fib", "flags", "dnat", "map", "vmap", "data"]
            )
            | st.sampled_from(
                ["mangle", "value", "jump", "target", "&", "|", "result", "port", "limit", "xt", "chain", "rule"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@fuzz(200)
@given(st.lists(_json, max_size=3), _json)
def test_no_json_is_too_much(expressions: list[Any], listed: Any) -> None:
    sets = {"hosts": {"elem": listed}}
    rule = read_nft(*expressions, sets=sets)
    holds(rule, FIRST)
    words_of(expressions)
    json.dumps(rule.text)
    nftrules.tables([listed, *expressions], {})
    nftrules.base_chains([listed, *expressions])


@pytest.mark.parametrize(
    ("expressions", "words"),
    [
        ([{"match": {"op": "==", "left": DPORT, "right": 80}}, {"counter": {}}, {"drop": None}], "tcp dport 80 drop"),
        ([{"match": {"op": "!=", "left": SADDR, "right": "@hosts"}}], "ip saddr != @hosts"),
        ([{"match": {"op": "in", "left": ct("state"), "right": ["new", "related"]}}], "ct state new,related"),
        ([{"match": {"op": "==", "left": ct("ip daddr", "original"), "right": NODE}}], f"ct original ip daddr {NODE}"),
        ([{"match": {"op": "==", "left": meta("iifname"), "right": "eth0"}}], "iifname eth0"),
        (
            [{"match": {"op": "==", "left": {"&": [meta("mark"), 4]}, "right": {"|": [1, {"^": [2, 3]}]}}}],
            "meta mark & 4 1 | 2 ^ 3",
        ),
        (
            [{"match": {"op": "==", "left": fib("type", "daddr", "iif"), "right": "local"}}],
            "fib daddr . iif type local",
        ),
        (
            [{"match": {"op": "==", "left": {"fib": {"result": "oif", "flags": "saddr"}}, "right": 0}}],
            "fib saddr oif 0",
        ),
        (
            [{"match": {"op": "==", "left": {"concat": [SADDR, DPORT]}, "right": {"set": [{"concat": [NODE, 80]}]}}}],
            f"ip saddr . tcp dport {{ {NODE} . 80 }}",
        ),
        (
            [{"match": {"op": "==", "left": DPORT, "right": {"set": [*range(1, 7), {"range": [7, 9]}]}}}],
            "tcp dport { 1, 2, 3, 4, 5, 6, ... }",
        ),
        ([{"match": {"op": "==", "left": DPORT, "right": {"set": [{"elem": {"val": 99}}]}}}], "tcp dport { 99 }"),
        ([{"match": {"op": "==", "left": SADDR, "right": prefix("10.0.0.0", 8)}}], "ip saddr 10.0.0.0/8"),
        ([{"jump": {"target": "x"}}], "jump x"),
        ([{"goto": {"target": "x"}}], "goto x"),
        (
            [
                {
                    "vmap": {
                        "key": DPORT,
                        "data": {"set": [[80, {"drop": None}], [{"range": [1, 2]}, {"jump": {"target": "x"}}]]},
                    }
                }
            ],
            "tcp dport vmap { 80 : drop, 1-2 : jump x }",
        ),
        ([{"dnat": {"addr": WEB, "port": 80}}], f"dnat to {WEB}:80"),
        (
            [{"dnat": {"addr": {"map": {"key": DPORT, "data": {"set": [[80, WEB]]}}}}}],
            f"dnat to tcp dport map {{ 80 : {WEB} }}",
        ),
        ([{"snat": {"addr": NODE}}], f"snat to {NODE}"),
        ([{"redirect": {"port": 80}}], "redirect to :80"),
        ([{"mangle": {"key": meta("mark"), "value": 4}}], "meta mark set 4"),
        ([{"limit": {"rate": 1, "per": "second", "inv": True}}], "limit rate over 1/second"),
        ([{"xt": {"type": "match", "name": "addrtype"}}], "(match addrtype of iptables)"),
        ([{"reject": {"type": "icmpx"}}, {"log": {"prefix": "x"}}], "reject log"),
        ([{"quota": {"val": 25}}], '{"quota": {"val": 25}}'),
        ([{"match": {"op": "==", "left": {"rt": {}}, "right": None}}], '{"rt": {}} null'),
        (["nonsense"], '"nonsense"'),
    ],
)
def test_a_rule_of_nft_in_words(expressions: list[Any], words: str) -> None:
    assert words_of(expressions) == words


# Sets


def numbers(*patterns: Pattern) -> Elements[bool]:
    return Elements([((pattern,), True) for pattern in patterns])


def test_a_name_is_no_number_and_a_number_no_name() -> None:
    assert compare(Name("eth0"), (1, 1)) is None
    assert compare((1, 1), "eth0") is None
    assert numbers((1, 1)).find(["eth0"]) == Found((None,))


def _spans() -> Iterator[st.SearchStrategy[tuple[int, int]]]:
    yield st.integers(0, 40).map(lambda number: (number, number))
    yield st.tuples(st.integers(0, 40), st.integers(0, 9)).map(lambda its: (its[0], its[0] + its[1]))


@given(st.lists(st.one_of(*_spans()), max_size=6), st.one_of(*_spans()), st.booleans())
def test_a_set_says_what_its_elements_say_one_by_one(
    patterns: list[tuple[int, int]], reading: tuple[int, int], unread: bool
) -> None:
    found = Elements([((pattern,), True) for pattern in patterns], unread).find([reading])
    one_by_one = {compare(pattern, reading) for pattern in patterns}
    if True in one_by_one:
        assert found == Found((True,))
    elif None in one_by_one:
        assert set(found.values) == {True, None}
        assert not found.sure
    elif unread:
        assert not found.sure
    else:
        assert found == Found((None,))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6), st.integers(0, 9), st.integers(0, 9))
def test_pairs_are_found_as_pairs(pairs: list[tuple[int, int]], one: int, other: int) -> None:
    elements: Elements[int] = Elements([(((a, a), (b, b)), at) for at, (a, b) in enumerate(pairs)])
    found = elements.find([(one, one), (other, other)])
    assert found.values[0] == (pairs.index((one, other)) if (one, other) in pairs else None)
    assert elements.find([(one, one)]).values == (None,) or not elements.find([(one, one)]).sure


# Packets


def test_the_port_of_a_client_is_known_to_be_between_two() -> None:
    assert FIRST.readings[Field.SOURCE_PORT] == (CLIENT_PORTS.first, CLIENT_PORTS.last)
    assert FIRST.source.port is None
    assert str(FIRST.destination) == f"{NODE}:8080"
    assert str(SIXTH.destination) == f"[{NODE6}]:8080"


def test_what_comes_behind_is_translated_like_the_first() -> None:
    masked = SENT_ON.from_behind(ip_address("172.17.0.1"))
    answer = masked.answer("docker0").looked_up()
    assert str(answer.destination.address) == "172.17.0.1"
    assert answer.rewritten(source=False).destination == FIRST.source
    assert answer.rewritten(source=True).source == FIRST.destination
    later = masked.later().behind(answer).looked_up()
    assert later.destination == FIRST.destination
    assert later.rewritten(source=False).destination == masked.destination
    assert str(later.rewritten(source=True).source.address) == "172.17.0.1"
    assert later.flow.turn is Turn.LATER
    for packet in (FIRST, UNTRACKED, replace(later, flow=FIRST.flow)):
        assert packet.rewritten(source=True) is packet
        assert packet.rewritten(source=False) is packet
    plain = FIRST.later().looked_up()
    assert plain.rewritten(source=True) is plain
    assert plain.rewritten(source=False) is plain


def test_an_untracked_answer_is_none_that_was_seen() -> None:
    answer = FIRST.answer(None).untracked()
    later = FIRST.later().behind(answer).looked_up()
    assert later.flow.state == "new"
    assert "seen-reply" not in later.flow.status
