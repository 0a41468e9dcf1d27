"""A terminal with somebody in front of it, and the command ctrport for who types there."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path

from tests.node.daemon import BYTECODE, ROOT


def install(directory: Path) -> None:
    """Put the command into a directory, for ``environment``."""
    command = directory / "bin" / "ctrport"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ctrport "$@"\n')
    command.chmod(0o755)


def environment(directory: Path, terminal: str = "dumb") -> dict[str, str]:
    """Return the environment of somebody whose command ctrport is in that directory."""
    home = directory / "home"
    home.mkdir(exist_ok=True)
    path = f"{directory / 'bin'}:{os.environ['PATH']}"
    its = {"PATH": path, "PYTHONPATH": str(ROOT / "daemon"), "HOME": str(home), "TERM": terminal, "LANG": "C.UTF-8"}
    return {**its, **BYTECODE}


class Terminal:
    """A program that somebody types into."""

    def __init__(self, directory: Path, *argv: str, terminal: str = "dumb") -> None:
        self._said = ""
        self._file, its = pty.openpty()
        # It becomes the shell itself, with a terminal of its own.
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *argv], stdin=its, stdout=its, stderr=its, env=environment(directory, terminal)
        )
        os.close(its)

    def type(self, text: str) -> None:
        """Type this."""
        os.write(self._file, text.encode())

    def wait_for(self, pattern: str, within: float = 20) -> str:
        """Wait until it has printed this since the last time."""
        end = time.monotonic() + within
        while (found := re.search(pattern, self._said)) is None:
            assert time.monotonic() < end, f"no {pattern!r} in {self._said!r}"
            if select.select([self._file], [], [], 0.2)[0]:
                self._said += os.read(self._file, 4096).decode(errors="replace")
        self._said = self._said[found.end() :]
        return found[0]

    def end(self, within: float = 10) -> int:
        """Wait for it to end by itself, and return its exit status."""
        return self._process.wait(within)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        os.close(self._file)
