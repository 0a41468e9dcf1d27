"""A container of the embedded node, as a place to put programs and sockets."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal

from embedded.host import Place
from embedded.network import Network


class Container(Place):
    """A container with a task.

    ``pid`` is its first process as the node counts, ``outer_pid`` as this process does. ``network`` is the one that
    CNI joined it to; ``address`` and ``address6`` are what it has there. A program run here sees the container's
    network and nothing else of it; for the rest there is Node.exec.
    """

    def __init__(self, id: str, namespace: str, pid: int, outer_pid: int, network: Network | None) -> None:
        super().__init__(id, outer_pid, ["net"])
        self.id = id
        self.namespace = namespace
        self.pid = pid
        self.outer_pid = outer_pid
        self.network = network
        self.paused = False
        #: Its addresses as CNI gave them, with the length of the prefix.
        self.interfaces = [] if network is None else self._global_addresses()
        self._pidfd: int | None = os.pidfd_open(outer_pid)

    @property
    def address(self) -> str | None:
        """Its IPv4 address, None where CNI gave it none."""
        return next((a.split("/")[0] for a in self.interfaces if ":" not in a), None)

    @property
    def address6(self) -> str | None:
        """Its IPv6 address, None where CNI gave it none."""
        return next((a.split("/")[0] for a in self.interfaces if ":" in a), None)

    @property
    def cni_id(self) -> str:
        """What ctr calls it in front of CNI."""
        return f"{self.namespace}-{self.id}"

    def alive(self, within: float = 0) -> bool:
        """Whether its first process lives, for as long as ``within`` seconds."""
        return self._pidfd is not None and not select.select([self._pidfd], [], [], within)[0]

    def end(self) -> None:
        """Kill its first process past containerd, which need not be there, and end what was started in here."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            if self.alive(within=10):
                raise TimeoutError(f"{self.id}: process {self.outer_pid} does not die of SIGKILL")
        self.close()

    def close(self) -> None:
        """End what was started in here, as nothing of it may outlive the container."""
        super().close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def _global_addresses(self) -> list[str]:
        shown = json.loads(self.run("ip", "-json", "address", "show", "dev", "eth0").stdout)
        addresses = [address for link in shown for address in link["addr_info"] if address["scope"] == "global"]
        return [f"{address['local']}/{address['prefixlen']}" for address in addresses]
