"""A node full of containers: how soon the daemon is ready where they run already, and behind a burst of events.

    python -m bench.crowd [--containers N]

Exit status: 0 the targets are reached, 1 they are not or could not be measured, 2 bad usage, 130 interrupted. All that
it makes is removed in each case.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.ground import LONG_PATIENCE, PATIENCE, Interrupts, Unmeasured, measured_node
from bench.usage import Usage
from demo.demo import Daemon
from embedded.container import Container
from embedded.host import stands_still
from embedded.node import Node
from embedded.wait import eventually

CONTAINERS, MOST = 1000, 2000
FIRST, CONTAINER_PORT = 20_000, 80
#: How many containers are started side by side.
ABREAST = 4
STARTS = 5
#: Seconds until it is ready; transactions that a burst may take, and seconds that it may be behind; MB that it may have
#: with a mapping of each.
SOON, TRANSACTIONS, BEHIND, RESIDENT = 3.0, 20, 2.0, 80.0
#: The part of a core that it may take when nothing happens, and the seconds over which that is seen.
IDLE, IDLE_SECONDS = 0.001, 60.0

# A bridge, and for each container a network namespace that is joined to it: what CNI makes, without a process for each.
_NETWORK = """
ip link add docker0 type bridge
ip address add 172.17.0.1/16 dev docker0
ip link set docker0 up
mkdir -p /run/netns
"""
_ONE = """
netns add c{number}
link add v{number} type veth peer name eth0 netns c{number}
link set v{number} master docker0 up
"""
_INSIDE = """
link set lo up
link set eth0 up
address add {address}/16 dev eth0
route add default via 172.17.0.1
"""


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(prog="crowd", description="Measure ctrport on a node full of containers.")
    parser.add_argument(
        "--containers", type=int, default=CONTAINERS, choices=range(10, MOST + 1), metavar="N", help="how many"
    )
    arguments = parser.parse_args()
    interrupts = Interrupts()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 16 * MOST)), hard))
    try:
        with measured_node() as node:
            return Crowd(node, arguments.containers, interrupts).measure()
    except Unmeasured as reason:
        print(f"crowd: {reason}", file=sys.stderr)
        return 130 if interrupts.came else 1
    except KeyboardInterrupt:
        print("\ncrowd: interrupted; all that was made is removed", file=sys.stderr)
        return 130


class Crowd:
    """So many containers on a node, and a daemon that publishes a port of each."""

    def __init__(self, node: Node, count: int, interrupts: Interrupts) -> None:
        self._node = node
        self._count = count
        self._interrupts = interrupts
        self._began = time.monotonic()
        self._missed: list[str] = []
        config = node.directory / "etc" / "config.yaml"
        config.parent.mkdir()
        # Each container's own label says its port: one rule for all of them.
        config.write_text(
            "containers_may_publish:\n"
            f"  - {{kinds: [label], namespace: default, host_ports: ['{FIRST}-{FIRST + MOST}']}}\n"
        )
        env = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(node.directory / "compiled")}
        self._daemon = Daemon(node, config, env)

    def measure(self) -> int:
        """Measure everything, print it, and return the exit status."""
        self._node.script(_NETWORK)
        self._daemon.start()
        self._daemon.stop()  # its modules are compiled by now
        burst = self._count // 4
        self._start(range(self._count - burst))
        self._daemon.start(within=LONG_PATIENCE)
        self._burst(range(self._count - burst, self._count))
        self._idle()
        self._daemon.stop()
        self._ready()
        print("MISSED: " + "; ".join(self._missed) if self._missed else "every target is held")
        return bool(self._missed)

    def _start(self, numbers: Sequence[int]) -> list[Container]:
        for number in numbers:
            self._interrupts.check()
            self._node.run("ip", "-batch", "-", input=_ONE.format(number=number))
            address = f"172.17.{1 + number // 250}.{1 + number % 250}"
            self._node.run("ip", "-netns", f"c{number}", "-batch", "-", input=_INSIDE.format(address=address))
        started: list[Container] = []
        with ThreadPoolExecutor(ABREAST) as together:
            for container in together.map(self._container, numbers):
                started.append(container)
                if len(started) % 50 == 0:
                    self._say(f"{numbers[0] + len(started)} of {self._count} containers")
        return started

    def _container(self, number: int) -> Container:
        self._interrupts.check()
        return self._node.start(
            f"c{number}",
            network=None,
            labels={"ctrport/ports": f"{FIRST + number}:{CONTAINER_PORT}"},
            options=("--with-ns", f"network:/run/netns/c{number}"),
            command=("/bin/sleep", "7200"),
        )

    def _burst(self, numbers: Sequence[int]) -> None:
        """Have containers start while the daemon stands still, and see how it comes after."""
        before = self._status()
        os.kill(self._daemon.pid, signal.SIGSTOP)
        try:
            eventually(lambda: stands_still(self._daemon.pid), within=PATIENCE, what="the daemon standing still")
            self._start(numbers)
        finally:
            began = time.monotonic()
            os.kill(self._daemon.pid, signal.SIGCONT)
        eventually(lambda: self._active() == self._count, within=LONG_PATIENCE, what=f"{self._count} active")
        behind = time.monotonic() - began
        after = self._status()
        events, transactions = (after[name] - before[name] for name in ("events", "transactions"))
        self._row(f"a burst of {events} events: transactions", transactions, TRANSACTIONS - 1, "")
        self._row(f"a burst of {events} events: until all is published", behind, BEHIND, " s")

    def _idle(self) -> None:
        usage = Usage(self._daemon.pid)
        time.sleep(5)  # until what came before is over
        began, before = time.monotonic(), usage.processor()
        time.sleep(IDLE_SECONDS)
        share = (usage.processor() - before) / (time.monotonic() - began)
        self._row(f"idle with {self._count} containers", share * 100, IDLE * 100, " % of a core")
        self._row(f"resident with {self._count} mappings", usage.resident(), RESIDENT, " MB")

    def _ready(self) -> None:
        taken, processor = list[float](), list[float]()
        for number in range(STARTS):
            self._say(f"start {number + 1} of {STARTS}, with {self._count} containers")
            began = time.monotonic()
            self._daemon.start(within=LONG_PATIENCE)
            taken.append(time.monotonic() - began)
            processor.append(Usage(self._daemon.pid).processor())
            eventually(lambda: self._active() == self._count, within=PATIENCE, what=f"{self._count} active")
            self._daemon.stop()
        title = f"start with {self._count} containers until it is ready (median of {STARTS})"
        self._row(title, statistics.median(taken), SOON, " s")
        self._say(f"of that, processor time: {statistics.median(processor):.3g} s")

    def _row(self, title: str, figure: float, most: float, unit: str) -> None:
        held = figure <= most
        self._say(f"{title}: {figure:.3g}{unit} (at most {most:.3g}{unit}){'' if held else ': MISSED'}")
        self._missed += [] if held else [title]

    def _active(self) -> int:
        return sum(publication["state"] == "active" for publication in self._status()["publications"])

    def _status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(Path(self._node.path("/run/ctrport/status.json")).read_text())
        return found

    def _say(self, what: str) -> None:
        self._interrupts.check()
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        print(f"{minutes:3}:{seconds:02}  {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
