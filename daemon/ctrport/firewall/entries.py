"""Plans as data for libiptc: rules as entries with matches and a target, in place of words.

Pure. An entry is read out of ``text.arguments``, so that every backend writes the same rule with the same tag. Every
value is checked here: the library that takes them answers a bad one with a long jump out of C, which costs the process
a piece of its stack each time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

from ..model import DEVICE_NAME, Family
from ..rules import USER_CHAIN, Rule
from .plan import Add, Block, Delete, Empty, Line, New, Op, Remove
from .text import CHAIN_NAME, TAG, arguments, tag

T = TypeVar("T")


@dataclass(frozen=True)
class Extension:
    """A match or a target by its name, with its options in their order."""

    name: str
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Entry:
    """One rule as libiptc takes it. A value that begins with ``!`` must not hold; an empty one says nothing.

    The target is a chain, one of the kernel's verdicts, or an extension; ``jump`` is empty where it is the latter, and
    where the rule only marks its chain.
    """

    source: str = ""
    destination: str = ""
    in_device: str = ""
    out_device: str = ""
    protocol: str = ""
    matches: tuple[Extension, ...] = ()
    jump: str = ""
    target: Extension | None = None


@dataclass(frozen=True)
class Step:
    """One operation on one chain: ``new``, ``empty``, ``add``, ``again``, ``remove`` or ``delete``.

    ``again`` puts back the rule that bears ``tag`` as the chain had it when the block began; ``remove`` takes away the
    first that bears it. ``position`` counts from 1; None is the end.
    """

    do: str
    chain: str
    position: int | None = None
    entry: Entry | None = None
    tag: str = ""


@dataclass(frozen=True)
class Commit:
    """What is committed to one table at once."""

    table: str
    steps: tuple[Step, ...]


def commit(block: Block, family: Family) -> Commit:
    """Return a block of a plan as data. Raises ``ValueError`` for what cannot be part of a rule."""
    return Commit(block.table.value, tuple(_step(op, family) for op in block.ops))


def to_json(commits: Iterable[Commit]) -> str:
    """Return commits as one line."""
    return json.dumps(list(commits), default=vars)


def from_json(text: str) -> list[Commit]:
    """Return what ``to_json`` was given."""
    return [Commit(each["table"], tuple(_read_step(**step) for step in each["steps"])) for each in json.loads(text)]


def _read_step(entry: dict[str, Any] | None, **fields: Any) -> Step:
    return Step(**fields, entry=None if entry is None else _read_entry(**entry))


def _read_entry(matches: list[dict[str, Any]], target: dict[str, Any] | None, **fields: str) -> Entry:
    its = None if target is None else _read_extension(**target)
    return Entry(**fields, matches=tuple(_read_extension(**each) for each in matches), target=its)


def _read_extension(name: str, options: list[list[str]]) -> Extension:
    return Extension(name, tuple((option, value) for option, value in options))


def _step(op: Op, family: Family) -> Step:
    match op:
        case New(chain):
            return Step("new", _chain(chain))
        case Empty(chain):
            if chain == USER_CHAIN:
                raise ValueError(f"{chain} is the operator's: it is never emptied")
            return Step("empty", _chain(chain))
        case Add(Rule() as rule, position):
            its = tag(rule)
            return Step("add", _chain(rule.chain), position, entry(rule, family), its)
        case Add(Line(text) as line, position):
            return Step("again", _chain(text.split(" ")[1]), position, tag=_tag(line))
        case Remove(chain, Line() as line):
            return Step("remove", _chain(chain), tag=_tag(line))
        case Remove(chain, Rule() as rule):
            return Step("remove", _chain(chain), tag=tag(rule))
        case Delete(chain, whole):
            return Step("delete" if whole else "empty", _chain(chain))
    raise AssertionError(op)  # pragma: no cover - every operation is above


def entry(rule: Rule, family: Family) -> Entry:
    """Return a rule as data. Raises ``ValueError`` for what cannot be part of a rule of that family."""
    words = [word.strip('"') for word in _WORD.findall(arguments(rule))]
    values: dict[str, str] = {}
    matches: list[Extension] = []
    jump, target = "", None
    while words:
        if len(words) < 2 or jump or target:
            raise ValueError(f"not a word that a rule of ours has: {words[0]!r}")
        negated = words[0] == "!"
        del words[:negated]
        word, value = words.pop(0), words.pop(0)
        if word == "-m":
            matches.append(Extension(value, _options(words, value, family)))
        elif word == "-j" and value in _TARGETS:
            target = Extension(value, _options(words, value, family))
        elif word == "-j":
            jump = _chain(value)
        else:
            name, check = _known(_FIELDS, word)
            check(value, family)
            values[name] = "!" * negated + value
    return Entry(**values, matches=tuple(matches), jump=jump, target=target)


def _options(words: list[str], name: str, family: Family) -> tuple[tuple[str, str], ...]:
    """Take the options of an extension from the front of ``words``."""
    options = []
    while words and words[0].startswith("--"):
        option, value = words.pop(0), words.pop(0)
        _known(_OPTIONS, f"{name} {option}")(value, family)
        options.append((option.removeprefix("--"), value))
    return tuple(options)


def _known(table: Mapping[str, T], word: str) -> T:
    if word not in table:
        raise ValueError(f"not a word that a rule of ours has: {word!r}")
    return table[word]


def _network(value: str, family: Family) -> None:
    if Family.of(ip_network(value).network_address) is not family:
        raise ValueError(f"not a network of {family}: {value!r}")


def _address(value: str, family: Family) -> None:
    if Family.of(ip_address(value)) is not family:
        raise ValueError(f"not an address of {family}: {value!r}")


def _destination(value: str, family: Family) -> None:
    found = re.fullmatch(r"\[(.+)\]:([0-9]+)" if value.startswith("[") else r"([0-9.]+):([0-9]+)|(.+)", value)
    if found is None:
        raise ValueError(f"not an address to translate to: {value!r}")
    _address(found[1] or found[3], family)
    if found[2]:
        _ports(found[2], family)


def _ports(value: str, _: Family) -> None:
    if re.fullmatch("[0-9]{1,5}(:[0-9]{1,5})?", value) is None:
        raise ValueError(f"not ports: {value!r}")
    ports = [int(port) for port in value.split(":")]
    if not 1 <= ports[0] <= ports[-1] <= 65535:
        raise ValueError(f"not ports: {value!r}")


def _like(pattern: re.Pattern[str]) -> Callable[[str, Family], None]:
    def check(value: str, _: Family) -> None:
        if pattern.fullmatch(value) is None:
            raise ValueError(f"not a value that can be part of a rule: {value!r}")

    return check


def _chain(name: str) -> str:
    if CHAIN_NAME.fullmatch(name) is None:
        raise ValueError(f"not a chain name that iptables takes: {name!r}")
    return name


def _tag(line: Line) -> str:
    if line.tag is None:
        raise ValueError(f"not a rule of ours: {line.text!r}")
    return line.tag


#: Only the comment has spaces in it, and no word has quotes.
_WORD = re.compile(r'"[^"]*"|\S+')
_FIELDS = {
    "-s": ("source", _network),
    "-d": ("destination", _network),
    "-i": ("in_device", _like(DEVICE_NAME)),
    "-o": ("out_device", _like(DEVICE_NAME)),
    "-p": ("protocol", _like(re.compile("tcp|udp|sctp"))),
}
_TARGETS = ("DNAT", "MASQUERADE")
_OPTIONS = {
    **{f"{protocol} --dport": _ports for protocol in ("tcp", "udp", "sctp")},
    "mark --mark": _like(re.compile("0x[0-9a-f]{1,8}/0x[0-9a-f]{1,8}")),
    "addrtype --dst-type": _like(re.compile("LOCAL")),
    "conntrack --ctstate": _like(re.compile("DNAT|RELATED,ESTABLISHED")),
    "conntrack --ctorigdstport": _ports,
    "conntrack --ctorigdst": _address,
    "comment --comment": _like(TAG),
    "DNAT --to-destination": _destination,
}
