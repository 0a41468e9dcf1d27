"""What to write so that our own table holds what it should: pure, printable, the least that does it.

What stands is loaded by nft where some of it is missing: a chain whose rules are not those that it should have is
filled anew in one commit, and its sets keep their elements. Elements are written apart from that, those that differ and
no others. Where a set itself is not as it should be the whole table is made anew with all elements, at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..model import Family
from ..rules import Difference, Rule
from .drift import Drift
from .elements import elements
from .plan import Plan
from .sets import Element, Set, add, delete, gate_map, outermost, table
from .standing import SOMETIMES, Chain, Hook, Standing
from .text import shell

#: What the program nft writes of a comment.
_NFT_COMMENT = 128


@dataclass(frozen=True)
class HeldSet:
    """A set as the kernel has it."""

    key_size: int
    data_size: int
    interval: bool
    counter: bool

    @classmethod
    def of(cls, its: Set, family: Family) -> HeldSet:
        """Return how the kernel has a set as we make it."""
        return cls(its.key_size(family), its.data_size(family), its.interval, counter=bool(its.data))


@dataclass(frozen=True)
class HeldChain:
    """A chain as the kernel has it: where it is called, if it is, and the comments of its rules."""

    hook: tuple[str, int, int] | None  # type, the number of the hook, priority
    accepts: bool
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Held:
    """What the kernel has of a table of our name. A ``dormant`` table is called by nobody."""

    sets: Mapping[str, HeldSet]
    chains: Mapping[str, HeldChain]
    elements: Collection[Element]
    dormant: bool = False

    def is_ours(self, standing: Standing) -> bool:
        """Whether there is anything of ours in it: a rule with our mark, or sets as we make them; or nothing at all."""
        tags = (tag for chain in self.chains.values() for tag in chain.tags)
        if any(tag.startswith("ctrport ") for tag in tags) or not (self.sets or self.chains):
            return True
        return any(self.sets.get(one.name) == HeldSet.of(one, standing.family) for one in standing.sets)


class Asked:
    """Which elements are asked for, by how many rules each, and how a change alters that."""

    def __init__(self, standing: Standing, rules: Iterable[Rule] = ()) -> None:
        self.standing = standing
        self._sets = {one.name: one for one in standing.sets}
        self._counts = Counter(element for rule in rules for element in elements(rule))
        self._nested: dict[str, set[Element]] = {one.name: set() for one in standing.sets if one.nested}
        for element in self._counts:
            if element.set in self._nested:
                self._nested[element.set].add(element)

    def __iter__(self) -> Iterator[Element]:
        """Yield what the kernel is to hold."""
        yield from (element for element in self._counts if element.set not in self._nested)
        for name in self._nested:
            yield from self._outermost(name, self._nested[name])

    def change(self, difference: Difference) -> tuple[dict[Element, int], list[Element], list[Element]]:
        """Return what ``take`` is to be given for a difference, and the elements that go and that come with it."""
        by: dict[Element, int] = {}
        for rules, step in ((difference.added, 1), (difference.removed, -1)):
            for rule in rules:
                for element in elements(rule):
                    by[element] = by.get(element, 0) + step
        gone: list[Element] = []
        come: list[Element] = []
        touched: dict[str, set[Element]] = {}
        for element, step in by.items():
            before = self._counts[element]
            if bool(before) == bool(before + step):
                continue
            if element.set in self._nested:
                touched.setdefault(element.set, set(self._nested[element.set])).symmetric_difference_update({element})
            else:
                (gone if before else come).append(element)
        for name, after in touched.items():
            was, will = self._outermost(name, self._nested[name]), self._outermost(name, after)
            gone += [element for element in was if element not in will]
            come += [element for element in will if element not in was]
        return by, gone, come

    def take(self, by: Mapping[Element, int]) -> None:
        """Take in that so many rules more ask for each element."""
        for element, step in by.items():
            count = self._counts[element] + step
            if count > 0:
                self._counts[element] = count
            else:
                del self._counts[element]
            if element.set in self._nested:
                its = self._nested[element.set]
                its.add(element) if count > 0 else its.discard(element)

    def _outermost(self, name: str, those: Iterable[Element]) -> list[Element]:
        return outermost(those, self._sets[name], self.standing.family)


@dataclass(frozen=True)
class TablePlan:
    """What is written: ``script`` by nft, then the elements at once. An ``AnyPlan``.

    ``whole``: the script makes the table anew with its elements in it. ``broken`` says what of what stands was not as
    it should be. ``gone`` are elements that the table holds and will not hold, ``come`` those that are written.
    ``doors`` are the plans for chains of iptables, ``stay_open`` says of each whether our rule was to be there before,
    too. ``asked`` is what the table is to hold afterwards, or ``by`` what changes of it. ``delete``: the whole table
    goes.
    """

    standing: Standing
    script: tuple[str, ...] = ()
    whole: bool = False
    broken: tuple[str, ...] = ()
    gone: tuple[Element, ...] = ()
    come: tuple[Element, ...] = ()
    doors: tuple[Plan, ...] = ()
    stay_open: tuple[bool, ...] = ()
    rules: tuple[Rule, ...] = ()
    asked: Asked | None = field(default=None, compare=False)
    by: Mapping[Element, int] = field(default_factory=dict, compare=False)
    delete: bool = False

    def __bool__(self) -> bool:
        return bool(self.script or self.gone or self.come or self.delete or any(self.doors))

    @property
    def added(self) -> list[Rule]:
        """See ``AnyPlan.added``."""
        return [*self.rules, *(rule for plan in self.doors for rule in plan.added)]

    @property
    def removed(self) -> list[str]:
        """See ``AnyPlan.removed``."""
        return list(dict.fromkeys(owner for element in self.gone if (owner := element.owner)))

    @cached_property
    def text(self) -> str:
        """What nft is to load."""
        lines = [*self.script]
        if self.whole:
            sets = {one.name: one for one in self.standing.sets}
            lines += [add(_short(element), sets[element.set], self.standing.family) for element in self.come]
        return "".join(f"{line}\n" for line in lines)

    @property
    def elements(self) -> tuple[tuple[Element, ...], tuple[Element, ...]]:
        """The elements to delete and those to add when nft has loaded the rest."""
        if self.delete:
            return (), ()
        if not self.whole:
            names = {one.name for one in self.standing.sets}  # others go with their sets
            return tuple(element for element in self.gone if element.set in names), self.come
        long = tuple(element for element in self.come if _short(element) != element)
        return tuple(map(_short, long)), long

    @property
    def lines(self) -> list[str]:
        """It as lines of shell: what nft is to load, then the elements; without a comment that is too long for nft."""
        family, sets = self.standing.family, {one.name: one for one in self.standing.sets}
        if self.delete:
            return [f"nft delete table {table(family)}"]
        gone, come = self.elements
        words = [delete(element, sets[element.set], family) for element in gone]
        words += [add(_short(element), sets[element.set], family) for element in come]
        texts = (self.text, "".join(f"{line}\n" for line in words))
        return [line for text in texts for line in shell("nft -f -", text)]

    def diff(self) -> list[str]:
        """Return it for people, in the words of nft."""
        family, sets = self.standing.family, {one.name: one for one in self.standing.sets}
        if self.delete:
            return [f"- delete table {table(family)}"]
        lines = [f"{'-' if line.startswith(('flush', 'delete')) else '+'} {line}" for line in self.script]
        if not self.whole:
            lines += [f"- {delete(element, sets[element.set], family)}" for element in self.gone if element.set in sets]
        return lines + [f"+ {add(element, sets[element.set], family)}" for element in self.come]

    def drift(self, asked: Collection[Rule], dismissed: Collection[Rule]) -> Drift:
        """See ``Firewall.drift``."""
        let_go = {element for rule in dismissed for element in elements(rule)}
        found = [element for element in self.gone if element not in let_go]
        come, keys = set(self.come), {element[:3] for element in found}
        gone: list[Rule] = []
        edited: list[Rule] = []
        for rule in self.rules:
            its = [element for element in elements(rule) if element in come]
            if rule not in asked and its:
                (edited if any(element[:3] in keys for element in its) else gone).append(rule)
        written = {element[:3] for element in self.come}
        surplus = sum(element[:3] not in written for element in found)
        return Drift(tuple(gone), surplus=surplus, edited=tuple(edited), broken=self.broken)


def plan_all(rules: Iterable[Rule], standing: Standing, held: Held | None) -> TablePlan:
    """Return what makes the table hold exactly what ``rules`` ask for; ``held`` None is a table that is not there."""
    wanted = list(rules)
    asked = Asked(standing, wanted)
    script, whole, broken = _mended(standing, held)
    has = set[Element]() if held is None else set(held.elements)
    will = set(asked)
    come = _in_order(will if whole else will - has)
    missing = set(come) - has if whole else set(come)
    added = [rule for rule in wanted if (its := elements(rule)) and not missing.isdisjoint(its)] if missing else []
    if script:
        added += [rule for rule in wanted if not elements(rule)]
    return TablePlan(standing, script, whole, broken, _in_order(has - will), come, rules=tuple(added), asked=asked)


def plan_change(difference: Difference, asked: Asked) -> TablePlan:
    """Return what a difference takes, at its own cost."""
    by, gone, come = asked.change(difference)
    return TablePlan(asked.standing, gone=tuple(gone), come=tuple(come), rules=difference.added, by=by)


def _in_order(those: Iterable[Element]) -> tuple[Element, ...]:
    return tuple(sorted(those))


def _short(element: Element) -> Element:
    """Return an element as nft can write it."""
    return element if len(element.comment) <= _NFT_COMMENT else element._replace(comment="")


def _mended(standing: Standing, held: Held | None) -> tuple[tuple[str, ...], bool, tuple[str, ...]]:
    """Return what nft is to load, whether that is the whole table in the place of one, and what is broken."""
    family = standing.family
    name = table(family)
    if held is None:
        return standing.script, False, (f"the table {name}",)
    expected = {one.name: HeldSet.of(one, family) for one in standing.sets}
    others = [one for one, its in expected.items() if held.sets.get(one, its) != its]
    if others or any(_is_elsewhere(chain.hook, held.chains.get(chain.name)) for chain in standing.chains):
        anew = (f"add table {name}", f"delete table {name}", *standing.script)
        return anew, True, (f"the table {name}",)
    lines, broken = [], []
    if held.dormant:
        lines.append(f"add table {name}")
        broken.append(f"the table {name}")
    for one in standing.sets:
        if one.name not in held.sets:
            lines.append(one.words(family))
            broken.append(f"the set {one.name} of {name}")
    wrong = [chain for chain in standing.chains if not _is_as_it_should_be(chain, held.chains.get(chain.name))]
    broken += [f"the chain {chain.name} of {name}" for chain in wrong]
    lines += [chain.made(family) for chain in wrong]
    for chain in wrong:
        lines += [f"flush chain {name} {chain.name}"] if chain.name in held.chains else []
        lines += chain.filled(family)
    chains, names = {chain.name for chain in standing.chains}, {one.name for one in standing.sets}
    for former in sorted(held.chains.keys() - chains):
        if former in SOMETIMES:
            lines += [f"flush chain {name} {former}", f"delete chain {name} {former}"]
    lines += [f"delete map {name} {former}" for former in sorted(held.sets.keys() - names) if gate_map(former)]
    return tuple(lines), False, tuple(broken)


def _is_elsewhere(hook: Hook | None, held: HeldChain | None) -> bool:
    """Whether a chain is there, and called from elsewhere than it should be."""
    its = None if hook is None else (hook.type, hook.number, hook.priority)
    return held is not None and held.hook != its


def _is_as_it_should_be(chain: Chain, held: HeldChain | None) -> bool:
    return held is not None and held.accepts and held.tags == chain.tags
