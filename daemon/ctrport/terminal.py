"""What reaches a terminal: lines for people, each of them one line whatever names are in it.

What people read goes to stdout, all else to stderr.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

import click

from . import ps, status
from .lines import one_line as one_line

if TYPE_CHECKING:
    from .explain.answer import Explanation

FAILED, BAD_USAGE, TO_CHANGE = 1, 2, 3

#: Columns of a terminal that a reason is not folded into less than, and by how many it is indented below its row.
ROOM, INDENT = 40, 4

#: What a rule does to a packet.
_FATES = {"drop": "red", "reject": "red", "untold": "yellow", "dnat": "cyan", "snat": "cyan", "accept": "green"}
_COLOURS = {
    "active": "green",
    "waiting": "yellow",
    "conflict": "red",
    "refused": "red",
    "unsupported": "red",
    ps.UNDECLARED: "red",
}


def table(current: status.Status, wide: bool = False) -> None:
    """Print publications as a table: in colour on a terminal, whole lines elsewhere; and then what else there is."""
    for line in rendered(current, wide):
        click.echo(line)
    for line in remarks(current):
        complain(line)


def rows(publications: Iterable[status.PublicationStatus]) -> None:
    """Print these publications as a table."""
    for line in _drawn(ps.rows_of(publications)):
        click.echo(line)


def rendered(current: status.Status, wide: bool) -> Iterator[str]:
    """Yield the lines of the table."""
    yield from _drawn(ps.rows(current, wide))


def remarks(current: status.Status) -> Iterator[str]:
    """Yield what there is to say beside the table."""
    for network in current.networks:
        if network.reason:
            yield f"network {network.bridge}: {network.reason}"
    if current.config:
        yield f"warning: an older configuration is in use: {current.config}"
    for warning in current.warnings:
        yield f"warning: {warning}"


def _drawn(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    lines = [tuple(map(one_line, row)) for row in rows]
    if sys.stdout.isatty():
        yield from _folded(lines, shutil.get_terminal_size().columns)
    else:
        yield from ("  ".join(cells).rstrip() for cells in _aligned(lines))


def way(explanation: Explanation) -> None:
    """Print the way of a packet, a line a step, and what became of it; in colour on a terminal."""
    cells = [(one_line(step.where), one_line(step.what), one_line(step.whose)) for step in explanation.steps]
    where, what, whose = (max((len(row[column]) for row in cells), default=0) for column in range(3))
    if sys.stdout.isatty():
        what = min(what, max(shutil.get_terminal_size().columns - where - whose - 4, ROOM))
    for step, row in zip(explanation.steps, cells, strict=True):
        colour = _FATES.get(step.does) if step.whose else None
        first, *more = textwrap.wrap(row[1], max(what, 1)) or [""]
        click.echo(f"{row[0].ljust(where)}  {click.style(first.ljust(what), fg=colour)}  {row[2]}".rstrip())
        for part in more:
            click.echo(" " * (where + 2) + click.style(part, fg=colour))
    colour = {"works": "green", "fails": "red", "unknown": "yellow"}[explanation.outcome.value]
    click.echo(click.style(one_line(explanation.sentence), fg=colour))


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[list[str]]:
    """Return the cells of the rows as wide as their columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]


def _folded(rows: Sequence[tuple[str, ...]], width: int) -> Iterator[str]:
    """Yield the lines of a table in colour, the last column, which is the longest, folded to the width of a terminal.

    It goes below its row where there is little room behind that. Nothing else is folded: it is there to be copied.
    """
    aligned, state = _aligned([row[:-1] for row in rows]), rows[0].index("STATE")
    begin = len("  ".join(aligned[0])) + 2
    beside = width - begin >= ROOM
    indent = " " * (begin if beside else INDENT)
    for row, cells in zip(rows, aligned, strict=True):
        if row[state] in _COLOURS:
            cells[state] = cells[state].replace(row[state], click.style(row[state], fg=_COLOURS[row[state]]))
        parts = textwrap.wrap(row[-1], max(1, width - len(indent)))
        yield "  ".join([*cells, parts.pop(0) if beside and parts else ""]).rstrip()
        yield from (indent + part for part in parts)


def complain(line: str) -> None:
    """Print a line to stderr."""
    click.echo(one_line(line), err=True)


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Say in one line why the command failed, and end with this exit status."""
    complain(f"ctrport: {message}")
    raise SystemExit(code)
