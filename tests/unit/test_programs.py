"""Programs that end, that do not, and that wait for their input."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ctrport.programs import Ended, NotInstalled, ProgramError, Ready, run
from embedded.wait import eventually

T = TypeVar("T")


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 20))


def test_a_program_gets_its_input_and_tells_how_it_ended() -> None:
    ended = wait_for(run("sh", "-c", "cat; echo no >&2; exit 3", timeout=5, input="yes"))
    assert ended == Ended(3, "yes", "no\n")


def test_a_program_speaks_english() -> None:
    assert wait_for(run("sh", "-c", "echo $LC_ALL", timeout=5)).out == "C\n"


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(NotInstalled, match="no-such-program is not installed"):
        wait_for(run("no-such-program", timeout=5))


def test_a_program_that_does_not_end_is_killed() -> None:
    with pytest.raises(ProgramError, match="sleep did not end within 0 s"):
        wait_for(run("sleep", "60", timeout=0.1))


def test_a_program_that_does_not_end_is_killed_with_what_it_started(tmp_path: Path) -> None:
    # As a script that stands in front of the real program: its child has the pipes, and goes on without it.
    started, began = tmp_path / "pid", time.monotonic()
    with pytest.raises(ProgramError, match="sh did not end within 0 s"):
        wait_for(run("sh", "-c", f"sleep 60 & echo $! >{started}; wait", timeout=0.2))
    assert time.monotonic() - began < 5
    child = int(started.read_text())
    eventually(lambda: _is_gone(child), what="the child being killed")


def test_what_a_program_that_died_has_started_is_killed_too(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    with pytest.raises(ProgramError, match="sh did not end within 0 s"):
        wait_for(run("sh", "-c", f"sleep 60 & echo $! >{started}; kill -9 $$", timeout=0.2))
    child = int(started.read_text())
    eventually(lambda: _is_gone(child), what="the child being killed")


def _is_gone(pid: int) -> bool:
    """Whether a process is gone, or has only to be taken note of by whoever is its parent now."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_how_a_program_ended_is_told_in_words() -> None:
    assert wait_for(run("sh", "-c", "exit 3", timeout=5)).manner == "exit status 3"
    assert wait_for(run("sh", "-c", "kill -9 $$", timeout=5)).manner == "killed by signal 9"


def test_a_program_that_is_ready_is_the_one_that_gets_the_input() -> None:
    async def work() -> None:
        ready = Ready("sh", "-c", "echo $$; cat")
        await ready.prepare()
        waiting = ready.waiting()
        assert waiting is not None
        await ready.prepare()
        assert ready.waiting() == waiting
        ended = await ready.run(timeout=5, input="text")
        assert ended == Ended(0, f"{waiting}\ntext", "")
        assert ready.waiting() is None
        assert (await ready.run(timeout=5, input="again")).out.endswith("\nagain")

    wait_for(work())


def test_a_ready_program_that_died_is_replaced() -> None:
    async def work() -> None:
        ready = Ready("cat")
        await ready.prepare()
        pid = ready.waiting()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        for _ in range(500):
            if ready.waiting() is None:
                break
            await asyncio.sleep(0.01)
        assert ready.waiting() is None
        assert await ready.run(timeout=5, input="text") == Ended(0, "text", "")

    wait_for(work())


def test_what_a_ready_program_that_died_had_started_ends_too(tmp_path: Path) -> None:
    started = tmp_path / "pid"

    async def work() -> None:
        ready = Ready("sh", "-c", f"exec 3<&0; cat <&3 & echo $! >{started}; wait")
        await ready.prepare()
        await asyncio.to_thread(eventually, lambda: started.exists() and started.read_text(), what="the child")
        pid = ready.waiting()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(eventually, lambda: ready.waiting() is None, what="the program being dead")
        child = int(started.read_text())
        assert not _is_gone(child)
        await ready.prepare()
        await asyncio.to_thread(eventually, lambda: _is_gone(child), what="the child being gone")
        await ready.close()

    wait_for(work())


def test_a_ready_program_ends_when_it_is_given_up() -> None:
    async def work() -> int:
        ready = Ready("cat")
        await ready.close()
        await ready.prepare()
        pid = ready.waiting()
        assert pid is not None
        await ready.close()
        assert ready.waiting() is None
        return pid

    pid = wait_for(work())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_cannot_be_made_ready_says_so_when_it_is_run() -> None:
    async def work() -> None:
        ready = Ready("no-such-program")
        await ready.prepare()
        await ready.run(timeout=5, input="")

    with pytest.raises(NotInstalled):
        wait_for(work())
