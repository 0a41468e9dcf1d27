"""Which claims contend for which host ports, and which of them a change can reach.

Pure. A claim that names its ports, or was given some, is *on* them. One that takes any port out of a pool contends for
all of the pool, and is kept by pool: a pool can have tens of thousands of ports, and as many claims.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Generic, TypeVar

from .model import Mapping, PortRange, Protocol

Cell = tuple[str, int]  # a protocol and a host port: claims that share none cannot be rivals
Key = TypeVar("Key")
_Pool = tuple[str, PortRange]


def cells(mapping: Mapping) -> Iterator[Cell]:
    """Return the cells of a mapping's host ports; none where it names none."""
    return port_cells(mapping.protocol, mapping.host_ports)


def port_cells(protocol: Protocol, ports: PortRange | None) -> Iterator[Cell]:
    """Return the cells of these ports."""
    return ((protocol.value, port) for port in ports or ())


class Contest(Generic[Key]):
    """Who contends for which host port, and for which ports that has changed since it was last ``settled``."""

    def __init__(self) -> None:
        self._mappings: dict[Key, Mapping] = {}
        self._ports: dict[Key, PortRange] = {}
        self._on: dict[Cell, set[Key]] = {}
        self._pools: dict[_Pool, set[Key]] = {}
        self._portless: set[Key] = set()  # those that name neither port nor pool, and were given none
        self._fresh: set[Key] = set()  # those without a port that nobody has tried to give one yet
        self._dirty: set[Cell] = set()

    def enter(self, key: Key, mapping: Mapping, chosen: PortRange | None) -> None:
        """Take in a claim; ``chosen`` are the host ports it was given, where the mapping leaves them open."""
        self._mappings[key] = mapping
        pool = _pool(mapping)
        if pool is not None:
            self._pools.setdefault(pool, set()).add(key)
        ports = chosen if mapping.dynamic else mapping.host_ports
        if ports is None:
            self._fresh.add(key)
            if pool is None:
                self._portless.add(key)
            return
        self._ports[key] = ports
        for cell in port_cells(mapping.protocol, ports):
            self._on.setdefault(cell, set()).add(key)
            self._dirty.add(cell)

    def leave(self, key: Key) -> None:
        """Forget a claim."""
        mapping, ports = self._mappings.pop(key), self._ports.pop(key, None)
        self._portless.discard(key)
        self._fresh.discard(key)
        pool = _pool(mapping)
        if pool is not None:
            self._pools[pool].discard(key)
            if not self._pools[pool]:
                del self._pools[pool]
        for cell in port_cells(mapping.protocol, ports):
            self._on[cell].discard(key)
            if not self._on[cell]:
                del self._on[cell]
            self._dirty.add(cell)

    def on(self, cell: Cell) -> Collection[Key]:
        """Return the claims that are on a port."""
        return self._on.get(cell, ())

    def wanted(self, cell: Cell) -> bool:
        """Whether some claim would be another's rival there."""
        return cell in self._on or any(_within(cell, pool) for pool in self._pools)

    def touch(self, touched: Iterable[Cell]) -> None:
        """Take in that something else has changed about these ports."""
        self._dirty.update(touched)

    def settled(self) -> None:
        """Take in that what could be reached has been decided."""
        self._dirty.clear()
        self._fresh.clear()

    def reached(self, free: Collection[PortRange]) -> set[Key]:
        """Return the claims that a change can reach: those that share a port with it, and so on outwards.

        ``free`` are the ports to choose from where a mapping names none: as long as nothing changes among them, who
        found none need not look again.
        """
        found: set[Key] = set()
        seen, todo = set(self._dirty), list(self._dirty)
        pools = set(self._pools)  # those that were not reached
        waiting = self._fresh
        if self._portless and any(ports.first <= port <= ports.last for _, port in todo for ports in free):
            waiting = self._fresh | self._portless
        keys = list(waiting)
        while keys or todo:
            if todo:
                cell = todo.pop()
                keys += (key for key in self._on.get(cell, ()) if key not in found)
                reached = [pool for pool in pools if _within(cell, pool)]
            else:
                key = keys.pop()
                if key in found:
                    continue
                found.add(key)
                mapping = self._mappings[key]
                beside = set(port_cells(mapping.protocol, self._ports.get(key))) - seen
                seen |= beside
                todo += beside
                pool = _pool(mapping)
                reached = [pool] if pool is not None and pool in pools else []
            for pool in reached:
                pools.discard(pool)
                keys += self._pools[pool]
                beside = set(self._taken_of(pool)) - seen
                seen |= beside
                todo += beside
        return found

    def _taken_of(self, pool: _Pool) -> Iterable[Cell]:
        """Return the cells of a pool that a claim is on."""
        protocol, ports = pool
        if len(ports) > len(self._on):
            return [cell for cell in self._on if _within(cell, pool)]
        return [(protocol, port) for port in ports if (protocol, port) in self._on]


def _pool(mapping: Mapping) -> _Pool | None:
    if not mapping.dynamic or mapping.host_ports is None:
        return None
    return (mapping.protocol.value, mapping.host_ports)


def _within(cell: Cell, pool: _Pool) -> bool:
    return cell[0] == pool[0] and pool[1].first <= cell[1] <= pool[1].last
