"""Waiting for something to become true, with a deadline: the only kind of sleep there is here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Seconds between two looks.
PAUSE = 0.01


def eventually(check: Callable[[], T], *, within: float = 10.0, what: str) -> T:
    """Return what ``check`` returns as soon as that is true; raise an AssertionError after ``within`` seconds.

    An AssertionError of ``check`` itself means "not yet"; every other exception passes through at once.
    """
    end = time.monotonic() + within
    while True:
        last = time.monotonic() >= end
        try:
            result = check()
            if result:
                return result
            seen = f"last seen: {result!r}"
        except AssertionError as error:
            seen = f"last seen: {error}"
        if last:
            raise AssertionError(f"not within {within:g} s: {what} ({seen})")
        time.sleep(PAUSE)
