"""ctrport beside CNI's portmap plugin and dockerd, on the same work, in turns.

    python -m bench.bench [--short] [--only PART] [--to DIRECTORY]

Each has a node of its own, made of namespaces. Exit status: 0 every target is held, 1 one is missed or could not be
measured, 2 bad usage, 130 interrupted. All that it makes is removed in each case, but for figures.md and its pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import layouts, rows
from bench.ground import CONTAINER_PORT, Interrupts, Unmeasured, absent, answers, context, failing
from bench.peers import Docker, Portmap
from bench.plots import plots
from bench.rows import Figures, Row, missed, verdicts
from bench.subjects import ONE, Ctrport, Subject, Took, Wish
from bench.table import conclusion, page, table
from bench.traffic import Client, Server
from embedded.dockerd import DockerContainer
from embedded.host import Place, end_process
from embedded.node import Node


@dataclass(frozen=True)
class Work:
    """How much is measured: rounds at the most, and seconds after which no more are begun; and how many ports."""

    rounds: int = 20
    seconds: float = 60.0
    ranges: tuple[int, ...] = (10, 100, 1000)
    beside: tuple[int, ...] = (10, 1000, 10_000)
    kept: int = 1000  # of the ranges, that which the peers publish once and keep
    turn: float = 0.25
    idle: float = 60.0  # everything is looked at again once a minute


WHOLE = Work()
SHORT = Work(rounds=1, seconds=5.0, ranges=(3,), beside=(2, 3), kept=3, turn=0.02, idle=0.2)
#: Seconds after which everything is done once and no more: all of it is to take ten minutes.
LATE = 450.0
#: More mappings than this are not asked of legacy tables, which would take a minute.
MOST_LEGACY = 1000
#: What is published on each node all along, so that what is measured is one port more on a node in use.
NEIGHBOUR = Wish(7999, CONTAINER_PORT)
PARTS = ("one", "ranges", "idle", "daemons", "proxy", "many")
#: The first of the ports of ranges, of those onto other ports, and of those that are beside.
RANGE, SHIFTED_TO, MANY = 30_000, 40_000, 10_000


class Measurement:
    """The subjects, and what was measured of them: ``figures``, and in ``context`` on what machine."""

    def __init__(self, work: Work, interrupts: Interrupts, opened: contextlib.ExitStack) -> None:
        self._work = work
        self._interrupts = interrupts
        self._began = time.monotonic()
        self.figures = Figures()
        self._say("making a node for each")
        self.ours = [opened.enter_context(Ctrport(name.partition(", ")[2])) for name in rows.OURS]
        self.portmap, self.docker = opened.enter_context(Portmap()), opened.enter_context(Docker())
        self.subjects: tuple[Subject, ...] = (*self.ours, self.portmap, self.docker)
        self.context = context(self.portmap.node)
        self._docker_many: tuple[DockerContainer, Wish]
        self._written = 0  # how many mappings the peers have, or seem to have, beside the range that is kept

    def measure(self, parts: Collection[str]) -> None:
        """Measure everything, or only these of ``PARTS``."""
        self._say("starting the daemons")
        for ours in self.ours:
            ours.start({"neighbour": NEIGHBOUR, "one": ONE, **self._named_ranges()})
            ours.beside("neighbour", NEIGHBOUR)
        todo = {"one": self._one_port, "ranges": self._ranges, "idle": self._idle, "daemons": self._daemons}
        for name, part in todo.items():
            if name in parts:
                part()
        for ours in self.ours:
            ours.stop()
        if "proxy" in parts:
            self._proxy()
        for count in (1, *self._work.beside) if "many" in parts else ():
            self._beside(count)

    # One port, and ranges

    def _one_port(self) -> None:
        for _ in self._turns("one port", self._work.rounds, self._work.seconds):
            for subject in self.subjects:
                added, removed = subject.publish(ONE)
                self._add(rows.ONE, subject.name, added)
                if added.since_start is not None:
                    self.figures.add(rows.START, subject.name, added.since_start)
                self._add(rows.REMOVAL, subject.name, removed)
                self._churn(subject.name, added, removed)
        # Knocking at a port takes time from those who open it, so these are rounds of their own.
        for _ in self._turns("the first packet", self._work.rounds, self._work.seconds / 2):
            for subject in self.subjects:
                answer = subject.answer(ONE)
                if answer is not None:
                    self._add(rows.ANSWER, subject.name, answer)
        for _ in self._turns("what ports cost dockerd", self._work.rounds // 2 or 1, self._work.seconds / 4):
            # What dockerd does for a container beside its port is not to count.
            cost = self.docker.processor(ONE) - self.docker.processor(None)
            self.figures.add(rows.CHURN, self.docker.name, cost * 1000)

    def _churn(self, name: str, added: Took, removed: Took) -> None:
        if added.processor is not None and removed.processor is not None:
            self.figures.add(rows.CHURN, name, (added.processor + removed.processor) * 1000)

    def _ranges(self) -> None:
        for count in self._work.ranges:
            for _ in self._turns(f"a range of {count}", 5, self._work.seconds / 6):
                for ours in self.ours:
                    added, _ = ours.publish(self._range(count), f"range-{count}")
                    self._add(rows.of_range(count), ours.name, added)
                for ours in self.ours:
                    added, _ = ours.publish(self._shifted(count), f"shifted-{count}")
                    self._add(rows.of_shifted(count), ours.name, added)
            if count == self._work.kept:
                continue  # peers take half a minute, and as long to remove it: see _peers_have()
            for peer in self.subjects[len(self.ours) :]:
                for _ in self._turns(f"a range of {count} by {peer.name}", 1 if count >= 100 else 3, 10):
                    added, _ = peer.publish(self._range(count))
                    self._add(rows.of_range(count), peer.name, added)

    def _named_ranges(self) -> dict[str, Wish]:
        """Return the ranges, by how the names of containers begin that publish them."""
        ranges = {f"range-{count}-": self._range(count) for count in self._work.ranges}
        return ranges | {f"shifted-{count}-": self._shifted(count) for count in self._work.ranges}

    @staticmethod
    def _range(count: int) -> Wish:
        return Wish(RANGE, RANGE, count)

    @staticmethod
    def _shifted(count: int) -> Wish:
        return Wish(RANGE, SHIFTED_TO, count)

    # The daemons themselves

    def _idle(self) -> None:
        self._say(f"idle, {self._work.idle:g} s")
        daemons = {ours.name: ours.usage for ours in self.ours} | {self.docker.name: self.docker.usage}
        time.sleep(2)  # until what came before is over
        before = {name: usage.processor() for name, usage in daemons.items()}
        began = time.monotonic()
        time.sleep(self._work.idle)
        for name, usage in daemons.items():
            share = (usage.processor() - before[name]) / (time.monotonic() - began)
            self.figures.add(rows.IDLE, name, share * 100)
        self.figures.add(rows.IDLE, self.portmap.name, 0.0)

    def _daemons(self) -> None:
        """Measure how soon each is ready, and what it has then; leaves the daemons running as they were."""
        for ours in self.ours:
            ours.stop()
        self.docker.stop()
        for _ in self._turns("starts of the daemons", 5, self._work.seconds / 4):
            for ours in self.ours:
                self.figures.add(rows.READY, ours.name, ours.start({"neighbour": NEIGHBOUR}))
                ours.stop()
            self.figures.add(rows.READY, self.docker.name, self.docker.start(proxy=False))
            self.docker.stop()
        count = max(count for count in self._work.beside if count <= 1000)
        many = self._many(count)
        for _ in self._turns(f"starts with {count} mappings", 3, self._work.seconds / 4):
            for ours in self.ours:
                container = ours.node.start("many", command=("/bin/sleep", "3600"))
                self.figures.add(rows.READY_WITH_1000, ours.name, ours.start({"many": many}))
                self.figures.add(rows.MEMORY, ours.name, ours.usage.memory())
                self.figures.add(rows.RESIDENT, ours.name, ours.usage.resident())
                ours.node.delete(container)
                ours.stop()
        self.docker.start(proxy=False)
        for ours in self.ours:
            ours.start({"neighbour": NEIGHBOUR, "one": ONE})

    # Beside many

    def _beside(self, count: int) -> None:
        """Measure one port more, and traffic, where so many are published."""
        many = self._many(count)
        with contextlib.ExitStack() as opened:
            served: list[Ctrport] = []
            targets: list[Target] = []
            for ours in self.ours:
                if ours.backend == "iptables-legacy" and count > MOST_LEGACY:
                    continue
                self._say(f"{count} mappings: {ours.name}")
                ours.start({"many": many, "one": ONE})
                opened.callback(ours.stop)
                container = ours.beside("many", many)
                opened.callback(ours.node.delete, container)
                served.append(ours)
                targets.append(Target(ours.name, ours.node, container, many))
            targets.append(self._peers_have(count))
            if count > 1:
                self._one_more(count, [*served, self.portmap, self.docker])
            if count != self._work.beside[0]:
                self._traffic(count, targets)

    def _peers_have(self, count: int) -> Target:
        """Have so many ports published by the peers; return where traffic goes to of dockerd's.

        The first by themselves, and the range that is kept, which is measured; what is more is written in their form.
        """
        if not self._written:
            self._say("the peers: one port")
            self.portmap.add(self.portmap.container("many"), Wish(MANY, CONTAINER_PORT))
            self._docker_many = self.docker.run("many", Wish(MANY, MANY)), Wish(MANY, MANY)
            self._written = 1
        if count == self._work.kept:
            self._say(f"the peers: a range of {count}, by portmap")
            wish = self._range(count)
            self._add(rows.of_range(count), self.portmap.name, self.portmap.add(self.portmap.container("range"), wish))
            self._say(f"the peers: a range of {count}, by dockerd")
            container, added = self.docker.keep("range", wish)
            self._add(rows.of_range(count), self.docker.name, added)
            return Target(self.docker.name, self.docker.node, container, wish)
        container, wish = self._docker_many
        if count > self._written:
            self._say(f"the peers: {count - self._written} mappings in their form")
            ports = range(MANY + self._written, MANY + count)
            layouts.like_docker(self.docker.node, container.address, MANY, ports)
            layouts.like_portmap(self.portmap.node, MANY, ports)
            self._written = count
        return Target(self.docker.name, self.docker.node, container, replace(wish, count=count))

    def _one_more(self, count: int, subjects: Sequence[Subject]) -> None:
        done = dict.fromkeys((subject.name for subject in subjects), 0.0)
        for _ in self._turns(f"one more beside {count}", 5, self._work.seconds / 3):
            for subject in subjects:
                if done[subject.name] > self._work.seconds / 6:
                    continue  # one that is slow is not to take the others' rounds
                began = time.monotonic()
                added, removed = subject.publish(ONE)
                done[subject.name] += time.monotonic() - began
                self._add(rows.beside(count), subject.name, added)
                self._add(rows.removal_of(count), subject.name, removed)

    def _traffic(self, count: int, targets: Sequence[Target]) -> None:
        places = rows.PLACES if count > 1 else rows.PLACES[:1]
        with contextlib.ExitStack() as opened:
            clients = {target.name: opened.enter_context(Client(target.node.client)) for target in targets}
            with contextlib.ExitStack() as servers:
                for target in targets:
                    target.serve(servers, places)
                for turn in self._turns(f"connections through {count}", 12, self._work.seconds / 3):
                    for target in targets:
                        # Each of them first in its turn: what came just before has its effect.
                        for place in (*places[turn % len(places) :], *places[: turn % len(places)]):
                            port = target.port(place)
                            figure = clients[target.name].connections(target.node.address, port, self._work.turn)
                            self.figures.add(rows.connections(count, place), target.name, figure)
            with contextlib.ExitStack() as servers:
                for target in targets:
                    target.serve(servers, places, reads=True)
                for _ in self._turns(f"throughput through {count}", 4, self._work.seconds / 6):
                    for target in targets:
                        for place in places:
                            port = target.port(place)
                            figure = clients[target.name].megabits(target.node.address, port, self._work.turn)
                            self.figures.add(rows.throughput(count, place), target.name, figure)

    def _proxy(self) -> None:
        """Measure what goes through Docker's userland proxy, and what one for each port and family takes."""
        container = self.docker.run("proxied", None)
        process = self.docker.proxy(container, RANGE)
        with Client(self.docker.node.client) as client:
            with Server(container, RANGE):
                answers(self.docker.node, RANGE)
                for _ in self._turns("connections through the proxy", 12, self._work.seconds / 10):
                    figure = client.connections(self.docker.node.address, RANGE, self._work.turn)
                    self.figures.add(rows.connections(1, rows.PLACES[0]), rows.PROXY, figure)
            with Server(container, RANGE, reads=True):
                answers(self.docker.node, RANGE)
                for _ in self._turns("throughput through the proxy", 4, self._work.seconds / 10):
                    figure = client.megabits(self.docker.node.address, RANGE, self._work.turn)
                    self.figures.add(rows.throughput(1, rows.PLACES[0]), rows.PROXY, figure)
        end_process(process)
        self.docker.remove(container)
        count = 100 if self._work is WHOLE else 5
        self._say(f"dockerd with its proxy, {count} ports")
        self.docker.stop()
        self.docker.start(proxy=True)
        for row, wish in ((rows.ONE, ONE), (rows.of_range(count), self._range(count))):
            added, _ = self.docker.publish(wish)
            self._add(row, rows.PROXY, added)
        container = self.docker.run("hundred", self._range(count))
        self.figures.add(rows.PROXIES, rows.PROXY, self.docker.usage.programs())
        self.docker.stop()
        self.docker.start(proxy=False)

    # What all of them need

    @staticmethod
    def _many(count: int) -> Wish:
        return Wish(MANY, CONTAINER_PORT, count, each=True)

    def _add(self, row: Row, name: str, took: Took) -> None:
        self.figures.add(row, name, took.milliseconds)

    def _turns(self, what: str, most: int, seconds: float) -> Iterator[int]:
        """Yield the numbers of rounds: so many at the most, and none that begins after so many seconds."""
        most = max(1, min(most, self._work.rounds))
        began = time.monotonic()
        if began - self._began > LATE:
            most = 1
        for number in range(most):
            self._interrupts.check()
            if number and time.monotonic() - began > seconds:
                return
            self._say(f"{what}: round {number + 1} of {most}")
            yield number

    def _say(self, what: str) -> None:
        self._interrupts.check()
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        print(f"{minutes:3}:{seconds:02}  {what}", flush=True)


@dataclass(frozen=True)
class Target:
    """Where traffic goes to: a subject's node, and the container that has so many host ports of it."""

    name: str
    node: Node
    container: Place
    wish: Wish

    def port(self, place: str) -> int:
        """Return the host port that stands at that place."""
        offset = {"first": 0, "middle": self.wish.count // 2, "last": self.wish.count - 1}[place]
        return self.wish.host + offset

    def serve(self, opened: contextlib.ExitStack, places: Sequence[str], *, reads: bool = False) -> None:
        """Have servers in the container on what the ports at these places lead to."""
        for port in dict.fromkeys(self.wish.ports[self.port(place)] for place in places):
            opened.enter_context(Server(self.container, port, reads=reads))


def main() -> int:
    """Measure, print, draw, and return the exit status."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure ctrport beside portmap and dockerd.")
    parser.add_argument("--short", action="store_true", help="two rounds of little: whether it works, not how fast")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part, and others that are named")
    parser.add_argument("--to", type=Path, metavar="DIRECTORY", help="where figures.md and its pictures are put")
    arguments = parser.parse_args()
    interrupts = Interrupts()
    try:
        measured = _measure(SHORT if arguments.short else WHOLE, arguments.only or PARTS, interrupts)
    except Unmeasured as reason:
        print(f"bench: {reason}", file=sys.stderr)
        return 130 if interrupts.came else 1
    except KeyboardInterrupt:
        print("\nbench: interrupted; all that was made is removed", file=sys.stderr)
        return 130
    return _conclude(measured, arguments.to)


def _measure(work: Work, parts: Collection[str], interrupts: Interrupts) -> Measurement:
    reason = absent()
    if reason is not None:
        raise Unmeasured(reason)
    with failing(), contextlib.ExitStack() as opened:
        measurement = Measurement(work, interrupts, opened)
        print(measurement.context, flush=True)
        measurement.measure(parts)
        return measurement


def _conclude(measured: Measurement, directory: Path | None) -> int:
    figures = measured.figures
    print(f"\n{table(figures)}\n")
    found = verdicts(figures)
    print(conclusion(found))
    if directory is not None:
        drawn = plots(figures)
        pictures = directory / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        for name, picture in drawn.items():
            (pictures / f"{name}.svg").write_text(picture)
        (directory / "figures.md").write_text(page(figures, measured.context, found, list(drawn)))
        print(f"the same, with pictures: {directory / 'figures.md'}")
    return bool(missed(found))


if __name__ == "__main__":
    sys.exit(main())
