"""What an event of containerd's says: which container is to be looked at again.

An event carries no truth. One that cannot be read, or that names what containerd itself would not take, is skipped:
what it was about is seen at the next look.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from .api import events_pb2, payloads_pb2
from .events import warn_once
from .model import ContainerKey, is_identifier

log = logging.getLogger(__name__)

_Payload = (
    payloads_pb2.TaskCreate
    | payloads_pb2.TaskStart
    | payloads_pb2.TaskExit
    | payloads_pb2.TaskDelete
    | payloads_pb2.TaskPaused
    | payloads_pb2.TaskResumed
    | payloads_pb2.ContainerCreate
    | payloads_pb2.ContainerUpdate
    | payloads_pb2.ContainerDelete
)

#: The topics of what is stored of a container, and of its task before it starts.
CREATED, UPDATED, DELETED = "/containers/create", "/containers/update", "/containers/delete"
TASK_CREATED = "/tasks/create"
#: Those of what is not to be looked at yet: a container that was just made does not run.
AHEAD = frozenset({CREATED, TASK_CREATED})

_PAYLOADS: dict[str, type[_Payload]] = {
    TASK_CREATED: payloads_pb2.TaskCreate,
    "/tasks/start": payloads_pb2.TaskStart,
    "/tasks/exit": payloads_pb2.TaskExit,
    "/tasks/delete": payloads_pb2.TaskDelete,
    "/tasks/paused": payloads_pb2.TaskPaused,
    "/tasks/resumed": payloads_pb2.TaskResumed,
    CREATED: payloads_pb2.ContainerCreate,
    UPDATED: payloads_pb2.ContainerUpdate,
    DELETED: payloads_pb2.ContainerDelete,
}

_ABOUT_CONTAINERS = (payloads_pb2.ContainerCreate, payloads_pb2.ContainerUpdate, payloads_pb2.ContainerDelete)

#: The topics that make a container worth another look, or will.
TOPICS = tuple(_PAYLOADS)


@dataclass(frozen=True)
class TaskEvent:
    """Something happened to this container: look at it again. ``topic`` says what, for people.

    ``pid`` is the init process that the event names, if it names one: where to begin to look, and no truth either.
    """

    key: ContainerKey
    topic: str
    pid: int | None = None


def task_event(envelope: events_pb2.Envelope) -> TaskEvent | None:
    """Return what an event says, or None when it is not about a container's own task, or malformed."""
    payload_type = _PAYLOADS.get(envelope.topic)
    if payload_type is None:
        return None
    # containerd's type_url is the bare name; whoever publishes by other means may put an authority before it.
    if envelope.event.type_url.rpartition("/")[2] != payload_type.DESCRIPTOR.full_name:
        log.debug("skipped an event %s that holds a %s", envelope.topic, envelope.event.type_url)
        return None
    try:
        payload = payload_type.FromString(envelope.event.value)
    except DecodeError as error:
        log.debug("skipped an event %s that cannot be decoded: %s", envelope.topic, error)
        return None
    if isinstance(payload, _ABOUT_CONTAINERS):
        container = payload.id
    else:
        container = payload.container_id
        # A process that was exec'd into a container and exits is not the container.
        if isinstance(payload, (payloads_pb2.TaskExit, payloads_pb2.TaskDelete)) and payload.id not in ("", container):
            return None
    if not (checked(envelope.namespace, "namespace") and checked(container, "container id")):
        return None
    pid = payload.pid if isinstance(payload, (payloads_pb2.TaskCreate, payloads_pb2.TaskStart)) else 0
    return TaskEvent(ContainerKey(envelope.namespace, container), envelope.topic, pid or None)


def checked(name: str, what: str) -> bool:
    """Whether ``name`` may go on into rules and logs; containerd checks too, so False is a warning's worth."""
    if is_identifier(name):
        return True
    warn_once(log, f"skipped a {what} that containerd itself would not take: {name!r:.100}")
    return False
