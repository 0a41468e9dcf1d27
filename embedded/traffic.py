"""Packets that show what the rules do: servers that say who asked, and probes that tell the ways to fail apart."""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from embedded.host import Place
from embedded.wait import eventually

__all__ = [
    "BOTH_FAMILIES",
    "BOTH_KINDS",
    "Outcome",
    "Refused",
    "Reply",
    "Server",
    "TimedOut",
    "Unreachable",
    "Visit",
    "connected",
    "eventually",
    "probe_tcp",
    "probe_udp",
    "serve",
]


@dataclass(frozen=True)
class Visit:
    """What a server saw: the client's address and port as they arrived, and the own port that was asked."""

    peer: str
    peer_port: int
    port: int


@dataclass(frozen=True)
class Reply:
    """An answer came. ``source`` is the probe's own address and port; ``text`` the first line, empty if none came.

    Of a Server's line: ``name`` is who answered, ``peer`` and ``peer_port`` the client as the server saw it, ``port``
    the server's own.
    """

    text: str
    source: tuple[str, int]

    def __bool__(self) -> bool:
        return True

    @property
    def name(self) -> str:
        """Who answered."""
        return self._fields[0]

    @property
    def peer(self) -> str:
        """The client's address, as the server saw it."""
        return self._fields[1]

    @property
    def peer_port(self) -> int:
        """The client's port, as the server saw it."""
        return int(self._fields[2])

    @property
    def port(self) -> int:
        """The server's own port."""
        return int(self._fields[3])

    @property
    def _fields(self) -> list[str]:
        fields = self.text.split()
        assert len(fields) == 4, f"not the line of a Server: {self.text!r}"
        return fields


@dataclass(frozen=True)
class _NoReply:
    why: str

    def __bool__(self) -> bool:
        return False


class Refused(_NoReply):
    """The other side, or a REJECT on the way, said no: an RST, or ICMP port unreachable."""


class TimedOut(_NoReply):
    """Nothing came back."""


class Unreachable(_NoReply):
    """ICMP or the own kernel said that there is no way there."""


#: True as a condition only for a Reply.
Outcome = Reply | Refused | TimedOut | Unreachable


class Server:
    """A server on one or many ports of a place, TCP if not told otherwise; ends with it, or by close().

    It answers each connection at once, then again whenever more arrives on it, and each datagram, always with the line
    ``<name> <peer address> <peer port> <own port>``. ``visits`` has what it answered, oldest first.

    ``kind`` and ``proto`` are those of its sockets: SCTP is SOCK_STREAM with IPPROTO_SCTP. ``address`` is where it
    listens, IPv6 only where that is one. A UDP server on the wildcard of a host with several addresses may answer from
    another than was asked, as such servers do: give it one.
    """

    def __init__(
        self,
        place: Place,
        ports: int | Iterable[int],
        *,
        kind: socket.SocketKind = socket.SOCK_STREAM,
        proto: int = 0,
        name: str | None = None,
        address: str = "0.0.0.0",
    ) -> None:
        self.name = place.name if name is None else name
        self.visits: list[Visit] = []
        self._kind = kind
        self._selector = selectors.DefaultSelector()
        self._stop, stopped = socket.socketpair()
        self._selector.register(stopped, selectors.EVENT_READ)
        wanted = [ports] if isinstance(ports, int) else list(ports)
        listening = place.sockets(len(wanted), kind, _family(address), proto)
        try:
            for listener, port in zip(listening, wanted, strict=True):
                self._selector.register(listener, selectors.EVENT_READ)
                listener.setblocking(False)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if listener.family == socket.AF_INET6:  # or "::" would take IPv4 as well
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind((address, port))
                if kind is socket.SOCK_STREAM:
                    listener.listen(128)
        except BaseException:
            self._close_all()
            for listener in listening:
                listener.close()
            raise
        self._listening = frozenset(listening)
        self._thread = threading.Thread(target=self._serve, name=f"server {self.name}", daemon=True)
        self._thread.start()
        place.at_close(self.close)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every port and connection. To be called once or more."""
        if self._thread.is_alive():
            with contextlib.suppress(OSError):
                self._stop.send(b".")
            self._thread.join()

    def _close_all(self) -> None:
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()
        self._stop.close()

    def _serve(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select():
                    ready = key.fileobj
                    assert isinstance(ready, socket.socket)
                    if ready in self._listening:
                        self._ask(ready)
                    elif ready.family == socket.AF_UNIX:
                        return
                    else:
                        self._go_on(ready)
        finally:
            self._close_all()

    def _ask(self, listener: socket.socket) -> None:
        # What failed between the kernel's word and ours, a client that left or a queued ICMP error, is the client's.
        with contextlib.suppress(OSError):
            if self._kind is socket.SOCK_DGRAM:
                _, client = listener.recvfrom(65536)
                listener.sendto(self._line(client, listener), client)
            else:
                connection, client = listener.accept()
                connection.setblocking(False)
                self._selector.register(connection, selectors.EVENT_READ)
                connection.send(self._line(client, connection))

    def _go_on(self, connection: socket.socket) -> None:
        try:
            if connection.recv(65536):
                connection.send(self._line(connection.getpeername(), connection))
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._selector.unregister(connection)
        connection.close()

    def _line(self, client: tuple[str, int], own: socket.socket) -> bytes:
        visit = Visit(client[0], client[1], own.getsockname()[1])
        self.visits.append(visit)
        return f"{self.name} {visit.peer} {visit.peer_port} {visit.port}\n".encode()


#: For `serve`: TCP and UDP, and the wildcards of IPv4 and IPv6.
BOTH_KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM)
BOTH_FAMILIES = ("0.0.0.0", "::")


def serve(
    place: Place,
    *ports: int,
    kinds: Iterable[socket.SocketKind] = BOTH_KINDS,
    addresses: Sequence[str] = ("0.0.0.0",),
    name: str | None = None,
) -> None:
    """Have servers of all those kinds at all those addresses of a place, each on all of the ports; IPv4 by default."""
    for kind in kinds:
        for address in addresses:
            Server(place, ports, kind=kind, name=name, address=address)


def probe_tcp(
    place: Place,
    address: str,
    port: int,
    *,
    source: tuple[str, int] | None = None,
    timeout: float = 2.0,
    proto: int = 0,
) -> Outcome:
    """Connect from ``place`` and wait for a line; a server that closes without one gives a Reply without text.

    ``proto`` is for what else has connections: IPPROTO_SCTP. The connection is reset at the end, so that the same
    ``source`` can be used again at once.
    """
    with place.socket(socket.SOCK_STREAM, _family(address), proto) as client, _outcome() as outcome:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.settimeout(timeout)
        if source is not None:
            client.bind(source)
        client.connect((address, port))
        line = b""
        while not line.endswith(b"\n"):
            more = client.recv(4096)
            if not more:
                break
            line += more
        outcome.append(_reply(client, line))
    return outcome[0]


def probe_udp(
    place: Place,
    address: str,
    port: int,
    *,
    source: tuple[str, int] | None = None,
    timeout: float = 2.0,
    over: socket.socket | None = None,
) -> Outcome:
    """Send a datagram from ``place`` and wait for the answer; one from another address or port does not count.

    ``over`` is a UDP socket to send it from, left open: a client that keeps its port, and with it its flow.
    """
    with contextlib.ExitStack() as opened, _outcome() as outcome:
        client = over
        if client is None:
            client = opened.enter_context(place.socket(socket.SOCK_DGRAM, _family(address)))
            if source is not None:
                client.bind(source)
        _forget(client)
        client.settimeout(timeout)
        client.connect((address, port))
        client.send(b"who?\n")
        outcome.append(_reply(client, client.recv(65536)))
    return outcome[0]


@contextlib.contextmanager
def connected(place: Place, address: str, port: int) -> Iterator[Callable[[], bool]]:
    """Keep a connection; what is given says whether it is still answered, and by the same server."""
    with place.socket() as client:
        client.settimeout(2)
        client.connect((address, port))
        first = client.recv(100)

        def answered() -> bool:
            client.sendall(b"still there?\n")
            return client.recv(100) == first

        yield answered


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _forget(client: socket.socket) -> None:
    # What came too late for an earlier probe over this socket, an answer or an error, is none to this one.
    client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                client.recv(65536)


def _reply(client: socket.socket, line: bytes) -> Reply:
    own = client.getsockname()
    return Reply(line.decode(errors="replace").strip(), (own[0], own[1]))


# EPERM and EACCES: dropped or prohibited on the way out. EINVAL: from a source in 127/8 to anywhere else.
_NO_WAY = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM, errno.EINVAL)


@contextlib.contextmanager
def _outcome() -> Iterator[list[Outcome]]:
    outcome: list[Outcome] = []
    try:
        yield outcome
    except TimeoutError as error:
        outcome.append(TimedOut(str(error)))
    except ConnectionError as error:
        outcome.append(Refused(str(error)))
    except OSError as error:
        if error.errno not in _NO_WAY:
            raise
        outcome.append(Unreachable(str(error)))
