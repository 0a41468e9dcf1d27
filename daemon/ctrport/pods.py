"""Which containers are published as one: those of a pod, by its sandbox; each other container by itself.

Pure. The CRI plugin runs a pod as several containers of containerd, one of which, the sandbox, is there to hold the
network namespace. Which is which says what the plugin has stored of them; whose pod it is, the kubelet's labels and the
network namespace that sandbox and container share. Labels alone make no pod: an image can bring any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .model import Container, ContainerKey, Live, Member, Pod, Role

#: Put on by the kubelet (pkg/kubelet/types/labels.go).
CONTAINER_NAME = "io.kubernetes.container.name"
POD_NAME = "io.kubernetes.pod.name"
POD_NAMESPACE = "io.kubernetes.pod.namespace"
POD_UID = "io.kubernetes.pod.uid"


@dataclass(frozen=True)
class Running:
    """One container of containerd that runs. ``netns`` identifies its network namespace.

    ``annotation`` is the ports that an annotation asks for, its own or, of a sandbox, its pod's; ``live`` is what the
    operator asked for, which counts for a container of a pod only if that is the sandbox. ``role`` is what it is to
    a pod. ``starts`` is whether its process waits yet to be let go on: its network may be made only now.
    """

    key: ContainerKey
    pid: int
    started: int
    netns: tuple[int, int]
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    annotation: str | None = None
    live: Live | None = None
    role: Role | None = None
    starts: bool = False


#: What a sandbox and the containers of its pod have in common, and no other pod with them.
_Home = tuple[str, tuple[int, int], str]


def _home(running: Running) -> _Home:
    return (running.key.namespace, running.netns, running.labels.get(POD_UID, ""))


class Pods:
    """Every container that runs, and what it is published as.

    A pod goes by the key of its sandbox. A container whose sandbox does not run is published as nothing.
    """

    def __init__(self) -> None:
        self._running: dict[ContainerKey, Running] = {}
        self._sandboxes: dict[_Home, list[ContainerKey]] = {}
        self._members: dict[_Home, list[ContainerKey]] = {}
        self._revisions: dict[ContainerKey, str] = {}

    @property
    def running(self) -> list[ContainerKey]:
        """Every container it was told of and not told to forget."""
        return list(self._running)

    @property
    def revisions(self) -> Mapping[ContainerKey, str]:
        """Of each that runs and that the operator's word is kept with: which revision of that it was seen with."""
        return self._revisions

    def see(self, running: Running) -> set[ContainerKey]:
        """Take in a container as it runs now. Returns the keys of what is published that this may touch."""
        touched = self.forget(running.key) if running.key in self._running else set()
        self._running[running.key] = running
        if running.live is not None:
            self._revisions[running.key] = running.live.revision
        if running.role is Role.SANDBOX:
            self._sandboxes.setdefault(_home(running), []).append(running.key)
        elif running.role is Role.MEMBER:
            self._members.setdefault(_home(running), []).append(running.key)
        return touched | self._published_as(running)

    def forget(self, key: ContainerKey) -> set[ContainerKey]:
        """Take out a container that no longer runs. Returns the keys of what is published that this may touch."""
        running = self._running.get(key)
        if running is None:
            return {key}
        touched = self._published_as(running)
        del self._running[key]
        self._revisions.pop(key, None)
        for homes in (self._sandboxes, self._members):
            keys = homes.get(_home(running), [])
            if key in keys:
                keys.remove(key)
            if not keys:
                homes.pop(_home(running), None)
        return touched

    def seen(self, key: ContainerKey) -> Running | None:
        """Return a container as it was last seen, None where it is not known to run."""
        return self._running.get(key)

    def process(self, key: ContainerKey) -> tuple[int, int] | None:
        """Return the process of a container that runs, and when that started; None where it is not known to run."""
        running = self._running.get(key)
        return None if running is None else (running.pid, running.started)

    def get(self, key: ContainerKey) -> Container | None:
        """Return what is published under ``key``, None where that is nothing."""
        running = self._running.get(key)
        if running is None or running.role is Role.MEMBER:
            return None
        if running.role is Role.SANDBOX:
            members = (self._running[member] for member in sorted(self._members.get(_home(running), ())))
            names = (running.labels.get(POD_NAMESPACE, ""), running.labels.get(POD_NAME, ""))
            pod = Pod(*names, labels=running.labels)
            its: tuple[tuple[Member, ...], Pod | None] = (tuple(map(_member, members)), pod)
        else:
            its = ((_member(running),), None)
        return Container(key, running.pid, running.started, *its, running.annotation, running.live)

    def _published_as(self, running: Running) -> set[ContainerKey]:
        if running.role is Role.MEMBER:
            return set(self._sandboxes.get(_home(running), ()))
        return {running.key}


def _member(running: Running) -> Member:
    return Member(running.key.id, running.labels.get(CONTAINER_NAME), running.labels)
