"""Out of all that can become of a packet the one answer: does it work, and if not, because of what. Pure.

A packet that ends at the node itself says little by itself: that the port is published nowhere, for another address,
for other clients, or that somebody else has it. What is declared, and our own rules that did not match, say which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..firewall.text import owner
from ..model import Access, Family
from .cases import At, Doubt, did
from .conditions import Is
from .facts import Declared, Facts
from .fate import Cause, Fate, Outcome
from .packet import Field, Packet
from .question import Inquiry
from .ruleset import Rule
from .whose import CTRPORT, is_ours


@dataclass(frozen=True)
class Judgement:
    """The answer. ``declared`` is the publication that it is about, if it is about one.

    ``doubt`` is the rule that it depends on, where it does, and ``otherwise`` what becomes of the packet if not so.
    """

    fate: Fate
    declared: Declared | None = None
    doubt: Doubt | None = None
    otherwise: Fate | None = None

    @property
    def outcome(self) -> Outcome:
        """What is said to become of it."""
        return self.fate.outcome if self.otherwise is None else Outcome.UNKNOWN

    @property
    def cause(self) -> Cause:
        """Because of what."""
        return self.fate.cause if self.otherwise is None else Cause.UNTOLD


def judge(inquiry: Inquiry, facts: Facts, fates: Sequence[Fate]) -> Judgement:
    """Return what is to be said of a packet that ends in one of these ways."""
    judged = [_judged(inquiry.packet, facts, fate) for fate in fates]
    first = min(judged, key=lambda each: len(each.fate.case.doubts))
    others = [each for each in judged if not _same(each.fate, first.fate)]
    if not others:
        return _as_far_as_seen(first, facts)
    if all(each.fate.outcome is Outcome.FAILS for each in judged):
        return first  # whatever is not known: it fails
    other = next((each for each in others if each.fate.outcome is not first.fate.outcome), others[0])
    if other.fate.outcome is first.fate.outcome is Outcome.WORKS:
        return _as_far_as_seen(first, facts)  # one of several gets it, by chance
    doubt = _difference(first.fate, other.fate)
    return replace(first, doubt=doubt, otherwise=other.fate)


def _same(one: Fate, other: Fate) -> bool:
    return (one.outcome, one.cause, one.at, one.who) == (other.outcome, other.cause, other.at, other.who)


def _difference(one: Fate, other: Fate) -> Doubt | None:
    """Return the rule that decides between two cases, as the first of them has it."""
    theirs = {doubt.at: doubt.matched for doubt in other.case.doubts}
    mine = {doubt.at: doubt.matched for doubt in one.case.doubts}
    for doubt in one.case.doubts:
        if theirs.get(doubt.at, doubt.matched) != doubt.matched:
            return doubt
    for doubt in other.case.doubts:
        if doubt.at not in mine:
            return replace(doubt, matched=not doubt.matched)
    return next(iter(one.case.doubts), None)


def _as_far_as_seen(judgement: Judgement, facts: Facts) -> Judgement:
    """Return it as sure as it can be where not all could be looked at."""
    fate = judgement.fate
    if fate.outcome is not Outcome.WORKS:
        return judgement
    count, most = (facts.number(f"net/netfilter/nf_conntrack_{each}") for each in ("count", "max"))
    if count >= most > 0:
        words = {"count": str(count), "most": str(most)}
        return replace(judgement, fate=replace(fate, outcome=Outcome.UNKNOWN, cause=Cause.TABLE_FULL, words=words))
    for unseen in (*facts.unseen, *_frames(fate.case.packet, facts)):
        words = {"unseen": unseen}
        return replace(judgement, fate=replace(fate, outcome=Outcome.UNKNOWN, cause=Cause.UNSEEN, words=words))
    return judgement


def _frames(packet: Packet, facts: Facts) -> Iterator[str]:
    """Tell the tables that a bridge asks about frames: they are not looked into."""
    if not facts.bridges & {packet.in_device, packet.out_device}:
        return
    for table in facts.rules.tables:
        bases = [(chain, chain.base) for chain in table.chains.values() if chain.base is not None]
        if table.family == "bridge" and any(chain.rules or base.policy == "drop" for chain, base in bases):
            yield f"the table bridge {table.name} has rules about what bridges send on, which are not looked into"


def _judged(packet: Packet, facts: Facts, fate: Fate) -> Judgement:
    """Return what a fate means for what is declared."""
    rule = fate.at.rule if fate.at is not None else None
    if fate.cause is Cause.DROPPED and rule is not None and owner(rule.tag or "").startswith("network "):
        return Judgement(replace(fate, cause=Cause.ISOLATED))
    port = packet.destination.port
    at_node = facts.is_own(packet.destination.address)
    about = [each for each in facts.declared if at_node and port and each.covers(packet.protocol, port)]
    about.sort(key=lambda each: (each.state != "active", not each.serves(packet.destination.address)))
    serving = [each for each in about if each.serves(packet.destination.address)]
    sender = translator(fate)
    if sender is not None and is_ours(sender):
        its = owner(sender.rule.tag or "") if sender.rule is not None else ""
        return _by_ours(fate, its or str(next(iter(serving), CTRPORT)), serving)
    if fate.outcome is Outcome.WORKS or sender is not None:
        if serving:
            return Judgement(replace(fate, outcome=Outcome.FAILS, cause=Cause.TAKEN), serving[0])
        return Judgement(fate)
    if fate.cause is Cause.NOBODY:
        return _nobody(packet, facts, fate, serving, about)
    return Judgement(fate, serving[0] if serving else None)


def translator(fate: Fate) -> At | None:
    """Return what sent the packet elsewhere, if something did."""
    return did(fate.case, "dnat")


def _by_ours(fate: Fate, its: str, serving: Sequence[Declared]) -> Judgement:
    """Judge what a rule of ours sent on: for whom it is says its owner, and who is there now says containerd."""
    declared = next((each for each in serving if its.startswith(f"{each.container} ")), None)
    name = its.partition(" ")[0]
    if fate.cause is Cause.STRANGER:
        gone = replace(fate, outcome=Outcome.FAILS, cause=Cause.GONE, words={**fate.words, "owner": its})
        return Judgement(gone, declared)
    keys = {str(key) for key in fate.who.keys} if fate.who is not None else {name}
    if "/" in name and keys and name not in keys:
        return Judgement(replace(fate, outcome=Outcome.FAILS, cause=Cause.GONE, words={"owner": its}), declared)
    return Judgement(fate, declared)


def _nobody(
    packet: Packet, facts: Facts, fate: Fate, serving: Sequence[Declared], about: Sequence[Declared]
) -> Judgement:
    """Judge a packet that came to the node itself, where nobody listens."""
    address = packet.destination.address
    if not serving:
        if about:
            return Judgement(replace(fate, cause=Cause.HOST_ADDRESS), about[0])
        port = packet.destination.port
        others = [its for its in facts.declared for each in (its.mapping.protocol,) if port and its.covers(each, port)]
        if others:
            return Judgement(replace(fate, cause=Cause.PROTOCOL), others[0])
        return Judgement(fate)
    its = serving[0]
    if its.missing:
        return Judgement(replace(fate, cause=Cause.NOT_INSTALLED), its)
    if its.state != "active":
        if its.reason.startswith("the node does not forward"):
            setting = "net.ipv4.ip_forward" if packet.family is Family.IPV4 else "net.ipv6.conf.all.forwarding"
            return Judgement(replace(fate, cause=Cause.FORWARDING, words={"setting": setting}), its)
        return Judgement(replace(fate, cause=Cause.NOT_ACTIVE), its)
    untracked = did(fate.case, "untrack")
    if untracked is not None:
        return Judgement(replace(fate, cause=Cause.UNTRACKED, at=untracked), its)
    if address.is_loopback and address.version == 6:
        return Judgement(replace(fate, cause=Cause.LOOPBACK6), its)
    if address.is_loopback and not facts.localhost and its.bound is not None and its.bound.any_host_ip:
        return Judgement(replace(fate, cause=Cause.LOCALHOST), its)
    if packet.family not in its.families:
        return Judgement(replace(fate, cause=Cause.ANOTHER_FAMILY), its)
    missed = [_missed(rule, packet, facts) for rule in _ours(facts, its, packet.family)]
    causes = [cause for field, cause in _CAUSES.items() if missed and all(field in each for each in missed)]
    if not missed:
        causes = [*_kept_out(its.access, packet)]
    return Judgement(replace(fate, cause=next(iter(causes), Cause.NOT_INSTALLED)), its)


def _kept_out(access: Access, packet: Packet) -> Iterator[Cause]:
    """Tell why a packet is not let in by what is declared: for where the rules do not say it one by one."""
    sources = access.sources_of(packet.family)
    if sources is None or (sources and not any(packet.source.address in source for source in sources)):
        yield Cause.SOURCES
    if access.interface is not None and packet.in_device != access.interface:
        yield Cause.INTERFACE


_CAUSES = {
    Field.SOURCE: Cause.SOURCES,
    Field.IN_DEVICE: Cause.INTERFACE,
    Field.DESTINATION: Cause.HOST_ADDRESS,
}


def _ours(facts: Facts, declared: Declared, family: Family) -> Iterator[Rule]:
    """Return the rules that are to send on what comes for a publication."""
    mark = f"{declared.container} {declared.bound}"
    for table in facts.rules.tables:
        if not table.sees(family) or facts.chain not in table.chains or table.name == "filter":
            continue
        for rule in table.chains[facts.chain].rules:
            if rule.tag is not None and (owner(rule.tag) == mark or owner(rule.tag).startswith(f"{mark} of ")):
                yield rule


def _missed(rule: Rule, packet: Packet, facts: Facts) -> set[Field]:
    """Return what of a packet a rule does not want."""
    return {
        condition.field
        for condition in rule.conditions
        if isinstance(condition, Is) and condition.holds(packet, facts) is False
    }
