"""Pictures as SVG: rectangles, lines and text, and nothing that moves. The same picture is the same bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

#: How wide a character is at the most times, as part of the size of the font.
CHARACTER = 0.56
FONT = "Helvetica, Arial, sans-serif"

Anchor = Literal["start", "middle", "end"]


class Drawing:
    """A picture of ``width`` by ``height``, in the units of all that is drawn on it; white below everything."""

    def __init__(self, width: float, height: float) -> None:
        self._size = f"{_n(width)} {_n(height)}"
        self._parts = [f'<rect width="{_n(width)}" height="{_n(height)}" fill="#ffffff"/>']

    def rect(self, x: float, y: float, width: float, height: float, fill: str, *, title: str = "") -> None:
        """Draw a filled rectangle; a browser shows ``title`` where the pointer rests on it."""
        shape = f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" fill="{fill}"'
        self._parts.append(f"{shape}><title>{escape(title)}</title></rect>" if title else f"{shape}/>")

    def line(
        self, points: Iterable[tuple[float, float]], colour: str, *, width: float = 1, dashed: bool = False
    ) -> None:
        """Draw a line through these points."""
        through = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(
            f'<polyline points="{through}" fill="none" stroke="{colour}" stroke-width="{_n(width)}"{dashes}/>'
        )

    def dot(self, x: float, y: float, radius: float, fill: str, *, title: str = "") -> None:
        """Draw a filled circle."""
        shape = f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" fill="{fill}"'
        self._parts.append(f"{shape}><title>{escape(title)}</title></circle>" if title else f"{shape}/>")

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 12,
        anchor: Anchor = "start",
        fill: str = "#222222",
        bold: bool = False,
    ) -> None:
        """Write one line of text, whose foot is at ``y``."""
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" text-anchor="{anchor}" fill="{fill}"{weight}>'
            f"{escape(words)}</text>"
        )

    def to_svg(self) -> str:
        """Return it as a file."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._size}" font-family={quoteattr(FONT)}>'
        return "\n".join([head, *self._parts, "</svg>", ""])


def fitting(words: str, width: float, size: float) -> str:
    """Return as much of a text as there is room for; nothing where that would say nothing."""
    room = int(width / (size * CHARACTER))
    if len(words) <= room:
        return words
    return f"{words[: room - 1]}…" if room >= 4 else ""


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
