"""Tables, chains and rules as a packet meets them, whichever program keeps them. Pure.

A rule is a row of parts, each a condition or an action, asked from left to right; the first condition that does not
hold ends it. What iptables calls a target is the last part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..model import Address, Family, PortRange
from .conditions import Condition
from .packet import Field
from .values import Elements


@dataclass(frozen=True)
class End:
    """The chain that hooks in ends with ``accept``, ``drop`` or ``reject``."""

    verdict: str


@dataclass(frozen=True)
class Return:
    """Go on behind the jump to this chain."""


@dataclass(frozen=True)
class Jump:
    """Go on in another chain of the table; with ``goto`` not to come back."""

    chain: str
    goto: bool = False


@dataclass(frozen=True)
class To:
    """Where a packet is sent: ``addresses`` None keeps its own, and so does ``ports``.

    With ``base`` the port is as far from the first of ``ports`` as the packet's own is from ``base``.
    """

    addresses: tuple[Address, Address] | None = None
    ports: PortRange | None = None
    base: int | None = None


@dataclass(frozen=True)
class NewDestination:
    """DNAT. With a ``map`` the place is what it has for the ``key``; what it has not is not translated."""

    to: To = To()
    key: tuple[Field, ...] = ()
    map: Elements[To] | None = None


@dataclass(frozen=True)
class Redirect:
    """DNAT to the node itself: to the first address of the device that it came in by, or to loopback."""

    ports: PortRange | None = None


@dataclass(frozen=True)
class NewSource:
    """SNAT. ``address`` None is not known; with ``device`` it is an address of the device that it goes out by."""

    address: Address | None = None
    device: bool = False


@dataclass(frozen=True)
class Mark:
    """Set ``field``, the packet's mark or the flow's, to ``(its own & own) ^ (source & keep) ^ flip``.

    Where ``source`` is None nobody knows to what. With a ``map`` it is what that has for the ``key``; what it does not
    have is not marked.
    """

    field: Field
    source: Field | None
    keep: int = 0xFFFFFFFF
    flip: int = 0
    own: int = 0
    key: tuple[Field, ...] = ()
    map: Elements[int] | None = None


@dataclass(frozen=True)
class Untrack:
    """Have connection tracking leave the packet alone: nothing can translate it then."""


@dataclass(frozen=True)
class LookUp:
    """nft's verdict map: do what it has for the ``key``, if anything."""

    key: tuple[Field, ...]
    map: Elements[End | Return | Jump | None]


@dataclass(frozen=True)
class Toss:
    """Do one of these, by chance or by a number that nobody knows."""

    actions: tuple[End | Return | Jump | NewDestination | None, ...]


@dataclass(frozen=True)
class Perhaps:
    """Something that nobody can tell here what it does."""

    words: str


Action = End | Return | Jump | NewDestination | Redirect | NewSource | Mark | Untrack | LookUp | Toss | Perhaps
Part = Condition | Action
#: Those that can matter to where a packet goes.
ACTIONS = (End, Return, Jump, NewDestination, Redirect, NewSource, Mark, Untrack, LookUp, Toss, Perhaps)


@dataclass(frozen=True, eq=False)
class Rule:
    """One rule, with the words of whoever printed it, and its comment: neither is safe to print.

    ``tag`` is ctrport's own comment. ``handle`` is the number by which nft deletes it.
    """

    parts: tuple[Part, ...]
    text: str
    comment: str = ""
    tag: str | None = None
    handle: int | None = None

    @cached_property
    def acts(self) -> bool:
        """Whether it does anything that can matter to where a packet goes."""
        return any(isinstance(part, ACTIONS) for part in self.parts)

    @property
    def conditions(self) -> Iterator[Condition]:
        """What it asks for, up to the first thing that it does."""
        for part in self.parts:
            if isinstance(part, ACTIONS):
                return
            yield part


@dataclass(frozen=True)
class Base:
    """Where a chain hooks into the kernel. Hooks and types go by nft's names; ``turn`` is when it was made.

    ``devices`` are those that it is for, of the hook ingress; none where they are not told.
    """

    hook: str
    priority: int
    type: str
    policy: str = "accept"
    turn: int = 0
    devices: frozenset[str] = frozenset()

    def at(self, turn: int) -> Base:
        """Return it as made in another turn."""
        return replace(self, turn=turn)


class Chain:
    """A chain of a table; its rules are read when they are asked for, as most never are."""

    def __init__(self, name: str, base: Base | None, read: Callable[[], Sequence[Rule]]) -> None:
        self.name = name
        self.base = base
        self._read = read
        self._rules: Sequence[Rule] | None = None

    @property
    def rules(self) -> Sequence[Rule]:
        """Its rules, in their order."""
        if self._rules is None:
            self._rules = self._read()
        return self._rules


#: Who keeps a table, by the program that shows it.
IPTABLES, LEGACY, NFT = "iptables-nft", "iptables-legacy", "nft"


@dataclass
class Table:
    """A table. ``family`` is nft's word: ip, ip6, inet, netdev or bridge."""

    kept_by: str
    family: str
    name: str
    chains: dict[str, Chain] = field(default_factory=dict)

    def sees(self, family: Family) -> bool:
        """Whether packets of that family meet it."""
        return self.family in ("inet", "netdev", "ip" if family is Family.IPV4 else "ip6")


class Ruleset:
    """Every table that there is."""

    def __init__(self, tables: Iterable[Table] = ()) -> None:
        self.tables = tuple(tables)

    def hooked(self, hook: str, family: Family) -> list[tuple[Table, Chain, Base]]:
        """Return the chains that a packet meets at a hook, in the kernel's order.

        Of one priority, who came last is first: so the kernel puts them into its list. Chains that translate are all
        asked at one place, whatever their priority, which is for their order among themselves alone (nf_nat_core.c).
        """
        found = [
            (table, chain, chain.base)
            for table in self.tables
            if table.sees(family)
            for chain in table.chains.values()
            if chain.base is not None and chain.base.hook == hook
        ]
        return sorted(found, key=lambda each: (place_of(each[2]), each[2].priority, -each[2].turn))


#: Where the kernel translates (NF_IP_PRI_NAT_DST, NF_IP_PRI_NAT_SRC).
TRANSLATION = {"prerouting": -100, "output": -100, "input": 100, "postrouting": 100}


def place_of(base: Base) -> int:
    """Return where among the chains of a hook the kernel asks one."""
    return TRANSLATION.get(base.hook, base.priority) if base.type == "nat" else base.priority
