"""New connections per second, and bytes per second, from the LAN client to a port of the node."""

from __future__ import annotations

import subprocess
import sys

from embedded.host import Place, end_process

_PYTHON = (sys.executable, "-I", "-S", "-c")

# Takes each connection, and reads what comes until its end, or closes it at once.
_SERVER = """
import socket, sys
port, reads = int(sys.argv[1]), sys.argv[2] == "reads"
buffer = bytearray(1 << 20)
server = socket.create_server(("0.0.0.0", port), backlog=4096)
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    try:
        while reads and connection.recv_into(buffer):
            pass
    except OSError:
        pass
    connection.close()
"""

# A question a line: how many connections can be had in so many seconds, one after the other; or how many bytes one of
# them takes. Each is ended by a reset, so that its port is free again.
_CLIENT = """
import socket, struct, sys, time
reset, chunk = struct.pack("ii", 1, 0), bytes(1 << 20)
def connected(address):
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    client.settimeout(5)
    client.connect(address)
    return client
for line in sys.stdin:
    what, host, port, seconds = line.split()
    address, count = (host, int(port)), 0
    began = time.perf_counter()
    end = began + float(seconds)
    if what == "connections":
        while time.perf_counter() < end:
            connected(address).close()
            count += 1
    else:
        with connected(address) as client:
            while time.perf_counter() < end:
                count += client.send(chunk)
    print(count / (time.perf_counter() - began), flush=True)
"""


class Server:
    """Who takes connections on a port of a place, one at a time. To be used as a context manager.

    It ``reads`` what comes until the end of each, or closes it at once.
    """

    def __init__(self, place: Place, port: int, *, reads: bool = False) -> None:
        argv = (*_PYTHON, _SERVER, str(port), "reads" if reads else "closes")
        self._process = place.spawn(*argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError(f"nothing listens on port {port} of {place.name}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        end_process(self._process)


class Client:
    """Who connects, from one place. To be used as a context manager."""

    def __init__(self, place: Place) -> None:
        self._process = place.spawn(*_PYTHON, _CLIENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        end_process(self._process)

    def connections(self, address: str, port: int, seconds: float) -> float:
        """Return how many connections a second can be had, one after the other."""
        return self._ask("connections", address, port, seconds)

    def megabits(self, address: str, port: int, seconds: float) -> float:
        """Return how many megabits a second one connection takes."""
        return self._ask("bytes", address, port, seconds) * 8 / 1e6

    def _ask(self, what: str, address: str, port: int, seconds: float) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what} {address} {port} {seconds}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{address} port {port} does not take connections")
        return float(answer)
