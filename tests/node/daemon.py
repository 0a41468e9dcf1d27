"""ctrport itself on a node: the real command in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedded.host import end_process, stands_still
from embedded.node import Node
from embedded.traffic import Refused, Reply, probe_tcp
from embedded.wait import eventually

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).resolve().parents[2]


# Imported before the privileges go: neither this tree nor the interpreter need be readable for everybody.
_AS_NOBODY = """
import os
import ctrport.cli, ctrport.report, ctrport.run, encodings.ascii
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
ctrport.cli.main()
"""

_WITH_TICK = """
import sys
import ctrport.cli, ctrport.reconcile
ctrport.reconcile.TICK = float(sys.argv.pop(1))
ctrport.cli.main()
"""

#: Seconds between two looks of a daemon that is to see something soon: see ``Ctrport.start``.
OFTEN = 1.0

#: Where Python keeps what it makes of sources: not beside them, and not anew in each of a thousand processes.
BYTECODE = {"PYTHONPYCACHEPREFIX": str(ROOT / ".pytest_cache" / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}


class Ctrport:
    """The daemon of one node, and its commands. Not started until ``start``."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.config = node.directory / "config.yaml"
        self.log = node.directory / "ctrport.log"
        self._process: subprocess.Popen[str] | None = None

    def configure(self, text: str) -> None:
        """Write the configuration."""
        self.config.write_text(text)

    def start(
        self,
        *options: str,
        wait: bool = True,
        env: dict[str, str] | None = None,
        behind: tuple[str, ...] = (),
        tick: float | None = None,
        files: tuple[int, ...] = (),
    ) -> None:
        """Start the daemon; ``wait`` until it has been all round once.

        ``env`` is added to its environment, and ``behind`` is the program that starts it, with its arguments. ``tick``
        is how many seconds it looks round after without being told, where a test is not about how many these are.
        ``files`` are what that program gets.
        """
        arguments = ("run", "--config", str(self.config), *options)
        argv = self._argv(*arguments) if tick is None else [sys.executable, "-c", _WITH_TICK, str(tick), *arguments]
        with self.log.open("a") as log:
            argv = [*behind, *argv]
            environment = {**self._environment(), **(env or {})}
            self._process = self.node.spawn(*argv, env=environment, stderr=log, pass_fds=files)
        if wait:
            eventually(self.in_line, what="the daemon being in line")

    def in_line(self) -> bool:
        """Whether the running daemon says that it is connected and the kernel in line."""
        assert self._process is not None
        assert self._process.poll() is None or not self.messages, self.messages
        status = self.status()
        connected = str(status["containerd"]).startswith("connected")
        return bool(status["running"]) and connected and status["firewall"] == "in line"

    @property
    def pid(self) -> int:
        """The daemon's number on the machine."""
        assert self._process is not None
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Whether it was started and did not end."""
        return self._process is not None and self._process.poll() is None

    @property
    def messages(self) -> str:
        """What it has logged so far."""
        return self.log.read_text() if self.log.exists() else ""

    def status(self) -> dict[str, Any]:
        """What status.json says; empty enough to be falsy where there is none yet."""
        path = self.node.path("/run/ctrport/status.json")
        if not path.exists():
            return {"running": False, "containerd": "", "firewall": "", "publications": []}
        status: dict[str, Any] = json.loads(path.read_text())
        return status

    @property
    def transactions(self) -> int:
        """How many times it says that it has written to the kernel."""
        return int(self.status()["transactions"])

    def publication(self, mapping: str, container: str | None = None) -> dict[str, Any]:
        """What it says of a mapping: raises AssertionError where it says nothing."""
        found = [p for p in self.status()["publications"] if p["mapping"] == mapping]
        found = [p for p in found if container is None or p["container"] == container]
        assert len(found) == 1, f"{mapping} of {container}: {self.status()['publications']}"
        return dict(found[0])

    def wait_for(self, mapping: str, state: str, container: str | None = None, *, within: float = 10) -> dict[str, Any]:
        """Wait until a mapping is in that state, and return what is said of it."""

        def reached() -> dict[str, Any] | None:
            publication = self.publication(mapping, container)
            assert publication["state"] == state, publication
            return publication

        found = eventually(reached, within=within, what=f"{mapping} of {container or 'any'} being {state}")
        assert found is not None
        return found

    def run(self, *arguments: str, check: bool = True, env: dict[str, str] | None = None) -> Any:
        """Run a command of ctrport's on the node."""
        return self.node.run(*self._argv(*arguments), check=check, env={**self._environment(), **(env or {})})

    def run_as_nobody(self, *arguments: str) -> Any:
        """Run a command as a user without privileges, to see it fail or not: its exit status is not checked."""
        return self.node.run(sys.executable, "-c", _AS_NOBODY, *arguments, check=False, env=self._environment())

    def stop(self, number: signal.Signals = signal.SIGTERM, *, within: float = 5) -> int:
        """End the daemon, and return its exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        status = self._process.wait(within)
        self._process = None
        return status

    def close(self) -> None:
        """End the daemon where it runs, and forget what it said: the next one begins on a node that may be shared."""
        if self._process is not None:
            self.stop()
        self.forget()
        self.log.unlink(missing_ok=True)

    def forget(self) -> None:
        """Delete the run directory, as a reboot would."""
        shutil.rmtree(self.node.path("/run/ctrport"), ignore_errors=True)

    def wait(self, within: float = 10) -> int:
        """Wait for the daemon to end by itself, and return its exit status."""
        assert self._process is not None
        return self._process.wait(within)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop the daemon as SIGSTOP does: what happens meanwhile comes to it all at once."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            eventually(lambda: stands_still(self.pid), what="the daemon standing still")
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    @staticmethod
    def _argv(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "ctrport", *arguments]

    @staticmethod
    def _environment() -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "daemon"), **BYTECODE}


# Binds like any server, says its pid, and goes on until it is ended.
_LISTENER = """
import os, socket, sys
name, address, port, kind = sys.argv[1:]
open("/proc/self/comm", "w").write(name)
server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, int(kind))
server.bind((address, int(port)))
if int(kind) == socket.SOCK_STREAM:
    server.listen()
print(os.getpid(), flush=True)
sys.stdin.read()
"""


class Listener:
    """Another process of the node, that has a port until it is closed. As text it is what ctrport calls it."""

    def __init__(
        self,
        node: Node,
        port: int,
        *,
        address: str = "0.0.0.0",
        kind: socket.SocketKind = socket.SOCK_STREAM,
        name: str = "webserver",
    ) -> None:
        self._name = name
        argv = (sys.executable, "-I", "-S", "-c", _LISTENER, name, address, str(port), str(int(kind)))
        self._process = node.spawn(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        assert said, f"{name} could not have {address} port {port}"
        #: As the node counts.
        self.pid = int(said)

    def __str__(self) -> str:
        return f"{self._name} (pid {self.pid})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End it. To be called once or more."""
        end_process(self._process)


def publish(*entries: tuple[str, str], settings: str = "") -> str:
    """Return a configuration: for each entry a match, as YAML in one line, and a port mapping."""
    lines = [f'  - match: {match}\n    ports: ["{mapping}"]\n' for match, mapping in entries]
    return f"{settings}\npublish:\n{''.join(lines)}" if entries else f"{settings}\n"


def wait_open(node: Node, port: int, name: str | None = None, *, address: str | None = None) -> Reply:
    """Wait until the LAN client is answered at a port of the node, by ``name`` where one is given."""

    def answered() -> Reply:
        outcome = probe_tcp(node.client, address or node.address, port, timeout=1)
        assert isinstance(outcome, Reply), outcome
        assert name is None or outcome.name == name, outcome
        return outcome

    return eventually(answered, what=f"port {port} being answered by {name or 'anybody'}")


def wait_closed(node: Node, port: int) -> None:
    """Wait until the LAN client is refused at a port of the node."""

    def refused() -> bool:
        outcome = probe_tcp(node.client, node.address, port, timeout=1)
        assert isinstance(outcome, Refused), outcome
        return True

    eventually(refused, what=f"port {port} being refused")
