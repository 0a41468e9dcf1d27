"""`make kills`: kill -9 of the daemon at random moments while containers come and go, and look what the next one makes.

    python -m tests.faults.kills [--kills N] [--seed N]

After each restart, with nothing coming or going for a moment: `ctrport plan` has nothing to change, the tables are line
by line those that a daemon writes that starts on a clean node, and what was chosen is what it was. All the time a
client on the LAN connects to a container that stays, and is to be answered each time.

Exit status: 0 all of that was so, 1 it was not, 2 bad usage.
"""

from __future__ import annotations

import argparse
import difflib
import os
import random
import re
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bench.heard import listening, writers
from embedded.container import Container
from embedded.host import CommandError, inside
from embedded.node import Node, missing
from embedded.wait import eventually
from tests.faults.churn import COMING_AND_GOING, CONFIG, FIXED_PORT, STAYS, Churn, Knocking, connection, furnish
from tests.node.daemon import Ctrport

KILLS, MOST_KILLS = 200, 1000

#: When it is killed: whenever it be, shortly after a container began to come or go, right behind a commit of its own to
#: the kernel, which often is not the last one for that change, or while it starts.
Moment = Literal["any time", "a change", "a write", "its start"]
#: Seconds at most from there until the kill.
MOMENTS: dict[Moment, float] = {"any time": 0.8, "a change": 0.15, "a write": 0.005, "its start": 0.6}
#: What the daemon calls to write, as the kernel names the writer of a commit.
WRITERS = ("iptables-nft-re", "ip6tables-nft-r")

_DIGEST = re.compile(r" [0-9a-f]{12}\"")
_PORT = re.compile(r"\b4[0-9]{4}\b")
_OWNER = re.compile(r"\"ctrport default/(\S+) ")

#: What the kernel holds, of whom, sorted; "" is nobody's.
Rules = dict[str, list[str]]


@dataclass
class Report:
    """What was seen in a run."""

    moments: Counter[str] = field(default_factory=Counter)
    #: How the tables were right after the kill: as they should be, behind by some containers, or by half of one.
    left: Counter[str] = field(default_factory=Counter)
    restarts: list[float] = field(default_factory=list)  # milliseconds until it is in line
    kept: int = 0  # chosen ports that were looked at again, and were the same
    seen: Counter[str] = field(default_factory=Counter)
    steps: int = 0

    def __str__(self) -> str:
        moments = ", ".join(f"{count} at {moment}" for moment, count in sorted(self.moments.items()))
        left = ", ".join(f"{count} {how}" for how, count in sorted(self.left.items()))
        answers = ", ".join(f"{count} {what}" for what, count in sorted(self.seen.items()))
        return "\n".join(
            (
                f"kills: {self.moments.total()}: {moments}; {self.steps} containers came or went meanwhile",
                f"tables right after a kill: {left}",
                f"restarts looked at: {len(self.restarts)}, in line after {statistics.median(self.restarts):.0f} ms "
                f"(median), {max(self.restarts):.0f} ms at most",
                "after each: nothing to change, tables as a clean node gets them",
                f"chosen ports found again: {self.kept}, all the same",
                f"connections to the container that stayed, by who answered: {answers}",
            )
        )


class Trial:
    """One run on a node of its own. Raises ``AssertionError`` at the first thing that is not as it should be."""

    def __init__(self, node: Node, seed: int) -> None:
        self.report = Report()
        self._random = random.Random(seed)
        self._node = node
        self._stays = furnish(node)
        self._ctrport = Ctrport(node)
        self._ctrport.configure(CONFIG)
        self._whole: Rules = {}
        self._chosen: dict[Container, list[str]] = {}
        self._churn = Churn(node, self._random.randrange(1 << 32))

    def run(self, kills: int) -> None:
        """Kill it so often, and look at the end whether a clean node would have got the same."""
        self._begin()
        ports = sorted({int(port) for port in re.findall(r"--dport (\d+) .*", "\n".join(self._tcp_of_stays()))})
        assert FIXED_PORT in ports
        with connection(self._node, FIXED_PORT), Knocking(self._node, ports) as knocking, self._churn:
            while self.report.moments.total() < kills:
                self._kill()
                assert knocking.unanswered == 0, f"somebody was not answered: {knocking.seen}"
            with self._churn.resting():
                pass
        assert knocking.unanswered == 0, f"somebody was not answered: {knocking.seen}"
        self.report.seen, self.report.steps = knocking.seen, self._churn.steps
        self._compare_with_a_clean_node()

    def _begin(self) -> None:
        """Learn what a daemon writes that starts on a clean node, of each container."""
        with self._churn.resting() as running:
            for name in COMING_AND_GOING:
                self._churn.start(name)
            self._ctrport.start()
            self._whole = self._held(running)
            assert set(self._whole) == {"", STAYS, *COMING_AND_GOING}
            self._look(running)

    def _tcp_of_stays(self) -> list[str]:
        """Return the rules that lead to the container that stays from elsewhere."""
        lines = self._node.run("iptables-nft", "-t", "nat", "-S", "DOCKER").stdout.splitlines()
        return [line for line in lines if f"default/{STAYS} " in line and "-d 127.0.0.1/32" not in line]

    def _kill(self) -> None:
        moment = self._random.choice(list(MOMENTS))
        if moment == "its start":
            # The one that was in line is killed at any time, so that this one has something to do.
            self._strike("any time")
            self._ctrport.start(wait=False)
        elif moment == "a change":
            self._churn.step_begins()
        elif moment == "a write":
            self._written()
        self._strike(moment)
        with self._churn.resting() as running:
            self.report.left[self._left(self._held(running), self._wanted(running))] += 1
        if self._random.random() < 0.5:
            self._churn.step_begins()
        began = time.monotonic()
        self._restart()
        self.report.restarts.append((time.monotonic() - began) * 1000)
        with self._churn.resting() as running:
            self._look(running)

    def _written(self) -> None:
        """Return right behind a commit of the daemon's."""
        with inside(self._node.pid, ("net",), listening) as commits:
            commits.settimeout(10)
            while not set(writers(commits.recv(1 << 16))) & set(WRITERS):
                pass

    def _strike(self, moment: Moment) -> None:
        """Wait for as long as chance has it, and kill the daemon, alone or with all that it has started."""
        time.sleep(self._random.uniform(0, MOMENTS[moment]))
        if self._random.random() < 0.5:
            os.killpg(self._ctrport.pid, signal.SIGKILL)
        assert self._ctrport.stop(signal.SIGKILL) == -signal.SIGKILL, self._ctrport.messages[-2000:]
        self.report.moments[moment] += 1

    def _restart(self) -> None:
        # What the killed one said of itself is still there, and so is its name for being in line.
        former = self._ctrport.status().get("pid")
        self._ctrport.start(wait=False)
        eventually(
            lambda: self._ctrport.status().get("pid") != former and self._ctrport.in_line(), what="it being in line"
        )

    def _look(self, running: Mapping[str, Container]) -> None:
        def as_wanted() -> bool:
            held, wanted = self._held(running), self._wanted(running)
            assert held == wanted, "\n".join(difflib.unified_diff(_lines(wanted), _lines(held), "wanted", "held", n=0))
            return True

        eventually(as_wanted, what="the tables being as a daemon would write them anew")
        planned = self._ctrport.run("plan", "--config", str(self._ctrport.config), check=False)
        assert (planned.returncode, planned.stdout) == (0, "nothing to change\n"), planned.stdout
        self._look_at_chosen(running)
        assert "Traceback" not in self._ctrport.messages, self._ctrport.messages[-4000:]

    def _look_at_chosen(self, running: Mapping[str, Container]) -> None:
        """See that each container that was there the last time has the very rules it had, ports and all."""
        found: dict[Container, list[str]] = {container: [] for container in (self._stays, *running.values())}
        names = {container.id: container for container in found}
        for line in self._node.tables().splitlines():
            owner = _OWNER.search(line)
            if owner is not None:
                found[names[owner[1]]].append(line)
        for container, lines in found.items():
            before = self._chosen.get(container)
            if before is not None:
                assert sorted(lines) == sorted(before), f"{container.id} has other ports than it had"
                self.report.kept += len(set(re.findall(r"--dport (4\d{4}) ", "\n".join(lines))))
        self._chosen = found

    def _held(self, running: Mapping[str, Container]) -> Rules:
        """Return what the kernel holds, by whose it is, in words that are the same for the next such container."""
        places = {}
        for container in (self._stays, *running.values()):
            for address in (container.address, container.address6):
                assert address is not None
                places[address] = f"<{container.id}>"
        named = re.compile("|".join(rf"(?<![0-9a-f.:]){re.escape(place)}(?![0-9a-f.])" for place in places))
        rules: Rules = {}
        table = ""
        for line in self._node.tables().splitlines():
            if line.startswith("ip"):
                table = line
            elif line:
                owner = _OWNER.search(line)
                text = named.sub(lambda found: places[found[0]], _DIGEST.sub('"', line))
                rules.setdefault(owner[1] if owner else "", []).append(f"{table} {_PORT.sub('CHOSEN', text)}")
        return {owner: sorted(lines) for owner, lines in rules.items()}

    def _left(self, held: Rules, wanted: Rules) -> str:
        """Return in a word or two how far a daemon had come that is no more."""
        if held == wanted:
            return "as they should be"
        # What is named by its bare address is of a container that has gone, or is another by now.
        begun = {owner: len(set(lines) & set(self._whole[owner])) for owner, lines in held.items()}
        halves = any(0 < count < len(self._whole[owner]) for owner, count in begun.items() if owner in wanted)
        return "half written" if halves else "behind"

    def _wanted(self, running: Mapping[str, Container]) -> Rules:
        return {owner: self._whole[owner] for owner in ("", STAYS, *running)}

    def _compare_with_a_clean_node(self) -> None:
        with self._churn.resting() as running:
            grown = self._held(running)
            assert self._ctrport.stop() == 0
            self._ctrport.run("clean")
            assert "ctrport" not in self._node.tables()
            self._ctrport.forget()
            self._ctrport.start()
            assert self._held(running) == grown
            assert self._ctrport.stop() == 0


def _lines(rules: Rules) -> list[str]:
    return [line for owner in sorted(rules) for line in rules[owner]]


def tried(kills: int, seed: int) -> Report:
    """Kill it so often, on a node that is gone afterwards. Raises ``AssertionError`` where anything is not right."""
    with Node() as node:
        trial = Trial(node, seed)
        trial.run(kills)
        return trial.report


def main(argv: Sequence[str] | None = None) -> int:
    """Kill, look, print, and return the exit status."""
    parser = argparse.ArgumentParser(prog="kills", description="kill -9 of the daemon while containers come and go.")
    parser.add_argument("--kills", type=int, choices=range(1, MOST_KILLS + 1), default=KILLS, metavar="N")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), metavar="N")
    arguments = parser.parse_args(argv)
    reason = missing()
    if reason is not None:
        print(f"kills: {reason}", file=sys.stderr)
        return 1
    print(f"seed: {arguments.seed}", flush=True)
    begin = time.monotonic()
    try:
        report = tried(arguments.kills, arguments.seed)
    except (AssertionError, CommandError) as error:
        print(f"kills: {error}", file=sys.stderr)
        return 1
    print(report)
    print(f"took {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
