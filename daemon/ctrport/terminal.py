"""What reaches a terminal: lines for people, each of them one line whatever names are in it.

What people read goes to stdout, all else to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NoReturn

import click

from . import status
from .lines import one_line as one_line

FAILED, BAD_USAGE, TO_CHANGE = 1, 2, 3


def table(current: status.Status) -> None:
    """Print all publications, and what else there is to say."""
    rows(current.publications)
    for network in current.networks:
        if network.reason:
            complain(f"network {network.bridge}: {network.reason}")
    if current.config:
        complain(f"warning: an older configuration is in use: {current.config}")
    for warning in current.warnings:
        complain(f"warning: {warning}")


def rows(publications: Iterable[status.PublicationStatus]) -> None:
    """Print publications as a table: in colour on a terminal, whole lines elsewhere."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"active": "green", "waiting": "yellow", "conflict": "red", "refused": "red", "unsupported": "red"}
    table = Table("CONTAINER", "MAPPING", "ADDRESS", "STATE", "REASON", box=None, header_style="", pad_edge=False)
    for one in publications:
        state = Text(one_line(one.state), style=colours.get(one.state, ""))
        reason = one.reason or (f"since {one.since}" if one.since else "")
        cells = [one.name, one.bound or one.mapping, ",".join(one.addresses) or "-"]
        texts = [Text(one_line(cell), overflow="fold") for cell in (*cells, reason)]
        table.add_row(*texts[:-1], state, texts[-1])
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def complain(line: str) -> None:
    """Print a line to stderr."""
    click.echo(one_line(line), err=True)


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Say in one line why the command failed, and end with this exit status."""
    complain(f"ctrport: {message}")
    raise SystemExit(code)
