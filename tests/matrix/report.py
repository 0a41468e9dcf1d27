"""The table of docs/paths.md, made of what the matrix saw: the same text whenever the same was seen."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.matrix.rows import KNOWN, ROWS, Row, Seen
from tests.matrix.settings import DIMENSIONS, Setting

PAGE = Path(__file__).resolve().parents[2] / "docs" / "paths.md"
BEGIN = "<!-- Written by `make matrix`: what it saw. -->"
END = "<!-- So far. -->"

#: How a value is called in the table, by the name of its dimension.
_CALLED = {
    "protocol": "{}",
    "family": "{}",
    "bridge_nf": "bridge-nf {}",
    "forward_policy": "FORWARD {}",
    "network": "{}",
    "backend": "{}",
}


def table(seen: Mapping[tuple[Row, Setting], Seen], lacks: Iterable[str]) -> str:
    """Return what was seen, as Markdown. ``lacks`` are the reasons why a protocol was not tried."""
    settings = list(dict.fromkeys(setting for _, setting in seen))
    lines = [f"Tried with real packets under {len(settings)} settings, every combination of:", ""]
    lines += [f"- {_values(dimension, settings)}" for dimension in DIMENSIONS]
    lines += [f"\nNot tried where this was made: {lack}." for lack in lacks]
    lines += ["", "| from → to | reaches | not asked |", "|---|---|---|"]
    for row in ROWS:
        of_row = {setting: seen[row, setting] for setting in settings if (row, setting) in seen}
        reasons = dict.fromkeys(reason for setting in settings if (reason := row.left_out(setting)) is not None)
        lines.append(f"| {row.name} | {condensed(of_row)} | {'; '.join(reasons)} |")
    failing = [known for known in KNOWN if any(row.name == known.row and known.when(at) for row, at in seen)]
    if failing:
        lines += ["", "Not as it should be, as of now:", ""]
        lines += [f"- {known.row}: {known.why}." for known in failing]
    return "\n".join(lines) + "\n"


def condensed(seen: Mapping[Setting, Seen]) -> str:
    """Return what was seen in as few words as there are: once for all settings, else by what it depends on."""
    if not seen:
        return "—"
    decisive = _decisive(seen)
    if not decisive:
        return next(iter(seen.values())).value
    labels: dict[Seen, dict[str, None]] = {}
    for setting, outcome in seen.items():
        label = " and ".join(_CALLED[dimension].format(getattr(setting, dimension)) for dimension in decisive)
        labels.setdefault(outcome, {})[label] = None
    return "; ".join(f"{', '.join(labels[outcome])}: {outcome.value}" for outcome in Seen if outcome in labels)


def written(page: str, text: str) -> str:
    """Return a page with ``text`` in the place of the table that it has."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no place for the table, between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def _values(dimension: str, settings: Sequence[Setting]) -> str:
    values = dict.fromkeys(getattr(setting, dimension) for setting in settings)
    return ", ".join(_CALLED[dimension].format(value) for value in values)


def _decisive(seen: Mapping[Setting, Seen]) -> tuple[str, ...]:
    """Return the fewest dimensions whose values say what was seen, the first such ones."""
    for count in range(len(DIMENSIONS)):
        for dimensions in itertools.combinations(DIMENSIONS, count):
            outcomes: dict[tuple[object, ...], set[Seen]] = {}
            for setting, outcome in seen.items():
                values = tuple(getattr(setting, dimension) for dimension in dimensions)
                outcomes.setdefault(values, set()).add(outcome)
            if all(len(outcome) == 1 for outcome in outcomes.values()):
                return dimensions
    return DIMENSIONS
