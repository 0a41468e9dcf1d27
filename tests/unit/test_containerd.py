"""What of containerd.py needs no containerd: what an event means, what an error says, and a server that misbehaves."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from ctrport import containerd
from ctrport.api import containers_pb2, events_pb2, payloads_pb2, task_pb2, tasks_pb2
from ctrport.containerd import (
    Containerd,
    NotFound,
    Refused,
    Unavailable,
    Unresponsive,
    rpc_error,
)
from ctrport.events import warn_once
from ctrport.listed import Listed
from ctrport.model import ContainerKey, Role
from ctrport.stored import IN_POD
from ctrport.tally import Tally
from ctrport.taskevents import TaskEvent, task_event

WEB = ContainerKey("default", "web")


def envelope(topic: str, payload: Message, namespace: str = "default", prefix: str = "") -> events_pb2.Envelope:
    event = AnyMessage(type_url=prefix + payload.DESCRIPTOR.full_name, value=payload.SerializeToString())
    return events_pb2.Envelope(namespace=namespace, topic=topic, event=event)


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        ("/tasks/start", payloads_pb2.TaskStart(container_id="web", pid=7)),
        ("/tasks/exit", payloads_pb2.TaskExit(container_id="web", id="web", pid=7)),
        ("/tasks/exit", payloads_pb2.TaskExit(container_id="web", pid=7)),
        ("/tasks/delete", payloads_pb2.TaskDelete(container_id="web")),
        ("/tasks/delete", payloads_pb2.TaskDelete(container_id="web", id="web")),
        ("/tasks/paused", payloads_pb2.TaskPaused(container_id="web")),
        ("/tasks/resumed", payloads_pb2.TaskResumed(container_id="web")),
        ("/containers/update", payloads_pb2.ContainerUpdate(id="web", labels={"a": "b"})),
        ("/containers/delete", payloads_pb2.ContainerDelete(id="web")),
    ],
)
@pytest.mark.parametrize("prefix", ["", "types.containerd.io/"])
def test_an_event_names_its_container(topic: str, payload: Message, prefix: str) -> None:
    event = task_event(envelope(topic, payload, prefix=prefix))
    assert event == TaskEvent(WEB, topic, 7 if topic == "/tasks/start" else None)


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        ("/tasks/exit", payloads_pb2.TaskExit(container_id="web", id="exec-1", pid=8)),
        ("/tasks/delete", payloads_pb2.TaskDelete(container_id="web", id="exec-1", pid=8)),
    ],
)
def test_the_end_of_an_exec_is_not_the_containers(topic: str, payload: Message) -> None:
    assert task_event(envelope(topic, payload)) is None


def test_other_topics_are_none_of_ours() -> None:
    assert task_event(envelope("/tasks/oom", payloads_pb2.TaskStart(container_id="web"))) is None
    assert task_event(envelope("/images/update", payloads_pb2.ContainerUpdate(id="web"))) is None


def test_a_payload_of_another_type_is_skipped() -> None:
    assert task_event(envelope("/tasks/start", payloads_pb2.ContainerDelete(id="web"))) is None


def test_a_payload_that_cannot_be_decoded_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    broken = envelope("/tasks/start", payloads_pb2.TaskStart(container_id="web"))
    broken.event.value = b"\x0a\xff"
    with caplog.at_level(logging.DEBUG, "ctrport.taskevents"):
        assert task_event(broken) is None
    assert [(r.levelname, "/tasks/start" in r.getMessage()) for r in caplog.records] == [("DEBUG", True)]


@pytest.mark.parametrize(
    ("namespace", "name"), [("default", "a b"), ("default", ""), ("x\n-j ACCEPT", "web"), ("", "web")]
)
def test_names_that_containerd_would_not_take_are_skipped(
    namespace: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    for _ in range(3):
        assert task_event(envelope("/tasks/start", payloads_pb2.TaskStart(container_id=name), namespace)) is None
    assert [r.levelname for r in caplog.records] == ["WARNING"]  # said once, however often it comes


@pytest.mark.parametrize(
    ("code", "details", "kind", "text"),
    [
        (
            grpc.StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNKNOWN: unix:/s: connect: No such file or directory (2)",
            Unavailable,
            "containerd cannot be reached at /s: No such file or directory",
        ),
        (
            grpc.StatusCode.UNAVAILABLE,
            "connect failed: addr: unix:/s error: Permission denied",
            Refused,
            "containerd cannot be reached at /s: Permission denied",
        ),
        (
            grpc.StatusCode.UNAVAILABLE,
            "Socket closed",
            Unavailable,
            "containerd cannot be reached at /s: Socket closed",
        ),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", Unresponsive, "containerd at /s did not answer within 5 s"),
        (grpc.StatusCode.NOT_FOUND, "task x", NotFound, "containerd at /s has no such thing: task x"),
        (grpc.StatusCode.UNKNOWN, "a\n b", Refused, "containerd at /s refused the call: a b (UNKNOWN)"),
    ],
)
def test_an_error_is_one_sentence_with_the_path(
    code: grpc.StatusCode, details: str, kind: type[Exception], text: str
) -> None:
    error = rpc_error("/s", code, details, 5.0)
    assert type(error) is kind
    assert str(error) == text


@pytest.mark.asyncio
async def test_without_a_socket_calls_fail_at_once_and_connected_waits(tmp_path: Path) -> None:
    path, tally = str(tmp_path / "containerd.sock"), Tally()
    async with Containerd(path, tally) as there:
        for _ in range(3):
            with pytest.raises(Unavailable, match=f"{path}: No such file or directory") as caught:
                await there.version()
            assert isinstance(caught.value.__cause__, grpc.aio.AioRpcError)
        assert tally.call_errors == {"unavailable": 3, "unresponsive": 0, "refused": 0}
        with pytest.raises(Unavailable):
            async with there.events():
                pass
        waiting = asyncio.ensure_future(there.connected())
        await asyncio.sleep(0.3)
        assert not waiting.done()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


@pytest.mark.asyncio
async def test_a_path_too_long_for_a_socket_is_refused() -> None:
    async with Containerd("/" + "x" * 120) as there:
        with pytest.raises(Refused):
            await there.connected()


def test_grpc_writes_nothing_to_stderr() -> None:
    # In a process of its own, as whether gRPC does is settled when it is loaded. It reports such a path by itself.
    program = """
import asyncio
from ctrport.containerd import Containerd, ContainerdError

async def main():
    for path in ("/" + "x" * 120, "/nonexistent"):
        async with Containerd(path) as there:
            try:
                await there.version()
            except ContainerdError as error:
                print(type(error).__name__)

asyncio.run(main())
"""
    source = Path(containerd.__file__).parents[1]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(source)}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert (ran.stdout.split(), ran.stderr) == (["Refused", "Unavailable"], "")


Handlers = dict[str, Callable[[Any, Any], Any]]


@asynccontextmanager
async def serving(
    tmp_path: Path, streams: Handlers, unary: Handlers, tally: Tally | None = None
) -> AsyncIterator[Containerd]:
    """Serve methods by name. Requests come in and answers go out as bytes, so that an answer can be wrong."""
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        name: grpc.unary_stream_rpc_method_handler(handler) for name, handler in streams.items()
    }
    methods |= {name: grpc.unary_unary_rpc_method_handler(handler) for name, handler in unary.items()}

    class Service(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> Any:
            return methods.get(details.method.rpartition(".")[2])

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Service(),))
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    try:
        async with Containerd(f"{tmp_path}/s", tally) as there:
            yield there
    finally:
        await server.stop(None)


async def empty(request: bytes, context: Any) -> bytes:
    return Empty().SerializeToString()


@pytest.mark.asyncio
async def test_that_a_container_is_not_there_is_an_answer_and_no_error(tmp_path: Path) -> None:
    async def absent(request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
        return b""

    async def forbidden(request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no")
        return b""

    tally = Tally()
    unary: Handlers = {"Containers/Get": absent, "Tasks/Get": absent, "Version/Version": forbidden}
    async with serving(tmp_path, {}, unary, tally) as there:
        assert await there.container(ContainerKey("default", "web")) is None
        assert sum(tally.call_errors.values()) == 0
        with pytest.raises(Refused):
            await there.version()
        assert tally.call_errors == {"unavailable": 0, "unresponsive": 0, "refused": 1}


@pytest.mark.asyncio
async def test_a_subscription_that_never_shows_an_event_is_unresponsive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(request: bytes, context: Any) -> AsyncIterator[bytes]:
        await asyncio.sleep(30)
        yield b""

    monkeypatch.setattr(containerd, "DEADLINE", 0.3)
    async with serving(tmp_path, {"Events/Subscribe": silent}, {"Events/Publish": empty}) as there:
        with pytest.raises(Unresponsive, match="sent no events"):
            async with there.events():
                pytest.fail("not established, and entered")


@pytest.mark.asyncio
async def test_events_before_the_mark_are_kept_and_the_end_of_the_stream_is_an_error(tmp_path: Path) -> None:
    marks: asyncio.Queue[str] = asyncio.Queue()

    async def publish(request: bytes, context: Any) -> bytes:
        published = events_pb2.PublishRequest.FromString(request)
        # containerd 1.6.20 crashes on an event published without one.
        assert published.event.type_url == "google.protobuf.Empty"
        await marks.put(published.topic)
        return b""

    async def subscribe(request: bytes, context: Any) -> AsyncIterator[bytes]:
        filters = events_pb2.SubscribeRequest.FromString(request).filters
        yield envelope("/tasks/start", payloads_pb2.TaskStart(container_id="early")).SerializeToString()
        yield b"\xff"  # not an envelope
        mark = await marks.get()
        assert f'topic=="{mark}"' in filters
        yield events_pb2.Envelope(topic=mark).SerializeToString()
        yield events_pb2.Envelope(topic=mark).SerializeToString()
        yield envelope("/tasks/start", payloads_pb2.TaskStart(container_id="late")).SerializeToString()

    async with (
        serving(tmp_path, {"Events/Subscribe": subscribe}, {"Events/Publish": publish}) as there,
        there.events() as events,
    ):
        assert (await anext(events)).key.id == "early"
        assert (await anext(events)).key.id == "late"
        for _ in range(2):
            with pytest.raises(Unavailable):
                await anext(events)


@pytest.mark.asyncio
async def test_a_container_that_cannot_be_decoded_does_not_hide_the_others(tmp_path: Path) -> None:
    async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"\xff"
        for name in ("web", "a b", "idle", "stopped", "hung", "paused"):
            container = containers_pb2.Container(id=name, labels={"name": name})
            if name == "paused":
                container.extensions[IN_POD].value = b"{}"
            yield containers_pb2.ListContainerMessage(container=container).SerializeToString()

    async def tasks(request: bytes, context: Any) -> bytes:
        processes = [
            task_pb2.Process(id="web", pid=7, status=task_pb2.RUNNING),
            task_pb2.Process(id="a b", pid=8, status=task_pb2.RUNNING),
            task_pb2.Process(container_id="stopped", id="stopped", pid=9, status=task_pb2.STOPPED),
            task_pb2.Process(container_id="paused", id="paused", pid=10, status=task_pb2.PAUSED),
            task_pb2.Process(id="hung"),
            task_pb2.Process(id="gone", pid=11, status=task_pb2.RUNNING),
        ]
        return tasks_pb2.ListTasksResponse(tasks=processes).SerializeToString()

    async with serving(tmp_path, {"Containers/ListStream": stream}, {"Tasks/List": tasks}) as there:
        listed = await there.containers("default")
    assert listed == [
        Listed(ContainerKey("default", "hung"), None, {"name": "hung"}),
        Listed(ContainerKey("default", "paused"), 10, {"name": "paused"}, paused=True, role=Role.MEMBER),
        Listed(WEB, 7, {"name": "web"}),
    ]


@pytest.mark.asyncio
async def test_an_answer_that_cannot_be_decoded_is_an_error_of_ours(tmp_path: Path) -> None:
    async def nonsense(request: bytes, context: Any) -> bytes:
        return b"\xff"

    async with serving(tmp_path, {}, {"Version/Version": nonsense}) as there:
        with pytest.raises(Refused, match="cannot be decoded"):
            await there.version()
        with pytest.raises(Refused, match="UNIMPLEMENTED"):
            await there.namespaces()


@pytest.mark.asyncio
async def test_a_look_at_what_is_gone_cancels_no_call(tmp_path: Path) -> None:
    # A call that is cancelled costs gRPC memory for good, and containers go all the time.
    ends = []

    async def stored(request: bytes, context: Any) -> bytes:
        context.add_done_callback(lambda context: ends.append(context.cancelled()))
        await asyncio.sleep(0.05)
        return containers_pb2.Container(id="web").SerializeToString()

    async def task(request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no running task found")
        return b""

    async with serving(tmp_path, {}, {"Containers/Get": stored, "Tasks/Get": task}) as there:
        assert await there.container(WEB) is None
    assert ends == [False]
