"""Text for people as single lines, whatever names are in it: of the log, on a terminal, and of what failed."""

from __future__ import annotations

import re

_PLAIN = re.compile(r'[^\s"=\\]+')


class Failure(Exception):
    """Something could not be done, as may happen; the message is one sentence for people."""


def one_line(text: str) -> str:
    """Return ``text`` so that it is one line, and nothing in it reaches a terminal as a command.

    Names that a container or a file was given by a stranger are in what is printed: the kernel lets a device be called
    almost anything, and a file, too.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def pair(key: str, value: object) -> str:
    """Return ``key=value``, with the value in double quotes where it has a blank, a quote, a ``=`` or a backslash.

    Within them ``\\"`` and ``\\\\`` stand for themselves, and what is not printable is as in Python.
    """
    text = str(value)
    if _PLAIN.fullmatch(text) is None or not text.isprintable():
        text = '"' + one_line(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'
    return f"{key}={text}"
