"""The daemon's modules on a node without the daemon: one function called in a process of its own there."""

from __future__ import annotations

import asyncio
import base64
import inspect
import os
import pickle
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ctrport.endpoints import Endpoints
from ctrport.model import Endpoint, Obstacle
from embedded.container import Container
from embedded.node import Node

P = ParamSpec("P")
T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT / 'daemon'}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.environ["PATH"]}
_CALL = "from tests.node.modules import answer; answer()"


def call(node: Node, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what a function of a module returns when it is called on the node."""
    asked = base64.b64encode(pickle.dumps((function, args, kwargs))).decode()
    said = node.run(sys.executable, "-c", _CALL, input=asked, env=ENVIRONMENT).stdout
    answered: T = pickle.loads(base64.b64decode(said))
    return answered


def run(node: Node, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what a coroutine function returns when it is run on the node."""
    answered: Any = call(node, function, *args, **kwargs)
    return answered  # type: ignore[no-any-return]


def answer() -> None:
    """Do what ``call`` asks for: the other end of it."""
    function, args, kwargs = pickle.loads(base64.b64decode(sys.stdin.read()))
    result = function(*args, **kwargs)
    if inspect.isawaitable(result):
        result = asyncio.run(_awaited(result))
    sys.stdout.write(base64.b64encode(pickle.dumps(result)).decode())


async def _awaited(result: Awaitable[T]) -> T:
    return await result


async def _find(pid: int) -> Endpoint | Obstacle:
    async with Endpoints() as endpoints:
        return endpoints.find(pid)


def find(node: Node, container: Container) -> Endpoint | Obstacle:
    """Return where the daemon would find that container."""
    return run(node, _find, container.pid)
