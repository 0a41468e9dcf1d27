"""`make soak`: containers come and go and others write to the tables, for minutes: does the daemon grow?

    python -m tests.faults.soak [--minutes N]

At the start, each minute and at the end all is given time to become as it was in the beginning, with the one container
that stays, and the daemon is measured: resident memory, open files, programs that it has started. The first quarter is
what it takes to get used to the work; what comes after it must be flat.

Exit status: 0 it is flat, 1 it is not or could not be measured, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedded.host import LIFETIME, CommandError
from embedded.node import Node, missing
from embedded.wait import eventually
from tests.faults.churn import CONFIG, FIXED_PORT, Churn, Knocking, furnish, others
from tests.node.daemon import Ctrport

MINUTES, MOST_MINUTES = 10.0, LIFETIME / 60 - 5
#: Samples there are at least, however short the run, and seconds between two at most.
SAMPLES, APART = 6, 60.0
#: What part of the run is not judged.
WARM_UP = 0.25
#: KiB of memory that may be added in a minute, about 500 events: less than a leak of 300 bytes an event.
SLOPE = 128.0
#: KiB that may be added all along: in the first minutes the daemon still gets used to the work. The longer the run, the
#: smaller the leak that it finds.
GRAIN = 2048.0


@dataclass(frozen=True)
class Sample:
    """The daemon while nothing comes or goes. ``second`` is since the start, as are the last three."""

    second: float
    memory: int  # KiB
    files: int
    programs: int
    events: int
    transactions: int
    repairs: int


@dataclass(frozen=True)
class Verdict:
    """What became of memory, in KiB a minute, and what is not flat, in a sentence each."""

    slope: float
    wrong: tuple[str, ...]


def judged(samples: Sequence[Sample]) -> Verdict:
    """Judge samples in their order, two or more."""
    warm = [each for each in samples if each.second >= WARM_UP * samples[-1].second]
    first, last = warm[0], warm[-1]
    slope = 60 * _slope([(each.second, each.memory) for each in warm])
    wrong = []
    if slope > SLOPE and slope * (last.second - first.second) / 60 > GRAIN:
        wrong.append(f"memory grows by {slope:.0f} KiB a minute ({SLOPE:.0f} may be)")
    for what, before, after in (
        ("open files", first.files, last.files),
        ("programs", first.programs, last.programs),
    ):
        if after > before:
            wrong.append(f"{what}: {before} became {after}")
    return Verdict(slope, tuple(wrong))


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the line that is nearest to all points."""
    x_mean, y_mean = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / spread if spread else 0.0


class Measured:
    """A daemon that is measured. Each of its figures is since this was made."""

    def __init__(self, ctrport: Ctrport) -> None:
        self._ctrport = ctrport
        self._began = time.monotonic()
        self._before = ctrport.status()

    def sample(self, churn: Churn) -> Sample:
        """Let all that comes and goes be gone and written, and measure."""
        with churn.resting() as running:
            for name in list(running):
                churn.delete(name)
            eventually(self._rests, within=20, what="the daemon having nothing to do")
            proc = Path("/proc", str(self._ctrport.pid))
            status = self._ctrport.status()
            since = {what: status[what] - self._before[what] for what in ("events", "transactions", "repairs")}
            return Sample(
                time.monotonic() - self._began,
                int((proc / "status").read_text().partition("VmRSS:")[2].split()[0]),
                len(list((proc / "fd").iterdir())),
                len((proc / "task" / proc.name / "children").read_text().split()),
                **since,
            )

    def _rests(self) -> bool:
        """Whether it publishes what it did at the start, and the kernel holds that."""
        log = self._ctrport.messages[-2000:]
        assert self._ctrport.in_line(), log
        differing = _active(self._ctrport.status()) ^ _active(self._before)
        assert not differing, f"{sorted(differing)}\n{log}"
        planned = self._ctrport.run("plan", "--config", str(self._ctrport.config), check=False)
        assert planned.returncode == 0, f"{planned.stdout}{planned.stderr}{log}"
        return True


def _active(status: dict[str, Any]) -> set[tuple[str, str]]:
    return {(each["container"], each["bound"]) for each in status["publications"] if each["state"] == "active"}


@contextlib.contextmanager
def _failing() -> Iterator[list[str]]:
    """Turn what goes wrong into the line that says so, in what is given."""
    failed: list[str] = []
    try:
        yield failed
    except (AssertionError, CommandError, OSError) as error:
        failed.append(str(error))


def soaked(minutes: float, seed: int) -> Iterator[Sample]:
    """Yield each sample as it is taken. Raises ``AssertionError`` where the daemon does not do its work."""
    with Node() as node:
        furnish(node)
        ctrport = Ctrport(node)
        ctrport.configure(CONFIG)
        ctrport.start()
        measured, end = Measured(ctrport), 60 * minutes
        apart = min(APART, end / (SAMPLES - 1))
        churn = Churn(node, seed, also=others(node))
        began = time.monotonic()
        yield measured.sample(churn)
        with churn:
            count = round(end / apart)
            for number in range(1, count + 1):
                time.sleep(max(0.0, began + number * apart - time.monotonic()))
                yield measured.sample(churn)
        with Knocking(node, [FIXED_PORT]) as knocking:
            eventually(lambda: knocking.seen, what="the container that stays being asked")
        assert knocking.unanswered == 0, f"the container that stays is not reached: {knocking.seen}"
        assert "Traceback" not in ctrport.messages, ctrport.messages[-4000:]
        assert ctrport.stop() == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, print, and return the exit status."""
    arguments = _parser().parse_args(argv)
    reason = missing()
    if reason is not None:
        print(f"soak: {reason}", file=sys.stderr)
        return 1
    print(f"seed: {arguments.seed}", flush=True)
    print("  second  memory/KiB  files  programs  events  transactions  repairs")
    samples: list[Sample] = []
    try:
        with _failing() as failed:
            for each in soaked(arguments.minutes, arguments.seed):
                samples.append(each)
                print(
                    f"{each.second:8.1f} {each.memory:11} {each.files:6} {each.programs:9} {each.events:7} "
                    f"{each.transactions:13} {each.repairs:8}",
                    flush=True,
                )
    except KeyboardInterrupt:
        print("\nsoak: interrupted; all that was made is removed", file=sys.stderr)
        return 130
    if failed:
        print(f"soak: {failed[0]}", file=sys.stderr)
        return 1
    verdict = judged(samples)
    print(f"\nmemory after the first quarter: {verdict.slope:+.1f} KiB a minute")
    for sentence in verdict.wrong:
        print(f"NOT FLAT: {sentence}")
    if not verdict.wrong:
        print("flat")
    return 1 if verdict.wrong else 0


def _parser() -> argparse.ArgumentParser:
    def length(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0.1 <= float(text) <= MOST_MINUTES:
                return float(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0.1 to {MOST_MINUTES:g}")

    parser = argparse.ArgumentParser(prog="soak", description="See that the daemon does not grow.")
    parser.add_argument("--minutes", type=length, default=MINUTES, metavar="N", help=f"default {MINUTES:g}")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), metavar="N")
    return parser


if __name__ == "__main__":
    sys.exit(main())
