"""When nf_tables took something over, and when a container had its address: the kernel's own announcement of each.

The kernel sends NEWGEN at the end of a commit, in the writer's system call: from then on packets meet the new rules.
The time is read where the announcement is received (``bench.heard``), so it includes waking that process up.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import IO

from bench.ground import ROOT
from embedded.host import end_process
from embedded.node import Node
from embedded.wait import eventually

#: Seconds without a commit after which a writer's last one is known to be its last.
QUIET = 0.15


@dataclass(frozen=True)
class Commit:
    """One commit: when it was heard of, in ns since the epoch, and the first 15 characters of the writer's name."""

    at: int
    writer: str


class Commits:
    """Listens to the commits and the addresses in a node's network namespace. To be used as a context manager."""

    _numbers = itertools.count()

    def __init__(self, node: Node) -> None:
        self._node = node
        self._path = node.directory / f"heard-{next(self._numbers)}"
        self._commits: list[Commit] = []
        self._addresses: list[tuple[int, str]] = []
        self._file: IO[str]
        self._process: subprocess.Popen[str]

    def __enter__(self) -> Commits:
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        with self._path.open("w") as written:
            argv = (sys.executable, "-m", "bench.heard")
            self._process = self._node.spawn(*argv, env=environment, stdout=written, stderr=subprocess.STDOUT)
        self._file = self._path.open()
        eventually(lambda: self._path.read_text().startswith("ready\n"), what="the listener being ready")
        self._file.readline()
        return self

    def __exit__(self, *exception: object) -> None:
        end_process(self._process)
        self._file.close()
        self._path.unlink(missing_ok=True)

    def address(self, address: str, since: int) -> int:
        """Return when an address first came since a time. Raises ``AssertionError`` where it did not."""

        def found() -> list[int]:
            self._read()
            return [at for at, its in self._addresses if its == address and at >= since]

        return eventually(found, within=5, what=f"the announcement of {address}")[0]

    def last(self, writers: Collection[str], since: int) -> int:
        """Return when the last commit of these writers since a time was heard of, once it is quiet.

        Raises ``AssertionError`` without one.
        """

        def found() -> int | None:
            commits = self._of(writers, since)
            return commits[-1].at if commits and time.time_ns() - commits[-1].at > QUIET * 1e9 else None

        last = eventually(found, within=30, what=f"a commit by {' or '.join(sorted(writers))}")
        assert last is not None
        return last

    def last_until(self, writers: Collection[str], since: int, until: int) -> int:
        """Return when the last commit of these writers was heard of between two times, the second of which is past.

        Raises ``AssertionError`` without one.
        """

        def found() -> list[Commit]:
            return [commit for commit in self._of(writers, since) if commit.at <= until]

        return eventually(found, within=5, what=f"a commit by {' or '.join(sorted(writers))}")[-1].at

    def first(self, writers: Collection[str], since: int) -> int:
        """Return when the first commit of these writers since a time was heard of. Raises ``AssertionError``."""
        what = f"a commit by {' or '.join(sorted(writers))}"
        return eventually(lambda: self._of(writers, since), within=5, what=what)[0].at

    def _of(self, writers: Collection[str], since: int) -> list[Commit]:
        self._read()
        return [commit for commit in self._commits if commit.at >= since and commit.writer in writers]

    def _read(self) -> None:
        """Take in what was heard since the last time: whole lines, as the listener writes no other."""
        for line in self._file:
            at, what, which = line.rstrip("\n").split(" ", 2)
            if what == "commit":
                self._commits.append(Commit(int(at), which))
            else:
                self._addresses.append((int(at), which))
        if self._process.poll() is not None:
            raise RuntimeError(f"what the kernel announced was lost: {self._path.read_text().splitlines()[-1]}")
