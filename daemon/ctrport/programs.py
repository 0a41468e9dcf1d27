"""Other programs, run to their end or to a deadline: what hangs must not hang the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass

#: Seconds that a killed program has to be gone. One that waits within a system call is gone when that ends.
GRACE = 2.0


class ProgramError(Exception):
    """A program could not be run to its end; the message is one sentence for people."""


class NotInstalled(ProgramError):
    """There is no such program."""


@dataclass(frozen=True)
class Ended:
    """How a program ended. Its texts are in English, whatever the locale."""

    status: int
    out: str
    err: str

    @property
    def manner(self) -> str:
        """How it ended, in words."""
        return f"killed by signal {-self.status}" if self.status < 0 else f"exit status {self.status}"


async def run(*argv: str, timeout: float, input: str = "") -> Ended:
    """Run a program with ``input`` on its stdin. Raises ``ProgramError``.

    After ``timeout`` seconds it is killed, with whatever it started.
    """
    return await _finished(await _started(argv), argv[0], timeout, input)


class Ready:
    """A program that is started ahead of its input, so that the input need not wait for the start."""

    def __init__(self, *argv: str) -> None:
        self._argv = argv
        self._waiting: asyncio.subprocess.Process | None = None

    def waiting(self) -> int | None:
        """Return the process that waits for its input, if one does."""
        return self._waiting.pid if self._waiting is not None and self._waiting.returncode is None else None

    async def prepare(self) -> None:
        """Start it, unless it waits already. Where that fails, ``run`` will say so."""
        if self.waiting() is None:
            self._taken()
            with contextlib.suppress(ProgramError):
                self._waiting = await _started(self._argv)

    async def run(self, *, timeout: float, input: str) -> Ended:
        """Give it its input, and return how it ended; as the function ``run``."""
        process = self._taken()
        if process is None:
            process = await _started(self._argv)
        return await _finished(process, self._argv[0], timeout, input)

    async def close(self) -> None:
        """End it, if it waits: without input there is nothing for it to do."""
        process = self._taken()
        if process is not None:
            await _kill(process)

    def _taken(self) -> asyncio.subprocess.Process | None:
        """Return the process that waits, if one does; it is nobody's concern here any more."""
        process, self._waiting = self._waiting, None
        if process is None or process.returncode is None:
            return process
        assert process.stdin is not None
        process.stdin.close()  # what it started may wait for the same input
        return None


async def _started(argv: tuple[str, ...]) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
            start_new_session=True,  # to be killed as one with what it starts: it may be a script
        )
    except FileNotFoundError as error:
        raise NotInstalled(f"{argv[0]} is not installed") from error
    except OSError as error:
        raise ProgramError(f"{argv[0]} could not be started: {error.strerror}") from error


async def _finished(process: asyncio.subprocess.Process, name: str, timeout: float, input: str) -> Ended:
    done = False
    try:
        assert process.stdin is not None
        process.stdin.write(input.encode())  # now, and not some turns of the event loop later
        out, err = await asyncio.wait_for(process.communicate(b""), timeout)
        done = True
    except asyncio.TimeoutError as error:
        raise ProgramError(f"{name} did not end within {timeout:.0f} s") from error
    finally:
        if not done:  # whether it has ended or not: what it started may have its pipes yet
            await _kill(process)
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill it, and wait until it is gone, but not for ever."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.communicate(), GRACE)
