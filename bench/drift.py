"""How soon rules that were taken away are back, and what a neighbour costs that writes all the time.

    python -m bench.drift [--rounds N] [--seconds N]

Exit status: 0 the targets are reached, 1 they are not or could not be measured, 2 bad usage. All that it makes is
removed in each case.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.commits import Commits
from bench.ground import SERVER, Unmeasured, measured_node
from demo.demo import Daemon
from demo.measure import Knocking
from embedded.node import Node
from embedded.wait import eventually

MAPPINGS, FIRST, CONTAINER_PORT = 100, 8000, 80
FOREIGN = 20_000
#: Milliseconds from a flush until the port works again, by the median; and the part of a core that may be spent beside
#: a busy neighbour.
SOON, SHARE = 50.0, 0.01
RULESET = ("nft", "flush", "ruleset")
NAT = ("iptables-nft", "-t", "nat", "-F", "DOCKER")


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(prog="drift", description="Measure how drift is repaired.")
    parser.add_argument("--rounds", type=int, default=15, choices=range(1, 101), metavar="N", help="flushes of a kind")
    parser.add_argument(
        "--seconds", type=int, default=20, choices=range(2, 301), metavar="N", help="beside a neighbour"
    )
    arguments = parser.parse_args()
    try:
        with measured_node() as node:
            return _measure(node, arguments.rounds, arguments.seconds)
    except Unmeasured as reason:
        print(f"drift: {reason}", file=sys.stderr)
        return 1


def _measure(node: Node, rounds: int, seconds: int) -> int:
    node.add_network("docker0", ip_masq=False)
    ports = ", ".join(f'"{FIRST + number}:{CONTAINER_PORT}"' for number in range(MAPPINGS))
    config = node.directory / "config.yaml"
    config.write_text(f"publish:\n  - match: {{namespace: default, container: web}}\n    ports: [{ports}]\n")
    daemon = Daemon(node, config)
    daemon.start()
    node.start("web", command=SERVER)
    _answers(node)
    print(f"{MAPPINGS} mappings, rounds of each: {rounds}\n")
    print(f"{'milliseconds':<52} {'min':>8} {'median':>8} {'max':>8}")
    by_hand = _row("all rules written by hand, exec -> exit", rounds, lambda: _by_hand(node))
    with Commits(node) as commits:
        flushed = _row("nft flush ruleset -> LAN client connected", rounds, lambda: _flushed(node, commits, *RULESET))
    node.run("iptables-nft-restore", "--noflush", input=_foreign(0))
    with Commits(node) as commits:  # anew, as it hears of every rule and would not keep up with all of those
        title = f"DOCKER flushed beside {FOREIGN} rules -> connected"
        beside = _row(title, rounds, lambda: _flushed(node, commits, *NAT))
    idle = _share(daemon.pid, seconds, lambda: None)
    started = _processor(os.getpid())
    busy = _share(daemon.pid, seconds, _neighbour(node))
    neighbour = (_processor(os.getpid()) - started) / seconds
    daemon.stop()
    print(f"\nof a core, {seconds} s each: idle {idle:.2%}; beside who writes {FOREIGN} rules a second {busy:.2%}")
    print(f"that is {busy / neighbour:.4f} of what the neighbour takes itself ({neighbour:.1%})")
    print(f"a flush is made good in {flushed / by_hand:.1f} times what writing the rules takes by hand")
    missed = [f"{value:.1f} ms" for value in (flushed, beside) if value > SOON]
    missed += [f"{busy:.2%} of a core"] if busy > SHARE else []
    print(f"MISSED: {', '.join(missed)}" if missed else f"held: within {SOON:g} ms, and {SHARE:.0%} of a core")
    return bool(missed)


def _row(title: str, rounds: int, measure: Callable[[], float]) -> float:
    taken = [measure() for _ in range(rounds)]
    print(f"{title:<52} {min(taken):8.1f} {statistics.median(taken):8.1f} {max(taken):8.1f}", flush=True)
    return statistics.median(taken)


def _flushed(node: Node, commits: Commits, *command: str) -> float:
    """Take rules away as ``command`` does, and return how long a client on the LAN was without an answer."""
    began = time.time_ns()
    node.run(*command)
    with Knocking(node.client, node.address, FIRST) as knocking:
        assert knocking.answered.wait(10), "the port stayed closed"
    assert knocking.opened is not None
    gone = commits.last({command[0][:15]}, began)
    _answers(node)
    return knocking.opened.timestamp() * 1e3 - gone / 1e6


def _by_hand(node: Node) -> float:
    """Return how long writing the same rules takes who has them in a file."""
    saved = {program: node.run(f"{program}-save").stdout for program in ("iptables-nft", "ip6tables-nft")}
    began = time.monotonic()
    for program, text in saved.items():
        node.run(f"{program}-restore", input=text)
    took = (time.monotonic() - began) * 1000
    _answers(node)
    return took


def _foreign(turn: int) -> str:
    """Return what kube-proxy might write: chains of its own, each with some rules, and none of ours."""
    chains = [f"KUBE-SEP-{number:05}" for number in range(FOREIGN // 10)]
    lines = ["*nat", *(f":{chain} - [0:0]" for chain in chains)]
    for chain in chains:
        lines += [f"-A {chain} -s 10.{turn % 250}.{rule}.1/32 -j RETURN" for rule in range(10)]
    return "\n".join([*lines, "COMMIT", ""])


def _neighbour(node: Node) -> Callable[[], None]:
    turn = 0

    def write() -> None:
        nonlocal turn
        turn += 1
        node.run("iptables-nft-restore", "--noflush", input=_foreign(turn))

    return write


def _share(pid: int, seconds: int, each_second: Callable[[], None]) -> float:
    """Return the part of a core that a process and those it ran took, while something happens every second."""
    before, began = _processor(pid), time.monotonic()
    for second in range(1, seconds + 1):
        each_second()
        time.sleep(max(0.0, began + second - time.monotonic()))
    return (_processor(pid) - before) / (time.monotonic() - began)


def _processor(pid: int) -> float:
    """Return the seconds of processor time that a process has taken, and the programs that it ran."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _answers(node: Node) -> None:
    for port in (FIRST, FIRST + MAPPINGS - 1):
        eventually(partial(_connects, node, port), what=f"port {port} being open for the LAN")


def _connects(node: Node, port: int) -> bool:
    with node.client.socket() as client:
        client.settimeout(0.5)
        return client.connect_ex((node.address, port)) == 0


if __name__ == "__main__":
    sys.exit(main())
