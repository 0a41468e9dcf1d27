"""Publish a real Redis with ctrport, on a node made of namespaces, and show at each step that it holds.

    python -m demo.demo [--config FILE]

Exit status: 0 every step held, 1 one did not, 130 interrupted. All that it makes is removed in each case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

from demo import redis
from demo.measure import PAUSE, Knocking, started_at
from embedded.container import Container
from embedded.host import CommandError
from embedded.node import CGROUPS, Node, missing
from embedded.traffic import Refused, probe_tcp
from embedded.wait import eventually

ROOT = Path(__file__).resolve().parent.parent
PORT = 6379
CONFIG = """\
publish:
  - match: {namespace: default, container: redis}
    ports: ["6379:6379"]
"""
#: Seconds that anything of a step may take before it counts as failed.
PATIENCE = 10.0


class Failed(Exception):
    """A step did not hold; the message is one line for people, ``log`` is what ctrport logged until then."""

    log = ""


class Story:
    """What is printed: numbered steps, and under each what was seen. In colour on a terminal.

    An interrupt takes effect where the story would go on, never in the middle of a step: a child that was just being
    started would be lost, and what it runs in could not end.
    """

    def __init__(self) -> None:
        self.interrupted = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)
        self._colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._step = 0

    def step(self, title: str) -> None:
        """Begin the next step."""
        self.go_on()
        self._step += 1
        self._print(f"\n{self._in('1', f'{self._step}. {title}')}")

    def fact(self, text: str) -> None:
        """Say what was done or seen."""
        self.go_on()
        self._print(f"   {text}")

    def listing(self, text: str) -> None:
        """Show what a command printed, or a file holds."""
        self._print(self._in("36", textwrap.indent(text.rstrip("\n"), "     ")))

    def good(self, text: str) -> None:
        """Say that something held."""
        self.go_on()
        self._print(f"   {self._in('32', 'ok')} {text}")

    def failed(self, failed: Failed) -> None:
        """Say that the step did not hold."""
        self._print(f"   {self._in('1;31', 'FAILED')} step {self._step}: {failed}")
        if failed.log:
            self._print("   what ctrport logged:")
            self.listing(failed.log)

    def go_on(self) -> None:
        """Raise KeyboardInterrupt where an interrupt came."""
        if self.interrupted:
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True

    def _in(self, colour: str, text: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if self._colours else text

    def _print(self, text: str) -> None:
        print(text, flush=True)


class Daemon:
    """ctrport on the node, told by the same protocol as under systemd when it is ready.

    ``env`` is added to its environment.
    """

    def __init__(self, node: Node, config: Path, env: Mapping[str, str] | None = None) -> None:
        self._env = dict(env or {})
        self.log = node.directory / "ctrport.log"
        self._node = node
        self._config = config
        self._process: subprocess.Popen[str] | None = None

    def start(self, *, within: float = PATIENCE) -> None:
        """Start it and wait until it says READY=1, which it does once the kernel holds what it should."""
        address = self._node.directory / "notify"
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified, self.log.open("a") as log:
            notified.bind(str(address))
            notified.settimeout(0.05)
            env = {**self._environment, "PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(address)}
            self._process = self._node.spawn(*self._argv("run", "--config", str(self._config)), env=env, stderr=log)
            process = self._process

            def ready() -> bool:
                if process.poll() is not None:
                    raise Failed(f"ctrport ended with status {process.returncode} instead of becoming ready")
                with contextlib.suppress(TimeoutError):
                    # All that there is, as systemd reads it: the daemon may have a thousand sockets held before.
                    while "READY=1" not in notified.recv(4096).decode().splitlines():
                        pass
                    return True
                return False

            _held(eventually(ready, within=within, what="ctrport being ready"), "ctrport did not become ready")

    @property
    def pid(self) -> int:
        """The daemon's number on the machine."""
        assert self._process is not None
        return self._process.pid

    def command(self, *arguments: str) -> str:
        """Run a command of ctrport's on the node, and return what it prints."""
        return self._node.run(*self._argv(*arguments), env=self._environment).stdout

    def stop(self) -> int:
        """End it as systemd would, and return its exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(PATIENCE)

    @property
    def messages(self) -> str:
        """What it has logged."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def _environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(ROOT / "daemon"), "PYTHONDONTWRITEBYTECODE": "1", **self._env}

    @staticmethod
    def _argv(*arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "ctrport", *arguments)


def main() -> int:
    """Tell the story, and return the exit status."""
    parser = argparse.ArgumentParser(prog="demo", description="Publish a real Redis on a node made of namespaces.")
    parser.add_argument("--config", metavar="FILE", help="run the daemon with this configuration, not the demo's own")
    arguments = parser.parse_args()
    config = CONFIG if arguments.config is None else Path(arguments.config).read_text()
    absent = missing() or next((f"{name} is not installed" for name in _PROGRAMS if shutil.which(name) is None), None)
    if absent is not None:
        print(f"demo: {absent}", file=sys.stderr)
        return 1
    story = Story()
    try:
        directory = _tell(story, config)
        story.step("Remove what was made")
        left = _left_of(directory)
        _held(not left, f"still there: {', '.join(left)}")
        story.good("no process, file, mount or cgroup of it is left; the namespaces went with their processes")
    except (Failed, KeyboardInterrupt) as end:
        if isinstance(end, Failed) and not story.interrupted:
            story.failed(end)
            return 1
        # In a terminal an interrupt also ends the program that is being run, which is no failure.
        print("\ndemo: interrupted; all that was made is removed", file=sys.stderr)
        return 130
    print("\nEvery step held.")
    return 0


_PROGRAMS = ("redis-server", "redis-cli", "conntrack", "ldd")


def _left_of(directory: Path) -> list[str]:
    """Return what is still there of a node that had this directory: its name is in all that it made."""
    left = [str(path) for path in (directory, *CGROUPS.glob(directory.name), *CGROUPS.glob(f"*/{directory.name}"))]
    left = [path for path in left if Path(path).exists()]
    left += ["a mount"] if directory.name in Path("/proc/self/mounts").read_text() else []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if directory.name in (process / "cmdline").read_text(errors="replace"):
                left.append(f"process {process.name}")
    return left


def _tell(story: Story, config: str) -> Path:
    """Go through the steps on a node that is gone on return, and return the directory it had."""
    story.step("Build a node in network namespaces, and a LAN client beside it")
    with contextlib.ExitStack() as opened:
        with _failing():
            node = opened.enter_context(Node())
        daemon = Daemon(node, node.directory / "config.yaml")
        try:
            with _failing():
                _publish(story, node, daemon, config)
        except Failed as failed:
            failed.log = daemon.messages
            raise
    return node.directory


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    """Turn what goes wrong in a step into the one line that says so."""
    try:
        yield
    except (AssertionError, CommandError, OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        raise Failed(" ".join(str(error).split())) from error


def _held(condition: object, otherwise: str) -> None:
    if not condition:
        raise Failed(otherwise)


def _publish(story: Story, node: Node, daemon: Daemon, config: str) -> None:
    node.start_containerd()
    network = node.add_network("docker0")
    events = node.directory / "events"
    with events.open("w") as written:
        node.spawn("ctr", "events", stdin=subprocess.DEVNULL, stdout=written)
    version = node.run("ctr", "--version").stdout.split()[-1]
    story.fact(f"node       {node.address}, containerd {version}, CNI network {network.name} {network.subnet}")
    story.fact(f"client     {node.client_address}, another host on the same LAN")
    before = node.tables()

    story.step("Make a root filesystem for the container out of this machine's Redis")
    rootfs = node.directory / "redis"
    count = redis.make_rootfs(rootfs)
    story.fact(f"{count} files: redis-server and the libraries it is linked to ({_redis_version()})")

    story.step("Start ctrport on the node")
    (node.directory / "config.yaml").write_text(config)
    story.fact("its configuration:")
    story.listing(config)
    daemon.start()
    story.good("it says READY=1: subscribed to containerd, looked at all containers, kernel in line")
    before_start = probe_tcp(node.client, node.address, PORT)
    _held(isinstance(before_start, Refused), f"port {PORT} is not refused before there is a container: {before_start}")
    story.good(f"{node.address}:{PORT} is refused, as seen from the LAN: nothing runs yet")

    container = _start_redis(story, node, rootfs, events)

    story.step(f"Use it from the LAN: redis-cli -h {node.address}")
    for command, expected in (("SET greeting hello", "OK"), ("GET greeting", "hello")):
        reply = node.client.run("redis-cli", "-h", node.address, "-p", str(PORT), *command.split(), timeout=PATIENCE)
        _held(reply.stdout.strip() == expected, f"{command}: {reply.stdout.strip() or reply.stderr.strip()}")
        story.good(f"{command:<19} -> {expected}")

    story.step("Ask ctrport: ctrport ps")
    story.listing(daemon.command("ps", "--config", str(node.directory / "config.yaml")))
    states = [each["state"] for each in json.loads(daemon.command("ps", "--json"))["publications"]]
    _held("active" in states, f"no mapping is active: {', '.join(states) or 'none at all'}")

    story.step("Ask the kernel: the rules of ctrport, by table")
    rules = _rules(node)
    _held("DNAT" in rules, "there is no DNAT rule of ctrport")
    story.fact("each bears a comment that names its owner, shown here behind the #")
    story.listing(rules)

    story.step("Stop the container")
    node.kill(container)
    eventually(lambda: isinstance(_asked(node), Refused), within=PATIENCE, what=f"port {PORT} being refused")
    story.good(f"{node.address}:{PORT} is refused again, as seen from the LAN")
    node.delete(container)

    story.step("Stop ctrport, and remove its rules: ctrport clean")
    status = daemon.stop()
    _held(status == 0, f"ctrport ended with status {status}")
    story.fact(daemon.command("clean").strip())
    _held(node.tables() == before, "the node's tables are not as they were")
    story.good("iptables-save says the same as before ctrport was started")


def _start_redis(story: Story, node: Node, rootfs: Path, events: Path) -> Container:
    story.step("Start Redis as a container: ctr run --cni")
    with Knocking(node.client, node.address, PORT) as knocking:
        container = node.start("redis", rootfs=rootfs, command=redis.COMMAND)
        ended = not _answered(story, knocking) and not container.alive()
        _held(not ended, "Redis ended by itself")
        _held(knocking.opened, f"{node.address}:{PORT} did not open for the LAN within {PATIENCE:g} s")
    assert knocking.opened is not None
    started = started_at(events, "redis")
    ready = eventually(lambda: redis.ready_at(rootfs), what="Redis saying that it takes connections")
    assert ready is not None
    opened, listened = ((moment - started).total_seconds() * 1000 for moment in (knocking.opened, ready))
    story.good(f"container redis at {container.address}; {node.address}:{PORT} is open for the LAN")
    story.fact(
        f"open {opened:.1f} ms after containerd's start event (Redis itself logged being ready at {listened:.0f} ms)"
    )
    story.fact("  from: the timestamp in the event, as containerd wrote it")
    story.fact(f"  to:   the first of {knocking.attempts} connection attempts that succeeded, made from the LAN client")
    story.fact(f"        since before the container was created, one every {PAUSE * 1000:g} ms or so")
    return container


def _answered(story: Story, knocking: Knocking) -> bool:
    end = time.monotonic() + PATIENCE
    while not knocking.answered.wait(0.1) and time.monotonic() < end:
        story.go_on()
    return knocking.opened is not None


def _asked(node: Node) -> object:
    return probe_tcp(node.client, node.address, PORT, timeout=0.5)


def _redis_version() -> str:
    said = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"v=(\S+)", said)
    return f"version {found[1]}" if found else "version unknown"


_OURS = re.compile(r' -m comment --comment "ctrport (?P<owner>.*) [0-9a-f]{12}"')


def _rules(node: Node) -> str:
    """Return the rules of ctrport as iptables-save lists them, with the owner at the end instead of in the middle."""
    tables: dict[str, list[str]] = {"*raw": [], "*nat": [], "*filter": []}
    table = ""
    for line in node.run("iptables-nft-save").stdout.splitlines():
        table = line if line.startswith("*") else table
        found = _OURS.search(line)
        if found is not None:
            tables.setdefault(table, []).append(f"{_OURS.sub('', line)}  # {found['owner']}")
    return "\n".join("\n".join([name, *rules]) for name, rules in tables.items() if rules)


if __name__ == "__main__":
    sys.exit(main())
