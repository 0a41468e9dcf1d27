"""Tasks of the event loop, ended in order."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


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
