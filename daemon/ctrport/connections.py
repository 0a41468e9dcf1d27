"""How many connections each mapping has had, as the kernel counted them, in a bounded number of series. Pure.

A series is a mapping in one address family. The kernel counts each family by itself, and begins anew where the rules of
one are written anew: a sum over both would fall then, but not to where a counter begins. What has no series of its own
is counted together, from when this was first told of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice

from .model import Family, Publication

#: How many series there are at most, beside that of the rest.
SERIES = 1000


@dataclass(frozen=True)
class Counts:
    """What the kernel has counted by family and owner, and what is published by owner."""

    connections: Mapping[Family, Mapping[str, int]]
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
        self._named: dict[tuple[Family, str], Labels] = {}
        self._last: Mapping[Family, Mapping[str, int]] | None = None
        self.rest = 0
        self.left_out = 0

    def take(self, seen: Counts) -> None:
        """Take in what the kernel has counted by now."""
        before, self._last = self._last, seen.connections
        self._named = dict(islice(self._due(seen), self._most))
        for family, counts in seen.connections.items():
            known = before.get(family, {}) if before is not None else counts  # what was there before is no news
            for owner, count in counts.items():
                if (family, owner) not in self._named:
                    last = known.get(owner, 0)
                    self.rest += count - last if count >= last else count  # less than before: its rules are others
        self.left_out = sum(map(len, seen.connections.values())) - len(self._named)

    def _due(self, seen: Counts) -> Iterator[tuple[tuple[Family, str], Labels]]:
        """Yield who may have a series: first those that have one."""
        everybody = ((family, owner) for family, counts in seen.connections.items() for owner in counts)
        for family, owner in chain(self._named, (key for key in everybody if key not in self._named)):
            if owner in seen.published and owner in seen.connections.get(family, ()):
                yield (family, owner), Labels.of(seen.published[owner], family)

    @property
    def series(self) -> dict[Labels, int]:
        """The connections of each that has a series."""
        found: dict[Labels, int] = {}
        for (family, owner), labels in self._named.items():
            found[labels] = found.get(labels, 0) + (self._last or {})[family][owner]
        return found
