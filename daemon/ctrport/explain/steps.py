"""The way of a packet as lines for people: where, what is done with it, and whose that is. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .cases import At, Noted, Passed
from .facts import Declared, Facts, OldFlow
from .fate import Fate
from .packet import Packet, Turn
from .question import Inquiry
from .ruleset import NFT
from .whose import CTRPORT, chain_owner, owner_of, place_of

#: What a chain did with a packet.
_DONE = {
    "accept": "lets it through",
    "drop": "drops it",
    "reject": "rejects it",
    "untrack": "has connection tracking leave it alone",
    "untold": "may do something with it that is not understood here",
}


#: What stands before the place where something befalls a packet that is not the first.
_TURNS = {Turn.FIRST: "", Turn.ANSWER: "answer, ", Turn.LATER: "next packet, "}


@dataclass(frozen=True)
class Step:
    """One thing on the way. Not made safe to print.

    ``does`` is what was decided, where something was: accept, drop, reject, dnat, snat, untrack or untold. ``rule`` is
    the text of the rule that did, as its program prints it.
    """

    where: str
    what: str
    whose: str = ""
    does: str = ""
    rule: str = ""


def steps(inquiry: Inquiry, facts: Facts, fate: Fate) -> list[Step]:
    """Return the way of one case."""
    found = [Step("packet", _packet(inquiry.packet), inquiry.sender)]
    found += _sockets(inquiry.packet, facts)
    found += [Step("ctrport", *_declared(each)) for each in _about(inquiry.packet, facts)]
    found += [Step("tracked flows", _flow(flow)) for flow in _astray(inquiry.packet, facts, fate)]
    told: At | None = None
    for each in fate.case.trail:
        if isinstance(each, Noted):
            found.append(Step(each.where, each.what, each.whose))
        elif each.hooked != told or not _is_nothing(each):
            found += _passed(each, facts)
            told = each.hooked
    return found


def _is_nothing(each: Passed) -> bool:
    """Whether a chain was gone through to its end without anything being done."""
    return each.verdict is not None and each.verdict.at.rule is None and each.verdict.kind == "accept"


def _packet(packet: Packet) -> str:
    comes = f", in by {packet.in_device}" if packet.in_device is not None else ""
    return f"{packet.source.address} to {packet.destination}/{packet.protocol}{comes}"


def _sockets(packet: Packet, facts: Facts) -> Iterator[Step]:
    """Tell who has the port at the node itself, whether the packet gets there or not."""
    port = packet.destination.port
    if not facts.is_own(packet.destination.address) or port is None:
        return
    for its in facts.sockets(packet.protocol, port):
        ours = facts.keeps(packet.protocol, its)
        what = "keeps the port from others, and answers nobody" if ours else f"listens on {its}"
        yield Step("socket", what, CTRPORT if ours else facts.holder(its))


def _about(packet: Packet, facts: Facts) -> Iterator[Declared]:
    port = packet.destination.port
    if port is not None and facts.is_own(packet.destination.address):
        yield from (each for each in facts.declared if each.covers(packet.protocol, port))


def _declared(each: Declared) -> tuple[str, str]:
    return f"is to publish it: {each.state}" + (f", {each.reason}" if each.reason else ""), str(each)


def _flow(flow: OldFlow) -> str:
    return f"one that was sent to {flow.destination}:{flow.port} goes on to {flow.leads_to}:{flow.leads_to_port}"


def _astray(packet: Packet, facts: Facts, fate: Fate) -> Iterable[OldFlow]:
    """Return the kinds of flow that go elsewhere than this packet: they go on until they end."""
    now = fate.case.packet.flow.translated or packet.destination
    there = packet.destination.address
    found = (flow for flow in facts.flows if flow.destination == there)
    return dict.fromkeys(flow for flow in found if (flow.leads_to, flow.leads_to_port) != (now.address, now.port))


def _passed(each: Passed, facts: Facts) -> Iterator[Step]:
    verdict = each.verdict
    rule = verdict.at.rule if verdict is not None else None
    text = rule.text if rule is not None else ""
    where = _TURNS[each.packet.flow.turn] + place_of(each.hooked)
    if verdict is None:
        whose = (
            chain_owner(each.into, facts.chain)
            if each.hooked.table.kept_by != NFT
            else owner_of(each.hooked, facts.chain)
        )
        yield Step(where, f"{each.into}: not for it", whose)
        return
    whose = owner_of(verdict.at, facts.chain)
    inside = f" in {verdict.at.chain.name}" if verdict.at.chain.name not in (each.into, each.hooked.chain.name) else ""
    said = f"{each.into}: " if each.into else ""
    if verdict.kind == "dnat":
        yield Step(where, f"{said}sends it on to {each.packet.destination}{inside}", whose, verdict.kind, text)
    elif verdict.kind == "snat":
        mask = each.packet.flow.mask
        comes = f"it comes from {mask} from here on" if mask is not None else "its source is replaced"
        yield Step(where, f"{said}{comes}{inside}", whose, verdict.kind, text)
    elif rule is None:
        policy = "drops it, as the chain's policy is DROP" if verdict.kind == "drop" else "no rule stops it"
        yield Step(where, policy, whose, verdict.kind)
    else:
        yield Step(where, f"{said}{_DONE[verdict.kind]}{inside}", whose, verdict.kind, text)
