"""What containerd lists of one container: what it has stored of it, and how its task is. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .api import containers_pb2, task_pb2
from .model import ContainerKey, Live, Role
from .stored import EXTENSION, SANDBOX, annotation_of, live_of, role_of

#: The states in which a task has its network, and with it its mappings, or gets it before it starts.
_RUNNING = frozenset({task_pb2.CREATED, task_pb2.RUNNING, task_pb2.PAUSED, task_pb2.PAUSING})


@dataclass(frozen=True)
class Listed:
    """A container with a task that was created, or is running, pausing or paused.

    ``pid`` is its init process as containerd's PID namespace counts it. None: the task's shim did not tell its state
    in time (containerd gives it 2 s), so whether it runs is not known, and what was known of it stands. ``annotation``
    is the ports that an annotation of it, or of the pod whose sandbox it is, asks for; None too where nobody asked.
    ``live`` is what the operator has it publish. ``runs`` is whether all that is so: else there is no such task.
    ``cgroup`` is the one that its processes are to be in, in runc's words, where that was asked for. One that is
    ``paused`` has its network and answers nobody. One that ``starts`` has a process that waits to be let go on, and may
    have no network yet. ``role`` is what the CRI plugin has it for in a pod.
    """

    key: ContainerKey
    pid: int | None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    annotation: str | None = None
    live: Live | None = None
    runs: bool = True
    cgroup: str = ""
    paused: bool = False
    starts: bool = False
    role: Role | None = None


def as_listed(
    key: ContainerKey, process: task_pb2.Process | None, container: containers_pb2.Container, annotations: bool
) -> Listed:
    """Return what containerd says of a container, and of its task where it has one; ``annotations``: those, too."""
    annotation = None
    if annotations:
        sandbox = container.extensions[SANDBOX].value if SANDBOX in container.extensions else None
        annotation = annotation_of(container.spec.value, sandbox)
    role = role_of(container.extensions)
    return with_task(Listed(key, None, dict(container.labels), annotation, live_kept(container), role=role), process)


def with_task(stored: Listed, process: task_pb2.Process | None) -> Listed:
    """Return what is stored of a container with what is said of its task, if it has one."""
    unknown = process is not None and process.status == task_pb2.UNKNOWN
    runs = unknown or (process is not None and process.status in _RUNNING)
    pid = process.pid if process is not None and runs and not unknown else None
    status = None if process is None else process.status
    starts, paused = status == task_pb2.CREATED, status == task_pb2.PAUSED
    return replace(stored, pid=pid, runs=runs, starts=starts, paused=paused)


def live_kept(container: containers_pb2.Container) -> Live | None:
    """Return what is kept with a container of what the operator has it publish."""
    if EXTENSION not in container.extensions:
        return None
    kept = container.extensions[EXTENSION]
    return live_of(kept.type_url, kept.value)
