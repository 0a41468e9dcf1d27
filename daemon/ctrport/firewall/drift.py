"""What of ours the kernel no longer held as it should: read out of the plan that mends it. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from ..owners import Owner
from ..rules import Rule
from .plan import BUILT_IN, Add, Empty, Line, Plan, Remove
from .text import tag

#: How many are named of what there may be thousands.
NAMED = 3


@dataclass(frozen=True)
class Drift:
    """What was not as it should be; false where nothing was.

    ``gone`` are rules that were missing, ``astray`` the words for what stood in the wrong place or more often than
    once, ``surplus`` counts rules with our mark that nobody asked for, ``switches`` are devices whose route_localnet
    was off. Of a table of our own, ``edited`` are rules that said something else, and ``broken`` the words for what
    stands in it as long as it is there, and was gone or another.
    """

    gone: tuple[Rule, ...] = ()
    astray: tuple[str, ...] = ()
    surplus: int = 0
    switches: tuple[str, ...] = ()
    edited: tuple[Rule, ...] = ()
    broken: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.in_tables or bool(self.switches)

    @property
    def in_tables(self) -> bool:
        """Whether anything was wrong with the rules themselves."""
        return bool(self.gone or self.astray or self.surplus or self.edited or self.broken)

    def __str__(self) -> str:
        parts = [f"gone or changed: {_some(self.broken)}"] if self.broken else []
        parts += [_those(self.gone, "gone")] if self.gone else []
        parts += [_those(self.edited, "edited")] if self.edited else []
        parts += [f"out of place: {_some(self.astray)}"] if self.astray else []
        parts += [f"too many: {_rules(self.surplus)}"] if self.surplus else []
        parts += [f"route_localnet off: {_some(self.switches)}"] if self.switches else []
        return "; ".join(parts)


def combined(found: Iterable[Drift]) -> Drift:
    """Return what was found in several places as one."""
    each = list(found)
    return Drift(
        tuple(dict.fromkeys(rule for one in each for rule in one.gone)),
        tuple(dict.fromkeys(words for one in each for words in one.astray)),
        sum(one.surplus for one in each),
        tuple(dict.fromkeys(device for one in each for device in one.switches)),
        tuple(dict.fromkeys(rule for one in each for rule in one.edited)),
        tuple(dict.fromkeys(words for one in each for words in one.broken)),
    )


def drift(plan: Plan, asked: Container[Rule] = (), dismissed: Container[str] = ()) -> Drift:
    """Return what a plan mends, but for what was ``asked`` for just now, and for the tags that were ``dismissed``."""
    gone: list[Rule] = []
    astray: dict[str, None] = {}
    surplus = 0
    for block in plan.blocks:
        wrong = {op.chain for op in block.ops if isinstance(op, Empty)}
        astray |= dict.fromkeys(f"the chain {chain} of {block.table}" for chain in sorted(wrong))
        found = {(op.chain, op.rule.tag) for op in block.ops if isinstance(op, Remove) and isinstance(op.rule, Line)}
        added = {(op.rule.chain, tag(op.rule)) for op in block.ops if isinstance(op, Add) and isinstance(op.rule, Rule)}
        for op in block.ops:
            if isinstance(op, Add) and isinstance(op.rule, Rule) and op.rule.chain not in wrong:
                its = (op.rule.chain, tag(op.rule))
                if its in found:
                    astray[_named(op.rule)] = None
                elif op.rule not in asked:
                    gone.append(op.rule)
            elif isinstance(op, Remove) and isinstance(op.rule, Line):
                mark = op.rule.tag or ""
                surplus += (op.chain, mark) not in added and mark not in dismissed and op.chain not in wrong
    return Drift(tuple(dict.fromkeys(gone)), tuple(astray), surplus)


def _those(rules: tuple[Rule, ...], became: str) -> str:
    jumps = list(dict.fromkeys(rule.chain for rule in rules if rule.chain in BUILT_IN))
    owners = dict.fromkeys(rule.owner for rule in rules if "/" in rule.owner.partition(" ")[0])
    mappings = [f"{its.container} {its.bound}" for its in map(Owner.parse, owners) if its is not None]
    what = [f"the jumps of {', '.join(jumps)}"] if jumps else []
    what += [f"what publishes {_some(mappings)}"] if mappings else []
    return f"{_rules(len(rules))} {became}" + (f" ({'; '.join(what)})" if what else "")


def _named(rule: Rule) -> str:
    return f"a rule of {rule.chain} in {rule.table}"


def _some(names: Iterable[str]) -> str:
    known = list(dict.fromkeys(names))
    more = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
    return ", ".join(known[:NAMED]) + more


def _rules(count: int) -> str:
    return f"{count} rule" + ("" if count == 1 else "s")
