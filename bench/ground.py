"""What all measurements stand on: nodes made of namespaces, what they depend on said in one line, and one clock.

Every time is of ``CLOCK_REALTIME`` in nanoseconds since the epoch, as containerd stamps its events with it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

from bench import portmap
from demo.demo import Failed
from demo.measure import Knocking, started_at
from embedded import dockerd
from embedded.host import CommandError
from embedded.node import Node, missing
from embedded.traffic import Refused, probe_tcp
from embedded.wait import eventually

ROOT = Path(__file__).resolve().parent.parent
#: Seconds that anything may take before the measurement has failed, but for what peers take for a thousand ports.
PATIENCE, LONG_PATIENCE = 20.0, 180.0

CONTAINER_PORT = 80
SERVER = ("/bin/httpd", "-f", "-p", str(CONTAINER_PORT))


class Unmeasured(Exception):
    """The measurement could not be made; the message is one line for people."""


class Interrupts:
    """Takes SIGINT and SIGTERM, for between two rounds: in the middle of one, a child that starts would be lost."""

    def __init__(self) -> None:
        self.came = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._take)

    def check(self) -> None:
        """Raise KeyboardInterrupt where one came."""
        if self.came:
            raise KeyboardInterrupt

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.came = True


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """Turn what goes wrong into the one line that says so."""
    try:
        yield
    except (AssertionError, CommandError, Failed, OSError, RuntimeError, ValueError) as error:
        raise Unmeasured(" ".join(str(error).split())) from error


@contextlib.contextmanager
def measured_node() -> Iterator[Node]:
    """Make a node with a containerd, and say on what is measured. Raises ``Unmeasured``, whatever goes wrong."""
    reason = missing()
    if reason is not None:
        raise Unmeasured(reason)
    with failing(), Node() as node:
        node.start_containerd()
        print(context(node), flush=True)
        yield node


def absent() -> str | None:
    """Return why nothing can be measured on this machine, None if it can."""
    found = missing() or dockerd.missing()
    if found is None and not any((directory / "portmap").exists() for directory in portmap.DIRECTORIES):
        found = "CNI's portmap plugin is not installed"
    return found


def context(node: Node) -> str:
    """Return what the figures depend on, in one line."""
    iptables = node.run("iptables-nft", "--version").stdout.strip()
    containerd = re.search(r"\d+\.\d+\.\d+", node.run("ctr", "--version").stdout)
    load = " ".join(f"{average:.2f}" for average in os.getloadavg())
    return (
        f"Linux {platform.release()}, {iptables}, containerd {containerd[0] if containerd else 'of unknown version'}, "
        f"Python {platform.python_version()}, {os.cpu_count()} cores, load average {load}"
    )


class Events:
    """What containerd announces on a node, as ``ctr events`` writes it to a file."""

    def __init__(self, node: Node) -> None:
        self._path = node.directory / "events"
        with self._path.open("w") as written:
            node.spawn("ctr", "events", stdin=subprocess.DEVNULL, stdout=written)

    def at(self, topic: str, id: str) -> int:
        """Return when containerd says that something happened to a container, once it has said so."""

        def announced() -> datetime | None:
            with contextlib.suppress(ValueError):
                return started_at(self._path, id, topic)
            return None

        found = eventually(announced, within=PATIENCE, what=f"the event {topic} of {id}")
        assert found is not None
        return since_epoch(found)


def since_epoch(moment: datetime) -> int:
    """Return a time in nanoseconds since the epoch."""
    return round((moment - datetime.fromtimestamp(0, timezone.utc)).total_seconds() * 1e6) * 1000


def milliseconds(since: int, until: int) -> float:
    """Return what lies between two times."""
    return (until - since) / 1e6


def answers(node: Node, port: int, *, within: float = PATIENCE) -> None:
    """Wait until a port is open for the LAN: a commit that opened none would be no measurement."""

    def connected() -> bool:
        with node.client.socket() as client:
            client.settimeout(0.5)
            return client.connect_ex((node.address, port)) == 0

    eventually(connected, within=within, what=f"port {port} being open for the LAN")


def refuses(node: Node, port: int, *, within: float = PATIENCE) -> None:
    """Wait until a port is refused to the LAN."""

    def refused() -> bool:
        return isinstance(probe_tcp(node.client, node.address, port, timeout=0.5), Refused)

    eventually(refused, within=within, what=f"port {port} being refused")


def opened(knocking: Knocking, whose: str) -> int:
    """Return when the first who knocked was let in."""
    if not knocking.answered.wait(PATIENCE) or knocking.opened is None:
        raise Unmeasured(f"the port of {whose} did not open for the LAN within {PATIENCE:g} s")
    return since_epoch(knocking.opened)
