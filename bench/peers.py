"""The peers of the measurements: CNI's portmap plugin, which serves the hostPort of Kubernetes, and dockerd."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import portmap
from bench.commits import Commits
from bench.execs import Execs
from bench.ground import CONTAINER_PORT, LONG_PATIENCE, SERVER, answers, milliseconds, opened, refuses
from bench.subjects import Took, Wish
from bench.usage import Usage
from demo.measure import Knocking
from embedded.container import Container
from embedded.dockerd import IMAGE, DockerContainer, Dockerd
from embedded.node import Node
from embedded.wait import eventually

#: What the kernel calls who commits for them.
WRITERS = ("iptables",)


class Portmap:
    """CNI's portmap plugin, called for a container that runs. A context manager."""

    name = "portmap"

    def __enter__(self) -> Portmap:
        self.node = Node()
        try:
            self.node.start_containerd()
            self.node.add_network("docker0")
            self._commits = Commits(self.node)
            self._commits.__enter__()
            self.node.at_close(self._commits.__exit__)
            self._served: dict[int, Container] = {}
            # The first of all makes what the others find there.
            self.add(self._container(Wish(1, CONTAINER_PORT)), Wish(7999, CONTAINER_PORT))
        except BaseException:
            self.node.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.node.close()

    def publish(self, wish: Wish) -> tuple[Took, Took]:
        """See ``Subject.publish``: from the plugin's start to its last commit."""
        container = self._container(wish)
        added = self.add(container, wish)
        answers(self.node, wish.host)
        removed = self._call("DEL", container, wish)
        refuses(self.node, wish.host)
        return added, removed

    def answer(self, wish: Wish) -> Took | None:
        """See ``Subject.answer``."""
        container = self._container(wish)
        with Knocking(self.node.client, self.node.address, wish.host) as knocking:
            ran = portmap.call(self.node, "ADD", container, wish.ports)
            let_in = opened(knocking, self.name)
        self._call("DEL", container, wish)
        refuses(self.node, wish.host)
        return Took(milliseconds(ran.began, let_in))

    def add(self, container: Container, wish: Wish) -> Took:
        """Have ports published that stay."""
        return self._call("ADD", container, wish)

    def remove(self, container: Container, wish: Wish) -> Took:
        """Have ports published no more."""
        return self._call("DEL", container, wish)

    def container(self, name: str) -> Container:
        """Return another container, in which nothing listens."""
        return self.node.start(name, command=("/bin/sleep", "3600"))

    def _call(self, command: portmap.Command, container: Container, wish: Wish) -> Took:
        ran = portmap.call(self.node, command, container, wish.ports, within=LONG_PATIENCE)
        committed = self._commits.last_until(WRITERS, ran.began, ran.ended)
        return Took(milliseconds(ran.began, committed), ran.processor)

    def _container(self, wish: Wish) -> Container:
        """Return the container that serves this port."""
        if wish.container not in self._served:
            id = f"served-{wish.container}"
            self._served[wish.container] = self.node.start(id, command=wish.command)
        return self._served[wish.container]


class Docker:
    """dockerd, with its own containers. A context manager."""

    def __init__(self) -> None:
        self.name = "dockerd"
        self._serial = 0

    def __enter__(self) -> Docker:
        self.node = Node()
        try:
            self.node.start_containerd()
            self._dockerd = Dockerd(self.node)
            # A copy, or whoever runs iptables on this machine would be heard.
            program = self._dockerd.programs / "xtables-nft-multi"
            shutil.copy2(Path(shutil.which("iptables-nft") or "").resolve(), program)
            for name in ("iptables", "ip6tables"):
                (self._dockerd.programs / name).unlink()
                (self._dockerd.programs / name).symlink_to(program.name)
            self._execs, self._commits = Execs(program), Commits(self.node)
            self._execs.__enter__()
            self.node.at_close(self._execs.__exit__)
            self._commits.__enter__()
            self.node.at_close(self._commits.__exit__)
            self.start(proxy=False)
            self.run("neighbour", Wish(7999, CONTAINER_PORT))
        except BaseException:
            self.node.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.node.close()

    def start(self, *, proxy: bool) -> float:
        """Start dockerd, and return how many milliseconds it took until it answered.

        Its ``proxy`` is a process for each port and family.
        """
        path = self.node.path("/run/docker.sock")
        path.unlink(missing_ok=True)
        began = time.time_ns()
        # Its own end of waiting is too coarse: it asks with a program, again and again.
        with ThreadPoolExecutor(1) as waiting:
            answered = waiting.submit(_answered, path)
            self._dockerd.start(proxy=proxy)
            return milliseconds(began, answered.result(LONG_PATIENCE))

    def stop(self) -> None:
        """End dockerd, and with it its containers."""
        self._dockerd.stop()

    @property
    def usage(self) -> Usage:
        """What dockerd takes, with its proxies and with each iptables that it ran."""
        return Usage(self._dockerd.pid)

    def publish(self, wish: Wish) -> tuple[Took, Took]:
        """See ``Subject.publish``: from its first start of iptables to its last commit."""
        name = self._create(wish)
        began = time.time_ns()
        self._dockerd.docker("start", name, timeout=LONG_PATIENCE)
        added = self._took(began, time.time_ns())
        answers(self.node, wish.host)
        began = time.time_ns()
        self._dockerd.docker("rm", "--force", name, timeout=LONG_PATIENCE)
        removed = self._took(began, time.time_ns())
        refuses(self.node, wish.host)
        return added, removed

    def answer(self, wish: Wish) -> Took | None:
        """See ``Subject.answer``."""
        return None

    def keep(self, name: str, wish: Wish) -> tuple[DockerContainer, Took]:
        """Start a container that stays, and return how long it took until its ports were committed."""
        began = time.time_ns()
        container = self.run(name, wish)
        return container, self._took(began, time.time_ns())

    def run(self, name: str, wish: Wish | None) -> DockerContainer:
        """Start a container that stays; without a wish nothing of it is published."""
        specs = wish.specs if wish is not None else []
        return self._dockerd.run(name, *specs, timeout=LONG_PATIENCE)

    def remove(self, container: DockerContainer) -> None:
        """Remove one that stayed."""
        self._dockerd.remove(container, timeout=LONG_PATIENCE)

    def processor(self, wish: Wish | None) -> float:
        """Return the seconds of processor time that dockerd takes to start and remove a container with these ports."""
        before = self.usage.processor()
        name = self._create(wish)
        self._dockerd.docker("start", name)
        self._dockerd.docker("rm", "--force", name)
        return self.usage.processor() - before

    def proxy(self, container: DockerContainer, port: int) -> subprocess.Popen[str]:
        """Start the userland proxy for a host port, onto the same port of a container, as dockerd starts it.

        There are no rules for that port: whoever comes goes through the proxy.
        """
        argv = ["docker-proxy", "-proto", "tcp", "-host-ip", "0.0.0.0", "-host-port", str(port)]
        argv += ["-container-ip", container.address, "-container-port", str(port)]
        # It says through its file 3 whether it could begin.
        return self.node.spawn("sh", "-c", 'exec 3>/dev/null 2>&3; exec "$@"', "sh", *argv)

    def _create(self, wish: Wish | None) -> str:
        self._serial += 1
        name = f"one-{self._serial}"
        ports = [word for spec in (wish.specs if wish is not None else []) for word in ("--publish", spec)]
        command = wish.command if wish is not None else SERVER
        self._dockerd.docker("create", "--stop-signal", "KILL", "--name", name, *ports, IMAGE, *command)
        return name

    def _took(self, began: int, ended: int) -> Took:
        # Whichever of the two was heard of first: the other thread may have been let on late.
        first = min(self._execs.first(began), self._commits.first(WRITERS, began))
        return Took(milliseconds(first, self._commits.last_until(WRITERS, first, ended)))


def _answered(path: Path) -> int:
    """Return when who listens there answered: it takes the connection before it can."""
    eventually(path.exists, within=LONG_PATIENCE, what="dockerd's socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
        client.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
        client.recv(1)
        return time.time_ns()
