"""What systemd is told of the daemon: the few lines of the sd_notify protocol (sd_notify(3)) that it needs."""

from __future__ import annotations

import os
import socket


def notify(*assignments: str) -> None:
    """Send assignments such as ``READY=1`` or ``STATUS=...`` to the service manager, if one listens.

    What cannot be told is not worth failing for.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # an abstract socket
    message = "\n".join(line.replace("\n", " ") for line in assignments)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(message.encode(), address)
    except OSError:
        return


def under_journal() -> bool:
    """Whether what is written to stderr goes to the journal, where each line may begin with its priority."""
    return "JOURNAL_STREAM" in os.environ
