"""One rule of iptables, out of the words that ``iptables-save`` prints of it. Pure.

A word that is not known here makes a doubt of itself and of what belongs to it: a match that nobody can judge, or a
target of which nobody can say what it does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from ipaddress import ip_address, ip_network

from .conditions import AnyPort, Bridged, Condition, Doubt, Is, Never, Sender, StateOf, StatusOf, TypeIs, WayBack
from .packet import Field
from .ruleset import Action, Jump, Part
from .targets import actions_of
from .values import Name, Pattern

_WORD = re.compile(r'"((?:[^"\\]|\\.)*)"|(\S+)', re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)

_PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
#: What other protocols are called, none of which is looked at here.
_OTHER_PROTOCOLS = frozenset(
    {"icmp", "icmpv6", "ipv6-icmp", "esp", "ah", "gre", "igmp", "dccp", "ospf", "vrrp", "pim", "ipencap", "ipip"}
    | {"udplite", "mh", "mobility-header"}
)
_TYPES = frozenset(
    {"local", "unicast", "broadcast", "multicast", "anycast", "blackhole", "unreachable", "prohibit", "unspec"}
)
_FLAGS = {"FIN": 1, "SYN": 2, "RST": 4, "PSH": 8, "ACK": 16, "URG": 32, "ALL": 63, "NONE": 0}


#: What reads an option's arguments, and whether it is negated; what reads a target's options.
_Read = Callable[[list[str], bool], Condition]
_Act = Callable[[dict[str, str]], tuple[Action, ...]]


class _NotKnown(Exception):
    """A word, or a value of one, that is not understood here."""


def read_rule(line: str, chains: Container[str]) -> tuple[tuple[Part, ...], str]:
    """Return the parts of a rule and its comment; ``chains`` are those that it may jump to."""
    words = [
        _ESCAPED.sub(r"\1", quoted) if "\\" in quoted else quoted or plain for quoted, plain in _WORD.findall(line)
    ]
    return _Reader(words[2:], chains).read()


class _Reader:
    """Reads one rule, word by word."""

    def __init__(self, words: list[str], chains: Container[str]) -> None:
        self._words = words
        self._at = 0
        self._chains = chains
        self._module = ""
        self._comment = ""

    def read(self) -> tuple[tuple[Part, ...], str]:
        parts: list[Part] = []
        while self._at < len(self._words):
            begun = self._at
            negated = self._take() == "!"
            word = self._take() if negated else self._words[begun]
            if word in ("-j", "-g"):
                action = self._target(word)
                return (*parts, *action), self._comment
            if word == "-m":
                parts += self._match()
            else:
                parts += self._option(word, negated, begun)
        return tuple(parts), self._comment

    def _take(self) -> str:
        word = self._words[self._at] if self._at < len(self._words) else ""
        self._at += 1
        return word

    def _arguments(self) -> list[str]:
        """Take the words up to the next option."""
        begun = self._at
        while self._at < len(self._words) and not self._begins_option(self._words[self._at]):
            self._at += 1
        return self._words[begun : self._at]

    @staticmethod
    def _begins_option(word: str) -> bool:
        return word == "!" or (len(word) == 2 and word[0] == "-" and word[1].isalpha()) or word[:2] == "--"

    def _match(self) -> list[Condition]:
        """Take the name of a match; one that is not known takes all its options along."""
        self._module = self._take()
        if self._module == "rpfilter":
            return [self._rpfilter()]
        if self._module in _MODULES:
            return []
        begun = self._at
        while self._at < len(self._words) and self._words[self._at] not in ("-m", "-j", "-g"):
            self._at += 1
        return [Doubt(" ".join(["-m", self._module, *self._words[begun : self._at]]))]

    def _rpfilter(self) -> Condition:
        options = []
        while self._at < len(self._words) and self._words[self._at] not in ("-m", "-j", "-g"):
            options.append(self._take())
        if not set(options) <= {"--loose", "--validmark", "--accept-local", "--invert"}:
            return Doubt(" ".join(["-m rpfilter", *options]))
        return WayBack("--loose" not in options, "--invert" in options)

    def _option(self, word: str, negated: bool, begun: int) -> list[Condition]:
        if word == "--comment":
            self._comment = self._take()  # which may look like anything
            return []
        arguments = self._arguments()
        read = _OPTIONS.get((self._module, word)) or _OPTIONS.get(("", word))
        try:
            if read is None:
                raise _NotKnown
            return [read(arguments, negated)]
        except (_NotKnown, ValueError, IndexError, KeyError):
            return [Doubt(" ".join(self._words[begun : self._at]))]

    def _target(self, how: str) -> tuple[Action, ...]:
        name = self._take()
        options = self._words[self._at :]
        if name in self._chains:
            return (Jump(name, goto=how == "-g"),)
        return actions_of(name, options)


# Matches


def _addresses(field: Field) -> _Read:
    def read(arguments: list[str], negated: bool) -> Condition:
        return Is(field, (_network(arguments[0]),), negated)

    return read


def _network(text: str) -> Pattern:
    """Read an address with its prefix, which ipaddress takes ten times as long for: nodes have thousands of these."""
    address, _, length = text.partition("/")
    its = ip_address(address)
    if length and not length.isdecimal():
        network = ip_network(text, strict=False)
        return (int(network[0]), int(network[-1]))
    free = its.max_prefixlen - int(length or its.max_prefixlen)
    first = int(its) >> free << free  # raises ValueError where it is longer than there are bits
    return (first, first | ((1 << free) - 1))


def _address_range(field: Field) -> _Read:
    def read(arguments: list[str], negated: bool) -> Condition:
        first, _, last = arguments[0].partition("-")
        return Is(field, ((int(ip_address(first)), int(ip_address(last or first))),), negated)

    return read


def _device(field: Field) -> _Read:
    def read(arguments: list[str], negated: bool) -> Condition:
        name = arguments[0]
        return Is(field, (Name(name.removesuffix("+"), name.endswith("+")),), negated)

    return read


def _protocol(arguments: list[str], negated: bool) -> Condition:
    name = arguments[0].lower()
    if name in ("all", "0"):
        return Never(not negated)
    if name in _OTHER_PROTOCOLS:
        return Never(negated)
    number = _PROTOCOLS.get(name) or int(name)
    return Is(Field.PROTOCOL, ((number, number),), negated)


def _pattern(text: str) -> Pattern:
    first, colon, last = text.partition(":")
    return (int(first or 0), int(last or (65535 if colon else first)))


def _ports(field: Field) -> _Read:
    def read(arguments: list[str], negated: bool) -> Condition:
        return Is(field, tuple(map(_pattern, arguments[0].split(","))), negated)

    return read


def _any_port(arguments: list[str], negated: bool) -> Condition:
    return AnyPort(tuple(map(_pattern, arguments[0].split(","))), negated)


def _tcp_flags(arguments: list[str], negated: bool) -> Condition:
    mask, wanted = (sum({_FLAGS[word] for word in words.split(",")}) for words in arguments[:2])
    return Is(Field.TCP_FLAGS, ((wanted, wanted),), negated, mask)


def _syn(arguments: list[str], negated: bool) -> Condition:
    return Is(Field.TCP_FLAGS, ((2, 2),), negated, 0x17)


def _states(arguments: list[str], negated: bool) -> Condition:
    return StateOf(frozenset(arguments[0].lower().split(",")), negated)


def _status(arguments: list[str], negated: bool) -> Condition:
    words = frozenset(word.lower().replace("_", "-") for word in arguments[0].split(","))
    if not words <= {"seen-reply", "confirmed", "assured"}:
        raise _NotKnown
    return StatusOf(words, negated)


def _direction(arguments: list[str], negated: bool) -> Condition:
    return Is(Field.DIRECTION, (Name(arguments[0].lower()),), negated)


def _mark(field: Field) -> _Read:
    def read(arguments: list[str], negated: bool) -> Condition:
        value, slash, mask = arguments[0].partition("/")
        number = int(value, 0)
        return Is(field, ((number, number),), negated, int(mask, 0) if slash else None)

    return read


def _types(source: bool) -> _Read:
    def read(arguments: list[str], negated: bool) -> Condition:
        types = frozenset(arguments[0].lower().split(","))
        if not types <= _TYPES:
            raise _NotKnown
        return TypeIs(source, types, negated=negated)

    return read


def _packet_type(arguments: list[str], negated: bool) -> Condition:
    return Is(Field.PACKET_TYPE, (Name(arguments[0].lower()),), negated)


def _bridged(arguments: list[str], negated: bool) -> Condition:
    return Bridged(negated)


def _sender(arguments: list[str], negated: bool) -> Condition:
    return Sender(negated)


def _fragment(arguments: list[str], negated: bool) -> Condition:
    return Never(negated)


#: What is read of each option: of one module, or ("") whichever stands before it.
_OPTIONS: dict[tuple[str, str], _Read] = {
    ("", "-s"): _addresses(Field.SOURCE),
    ("", "-d"): _addresses(Field.DESTINATION),
    ("", "-i"): _device(Field.IN_DEVICE),
    ("", "-o"): _device(Field.OUT_DEVICE),
    ("", "-p"): _protocol,
    ("", "-f"): _fragment,
    **{(module, "--sport"): _ports(Field.SOURCE_PORT) for module in _PROTOCOLS},
    **{(module, "--dport"): _ports(Field.DESTINATION_PORT) for module in _PROTOCOLS},
    ("tcp", "--tcp-flags"): _tcp_flags,
    ("tcp", "--syn"): _syn,
    ("multiport", "--sports"): _ports(Field.SOURCE_PORT),
    ("multiport", "--dports"): _ports(Field.DESTINATION_PORT),
    ("multiport", "--ports"): _any_port,
    ("conntrack", "--ctstate"): _states,
    ("conntrack", "--ctstatus"): _status,
    ("conntrack", "--ctdir"): _direction,
    ("conntrack", "--ctproto"): _protocol,
    ("conntrack", "--ctorigsrc"): _addresses(Field.ORIGINAL_SOURCE),
    ("conntrack", "--ctorigdst"): _addresses(Field.ORIGINAL_DESTINATION),
    ("conntrack", "--ctreplsrc"): _addresses(Field.REPLY_SOURCE),
    ("conntrack", "--ctrepldst"): _addresses(Field.REPLY_DESTINATION),
    ("conntrack", "--ctorigsrcport"): _ports(Field.ORIGINAL_SOURCE_PORT),
    ("conntrack", "--ctorigdstport"): _ports(Field.ORIGINAL_DESTINATION_PORT),
    ("conntrack", "--ctreplsrcport"): _ports(Field.REPLY_SOURCE_PORT),
    ("conntrack", "--ctrepldstport"): _ports(Field.REPLY_DESTINATION_PORT),
    ("state", "--state"): _states,
    ("mark", "--mark"): _mark(Field.MARK),
    ("connmark", "--mark"): _mark(Field.CT_MARK),
    ("addrtype", "--src-type"): _types(source=True),
    ("addrtype", "--dst-type"): _types(source=False),
    ("iprange", "--src-range"): _address_range(Field.SOURCE),
    ("iprange", "--dst-range"): _address_range(Field.DESTINATION),
    ("pkttype", "--pkt-type"): _packet_type,
    ("physdev", "--physdev-is-bridged"): _bridged,
    ("owner", "--uid-owner"): _sender,
    ("owner", "--gid-owner"): _sender,
}
_MODULES = {module for module, _ in _OPTIONS} | {"comment"}
