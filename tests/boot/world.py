"""What the steps have in common: the booted machine as a node, a client beside it, containers, and packets."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedded.host import Place
from embedded.image import make_rootfs
from embedded.tables import comparable
from embedded.traffic import Reply, Server, probe_tcp
from embedded.wait import eventually
from tests.boot.machine import Machine
from tests.boot.tree import ROOT

NODE, CLIENT = "198.51.100.1", "198.51.100.2"
SOURCE, WHEELS = "/root/ctrport", "/root/wheels"
UNIT = "ctrport.service"

# The client is a network namespace of its own: what it sends comes in by a device, as from a LAN.
_NETWORK = """
ip netns add client
ip link add lan0 type veth peer name eth0 netns client
ip address add 198.51.100.1/24 dev lan0
ip link set lan0 up
ip -n client address add 198.51.100.2/24 dev eth0
ip -n client link set lo up
ip -n client link set eth0 up
echo 1 >/proc/sys/net/ipv4/ip_forward
mkdir -p /etc/cni/net.d /opt/cni
ln -s /usr/lib/cni /opt/cni/bin
cp /root/ctrport/deploy/cni/10-docker0.conflist /etc/cni/net.d/
"""


class World:
    """The node, before anything of ctrport is on it."""

    def __init__(self, machine: Machine, wheels: Path) -> None:
        self.machine = machine
        for file in _files():
            there = machine.path(f"{SOURCE}/{file}")
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, there)
        shutil.copytree(wheels, machine.path(WHEELS))
        machine.shell(_NETWORK)
        sleeping = machine.spawn("ip", "netns", "exec", "client", "sleep", "infinity")
        eventually(lambda: _is_elsewhere(sleeping.pid, machine), what="the client's network namespace")
        self.client = Place("client", sleeping.pid, ["net"])
        machine.at_close(self.client.close)
        self.containers: dict[str, Place] = {}
        #: What the tables held before ctrport was started.
        self.before: list[str] = []

    def make(self, target: str) -> str:
        """Run make with the sources on the node, and without a network."""
        settings = ("PIP_NO_INDEX=1", f"PIP_FIND_LINKS={WHEELS}")
        return self.machine.command("env", *settings, "make", "--no-print-directory", "-C", SOURCE, target, timeout=300)

    def configure(self, text: str) -> None:
        """Write the configuration."""
        self.machine.path("/etc/ctrport/config.yaml").write_text(text)

    def systemctl(self, *argv: str) -> None:
        """Run systemctl. Raises ``CommandError`` where it fails."""
        self.machine.command("systemctl", *argv)

    @property
    def pid(self) -> int:
        """The daemon's number on the machine; 0 where it does not run."""
        return int(self.machine.show(UNIT, "MainPID"))

    @property
    def restarts(self) -> int:
        """How often systemd has started it again by itself."""
        return int(self.machine.show(UNIT, "NRestarts"))

    def wait_active(self, *, not_pid: int = 0, within: float = 30) -> int:
        """Wait until the service is active, as another process than ``not_pid``; return its number."""

        def active() -> int:
            pid = self.pid
            return pid if pid != not_pid and self.machine.show(UNIT, "ActiveState") == "active" else 0

        return eventually(active, within=within, what="the service being active")

    def publications(self) -> list[dict[str, Any]]:
        """What `ctrport ps --json` says of them."""
        said = json.loads(self.machine.command("ctrport", "ps", "--json"))
        found: list[dict[str, Any]] = said["publications"]
        return found

    def repairs(self) -> tuple[int, str]:
        """How often the daemon has put back what was gone, and what it says of the last time."""
        said = json.loads(self.machine.path("/run/ctrport/status.json").read_text())
        return said["repairs"], said["last_repair"]

    def log_since(self, moment: str) -> str:
        """What the service has logged since then."""
        return self.machine.command("journalctl", "--no-pager", "--output=cat", f"--since={moment}", f"--unit={UNIT}")

    def wait_quiet(self, seconds: float = 1.5) -> None:
        """Wait until the service has logged nothing for so long: nothing that it was told of is left to be done."""
        lines, since = -1, time.monotonic()

        def quiet() -> bool:
            nonlocal lines, since
            found = len(self.machine.journal(UNIT).splitlines())
            if found != lines:
                lines, since = found, time.monotonic()
            return time.monotonic() - since >= seconds

        eventually(quiet, within=30, what="the service having no more to say")

    def now(self) -> str:
        """A moment for ``log_since``."""
        return f"@{time.time():.6f}"

    def start_container(self, id: str, *, user_namespace: bool = False) -> Place:
        """Start a container on docker0, with a server on port 80, as `ctr run --cni` does."""
        machine = self.machine
        rootfs = machine.path(f"/root/{id}")
        make_rootfs(rootfs)
        spec = json.loads(machine.command("ctr", "oci", "spec"))
        spec["root"] = {"path": f"/root/{id}"}
        spec["process"]["args"] = ["/bin/sleep", "infinity"]
        # Limits are not what this is about, and the machine may have no controllers for them.
        del spec["linux"]["resources"], spec["linux"]["cgroupsPath"]
        if user_namespace:
            machine.shell('chmod 711 /root && chown -R 100000:100000 "/root/$1"', id)
            spec["linux"]["namespaces"].append({"type": "user"})
            spec["linux"]["uidMappings"] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
            spec["linux"]["gidMappings"] = spec["linux"]["uidMappings"]
        machine.path(f"/root/{id}.json").write_text(json.dumps(spec))
        argv = ("ctr", "run", "--detach", "--cni", "--pid-file", f"/root/{id}.pid", "--config", f"/root/{id}.json", id)
        machine.command(*argv)
        inner = int(machine.path(f"/root/{id}.pid").read_text())
        place = Place(id, machine.outer_pid(inner), ["net"])
        machine.at_close(place.close)
        Server(place, 80, name=id)
        self.containers[id] = place
        return place

    def asked(self, port: int, name: str = "web", *, place: Place | None = None, address: str = NODE) -> Reply:
        """Ask a published port once, from the client if not told otherwise: ``name`` has to answer."""
        outcome = probe_tcp(place or self.client, address, port)
        assert isinstance(outcome, Reply), f"port {port} of {address}: {outcome}"
        assert outcome.name == name, f"port {port}: {outcome.text}"
        return outcome

    def wait_open(self, port: int, name: str = "web", within: float = 15) -> float:
        """Wait until it answers; return the milliseconds that took."""
        began = time.monotonic()

        def answered() -> Reply:
            outcome = probe_tcp(self.client, NODE, port, timeout=0.3)
            assert isinstance(outcome, Reply), str(outcome)
            return outcome

        eventually(answered, within=within, what=f"port {port} answering")
        return (time.monotonic() - began) * 1000

    def tables(self) -> list[str]:
        """What is in the nft tables of iptables, without counters and without what does nothing."""
        saved = [self.machine.command(f"{program}-nft-save") for program in ("iptables", "ip6tables")]
        return [line for text, title in zip(saved, ("IPv4", "IPv6"), strict=True) for line in comparable(text, title)]

    @contextmanager
    def asking(self, port: int) -> Iterator[Asking]:
        """Ask a published port without a pause meanwhile."""
        asking = Asking(self, port)
        with asking.running():
            yield asking

    @contextmanager
    def grabbing(self, port: int) -> Iterator[Grabbing]:
        """Be another program of the node meanwhile, that tries without a pause to have a port."""
        grabbing = Grabbing(self.machine.socket(), port)
        with grabbing.running():
            yield grabbing


class _Meanwhile(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.times = 0
        self._ended = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            self._ended.set()
            self.join()

    def run(self) -> None:
        while not self._ended.is_set():
            self.once()
            self.times += 1
            self._ended.wait(0.005)

    def once(self) -> None:
        raise NotImplementedError


class Asking(_Meanwhile):
    """Asks a published port, and keeps what was no answer."""

    def __init__(self, world: World, port: int) -> None:
        super().__init__()
        self._world, self._port = world, port
        self.lost: list[str] = []

    def once(self) -> None:
        """Ask."""
        outcome = probe_tcp(self._world.client, NODE, self._port, timeout=2)
        if not isinstance(outcome, Reply):
            self.lost.append(str(outcome))

    def none_lost(self) -> str:
        """Say how many were answered. Raises ``AssertionError`` where one was not."""
        assert self.times > 10, f"only {self.times} were sent"
        assert not self.lost, f"{len(self.lost)} of {self.times} connections failed: {self.lost[0]}"
        return f"{self.times} connections meanwhile, all answered"


class Grabbing(_Meanwhile):
    """Tries to bind a port, and counts how often it was refused."""

    def __init__(self, one: socket.socket, port: int) -> None:
        super().__init__()
        self._socket, self._port = one, port
        self.got = False

    def once(self) -> None:
        """Try."""
        if not self.got:
            try:
                self._socket.bind(("0.0.0.0", self._port))
                self.got = True
            except OSError:
                pass

    @contextmanager
    def running(self) -> Iterator[None]:
        """Try until the end of the block, and let go."""
        try:
            with super().running():
                yield
        finally:
            self._socket.close()

    def never_had(self) -> str:
        """Say how often it was refused. Raises ``AssertionError`` where it was not once."""
        assert self.times > 10, f"it tried {self.times} times"
        assert not self.got, f"another program got port {self._port} at try {self.times}"
        return f"{self.times} tries of another program to bind it, all refused"


def _files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [file for file in listed.stdout.split("\0") if file and (ROOT / file).is_file()]


def _is_elsewhere(pid: int, machine: Machine) -> bool:
    mine = Path(f"/proc/{pid}/ns/net").stat().st_ino
    return mine != machine.path("/proc/1/ns/net").stat().st_ino and mine != Path("/proc/self/ns/net").stat().st_ino
