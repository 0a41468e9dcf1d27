"""Which bridge ports have the hairpin mode for what is published behind them, and which of them by our doing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from . import hairpin
from .model import Attachment, Family, Publication
from .owners import owner_of


class Hairpins:
    """Keeps the mode on where a container needs it to reach its own published port, and no longer than that.

    ``complain`` is told what could not be done.
    """

    def __init__(self, complain: Callable[[str], None]) -> None:
        self._complain = complain
        self._behind: dict[str, set[str]] = {}  # by bridge port: who is published behind it
        self._ours: set[str] = set()

    def succeed(self, before: Hairpins) -> None:
        """Take over what another one has switched on."""
        self._ours = set(before._ours)

    def come(self, publication: Publication) -> None:
        """Take in that this is published."""
        for attachment in _bridged(publication):
            self._behind.setdefault(attachment.port or "", set()).add(owner_of(publication))

    def go(self, publication: Publication) -> None:
        """Take in that this, which was, is not any more."""
        for port in {attachment.port or "" for attachment in _bridged(publication)}:
            self._behind[port].discard(owner_of(publication))
            if not self._behind[port]:
                del self._behind[port]

    def due(self, publications: Iterable[Publication]) -> list[str]:
        """Return the bridge ports that lack the mode by which a container reaches its own published port."""
        ports: dict[str, None] = {}  # a container can have thousands of mappings behind one port
        needed: dict[tuple[str, Family], bool] = {}
        for attachment in (each for publication in publications for each in _bridged(publication)):
            assert attachment.port is not None
            key = (attachment.device, Family.of(attachment.address))
            try:
                if key not in needed:
                    needed[key] = hairpin.is_needed(*key)
            except OSError as error:
                self._complain(f"whether {attachment.device} needs hairpin mode cannot be told: {error.strerror}")
                needed[key] = False
            if needed[key]:
                ports[attachment.port] = None
        try:
            return hairpin.lacking(ports)
        except OSError as error:
            self._complain(f"the hairpin mode of {' and '.join(list(ports)[:2])} cannot be told: {error.strerror}")
            return []

    def switch(self, on: Sequence[str]) -> None:
        """Switch these on, and those off that were switched on here and have nothing behind them any more."""
        off = [port for port in self._ours if port not in self._behind]
        for port in (*off, *on):
            try:
                switched = hairpin.switch(port, port in on)
            except OSError as error:
                self._complain(f"the hairpin mode of {port} cannot be switched: {error.strerror}")
                continue  # one of ours stays ours, to be switched off with the next write
            if port not in on:
                self._ours.discard(port)
            elif switched:
                self._ours.add(port)


def _bridged(publication: Publication) -> list[Attachment]:
    """Return the attachments that a container may call from behind a bridge port, by its own published port."""
    host_ip = publication.bound.host_ip if publication.bound is not None else None
    if host_ip is not None and host_ip.is_loopback:
        return []
    return [attachment for attachment in publication.attachments if attachment.port is not None]
