"""The node: containerd, container networks and a client on the LAN, all of it in namespaces that go with it.

    with Node() as node:
        node.start_containerd()
        node.add_network("docker0")
        web = node.start("web")

With Node(cri=True) there are pods as well, made by containerd's CRI plugin:

        shop = node.start_pod("shop")
        shop.start("web")

The machine itself gets no device, no address, no rule and no mount of it. What it sees is some processes, a temporary
directory, cgroups of a name of their own, and the empty mount points /etc/cni, /opt/cni and /var/lib/cni.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from embedded.container import Container
from embedded.cri import CRI_CONFIG, CRI_NAMESPACE, IMAGES, SNAPSHOTTER, Cri, HostPort, Pod, sandbox_config
from embedded.host import Host, Place, stands_still
from embedded.image import make_archive, make_rootfs
from embedded.network import CONFIGS, Kind, Network
from embedded.tables import comparable
from embedded.wait import eventually

CGROUPS = Path("/sys/fs/cgroup")
#: Where distributions put the CNI plugins.
PLUGIN_DIRECTORIES = (Path("/usr/lib/cni"), Path("/opt/cni/bin"), Path("/usr/libexec/cni"))
PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr", "runc", "busybox", "ip", "iptables-nft-save", "unshare")

_HAS_IPV6 = Path("/proc/sys/net/ipv6").exists()

# A mount point that is also where the plugins are is not covered. Where the machine's resolv.conf is a link into /run,
# its target is gone from here, and ctr --net-host needs it.
_SETTLE = """
for directory in /etc/cni /var/lib/cni; do
    mkdir -p $directory
    mount -t tmpfs -o mode=755 tmpfs $directory
done
if [ "$1" != /opt/cni/bin ]; then
    mkdir -p /opt/cni
    mount -t tmpfs -o mode=755 tmpfs /opt/cni
    ln -s "$1" /opt/cni/bin
fi
mkdir -p /etc/cni/net.d /run/containerd
resolv=$(readlink -m /etc/resolv.conf)
if [ ! -e "$resolv" ]; then mkdir -p "${resolv%/*}"; : >"$resolv"; fi
echo 1 >/proc/sys/net/ipv4/ip_forward
[ ! -e /proc/sys/net/ipv6 ] || echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
"""

_CONTAINERD_CONFIG = """\
version = 2
root = "/run/containerd/root"
state = "/run/containerd/state"
disabled_plugins = [{disabled}]

[grpc]
  address = "{socket}"
"""


def missing() -> str | None:
    """Return why there can be no embedded node on this machine, None if there can."""
    if os.geteuid() != 0:
        return "an embedded node needs root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"an embedded node needs {', '.join(absent)}"
    if _plugins() is None:
        return f"an embedded node needs the CNI plugins in {' or '.join(map(str, PLUGIN_DIRECTORIES))}"
    return None


def _plugins() -> Path | None:
    return next((directory for directory in PLUGIN_DIRECTORIES if (directory / "bridge").exists()), None)


class Node(Host):
    """A node with containerd, and a client beside it on a LAN.

    ``directory`` is a temporary directory, under the same path inside and outside. ``client`` is the other host on the
    LAN; each has the other as its default route, and the client forwards nothing.
    """

    address = "198.51.100.1"
    address6 = "2001:db8:51::1"
    client_address = "198.51.100.2"
    client_address6 = "2001:db8:51::2"
    containerd_socket = "/run/containerd/containerd.sock"

    def __init__(self, name: str = "node", *, cri: bool = False) -> None:
        reason = missing()
        if reason is not None:
            raise RuntimeError(reason)
        self.directory = Path(tempfile.mkdtemp(prefix="ctrport-node-"))
        try:
            super().__init__(name)
        except BaseException:
            shutil.rmtree(self.directory)
            raise
        self._cri = Cri(self.path(self.containerd_socket)) if cri else None
        self._containerd: subprocess.Popen[str] | None = None
        self._containerd_paused = False
        self._containers: list[Container] = []
        self._pods: list[Pod] = []
        self.networks: list[Network] = []
        try:
            self.script(_SETTLE, str(_plugins()))
            self.rootfs = make_rootfs(self.directory / "rootfs")
            self.client = Host("client")
            self.at_close(self.client.close)
            self._join_lan()
        except BaseException:
            self.close()
            raise

    # The LAN

    def _join_lan(self) -> None:
        # The peer's namespace is named by a pid of the outside, so this runs outside the node's PID namespace.
        link = f"link add eth0 type veth peer name eth0 netns {self.client.pid}"
        Place(self.name, self.pid, ["net"]).run("ip", *link.split())
        for host, own, own6, other, other6 in (
            (self, self.address, self.address6, self.client_address, self.client_address6),
            (self.client, self.client_address, self.client_address6, self.address, self.address6),
        ):
            lines = ["link set eth0 up", f"address add {own}/24 dev eth0", f"route add default via {other}"]
            if _HAS_IPV6:
                lines += [f"address add {own6}/64 dev eth0 nodad", f"route add default via {other6}"]
            host.run("ip", "-batch", "-", input="\n".join(lines) + "\n")

    def add_address(self, address: str) -> None:
        """Give the node another address on the LAN."""
        if ":" in address:
            self.run("ip", "address", "add", f"{address}/64", "dev", "eth0", "nodad")
        else:
            self.run("ip", "address", "add", f"{address}/24", "dev", "eth0")

    # containerd

    def start_containerd(self, *, within: float = 20.0) -> None:
        """Start containerd and wait until it answers."""
        if self._containerd is not None:
            raise RuntimeError("containerd is running already")
        # The opt plugin would make /opt/containerd, which is the machine's.
        disabled = ["io.containerd.internal.v1.opt"] + ([] if self._cri is not None else ["io.containerd.grpc.v1.cri"])
        config = self.directory / "containerd.toml"
        config.write_text(
            _CONTAINERD_CONFIG.format(
                disabled=", ".join(f'"{plugin}"' for plugin in disabled), socket=self.containerd_socket
            )
            + (CRI_CONFIG if self._cri is not None else "")
        )
        with self.containerd_log.open("a") as log:
            containerd = self.spawn(
                "containerd", "--config", str(config), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._containerd = containerd

        def answers() -> bool:
            if containerd.poll() is not None:
                self._containerd = None
                tail = "\n".join(self.containerd_log.read_text().splitlines()[-10:])
                raise RuntimeError(f"containerd ended with status {containerd.returncode}:\n{tail}")
            # In this order: ctr waits for 10 s before a socket that refuses, such as a killed containerd leaves behind.
            return self.containerd_listens() and self.run("ctr", "version", check=False).returncode == 0

        eventually(answers, within=within, what="containerd answers")
        if self._cri is not None:
            eventually(self._cri.ready, within=within, what="containerd's CRI plugin is ready")
            self._import_images(self._cri)

    def containerd_listens(self) -> bool:
        """Whether something accepts connections on containerd's socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            try:
                client.connect(str(self.path(self.containerd_socket)))
            except OSError:
                return False
        return True

    def _import_images(self, cri: Cri) -> None:
        if all(map(cri.has_image, IMAGES)):
            return
        archive = make_archive(self.directory / "images.tar", self.rootfs, IMAGES)
        ctr = ("ctr", "--namespace", CRI_NAMESPACE)
        self.run(*ctr, "images", "import", "--snapshotter", SNAPSHOTTER, str(archive))
        archive.unlink()
        # The plugin hears of an image by an event, and would try to pull one that it has not heard of.
        eventually(lambda: all(map(cri.has_image, IMAGES)), what="the CRI plugin knows the images")

    @property
    def containerd_log(self) -> Path:
        """The file that has what containerd wrote, in all its runs."""
        return self.directory / "containerd.log"

    def stop_containerd(self) -> None:
        """End containerd as an upgrade would: politely, leaving the containers alone."""
        self._signal_containerd(signal.SIGTERM)
        self._containerd_ended()

    def kill_containerd(self) -> None:
        """End containerd as a crash would."""
        self._signal_containerd(signal.SIGKILL)
        self._containerd_ended()

    def pause_containerd(self) -> None:
        """Make containerd hang: connections stay, answers and events do not come."""
        self._signal_containerd(signal.SIGSTOP)
        self._containerd_paused = True
        containerd = self._containerd
        assert containerd is not None
        eventually(lambda: stands_still(containerd.pid), what="containerd standing still")

    def continue_containerd(self) -> None:
        """End the hang, as if nothing had been."""
        self._signal_containerd(signal.SIGCONT)
        self._containerd_paused = False

    def _signal_containerd(self, number: signal.Signals) -> None:
        if self._containerd is None:
            raise RuntimeError("containerd is not running")
        self._containerd.send_signal(number)

    def _containerd_ended(self) -> None:
        assert self._containerd is not None
        self._containerd.wait(20)
        self._containerd, self._containerd_paused = None, False

    # Networks and containers

    def add_network(
        self,
        name: str = "docker0",
        *,
        subnet: str = "172.17.0.0/16",
        subnet6: str | None = None,
        kind: Kind = "bridge",
        ip_masq: bool = True,
        hairpin: bool = True,
    ) -> Network:
        """Make a network known to CNI, which builds it for its first container. The first is plain ctr's.

        Pods can be on it as well, if it is the first or one of the next four.
        """
        directory = f"/etc/cni/net{len(self.networks)}.d" if self.networks else CONFIGS
        network = Network(name, kind, subnet, subnet6, ip_masq, hairpin, self._cri is not None, directory)
        network.write(self)
        self.networks.append(network)
        return network

    def start(
        self,
        id: str,
        *,
        namespace: str = "default",
        network: Network | Literal["first", "host"] | None = "first",
        labels: Mapping[str, str] | None = None,
        command: tuple[str, ...] = ("/bin/sleep", "600"),
        rootfs: Path | None = None,
        options: tuple[str, ...] = (),
    ) -> Container:
        """Start a container the way a user of ctr does: create, network and start are one command.

        Without a network it has one of its own with a loopback device only, as ctr does by default. ``options`` are
        more of ctr's.
        """
        if network == "first":
            if not self.networks:
                raise RuntimeError("the node has no network yet: add_network, or start with network=None")
            network = self.networks[0]
        joined = network if isinstance(network, Network) else None
        pid_file = self.directory / f"{namespace}-{id}.pid"
        argv = ["ctr", "--namespace", namespace, "run", "--detach", "--env", "PATH=/bin", "--pid-file", str(pid_file)]
        argv += ["--cgroup", f"/{self.directory.name}/{namespace}-{id}"]
        argv += ["--cni"] if joined is not None else ["--net-host"] if network == "host" else []
        for key, value in (labels or {}).items():
            argv += ["--label", f"{key}={value}"]
        argv += options
        argv += ["--rootfs", str(rootfs or self.rootfs), id, *command]
        self.run(*(argv if joined is None else joined.joining(*argv)))
        pid = int(pid_file.read_text())
        pid_file.unlink()
        container = Container(id, namespace, pid, self.outer_pid(f"{namespace}-{id}", pid), joined)
        self._containers.append(container)
        return container

    def kill(self, container: Container) -> None:
        """Kill a container's first process. Where containerd is there, its task is "stopped" on return."""
        if container.paused:
            self.resume(container)  # a frozen process does not die of a signal
        container.end()
        if self._containerd is not None and not self._containerd_paused:
            eventually(lambda: self.status(container) == "STOPPED", what=f"{container.id} is STOPPED")

    def delete(self, container: Container) -> None:
        """Remove a container and what CNI made for it; kill it first if it lives."""
        self.kill(container)
        self._ctr(container, "task", "delete", container.id)
        if container.network is not None:
            container.network.leave(self, container.cni_id, container.interfaces)
        self._ctr(container, "container", "delete", container.id)
        self._containers.remove(container)

    def pause(self, container: Container) -> None:
        """Freeze all processes of a container."""
        self._ctr(container, "task", "pause", container.id)
        container.paused = True

    def resume(self, container: Container) -> None:
        """Let them go on."""
        self._ctr(container, "task", "resume", container.id)
        container.paused = False

    def exec(self, container: Container, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a program as one more process of a container."""
        return self._ctr(container, "task", "exec", "--exec-id", f"exec-{os.urandom(4).hex()}", container.id, *argv)

    def status(self, container: Container) -> str | None:
        """Return what containerd says of its task ("RUNNING", "PAUSED", "STOPPED"), None where it knows of none."""
        lines = self._ctr(container, "task", "list").stdout.splitlines()[1:]
        return next((fields[2] for fields in map(str.split, lines) if fields[0] == container.id), None)

    def _ctr(self, container: Container, *argv: str) -> subprocess.CompletedProcess[str]:
        return self.run("ctr", "--namespace", container.namespace, *argv)

    def outer_pid(self, cgroup: str, pid: int) -> int:
        """Return what this process calls process ``pid`` of the node, which is in that cgroup below the node's own."""
        # A cgroup lists its processes as the reader counts, whoever they are; NSpid is how each level counts them.
        for processes in self._cgroups(f"{cgroup}/cgroup.procs"):
            for outer in processes.read_text().split():
                status = Path("/proc", outer, "status").read_text()
                if f"NSpid:\t{outer}\t{pid}\t" in status + "\t":
                    return int(outer)
        raise RuntimeError(f"{cgroup}: process {pid} of the node is not there, it ended already")

    def _cgroups(self, below: str) -> list[Path]:
        """Find a path below this node's cgroups: one in each hierarchy, or the one there is under cgroup v2."""
        return [*CGROUPS.glob(f"{self.directory.name}/{below}"), *CGROUPS.glob(f"*/{self.directory.name}/{below}")]

    # Pods

    def start_pod(
        self,
        name: str,
        *,
        namespace: str = "default",
        uid: str | None = None,
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        network: Network | None = None,
        host_network: bool = False,
        host_ports: Sequence[HostPort] = (),
    ) -> Pod:
        """Start a pod the way the kubelet does; its containers are started by the pod. ``host_ports`` are CNI's affair.

        On the first network if not told otherwise. With the ``uid`` of a pod whose sandbox ended it is the same pod
        with another sandbox, else another pod, though the name be the same.
        """
        cri = self.cri
        if host_network:
            network = None
        elif network is None:
            if not self.networks:
                raise RuntimeError("the node has no network yet: add_network, or start with host_network=True")
            network = self.networks[0]
        if network is not None:
            joined = network
            eventually(lambda: cri.knows(joined), what=f"the CRI plugin knows the network {network.name}")
        uid = uid or str(uuid.uuid4())
        cgroup = f"kubepods/pod{uid}"
        config = sandbox_config(
            namespace,
            name,
            uid,
            labels=labels or {},
            annotations=annotations or {},
            host_network=host_network,
            host_ports=host_ports,
            cgroup=f"/{self.directory.name}/{cgroup}",
        )
        id = cri.run_sandbox(config, network.handler if network is not None else "")
        pod = Pod(cri, id, config, network, lambda id, pid: self.outer_pid(f"{cgroup}/{id}", pid))
        self._pods.append(pod)
        return pod

    def stop_pod(self, pod: Pod) -> None:
        """End a pod with its containers and its network, as the kubelet does; containerd has them still, stopped."""
        self.cri.stop_sandbox(pod.id)
        pod.close()

    def remove_pod(self, pod: Pod) -> None:
        """Remove a pod and its containers; stop it first if it runs."""
        self.cri.remove_sandbox(pod.id)
        pod.close()
        self._pods.remove(pod)

    @property
    def cri(self) -> Cri:
        """The calls to containerd's CRI plugin."""
        if self._cri is None:
            raise RuntimeError("the node has no pods: make it with cri=True")
        return self._cri

    # What is in the kernel

    def tables(self, *, backend: Literal["nft", "legacy"] = "nft") -> str:
        """Return the rules of both families for comparing: no counters, no comments, no table that does nothing."""
        lines: list[str] = []
        for program in ("iptables", "ip6tables"):
            lines += comparable(self.run(f"{program}-{backend}-save").stdout, program)
        return "\n".join(lines)

    # The end

    def close(self) -> None:
        """Remove all of it. To be called once or more."""
        # What is frozen does not die: under cgroup v1 not even of SIGKILL.
        for freezer in [*self._cgroups("**/freezer.state")]:
            with contextlib.suppress(OSError):
                freezer.write_text("THAWED")
        try:
            for place in (*self._containers, *self._pods):
                place.close()
            super().close()
        finally:
            self._remove_cgroups()
            shutil.rmtree(self.directory, ignore_errors=True)

    def _remove_cgroups(self) -> None:
        # runc had no chance to. The processes are gone: the end of the host's init waited for them.
        for parent in self._cgroups(""):
            for directory, _, _ in os.walk(parent, topdown=False):
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(directory)
