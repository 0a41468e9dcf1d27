"""Rules and plans in the words of iptables: what ``iptables-restore --noflush`` reads, and what ``-S`` lists.

Pure. Every rule of ours bears a comment, its tag: ``ctrport OWNER DIGEST``. The owner is for people and for recovery;
the digest is of the rule's own text, so a rule is recognised in a listing without the listing being understood, however
a release of iptables words it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from ipaddress import ip_address

from ..model import Count, Family, Holder, Mapping, PortRange, Protocol
from ..rules import USER_CHAIN, Dnat, Jump, Match, Rule, Verdict
from .plan import Add, Delete, Empty, Line, New, Op, Plan, Remove

#: What a comment of ours looks like. xt_comment takes 255 bytes; the longest of ours come near that.
TAG = re.compile(r"ctrport (?P<owner>[A-Za-z0-9._/:=@\[\] -]+) (?P<digest>[0-9a-f]{12})")
# In quotes always, as it has a space; without them it could be part of somebody else's comment.
_COMMENT = re.compile(r'--comment "(' + TAG.pattern + r')"(?= |$)')
#: What a chain of ours may be called.
CHAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,28}")


def tag(rule: Rule) -> str:
    """Return the comment that a rule bears in the kernel."""
    # Kept with the rule: with it to look up whether the kernel holds what it should takes a third of the time.
    if rule.tag is None:
        object.__setattr__(rule, "tag", _tag(rule, (*_match(rule.match), *_target(rule))))
    assert rule.tag is not None
    return rule.tag


def _tag(rule: Rule, words: tuple[str, ...]) -> str:
    digest = hashlib.sha256(" ".join((rule.chain, *words)).encode())
    text = f"ctrport {rule.owner} {digest.hexdigest()[:12]}"
    if TAG.fullmatch(text) is None or len(text) > 255:
        raise ValueError(f"not an owner that can be part of a rule: {rule.owner!r}")
    return text


def owner(line_tag: str) -> str:
    """Return the owner that a tag names."""
    found = TAG.fullmatch(line_tag)
    return found["owner"] if found else ""


def arguments(rule: Rule) -> str:
    """Return a rule as iptables takes it behind ``-A CHAIN``."""
    match, target = tuple(_match(rule.match)), tuple(_target(rule))
    if rule.tag is None:
        object.__setattr__(rule, "tag", _tag(rule, match + target))
    return " ".join((*match, f'-m comment --comment "{rule.tag}"', *target))


def restore_input(plan: Plan) -> str:
    """Return a plan as ``iptables-restore --noflush`` reads it. The same plan gives the same bytes."""
    lines: list[str] = []
    for block in plan.blocks:
        lines += [f"*{block.table}", *(_operation(op) for op in block.ops), "COMMIT"]
    return "".join(f"{line}\n" for line in lines)


def shell(program: str, text: str) -> list[str]:
    """Return lines of shell by which a program reads a text of ours; none where that is empty."""
    # No line is that word: what is written are tables, chains, rules, sets and COMMIT.
    return [f"{program} <<'EOF'", *text.split("\n")[:-1], "EOF"] if text else []


_PRINTED = re.compile(r'(?:[^"\n]+|"(?:[^"\\]|\\.)*"|")+', re.DOTALL)


def printed(text: str) -> list[str]:
    """Return the lines that iptables printed. A comment may have line breaks in it, and what looks like a rule."""
    return _PRINTED.findall(text)


def listing(lines: Iterable[str]) -> list[Line]:
    """Read what ``-S CHAIN`` prints: the chain's rules in their order."""
    return [_line(text) for text in lines if text.startswith("-A ")]


def saved(text: str) -> dict[str, list[Line]]:
    """Read one table as ``iptables-save`` prints it: every chain's rules in their order."""
    chains: dict[str, list[Line]] = {}
    for line in printed(text):
        if line.startswith(":"):
            chains[line[1:].split(" ", 1)[0]] = []
        elif line.startswith("-A "):
            chains.setdefault(line.split(" ", 2)[1], []).append(_line(line))
    return chains


_COUNTED = re.compile(r"\[(\d+):(\d+)\] (-A (\S+).*)", re.DOTALL)


def counts(text: str, chain: str) -> list[tuple[str, Count]]:
    """Read out of one table, as ``iptables-save -c`` prints it, what each rule of ours in one chain counted, by tag."""
    found = (_COUNTED.fullmatch(line) for line in printed(text))
    rules = ((_line(each[3]), each) for each in found if each is not None and each[4] == chain)
    return [(line.tag, Count(int(each[1]), int(each[2]))) for line, each in rules if line.tag is not None]


_PORTS = re.compile(r"-p (tcp|udp|sctp) .*?--dports? ([0-9:,]+)(?= |$)")
_DESTINATION = re.compile(r"(?<!! )-d ([0-9a-f.:]+)(?:/32|/128)? ")
_NAME = re.compile(r'--comment (?:"([A-Za-z0-9._/: -]{1,120})"|([A-Za-z0-9._/:-]{1,120}))(?= |$)')


def holders(chain: str, lines: Iterable[Line], family: Family) -> Iterator[Holder]:
    """Read out of a foreign chain which host ports it answers on, and for whom where a plain comment says so."""
    for line in lines:
        words = line.unquoted if line.tag is None else ""
        found = _PORTS.search(words)
        if found is None or line.target in ("", "RETURN"):
            continue
        named, to = _NAME.search(line.text), _DESTINATION.search(words)
        name = f"{chain} ({(named[1] or named[2]).strip()})" if named else chain
        for ports in found[2].split(","):
            first, _, last = ports.partition(":")
            if int(last or first) == 0:
                continue
            each = PortRange(max(1, int(first)), int(last or first))  # `--dport :1024` is listed as 0:1024
            yield Holder(name, Mapping(ip_address(to[1]) if to else family.unspecified, each, each, Protocol(found[1])))


def diff(plan: Plan, family: Family = Family.IPV4) -> list[str]:
    """Return a plan for people: a line a change, ``+`` what comes and ``-`` what goes, below the table's name."""
    lines: list[str] = []
    for block in plan.blocks:
        lines.append(f"*{block.table}" if family is Family.IPV4 else f"*{block.table} of IPv6")
        lines += [f"{'+' if isinstance(op, (New, Add)) else '-'} {_operation(op)}" for op in block.ops]
    return lines


def _line(text: str) -> Line:
    found = _COMMENT.search(text)
    return Line(text, found[1] if found else None)


def _operation(op: Op) -> str:
    match op:
        case New(chain):
            return f"-N {_checked(chain)}"
        case Empty(chain):
            if chain == USER_CHAIN:
                raise ValueError(f"{chain} is the operator's: it is never emptied")
            return f":{_checked(chain)} - [0:0]"
        case Add(Line(text), _):
            return text
        case Add(Rule() as rule, None):
            return f"-A {_checked(rule.chain)} {arguments(rule)}"
        case Add(Rule() as rule, position):
            return f"-I {_checked(rule.chain)} {position} {arguments(rule)}"
        case Remove(chain, Line(text)):
            return f"-D {text.removeprefix('-A ')}"
        case Remove(chain, Rule() as rule):
            return f"-D {_checked(chain)} {arguments(rule)}"
        case Delete(chain, whole):
            return f"{'-X' if whole else '-F'} {_checked(chain)}"
    raise AssertionError(op)  # pragma: no cover - every operation is above


def _checked(chain: str) -> str:
    if CHAIN_NAME.fullmatch(chain) is None:
        raise ValueError(f"not a chain name that iptables takes: {chain!r}")
    return chain


def _match(match: Match) -> Iterator[str]:
    if match.source is not None:
        yield f"-s {match.source}"
    if match.not_source is not None:
        yield f"! -s {match.not_source}"
    if match.destination is not None:
        yield f"-d {match.destination}"
    if match.not_destination is not None:
        yield f"! -d {match.not_destination}"
    if match.in_device is not None:
        yield f"-i {match.in_device}"
    if match.not_in_device is not None:
        yield f"! -i {match.not_in_device}"
    if match.out_device is not None:
        yield f"-o {match.out_device}"
    if match.not_out_device is not None:
        yield f"! -o {match.not_out_device}"
    if match.protocol is not None:
        yield f"-p {match.protocol}"
        if match.ports is not None:
            yield f"-m {match.protocol} --dport {_ports(match.ports)}"
    if match.mark is not None:
        yield f"-m mark --mark {match.mark:#x}/{match.mark:#x}"
    if match.to_local:
        yield "-m addrtype --dst-type LOCAL"
    if match.established:
        # A match of its own: within one, states are alternatives.
        yield "-m conntrack --ctstate RELATED,ESTABLISHED"
    if match.translated:
        yield "-m conntrack --ctstate DNAT"
        if match.original_ports is not None:
            yield f"--ctorigdstport {_ports(match.original_ports)}"
        if match.original_destination is not None:
            yield f"--ctorigdst {match.original_destination}"


def _target(rule: Rule) -> Iterator[str]:
    match rule.target:
        case Verdict(name) | Jump(name):
            yield f"-j {name}"
        case Dnat(address, port):
            destination = f"[{address}]" if address.version == 6 and port is not None else str(address)
            yield f"-j DNAT --to-destination {destination}" + (f":{port}" if port is not None else "")
        case None:
            pass


def _ports(ports: PortRange) -> str:
    return str(ports).replace("-", ":")
