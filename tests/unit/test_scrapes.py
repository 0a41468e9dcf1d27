"""Whoever connects to the metrics: a scrape is answered, and nobody takes more of the daemon than is his."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrport import scrapes
from ctrport.listen import Listen
from ctrport.scrapes import LONGEST, Answer, Scrapes, answer_to

SCRAPE = b"GET /metrics HTTP/1.1\r\n\r\n"
REAL_SLEEP = asyncio.sleep


def status(request: str) -> int:
    return answer_to(request.encode()).status.value


@pytest.mark.parametrize(
    ("request_line", "expected"),
    [
        ("GET /metrics HTTP/1.1", 200),
        ("GET /metrics HTTP/1.0", 200),
        ("GET /metrics?format=text HTTP/1.1", 200),
        ("HEAD /metrics HTTP/1.1", 200),
        ("GET / HTTP/1.1", 404),
        ("GET /metrics/ HTTP/1.1", 404),
        ("GET http://127.0.0.1/metrics HTTP/1.1", 404),
        ("POST /metrics HTTP/1.1", 405),
        ("get /metrics HTTP/1.1", 405),
        ("GET  /metrics HTTP/1.1", 400),
        ("GET /metrics", 400),
        ("GET /metrics HTTP/2", 400),
        ("\x16\x03\x01", 400),
    ],
)
def test_a_scrape_is_answered_and_nothing_else(request_line: str, expected: int) -> None:
    assert status(f"{request_line}\r\nHost: x\r\nAccept: */*\r\n\r\n") == expected
    assert status(f"{request_line}\r\n\r\n") == expected


def test_a_request_that_is_not_whole_is_none() -> None:
    assert status("GET /metrics HTTP/1.1\r\nHost: x\r\n") == 400
    assert status("GET /metrics HTTP/1.1") == 400
    assert answer_to(b"HEAD /metrics HTTP/1.1\r\n\r\n") == Answer(HTTPStatus.OK, None, whole=False)


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda rest: b"GET /metrics HTTP/1.1\r\n" + rest))
def test_whatever_is_sent_has_an_answer(request: bytes) -> None:
    answer = answer_to(request)
    assert (answer.body is None) == (answer.status is HTTPStatus.OK)


# Over real sockets.


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


async def metrics() -> bytes:
    return b"up 1\n"


@contextlib.asynccontextmanager
async def serving(
    text: Callable[[], Awaitable[bytes]] = metrics, *, at: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[int]:
    """Serve on a port, and return that when it listens."""
    port = port or free_port()
    task = asyncio.create_task(Scrapes(text, "text/x").serve(Listen(ip_address(at), port)))
    try:
        with contextlib.closing(await connect(port, at)):
            pass
        yield port
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def connect(port: int, at: str = "127.0.0.1") -> socket.socket:
    """Connect as soon as somebody listens."""
    for _ in range(500):
        one = socket.socket(socket.AF_INET6 if ":" in at else socket.AF_INET)
        one.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(one, (at, port))
            return one
        except ConnectionRefusedError:
            one.close()
            await REAL_SLEEP(0.01)
    raise AssertionError("nobody listens")


async def said(one: socket.socket) -> bytes:
    """Return what comes until the other side closes."""
    loop, whole = asyncio.get_running_loop(), b""
    with contextlib.suppress(ConnectionResetError):
        while more := await loop.sock_recv(one, 1 << 20):
            whole += more
    return whole


async def ask(port: int, request: bytes = SCRAPE) -> bytes:
    with contextlib.closing(await connect(port)) as one:
        with contextlib.suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(one, request)
        return await said(one)


def test_a_scrape_gets_the_text_and_its_length() -> None:
    async def work() -> None:
        async with serving() as port:
            answer = await ask(port)
            assert answer == (
                b"HTTP/1.1 200 OK\r\nContent-Type: text/x\r\nContent-Length: 5\r\nConnection: close\r\n\r\nup 1\n"
            )
            assert await ask(port, b"HEAD /metrics HTTP/1.1\r\n\r\n") == answer.removesuffix(b"up 1\n")
            refused = await ask(port, b"PUT /metrics HTTP/1.1\r\n\r\n")
            assert refused.startswith(b"HTTP/1.1 405 Method Not Allowed\r\n")
            assert b"\r\nAllow: GET, HEAD\r\n" in refused

    asyncio.run(work())


def test_a_request_may_come_in_pieces_and_not_be_endless() -> None:
    async def work() -> None:
        async with serving() as port:
            with contextlib.closing(await connect(port)) as one:
                for piece in (b"GET /met", b"rics HTTP/1.1\r", b"\nHost: x\r\n\r", b"\n"):
                    await asyncio.get_running_loop().sock_sendall(one, piece)
                    await asyncio.sleep(0.01)
                assert (await said(one)).endswith(b"up 1\n")
            answer = await ask(port, b"GET /metrics HTTP/1.1\r\nX: " + b"x" * LONGEST)
            assert answer.startswith(b"HTTP/1.1 400 ") or answer == b""  # it may be reset, as not all of it is read

    asyncio.run(work())


def test_who_asks_nothing_is_left_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrapes, "ASK_WITHIN", 0.2)

    async def work() -> None:
        async with serving() as port:
            with contextlib.ExitStack() as closing:
                idle = [closing.enter_context(await connect(port)) for _ in range(2 * scrapes.ABREAST)]
                for one in idle[::2]:
                    one.send(b"GET /metr")
                assert (await ask(port)).endswith(b"up 1\n")
                assert {await said(one) for one in idle} == {b""}

    asyncio.run(work())


def test_who_takes_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrapes, "TAKE_WITHIN", 1.0)
    length = 24 << 20  # more than sockets keep

    async def long() -> bytes:
        return b"x" * length

    async def work() -> None:
        async with serving(long) as port:
            with contextlib.ExitStack() as closing:
                lazy = [closing.enter_context(await connect(port)) for _ in range(scrapes.ABREAST)]
                for one in lazy:
                    one.send(SCRAPE)
                assert await ask(port)  # in the place of one of them
                assert 0 < min([len(await said(one)) for one in lazy]) < length

    asyncio.run(work())


def test_no_more_are_served_at_a_time_than_may_be() -> None:
    at_once, most = 0, 0

    async def slow() -> bytes:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.02)
        at_once -= 1
        return b"up 1\n"

    async def work() -> None:
        async with serving(slow) as port:
            answers = await asyncio.gather(*(ask(port) for _ in range(3 * scrapes.ABREAST)))
            assert all(each.endswith(b"up 1\n") for each in answers)

    asyncio.run(work())
    assert most <= scrapes.ABREAST


def test_a_flood_is_taken_at_a_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await REAL_SLEEP(0)

    async def work() -> None:
        async with serving() as port:
            with monkeypatch.context() as patched:
                patched.setattr(asyncio, "sleep", sleep)
                for _ in range(2 * scrapes.BURST):
                    assert (await ask(port)).endswith(b"up 1\n")

    asyncio.run(work())
    assert sum(wait > 0 for wait in waits) >= scrapes.BURST - 1
    assert max(waits) <= 2 * scrapes.BURST * scrapes.INTERVAL


def test_a_port_that_is_taken_is_said_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scrapes, "RETRY", 0.02)
    caplog.set_level(logging.INFO)

    async def work() -> int:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port: int = other.getsockname()[1]
            async with serving(port=port):
                await asyncio.sleep(0.2)
                other.close()
                assert (await ask(port)).endswith(b"up 1\n")
        return port

    where = f"127.0.0.1:{asyncio.run(work())}"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"metrics cannot be served at {where}: Address already in use; trying again until it works"),
        ("INFO", f"metrics are served at http://{where}/metrics"),
    ]


def test_what_everybody_can_reach_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def work() -> int:
        async with serving(at="0.0.0.0") as port:
            assert (await ask(port)).endswith(b"up 1\n")
        return port

    port = asyncio.run(work())
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"metrics are served at http://0.0.0.0:{port}/metrics to everybody who can reach it")
    ]


def test_ipv6_is_ipv6_alone() -> None:
    async def work() -> None:
        async with serving(at="::") as port:
            with socket.socket() as other, pytest.raises(ConnectionRefusedError):
                other.connect(("127.0.0.1", port))

    asyncio.run(work())


def test_a_text_that_cannot_be_made_is_an_error_of_the_scrape_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> bytes:
        raise RuntimeError("a mistake of ours")

    async def work() -> None:
        async with serving(fails) as port:
            for _ in range(3):
                assert (await ask(port)).startswith(b"HTTP/1.1 500 Internal Server Error\r\n")

    asyncio.run(work())
    assert caplog.messages == ["the metrics cannot be told: RuntimeError('a mistake of ours')"]


def test_without_free_files_it_waits_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await REAL_SLEEP(0)

    async def work() -> None:
        loop, left = asyncio.get_running_loop(), 3
        accept = loop.sock_accept

        async def full(listening: socket.socket) -> tuple[socket.socket, object]:
            nonlocal left
            left -= 1
            if left >= 0:
                raise OSError(errno.EMFILE, "Too many open files")
            return await accept(listening)

        async with serving() as port:
            monkeypatch.setattr(loop, "sock_accept", full)
            monkeypatch.setattr(asyncio, "sleep", sleep)
            for _ in range(2):  # the first is taken by who was waiting already
                assert (await ask(port)).endswith(b"up 1\n")

    asyncio.run(work())
    assert waits.count(1.0) == 3
