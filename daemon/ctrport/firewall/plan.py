"""What to write so that the kernel holds what it should: pure, printable, and in an order that is safe.

A restore commits table by table. So an addition writes filter before nat and a removal nat before filter: a packet that
is translated is always one that is accepted too. The guard of 127.0.0.0/8 (raw) comes first and goes last.

A chain of ours is rewritten whole only where its order is wrong or a rule stands in it twice; otherwise only the rules
that differ are written, so the others keep their counters. In a kernel chain nothing is touched but rules of ours.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from ..rules import USER_CHAIN, Difference, Jump, Place, Rule, Table

ChainKey = tuple[Table, str]
Ranks = Mapping[ChainKey, Mapping[int, int]]  # of each chain of ours: how many rules it holds of each rank


@dataclass(frozen=True)
class Line:
    """One rule as the kernel lists it: ``text`` in iptables' words (``-A CHAIN ...``), ``tag`` where it is ours.

    An ``abridged`` text has the chain, the comment and the target, and is not enough to say which rule is to go.
    """

    text: str
    tag: str | None
    abridged: bool = False

    @property
    def chain(self) -> str:
        """The chain that it stands in."""
        return self.text.split(" ", 2)[1]

    @property
    def owner(self) -> str:
        """Whose rule it is, in the words of its tag; empty where it is not ours."""
        return " ".join((self.tag or "").split(" ")[1:-1])

    @property
    def target(self) -> str:
        """The chain or target that it goes to, empty where it goes nowhere."""
        found = _TARGET.search(self.unquoted)
        return found[1] if found else ""

    @property
    def unquoted(self) -> str:
        """Its words without what stands in quotes: comments and log prefixes, which may hold anything."""
        return _QUOTED.sub('""', self.text)


_TARGET = re.compile(r" -[jg] (\S+)")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


@dataclass(frozen=True)
class New:
    """Make a chain. Fails where there is one of that name, so that what came meanwhile is not emptied."""

    chain: str


@dataclass(frozen=True)
class Empty:
    """Take every rule out of a chain of ours, to write it anew in the same commit."""

    chain: str


@dataclass(frozen=True)
class Add:
    """Put a rule at ``position``, counted from 1, or at the end where that is None.

    As a ``Line``: a rule that the kernel lists, put back as it was.
    """

    rule: Rule | Line
    position: int | None


@dataclass(frozen=True)
class Remove:
    """Take one rule of ours away: as we would write it, or as the kernel lists it."""

    chain: str
    rule: Rule | Line


@dataclass(frozen=True)
class Delete:
    """Empty a chain of ours, and take it away where ``whole``."""

    chain: str
    whole: bool = True


Op = New | Empty | Add | Remove | Delete


@dataclass(frozen=True)
class Block:
    """What is committed to one table at once."""

    table: Table
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Plan:
    """Blocks in the order in which they are to be committed. False where there is nothing to write. An ``AnyPlan``.

    ``ranks`` is what our chains hold of each rank afterwards.
    """

    blocks: tuple[Block, ...] = ()
    ranks: Ranks = field(default_factory=dict, compare=False)

    def __bool__(self) -> bool:
        return bool(self.blocks)

    @property
    def added(self) -> list[Rule]:
        """The rules that it writes."""
        ops = (op for block in self.blocks for op in block.ops)
        return [op.rule for op in ops if isinstance(op, Add) and isinstance(op.rule, Rule)]

    @property
    def removed(self) -> list[str]:
        """The owners of the rules that were found and that it takes away."""
        ops = (op for block in self.blocks for op in block.ops)
        return [op.rule.owner for op in ops if isinstance(op, Remove) and isinstance(op.rule, Line)]


def parted(plan: Plan) -> tuple[Plan, list[tuple[Table, Remove]]]:
    """Return what is to be written of a plan, and which rules, by table, may go all at once when that is done.

    These are the removals that end a block: whatever comes behind is a removal again. Going at once they are in no
    order that could be wrong.
    """
    blocks, removals = [], list[tuple[Table, Remove]]()
    for block in plan.blocks:
        written = len(block.ops)
        while written and isinstance(block.ops[written - 1], Remove):
            written -= 1
        removals += [(block.table, op) for op in block.ops[written:] if isinstance(op, Remove)]
        blocks.append(Block(block.table, block.ops[:written]))
    return Plan(tuple(block for block in blocks if block.ops), plan.ranks), removals


def plan_all(
    wanted: Iterable[Rule],
    held: Mapping[ChainKey, Sequence[Line] | None],
    tag: Callable[[Rule], str],
) -> Plan:
    """Return what makes the kernel hold exactly ``wanted`` of ours.

    ``held`` lists every chain of ours, every kernel chain that may hold a rule of ours, and the operator's; None is a
    chain that is not there. ``tag`` gives the comment that a rule bears.
    """
    by_chain: dict[ChainKey, list[Rule]] = {}
    for rule in wanted:
        by_chain.setdefault((rule.table, rule.chain), []).append(rule)
    draft = _Draft()
    for key, lines in held.items():
        rules = by_chain.get(key, [])
        if key == (Table.FILTER, USER_CHAIN):
            jumped_to = any(rule.target == Jump(USER_CHAIN) for rules in by_chain.values() for rule in rules)
            draft.create[key[0]] += [New(USER_CHAIN)] if lines is None and jumped_to else []
        elif key[1] in BUILT_IN:
            draft.kernel_chain(key, rules, lines or (), tag)
        else:
            in_order = sorted(((rule.rank, tag(rule), rule) for rule in rules), key=lambda each: each[:2])
            draft.own_chain(key, {its: rule for _, its, rule in in_order}, lines)
    ranks = {key: Counter(rule.rank for rule in by_chain.get(key, ())) for key in held}
    return Plan(draft.blocks(), ranks)


def plan_change(difference: Difference, ranks: Ranks) -> Plan:
    """Return what a difference takes in chains that hold what ``ranks`` says, at the cost of the difference."""
    draft = _Draft()
    after = {key: Counter(ranks.get(key, {})) for key in {(r.table, r.chain) for r in difference.added}}
    for rule in difference.added:
        key = (rule.table, rule.chain)
        position: int | None = 1 if rule.place in (Place.FIRST, Place.EARLY) else None
        if rule.place is Place.OWN:
            before = sum(count for rank, count in after[key].items() if rank <= rule.rank)
            position = None if before == sum(after[key].values()) else before + 1
            after[key][rule.rank] += 1
        draft.add[rule.table].append(Add(rule, position))
    for rule in difference.removed:
        key = (rule.table, rule.chain)
        draft.remove[rule.table].append(Remove(rule.chain, rule))
        if rule.place is Place.OWN:
            after.setdefault(key, Counter(ranks.get(key, {})))[rule.rank] -= 1
    return Plan(draft.blocks(), {**ranks, **after})


#: The kernel's own chains of each table.
KERNEL_CHAINS = {
    Table.RAW: ("PREROUTING", "OUTPUT"),
    Table.NAT: ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    Table.FILTER: ("INPUT", "FORWARD", "OUTPUT"),
}
BUILT_IN = {chain for chains in KERNEL_CHAINS.values() for chain in chains}

#: Jumps in FORWARD that mean that somebody decides there what pods may get: kube-proxy's, and policy agents'.
POLICY_AGENTS = ("KUBE-", "cali-", "CILIUM_", "ANTREA-", "WEAVE-NPC")
#: Jumps that may stand before one of ours: they want the top as well, and do no harm there.
NEIGHBOURS = (*POLICY_AGENTS, "CNI-", "FLANNEL-")


class _Draft:
    """The operations of a plan by table, until they are put in order."""

    def __init__(self) -> None:
        self.create: dict[Table, list[Op]] = {table: [] for table in Table}
        self.replace: dict[Table, list[Op]] = {table: [] for table in Table}  # misplaced: to be added again at once
        self.add: dict[Table, list[Op]] = {table: [] for table in Table}
        self.remove: dict[Table, list[Op]] = {table: [] for table in Table}

    def blocks(self) -> tuple[Block, ...]:
        """Put the operations in the order that keeps every translated packet accepted."""
        early = {table: [*self.create[table], *self.replace[table], *self.add[table]] for table in Table}
        ordered = [
            (Table.RAW, early[Table.RAW]),
            (Table.FILTER, early[Table.FILTER]),
            (Table.NAT, [*early[Table.NAT], *self.remove[Table.NAT]]),
            (Table.FILTER, self.remove[Table.FILTER]),
            (Table.RAW, self.remove[Table.RAW]),
        ]
        return tuple(Block(table, tuple(ops)) for table, ops in ordered if ops)

    def own_chain(self, key: ChainKey, wanted: Mapping[str, Rule], lines: Sequence[Line] | None) -> None:
        """Make a chain hold what is wanted, in this order, by tag."""
        table, chain = key
        rank_of = {its: rule.rank for its, rule in wanted.items()}
        kept = [line.tag for line in lines or () if line.tag in rank_of]
        in_order = all(rank_of[a] <= rank_of[b] for a, b in pairwise(kept) if a and b)
        stale = list(dict.fromkeys(line for line in lines or () if line.tag not in rank_of))
        if lines is None or not in_order or len(set(kept)) != len(kept):
            if wanted:
                self.create[table].append(New(chain) if lines is None else Empty(chain))
                self.add[table] += [Add(rule, None) for rule in wanted.values()]
            if wanted and table is Table.FILTER:
                # What leaves goes in its turn: until nat is written, something may still be translated to it. (In one
                # commit iptables-nft removes nothing that it adds to a chain that it empties.)
                self.add[table] += [Add(line, None) for line in stale]
                self.remove[table] += [Remove(chain, line) for line in stale]
            return
        self.remove[table] += [Remove(chain, line) for line in lines if line.tag not in rank_of]
        there, added = set(kept), 0
        ends: dict[int, int] = {}  # by rank: how many lines there are up to the last kept one that is not above it
        for index, line in enumerate(lines):
            if line.tag in rank_of:
                ends[rank_of[line.tag]] = index + 1
        for its, rule in wanted.items():
            if its in there:
                continue
            end = max((end for rank, end in ends.items() if rank <= rule.rank), default=0)
            self.add[table].append(Add(rule, None if end == len(lines) else end + added + 1))
            added += 1

    def kernel_chain(
        self, key: ChainKey, wanted: Sequence[Rule], lines: Sequence[Line], tag: Callable[[Rule], str]
    ) -> None:
        table, chain = key
        policed = any(line.tag is None and line.target.startswith(POLICY_AGENTS) for line in lines)
        places = {tag(rule): _resolved(rule.place, policed) for rule in wanted}
        first = [rule for rule in wanted if places[tag(rule)] is Place.FIRST]
        rest = [rule for rule in wanted if places[tag(rule)] is not Place.FIRST]
        position, moved = 1, False
        for rule in (*first, *rest):
            its, place = tag(rule), places[tag(rule)]
            found = [index for index, line in enumerate(lines) if line.tag == its]
            # One that is put first pushes those behind it down, wherever they stood.
            pushed = moved and place is Place.FIRST
            if len(found) == 1 and not pushed and _well_placed(place, found[0], position, lines):
                position += place is not Place.LAST
                continue
            moved = True
            self.replace[table] += [Remove(chain, lines[index]) for index in found]
            self.add[table].append(Add(rule, None if place is Place.LAST else position))
            position += place is not Place.LAST
        self.remove[table] += [Remove(chain, line) for line in lines if line.tag is not None and line.tag not in places]


def _resolved(place: Place, policed: bool) -> Place:
    if place is Place.POLICY:
        return Place.LAST if policed else Place.FIRST
    return place


def _well_placed(place: Place, index: int, position: int, lines: Sequence[Line]) -> bool:
    """Whether the rule at ``index`` stands where ``place`` wants it; ``position`` counts from 1 what is to be first."""
    if place is Place.FIRST:
        return index == position - 1
    others = lines[:index] if place is Place.EARLY else lines[index + 1 :]
    if place is Place.EARLY:
        return all(line.tag is not None or line.target.startswith(NEIGHBOURS) for line in others)
    return not any(line.tag is None and line.target.startswith(NEIGHBOURS) for line in others)


def plan_removal(held: Mapping[ChainKey, Sequence[Line]]) -> tuple[Plan, Plan]:
    """Return what takes every rule of ours out of ``held``: all chains of the tables nat, filter and raw.

    The second plan takes away the guard of 127.0.0.0/8, for after route_localnet was put back. A chain is ours where it
    holds a rule of ours; it stays, without our rules, where somebody else put a rule into it or jumps to it. The
    operator's chain goes only where it is empty and nobody but us jumps to it.
    """
    plans: dict[Table, list[Op]] = {table: [] for table in Table}
    for table in Table:
        chains = {chain: lines for (its, chain), lines in held.items() if its is table}
        used = {line.target for lines in chains.values() for line in lines if line.tag is None}
        whole: list[Delete] = []
        for chain, lines in chains.items():
            ours = [line for line in lines if line.tag is not None]
            if chain not in BUILT_IN and not lines and _jumps(chains, chain) and chain not in used:
                whole.append(Delete(chain))  # the operator's, or what a flush left of ours
            elif ours and chain not in BUILT_IN and len(ours) == len(lines):
                whole.append(Delete(chain, whole=chain not in used))
            else:
                plans[table] += [Remove(chain, line) for line in ours]
        # Chains are emptied first and deleted after: they jump to one another.
        plans[table] += [Delete(op.chain, whole=False) for op in whole]
        plans[table] += [op for op in whole if op.whole]
    first = [Block(table, tuple(plans[table])) for table in (Table.NAT, Table.FILTER) if plans[table]]
    guard = [Block(Table.RAW, tuple(plans[Table.RAW]))] if plans[Table.RAW] else []
    return Plan(tuple(first)), Plan(tuple(guard))


def plan_sweep(held: Mapping[ChainKey, Sequence[Line]], keep: Container[ChainKey]) -> Plan:
    """Return what deletes chains of ours but for those to ``keep``: what another name for our chains has left.

    Nothing of ours may jump to them any more.
    """
    others = {key: lines for key, lines in held.items() if key not in keep and key[1] not in {*BUILT_IN, USER_CHAIN}}
    blocks = (block for plan in plan_removal(others) for block in plan.blocks)
    return Plan(tuple(blocks))


def abridged(plan: Plan) -> list[ChainKey]:
    """Return the chains of which ``plan`` has rules whose words are not known."""
    ops = ((block.table, op) for block in plan.blocks for op in block.ops)
    return list(dict.fromkeys((table, line.chain) for table, op in ops if (line := _abridged(op)) is not None))


def spell(plan: Plan, listed: Mapping[ChainKey, Sequence[Line]]) -> Plan:
    """Return ``plan`` with the words that ``listed`` has for its abridged rules; without those that are gone by now."""
    words: dict[tuple[ChainKey, str | None], deque[Line]] = {}
    for key, lines in listed.items():
        for line in lines:
            words.setdefault((key, line.tag), deque()).append(line)
    blocks = []
    for block in plan.blocks:
        ops: list[Op] = []
        for op in block.ops:
            short = _abridged(op)
            known = words.get(((block.table, short.chain), short.tag), ()) if short is not None else ()
            if short is None:
                ops.append(op)
            elif known and isinstance(op, Add):
                ops.append(replace(op, rule=known[0]))  # put back as it is, and removed in its turn
            elif known and isinstance(op, Remove):
                ops.append(replace(op, rule=known.popleft()))  # each of those that stand there twice
        blocks.append(Block(block.table, tuple(ops)))
    return Plan(tuple(block for block in blocks if block.ops), plan.ranks)


def _abridged(op: Op) -> Line | None:
    line = op.rule if isinstance(op, (Add, Remove)) else None
    return line if isinstance(line, Line) and line.abridged else None


def _jumps(chains: Mapping[str, Sequence[Line]], chain: str) -> bool:
    """Whether a rule of ours jumps to ``chain``."""
    return any(line.tag is not None and line.target == chain for lines in chains.values() for line in lines)
