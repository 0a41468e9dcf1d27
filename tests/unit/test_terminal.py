"""The table of `ctrport ps` on a terminal: what is long goes where there is room for it."""

from __future__ import annotations

import click
import pytest

from ctrport.terminal import _folded

ROWS = [
    ("CONTAINER", "STATE", "REASON"),
    ("default/web", "active", ""),
    ("active", "conflict", "it is held by somebody who would not let go of it, whatever is said"),
]


def lines(width: int) -> list[str]:
    return list(_folded(ROWS, width))


def test_a_reason_that_fits_is_beside_its_row() -> None:
    head, web, active = map(click.unstyle, lines(100))
    assert head == "CONTAINER    STATE     REASON"
    assert web == "default/web  active"
    assert active == f"active       conflict  {ROWS[2][2]}"


def test_a_long_one_is_folded_in_its_column() -> None:
    said = [click.unstyle(line) for line in lines(70)]
    assert said[2:] == [
        "active       conflict  it is held by somebody who would not let go of",
        "                       it, whatever is said",
    ]


@pytest.mark.parametrize("width", [20, 40, 62])
def test_where_there_is_little_room_it_is_below(width: int) -> None:
    head, reason, web, active, *rest = map(click.unstyle, lines(width))
    assert (head, reason) == ("CONTAINER    STATE", "    REASON")
    assert (web, active) == ("default/web  active", "active       conflict")
    assert all(line.startswith("    ") and len(line) <= width for line in rest)
    assert " ".join(line.strip() for line in rest) == ROWS[2][2]


@pytest.mark.parametrize("width", [0, 1, 4])
def test_where_there_is_no_room_at_all_it_is_below_all_the_same(width: int) -> None:
    said = [click.unstyle(line).strip() for line in lines(width)]
    at = said.index("active       conflict")
    assert "".join(said[at + 1 :]) == ROWS[2][2].replace(" ", "")


def test_states_are_coloured_and_nothing_else() -> None:
    head, web, active = lines(100)
    assert "\x1b" not in head
    assert web.endswith(click.style("active", fg="green"))
    assert active.startswith("active       " + click.style("conflict", fg="red"))
