"""dockerd on an embedded node, to see what it does where ctrport does, or beside it.

    dockerd = Dockerd(node)
    dockerd.start()
    web = dockerd.run("web", "8080:80")

It uses the node's containerd, and keeps what else it has in the node. The machine sees of it what it sees of a node,
and the empty mount point /etc/docker.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from typing import Any

from embedded.host import Place
from embedded.node import Node
from embedded.wait import eventually

PROGRAMS = ("dockerd", "docker")
IMAGE = "busybox"

_SOCKET = "unix:///run/docker.sock"

# The first start leaves a key in /etc/docker. The machine's choice of tables (update-alternatives) is not the node's.
_SETTLE = """
mkdir -p /etc/docker
mount -t tmpfs -o mode=755 tmpfs /etc/docker
mkdir -p "$1"
for program in iptables ip6tables; do ln -sf "$(command -v $program-nft)" "$1/$program"; done
"""


def missing() -> str | None:
    """Return why there can be no dockerd on this machine, None if there can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"dockerd on a node needs {', '.join(absent)}" if absent else None


class DockerContainer(Place):
    """A running container of dockerd's; ``address`` is its IPv4 address on the network it was started on."""

    def __init__(self, name: str, id: str, outer_pid: int, address: str) -> None:
        super().__init__(name, outer_pid, ["net"])
        self.id = id
        self.address = address


class Dockerd:
    """A dockerd of one node, whose containerd runs. Ends with the node, or by ``stop``.

    ``bridge_address`` is that of docker0, with the length of the prefix. ``programs`` is the directory that comes first
    in its PATH, with the iptables that it runs.
    """

    def __init__(self, node: Node, *, bridge_address: str = "172.17.0.1/16") -> None:
        reason = missing()
        if reason is not None:
            raise RuntimeError(reason)
        self.node = node
        self.log = node.directory / "dockerd.log"
        self._bridge_address = bridge_address
        self.programs = node.directory / "dockerd-programs"
        self._cgroup = "dockerd"
        self._process: subprocess.Popen[str] | None = None
        self._containers: list[DockerContainer] = []
        node.script(_SETTLE, str(self.programs))
        node.at_close(self.stop)

    @property
    def pid(self) -> int:
        """Its number on the machine."""
        assert self._process is not None
        return self._process.pid

    def start(self, *, proxy: bool = False, within: float = 20.0) -> None:
        """Start it, and wait until it answers; containers that it is to restart are there on return.

        Without its userland ``proxy`` what reaches a published port does so by iptables, also from the node itself.
        """
        if self._process is not None:
            raise RuntimeError("dockerd is running already")
        options = {
            "host": _SOCKET,
            "containerd": self.node.containerd_socket,
            "data-root": "/run/docker-data",
            "exec-root": "/run/docker",
            "pidfile": "/run/docker.pid",
            "storage-driver": "vfs",
            "userland-proxy": str(proxy).lower(),
            "bip": self._bridge_address,
            "exec-opt": "native.cgroupdriver=cgroupfs",
            "cgroup-parent": f"/{self.node.directory.name}/{self._cgroup}",
        }
        argv = [f"--{name}={value}" for name, value in options.items()]
        path = self.node.run("sh", "-c", 'echo "$1:$PATH"', "sh", str(self.programs)).stdout.strip()
        with self.log.open("a") as log:
            dockerd = self.node.spawn(
                "env", f"PATH={path}", "dockerd", *argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._process = dockerd

        def answers() -> bool:
            if dockerd.poll() is not None:
                self._process = None
                tail = "\n".join(self.log.read_text().splitlines()[-10:])
                raise RuntimeError(f"dockerd ended with status {dockerd.returncode}:\n{tail}")
            return self.docker("version", check=False).returncode == 0

        eventually(answers, within=within, what="dockerd answers")
        if not self.docker("images", "--quiet", IMAGE).stdout:
            archive = self.node.directory / "docker.tar"
            with tarfile.open(archive, "w") as files:
                files.add(self.node.rootfs, arcname=".")
            self.docker("import", "--change", "ENV PATH=/bin", str(archive), IMAGE)
            archive.unlink()

    def stop(self) -> None:
        """End it as a service manager does: its containers end with it. To be called once or more."""
        self._forget(self._containers)
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
            self._process = None

    def docker(self, *argv: str, check: bool = True, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a command of docker's."""
        return self.node.run("docker", "--host", _SOCKET, *argv, check=check, timeout=timeout)

    def run(self, name: str, *published: str, options: tuple[str, ...] = (), timeout: float = 30) -> DockerContainer:
        """Start a container as `docker run -p` does; it comes back with dockerd where ``options`` say so."""
        ports = [word for spec in published for word in ("--publish", spec)]
        # Its first process has no handler for SIGTERM, which is ignored then.
        argv = ["run", "--detach", "--stop-signal", "KILL", "--name", name, *ports, *options]
        self.docker(*argv, IMAGE, "/bin/sleep", "600", timeout=timeout)
        return self.container(name)

    def container(self, name: str) -> DockerContainer:
        """Return a running container as a place: another one after each of its starts."""
        [found] = json.loads(self.docker("inspect", name).stdout)
        place = DockerContainer(name, found["Id"], self._outer_pid(found), _address(found))
        self._containers.append(place)
        return place

    def remove(self, container: DockerContainer, *, timeout: float = 30) -> None:
        """Kill a container, and remove it."""
        self._forget([container])
        self.docker("rm", "--force", container.id, timeout=timeout)

    def _outer_pid(self, found: dict[str, Any]) -> int:
        return self.node.outer_pid(f"{self._cgroup}/{found['Id']}", found["State"]["Pid"])

    def _forget(self, containers: list[DockerContainer]) -> None:
        for container in [*containers]:
            container.close()
            self._containers.remove(container)


def _address(found: dict[str, Any]) -> str:
    networks = found["NetworkSettings"]["Networks"].values()
    return str(next(network["IPAddress"] for network in networks))
