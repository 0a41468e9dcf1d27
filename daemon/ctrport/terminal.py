"""What reaches a terminal: lines for people, each of them one line whatever names are in it.

What people read goes to stdout, all else to stderr.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

import click

from . import status

if TYPE_CHECKING:
    from rich.table import Table

    from .explain.answer import Explanation

FAILED, BAD_USAGE, TO_CHANGE = 1, 2, 3


def table(current: status.Status) -> None:
    """Print publications as a table: in colour on a terminal, whole lines elsewhere."""
    from rich.table import Table
    from rich.text import Text

    colours = {"active": "green", "waiting": "yellow", "conflict": "red", "refused": "red", "unsupported": "red"}
    table = Table("CONTAINER", "MAPPING", "ADDRESS", "STATE", "REASON", box=None, header_style="", pad_edge=False)
    for one in current.publications:
        state = Text(one_line(one.state), style=colours.get(one.state, ""))
        reason = one.reason or (f"since {one.since}" if one.since else "")
        cells = [one.name, one.bound or one.mapping, ",".join(one.addresses) or "-"]
        texts = [Text(one_line(cell), overflow="fold") for cell in (*cells, reason)]
        table.add_row(*texts[:-1], state, texts[-1])
    _print(table)
    for network in current.networks:
        if network.reason:
            complain(f"network {network.bridge}: {network.reason}")
    if current.config:
        complain(f"warning: an older configuration is in use: {current.config}")
    for warning in current.warnings:
        complain(f"warning: {warning}")


def way(explanation: Explanation) -> None:
    """Print the way of a packet, a line a step, and what became of it; in colour on a terminal."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, show_header=False, pad_edge=False)
    colours = {"drop": "red", "reject": "red", "untold": "yellow", "dnat": "cyan", "snat": "cyan", "accept": "green"}
    for step in explanation.steps:
        what = Text(one_line(step.what), style=colours.get(step.does, "") if step.whose else "", overflow="fold")
        shown.add_row(Text(one_line(step.where)), what, Text(one_line(step.whose), overflow="fold"))
    _print(shown)
    colour = {"works": "green", "fails": "red", "unknown": "yellow"}[explanation.outcome.value]
    click.echo(click.style(one_line(explanation.sentence), fg=colour))


def _print(table: Table) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def one_line(text: str) -> str:
    """Return ``text`` so that it is one line, and nothing in it reaches a terminal as a command.

    Names that a container or a file was given by a stranger are in what is printed: the kernel lets a device be called
    almost anything, and a file, too.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def complain(line: str) -> None:
    """Print a line to stderr."""
    click.echo(one_line(line), err=True)


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Say in one line why the command failed, and end with this exit status."""
    complain(f"ctrport: {message}")
    raise SystemExit(code)
