"""A container that comes, goes and comes again, and what its clients see meanwhile."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from embedded.container import Container
from embedded.host import Place
from embedded.network import Network
from embedded.node import Node
from embedded.traffic import Outcome, Reply, Server, eventually, probe_tcp, probe_udp
from tests.matrix.settings import SOCKETS, Family, Protocol
from tests.node.daemon import Ctrport

T = TypeVar("T")

#: What is watched: the same container in each family and protocol.
Key = tuple[Family, Protocol]

#: Seconds in which what is to happen at once has happened. A UDP flow without an answer is kept for 30.
AT_ONCE = 2.0


@dataclass(frozen=True)
class Life:
    """What was seen of one family and protocol.

    ``before`` and ``after`` are how a new client from each place fared while the container ran and after its end,
    ``tracked`` and ``left`` the flows to it then. ``kept_sending`` is how a UDP client on the LAN fared, while the
    successor ran, that had asked from the same port all the while; None for other protocols.
    """

    before: tuple[Outcome, ...]
    tracked: tuple[str, ...]
    after: tuple[Outcome, ...]
    left: tuple[str, ...]
    kept_sending: Outcome | None


@dataclass(frozen=True)
class Stage:
    """Where it happens: which container of which network is published by ``port``:``inside``, and who asks it."""

    node: Node
    ctrport: Ctrport
    network: Network
    name: str
    port: int
    inside: int
    keys: Sequence[Key]
    places: Sequence[Place]

    def live(self) -> dict[Key, Life]:
        """Start, end and start again the container, with clients asking, and return what was seen of each."""
        with contextlib.ExitStack() as opened:
            stubborn = {key: opened.enter_context(self._client(key)) for key in self.keys if key[1] == "udp"}
            first = self._start()
            before = {key: self._ask_from_everywhere(key) for key in self.keys}
            for key, client in stubborn.items():
                self._ask(key, self.node.client, client)
            tracked = {key: self._flows(key, first) for key in self.keys}
            self._delete(first)
            after = {key: self._ask_from_everywhere(key) for key in self.keys}
            left = {key: self._last_flows(key, first) for key in self.keys}
            for key, client in stubborn.items():
                self._ask(key, self.node.client, client)  # and now its flow is one to the node itself
            second = self._start()
            assert second.interfaces != first.interfaces, "the successor has the same address: an old flow would do"
            kept_sending = {key: self._ask_on(key, client) for key, client in stubborn.items()}
            self._delete(second)
        return {key: Life(before[key], tracked[key], after[key], left[key], kept_sending.get(key)) for key in self.keys}

    def _start(self) -> Container:
        container = self.node.start(self.name, network=self.network)
        for family, protocol in self.keys:
            kind, proto = SOCKETS[protocol]
            wildcard = "0.0.0.0" if family == "IPv4" else "::"
            Server(container, self.inside, kind=kind, proto=proto, address=wildcard)
        self._wait_until("active")
        return container

    def _delete(self, container: Container) -> None:
        self.node.delete(container)
        self._wait_until("waiting")

    def _wait_until(self, state: str) -> None:
        for protocol in {protocol for _, protocol in self.keys}:
            self.ctrport.wait_for(f"{self.port}:{self.inside}/{protocol}", state)

    def _client(self, key: Key) -> socket.socket:
        family = socket.AF_INET if key[0] == "IPv4" else socket.AF_INET6
        return self.node.client.socket(socket.SOCK_DGRAM, family)

    def _ask_from_everywhere(self, key: Key) -> tuple[Outcome, ...]:
        return tuple(self._ask(key, place) for place in self.places)

    def _ask(self, key: Key, place: Place, over: socket.socket | None = None) -> Outcome:
        family, protocol = key
        timeout = 2.0 if over is None else 0.2  # who kept sending will be asked on
        address = self.node.address if family == "IPv4" else self.node.address6
        if protocol == "udp":
            return probe_udp(place, address, self.port, timeout=timeout, over=over)
        return probe_tcp(place, address, self.port, proto=SOCKETS[protocol][1])

    def _ask_on(self, key: Key, over: socket.socket) -> Outcome:
        return _last(lambda: self._ask(key, self.node.client, over), lambda outcome: isinstance(outcome, Reply))

    def _flows(self, key: Key, container: Container) -> tuple[str, ...]:
        family, protocol = key
        words, address = ("ipv4", container.address) if family == "IPv4" else ("ipv6", container.address6)
        listed = self.node.run("conntrack", "-L", "-f", words, "-p", protocol, "--reply-src", str(address))
        return tuple(listed.stdout.splitlines())

    def _last_flows(self, key: Key, container: Container) -> tuple[str, ...]:
        return _last(lambda: self._flows(key, container), lambda flows: not flows)


def _last(look: Callable[[], T], enough: Callable[[T], bool]) -> T:
    """Look until it is enough, for as long as "at once" takes, and return what was seen last."""
    seen: list[T] = []

    def done() -> bool:
        seen.append(look())
        return enough(seen[-1])

    with contextlib.suppress(AssertionError):
        eventually(done, within=AT_ONCE, what="enough")
    return seen[-1]
