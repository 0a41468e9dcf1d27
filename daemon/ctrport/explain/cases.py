"""The ways that a packet may go, as far as they are known: what it is by now, what it came by, what decided. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .packet import Packet
from .ruleset import Chain, Rule, Table


@dataclass(frozen=True)
class At:
    """Where in the rules something is: a rule of a chain, or where ``rule`` is None the chain's policy."""

    table: Table
    chain: Chain
    rule: Rule | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, At) and self.chain is other.chain and self.rule is other.rule

    def __hash__(self) -> int:
        return hash((id(self.chain), id(self.rule)))


@dataclass(frozen=True)
class Doubt:
    """A rule that cannot be judged, and what is taken for granted of it: that it matched, or not."""

    at: At
    matched: bool


@dataclass(frozen=True)
class Verdict:
    """What a rule or a policy decided: accept, drop, reject, dnat, snat, untrack; untold, where nobody can tell."""

    kind: str
    at: At


@dataclass(frozen=True)
class Passed:
    """A chain that hooks in was gone through, or a chain that it jumps to: ``into``, empty for itself.

    ``verdict`` is what was decided in there, None where nothing was; ``packet`` is what it is since.
    """

    hooked: At
    into: str
    verdict: Verdict | None
    packet: Packet


@dataclass(frozen=True)
class Noted:
    """Something on the way that is no rule: where, what there is to say, and whose it is. Safe to print."""

    where: str
    what: str
    whose: str = ""


@dataclass(frozen=True)
class Case:
    """One of the ways that it may go: the packet as it is now, what was taken for granted, and what it came by."""

    packet: Packet
    doubts: tuple[Doubt, ...] = ()
    trail: tuple[Passed | Noted, ...] = ()

    def after(self, earlier: Case) -> Case:
        """Return it as what follows on another."""
        return replace(self, doubts=earlier.doubts + self.doubts, trail=earlier.trail + self.trail)

    def came_by(self, *what: Passed | Noted) -> Case:
        """Return it with something more on its trail."""
        return replace(self, trail=(*self.trail, *what))


def did(case: Case, kind: str) -> At | None:
    """Return what decided so on the way of a case, if something did."""
    verdicts = (each.verdict for each in case.trail if isinstance(each, Passed))
    return next((verdict.at for verdict in verdicts if verdict is not None and verdict.kind == kind), None)


#: A case, and the verdict that ended it: of a hook one that stopped the packet, None where it goes on.
Ended = tuple[Case, Verdict | None]
