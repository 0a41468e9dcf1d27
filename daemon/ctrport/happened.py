"""What ``ctrport events`` shows: what the daemon kept of what happened, and what comes."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import click

from .events import Event, Reader, Told
from .lines import one_line
from .model import State
from .ps import Filter
from .terminal import complain

#: Seconds between two looks for what is new.
PAUSE = 0.2

_STATES = {
    "published": State.ACTIVE.value,
    "taken-over": State.ACTIVE.value,
    **{state.value: state.value for state in State},
}
_COLOURS = {
    **dict.fromkeys(("published", "taken-over", "containerd-back", "in-line"), "green"),
    **dict.fromkeys(("conflict", "refused", "unsupported", "write-failed", "containerd-lost", "not-reloaded"), "red"),
    **dict.fromkeys(("waiting", "drift"), "yellow"),
}
_AGO = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def moment(text: str) -> datetime:
    """Return the time that ``--since`` names: so long ago, or a date, with a time or without. Raises ``ValueError``."""
    ago = _AGO.fullmatch(text)
    if ago is not None:
        return datetime.now(timezone.utc) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    return datetime.fromisoformat(text).astimezone()


def show(
    directory: Path, chosen: Filter, since: datetime | None, most: int | None, *, follow: bool, as_json: bool
) -> None:
    """Print what happened, the last ``most`` of it, and with ``follow`` what comes. Raises ``OSError``."""
    reader = Reader(directory)
    write = _as_json if as_json else _as_line
    wanted = [told for told in reader.new() if _passes(told, chosen) and _is_since(told, since)]
    _print(wanted if most is None else wanted[max(0, len(wanted) - most) :], write)
    if not wanted and not follow:
        complain(f"nothing to show was kept in {directory}")
    with contextlib.suppress(KeyboardInterrupt):
        while follow:
            time.sleep(PAUSE)
            _print((told for told in reader.new() if _passes(told, chosen)), write)


def _print(wanted: Iterable[Told], write: Callable[[Told], str]) -> None:
    for told in wanted:
        click.echo(write(told))


def _as_json(told: Told) -> str:
    return json.dumps(told)


def _as_line(told: Told) -> str:
    name = one_line(str(told["event"]))
    word, _, rest = str(Event(name, **_fields(told))).partition(" ")
    padding = " " * (13 - len(word))
    return f"{_local(told)}  {click.style(word, fg=_COLOURS.get(name))}{padding}  {one_line(rest)}".rstrip()


def _fields(told: Told) -> Told:
    return {one_line(key): value for key, value in told.items() if key not in ("v", "time", "event")}


def _local(told: Told) -> str:
    when = _when(told)
    return f"{when.astimezone():%Y-%m-%d %H:%M:%S}" if when is not None else one_line(str(told["time"]))


def _when(told: Told) -> datetime | None:
    with contextlib.suppress(ValueError):
        found = datetime.fromisoformat(str(told["time"]))
        return found if found.tzinfo is not None else None
    return None


def _is_since(told: Told, since: datetime | None) -> bool:
    when = _when(told)
    return since is None or (when is not None and when >= since)


def _passes(told: Told, chosen: Filter) -> bool:
    """Whether it is to be seen: what is about no container only where nothing is chosen."""
    if not chosen:
        return True
    pod, whose = str(told.get("pod", "")), str(told.get("sandbox", told.get("container", "")))
    if not whose:
        return False
    namespace, _, container = whose.rpartition("/")
    name = f"pod:{pod}" if pod else whose
    return chosen.passes(_STATES.get(str(told["event"]), ""), namespace, "" if pod else container, name)
