"""What a process takes, with the programs that it runs: processor time and memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class Usage:
    """What the process ``pid`` takes."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def processor(self) -> float:
        """Return the seconds of processor time of all its threads, and of its programs that have ended."""
        threads = Path(f"/proc/{self._pid}/task").glob("*/schedstat")
        own = sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return own + sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Return how many MB it has, and its programs that run, each with its share of what several have."""
        return sum(map(_share, _family(self._pid))) / 1024

    def programs(self) -> float:
        """Return how many MB its programs that run have, without itself."""
        return sum(map(_share, _family(self._pid)[1:])) / 1024

    def resident(self) -> float:
        """Return how many MB of its own memory, and of what it shares with others, are resident."""
        return _field(f"/proc/{self._pid}/status", "VmRSS:") / 1024


def _family(pid: int) -> list[int]:
    """Return a process and all below it."""
    children = [
        int(child) for each in Path(f"/proc/{pid}/task").glob("*/children") for child in each.read_text().split()
    ]
    return [pid, *(below for child in children for below in _family(child))]


def _share(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        return _field(f"/proc/{pid}/smaps_rollup", "Pss:")
    return 0


def _field(path: str, name: str) -> int:
    """Return the kB that a line of a file in /proc says."""
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(name))
