"""The part of systemd that keeps files for a service: its file descriptor store, as service.c has it."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

# Becomes a program that finds files from number 3 on, as systemd starts it. Out of the way with them first: the numbers
# that they come with may be those that others are to have.
_HAND_OVER = """
import fcntl, os, sys
count = int(sys.argv[1])
files, argv = [int(file) for file in sys.argv[3:3 + count]], sys.argv[3 + count:]
free = max([*files, 3 + count]) + 1
away = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, free) for file in files]
for file in files:
    os.close(file)
for number, file in enumerate(away, 3):
    os.dup2(file, number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count), LISTEN_FDNAMES=sys.argv[2])
os.execvp(argv[0], argv)
"""


class Stored:
    """A file of the store, and whether it is dropped when it says that it was hung up."""

    def __init__(self, name: str, file: int, polled: bool) -> None:
        self.name, self.file, self.polled = name, file, polled

    def is_hung_up(self) -> bool:
        """Whether systemd would drop it."""
        if not self.polled:
            return False
        waiting = select.poll()
        waiting.register(self.file, 0)
        return bool(waiting.poll(0))

    @property
    def cell(self) -> tuple[str, int, str]:
        """What a socket holds: its protocol, port and address."""
        with socket.socket(fileno=os.dup(self.file)) as one:
            address, port = one.getsockname()[:2]
            return {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}[one.type], port, address


class Systemd:
    """Listens where a daemon tells systemd of itself, on a thread of its own, and keeps ``most`` files for it."""

    def __init__(self, address: Path, most: int = 10_000) -> None:
        self.address = address
        self.most = most
        self.messages: list[list[str]] = []
        self.refused = 0
        self._stored: list[Stored] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(address))
        self._socket.settimeout(0.05)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, and close what is kept."""
        self._ended.set()
        self._thread.join()
        self._socket.close()
        self.drop()

    def drop(self) -> None:
        """Close what is kept, as when the service is stopped."""
        with self._lock:
            for one in self._stored:
                os.close(one.file)
            self._stored.clear()

    def put(self, name: str, file: int) -> None:
        """Keep a file that nobody has sent."""
        with self._lock:
            self._store([file], name, polled=False)

    @property
    def names(self) -> list[str]:
        """The names of what is kept, one a file."""
        with self._lock:
            return [one.name for one in self._stored]

    @property
    def cells(self) -> set[tuple[str, int, str]]:
        """What the sockets hold that are kept."""
        with self._lock:
            return {one.cell for one in self._stored}

    @property
    def ports(self) -> dict[str, set[int]]:
        """The ports that the sockets hold that are kept, by their names."""
        found: dict[str, set[int]] = {}
        with self._lock:
            for one in self._stored:
                found.setdefault(one.name, set()).add(one.cell[1])
        return found

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Read nothing meanwhile but for one message."""
        with self._lock:
            yield

    def told(self, word: str) -> list[list[str]]:
        """Return the messages so far that have a line ``word``."""
        return [message for message in self.messages if word in message]

    def handover(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return what to start a service behind, and the files to start it with: it finds those that are kept."""
        with self._lock:
            files = tuple(one.file for one in self._stored)
            names = ":".join(one.name for one in self._stored)
        argv = (sys.executable, "-I", "-S", "-c", _HAND_OVER, str(len(files)), names, *map(str, files))
        return (argv if files else ()), files

    def _listen(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                message, rights, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(253 * 4))
                with self._lock:
                    self._take(message.decode().split("\n"), list(_files(rights)))

    def _take(self, lines: list[str], files: list[int]) -> None:
        self.messages.append(lines)
        values = dict(line.split("=", 1) for line in lines)
        name = values.get("FDNAME", "stored")
        if "FDSTOREREMOVE" in values:
            for one in [one for one in self._stored if one.name == name]:
                self._stored.remove(one)
                os.close(one.file)
        if "FDSTORE" in values:
            self._store(files, name, polled=values.get("FDPOLL") != "0")
        for file in files:
            os.close(file)
        for one in [one for one in self._stored if one.is_hung_up()]:
            self._stored.remove(one)
            os.close(one.file)

    def _store(self, files: list[int], name: str, polled: bool) -> None:
        there = {_identity(one.file) for one in self._stored}
        for file in files:
            if _identity(file) in there:
                continue  # under its first name
            there.add(_identity(file))
            if len(self._stored) >= self.most:
                self.refused += 1
            else:
                self._stored.append(Stored(name, os.dup(file), polled))


def _identity(file: int) -> tuple[int, int]:
    its = os.fstat(file)
    return its.st_dev, its.st_ino


def _files(rights: list[tuple[int, int, bytes]]) -> array.array[int]:
    files = array.array("i")
    for level, kind, data in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(data[: len(data) - len(data) % files.itemsize])
    return files
