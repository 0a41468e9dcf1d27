"""A packet through the chains of one hook, in the order of the kernel. Pure.

Where it cannot be told whether a rule matches, both are looked at: each is a ``Case`` that remembers what it takes for
granted. Cases that come out the same are one again, so that a rule nobody can judge matters only where it decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..model import PortRange
from .cases import At, Case, Doubt, Ended, Passed, Verdict
from .facts import Facts
from .packet import Field, Packet, Place
from .ruleset import (
    ACTIONS,
    LEGACY,
    TRANSLATION,
    Action,
    Base,
    Chain,
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
    Ruleset,
    Table,
    To,
    Toss,
    Untrack,
    place_of,
)

#: How many cases are followed at most, and how deep chains go (nf_tables: 16).
MOST_CASES, DEEPEST = 24, 32
#: Where connection tracking looks for the flow of a packet (NF_IP_PRI_CONNTRACK), at the hooks that packets begin at.
_TRACKING, _BEGINNINGS = -200, ("prerouting", "output")


class _Back:
    """The rest of the chain is not asked."""


_BACK = _Back()
_Step = tuple[Case, Verdict | _Back | None]


class Hooks:
    """Sends packets through the hooks. What it found for one it remembers, as the walk begins anew now and then."""

    def __init__(self, rules: Ruleset) -> None:
        self._rules = rules
        self._known: dict[tuple[str, bool, Packet], list[Ended]] = {}

    def run(self, case: Case, hook: str, facts: Facts, *, translates: bool = True) -> list[Ended]:
        """Return how a packet comes out of a hook. ``translates``: it is the first of its flow that comes there."""
        key = (hook, translates, case.packet)
        if key not in self._known:
            chains = self._rules.hooked(hook, case.packet.family)
            found = [
                each for order in _orders(chains) for each in _Hook(hook, facts, translates).run(case.packet, order)
            ]
            self._known[key] = _merged(found)
        return [(after.after(case), verdict) for after, verdict in self._known[key]]


_Hooked = tuple[Table, Chain, Base]


def _orders(chains: list[_Hooked]) -> list[list[_Hooked]]:
    """Return the orders that the kernel may have them in: when legacy tables came is not seen.

    It matters between chains that translate alone: of others each has to let the packet pass.
    """
    nat = [each for each in chains if each[2].type == "nat"]
    legacy = [each for each in nat if each[0].kept_by == LEGACY]
    if not legacy or len(legacy) == len(nat):
        return [chains]
    last = [each for each in nat if each not in legacy] + legacy
    first = legacy + [each for each in nat if each not in legacy]
    return [_with(chains, iter(order)) for order in (first, last)]


def _with(chains: list[_Hooked], nat: Iterable[_Hooked]) -> list[_Hooked]:
    others = iter(nat)
    return [next(others) if each[2].type == "nat" else each for each in chains]


class _Hook:
    """One hook, for one packet."""

    def __init__(self, hook: str, facts: Facts, translates: bool) -> None:
        self._hook = hook
        self._facts = facts
        self._translates = translates

    def run(self, packet: Packet, chains: list[_Hooked]) -> list[Ended]:
        cases, stopped = [Case(packet)], list[Ended]()
        begins = self._hook in _BEGINNINGS
        looked_up, rewritten = not begins, self._hook not in TRANSLATION
        for table, chain, base in chains:
            if not looked_up and place_of(base) > _TRACKING:
                cases, looked_up = [replace(case, packet=case.packet.looked_up()) for case in cases], True
            if not rewritten and place_of(base) >= TRANSLATION[self._hook]:
                cases, rewritten = [_rewritten(case, not begins) for case in cases], True
            ended = [each for case in cases for each in self._base(case, table, chain, base)]
            cases = []
            for case, verdict in _merged(ended):
                if verdict is None:
                    cases.append(case)
                else:
                    stopped.append((case, verdict))
        if not looked_up:
            cases = [replace(case, packet=case.packet.looked_up()) for case in cases]
        if not rewritten:
            cases = [_rewritten(case, not begins) for case in cases]
        return stopped + [(case, None) for case in cases]

    def _base(self, case: Case, table: Table, chain: Chain, base: Base) -> list[Ended]:
        """Go through a chain that hooks in; a verdict is returned where it stops the packet."""
        if base.type == "nat" and not self._is_to_translate(case.packet):
            return [(case, None)]
        here = At(table, chain)
        done: list[Ended] = []
        if self._hook == "ingress" and chain.rules and case.packet.in_device not in base.devices:
            if base.devices:
                return [(case, None)]
            # It is for some device, and which is not told.
            done.append((_doubted(case, here, False), None))
            case = _doubted(case, here, True)
        for after, verdict in self._chain(case, table, chain, here, 0):
            if verdict is None and (base.policy == "drop" or chain.rules):
                verdict = Verdict(base.policy, here)
                after = after.came_by(Passed(here, "", verdict, after.packet))
            stops = verdict is not None and verdict.kind in ("drop", "reject", "untold")
            done.append((after, verdict if stops else None))
        return done

    def _is_to_translate(self, packet: Packet) -> bool:
        flow = packet.flow
        if not self._translates or flow.state != "new":
            return False
        return flow.translated is None if self._hook in _BEGINNINGS else not flow.masked

    def _chain(self, case: Case, table: Table, chain: Chain, hooked: At | None, depth: int) -> list[Ended]:
        """Go through a chain; ``hooked`` is given for one that hooks in, so that what it jumps to is noted."""
        cases, done = [case], list[Ended]()
        for rule in chain.rules:
            if not rule.acts:
                continue
            at = At(table, chain, rule)
            going_on: list[Case] = []
            for each in cases:
                for after, outcome in self._rule(each, at, rule, hooked, depth):
                    if outcome is None:
                        going_on.append(after)
                    else:
                        done.append((after, outcome if isinstance(outcome, Verdict) else None))
            cases = going_on if len(going_on) < 2 else _merged_cases(going_on)
            if not cases:
                break
            if len(cases) + len(done) > MOST_CASES:
                return [(cases[0], Verdict("untold", cases[0].doubts[0].at if cases[0].doubts else at))]
        return _merged(done + [(each, None) for each in cases])

    def _rule(self, case: Case, at: At, rule: Rule, hooked: At | None, depth: int) -> list[_Step]:
        first = rule.parts[0]
        if not isinstance(first, ACTIONS) and first.holds(case.packet, self._facts) is False:
            return [(case, None)]  # as of most rules
        cases, done = [case], list[_Step]()
        for part in rule.parts:
            going_on: list[Case] = []
            for each in cases:
                if isinstance(part, ACTIONS):
                    for after, outcome in self._act(each, part, at, hooked, depth):
                        if outcome is _GO_ON:
                            going_on.append(after)
                        else:
                            done.append((after, outcome))
                    continue
                holds = part.holds(each.packet, self._facts)
                if holds is None:
                    done.append((_doubted(each, at, False), None))
                    each = _doubted(each, at, True)
                elif not holds:
                    done.append((each, None))
                    continue
                going_on.append(each)
            cases = going_on
            if not cases:
                break
        return done + [(each, None) for each in cases]

    def _act(self, case: Case, action: Action | None, at: At, hooked: At | None, depth: int) -> list[_Step]:
        """Do one thing. The outcome is ``_GO_ON`` where the rule's next part comes."""
        match action:
            case None:
                return [(case, _GO_ON)]
            case End(kind):
                return [self._decided(case, Verdict(kind, at), hooked)]
            case Return():
                return [(case, _BACK)]
            case Jump(name, goto):
                return self._jump(case, name, goto, at, hooked, depth)
            case LookUp(key, elements):
                found = elements.find([case.packet.readings[field] for field in key]).values
                return self._one_of(case, found, at, hooked, depth)
            case Toss(actions):
                return self._one_of(case, actions, at, hooked, depth)
            case NewDestination() | Redirect():
                return self._destination(case, action, at, hooked)
            case NewSource():
                return [
                    self._decided(replace(case, packet=self._masked(case.packet, action)), Verdict("snat", at), hooked)
                ]
            case Mark():
                return self._mark(case, action, at)
            case Untrack():
                if case.packet.flow.tracked:
                    return [(case, _GO_ON)]
                case = replace(case, packet=case.packet.untracked())
                return [(case.came_by(Passed(at, "", Verdict("untrack", at), case.packet)), _GO_ON)]
            case Perhaps():
                untold = self._decided(_doubted(case, at, True), Verdict("untold", at), hooked)
                return [(_doubted(case, at, False), _GO_ON), untold]

    def _one_of(
        self, case: Case, actions: Iterable[Action | None], at: At, hooked: At | None, depth: int
    ) -> list[_Step]:
        actions = list(dict.fromkeys(actions))
        if len(actions) == 1:
            return self._act(case, actions[0], at, hooked, depth)
        doubted = _doubted(case, at, True)
        return [step for action in actions for step in self._act(doubted, action, at, hooked, depth)]

    def _jump(self, case: Case, name: str, goto: bool, at: At, hooked: At | None, depth: int) -> list[_Step]:
        chain = at.table.chains.get(name)
        if chain is None or depth >= DEEPEST:
            return [self._decided(_doubted(case, at, True), Verdict("untold", at), hooked)]
        steps: list[_Step] = []
        for after, verdict in self._chain(case, at.table, chain, None, depth + 1):
            if hooked is not None:
                after = after.came_by(Passed(hooked, name, verdict, after.packet))
            steps.append((after, verdict if verdict is not None else _BACK if goto else None))
        return steps

    def _destination(self, case: Case, action: NewDestination | Redirect, at: At, hooked: At | None) -> list[_Step]:
        packet = case.packet
        if isinstance(action, Redirect):
            own = self._facts.address_of(packet.in_device or "lo", packet.family)
            if own is None:
                return [self._decided(_doubted(case, at, True), Verdict("untold", at), hooked)]
            places: list[To | None] = [To((own, own), action.ports)]
        elif action.map is None:
            places = [action.to]
        else:
            places = list(action.map.find([packet.readings[field] for field in action.key]).values)
        sure = len(places) == 1
        steps: list[_Step] = []
        for to in dict.fromkeys(places):
            each = case if sure else _doubted(case, at, True)
            place = None if to is None else _sent(packet, to)
            if to is None:
                # What a map does not have is not translated, and the rule ends there (NFT_BREAK).
                steps.append((each, None))
            elif place is None:
                steps.append(self._decided(_doubted(each, at, True), Verdict("untold", at), hooked))
            else:
                steps.append(self._decided(replace(each, packet=packet.sent_to(place)), Verdict("dnat", at), hooked))
        return steps

    @staticmethod
    def _mark(case: Case, action: Mark, at: At) -> list[_Step]:
        if action.map is None:
            return [(replace(case, packet=_marked(case.packet, action)), _GO_ON)]
        found = action.map.find([case.packet.readings[field] for field in action.key])
        steps: list[_Step] = []
        for value in found.values:
            each = case if found.sure else _doubted(case, at, value is not None)
            mark = replace(action, keep=0, flip=value or 0, map=None)
            # What a map does not have is not marked, and the rule ends there (NFT_BREAK).
            steps.append((each, None) if value is None else (replace(each, packet=_marked(case.packet, mark)), _GO_ON))
        return steps

    def _masked(self, packet: Packet, action: NewSource) -> Packet:
        if not action.device:
            return packet.from_behind(action.address)
        return packet.from_behind(self._facts.address_of(packet.out_device or "", packet.family))

    @staticmethod
    def _decided(case: Case, verdict: Verdict, hooked: At | None) -> _Step:
        if hooked is not None:
            case = case.came_by(Passed(hooked, "", verdict, case.packet))
        return case, verdict


def _rewritten(case: Case, source: bool) -> Case:
    """Translate what is not the first of its flow as that was: the kernel asks no rules about it."""
    return replace(case, packet=case.packet.rewritten(source=source))


class _GoOn(_Back):
    """The next part of the rule comes."""


_GO_ON = _GoOn()


def _doubted(case: Case, at: At, matched: bool) -> Case:
    return replace(case, doubts=(*case.doubts, Doubt(at, matched)))


def _sent(packet: Packet, to: To) -> Place | None:
    """Return where a packet is sent, None where that is not known."""
    address = packet.destination.address
    if to.addresses is not None:
        if to.addresses[0] != to.addresses[1]:
            return None
        address = to.addresses[0]
    ports = to.ports or packet.destination.ports
    if to.base is not None and to.ports is not None:
        port = packet.destination.port
        if port is None or not 0 < to.ports.first + port - to.base < 65536:
            return None
        ports = PortRange(to.ports.first + port - to.base, to.ports.first + port - to.base)
    return Place(address, ports)


def _marked(packet: Packet, action: Mark) -> Packet:
    marks = {Field.MARK: packet.mark, Field.CT_MARK: packet.flow.mark}
    if Field.CT_MARK in (action.field, action.source) and not packet.flow.tracked:
        return packet  # there is no flow to mark, or to take a mark from
    value = action.flip if action.source is not None else None
    for field, mask in ((action.source, action.keep), (action.field, action.own)):
        if field is not None and mask and value is not None:
            its = marks[field]
            value = None if its is None else value ^ (its & mask)
    if action.field is Field.MARK:
        return replace(packet, mark=value)
    return replace(packet, flow=replace(packet.flow, mark=value))


def _merged(ended: list[Ended]) -> list[Ended]:
    """Return them without those that came out the same: what they took for granted differently does not matter."""
    if len(ended) < 2:
        return ended
    found: dict[tuple[Packet, Verdict | None], Case] = {}
    for case, verdict in ended:
        same = found.get((case.packet, verdict))
        found[case.packet, verdict] = case if same is None else _either(same, case)
    return [(case, verdict) for (_, verdict), case in found.items()]


def _merged_cases(cases: list[Case]) -> list[Case]:
    return [case for case, _ in _merged([(case, None) for case in cases])]


def _either(one: Case, other: Case) -> Case:
    return replace(one, doubts=tuple(doubt for doubt in one.doubts if doubt in other.doubts))
