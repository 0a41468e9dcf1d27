"""Other programs, run to their end or to a deadline: what hangs must not hang the daemon."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass


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


async def run(*argv: str, timeout: float, input: str = "") -> Ended:
    """Run a program with ``input`` on its stdin. Raises ``ProgramError``; after ``timeout`` seconds it is killed."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise NotInstalled(f"{argv[0]} is not installed") from error
    except OSError as error:
        raise ProgramError(f"{argv[0]} could not be started: {error.strerror}") from error
    try:
        out, err = await asyncio.wait_for(process.communicate(input.encode()), timeout)
    except asyncio.TimeoutError as error:
        raise ProgramError(f"{argv[0]} did not end within {timeout:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))
