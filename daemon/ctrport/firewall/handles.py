"""Rules of ours taken away by the numbers that the kernel has for them, where iptables would look for their words.

``iptables -D`` fetches the whole chain and compares each rule, which takes 0.3 s where one of 10,000 goes. By their
numbers (nf_tables' handles) any rules go in one commit, whatever their tables, at the price of a system call or two.

What number a rule has is known from when it was written, or was looked at. Nothing relies on that: before a rule goes,
the kernel is asked what has the number, and the commit is void where anything has changed since.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..model import Family
from ..nfnetlink import NewRules, NfTables, comment, delete_rule, handle
from ..nlmsg import Interrupted, Message, Rejected
from ..rules import Rule, Table
from .plan import Line, Remove
from .text import tag

#: How often it is tried anew where others commit meanwhile.
TRIES = 5
#: Of how many rules the numbers are remembered, and of how many in one chain each is asked for by itself.
MOST, MOST_ASKED = 200_000, 50

_Key = tuple[Table, str]  # a table and the tag of a rule in it


class Missing(Exception):
    """A rule that was to go is not there."""


class Handles:
    """The numbers of the rules of one family, in the network namespace that it is first used in.

    ``tables`` gives what the kernel is asked by. The sockets stay open until ``close``: to close one takes some 10 ms
    where rules went, as the kernel waits until no packet can meet them any more.
    """

    def __init__(self, family: Family, tables: Callable[[], NfTables]) -> None:
        self._domain = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
        self._known: dict[_Key, int] = {}
        self._tables = tables
        self._hears: NewRules | None = None

    def close(self) -> None:
        """Close its socket; it may be used again."""
        if self._hears is not None:
            self._hears.close()
        self._hears = None

    def learn(self, table: Table, its: str, rule: bytes, *, anew: bool = False) -> None:
        """Take in a rule as it was found, by its tag; ``anew`` where it was written just now."""
        if anew or (table, its) not in self._known:
            if len(self._known) >= MOST:
                self._known.clear()
            self._known[table, its] = handle(rule)

    @contextlib.contextmanager
    def listening(self, rules: Iterable[Rule]) -> Iterator[None]:
        """Take in the numbers of these rules, which are being written meanwhile."""
        written = {tag(rule): rule.table for rule in rules}
        with contextlib.suppress(OSError):  # then they are looked for when they go
            self._hears = self._hears or NewRules()
            self._hears.begin()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                for family, rule in self._hears.end() if self._hears is not None else ():
                    its = comment(rule) if family == self._domain else None
                    if its is not None and its in written:
                        self.learn(written[its], its, rule, anew=True)

    def remove(self, removals: Sequence[tuple[Table, Remove]]) -> None:
        """Take rules away, all of them at once.

        Raises ``Missing`` where one is not there, unless it was only glanced at: what is gone then is gone. Raises
        ``OSError``, and ``Interrupted`` where others write all the time.
        """
        tables = self._tables()
        for left in reversed(range(TRIES)):
            generation = tables.generation()
            try:
                tables.commit(self._deletions(tables, removals), generation=generation)
                break
            except Rejected as error:
                if error.errno != errno.ERESTART:
                    raise
                if not left:
                    raise Interrupted from error
        for table, removal in removals:
            self._known.pop((table, _tag(removal)), None)

    def _deletions(self, tables: NfTables, removals: Sequence[tuple[Table, Remove]]) -> list[Message]:
        found: dict[tuple[Table, str, int], Message] = {}
        listed: dict[tuple[Table, str], dict[str, list[int]]] = {}
        counts = Counter((table, removal.chain) for table, removal in removals)
        for table, removal in removals:
            chain, its = removal.chain, _tag(removal)
            number = self._known.get((table, its)) if counts[table, chain] <= MOST_ASKED else None
            if number is None or (table, chain, number) in found or not self._is(tables, table, chain, number, its):
                if (table, chain) not in listed:
                    listed[table, chain] = self._numbers(tables, table, chain)
                numbers = listed[table, chain].get(its, ())
                number = next((each for each in numbers if (table, chain, each) not in found), None)
            if number is not None:
                found[table, chain, number] = delete_rule(self._domain, table.value, chain, number)
            elif not (isinstance(removal.rule, Line) and removal.rule.abridged):
                raise Missing(f"{chain} of {table} has no rule {its!r}")
        return list(found.values())

    def _is(self, tables: NfTables, table: Table, chain: str, number: int, its: str) -> bool:
        """Whether a rule still has the number that it had."""
        rule = tables.rule(self._domain, table.value, chain, number)
        return rule is not None and comment(rule) == its

    def _numbers(self, tables: NfTables, table: Table, chain: str) -> dict[str, list[int]]:
        """Return the numbers of the rules of a chain by their comments, at the cost of all of them."""
        found: dict[str, list[int]] = {}
        for rule in tables.rules(self._domain, table.value, chain) or ():
            found.setdefault(comment(rule) or "", []).append(handle(rule))
        return found


def _tag(removal: Remove) -> str:
    return tag(removal.rule) if isinstance(removal.rule, Rule) else removal.rule.tag or ""
