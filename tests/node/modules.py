"""The daemon's modules on a node without the daemon: functions called in a process of its own there."""

from __future__ import annotations

import asyncio
import base64
import inspect
import os
import pickle
import sys
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar

from ctrport.endpoints import Endpoints
from ctrport.model import Endpoint, Obstacle
from embedded.container import Container
from embedded.node import Node
from tests.node.daemon import BYTECODE, ROOT

P = ParamSpec("P")
T = TypeVar("T")

ENVIRONMENT = {"PYTHONPATH": f"{ROOT / 'daemon'}:{ROOT}", "PATH": os.environ["PATH"], **BYTECODE}
_CALL = "from tests.node.modules import answer; answer()"


def call(node: Node, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what a function of a module returns when it is called on the node."""
    asked = base64.b64encode(pickle.dumps((function, args, kwargs))).decode()
    said = node.run(sys.executable, "-c", _CALL, input=asked, env=ENVIRONMENT).stdout
    answered: T = pickle.loads(base64.b64decode(said))
    return answered


def call_each(node: Node, *asked: tuple[Any, ...]) -> list[Any]:
    """Return what functions return that are called one after another, each given with its arguments."""
    return call(node, _each, asked)


def _each(asked: tuple[tuple[Any, ...], ...]) -> list[Any]:
    return [function(*args) for function, *args in asked]


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
