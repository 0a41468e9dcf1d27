"""The log: one line an event on stderr, with the priority in front where that is the journal.

A line is a word for what happened and then ``key=value``, as ``Event`` has it. What is only a sentence is a ``note``.
"""

from __future__ import annotations

import json
import logging
import sys

from . import systemd
from .events import Event, moment
from .lines import one_line

_PRIORITIES = {logging.ERROR: "<3>", logging.WARNING: "<4>", logging.INFO: "<6>", logging.DEBUG: "<7>"}


def _event(record: logging.LogRecord) -> Event:
    return record.msg if isinstance(record.msg, Event) else Event("note", text=record.getMessage())


class Lines(logging.Formatter):
    """Makes each message one line, whatever names are in it. A traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging calls it so
        """See ``logging.Formatter``."""
        record.message = str(_event(record))
        return one_line(super().formatMessage(record))


class Journal(Lines):
    """Puts the priority in front, as the journal takes it (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        return _PRIORITIES.get(record.levelno, "") + super().format(record)


class Json(logging.Formatter):
    """Makes each message one JSON object, on one line: ``time``, ``level``, ``event``, and the fields of that."""

    def __init__(self, *, priority: bool) -> None:
        super().__init__()
        self._priority = priority

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        event = _event(record)
        line: dict[str, str | int] = {"time": moment(record.created), "level": record.levelname.lower()}
        line |= {"event": event.name, **event.fields}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return (_PRIORITIES.get(record.levelno, "") if self._priority else "") + json.dumps(line)


def begin(verbose: bool, style: str = "lines") -> None:
    """Log to stderr from now on; ``verbose`` is each look at a container, too. ``style`` is ``lines`` or ``json``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(style, systemd.under_journal()))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _formatter(style: str, journal: bool) -> logging.Formatter:
    if style == "json":
        return Json(priority=journal)
    return Journal("%(message)s") if journal else Lines("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
