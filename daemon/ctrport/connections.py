"""How many connections each mapping has had, as the kernel counted them, in a bounded number of series. Pure.

A series is a mapping in one address family. The kernel counts each family by itself, and begins anew where the rules of
one are written anew: a sum over both would fall then, but not to where a counter begins. What has no series of its own
is counted together, from when this was first told of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .model import Family, Publication

#: How many series there are at most, beside that of the rest.
SERIES = 1000

#: A family, and the owner of the rules that are counted.
Key = tuple[Family, str]


@dataclass(frozen=True)
class Counts:
    """What the kernel has counted for each family and owner, and what is published by owner."""

    connections: Mapping[Key, int]
    published: Mapping[str, Publication]


@dataclass(frozen=True)
class Labels:
    """What a series goes by. ``host_ip`` is empty where the mapping is for every address of the node."""

    namespace: str
    container: str
    pod: str
    host_ip: str
    host_port: str
    protocol: str
    family: str

    @classmethod
    def of(cls, publication: Publication, family: Family) -> Labels:
        """Return those of an active publication; a pod's container is its sandbox, which says nothing to anybody."""
        container, bound = publication.container, publication.bound
        assert container is not None
        assert bound is not None
        return cls(
            namespace=container.namespace,
            container="" if publication.pod is not None else container.id,
            pod=publication.pod or "",
            host_ip=str(bound.host_ip or ""),
            host_port=str(bound.host_ports),
            protocol=str(bound.protocol),
            family=f"ipv{family.value}",
        )


class Connections:
    """What was counted when it was last looked. ``rest`` never falls; ``left_out`` is how many it stands for.

    Who has a series keeps it for as long as it is published.
    """

    def __init__(self, most: int = SERIES) -> None:
        self._most = most
        self._named: dict[Key, Labels] = {}
        self._last: Mapping[Key, int] | None = None
        self.rest = 0
        self.left_out = 0

    def take(self, seen: Counts) -> None:
        """Take in what the kernel has counted by now."""
        counts, published = seen.connections, seen.published
        before, self._last = self._last, counts
        named: dict[Key, Labels] = {}
        for key in (*self._named, *counts):
            if len(named) == self._most:
                break
            if key in counts and key not in named and key[1] in published:
                named[key] = Labels.of(published[key[1]], key[0])
        for key, count in counts.items():
            # What was there when it was first looked is no news. Less than before: the rules are others by now.
            known = count if before is None else before.get(key, 0)
            if key not in named:
                self.rest += count - known if count >= known else count
        self._named = named
        self.left_out = len(counts) - len(named)

    @property
    def series(self) -> dict[Labels, int]:
        """The connections of each that has a series."""
        found: dict[Labels, int] = {}
        for key, labels in self._named.items():
            found[labels] = found.get(labels, 0) + (self._last or {})[key]
        return found
