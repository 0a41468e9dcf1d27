"""What is measured, row by row, and what the figures have to be: the targets, each a sentence.

Pure: figures in, words and verdicts out.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

#: The subjects, as columns of the table, in their order.
IPTABLES, LEGACY, NFTABLES = "ctrport, iptables-nft", "ctrport, iptables-legacy", "ctrport, nftables"
PORTMAP, DOCKERD, PROXY = "portmap", "dockerd", "dockerd, with its proxy"
OURS = (IPTABLES, LEGACY, NFTABLES)
PEERS = (PORTMAP, DOCKERD, PROXY)


@dataclass(frozen=True)
class Row:
    """One row: what is measured, in what unit, and whether more of it is better."""

    title: str
    unit: str = "ms"
    more_is_better: bool = False


ONE, ANSWER = Row("one port: event to commit"), Row("one port: event to the first packet answered")
START = Row("one port: start event to commit")
REMOVAL = Row("one port removed: event to commit")
READY, READY_WITH_1000 = Row("start of the daemon until it is ready"), Row("the same, with 1000 mappings to publish")
MEMORY, RESIDENT = Row("memory, with 1000 mappings", "MB"), Row("resident, with 1000 mappings", "MB")
PROXIES = Row("memory of the proxies of 100 ports", "MB")
IDLE = Row("processor at idle", "% of a core")
CHURN = Row("processor for one port published and removed", "ms")


def of_range(count: int) -> Row:
    """Return the row of a range onto the same ports."""
    return Row(f"a range of {count:,} ports: event to commit")


def of_shifted(count: int) -> Row:
    """Return the row of a range onto other ports."""
    return Row(f"a range of {count:,}, onto other ports")


def beside(count: int) -> Row:
    """Return the row of one port more."""
    return Row(f"one more port, beside {count:,}")


def removal_of(count: int) -> Row:
    """Return the row of one port less."""
    return Row(f"one port removed, of {count:,}")


#: Which of so many mappings traffic goes through.
PLACES = ("first", "middle", "last")


def connections(count: int, place: str) -> Row:
    """Return the row of new connections through the mapping at that place."""
    return Row(f"new connections a second, {_through(count, place)}", "1/s", more_is_better=True)


def throughput(count: int, place: str) -> Row:
    """Return the row of one connection's speed through the mapping at that place."""
    return Row(f"throughput, {_through(count, place)}", "Mbit/s", more_is_better=True)


def _through(count: int, place: str) -> str:
    return "one mapping" if count == 1 else f"the {place} of {count:,}"


@dataclass
class Figures:
    """What was measured: some figures of each subject in each row, in the order in which these were first measured."""

    _taken: dict[Row, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, row: Row, subject: str, figure: float) -> None:
        """Take in a figure."""
        self._taken.setdefault(row, {}).setdefault(subject, []).append(figure)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._taken)

    def subjects(self) -> list[str]:
        """Return who was measured."""
        return [subject for subject in (*OURS, *PEERS) if any(subject in row for row in self._taken.values())]

    def all(self, row: Row, subject: str) -> Sequence[float]:
        """Return the figures of one subject in one row."""
        return self._taken.get(row, {}).get(subject, ())

    def median(self, row: Row, subject: str) -> float | None:
        """Return the figure of one subject in one row, None where there is none."""
        taken = self.all(row, subject)
        return statistics.median(taken) if taken else None

    def ratio(self, row: Row, subject: str, to: str, to_row: Row | None = None) -> float | None:
        """Return what a subject's figure is of another's, None where there are not both."""
        one, other = self.median(row, subject), self.median(to_row or row, to)
        return None if one is None or not other else one / other

    def winner(self, row: Row) -> str | None:
        """Return who is best in a row in which several were measured."""
        known = {subject: self.median(row, subject) for subject in self._taken[row]}
        medians = {subject: median for subject, median in known.items() if median is not None}
        if len(medians) < 2:
            return None
        return (max if row.more_is_better else min)(medians, key=lambda subject: medians[subject])


@dataclass(frozen=True)
class Verdict:
    """A target as a sentence, what its ratio may be at most, and what it was."""

    sentence: str
    limit: float
    ratio: float

    @property
    def held(self) -> bool:
        """Whether it was reached."""
        return self.ratio <= self.limit

    def __str__(self) -> str:
        return (
            f"{'held' if self.held else 'MISSED'}: {self.sentence}: {_part(self.ratio)} (at most {_part(self.limit)})"
        )


def _part(ratio: float) -> str:
    return f"1/{1 / ratio:.4g}" if 0 < ratio < 0.75 else f"{ratio:.3f}"


def verdicts(figures: Figures) -> list[Verdict]:
    """Return what became of each target, as far as its figures were measured."""
    one, thousand, more = "one port", "a range of 1000", "one more beside 10,000 under nftables"
    asked = [
        (f"{one} with iptables-nft, of portmap's time", 1 / 5, figures.ratio(ONE, IPTABLES, PORTMAP)),
        (f"{one} with iptables-nft, of dockerd's", 1 / 2, figures.ratio(ONE, IPTABLES, DOCKERD)),
        (f"{one} with nftables, of portmap's time", 1 / 10, figures.ratio(ONE, NFTABLES, PORTMAP)),
        (f"{one} with nftables, of dockerd's", 1 / 4, figures.ratio(ONE, NFTABLES, DOCKERD)),
        *(
            (f"{thousand} with {ours.partition(', ')[2]}, of {peer}'s time", 1 / 1000, figures.ratio(row, ours, peer))
            for row in (of_range(1000),)
            for ours in (IPTABLES, NFTABLES)
            for peer in (PORTMAP, DOCKERD)
        ),
        (f"{more}, of portmap's beside 1000", 1 / 20, figures.ratio(beside(10_000), NFTABLES, PORTMAP, beside(1000))),
    ]
    first, last = (figures.all(connections(10_000, place), NFTABLES) for place in (PLACES[0], PLACES[-1]))
    if first and last:
        # Of each turn by itself: from one to the next the machine may have become another.
        of_turns = statistics.median(one / other for one, other in zip(first, last, strict=True))
        asked.append(
            ("new connections at the first of 10,000 under nftables, of those at the last", 1 / 0.95, of_turns)
        )
    return [Verdict(sentence, limit, ratio) for sentence, limit, ratio in asked if ratio is not None]


def missed(found: Sequence[Verdict]) -> list[Verdict]:
    """Return the targets that were not reached."""
    return [verdict for verdict in found if not verdict.held]
