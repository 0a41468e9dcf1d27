"""Who scrapes the metrics: a socket that listens, and a few connections at a time, each for a few seconds.

HTTP as far as a scrape goes: one request a connection, GET or HEAD of /metrics, without a body. Whoever reaches the
socket is answered, and may be anybody: what one can take of the daemon's time, memory and files is bounded, whatever is
sent, and a client that sends nothing or takes nothing is left in the end. There is no authentication and no TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import NoReturn

from .listen import Listen
from .pace import Pace

log = logging.getLogger(__name__)

PATH = "/metrics"

#: Connections that are served at a time; the kernel keeps as many waiting.
ABREAST = 8
#: Connections that are taken as soon as they come, and the seconds that each one more takes when these are used up.
BURST, INTERVAL = 20, 0.05
#: Seconds that a client has to ask, and then to take its answer.
ASK_WITHIN, TAKE_WITHIN = 2.0, 5.0
#: Bytes that a request may have.
LONGEST = 8 << 10
#: Seconds until a socket that could not be had is tried again.
RETRY = 5.0


@dataclass(frozen=True)
class Answer:
    """What a request is answered with; None as ``body`` is the metrics."""

    status: HTTPStatus
    body: bytes | None
    whole: bool = True  # or its head alone


def answer_to(request: bytes) -> Answer:
    """Return what to answer to a request, of which this is the head or what came of it."""
    line, _, rest = request.partition(b"\r\n")
    words = line.split(b" ")
    if len(words) != 3 or not words[2].startswith(b"HTTP/1.") or b"\r\n\r\n" not in b"\r\n" + rest:
        return _refusal(HTTPStatus.BAD_REQUEST, "expected a request of HTTP/1.1")
    method, target, _ = words
    if method not in (b"GET", b"HEAD"):
        return _refusal(HTTPStatus.METHOD_NOT_ALLOWED, "expected GET or HEAD")
    if target.partition(b"?")[0] != PATH.encode():
        return _refusal(HTTPStatus.NOT_FOUND, f"expected {PATH}")
    return Answer(HTTPStatus.OK, None, whole=method == b"GET")


def _refusal(status: HTTPStatus, text: str) -> Answer:
    return Answer(status, f"{text}\n".encode())


class Scrapes:
    """Serves a text to whoever asks for it. ``text`` makes it, ``content_type`` is what it is."""

    def __init__(self, text: Callable[[], Awaitable[bytes]], content_type: str) -> None:
        self._text = text
        self._content_type = content_type
        self._complaint = ""

    async def serve(self, where: Listen) -> NoReturn:
        """Listen there until cancelled; where that cannot be done it says so once, and tries again."""
        complaint = ""
        while True:
            try:
                listening = _listening(where)
            except OSError as error:
                if str(error) != complaint:
                    log.warning(
                        "metrics cannot be served at %s: %s; trying again until it works", where, error.strerror
                    )
                complaint = str(error)
                await asyncio.sleep(RETRY)
                continue
            with listening:
                if where.address.is_loopback:
                    log.info("metrics are served at http://%s%s", where, PATH)
                else:
                    log.warning("metrics are served at http://%s%s to everybody who can reach it", where, PATH)
                await self._serve(listening)

    async def _serve(self, listening: socket.socket) -> NoReturn:
        loop, pace = asyncio.get_running_loop(), Pace(BURST, INTERVAL)
        served = set[asyncio.Task[None]]()
        try:
            while True:
                await asyncio.sleep(pace.wait(time.monotonic()))
                if len(served) >= ABREAST:
                    await asyncio.wait(served, return_when=asyncio.FIRST_COMPLETED)
                    served = {task for task in served if not task.done()}
                try:
                    client, _ = await loop.sock_accept(listening)
                except OSError as error:
                    # It is left waiting with the kernel: no more files may be open, or it has gone by itself.
                    log.debug("a scrape cannot be taken: %s", error)
                    await asyncio.sleep(1.0 if error.errno in _FULL else 0)
                    continue
                pace.take(time.monotonic())
                served.add(asyncio.create_task(self._serve_one(client)))
        finally:
            for task in served:
                task.cancel()
            await asyncio.gather(*served, return_exceptions=True)

    async def _serve_one(self, client: socket.socket) -> None:
        with client:
            try:
                client.setblocking(False)
                request = await asyncio.wait_for(_request(client), ASK_WITHIN)
                if request:
                    message = await self._message(answer_to(request))
                    await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(client, message), TAKE_WITHIN)
                    client.shutdown(socket.SHUT_WR)
            except (OSError, asyncio.TimeoutError) as error:
                log.debug("a scrape ended early: %r", error)

    async def _message(self, answer: Answer) -> bytes:
        status, body, kind = answer.status, answer.body, "text/plain; charset=utf-8"
        if body is None:
            try:
                body, kind = await self._text(), self._content_type
                self._complaint = ""
            except Exception as error:  # whatever it is, it is not worth the daemon
                if repr(error) != self._complaint:
                    log.error("the metrics cannot be told: %r", error)
                self._complaint = repr(error)
                status, body = HTTPStatus.INTERNAL_SERVER_ERROR, b"the log says why\n"
        head = [f"HTTP/1.1 {status.value} {status.phrase}", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
        head += ["Allow: GET, HEAD"] if status is HTTPStatus.METHOD_NOT_ALLOWED else []
        head += ["Connection: close", "", ""]
        return "\r\n".join(head).encode() + (body if answer.whole else b"")


_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


async def _request(client: socket.socket) -> bytes:
    """Return the head of a request, or what came of it before it became too long or ended."""
    loop, request = asyncio.get_running_loop(), b""
    while b"\r\n\r\n" not in request and len(request) < LONGEST:
        more = await loop.sock_recv(client, LONGEST - len(request))
        if not more:
            break
        request += more
    return request


def _listening(where: Listen) -> socket.socket:
    """Return a socket that listens there, and nowhere else. Raises ``OSError``."""
    one = socket.socket(socket.AF_INET6 if where.address.version == 6 else socket.AF_INET)
    with contextlib.ExitStack() as undo:
        undo.callback(one.close)
        one.setblocking(False)
        # Connections of an earlier run that have ended keep nobody from listening; one that listens still does.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if where.address.version == 6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind((str(where.address), where.port))
        one.listen(ABREAST)
        undo.pop_all()
    return one
