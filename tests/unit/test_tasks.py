"""What is to be done to its end, and who is to wait for it."""

from __future__ import annotations

import asyncio

import pytest

from ctrport.tasks import end, through, together


def test_a_task_is_through_with_its_end() -> None:
    said = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            said.append("done")

    async def main() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        await end(task)
        assert task.cancelled()

    asyncio.run(main())
    assert said == ["done"]


def test_however_often_it_is_cancelled_the_work_is_done() -> None:
    said = []

    async def work() -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        said.append("done")

    async def main() -> None:
        task = asyncio.create_task(through(work()))
        for _ in range(5):
            await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert said == ["done"]


def test_what_the_work_fails_with_is_told() -> None:
    async def work() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        asyncio.run(through(work()))


def test_what_was_begun_together_is_through_when_one_of_it_fails() -> None:
    said = []

    async def fails() -> str:
        raise OSError("no")

    async def works(turns: int) -> str:
        for _ in range(turns):
            await asyncio.sleep(0)
        said.append("done")
        return "yes"

    with pytest.raises(OSError, match="no"):
        asyncio.run(together([works(0), fails(), works(5)]))
    assert said == ["done", "done"]
    assert asyncio.run(together([works(3), works(1)])) == ["yes", "yes"]
