"""Figures as pictures: bars on a scale by powers of ten, or from nothing, with the figure behind each. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from bench import rows
from bench.rows import Figures, Row
from bench.svg import Drawing
from bench.table import shown

_COLOURS = {
    rows.NFTABLES: "#1b6ca8",
    rows.IPTABLES: "#5fa3d3",
    rows.LEGACY: "#a9cbe6",
    rows.PORTMAP: "#e08a3c",
    rows.DOCKERD: "#7d8794",
    rows.PROXY: "#b9c0c9",
}
_ORDER = tuple(_COLOURS)

WIDTH, LEFT, RIGHT = 860.0, 190.0, 90.0
HEAD, BAR, GAP, GROUP, FOOT = 66.0, 15.0, 4.0, 30.0, 40.0


def plots(figures: Figures) -> dict[str, str]:
    """Return the pictures as SVG, by name; none of what was not measured."""
    measured = list(figures)
    ranges = [row for row in measured if row.title.startswith("a range of") and row.title.endswith("commit")]
    compared = [row for row in ranges if figures.winner(row) is not None]
    more = [row for row in measured if row.title.startswith("one more port, beside")]
    less = [row for row in measured if row.title.startswith("one port removed, of")]
    connections = [row for row in measured if row.title.startswith("new connections")]
    wanted = {
        "publish": ("Ports published: from the event to the last commit", [rows.ONE, *compared], True),
        "beside": ("One port more, or less, where many are published", [*more, *less], True),
        "connections": ("New connections a second, from the LAN, one after the other", connections, False),
    }
    drawn = {}
    for name, (title, shown_rows, by_tens) in wanted.items():
        found = [row for row in shown_rows if row in measured]
        if found:
            drawn[name] = bars(figures, title, found, by_tens=by_tens)
    return drawn


def bars(figures: Figures, title: str, shown_rows: Sequence[Row], *, by_tens: bool) -> str:
    """Return a picture in which each row is a group of bars, one for each subject that was measured in it."""
    groups = [(row, [subject for subject in _ORDER if figures.median(row, subject) is not None]) for row in shown_rows]
    values = [figures.median(row, subject) or 0.0 for row, subjects in groups for subject in subjects]
    ticks, place = _scale(values, by_tens)
    height = HEAD + sum(GROUP + len(subjects) * (BAR + GAP) for _, subjects in groups) + FOOT
    drawing = Drawing(WIDTH, height)
    drawing.text(16, 26, title, size=16, bold=True)
    unit = {"1/s": "connections a second"}.get(shown_rows[0].unit, shown_rows[0].unit)
    scale = "; each line is ten times the one before" if by_tens else ""
    drawing.text(16, 46, f"medians, in {unit}{scale}", fill="#666666")
    room = WIDTH - LEFT - RIGHT
    for tick in ticks:
        x = LEFT + room * place(tick)
        drawing.line([(x, HEAD - 4), (x, height - FOOT + 6)], "#e3e6ea")
        drawing.text(x, height - FOOT + 22, f"{tick:,.10g}", size=11, anchor="middle", fill="#666666")
    y = HEAD
    for row, subjects in groups:
        label = row.title.removesuffix(": event to commit").removeprefix("new connections a second, ")
        drawing.text(16, y + 18, label, size=13, bold=True)
        y += GROUP - 4
        for subject in subjects:
            value = figures.median(row, subject) or 0.0
            width = max(1.5, room * place(value))
            drawing.text(LEFT - 8, y + BAR - 3.5, subject, size=11, anchor="end", fill="#444444")
            drawing.rect(LEFT, y, width, BAR, _COLOURS[subject], title=f"{subject}: {shown(value)} {row.unit}")
            drawing.text(LEFT + width + 6, y + BAR - 3.5, shown(value), size=11)
            y += BAR + GAP
        y += 4
    return drawing.to_svg()


def _scale(values: Sequence[float], by_tens: bool) -> tuple[list[float], Callable[[float], float]]:
    """Return the ticks of a scale on which all of these have their place, and where on it a value stands: 0 to 1."""
    if by_tens:
        first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        last = max(last, first + 1)
        ticks = [10.0**power for power in range(first, last + 1)]
        return ticks, lambda value: (math.log10(value) - first) / (last - first)
    step = 10.0 ** math.floor(math.log10(max(values)))
    step = next(each for each in (step / 5, step / 2, step, 2 * step) if max(values) / each <= 8)
    count = math.ceil(max(values) / step)
    ticks = [step * number for number in range(count + 1)]
    return ticks, lambda value: value / ticks[-1]
