"""The host ports that are held, each for who wants it, and by whom others are.

DNAT publishes a port without a socket, so that any process could take it as well. Each host port is therefore bound by
a socket that answers nobody (see ``portsockets``).

TCP remembers ended connections for a minute (TIME_WAIT), and a bind without SO_REUSEADDR fails for as long. That is no
reason not to publish, so where nothing but connections is seen on the port, the bind is done with SO_REUSEADDR, which
is switched off again at once. As tried on Linux 6.18: from then on a bind with SO_REUSEADDR by another process fails.
With a real listener ours fails. A process caught between its bind and its listen, both sockets having SO_REUSEADDR,
fails to listen. It does not help where the connections' own socket was without SO_REUSEADDR, such as a client's: then
the port is not reserved until they are gone.

systemd can hold the sockets while no daemon runs (its file descriptor store). The next daemon goes on with them, so
that there is no moment at which another process could bind the port. What such a socket is, the kernel says.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from .listeners import UNKNOWN, Bound, Entry, entries, holder
from .model import Address, PortRange, Protocol
from .portsockets import Cell, adopted, bind, set_reuse
from .systemd import FileStore

_NO_FILES_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
#: Seconds that systemd may take to close a socket after it has agreed to: from version 254 on another process does it.
_CLOSING = 0.05

_NOT_SUPPORTED = (errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EAFNOSUPPORT)


@dataclass(frozen=True)
class Claim:
    """Host ports to have: on each of ``addresses``, 0.0.0.0 and :: standing for every address of their family."""

    protocol: Protocol
    ports: PortRange
    addresses: tuple[Address, ...]


class Held(Exception):
    """Another process has a host port. ``holder`` says which, in words safe to print.

    ``address`` is the one that was wanted. ``at`` is where the process has the port: the same, or where every address
    was wanted perhaps a single one.
    """

    def __init__(self, protocol: Protocol, address: Address, port: int, holder: str, at: Address | None = None) -> None:
        super().__init__(f"host port {port}/{protocol} is held by {holder}")
        self.protocol, self.address, self.port, self.holder = protocol, address, port, holder
        self.at = at or address


class NotOnNode(Exception):
    """``address`` is none of this node, or not usable yet: IPv6 looks for duplicates of a new address first."""

    def __init__(self, address: Address) -> None:
        super().__init__(f"{address} is not an address of this node")
        self.address = address


class _NotReserved(Exception):
    """A port that can be published and not reserved; the message says why."""


class _NoFilesLeft(Exception):
    """The process, or the machine, has as many files open as it may."""


_Port = tuple[Protocol, int]


@dataclass(frozen=True)
class _Taken:
    """What a key has: its claim, those of its cells that a socket of ours holds, and why not all."""

    claim: Claim
    cells: frozenset[Cell]
    remark: str


def _no_container(cgroup: str) -> None:
    return None


class Reservations:
    """The host ports that this daemon holds, each under the keys of those who want it.

    Who may have a port is decided elsewhere: keys may share one, or overlap, so that a port goes from one to the next
    without a gap. ``limit`` is how many ports are held at most, each by a socket an address; what is beyond is looked
    at but not held. With limit 0 ``take`` does nothing at all.

    ``name_container`` gets the text of /proc/PID/cgroup, and says which container that is, or None. ``store`` is what
    holds the sockets for the next run; without it nothing does.
    """

    def __init__(
        self,
        limit: int,
        name_container: Callable[[str], str | None] = _no_container,
        store: FileStore | None = None,
    ) -> None:
        self.limit = limit
        self.name_container = name_container
        self._store = FileStore() if store is None else store  # an empty one counts as False
        self._adopted: dict[Cell, socket.socket] = {}  # an earlier run's, which nobody has taken yet
        self._leaving: set[_Port] = set()  # those that the store may still have to close
        self._taken: dict[Hashable, _Taken] = {}
        self._users: Counter[Cell] = Counter()
        self._sockets: dict[_Port, dict[str, socket.socket]] = {}

    def __len__(self) -> int:
        """Return how many sockets are held, beside those of an earlier run that nobody has taken."""
        return sum(map(len, self._sockets.values()))

    @property
    def ports(self) -> int:
        """How many ports are held: those that count against ``limit``."""
        return len(self._sockets)

    def is_full(self) -> bool:
        """Whether no more ports can be held."""
        return self.ports >= self.limit

    def take(self, key: Hashable, claim: Claim) -> str:
        """Hold the ports of ``claim`` for ``key``, in place of what it had; what is in both is kept throughout.

        Return an empty text, or one sentence on why not every port is reserved though nobody has it. Then it is worth
        calling again; otherwise a second call does nothing.

        Raises ``Held`` or ``NotOnNode``, and then nothing has changed.
        """
        before = self._taken.get(key)
        if not self.limit or (before is not None and before.claim == claim and not before.remark):
            return ""
        old = before.cells if before is not None else frozenset[Cell]()
        wanted = list(_cells(claim))
        fresh = [cell for cell in wanted if self._socket(cell) is None]
        keep = self._ports_after(old.difference(wanted), fresh) <= self.limit
        bound, remark = self._bind_all(claim, [cell for cell in fresh if cell not in self._adopted], keep)
        self._store.put(
            f"{claim.protocol.value}-{claim.ports.first}", {cell: one.fileno() for cell, one in bound.items()}
        )
        if keep:
            bound.update((cell, self._adopted.pop(cell)) for cell in fresh if cell in self._adopted)
        for cell, bound_socket in bound.items():
            self._sockets.setdefault((cell.protocol, cell.port), {})[cell.address] = bound_socket
        cells = frozenset(cell for cell in wanted if self._socket(cell) is not None)
        self._users.update(cells)
        self._drop(old)
        self._taken[key] = _Taken(claim, cells, remark)
        return remark

    def release(self, key: Hashable) -> None:
        """Let go of what ``key`` has, if anything, but for what other keys have too."""
        taken = self._taken.pop(key, None)
        if taken is not None:
            self._drop(taken.cells)

    def in_use(self, claim: Claim) -> list[tuple[Address, int]]:
        """Return where ``claim`` meets a socket of another, whatever it is for; what is held here does not count.

        For a port that is to be chosen, which is not worth finding out who has another.
        """
        found = []
        for cell in _cells(claim):
            if (cell.protocol, cell.port) in self._sockets or cell in self._adopted:
                continue  # ours, for another key or of an earlier run: taking it tells
            try:
                bind(cell, reuse=False).close()
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    found.append((ip_address(cell.address), cell.port))
        return found

    def adopt(self, files: Iterable[tuple[str, int]]) -> int:
        """Go on with the sockets of an earlier run, and return how many there are; what is none is closed.

        ``files`` come with the names under which the store has them.
        """
        lots: dict[str, dict[Hashable, int]] = {}
        spoilt = set()
        for name, file in files:
            lot = lots.setdefault(name, {})
            try:
                cell, one = adopted(file)
            except OSError:
                spoilt.add(name)
                continue
            if cell in self._adopted:
                one.close()
                spoilt.add(name)
            else:
                self._adopted[cell] = one
                lot[cell] = file
        for name, lot in lots.items():
            self._store.adopt(name, lot, whole=name not in spoilt)
        return len(self._adopted)

    async def keep(self) -> None:
        """Have the store hold what is held here, and let go of what an earlier run held and nobody has taken.

        To be called when all that is wanted was taken.
        """
        if self._adopted:
            self._gone(self._adopted)
            self._adopted.clear()
        await self._store.flush()

    def close(self) -> None:
        """Let go of everything; what the store has by now, it goes on holding."""
        for one in (*self._adopted.values(), *(one for by in self._sockets.values() for one in by.values())):
            one.close()
        for held in (self._adopted, self._sockets, self._users, self._taken):
            held.clear()

    async def forget(self) -> None:
        """Have the store let go of everything, after ``close``."""
        await self._store.clear()

    def _ports_after(self, gone: Iterable[Cell], fresh: Iterable[Cell]) -> int:
        """Return how many ports there will be when a key has given up what is ``gone``, and has what is ``fresh``."""
        freed: dict[_Port, set[str]] = {}
        for cell in gone:
            if self._users[cell] == 1:
                freed.setdefault((cell.protocol, cell.port), set()).add(cell.address)
        gone_ports = {port for port, addresses in freed.items() if self._sockets[port].keys() <= addresses}
        fresh_ports = {(cell.protocol, cell.port) for cell in fresh}
        # Counted, as sets of all that is held would cost as much with each port as there are ports.
        new = sum(port not in self._sockets for port in fresh_ports)
        return len(self._sockets) - len(gone_ports - fresh_ports) + new

    def _socket(self, cell: Cell) -> socket.socket | None:
        return self._sockets.get((cell.protocol, cell.port), {}).get(cell.address)

    def _drop(self, cells: Iterable[Cell]) -> None:
        gone = {}
        for cell in cells:
            self._users[cell] -= 1
            if self._users[cell]:
                continue
            del self._users[cell]
            of_port = self._sockets[cell.protocol, cell.port]
            gone[cell] = of_port.pop(cell.address)
            if not of_port:
                del self._sockets[cell.protocol, cell.port]
        self._gone(gone)

    def _gone(self, sockets: Mapping[Cell, socket.socket]) -> None:
        _close(sockets)
        if self._store.remove(sockets):
            self._leaving.update((cell.protocol, cell.port) for cell in sockets)

    def _bind_all(self, claim: Claim, cells: list[Cell], keep: bool) -> tuple[dict[Cell, socket.socket], str]:
        """Return the sockets, and why there is not one for each cell. Raises ``Held`` or ``NotOnNode``."""
        others = _Others(claim)
        if not keep:
            return {}, self._check(cells, others, f"firewall.reserve_limit ({self.limit}) is reached")
        bound, remarks = dict[Cell, socket.socket](), dict[str, None]()
        try:
            for cell in cells:
                try:
                    bound[cell] = self._bind(cell, others)
                except _NotReserved as why:
                    remarks[str(why)] = None
        except _NoFilesLeft as why:
            _close(bound)  # or there is not even one to look with
            return {}, self._check(cells, others, str(why))
        except BaseException:
            _close(bound)
            raise
        return bound, _sentence(remarks)

    def _check(self, cells: list[Cell], others: _Others, why: str) -> str:
        """See that nobody has these ports, and hold none."""
        for cell in cells:
            try:
                self._bind(cell, others).close()
            except _NotReserved:
                continue
            except _NoFilesLeft:
                return f"not reserved, and not looked at: {why}"
        return f"not reserved, only looked at: {why}"

    def _bind(self, cell: Cell, others: _Others) -> socket.socket:
        """Return a socket that holds ``cell``. Raises all of this module's errors."""
        try:
            try:
                return bind(cell, reuse=False)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            return self._bind_left(cell) or self._bind_contested(cell, others)
        except OSError as error:
            raise _explained(error, cell) from error

    def _bind_left(self, cell: Cell) -> socket.socket | None:
        """Bind where a socket is in the way that was let go of here, and that the store has perhaps not closed yet."""
        if (cell.protocol, cell.port) not in self._leaving:
            return None
        self._store.wait()
        self._leaving.clear()
        end = time.monotonic() + _CLOSING
        while True:
            try:
                return bind(cell, reuse=False)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            if time.monotonic() >= end:
                return None
            time.sleep(0.001)

    def _bind_contested(self, cell: Cell, others: _Others) -> socket.socket:
        """Bind where a socket is in the way: perhaps one of ours, perhaps one that serves nobody."""
        ours = list(self._sockets.get((cell.protocol, cell.port), {}).values())
        ours += [one for its, one in self._adopted.items() if (its.protocol, its.port) == (cell.protocol, cell.port)]
        own = {os.fstat(one.fileno()).st_ino for one in ours}
        found = [entry for entry in others.at(cell) if entry.inode not in own]
        serving = [entry for entry in found if entry.serving]
        if serving:
            at = _where(serving[0], cell)
            who = holder([each.inode for each in serving if _where(each, cell) == at], self.name_container)
            raise Held(cell.protocol, ip_address(cell.address), cell.port, who, at)
        # Connections of UDP are left alone: with SO_REUSEADDR we would share their port, not wait for their end.
        reuse = bool(ours) or (bool(found) and cell.protocol is not Protocol.UDP)
        try:
            for one in ours:
                set_reuse(one, True)
            # Where nothing is to be seen, it may have ended in between: the second try tells.
            return bind(cell, reuse)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if found:
                inodes = {entry.inode for entry in found if entry.inode}
                who = f"of {others.owner(inodes, self.name_container)}" if inodes else "that have ended"
                raise _NotReserved(f"connections {who} are still on port {cell.port}") from error
            raise _held(cell, UNKNOWN) from error
        finally:
            for one in ours:
                set_reuse(one, False)


class _Others:
    """The sockets on a claim's ports as they were when first asked for: reading them once a port is slow."""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._read: dict[int, list[Entry]] | None = None
        self._asked = False

    def at(self, cell: Cell) -> list[Entry]:
        """Return those that could be in the way of ``cell``."""
        if self._read is None:
            self._read = entries(self._claim.protocol, self._claim.ports)
        wanted = Bound(ip_address(cell.address))
        return [entry for entry in self._read.get(cell.port, ()) if entry.bound.overlaps(wanted)]

    def owner(self, inodes: Collection[int], name_container: Callable[[str], str | None]) -> str:
        """Return what to call the process that has these connections; only of the first ones, as that is slow too."""
        asked, self._asked = self._asked, True
        return UNKNOWN if asked else holder(inodes, name_container)


def _close(sockets: Mapping[Cell, socket.socket]) -> None:
    for one in sockets.values():
        one.close()


def _cells(claim: Claim) -> Iterator[Cell]:
    for address in dict.fromkeys(map(str, claim.addresses)):
        for port in claim.ports:
            yield Cell(claim.protocol, address, port)


def _held(cell: Cell, by: str) -> Held:
    return Held(cell.protocol, ip_address(cell.address), cell.port, by)


def _where(entry: Entry, cell: Cell) -> Address:
    """Return where a socket is in the way of ``cell``: at its own address alone, where it has one."""
    at, wanted = entry.bound.unmapped, ip_address(cell.address)
    return wanted if at.is_unspecified or at.version != wanted.version else at


def _explained(error: OSError, cell: Cell) -> Exception:
    if error.errno == errno.EADDRNOTAVAIL:
        return NotOnNode(ip_address(cell.address))
    if error.errno in _NO_FILES_LEFT:
        return _NoFilesLeft(f"no more sockets can be opened ({error.strerror})")
    if error.errno in (errno.EACCES, errno.EPERM):
        return _NotReserved(f"the daemon may not bind port {cell.port} (CAP_NET_BIND_SERVICE)")
    if error.errno in _NOT_SUPPORTED:
        family = "" if cell.protocol is Protocol.SCTP else f" over IPv{ip_address(cell.address).version}"
        return _NotReserved(f"this kernel has no {cell.protocol.value.upper()} sockets{family}")
    return _NotReserved(f"binding {cell.address} port {cell.port}: {error.strerror}")


def _sentence(remarks: Iterable[str]) -> str:
    first, *more = [*remarks] or [""]
    return first and f"not reserved: {first}" + (f", and {len(more)} more" if more else "")
