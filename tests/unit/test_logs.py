"""The log: one grammar, whoever says something, and priorities where the journal is."""

from __future__ import annotations

import json
import logging
import re
import sys

import pytest

from ctrport import logs
from ctrport.events import Event


def record(message: object, *arguments: object, level: int = logging.WARNING) -> logging.LogRecord:
    its = logging.LogRecord("ctrport.x", level, "", 1, message, arguments, None)
    its.created = 1714557600.25
    return its


EVENT = Event("drift", what="1 rule gone", by="nft (pid 7)", after="", within=None, count=0)


def test_an_event_is_its_word_and_what_else_there_is_to_say() -> None:
    assert str(EVENT) == 'drift what="1 rule gone" by="nft (pid 7)" count=0'
    assert logs.Journal("%(message)s").format(record(EVENT)) == f"<4>{EVENT}"
    assert logs.Journal("%(message)s").format(record(EVENT, level=logging.ERROR)) == f"<3>{EVENT}"


def test_a_sentence_is_a_note() -> None:
    said = record("%s; trying %d times", 'it says "no"\n', 2)
    assert logs.Lines("%(message)s").format(said) == 'note text="it says \\"no\\"\\n; trying 2 times"'


def test_in_json_each_is_an_object_on_a_line() -> None:
    line = logs.Json(priority=False).format(record(EVENT))
    assert json.loads(line) == {
        "time": "2024-05-01T10:00:00.250+00:00",
        "level": "warning",
        "event": "drift",
        "what": "1 rule gone",
        "by": "nft (pid 7)",
        "count": 0,
    }
    line = logs.Json(priority=True).format(record("a\nb", level=logging.INFO))
    assert line.startswith("<6>{")
    assert json.loads(line[3:])["text"] == "a\nb"


def test_a_traceback_is_kept_on_lines_of_its_own_or_in_the_object() -> None:
    said = record("all is lost")
    try:
        raise ValueError("why")
    except ValueError:
        said.exc_info = sys.exc_info()
    text = logs.Lines("%(message)s").format(said)
    assert text.startswith('note text="all is lost"\nTraceback ')
    line = logs.Json(priority=False).format(said)
    assert "\n" not in line
    assert json.loads(line)["traceback"].endswith("ValueError: why")


@pytest.mark.parametrize("style", ["lines", "json"])
@pytest.mark.parametrize("journal", [False, True])
def test_which_form_it_has_depends_on_where_it_goes(style: str, journal: bool) -> None:
    line = logs._formatter(style, journal).format(record(EVENT))
    form = {
        ("lines", False): r"\d\d:\d\d:\d\d WARNING drift what=.*",
        ("lines", True): r"<4>drift what=.*",
        ("json", False): r"\{.*\}",
        ("json", True): r"<4>\{.*\}",
    }[style, journal]
    assert re.fullmatch(form, line)
