"""What happened: a word and its fields, told once; the log has it as a line, and ``events.jsonl`` what is worth a look.

The file is in the run directory: a JSON object a line, the newest last. At a certain size it becomes
``events.jsonl.1``, in the place of the one before, so that there are never more than two. Nothing reads it but
``ctrport events``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path

from .lines import pair

log = logging.getLogger(__name__)

#: What is in the file, by the word for it.
KINDS = {
    "started": "the daemon was started",
    "stopped": "the daemon ended, as it was told to",
    "published": "the rules of a mapping are in the kernel",
    "taken-over": "the same, of a mapping that was in conflict: who had the host port has it no more",
    "withdrawn": "the rules of a mapping are gone: its container ended, or it is not declared any more",
    "waiting": "a mapping is in this state",
    "conflict": "a mapping is in this state",
    "refused": "a mapping is in this state",
    "unsupported": "a mapping is in this state",
    "drift": "others had changed rules of ours, and they were repaired",
    "reloaded": "another configuration is in use",
    "not-reloaded": "the configuration of the files cannot be used: the one before stays in use",
    "containerd-lost": "containerd does not answer: the rules stay as they are",
    "containerd-back": "it answers again, and all was looked at",
    "write-failed": "the kernel could not be written: it is tried again",
    "in-line": "the kernel holds all that it should again",
}

#: The version of the lines. Lines of another one are skipped by whoever reads them.
VERSION = 1
#: Bytes that one file has at most, and characters of one value.
LARGEST, LONGEST = 512 << 10, 1000

NAME = "events.jsonl"


class Event:
    """Something that happened: a word for what, and what else there is to say of it, in this order.

    As text it is a line of the log. Fields that say nothing (``None``, an empty text) are left out.
    """

    __slots__ = ("fields", "name")

    def __init__(self, name: str, /, **fields: str | int | None) -> None:
        self.name = name
        self.fields = {key: value for key, value in fields.items() if value not in (None, "")}

    def __str__(self) -> str:
        return " ".join([self.name, *(pair(key, value) for key, value in self.fields.items())])


@lru_cache(maxsize=256)
def warn_once(log: logging.Logger, text: str) -> None:
    """Log a warning of what is seen anew with each look: not again, as long as no 256 others came."""
    log.warning("%s", text)


def moment(seconds: float) -> str:
    """Return a time of day, as ``time.time`` has it, to the millisecond: ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


class Recorder(logging.Handler):
    """Appends to the file whatever is logged as an ``Event`` of one of ``KINDS``; to be closed.

    It harms nobody: what cannot be written is said once, and forgotten. A line is written whole, or not at all.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(logging.INFO)
        self._path = directory / NAME
        self._file: int | None = None
        self._complaint = ""

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``."""
        event = record.msg
        if not isinstance(event, Event) or event.name not in KINDS:
            return
        fields = {key: value[:LONGEST] if isinstance(value, str) else value for key, value in event.fields.items()}
        line = json.dumps({"v": VERSION, "time": moment(record.created), "event": event.name, **fields})
        try:
            self._append(f"{line}\n".encode("ascii"))
            self._complaint = ""
        except OSError as error:
            complaint = error.strerror or str(error)
            if complaint != self._complaint:
                self._complaint = complaint
                log.warning("what happens cannot be kept for `ctrport events`: %s", complaint)

    def close(self) -> None:
        """See ``logging.Handler``."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        super().close()

    def _append(self, line: bytes) -> None:
        file = self._opened()
        size = os.fstat(file).st_size
        if size and size + len(line) > LARGEST:
            os.replace(self._path, self._path.with_name(f"{NAME}.1"))
            file, size = self._opened(), 0
        try:
            written = os.write(file, line)
        except OSError:
            os.ftruncate(file, size)
            raise
        if written < len(line):
            os.ftruncate(file, size)  # the disk is full: better no line than half of one
            raise OSError("no space is left")

    def _opened(self) -> int:
        """Return the file, made anew where it is not that of the path any more."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._file), os.stat(self._path)):
                    return self._file
            os.close(self._file)
            self._file = None
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # whoever wrote before was killed half way
        return self._file


@contextlib.contextmanager
def recorded(directory: Path) -> Iterator[None]:
    """Have the file of a run directory kept."""
    recorder = Recorder(directory)
    whose = logging.getLogger(__package__)
    whose.addHandler(recorder)
    try:
        yield
    finally:
        whose.removeHandler(recorder)
        recorder.close()


Told = dict[str, str | int]


class Reader:
    """Reads the file of a run directory, and what comes."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME
        self._older = self._path.with_name(f"{NAME}.1")
        self._number, self._at = 0, 0
        self._began = False

    def new(self) -> list[Told]:
        """Return what was told since the last call, the oldest first; at first all there is. Raises ``OSError``."""
        found: list[Told] = []
        number, size = _state(self._path)
        if number != self._number or not self._began:
            if not self._began:
                found += _parsed(_content(self._older))
            elif _state(self._older)[0] == self._number:  # it was put aside meanwhile
                found += _parsed(_content(self._older, self._at))
            self._number, self._at, self._began = number, 0, True
        if size > self._at:
            content = _content(self._path, self._at)
            whole = content[: content.rfind(b"\n") + 1]
            self._at += len(whole)
            found += _parsed(whole)
        return found


def _state(path: Path) -> tuple[int, int]:
    try:
        its = path.stat()
    except FileNotFoundError:
        return 0, 0
    return its.st_ino, its.st_size


def _content(path: Path, begin: int = 0) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(begin)
            return file.read(2 * LARGEST)
    except FileNotFoundError:
        return b""


def _parsed(content: bytes) -> list[Told]:
    found: list[Told] = []
    for line in content.split(b"\n"):
        with contextlib.suppress(ValueError):
            its = json.loads(line)
            if isinstance(its, dict) and its.get("v") == VERSION and its.keys() >= {"time", "event"}:
                found.append({key: value for key, value in its.items() if isinstance(value, str | int)})
    return found
