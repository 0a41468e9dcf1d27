"""Pods, made the way the kubelet makes them: by calls to containerd's CRI plugin."""

from __future__ import annotations

import collections
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

# gRPC's core writes to stderr by itself what it also reports as an error. It reads this when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from embedded.api import cri_pb2, cri_pb2_grpc
from embedded.host import Place
from embedded.network import CONFIGS, HANDLERS, PLUGINS, Network

#: The containerd namespace that the CRI plugin keeps pods in.
CRI_NAMESPACE = "k8s.io"
SNAPSHOTTER = "native"
PAUSE_IMAGE = "localhost/pause:1"
BUSYBOX_IMAGE = "localhost/busybox:1"
#: What is to be imported before the first pod, each with the command it runs if not told otherwise.
IMAGES = {PAUSE_IMAGE: ("/bin/sleep", "infinity"), BUSYBOX_IMAGE: ("/bin/sh",)}

#: (host port, container port, protocol)
HostPort = tuple[int, int, Literal["tcp", "udp", "sctp"]]

# Seconds for one call. CNI's plugins run within it, and each may wait for the xtables lock.
_DEADLINE = 30.0

# Without CAP_SYS_RESOURCE no process may have a lower oom_score_adj than this one, and the plugin wants one of -998 for
# a sandbox. An AppArmor profile it would load is the machine's. The port is where it serves exec and attach: any free
# one, if not told, and so perhaps the one that a test is about.
_CONFIG = f"""
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "10010"

  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{PLUGINS}"
    conf_dir = "{CONFIGS}"

  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    snapshotter = "{SNAPSHOTTER}"

    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"""

# Only a runtime handler can have another network than the rest, and handlers are read at the start, so there are
# some for networks to come.
_HANDLER = """
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}]
      runtime_type = "io.containerd.runc.v2"
      cni_conf_dir = "{directory}"
"""

#: Added to containerd's configuration.
CRI_CONFIG = _CONFIG + "".join(_HANDLER.format(name=name, directory=directory) for name, directory in HANDLERS.items())


class CriError(RuntimeError):
    """A call to the CRI plugin failed, or was not answered in time."""


class Cri:
    """The calls to the CRI plugin of the containerd that listens on ``socket``."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._attempts: collections.Counter[tuple[str, ...]] = collections.Counter()

    def ready(self) -> bool:
        """Whether the plugin has started: it does so after containerd answers other calls."""
        try:
            with self._runtime() as runtime:
                status: cri_pb2.StatusResponse = runtime.Status(cri_pb2.StatusRequest(), timeout=_DEADLINE)
        except CriError:
            return False
        return any(condition.type == "RuntimeReady" and condition.status for condition in status.status.conditions)

    def knows(self, network: Network) -> bool:
        """Whether the plugin has read the configuration of a network."""
        with self._runtime() as runtime:
            request = cri_pb2.StatusRequest(verbose=True)
            status: cri_pb2.StatusResponse = runtime.Status(request, timeout=_DEADLINE)
        if not network.handler:
            return any(condition.type == "NetworkReady" and condition.status for condition in status.status.conditions)
        return status.info.get(f"lastCNILoadStatus.{network.handler}") == "OK"

    def has_image(self, name: str) -> bool:
        """Whether the plugin knows an image: a moment after it was imported."""
        request = cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=name))
        with self._connected(cri_pb2_grpc.ImageServiceStub) as images:
            status: cri_pb2.ImageStatusResponse = images.ImageStatus(request, timeout=_DEADLINE)
        return status.HasField("image")

    def run_sandbox(self, config: cri_pb2.PodSandboxConfig, handler: str) -> str:
        """Start a sandbox, as one more attempt at its pod, and return its id."""
        config.metadata.attempt = self._attempt(config.metadata.uid)
        with self._runtime() as runtime:
            request = cri_pb2.RunPodSandboxRequest(config=config, runtime_handler=handler)
            response: cri_pb2.RunPodSandboxResponse = runtime.RunPodSandbox(request, timeout=_DEADLINE)
        return response.pod_sandbox_id

    def stop_sandbox(self, id: str) -> None:
        """End a sandbox and all in it, and have CNI take its network down."""
        with self._runtime() as runtime:
            runtime.StopPodSandbox(cri_pb2.StopPodSandboxRequest(pod_sandbox_id=id), timeout=_DEADLINE)

    def remove_sandbox(self, id: str) -> None:
        """Remove a sandbox and its containers; stops it first if it runs."""
        with self._runtime() as runtime:
            runtime.RemovePodSandbox(cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=id), timeout=_DEADLINE)

    def sandboxes(self) -> Sequence[cri_pb2.PodSandbox]:
        """Return every sandbox there is, running or not."""
        with self._runtime() as runtime:
            response: cri_pb2.ListPodSandboxResponse = runtime.ListPodSandbox(
                cri_pb2.ListPodSandboxRequest(), timeout=_DEADLINE
            )
        return response.items

    def sandbox(self, id: str) -> tuple[cri_pb2.PodSandboxStatus, int]:
        """Return what the plugin says of a sandbox, and the pid of its first process, 0 where it has none."""
        with self._runtime() as runtime:
            request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=id, verbose=True)
            response: cri_pb2.PodSandboxStatusResponse = runtime.PodSandboxStatus(request, timeout=_DEADLINE)
        return response.status, json.loads(response.info["info"])["pid"]

    def start_container(
        self, sandbox: str, config: cri_pb2.ContainerConfig, sandbox_config: cri_pb2.PodSandboxConfig
    ) -> tuple[str, int]:
        """Start a container, as one more attempt at that of its pod, and return its id and its first process's pid."""
        config.metadata.attempt = self._attempt(sandbox_config.metadata.uid, config.metadata.name)
        with self._runtime() as runtime:
            request = cri_pb2.CreateContainerRequest(
                pod_sandbox_id=sandbox, config=config, sandbox_config=sandbox_config
            )
            id: str = runtime.CreateContainer(request, timeout=_DEADLINE).container_id
            runtime.StartContainer(cri_pb2.StartContainerRequest(container_id=id), timeout=_DEADLINE)
            status: cri_pb2.ContainerStatusResponse = runtime.ContainerStatus(
                cri_pb2.ContainerStatusRequest(container_id=id, verbose=True), timeout=_DEADLINE
            )
        return id, json.loads(status.info["info"])["pid"]

    def stop_container(self, id: str) -> None:
        """Kill a container; it is there still, with its name taken."""
        with self._runtime() as runtime:
            runtime.StopContainer(cri_pb2.StopContainerRequest(container_id=id), timeout=_DEADLINE)

    def remove_container(self, id: str) -> None:
        """Remove a container; kill it first if it runs."""
        with self._runtime() as runtime:
            runtime.RemoveContainer(cri_pb2.RemoveContainerRequest(container_id=id), timeout=_DEADLINE)

    def _attempt(self, *of: str) -> int:
        # Two of a name and attempt are refused, also where the first ended and also across the sandboxes of a pod.
        self._attempts[of] += 1
        return self._attempts[of] - 1

    def _runtime(self) -> contextlib.AbstractContextManager[Any]:
        return self._connected(cri_pb2_grpc.RuntimeServiceStub)

    @contextlib.contextmanager
    def _connected(self, stub: Callable[[grpc.Channel], Any]) -> Iterator[Any]:
        # A channel for each use: one that was kept would be in its pause when a containerd that ended is back.
        options = [("grpc.default_authority", "localhost")]  # else it is the path, percent-encoded
        with grpc.insecure_channel(f"unix:{self._socket}", options) as channel:
            try:
                yield stub(channel)
            except grpc.RpcError as error:
                call: Any = error  # which it is as well
                raise CriError(f"{call.code().name}: {call.details()}") from error


class PodContainer:
    """A container of a pod. ``pid`` and ``outer_pid`` are its first process, as the node and as this process count."""

    def __init__(self, cri: Cri, id: str, name: str, pid: int, outer_pid: int) -> None:
        self._cri = cri
        self.id = id
        self.name = name
        self.pid = pid
        self.outer_pid = outer_pid

    def stop(self) -> None:
        """Kill it; containerd has it still, stopped."""
        self._cri.stop_container(self.id)

    def remove(self) -> None:
        """Remove it; kill it first if it runs."""
        self._cri.remove_container(self.id)


class Pod(Place):
    """A pod, as a place to put programs and sockets: its network namespace, that of the node for a host network pod.

    ``id`` is its sandbox's; ``pid`` and ``outer_pid`` are the sandbox's process, as the node and as this process count.
    ``network`` is None with a host network, and the addresses too. ``labels`` and ``annotations`` are its own, without
    those that the kubelet adds.
    """

    def __init__(
        self,
        cri: Cri,
        id: str,
        config: cri_pb2.PodSandboxConfig,
        network: Network | None,
        outer_pid: Callable[[str, int], int],
    ) -> None:
        status, self.pid = cri.sandbox(id)
        self._cri = cri
        self._config = config
        self._outer_pid = outer_pid
        self.outer_pid = outer_pid(id, self.pid)
        super().__init__(config.metadata.name, self.outer_pid, ["net"])
        self.id = id
        self.namespace = config.metadata.namespace
        self.uid = config.metadata.uid
        self.network = network
        self.labels = {key: value for key, value in config.labels.items() if key not in _identity(config)}
        self.annotations = dict(config.annotations)
        addresses = [status.network.ip, *(additional.ip for additional in status.network.additional_ips)]
        #: Its IPv4 address, None where CNI gave it none.
        self.address = next((address for address in addresses if "." in address), None)
        #: Its IPv6 address, None where CNI gave it none.
        self.address6 = next((address for address in addresses if ":" in address), None)

    def start(
        self,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        command: tuple[str, ...] = ("/bin/sleep", "600"),
    ) -> PodContainer:
        """Start a container. The same name again is another attempt at the same, as when a container crashed."""
        config = cri_pb2.ContainerConfig(
            metadata=cri_pb2.ContainerMetadata(name=name),
            image=cri_pb2.ImageSpec(image=BUSYBOX_IMAGE),
            command=command,
            labels={**(labels or {}), **_identity(self._config), "io.kubernetes.container.name": name},
            annotations=annotations,
            linux=cri_pb2.LinuxContainerConfig(
                security_context=cri_pb2.LinuxContainerSecurityContext(
                    namespace_options=self._config.linux.security_context.namespace_options
                )
            ),
        )
        id, pid = self._cri.start_container(self.id, config, self._config)
        return PodContainer(self._cri, id, name, pid, self._outer_pid(id, pid))


def sandbox_config(
    namespace: str,
    name: str,
    uid: str,
    *,
    labels: Mapping[str, str],
    annotations: Mapping[str, str],
    host_network: bool,
    host_ports: Sequence[HostPort],
    cgroup: str,
) -> cri_pb2.PodSandboxConfig:
    """Return what the kubelet asks for when it starts such a pod."""
    config = cri_pb2.PodSandboxConfig(
        metadata=cri_pb2.PodSandboxMetadata(namespace=namespace, name=name, uid=uid),
        hostname="" if host_network else name,  # the node's own, which may not be set
        port_mappings=[
            cri_pb2.PortMapping(protocol=protocol.upper(), container_port=container_port, host_port=host_port)
            for host_port, container_port, protocol in host_ports
        ],
        annotations=annotations,
        linux=cri_pb2.LinuxPodSandboxConfig(
            cgroup_parent=cgroup,
            security_context=cri_pb2.LinuxSandboxSecurityContext(
                namespace_options=cri_pb2.NamespaceOption(
                    network=cri_pb2.NODE if host_network else cri_pb2.POD, pid=cri_pb2.CONTAINER
                )
            ),
        ),
    )
    config.labels.update({**labels, **_identity(config)})
    return config


def _identity(config: cri_pb2.PodSandboxConfig) -> dict[str, str]:
    """Return the labels by which the kubelet finds again what it started."""
    return {
        "io.kubernetes.pod.namespace": config.metadata.namespace,
        "io.kubernetes.pod.name": config.metadata.name,
        "io.kubernetes.pod.uid": config.metadata.uid,
    }
