"""How soon a port is published: ctrport beside CNI's portmap plugin, on one node, in turns.

    python -m bench.bench [--rounds N]

Exit status: 0 ctrport takes at most a fifth of portmap's time, 1 it takes more or could not be measured, 2 bad usage,
130 interrupted. All that it makes is removed in each case.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

from bench import portmap
from bench.commits import Commits
from demo.demo import Daemon, Failed
from demo.measure import Knocking, started_at
from embedded.container import Container
from embedded.host import CommandError
from embedded.node import Node, missing
from embedded.traffic import Refused, probe_tcp
from embedded.wait import eventually

#: What ctrport's median may be of portmap's.
TARGET = 1 / 5
ROUNDS, MOST_ROUNDS = 30, 100
#: Seconds after which no more rounds are begun.
LONGEST = 150.0
#: Seconds that anything of a round may take before the measurement has failed.
PATIENCE = 10.0

CTRPORT_PORT, PORTMAP_PORT, CONTAINER_PORT = 8080, 9090, 80
#: The host ports that each of them publishes all along, of one container on the same bridge.
NEIGHBOUR = "neighbour"
CTRPORT_NEIGHBOUR, PORTMAP_NEIGHBOUR = 8081, 9091
CONFIG = f"""\
publish:
  - match: {{namespace: default, container: {NEIGHBOUR}}}
    ports: ["{CTRPORT_NEIGHBOUR}:{CONTAINER_PORT}"]
  - match: {{namespace: default, container: "web-*"}}
    ports: ["{CTRPORT_PORT}:{CONTAINER_PORT}"]
"""
SERVER = ("/bin/httpd", "-f", "-p", str(CONTAINER_PORT))

# What each calls, as the kernel names the writer of a commit: cut after 15 characters.
CTRPORT_WRITER, PORTMAP_WRITER = "iptables-nft-re", "iptables"


@dataclass(frozen=True)
class Round:
    """What one round took of each, in milliseconds."""

    ctrport_commit: float
    ctrport_answer: float
    portmap_exit: float
    portmap_commit: float
    portmap_answer: float


ROWS = (
    ("ctrport: start event -> rules committed", "ctrport_commit"),
    ("portmap: ADD, exec -> exit", "portmap_exit"),
    ("portmap: ADD, exec -> rules committed", "portmap_commit"),
    ("ctrport: start event -> LAN client connected", "ctrport_answer"),
    ("portmap: ADD, exec -> LAN client connected", "portmap_answer"),
)


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


def main() -> int:
    """Measure, print, and return the exit status."""
    arguments = _parser().parse_args()
    interrupts = Interrupts()
    try:
        rounds = _measure(arguments.rounds, interrupts)
    except Unmeasured as reason:
        print(f"bench: {reason}", file=sys.stderr)
        return 130 if interrupts.came else 1
    except KeyboardInterrupt:
        print("\nbench: interrupted; all that was made is removed", file=sys.stderr)
        return 130
    return _conclude(rounds)


def _parser() -> argparse.ArgumentParser:
    def count(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST_ROUNDS:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MOST_ROUNDS}")
        return int(text)

    parser = argparse.ArgumentParser(prog="bench", description="Measure ctrport beside CNI's portmap plugin.")
    parser.add_argument("--rounds", type=count, default=ROUNDS, metavar="N", help=f"of each (default {ROUNDS})")
    return parser


def _measure(count: int, interrupts: Interrupts) -> list[Round]:
    absent = missing() or ("iptables is not installed" if shutil.which("iptables") is None else None)
    if absent is not None:
        raise Unmeasured(absent)
    with failing(), Node() as node:
        if node.run("test", "-x", portmap.PLUGIN, check=False).returncode != 0:
            raise Unmeasured("CNI's portmap plugin is not installed")
        node.start_containerd()
        print(context(node), flush=True)
        return _rounds(node, count, interrupts)


def _rounds(node: Node, count: int, interrupts: Interrupts) -> list[Round]:
    node.add_network("docker0")
    events = node.directory / "events"
    with events.open("w") as written:
        node.spawn("ctr", "events", stdin=subprocess.DEVNULL, stdout=written)
    (node.directory / "config.yaml").write_text(CONFIG)
    daemon = Daemon(node, node.directory / "config.yaml")
    daemon.start()
    other = node.start("portmap", command=SERVER)
    # One more port is what a node in use sees; what the first one on a bridge takes more is there for both by now.
    portmap.call(node, "ADD", node.start(NEIGHBOUR, command=SERVER), {PORTMAP_NEIGHBOUR: CONTAINER_PORT})
    for port in (CTRPORT_NEIGHBOUR, PORTMAP_NEIGHBOUR):
        _answers(node, port)
    rounds: list[Round] = []
    end = time.monotonic() + LONGEST
    with Commits(node) as commits:
        for number in range(count + 1):
            interrupts.check()
            if time.monotonic() > end:
                print(f"stopped after {len(rounds)} rounds of {count}: they took {LONGEST:g} s")
                break
            commit = _ctrport_commit(node, commits, events, f"web-{number}")
            added, committed = _portmap_commit(node, commits, other)
            # Knocking at a port takes time from those who open it, so these are rounds of their own.
            answer = _ctrport_answer(node, events, f"web-{number}-knocked")
            rounds.append(Round(commit, answer, added, committed, _portmap_answer(node, other)))
            if number == 0:
                rounds.clear()  # the first of each makes what the others find there
    daemon.stop()
    return rounds


def _ctrport_commit(node: Node, commits: Commits, events: Path, id: str) -> float:
    container = node.start(id, command=SERVER)
    started = _started(events, id)
    commit = commits.last(CTRPORT_WRITER, started)
    _delete(node, container)
    return _ms(started, commit.at)


def _ctrport_answer(node: Node, events: Path, id: str) -> float:
    with Knocking(node.client, node.address, CTRPORT_PORT) as knocking:
        container = node.start(id, command=SERVER)
        opened = _opened(knocking, "ctrport")
    _delete(node, container)
    return _ms(_started(events, id), opened)


def _portmap_commit(node: Node, commits: Commits, container: Container) -> tuple[float, float]:
    """Have portmap publish a port, and return how long it took until its exit and until its last commit."""
    ran = portmap.call(node, "ADD", container, {PORTMAP_PORT: CONTAINER_PORT})
    commit = commits.last(PORTMAP_WRITER, ran.began)
    _unmap(node, container)
    return _ms(ran.began, ran.ended), _ms(ran.began, commit.at)


def _portmap_answer(node: Node, container: Container) -> float:
    with Knocking(node.client, node.address, PORTMAP_PORT) as knocking:
        ran = portmap.call(node, "ADD", container, {PORTMAP_PORT: CONTAINER_PORT})
        opened = _opened(knocking, "portmap")
    _unmap(node, container)
    return _ms(ran.began, opened)


def _delete(node: Node, container: Container) -> None:
    _answers(node, CTRPORT_PORT)
    node.delete(container)
    _refuses(node, CTRPORT_PORT)


def _unmap(node: Node, container: Container) -> None:
    _answers(node, PORTMAP_PORT)
    portmap.call(node, "DEL", container, {PORTMAP_PORT: CONTAINER_PORT})
    _refuses(node, PORTMAP_PORT)


def _opened(knocking: Knocking, whose: str) -> int:
    if not knocking.answered.wait(PATIENCE) or knocking.opened is None:
        raise Unmeasured(f"the port of {whose} did not open for the LAN within {PATIENCE:g} s")
    return _ns(knocking.opened)


def _started(events: Path, id: str) -> int:
    def announced() -> datetime | None:
        with contextlib.suppress(ValueError):
            return started_at(events, id)
        return None

    return _ns(eventually(announced, within=PATIENCE, what=f"the start event of {id}"))


def _answers(node: Node, port: int) -> None:
    """Wait until the port is open for the LAN: a commit that opened none would be no measurement."""

    def connected() -> bool:
        with node.client.socket() as client:
            client.settimeout(0.5)
            return client.connect_ex((node.address, port)) == 0

    eventually(connected, within=PATIENCE, what=f"port {port} being open for the LAN")


def _refuses(node: Node, port: int) -> None:
    def refused() -> bool:
        return isinstance(probe_tcp(node.client, node.address, port, timeout=0.5), Refused)

    eventually(refused, within=PATIENCE, what=f"port {port} being refused")


def _ns(moment: datetime | None) -> int:
    assert moment is not None
    return round((moment - datetime.fromtimestamp(0, timezone.utc)).total_seconds() * 1e6) * 1000


def _ms(since: int, until: int) -> float:
    return (until - since) / 1e6


def context(node: Node) -> str:
    """Return what the figures depend on, in one line."""
    iptables = node.run("iptables", "--version").stdout.strip()
    if "nf_tables" not in iptables:
        raise Unmeasured(f"{iptables}: the commits of legacy tables are not announced, only those of nf_tables")
    containerd = re.search(r"\d+\.\d+\.\d+", node.run("ctr", "--version").stdout)
    load = " ".join(f"{average:.2f}" for average in os.getloadavg())
    return (
        f"Linux {platform.release()}, {iptables}, containerd {containerd[0] if containerd else 'of unknown version'}, "
        f"Python {platform.python_version()}, {os.cpu_count()} cores, load average {load}"
    )


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """Turn what goes wrong into the one line that says so."""
    try:
        yield
    except (AssertionError, CommandError, Failed, OSError, RuntimeError, ValueError) as error:
        raise Unmeasured(" ".join(str(error).split())) from error


def _conclude(rounds: Sequence[Round]) -> int:
    """Print the figures, and return the exit status that they are worth."""
    if not rounds:
        print("bench: no round but the discarded one", file=sys.stderr)
        return 1
    print(f"rounds of each, in turns: {len(rounds)}, and a first one discarded\n")
    print(f"{'milliseconds':<46} {'min':>8} {'median':>8} {'max':>8}")
    medians = {}
    for title, field in ROWS:
        taken = [getattr(each, field) for each in rounds]
        medians[field] = statistics.median(taken)
        print(f"{title:<46} {min(taken):8.1f} {medians[field]:8.1f} {max(taken):8.1f}")
    ratio = medians["ctrport_commit"] / medians["portmap_exit"]
    print(f"\nratio of the medians, rules committed / ADD: {ratio:.3f} (target: at most {TARGET:g})")
    if ratio > TARGET:
        print(f"MISSED: ctrport took {ratio / TARGET:.2f} times what the target allows")
        return 1
    print(f"held: ctrport is {1 / ratio:.1f} times as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main())
