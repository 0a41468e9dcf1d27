"""A node on which containers come and go, one that stays, and a client that never stops asking for it."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from embedded.container import Container
from embedded.host import LIFETIME, CommandError
from embedded.node import Node
from embedded.traffic import Reply, Server, probe_tcp

if TYPE_CHECKING:
    from typing_extensions import Self

STAYS = "stays"
COMING_AND_GOING = tuple(f"churn-{number}" for number in range(6))
#: The host ports that are chosen, none of which a mapping names.
CHOSEN = range(40000, 40100)
FIXED_PORT = 8080

CONFIG = f"""\
publish:
  - match: {{container: {STAYS}}}
    ports: ["{FIXED_PORT}:80", "80", "8100-8109:80", "127.0.0.1::80"]
  - match: {{container: "churn-*"}}
    ports: ["80", "53/udp"]
""" + "".join(
    f'  - match: {{container: {name}}}\n    ports: ["{9000 + 10 * number}-{9003 + 10 * number}:90-93/udp"]\n'
    for number, name in enumerate(COMING_AND_GOING)
)

#: Seconds between two steps, and between two connections.
PAUSE, KNOCK = 0.02, 0.025
#: Seconds that a connection may take. A SYN that was lost is sent again after one.
PROMPTLY = 0.9


def furnish(node: Node) -> Container:
    """Start containerd on a node, give it a network of both families, and start the container that stays."""
    node.start_containerd()
    node.add_network("docker0", subnet6="fd00:17::/64", ip_masq=False)
    node.sysctl("net/ipv4/ip_local_port_range", f"{CHOSEN.start} {CHOSEN.stop - 1}")
    stays = node.start(STAYS, command=("/bin/sleep", str(LIFETIME)))
    Server(stays, 80)
    return stays


class Churn:
    """Starts and ends containers in a random order, one step after the other, on a thread of its own.

    ``also`` is done after each step. A failure of a step is raised by whoever rests next, and at the end.
    """

    def __init__(self, node: Node, seed: int, *, also: Callable[[random.Random], object] | None = None) -> None:
        self.running: dict[str, Container] = {}
        self.steps = 0
        self._node = node
        self._random = random.Random(seed)
        self._also = also
        self._turn = threading.Lock()
        self._begun = threading.Event()
        self._end = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._churn, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if error is None:
            self._check()

    @contextlib.contextmanager
    def resting(self) -> Iterator[dict[str, Container]]:
        """Let nothing come or go; what is given is what runs meanwhile, by name."""
        with self._turn:
            self._check()
            yield self.running

    def step_begins(self) -> None:
        """Return when the next step begins."""
        self._begun.clear()
        if not self._begun.wait(10):
            self._check()
            raise AssertionError("nothing came or went for 10 s")

    def start(self, name: str) -> None:
        """Start one, for who rests."""
        self.running[name] = self._node.start(name)

    def delete(self, name: str) -> None:
        """End one, for who rests."""
        self._node.delete(self.running.pop(name))

    def _churn(self) -> None:
        try:
            while not self._end.is_set():
                with self._turn:
                    self._step()
                time.sleep(PAUSE)  # also lets in who waits for the turn
        except BaseException as error:
            self._error = error

    def _step(self) -> None:
        name = self._random.choice(COMING_AND_GOING)
        self._begun.set()
        if name in self.running:
            self.delete(name)
        else:
            self.start(name)
        if self._also is not None:
            self._also(self._random)
        self.steps += 1

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


class Knocking:
    """A client on the LAN that connects to the ports of the container that stays, one after the other.

    ``seen`` counts what became of it, as the name of the outcome.
    """

    def __init__(self, node: Node, ports: Sequence[int]) -> None:
        self.seen: Counter[str] = Counter()
        self._node = node
        self._ports = ports
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._knock, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def unanswered(self) -> int:
        """How often there was no answer, or one of another container."""
        return self.seen.total() - self.seen[STAYS]

    def _knock(self) -> None:
        while not self._end.is_set():
            for port in self._ports:
                outcome = probe_tcp(self._node.client, self._node.address, port, timeout=PROMPTLY)
                self.seen[outcome.name if isinstance(outcome, Reply) else type(outcome).__name__] += 1
                time.sleep(KNOCK)


@contextlib.contextmanager
def connection(node: Node, port: int) -> Iterator[None]:
    """Keep a connection to the container that stays, and fail where it is not answered at the end."""
    with node.client.socket() as client:
        client.settimeout(5)
        client.connect((node.address, port))
        first = client.recv(100)
        yield
        client.sendall(b"still there?\n")
        assert client.recv(100) == first, "the connection that was kept is answered by somebody else"


def others(node: Node) -> Callable[[random.Random], object]:
    """Return what other programs of the node do to its tables, now and then; they run as they come."""
    own = (
        "iptables-nft -I FORWARD -s 203.0.113.0/24 -j DROP",
        "iptables-nft -D FORWARD -s 203.0.113.0/24 -j DROP",
        "nft add table ip others",
        "nft delete table ip others",
    )
    ours = (
        "iptables-nft -t nat -F DOCKER",
        "iptables-nft -F",
        "iptables-nft -t nat -F PREROUTING",
        "ip6tables-nft -t nat -F",
        "nft flush ruleset",
    )

    def now_and_then(chance: random.Random) -> None:
        what = chance.choices((None, own, ours), (0.75, 0.2, 0.05))[0]
        if what is not None:
            # Nothing may be there to be deleted.
            with contextlib.suppress(CommandError):
                node.run(*chance.choice(what).split())

    return now_and_then
