"""What fails, hangs, fills up or is killed below the daemon: it tries again, ever slower, says why once, and mends.

All share one node and, where nothing else is said, one daemon: what a fault leaves behind, the next test would meet.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embedded.container import Container
from embedded.node import Node
from embedded.traffic import Reply, Server, probe_tcp
from embedded.wait import eventually
from tests.node.daemon import Ctrport, publish, wait_closed, wait_open

PUBLISH = publish(("{container: web}", "8080:80"), ("{container: late}", "8081:80"))
RESTORE = "iptables-nft-restore"
LATE = "8081:80/tcp"

#: What the daemon waits for is not for a test to wait for; nor is it for an operator to choose. What a kernel is to do
#: with its list of flows, which no test can have it do, stands in a file.
IMPATIENT = """
import pathlib, time
import ctrport.firewall.commands, ctrport.conntrack
ctrport.firewall.commands.TIMEOUT = 0.4
ctrport.conntrack.TIMEOUT = 1.0
class Flows(ctrport.conntrack.Flows):
    def to(self, family, ports, patience):
        fault = pathlib.Path(__file__).with_name("flows")
        if fault.exists() and fault.read_text() == "fails":
            raise OSError(5, "Input/output error")
        while fault.exists():
            patience.check()
            time.sleep(0.01)
        yield from super().to(family, ports, patience)
ctrport.conntrack.Flows = Flows
"""
#: What programs do that stand in front of the real ones. Each says in ``tries`` that it was asked to do something.
FAILS = "cat >/dev/null; echo >>{tries}; echo 'line 3 failed' >&2; exit 4\n"
HANGS = "cat >/dev/null; echo >>{tries}; sleep 300 & echo $! >>{pids}; wait\n"
# The first block alone: of a mapping that comes, what the table filter is to hold.
HALF = "sed '/^COMMIT/q' >{pids}.text; echo >>{tries}; {real} \"$@\" <{pids}.text; kill -9 $$\n"


class World:
    """A node where web is published, and a daemon with programs in front of those that it calls."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.programs = node.directory / "programs"
        self.programs.mkdir()
        (node.directory / "sitecustomize.py").write_text(IMPATIENT)
        node.run("mkdir", "-p", "/run/ctrport")
        node.run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/run/ctrport")
        self._late: Container | None = None
        Server(node.start("web"), 80)
        self.ctrport = Ctrport(node)
        self.ctrport.configure(PUBLISH)
        self.start()
        self.come()
        self.whole = self.rules()
        self.go()
        self.bare = self.rules()

    def start(self, *behind: str) -> None:
        path = f"{self.node.directory}:{Ctrport._environment()['PYTHONPATH']}"
        programs = f"{self.programs}:{os.environ['PATH']}"
        self.ctrport.start(env={"PATH": programs, "PYTHONPATH": path}, behind=behind)
        wait_open(self.node, 8080, "web")

    @contextlib.contextmanager
    def fault(self, name: str, script: str) -> Iterator[None]:
        """A program goes wrong: also the one that waits for its input already, which is killed."""
        real = shutil.which(name)
        text = script.format(tries=self.file("tries"), pids=self.file("pids"), real=real)
        for each in ("tries", "pids"):
            self.file(each).write_text("")
        program = self.programs / name
        program.with_suffix(".new").write_text(f"#!/bin/sh\n{text}")
        program.with_suffix(".new").chmod(0o755)
        program.with_suffix(".new").rename(program)
        for pid in self.waiting():
            os.kill(pid, signal.SIGKILL)
        try:
            yield
        finally:
            program.unlink()
            for pid in self.waiting():
                os.kill(pid, signal.SIGKILL)

    def file(self, name: str) -> Path:
        return self.node.directory / name

    @property
    def tries(self) -> int:
        return len(self.file("tries").read_text())

    def children(self) -> dict[int, str]:
        """The processes below the daemon, dead ones that nobody took note of included, with their programs."""
        found: dict[int, str] = {}
        for task in Path(f"/proc/{self.ctrport.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for pid in map(int, (task / "children").read_text().split()):
                    found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip() or "a zombie"
        return found

    def waiting(self) -> list[int]:
        """The processes that wait for the next change of IPv4; one in front of the real one is a shell's."""
        endings = (f" {RESTORE} --noflush", f"/{RESTORE} --noflush")
        return [pid for pid, command in self.children().items() if f" {command}".endswith(endings)]

    def come(self) -> Container:
        """Start the container late, and wait until it is published."""
        late = self.start_late()
        wait_open(self.node, 8081, "late")
        self.ctrport.wait_for(LATE, "active", "late")
        return late

    def start_late(self) -> Container:
        self._late = self.node.start("late")
        Server(self._late, 80)
        return self._late

    def go(self) -> None:
        """Have late be gone, and its port with it."""
        if self._late is not None:
            self.node.delete(self._late)
            self._late = None
        wait_closed(self.node, 8081)
        self.ctrport.wait_for(LATE, "waiting")

    def rules(self) -> list[str]:
        """Ours, without what is another's each time: late's address, and what is made of it."""
        tables = self.node.tables()
        if self._late is not None:
            tables = re.sub(rf"\b{re.escape(str(self._late.address))}\b", "LATE", tables)
        return sorted(re.sub(r' [0-9a-f]{12}"', '"', line) for line in tables.splitlines() if "ctrport" in line)

    def published(self) -> None:
        """Late is published in the end, without anybody's help, and nothing else has changed."""
        wait_open(self.node, 8081, "late")
        self.ctrport.wait_for(LATE, "active", "late", within=15)
        eventually(self.ctrport.in_line, within=15, what="the daemon being in line")
        assert self.rules() == self.whole
        self.nothing_left()

    def nothing_left(self) -> None:
        """No process but those that wait for the next change."""

        def idle() -> bool:
            left = sorted(self.children().values())
            assert left == [f"ip6tables-nft-restore{FLAGS}", f"iptables-nft-restore{FLAGS}"], left
            return True

        eventually(idle, what="nothing but what waits for the next change")
        pids = self.file("pids").read_text().split() if self.file("pids").exists() else []
        for pid in pids:  # as the node counts
            assert self.node.run("sh", "-c", f"kill -0 {pid}", check=False).returncode != 0

    def web_answers(self) -> None:
        assert isinstance(probe_tcp(self.node.client, self.node.address, 8080), Reply)

    def said(self, words: str) -> list[str]:
        """The lines of the log that have these words."""
        return [line for line in self.ctrport.messages.splitlines() if words in line]


FLAGS = " --noflush"


def _runs(pid: int) -> bool:
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def everything() -> Iterator[World]:
    with Node() as node:
        node.start_containerd()
        node.add_network("docker0")
        yield World(node)


@pytest.fixture
def world(everything: World) -> Iterator[World]:
    """As it was before each test, and in order after it."""
    everything.ctrport.log.write_text("")
    yield everything
    everything.go()
    eventually(everything.ctrport.in_line, within=15, what="the daemon being in line")
    assert everything.rules() == everything.bare
    assert "Traceback" not in everything.ctrport.messages, everything.ctrport.messages


# Programs


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (FAILS, "the rules could not be written: line 3 failed"),
        (HANGS, "iptables-nft-restore did not end within 0 s"),
    ],
    ids=["fails", "hangs"],
)
def test_writing_that_goes_wrong_is_tried_again_ever_slower(world: World, script: str, why: str) -> None:
    with world.fault(RESTORE, script):
        world.start_late()
        eventually(lambda: world.ctrport.status()["firewall"] == why, what="the reason being shown")
        assert world.ctrport.publication(LATE, "late")["reason"] == why
        began, before = time.monotonic(), world.tries
        world.web_answers()
        eventually(lambda: world.tries > before, what="another try")
        assert time.monotonic() - began > 0.6  # after 1 s, and the next after 2
        assert len(world.said(f'ERROR   write-failed reason="{why}; trying')) == 1
    world.published()
    assert len(world.said(why)) <= 2  # as it was met first, and as what has to be mended
    assert len(world.said(" in-line ")) == 1


def test_what_is_killed_half_way_is_made_whole_at_once(world: World) -> None:
    with world.fault(RESTORE, HALF):
        world.start_late()
        wait_open(world.node, 8081, "late")
        world.web_answers()
    world.published()
    assert world.said("could not be written: killed by signal 9")
    assert world.tries <= 4
    assert len(world.ctrport.messages.splitlines()) <= 6, world.ctrport.messages


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_what_waits_for_its_input_and_will_not_take_it_is_replaced(world: World, number: signal.Signals) -> None:
    [waiting] = eventually(world.waiting, what="a process that waits")
    os.kill(waiting, number)
    world.start_late()
    world.published()
    assert not _runs(waiting)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("fails", "flows of IPv4 could not be looked at: Input/output error"),
        ("hangs", "flows of IPv4 could not be looked at: it took longer than 1 s"),
    ],
)
def test_flows_that_cannot_be_removed_hold_up_no_mapping(world: World, fault: str, why: str) -> None:
    world.file("flows").write_text(fault)
    try:
        began = time.monotonic()
        world.come()
        world.go()
        world.come()
        assert time.monotonic() - began < 3  # where each waited for it: six
        eventually(lambda: any(why in warning for warning in world.ctrport.status()["warnings"]), what="the warning")
        assert why in world.ctrport.run("ps").stderr
        assert world.ctrport.in_line()
        assert len(world.said(why)) == 1
    finally:
        world.file("flows").unlink()
    world.go()  # the next change tries again
    eventually(lambda: world.ctrport.status()["warnings"] == [], within=15, what="the warning being gone")
    world.nothing_left()


# Files


@contextlib.contextmanager
def no_more_files(pid: int) -> Iterator[None]:
    """The process has as many files open as it may."""
    used = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    lowest = next(number for number in range(len(used) + 1) if number not in used)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def test_without_a_free_file_it_says_so_and_catches_up(world: World) -> None:
    world.nothing_left()
    why = "the node cannot be looked at: Too many open files; what was known of it stands"
    with no_more_files(world.ctrport.pid):
        world.start_late()
        eventually(lambda: why in world.ctrport.status()["warnings"], what="the reason being shown")
        assert why in world.ctrport.run("ps").stderr
        world.web_answers()
        time.sleep(1.1)  # another try
        # Once of the node, of its switches and perhaps of the configuration, beside which files of this test are.
        assert len(world.said("Too many open files")) <= 3, world.ctrport.messages
    world.published()
    assert len(world.said("the node can be looked at again")) == 1
    eventually(lambda: world.ctrport.status()["warnings"] == [], what="the warning being gone")
    eventually(lambda: world.ctrport.status()["config"] == "", what="the configuration being read after all")


def test_without_a_free_file_drift_is_mended_later(world: World) -> None:
    world.nothing_left()
    with no_more_files(world.ctrport.pid):
        world.node.run("iptables-nft", "-t", "nat", "-F", "DOCKER")
        eventually(lambda: "Too many open files" in world.ctrport.status()["firewall"], what="the reason being shown")
        assert len(world.said("Too many open files")) <= 2  # of the tables, and perhaps of the configuration
    wait_open(world.node, 8080, "web")


# The run directory


def ps(world: World) -> Any:
    return json.loads(world.ctrport.run("ps", "--config", str(world.ctrport.config), "--json").stdout)


def test_a_full_run_directory_is_complained_of_once_and_ps_looks_for_itself(world: World) -> None:
    full = world.node.path("/run/ctrport/full")
    world.node.path("/run/ctrport/status.json").unlink()  # or its room would be enough for the next
    with contextlib.suppress(OSError), full.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    try:
        world.start_late()
        wait_open(world.node, 8081, "late")
        why = "the status file cannot be written: [Errno 28] No space left on device"
        eventually(lambda: world.said(why), what="the complaint")
        seen = {each["mapping"]: each["state"] for each in ps(world)["publications"]}
        assert seen == {"8080:80/tcp": "active", LATE: "active"}
        assert not world.node.path("/run/ctrport/status.json").exists()
        assert len(world.said("the status file cannot be written")) == 1
    finally:
        full.unlink()
    world.published()
    assert len(world.said("the status file can be written again")) == 1


def test_a_full_run_directory_has_room_for_what_is_new_in_place_of_what_was(world: World) -> None:
    full = world.node.path("/run/ctrport/full")
    with contextlib.suppress(OSError), full.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    try:
        world.come()
        world.go()
    finally:
        full.unlink()
    assert not world.said("status file")


def test_a_run_directory_that_may_not_be_written_to_any_more(world: World) -> None:
    world.node.run("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "/run/ctrport")
    try:
        world.start_late()
        wait_open(world.node, 8081, "late")
        eventually(lambda: world.said("the status file cannot be written: [Errno 30]"), what="the complaint")
        ended = world.ctrport.run("run", "--config", str(world.ctrport.config), check=False)
        assert ended.returncode == 1
        assert ended.stderr == "ctrport: the run directory /run/ctrport cannot be used: Read-only file system\n"
    finally:
        world.node.run("umount", "/run/ctrport")
    world.published()


# Others


def test_who_commits_more_than_can_be_heard_hides_nothing(world: World) -> None:
    with world.ctrport.frozen():
        flood = "*filter\n-A NOBODY -j RETURN\nCOMMIT\n*filter\n-F NOBODY\nCOMMIT\n" * 400
        world.node.run("iptables-nft", "-N", "NOBODY")
        world.node.run("iptables-nft-restore", "--noflush", input=flood)
        world.node.run("iptables-nft", "-t", "nat", "-F", "DOCKER")
        netlink = [line.split() for line in world.node.run("cat", "/proc/net/netlink").stdout.splitlines()[1:]]
        assert any(fields[1] == "12" and int(fields[8]) for fields in netlink), "the socket is to be overrun"
    wait_open(world.node, 8080, "web")
    world.node.run("iptables-nft", "-X", "NOBODY")
    assert len(world.said(" drift ")) == 1


# Clocks


def test_no_clock_decides_anything_by_what_it_shows(world: World) -> None:
    world.ctrport.stop()
    try:
        # As the machine would have it after three years without a restart.
        world.start("unshare", "--time", "--monotonic", "100000000", "--boottime", "100000000")
        world.come()
        world.node.run("iptables-nft", "-t", "nat", "-F", "DOCKER")
        wait_open(world.node, 8081, "late")
        world.go()
    finally:
        world.ctrport.stop()
        world.start()


# A fight, for which the daemon has just been started: what it may take for looking is not used up


def test_a_fight_costs_little_and_fills_no_log(world: World) -> None:
    before, repairs = _seconds_of(world.ctrport.pid), int(world.ctrport.status()["repairs"])
    loop = "while :; do iptables-nft -t nat -D DOCKER 1; done 2>/dev/null"
    theirs_before = _seconds_of_children()
    world.node.run("timeout", "2", "sh", "-c", loop, check=False)
    theirs = _seconds_of_children() - theirs_before
    # Two seconds long there was a rule to be put back: less than what it took to take it away.
    assert _seconds_of(world.ctrport.pid) - before < theirs
    wait_open(world.node, 8080, "web")
    eventually(lambda: world.rules() == world.bare, what="the tables being as before")
    lines = world.ctrport.messages.splitlines()
    assert int(world.ctrport.status()["repairs"]) > repairs
    assert 1 <= len(lines) <= 12, lines  # of some fifty repairs, where the machine has nothing else to do


def _seconds_of(pid: int) -> float:
    """What a process and those of its children that ended have had of a processor."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11:15]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# The lock of iptables


LEGACY = publish(
    ("{container: web}", "8080:80"), ("{container: late}", "8081:80"), settings="firewall: {backend: iptables-legacy}"
)
#: The lock is waited for a moment instead of ten seconds.
SOON = """
import signal
signal.alarm = lambda seconds: signal.setitimer(signal.ITIMER_REAL, min(seconds, 0.2))
"""


def test_a_lock_that_somebody_holds_is_named_until_it_is_free(node: Node, ctrport: Ctrport) -> None:
    (node.directory / "sitecustomize.py").write_text(SOON)
    Server(node.start("web"), 80)
    ctrport.configure(LEGACY)
    ctrport.start(env={"PYTHONPATH": f"{node.directory}:{Ctrport._environment()['PYTHONPATH']}"})
    wait_open(node, 8080, "web")
    why = "the rules could not be written: somebody has held the lock /run/xtables.lock for 10 s"
    with node.path("/run/xtables.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Server(node.start("late"), 80)
        eventually(lambda: ctrport.status()["firewall"] == why, what="the reason being shown")
        assert ctrport.publication(LATE, "late")["reason"] == why
        assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)
        before = ctrport.messages
        time.sleep(1.2)  # another try
        assert ctrport.messages == before
    wait_open(node, 8081, "late")
    ctrport.wait_for(LATE, "active", "late")
    assert ctrport.messages.count(f'ERROR   write-failed reason="{why}; trying') == 1
    assert ctrport.messages.count(why) <= 2
    assert "Traceback" not in ctrport.messages
