"""containerd over gRPC: who runs, and when to look again.

Nothing is kept here between two calls but the connection. An event carries no truth: it names a container that is to
be looked at again, so a lost, doubled or late one costs latency only. There is no replay, and a hung containerd is
silent, so the caller lists once events() is entered, lists again after each loss, and probes with version().

    ContainerdError
    ├── Unavailable     no socket, nobody listens, or the connection broke: wait with connected()
    ├── Unresponsive    it took the call and did not answer in time
    ├── NotFound        it has no such thing
    └── Refused         anything else, such as no permission
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

# gRPC's core writes to stderr by itself what it also reports as an error. It reads this when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty

from .api import (
    containers_pb2,
    containers_pb2_grpc,
    events_pb2,
    events_pb2_grpc,
    namespaces_pb2,
    namespaces_pb2_grpc,
    task_pb2,
    tasks_pb2,
    tasks_pb2_grpc,
    version_pb2,
    version_pb2_grpc,
)
from .cgroups import cgroup_of
from .events import warn_once
from .lines import Failure
from .listed import Listed, as_listed, live_kept, with_task
from .model import ContainerKey, Live, Mapping
from .scheduling import late_threads
from .stored import EXTENSION, TYPE, value_of
from .tally import Tally
from .taskevents import TOPICS, TaskEvent, checked, task_event

log = logging.getLogger(__name__)
# Its Python side logs a traceback for what it also reports, and at debug level a line for each call.
logging.getLogger("grpc").setLevel(logging.CRITICAL)

Request = TypeVar("Request")
Response = TypeVar("Response")

#: Seconds that containerd has for one call, and for the first event of a subscription.
DEADLINE = 5.0

#: Seconds it has to tell its version, which it knows without asking disk or shim.
PROBE_DEADLINE = 3.0

#: Seconds from one try to the next, doubled each time from the first to the second of them.
RETRY_PAUSES = (0.05, 2.0)
MARK_PAUSES = (0.002, 0.5)

#: Seconds that gRPC's own threads may be woken late by the clock: by so much its deadlines and pauses may be longer.
#: They look some twenty times a second whether there is something to do, and mostly there is nothing, which takes
#: 0.08 % of a core, and 0.03 this way. No option of gRPC's calms them. What containerd sends wakes them at once.
SLACK = 0.5
#: Seconds that containerd has for the call before that.
FIRST_DEADLINE = 0.2

CHANNEL_OPTIONS = (
    ("grpc.default_authority", "localhost"),  # else it is the path, percent-encoded
    ("grpc.max_receive_message_length", 16 << 20),  # what containerd sends at most
    ("grpc.initial_reconnect_backoff_ms", int(RETRY_PAUSES[0] * 1000)),
    ("grpc.max_reconnect_backoff_ms", int(RETRY_PAUSES[1] * 1000)),
    ("grpc.min_reconnect_backoff_ms", int(DEADLINE * 1000)),  # how long one try may take, in spite of its name
)


class ContainerdError(Failure):
    """containerd could not be asked, or did not do what it was asked: one sentence with the path of its socket."""


class Unavailable(ContainerdError):
    """No socket, nobody who listens on it, or a connection that broke."""


class Unresponsive(ContainerdError):
    """containerd took the call and did not answer before the deadline."""


class NotFound(ContainerdError):
    """containerd has no such thing."""


class Refused(ContainerdError):
    """containerd, or the kernel before it, will not: waiting does not mend it."""


class Containerd:
    """A connection to containerd; an async context manager, to be entered and left in one event loop.

    It connects by itself, and again after a loss. Every method may be called by several tasks at a time. Only
    connected() waits for a containerd that is not there; the others raise a ContainerdError: at once where nobody
    listens, after DEADLINE seconds where nobody answers, and containers(), which asks more than once, after twice that.
    """

    _channel: grpc.aio.Channel

    def __init__(self, address: str, tally: Tally | None = None, *, lasting: bool = False) -> None:
        """``address`` is the path of containerd's unix socket; it need not be there yet. ``tally`` has what fails.

        A ``lasting`` connection is held for days, and takes as little as it can while nothing happens.
        """
        self.address = address
        self._tally = Tally() if tally is None else tally
        self._lasting = lasting

    async def __aenter__(self) -> Containerd:
        if self._lasting:
            await _call_once(self.address)
        with late_threads(SLACK) if self._lasting else contextlib.nullcontext():
            channel = grpc.aio.insecure_channel(f"unix:{quote(self.address)}", options=CHANNEL_OPTIONS)
        self._channel = channel
        # The generated stubs are untyped; each method gets its type here, once.
        version: Any = _stub(version_pb2_grpc.VersionStub, channel)
        self._version: grpc.aio.UnaryUnaryMultiCallable[Empty, version_pb2.VersionResponse] = version.Version
        namespaces: Any = _stub(namespaces_pb2_grpc.NamespacesStub, channel)
        self._namespaces: grpc.aio.UnaryUnaryMultiCallable[
            namespaces_pb2.ListNamespacesRequest, namespaces_pb2.ListNamespacesResponse
        ] = namespaces.List
        containers: Any = _stub(containers_pb2_grpc.ContainersStub, channel)
        self._container: grpc.aio.UnaryUnaryMultiCallable[
            containers_pb2.GetContainerRequest, containers_pb2.GetContainerResponse
        ] = containers.Get
        self._list: grpc.aio.UnaryUnaryMultiCallable[
            containers_pb2.ListContainersRequest, containers_pb2.ListContainersResponse
        ] = containers.List
        self._containers: grpc.aio.UnaryStreamMultiCallable[
            containers_pb2.ListContainersRequest, containers_pb2.ListContainerMessage
        ] = containers.ListStream
        self._update: grpc.aio.UnaryUnaryMultiCallable[
            containers_pb2.UpdateContainerRequest, containers_pb2.UpdateContainerResponse
        ] = containers.Update
        tasks: Any = _stub(tasks_pb2_grpc.TasksStub, channel)
        self._task: grpc.aio.UnaryUnaryMultiCallable[tasks_pb2.GetRequest, tasks_pb2.GetResponse] = tasks.Get
        self._tasks: grpc.aio.UnaryUnaryMultiCallable[tasks_pb2.ListTasksRequest, tasks_pb2.ListTasksResponse] = (
            tasks.List
        )
        events: Any = _stub(events_pb2_grpc.EventsStub, channel)
        self._publish: grpc.aio.UnaryUnaryMultiCallable[events_pb2.PublishRequest, Empty] = events.Publish
        self._subscribe: grpc.aio.UnaryStreamMultiCallable[events_pb2.SubscribeRequest, events_pb2.Envelope] = (
            events.Subscribe
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def connected(self, tried: Callable[[], None] = lambda: None) -> None:
        """Wait, for as long as it takes, until containerd answers; ``tried`` is called after each try in vain.

        Costs next to nothing while it waits: the socket is tried every two seconds. Raises Refused where waiting cannot
        help.
        """
        pause, longest = RETRY_PAUSES
        told = False
        while True:
            try:
                await self.version()
            except (Unavailable, Unresponsive) as error:
                if not told:
                    log.warning("%s; waiting for it", error)
                told = True
            else:
                return
            # Not called again until there is a connection: a failed call costs gRPC memory that it never gives back
            # (grpc/grpc#38499). A look at the state costs nothing, whereas gRPC's own wait for it, once cancelled,
            # lives on and wakes an event loop that is closed by then.
            while True:
                tried()
                await asyncio.sleep(pause)
                if self._channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY:
                    break
            pause = min(2 * pause, longest)  # for a containerd that takes the connection and fails each call at once

    async def version(self) -> str:
        """Return containerd's version; also the probe: fails at once when it is dead, else within PROBE_DEADLINE."""
        return (await self._call(self._version, Empty(), deadline=PROBE_DEADLINE)).version

    async def namespaces(self) -> list[str]:
        """Return the names of the containerd namespaces, sorted."""
        response = await self._call(self._namespaces, namespaces_pb2.ListNamespacesRequest())
        return sorted(n.name for n in response.namespaces if checked(n.name, "namespace"))

    @contextlib.asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[TaskEvent]]:
        """Subscribe, and give an endless iterator over the events of every namespace, for one reader.

        Once entered, no event is missed until the iterator raises: list afterwards, and nothing falls between. When
        ``/tasks/exit`` is here, container() no longer has the container, and when ``/tasks/start`` is, it has. The
        iterator raises Unavailable when containerd goes away; a containerd that hangs leaves it silent. Read on
        without delay: what is not read piles up in containerd's memory without bound.

        Entering raises a ContainerdError; Unresponsive when no subscription comes about within DEADLINE seconds.
        """
        # containerd answers a subscription with its first event, not before, and takes it up while it already serves
        # the next call: of events published right after the call every second one was lost (1.6.20, idle machine).
        # So we publish one of our own until it comes back; from then on we are on the list.
        mark = f"/ctrport/subscribed/{secrets.token_hex(8)}"
        # Filters are joined by "or". The marks of other subscribers, and execs, images and content, stay away.
        request = events_pb2.SubscribeRequest(filters=[f'topic=="{topic}"' for topic in (*TOPICS, mark)])
        call = self._subscribe(request)
        try:
            events = _Events(call, self.address, self._tally)
            await self._established(events, mark)
            yield events
        finally:
            call.cancel()  # an abandoned call is never collected (grpc/grpc#43462)

    async def containers(self, namespace: str, *, annotations: bool = False, ended: bool = False) -> list[Listed]:
        """Return every container of ``namespace`` whose task was created or runs, pauses or is paused, sorted by id.

        Empty for a namespace that is not there. ``annotations`` is whether to read those as well. With ``ended`` those
        are among them that have no such task, and do not run.
        """
        # In this order: the container of a task that was there is missing only when both have been deleted since.
        processes = await self._processes(namespace)
        listed = []
        async for container in self._stored(namespace):
            key = ContainerKey(namespace, container.id)
            found = as_listed(key, processes.get(container.id), container, annotations)
            listed += [found] if found.runs or ended else []
        return sorted(listed, key=lambda found: found.key)

    async def container(
        self, key: ContainerKey, *, annotations: bool = False, stored: Listed | None = None
    ) -> Listed | None:
        """Return one container as it is now, or None when it is gone, or has no task but one that ended.

        ``stored`` is what the method of that name said of it, where nothing of that has changed.
        """
        if stored is not None:
            with contextlib.suppress(NotFound):
                found = with_task(stored, await self._process(key))
                return found if found.runs else None
            return None
        # Both at once, for each takes about a millisecond of the time in which the port is not open yet.
        asked = asyncio.ensure_future(self._container_of(key))
        try:
            process = await self._process(key)
            found = as_listed(key, process, await asked, annotations)
            return found if found.runs else None
        except NotFound:
            # Not cancelled, but let come to its end: a call that is cancelled costs memory that is never given back.
            await asyncio.wait((asked,))
            return None
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    async def stored(self, key: ContainerKey, *, annotations: bool = False) -> Listed:
        """Return what containerd has stored of a container, whether it runs or not. Raises ``NotFound``."""
        container = await self._container_of(key)
        return replace(as_listed(key, None, container, annotations), cgroup=cgroup_of(container.spec.value))

    async def live(self, key: ContainerKey) -> Live | None:
        """Return what is kept with a container of what the operator has it publish. Raises ``NotFound``."""
        return live_kept(await self._container_of(key))

    async def keep_live(self, key: ContainerKey, mappings: Sequence[Mapping], revision: str) -> None:
        """Keep with a container what it is to publish, until it is deleted. Raises ``NotFound``; and ``ValueError``.

        Nothing else of the container is written. It is not seen, though, whether it was written meanwhile: containerd
        has no condition for a write.
        """
        word = AnyMessage(type_url=TYPE, value=value_of(mappings, revision))
        container = containers_pb2.Container(id=key.id, extensions={EXTENSION: word})
        request = containers_pb2.UpdateContainerRequest(container=container)
        request.update_mask.paths.append(f"extensions.{EXTENSION}")
        await self._call(self._update, request, key.namespace)

    async def _container_of(self, key: ContainerKey) -> containers_pb2.Container:
        request = containers_pb2.GetContainerRequest(id=key.id)
        return (await self._call(self._container, request, key.namespace)).container

    async def _process(self, key: ContainerKey) -> task_pb2.Process:
        request = tasks_pb2.GetRequest(container_id=key.id)
        return (await self._call(self._task, request, key.namespace)).process

    async def _processes(self, namespace: str) -> dict[str, task_pb2.Process]:
        """Return the container's own process of every task, by container id."""
        try:
            response = await self._call(self._tasks, tasks_pb2.ListTasksRequest(), namespace)
        except Unresponsive:
            # To list, containerd asks one shim after the other, 2 s each: three that hang outlast our deadline, and
            # no container would ever be listed again. Asked for at the same time, they hold up nobody but themselves.
            await self.version()
        else:
            return {process.container_id or process.id: process for process in response.tasks}
        keys = [ContainerKey(namespace, container.id) async for container in self._stored(namespace)]
        answers = await asyncio.gather(*map(self._process, keys), return_exceptions=True)
        processes = {}
        for key, answer in zip(keys, answers, strict=True):
            if isinstance(answer, task_pb2.Process):
                processes[key.id] = answer
            elif not isinstance(answer, NotFound):
                raise answer
        return processes

    async def _stored(self, namespace: str) -> AsyncIterator[containers_pb2.Container]:
        """Yield what containerd has stored of each container, with a task or without."""
        request = containers_pb2.ListContainersRequest()
        # In one message, which takes a tenth of what a message for each takes. That may be more than gRPC takes, or
        # have one in it that cannot be decoded.
        with contextlib.suppress(Refused):
            for container in (await self._call(self._list, request, namespace)).containers:
                if checked(container.id, "container id"):
                    yield container
            return
        call = self._containers(request, timeout=DEADLINE, metadata=_metadata(namespace))
        try:
            with _errors(self.address, DEADLINE, self._tally):
                while (message := await call.read()) is not grpc.aio.EOF:
                    # gRPC gives None for a message that cannot be decoded; one such must not hide the others.
                    if not isinstance(message, containers_pb2.ListContainerMessage):
                        warn_once(log, f"containerd sent a container of namespace {namespace} that cannot be decoded")
                    elif checked(message.container.id, "container id"):
                        yield message.container
        finally:
            call.cancel()

    async def _established(self, events: _Events, mark: str) -> None:
        """Return once the event of topic ``mark`` has come; raise a ContainerdError when none can come."""
        reading = asyncio.ensure_future(events.until(mark))
        marking = asyncio.ensure_future(self._marking(mark))
        try:
            await asyncio.wait({reading, marking}, return_when=asyncio.FIRST_COMPLETED)
            await (reading if reading.done() else marking)
        finally:
            for task in (reading, marking):
                task.cancel()
            await asyncio.gather(reading, marking, return_exceptions=True)

    async def _marking(self, mark: str) -> NoReturn:
        """Publish an event of topic ``mark`` again and again; raise Unresponsive after DEADLINE seconds."""
        # The event must be there: containerd 1.6.20 crashes on one published without. Empty is a type that every
        # other subscriber can decode.
        event = AnyMessage(type_url=Empty.DESCRIPTOR.full_name)
        request = events_pb2.PublishRequest(topic=mark, event=event)
        now = asyncio.get_running_loop().time
        end = now() + DEADLINE
        pause, longest = MARK_PAUSES
        while (left := end - now()) > 0:
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)
            await self._call(self._publish, request, "ctrport", deadline=left)
        raise Unresponsive(f"containerd at {self.address} sent no events within {DEADLINE:g} s of a subscription")

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        namespace: str | None = None,
        deadline: float = DEADLINE,
    ) -> Response:
        metadata = _metadata(namespace) if namespace is not None else None
        with _errors(self.address, deadline, self._tally):
            response = await method(request, timeout=deadline, metadata=metadata)
        if response is None:
            raise Refused(f"containerd at {self.address} sent an answer that cannot be decoded")
        return response


async def _call_once(address: str) -> None:
    """Have gRPC do what it does once in a process, over a connection whose threads end with it.

    When one of its threads has to wait for another for the first time it measures the processor's clock, by two short
    sleeps. In a thread that is woken late they last a second, and the call with them. Where nobody listens yet that is
    so later: a connection that failed leaves its threads behind.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as there:
            there.setblocking(False)
            there.connect(address)
    except (OSError, ValueError):
        return
    with contextlib.suppress(ContainerdError):
        async with Containerd(address) as first:
            await first._call(first._version, Empty(), deadline=FIRST_DEADLINE)


class _Events(AsyncIterator[TaskEvent]):
    """The events of one subscription, for one reader. It never ends but by an error."""

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[events_pb2.SubscribeRequest, events_pb2.Envelope],
        address: str,
        tally: Tally,
    ) -> None:
        self._call = call
        self._address = address
        self._tally = tally
        self._pending: collections.deque[TaskEvent] = collections.deque()

    async def __anext__(self) -> TaskEvent:
        while not self._pending:
            self._keep(await self._envelope())
        return self._pending.popleft()

    async def until(self, mark: str) -> None:
        """Return when the event of topic ``mark`` has come; those before it are kept for the reader."""
        while (envelope := await self._envelope()) is None or envelope.topic != mark:
            self._keep(envelope)

    def _keep(self, envelope: events_pb2.Envelope | None) -> None:
        event = task_event(envelope) if envelope is not None else None
        if event is not None:
            self._pending.append(event)

    async def _envelope(self) -> events_pb2.Envelope | None:
        """Return the next event, or None for one that cannot be decoded."""
        with _errors(self._address, DEADLINE, self._tally):
            envelope = await self._call.read()
        if envelope is grpc.aio.EOF:
            raise Unavailable(f"containerd at {self._address} ended the stream of events")
        return envelope if isinstance(envelope, events_pb2.Envelope) else None


@contextlib.contextmanager
def _errors(address: str, deadline: float, tally: Tally) -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        failed = rpc_error(address, error.code(), error.details() or "", deadline)
        if not isinstance(failed, NotFound):  # which is an answer
            tally.call_errors[type(failed).__name__.lower()] += 1
        raise failed from error


def rpc_error(address: str, code: grpc.StatusCode, details: str, deadline: float) -> ContainerdError:
    """Return the error of ours that says what gRPC reported of a call with that deadline, in seconds."""
    details = " ".join(details.split())
    if code is grpc.StatusCode.UNAVAILABLE:
        # gRPC gives no errno; its wording around the system's own differs from version to version.
        texts = [os.strerror(number) for number in (errno.EACCES, errno.ENOENT, errno.ECONNREFUSED)]
        reason = next((text for text in texts if text in details), details)
        kind = Refused if reason == texts[0] else Unavailable
        return kind(f"containerd cannot be reached at {address}: {reason}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Unresponsive(f"containerd at {address} did not answer within {round(deadline, 1):g} s")
    if code is grpc.StatusCode.NOT_FOUND:
        return NotFound(f"containerd at {address} has no such thing: {details}")
    return Refused(f"containerd at {address} refused the call: {details} ({code.name})")


def _metadata(namespace: str) -> tuple[tuple[str, str], ...]:
    return (("containerd-namespace", namespace),)


def _stub(stub: Any, channel: grpc.aio.Channel) -> Any:
    return stub(channel)
