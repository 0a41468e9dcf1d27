"""What is seen on a terminal: colours, a table as wide as that, drawn anew in its place, until Ctrl-C."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ctrport import __version__, status
from ctrport.status import PublicationStatus, Status
from tests.node.terminal import Terminal, install

WEB = PublicationStatus(
    *("default", "web", "", "8080:80/tcp", "8080:80/tcp", ["172.17.0.2"]),
    *("active", "", "f:1", "2024-05-01T10:00:00+00:00"),
)
REASON = "no running container matches " + 30 * "many words "
IDLE = PublicationStatus("", "", "", "9:9/tcp", "", [], "waiting", REASON, "f:2", "")
# Of a backend that nobody has heard of: the kernel is not asked, which here would be the machine's.
SAID = Status(__version__, True, 1, "", "connected", "in line", publications=[WEB, IDLE], backend="")

GREEN, YELLOW, CLEAR, END = r"\x1b\[32m", r"\x1b\[33m", r"\x1b\[2J", r"\x1b\[0m"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run directory that a daemon holds, as it seems."""
    install(tmp_path)
    with status.only_one(tmp_path):
        status.write(tmp_path, SAID)
        yield tmp_path


def test_the_table_is_coloured_and_folded_and_drawn_anew_with_each_change(run: Path) -> None:
    terminal = Terminal(run, "ctrport", "ps", "--watch", "--run-dir", str(run), terminal="xterm-256color")
    try:
        terminal.wait_for(CLEAR)
        shown = terminal.wait_for(rf"(?s)CONTAINER.*{GREEN}active{END}.*{YELLOW}waiting{END}.*many words")
        assert all(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) <= 80 for line in shown.split("\r\n"))
        status.write(run, replace(SAID, publications=[WEB]))
        terminal.wait_for(CLEAR)
        assert "waiting" not in terminal.wait_for(rf"(?s)CONTAINER.*{GREEN}active{END}")
        terminal.type("\x03")
        assert terminal.end() == 0
    finally:
        terminal.close()
