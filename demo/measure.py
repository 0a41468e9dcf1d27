"""How long it takes from containerd's start event until a client on the LAN gets through, measured at both ends.

The beginning is the timestamp that containerd itself puts into the event. The end is the first connection that
succeeds out of a tight loop of attempts, which runs on the LAN client since before the container was started. Both are
readings of one clock, as client and containerd share a machine here.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

from embedded.host import Host, inside

#: Seconds between two attempts, which is how coarse the measurement is. Without a pause, the loop would take one of
#: the machine's processors from those it measures.
PAUSE = 0.0005


class Knocking:
    """Attempts to connect from ``host`` until one succeeds. To be used as a context manager."""

    def __init__(self, host: Host, address: str, port: int) -> None:
        self.attempts = 0
        self.opened: datetime | None = None
        self.answered = threading.Event()
        self._target = (address, port)
        self._end = threading.Event()
        # A thread that entered the host's network, and goes with it.
        self._thread = threading.Thread(target=lambda: inside(host.pid, ("net",), self._knock), daemon=True)

    def __enter__(self) -> Knocking:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _knock(self) -> None:
        while not self._end.is_set():
            self.attempts += 1
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
                client.settimeout(0.1)
                if client.connect_ex(self._target) == 0:
                    self.opened = datetime.fromtimestamp(time.time_ns() / 1e9, timezone.utc)
                    self.answered.set()
                    return
            self._end.wait(PAUSE)


_EVENT = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.(\d+))? \+0000 UTC \S+ (/\S+) (.*)$", re.MULTILINE)


def started_at(events: Path, container: str, topic: str = "/tasks/start") -> datetime:
    """Return the timestamp of a container's start event in what ``ctr events`` wrote. Raises ``ValueError``.

    Or of another event about its task, by its topic.
    """
    for seconds, fraction, its, payload in _EVENT.findall(events.read_text()):
        if its == topic and f'"container_id":"{container}"' in payload:
            whole = datetime.strptime(seconds, "%Y-%m-%d %H:%M:%S").replace(tzinfo=timezone.utc)
            return whole.replace(microsecond=int(f"{fraction:0<9}"[:6]))
    raise ValueError(f"containerd announced no start of {container}")
