"""ctrport, with one of its backends, as a subject of the measurements: what is asked of it, and when it had done it."""

from __future__ import annotations

import asyncio
import functools
import sys
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.commits import QUIET, Commits
from bench.ground import (
    CONTAINER_PORT,
    LONG_PATIENCE,
    SERVER,
    Events,
    answers,
    milliseconds,
    opened,
    refuses,
)
from bench.traffic import Server
from bench.usage import Usage
from ctrport.firewall.alarm import LegacyAlarm
from ctrport.model import Family
from demo.demo import Daemon
from demo.measure import Knocking
from embedded.container import Container
from embedded.host import inside
from embedded.node import Node
from embedded.wait import eventually


@dataclass(frozen=True)
class Wish:
    """Host ports to publish, ``count`` in a row, each onto the container's port as far along from ``container``.

    Where ``each``, all of them onto that port, each by a mapping of its own.
    """

    host: int
    container: int
    count: int = 1
    each: bool = False

    @property
    def ports(self) -> dict[int, int]:
        """The container's port by the host port."""
        return {self.host + number: self.container + number * (not self.each) for number in range(self.count)}

    @property
    def specs(self) -> list[str]:
        """It in the words of ``-p``."""
        if self.each or self.count == 1:
            return [f"{host}:{port}" for host, port in self.ports.items()]
        last = self.count - 1
        return [f"{self.host}-{self.host + last}:{self.container}-{self.container + last}"]

    @property
    def command(self) -> tuple[str, ...]:
        """What a container is to run so that the first port answers."""
        return (*SERVER[:-1], str(self.container))


ONE = Wish(8080, CONTAINER_PORT)


@dataclass(frozen=True)
class Took:
    """How many milliseconds something took, and how many seconds of processor time, where that can be told.

    ``since_start`` is how many milliseconds after the container had started it was done, fewer than none before.
    """

    milliseconds: float
    processor: float | None = None
    since_start: float | None = None


class Subject(Protocol):
    """Who publishes ports. Every method leaves things as they were before, but for ``beside``."""

    name: str
    node: Node

    def publish(self, wish: Wish) -> tuple[Took, Took]:
        """Publish ports of a container and remove them; return how long each took until it was committed."""
        ...

    def answer(self, wish: Wish) -> Took | None:
        """Publish ports and remove them; return how long it took until a client on the LAN was let in.

        None where the container is made together with its ports, and it would be its start that is measured.
        """
        ...


class CommitsOfLegacy:
    """Looks all the time whether the legacy tables have changed: they announce nothing. As ``Commits`` is used."""

    #: Seconds between two looks: that much later than it was a commit may be seen.
    PAUSE = 0.0005

    def __init__(self, node: Node) -> None:
        self._times: list[int] = []
        self._begun = threading.Event()
        listen = functools.partial(inside, node.pid, ("net",), lambda: asyncio.run(self._listen()))
        self._thread = threading.Thread(target=listen, daemon=True)

    def __enter__(self) -> CommitsOfLegacy:
        self._thread.start()
        self._begun.wait()
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def last(self, writers: Collection[str], since: int) -> int:
        """Return when a table was last seen to have changed since a time, once it is quiet."""

        def found() -> int | None:
            times = [at for at in self._times if at >= since]
            return times[-1] if times and time.time_ns() - times[-1] > QUIET * 1e9 else None

        last = eventually(found, within=30, what="a change of the legacy tables")
        assert last is not None
        return last

    async def _listen(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._begun.set()
        looking = asyncio.create_task(self._look())
        await asyncio.wait({looking, asyncio.create_task(self._end.wait())}, return_when=asyncio.FIRST_COMPLETED)
        looking.cancel()

    async def _look(self) -> None:
        async for _ in LegacyAlarm([Family.IPV4], self.PAUSE):
            self._times.append(time.time_ns())


class Ctrport:
    """ctrport with a backend, on a node of its own. A context manager."""

    def __init__(self, backend: str) -> None:
        self.name = f"ctrport, {backend}"
        self.backend = backend
        self._serial = 0

    def __enter__(self) -> Ctrport:
        self.node = Node()
        try:
            self.node.start_containerd()
            self.node.add_network("docker0")
            self._events = Events(self.node)
            # Beside nothing else, so that nothing that is written there is taken for the configuration.
            self._config = self.node.directory / "etc" / "config.yaml"
            self._config.parent.mkdir()
            legacy = self.backend == "iptables-legacy"
            self._heard = Commits(self.node)
            self._commits: Commits | CommitsOfLegacy = CommitsOfLegacy(self.node) if legacy else self._heard
            # Its modules are to be compiled once, and not with each start.
            env = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(self.node.directory / "compiled")}
            self._daemon = Daemon(self.node, self._config, env)
            self._writers = {"iptables-nft-re", Path(sys.executable).name[:15]}
            for listening in dict.fromkeys((self._heard, self._commits)):
                listening.__enter__()
                self.node.at_close(listening.__exit__)
        except BaseException:
            self.node.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.node.close()

    # The daemon

    def start(self, wishes: Mapping[str, Wish]) -> float:
        """Start the daemon with a configuration that publishes these for containers named so, and anything behind.

        Returns how many milliseconds it took until it was ready.
        """
        lines = [f"firewall: {{backend: {self.backend}}}", "publish:"]
        for name, wish in wishes.items():
            ports = ", ".join(f'"{spec}"' for spec in wish.specs)
            lines += [f'  - match: {{namespace: default, container: "{name}*"}}', f"    ports: [{ports}]"]
        self._config.write_text("\n".join([*lines, ""]))
        began = time.time_ns()
        self._daemon.start(within=LONG_PATIENCE)
        return milliseconds(began, time.time_ns())

    def stop(self) -> None:
        """End the daemon; its rules stay."""
        self._daemon.stop()

    @property
    def usage(self) -> Usage:
        """What the daemon takes."""
        return Usage(self._daemon.pid)

    # What is measured

    def publish(self, wish: Wish, name: str = "one") -> tuple[Took, Took]:
        """See ``Subject.publish``."""
        before = self.usage.processor()
        container = self._start(name, wish)
        made, started = (self._events.at(topic, container.id) for topic in ("/tasks/create", "/tasks/start"))
        assert container.address is not None
        since = max(made, self._heard.address(container.address, made))
        committed = self._commits.last(self._writers, since)
        answers(self.node, wish.host)
        between = self.usage.processor()
        self.node.kill(container)
        exited = self._events.at("/tasks/exit", container.id)
        removed = self._commits.last(self._writers, exited)
        refuses(self.node, wish.host)
        self.node.delete(container)
        return (
            Took(milliseconds(since, committed), between - before, milliseconds(started, committed)),
            Took(milliseconds(exited, removed), self.usage.processor() - between),
        )

    def answer(self, wish: Wish, name: str = "one") -> Took | None:
        """See ``Subject.answer``."""
        with Knocking(self.node.client, self.node.address, wish.host) as knocking:
            container = self._start(name, wish)
            let_in = opened(knocking, self.name)
        since = self._events.at("/tasks/start", container.id)
        self.node.delete(container)
        refuses(self.node, wish.host)
        return Took(milliseconds(since, let_in))

    def beside(self, name: str, wish: Wish) -> Container:
        """Start a container that stays, and return it when the first and the last of its host ports are published."""
        container = self.node.start(name, command=("/bin/sleep", "3600"))
        with Server(container, wish.container):
            for port in (wish.host, wish.host + wish.count - 1):
                answers(self.node, port, within=LONG_PATIENCE)
        return container

    def _start(self, name: str, wish: Wish) -> Container:
        self._serial += 1
        return self.node.start(f"{name}-{self._serial}", command=wish.command)
