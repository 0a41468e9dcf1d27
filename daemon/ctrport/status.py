"""What the daemon says of itself: ``status.json`` in the run directory, and the lock that says that it runs.

The file is written whole and renamed into place, so a reader sees one state or the next. Nothing reads it back but the
commands: the kernel holds the state.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from .model import Attachment, NodeFacts, Publication
from .owners import owner_of
from .rules import Gate, Layout, Place

DEFAULT_DIRECTORY = "/run/ctrport"

#: How often the lock is tried, and the seconds between two tries.
LOCK_TRIES, LOCK_PAUSE = 5, 0.05


#: What ``firewall`` of a status is until the daemon has listed what runs, and made the kernel follow.
NOT_READ = "not read yet"


class AlreadyRunning(Exception):
    """Another daemon holds the lock of this run directory."""


@dataclass(frozen=True)
class AttachmentStatus:
    """Where the host reaches a container in one family: the address, by which device, and what shares that link.

    ``port`` is the container's own veth where the device is a bridge, else empty.
    """

    address: str
    device: str
    subnet: str
    port: str

    @classmethod
    def of(cls, attachment: Attachment) -> AttachmentStatus:
        """Return an attachment as it is shown."""
        return cls(str(attachment.address), attachment.device, str(attachment.subnet), attachment.port or "")


@dataclass(frozen=True)
class PublicationStatus:
    """One publication, for people and programs.

    ``pod`` is ``namespace/name``, empty where it is none; ``container`` is a pod's sandbox. ``mapping`` is as declared,
    in quotes where it cannot be read; ``bound`` has the host ports that it got, and is empty unless it is active.
    ``reason`` is, of an active one, what else there is to say. ``since`` is when its state began, as ISO 8601 in UTC.
    ``owner`` is the words that its rules bear in the kernel, empty where it is to have none. ``process`` is the pid of
    its first process, as the daemon counts, 0 where there is none. ``sources`` and ``interface`` are who may reach it;
    empty is everybody. ``place`` counts those that wait in line behind one that serves, from 1; all others have 0.

    The rest is what ``ctrport ps`` has asked the kernel for, None where it did not: whether all its rules are there,
    and the connections that its rules have counted, with the bytes of the first packet of each.
    """

    namespace: str
    container: str
    pod: str
    mapping: str
    bound: str
    addresses: list[str]
    state: str
    reason: str
    source: str
    since: str
    owner: str = ""
    process: int = 0
    attachments: list[AttachmentStatus] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    interface: str = ""
    place: int = 0
    installed: bool | None = None
    connections: int | None = None
    bytes: int | None = None

    @property
    def name(self) -> str:
        """What it is a publication of, for people; "-" where no container matches."""
        if self.pod:
            return f"pod:{self.pod}"
        return f"{self.namespace}/{self.container}" if self.container else "-"

    @cached_property
    def json(self) -> str:
        """It as one JSON object, in one line."""
        return json.dumps({name: getattr(self, name) for name in self.__dataclass_fields__}, default=vars)

    @classmethod
    def of(cls, publication: Publication, since: str, process: int = 0, owner: str | None = None) -> PublicationStatus:
        """Return a publication as it is shown; ``owner`` is for one that is shown as what it is not."""
        return cls(
            namespace=publication.container.namespace if publication.container else "",
            container=publication.container.id if publication.container else "",
            pod=publication.pod or "",
            mapping=str(publication.asked),
            bound=str(publication.bound or ""),
            addresses=[str(attachment.address) for attachment in publication.attachments],
            state=str(publication.state),
            reason=publication.reason,
            source=publication.source,
            since=since,
            owner=owner if owner is not None else owner_of(publication) if publication.bound is not None else "",
            process=process,
            attachments=list(map(AttachmentStatus.of, publication.attachments)),
            sources=list(map(str, publication.access.sources)),
            interface=publication.access.interface or "",
            place=publication.place,
        )

    @classmethod
    def read(cls, fields: dict[str, Any]) -> PublicationStatus:
        """Return what was written as this JSON object. Raises as what is none makes it."""
        attachments = [AttachmentStatus(**each) for each in fields.pop("attachments", ())]
        return cls(**fields, attachments=attachments)


@dataclass(frozen=True)
class NetworkStatus:
    """One of ``networks``: the subnets that it is run for, or why it is not run at all."""

    bridge: str
    subnets: list[str]
    reason: str


@dataclass(frozen=True)
class Undeclared:
    """A mapping that the kernel holds rules of, though nothing asks for it: whose it was, and what they counted."""

    namespace: str
    container: str
    mapping: str
    owner: str
    connections: int
    bytes: int

    @property
    def name(self) -> str:
        """Whose it was, for people."""
        return f"{self.namespace}/{self.container}"


@dataclass(frozen=True)
class Status:
    """All that the daemon says: of itself, of the node, and of each publication. Times are ISO 8601 in UTC.

    ``config`` says why the configuration in use is an older one than that of the files, and is empty where it is not.
    ``repairs`` counts how often others had changed rules of ours, ``last_repair`` says what, who, and for how long.
    ``revisions`` has the containers, as ``namespace/id``, that the operator gave ports with `ctrport publish`, each
    with the revision of these that is carried out.
    ``warnings`` are what on the node may keep published ports from working, in a sentence each.
    ``backend``, ``families`` (4 and 6), ``layout`` (what of the configuration shapes the rules), ``addresses`` of the
    node, and ``services``, which are the node's by IPVS alone, are what the rules follow from beside the publications.

    The rest is what ``ctrport ps`` has asked the kernel for. ``kernel`` says whether it holds what it should, or why it
    was not asked, and is empty in what the daemon itself says.
    """

    version: str
    running: bool
    pid: int
    updated: str
    containerd: str
    firewall: str
    config: str = ""
    events: int = 0
    transactions: int = 0
    repairs: int = 0
    last_repair: str = ""
    publications: list[PublicationStatus] = field(default_factory=list)
    networks: list[NetworkStatus] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    backend: str = ""
    families: list[int] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    addresses: list[str] = field(default_factory=list)
    services: list[str] = field(default_factory=list)
    revisions: dict[str, str] = field(default_factory=dict)
    kernel: str = ""
    undeclared: list[Undeclared] = field(default_factory=list)

    def to_json(self) -> str:
        """Return it as one JSON object, a publication a line; keys and their meaning are API."""
        # Of thousands of publications few have changed since the last time: their text is at hand.
        text = {field.name: json.dumps(getattr(self, field.name)) for field in fields(self) if field.name not in _LISTS}
        text["publications"] = _lines([publication.json for publication in self.publications])
        for name in ("networks", "undeclared"):
            text[name] = _lines([json.dumps(asdict(each)) for each in getattr(self, name)])
        return "{\n" + ",\n".join(f'  "{field.name}": {text[field.name]}' for field in fields(self)) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Status:
        """Read what ``to_json`` wrote. Raises ``ValueError`` for anything else."""
        try:
            found: dict[str, Any] = json.loads(text)
            publications = [PublicationStatus.read(each) for each in found.pop("publications")]
            networks = [NetworkStatus(**each) for each in found.pop("networks")]
            undeclared = [Undeclared(**each) for each in found.pop("undeclared", ())]
            return cls(**found, publications=publications, networks=networks, undeclared=undeclared)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a status file of this version: {error}") from error


_LISTS = ("publications", "networks", "undeclared")


def _lines(items: Iterable[str]) -> str:
    """Return items of a JSON list, each in a line of its own."""
    text = ",\n    ".join(items)
    return f"[\n    {text}\n  ]" if text else "[]"


def networks(facts: NodeFacts, amiss: Mapping[str, str]) -> list[NetworkStatus]:
    """Return the networks as they are shown: those that are run, and why others are not."""
    run = [NetworkStatus(network.bridge, list(map(str, network.subnets)), "") for network in facts.networks]
    return run + [NetworkStatus(bridge, [], reason) for bridge, reason in amiss.items()]


def layout(its: Layout) -> dict[str, Any]:
    """Return what shapes the rules as it is shown."""
    return {**asdict(its), "position": its.position.value, "gates": [asdict(gate) for gate in its.gates]}


def layout_of(shown: Mapping[str, Any]) -> Layout:
    """Return what was shown so. Raises ``ValueError``, ``TypeError`` or ``KeyError`` where it was not."""
    gates = tuple(Gate(**gate) for gate in shown["gates"])
    return Layout(**{**shown, "position": Place(shown["position"]), "gates": gates})


def shown(moment: datetime) -> str:
    """Return a time as it is shown: ISO 8601, to the second."""
    return moment.isoformat(timespec="seconds")


def write(directory: Path, status: Status) -> None:
    """Put ``status.json`` in place. Raises ``OSError``."""
    path = directory / "status.json"
    new = path.with_suffix(".new")
    new.write_text(status.to_json())
    new.replace(path)


def withdraw(directory: Path) -> None:
    """Take ``status.json`` away, where that can be done: better none than one that is not so any more."""
    for name in ("status.new", "status.json"):
        with contextlib.suppress(OSError):
            (directory / name).unlink()


def read(directory: Path) -> Status | None:
    """Return what the daemon last said, or None where it said nothing that can be read."""
    try:
        return Status.from_json((directory / "status.json").read_text())
    except (OSError, ValueError):
        return None


def stamp(directory: Path) -> tuple[int, ...] | None:
    """Return what changes whenever the daemon says something, None where it said nothing."""
    try:
        file = (directory / "status.json").stat()
    except OSError:
        return None
    return (file.st_ino, file.st_mtime_ns, file.st_size)


class Lock:
    """The lock of a run directory, as its holder has it."""

    def __init__(self, file: int) -> None:
        self._file = file

    def turned(self) -> None:
        """Note that the daemon has come round once more: by a clock that nobody sets, which all processes share."""
        with contextlib.suppress(OSError):
            os.pwrite(self._file, f"{os.getpid()}\n{time.monotonic():.0f}\n".encode("ascii"), 0)


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[Lock]:
    """Hold the run directory's lock. Raises ``AlreadyRunning`` or ``OSError``; the lock ends with the process."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    file = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with open(file, "r+", encoding="ascii") as lock:
        for tries_left in reversed(range(LOCK_TRIES)):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if not tries_left:
                    message = f"another daemon runs already ({_holder(directory)}, run directory {directory})"
                    raise AlreadyRunning(message) from error
                time.sleep(LOCK_PAUSE)  # a command that only asks holds it for a moment, too
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield Lock(lock.fileno())


def is_running(directory: Path) -> bool:
    """Whether a daemon holds the run directory's lock."""
    try:
        with open(directory / "lock", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def silent_for(directory: Path) -> float:
    """Return how many seconds ago the daemon came round last; 0 where it has not yet, or none runs."""
    try:
        _, turned = (directory / "lock").read_text(encoding="ascii").split()
        return max(0.0, time.monotonic() - int(turned))
    except (OSError, ValueError):
        return 0.0


def _holder(directory: Path) -> str:
    pid = (directory / "lock").read_text(encoding="ascii").partition("\n")[0]
    return f"pid {pid}" if pid else "just starting"
