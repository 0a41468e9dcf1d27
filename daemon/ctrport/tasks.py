"""Tasks of the event loop, begun together and ended in order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def together(works: Iterable[Awaitable[T]]) -> list[T]:
    """Do all at once, and return what each returned. What one of them raises comes when all are through.

    None is left behind to fail later, when nobody waits for it.
    """
    results = list[T]()
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
        results.append(result)
    return results


async def end(task: asyncio.Task[Any]) -> None:
    """Cancel it, and wait until it is through with that."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def through(work: Coroutine[Any, Any, None]) -> None:
    """Do it to its end, however often this is cancelled meanwhile; the cancellation takes effect then."""
    doing, cancelled = asyncio.ensure_future(work), False
    while not doing.done():
        try:
            await asyncio.wait([doing])
        except asyncio.CancelledError:
            cancelled = True
    doing.result()
    if cancelled:
        raise asyncio.CancelledError
