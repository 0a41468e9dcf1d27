"""Figures as text: a table for people, and what became of the targets. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from bench.rows import OURS, Figures, Row, Verdict, missed


def table(figures: Figures) -> str:
    """Return the medians, a row a line, and who is best in it."""
    subjects = figures.subjects()
    lines = [["", *subjects, ""]]
    for row in figures:
        cells = [shown(figures.median(row, subject)) for subject in subjects]
        lines.append([f"{row.title} [{row.unit}]", *cells, _says(figures, row)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)),
                line[-1],
            ]
        ).rstrip()
        for line in lines
    )


def page(figures: Figures, context: str, verdicts: Sequence[Verdict], pictures: Sequence[str]) -> str:
    """Return all of one run as a page of the documentation, with those of its pictures below ``pictures``."""
    titles = {
        "publish": "Ports published",
        "beside": "One port more or less",
        "connections": "New connections a second",
    }
    drawn = "\n\n".join(f"![{titles[name]}](pictures/{name}.svg)" for name in pictures)
    targets = "\n".join(f"- {verdict}" for verdict in verdicts)
    return f"""\
# What was measured

Written by `make bench`, all in one run: [benchmark.md](benchmark.md) says how, and what each row is. Medians; times
depend on the machine and on what else it does, ratios hardly. Machine: {context}.

{drawn}

{_markdown(figures)}

Targets, as parts of a peer's time in this run:

{targets}
"""


def _markdown(figures: Figures) -> str:
    subjects = figures.subjects()
    lines = [f"| | {' | '.join(subjects)} | |", f"|---|{'---:|' * len(subjects)}---|"]
    for row in figures:
        cells = [shown(figures.median(row, subject)) for subject in subjects]
        lines.append(f"| {row.title} [{row.unit}] | {' | '.join(cells)} | {_says(figures, row)} |")
    return "\n".join(lines)


def shown(figure: float | None) -> str:
    """Return a figure with as many digits as it is worth."""
    if figure is None:
        return "-"
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.1f}" if figure >= 10 else f"{figure:.2f}"


def _says(figures: Figures, row: Row) -> str:
    winner = figures.winner(row)
    return "" if winner is None or winner in OURS else f"{winner} wins"


def conclusion(verdicts: Sequence[Verdict]) -> str:
    """Return the targets, and how many of them were missed."""
    lines = [str(verdict) for verdict in verdicts]
    count = len(missed(verdicts))
    lines.append(f"{count} of {len(verdicts)} targets missed" if count else f"all {len(verdicts)} targets held")
    return "\n".join(lines)
