"""What reaches a terminal: lines for people, each of them one line whatever names are in it.

What people read goes to stdout, all else to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

import click

from . import ps, status
from .lines import one_line as one_line

FAILED, BAD_USAGE, TO_CHANGE = 1, 2, 3

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
    cells = [tuple(map(one_line, row)) for row in rows]
    yield from _folded(cells) if sys.stdout.isatty() else _aligned(cells)


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _folded(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of a table that is as wide as the terminal, and in colour."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    head, *rest = rows
    table = Table(*head, box=None, header_style="", pad_edge=False)
    for row in rest:
        styles = (_COLOURS.get(cell, "") if name == "STATE" else "" for name, cell in zip(head, row, strict=True))
        table.add_row(*(Text(cell, style=style, overflow="fold") for cell, style in zip(row, styles, strict=True)))
    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(table)
    yield from (line.rstrip() for line in captured.get().splitlines())


def complain(line: str) -> None:
    """Print a line to stderr."""
    click.echo(one_line(line), err=True)


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Say in one line why the command failed, and end with this exit status."""
    complain(f"ctrport: {message}")
    raise SystemExit(code)
