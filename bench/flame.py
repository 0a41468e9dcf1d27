"""Where the time goes from when a container has its network until the kernel holds its rules: a flame graph.

    python -m bench.flame [--starts N] [--mappings N ...] [--backend NAME] [--to FILE]

Containers are started one after another on a node made of namespaces, beside as many mappings of another one as are
asked for, and the daemon is looked at all along (see ``bench.sampled``). With several such numbers each has a node of
its own, the picture is of the first, and it is said how much longer it took beside the others. Exit status: 0 drawn, 1
it could not be measured, 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.ground import (
    CONTAINER_PORT,
    LONG_PATIENCE,
    PATIENCE,
    ROOT,
    SERVER,
    Unmeasured,
    answers,
    measured_node,
    refuses,
)
from bench.sampled import MEANWHILE, SAMPLED, WAITING
from bench.svg import Drawing, fitting
from ctrport.reconcile import INTERVAL
from embedded.host import end_process
from embedded.node import Node
from embedded.wait import eventually

STARTS, MOST_STARTS = 40, 400
#: Seconds between two starts: what comes faster is taken for a flood, and written together (see reconcile.BURST).
PAUSE = 3 * INTERVAL
#: The first of the host ports of the container that is there all along.
FIRST, MOST_MAPPINGS = 20_000, 20_000
PICTURE = ROOT / "bench" / "event.svg"

#: The names of each stack that was seen on one way, outermost first, and the milliseconds that it was there.
Stacks = Sequence[tuple[Sequence[str], float]]

#: Milliseconds below which a box is left out.
LEAST = 0.02
WIDTH, ROW, MARGIN, HEAD, FONT = 1200.0, 17.0, 10.0, 62.0, 11.0
_COLOURS = {
    WAITING: "#c8ccd4",
    MEANWHILE: "#e3e5ea",
    "grpc": "#e8b07a",
    "asyncio": "#b5c7a3",
    "other": "#d9c9e0",
    "ours": "#8fb6d9",
}


@dataclass
class Box:
    """What was on the stack at one depth: for how many milliseconds of one way, and what stood on top of it."""

    name: str
    milliseconds: float = 0.0
    above: dict[str, Box] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """How many boxes are on top of each other."""
        return 1 + max((box.depth for box in self.above.values() if box.milliseconds >= LEAST), default=0)


def main() -> int:
    """Measure, draw, and return the exit status."""
    parser = argparse.ArgumentParser(prog="flame", description="Draw where the time of one start goes.")
    parser.add_argument("--starts", type=int, default=STARTS, choices=range(1, MOST_STARTS + 1), metavar="N")
    parser.add_argument(
        "--mappings", type=int, default=[10], nargs="+", choices=range(1, MOST_MAPPINGS + 1), metavar="N"
    )
    parser.add_argument("--backend", default="nftables", choices=("nftables", "iptables-nft"))
    parser.add_argument("--to", type=Path, default=PICTURE, metavar="FILE")
    arguments = parser.parse_args()
    ways: list[Box] = []
    try:
        for mappings in arguments.mappings:
            with measured_node() as node:
                taken = usual(_measure(node, arguments.backend, arguments.starts, mappings))
            ways.append(boxes(taken))
            print(f"{arguments.backend}, beside {mappings} mappings, the mean of the middle {len(taken)} starts:")
            _say(ways[-1])
    except Unmeasured as reason:
        print(f"flame: {reason}", file=sys.stderr)
        return 1
    for mappings, way in zip(arguments.mappings[1:], ways[1:], strict=True):
        whole, own = (part(way) / part(ways[0]) for part in (_whole, _own))
        print(f"beside {mappings} mappings: {whole:.2f} times as long in all, {own:.2f} times in the daemon itself")
    title = f"One event's way: {_whole(ways[0]):.1f} ms from a container's address to its rules ({arguments.backend}"
    remark = f"the mean of {arguments.starts} starts, but for the slowest and the quickest tenth"
    arguments.to.write_text(picture(ways[0], f"{title}, beside {arguments.mappings[0]} mappings)", remark))
    return 0


def _say(way: Box) -> None:
    for name, milliseconds in sorted(_flat(way).items(), key=lambda each: -each[1])[:12]:
        print(f"{milliseconds:8.2f} ms  {name}")
    print(f"{_whole(way):8.2f} ms in all, {_own(way):.2f} ms of it in the daemon itself", flush=True)


def _whole(way: Box) -> float:
    return way.milliseconds


def _own(way: Box) -> float:
    """Return what the daemon itself took: all but what it waited for, and the looks at it."""
    return sum(own for name, own in _flat(way).items() if name != WAITING and not name.startswith("bench."))


def _measure(node: Node, backend: str, starts: int, mappings: int) -> list[Stacks]:
    node.add_network("docker0")
    ports = ", ".join(f'"{FIRST + number}:{CONTAINER_PORT}"' for number in range(max(1, mappings)))
    config = node.directory / "etc" / "config.yaml"
    config.parent.mkdir()
    config.write_text(
        f"firewall: {{backend: {backend}}}\npublish:\n"
        f"  - match: {{namespace: default, container: neighbour}}\n    ports: [{ports}]\n"
        f'  - match: {{namespace: default, container: "{SAMPLED}*"}}\n    ports: ["8080:{CONTAINER_PORT}"]\n'
    )
    seen, log = node.directory / "seen.json", node.directory / "ctrport.log"
    argv = (sys.executable, "-m", "bench.sampled", str(seen), "run", "--config", str(config))
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{ROOT / 'daemon'}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with log.open("w") as written:
        daemon = node.spawn(*argv, env=environment, stderr=written)
    status = node.path("/run/ctrport/status.json")

    def active() -> list[str]:
        if not status.exists():
            return []
        found = json.loads(status.read_text())["publications"]
        return [publication["container"] for publication in found if publication["state"] == "active"]

    eventually(status.exists, within=PATIENCE, what="the daemon's status")
    node.start("neighbour", command=SERVER)
    count = max(1, mappings)
    eventually(lambda: len(active()) >= count, within=LONG_PATIENCE, what=f"{count} publications")
    for number in range(starts):
        container = node.start(f"{SAMPLED}{number}", command=SERVER)
        answers(node, 8080)  # of thousands the status is written seldom
        node.delete(container)
        refuses(node, 8080)
        time.sleep(PAUSE)
    end_process(daemon, within=PATIENCE)
    found: list[Stacks] = json.loads(seen.read_text())
    if not found:
        raise Unmeasured("no start was seen")
    return found


def usual(ways: Sequence[Stacks]) -> Sequence[Stacks]:
    """Return all but the slowest and the quickest tenth: some are held up by what was under way already."""
    in_order = sorted(ways, key=lambda way: sum(milliseconds for _, milliseconds in way))
    off = len(in_order) // 10
    return in_order[off : len(in_order) - off]


def boxes(ways: Sequence[Stacks]) -> Box:
    """Return what was seen as boxes on boxes, for one way out of these: their mean."""
    root = Box("one event")
    for stack, milliseconds in (each for way in ways for each in way):
        box = root
        box.milliseconds += milliseconds / len(ways)
        for name in stack:
            box = box.above.setdefault(name, Box(name))
            box.milliseconds += milliseconds / len(ways)
    return root


def _flat(root: Box) -> dict[str, float]:
    """Return how long each was on top, with what it did itself."""
    found: dict[str, float] = {}
    todo = [root]
    while todo:
        box = todo.pop()
        todo += box.above.values()
        own = box.milliseconds - sum(each.milliseconds for each in box.above.values())
        found[box.name] = found.get(box.name, 0.0) + own
    return found


def picture(root: Box, title: str, remark: str) -> str:
    """Return the flame graph as SVG: each box as wide as its time, and below what stands on it."""
    height = HEAD + root.depth * ROW + MARGIN
    drawing = Drawing(WIDTH, height)
    drawing.text(MARGIN, 24, title, size=15, bold=True)
    drawing.text(MARGIN, 44, f"{remark}; below each what it called, or waited for", fill="#666666")
    x = WIDTH - MARGIN
    for name, colour in (("ctrport", "ours"), ("gRPC", "grpc"), ("asyncio", "asyncio"), ("other", "other")):
        x -= 74
        drawing.rect(x, 33, 11, 11, _COLOURS[colour])
        drawing.text(x + 16, 43, name, size=FONT)
    _draw(drawing, root, MARGIN, HEAD, (WIDTH - 2 * MARGIN) / root.milliseconds)
    return drawing.to_svg()


def _draw(drawing: Drawing, box: Box, x: float, y: float, scale: float) -> None:
    width = box.milliseconds * scale
    drawing.rect(
        x, y, max(0.5, width - 0.5), ROW - 1, _colour(box.name), title=f"{box.name}: {box.milliseconds:.2f} ms"
    )
    drawing.text(x + 3, y + ROW - 5, fitting(f"{box.name} {box.milliseconds:.2f}", width - 6, FONT), size=FONT)
    for each in sorted(box.above.values(), key=lambda each: (-each.milliseconds, each.name)):
        if each.milliseconds >= LEAST:
            _draw(drawing, each, x, y + ROW, scale)
        x += each.milliseconds * scale


def _colour(name: str) -> str:
    if name in _COLOURS:
        return _COLOURS[name]
    package = name.partition(".")[0]
    if package in _COLOURS:
        return _COLOURS[package]
    ours = (ROOT / "daemon" / "ctrport" / f"{package}.py").exists() or package in ("firewall", "one event")
    return _COLOURS["ours" if ours else "other"]


if __name__ == "__main__":
    sys.exit(main())
