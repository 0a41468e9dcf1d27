"""The log: one line an event on stderr, with the priority in front where that is the journal."""

from __future__ import annotations

import logging
import sys

from . import systemd
from .terminal import one_line

_PRIORITIES = {logging.ERROR: "<3>", logging.WARNING: "<4>", logging.INFO: "<6>", logging.DEBUG: "<7>"}


class Lines(logging.Formatter):
    """Makes each message one line, whatever names are in it. A traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging calls it so
        """See ``logging.Formatter``."""
        return one_line(super().formatMessage(record))


class Journal(Lines):
    """Puts the priority in front, as the journal takes it (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        return _PRIORITIES.get(record.levelno, "") + super().format(record)


def begin(verbose: bool) -> None:
    """Log to stderr from now on; ``verbose`` is each look at a container, too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        Journal("%(message)s")
        if systemd.under_journal()
        else Lines("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
    )
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)
