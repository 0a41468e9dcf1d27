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

from .model import NodeFacts, Publication

DEFAULT_DIRECTORY = "/run/ctrport"

#: How often the lock is tried, and the seconds between two tries.
LOCK_TRIES, LOCK_PAUSE = 5, 0.05


class AlreadyRunning(Exception):
    """Another daemon holds the lock of this run directory."""


@dataclass(frozen=True)
class PublicationStatus:
    """One publication, for people and programs.

    ``pod`` is ``namespace/name``, empty where it is none; ``container`` is a pod's sandbox. ``mapping`` is as declared,
    in quotes where it cannot be read; ``bound`` has the host ports that it got, and is empty unless it is active.
    ``reason`` is, of an active one, what else there is to say. ``since`` is when its state began, as ISO 8601 in UTC.
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

    @property
    def name(self) -> str:
        """What it is a publication of, for people; "-" where no container matches."""
        if self.pod:
            return f"pod:{self.pod}"
        return f"{self.namespace}/{self.container}" if self.container else "-"

    @cached_property
    def json(self) -> str:
        """It as one JSON object, in one line."""
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def of(cls, publication: Publication, since: str) -> PublicationStatus:
        """Return a publication as it is shown."""
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
        )


@dataclass(frozen=True)
class NetworkStatus:
    """One of ``networks``: the subnets that it is run for, or why it is not run at all."""

    bridge: str
    subnets: list[str]
    reason: str


@dataclass(frozen=True)
class Status:
    """All that the daemon says: of itself, of the node, and of each publication. Times are ISO 8601 in UTC.

    ``config`` says why the configuration in use is an older one than that of the files, and is empty where it is not.
    ``repairs`` counts how often others had changed rules of ours, ``last_repair`` says what, who, and for how long.
    ``revisions`` has the containers, as ``namespace/id``, that the operator gave ports with `ctrport publish`, each
    with the revision of these that is carried out.
    ``warnings`` are what on the node may keep published ports from working, in a sentence each.
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
    revisions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return it as one JSON object, a publication a line; keys and their meaning are API."""
        # Of thousands of publications few have changed since the last time: their text is at hand.
        text = {field.name: json.dumps(getattr(self, field.name)) for field in fields(self) if field.name not in _LISTS}
        text["publications"] = _lines([publication.json for publication in self.publications])
        text["networks"] = _lines([json.dumps(asdict(network)) for network in self.networks])
        return "{\n" + ",\n".join(f'  "{field.name}": {text[field.name]}' for field in fields(self)) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Status:
        """Read what ``to_json`` wrote. Raises ``ValueError`` for anything else."""
        try:
            found: dict[str, Any] = json.loads(text)
            publications = [PublicationStatus(**each) for each in found.pop("publications")]
            networks = [NetworkStatus(**each) for each in found.pop("networks")]
            return cls(**found, publications=publications, networks=networks)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a status file of this version: {error}") from error


_LISTS = ("publications", "networks")


def _lines(items: Iterable[str]) -> str:
    """Return items of a JSON list, each in a line of its own."""
    text = ",\n    ".join(items)
    return f"[\n    {text}\n  ]" if text else "[]"


def networks(facts: NodeFacts, amiss: Mapping[str, str]) -> list[NetworkStatus]:
    """Return the networks as they are shown: those that are run, and why others are not."""
    run = [NetworkStatus(network.bridge, list(map(str, network.subnets)), "") for network in facts.networks]
    return run + [NetworkStatus(bridge, [], reason) for bridge, reason in amiss.items()]


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


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Hold the run directory's lock. Raises ``AlreadyRunning`` or ``OSError``; the lock ends with the process."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(directory / "lock", "a+", encoding="ascii") as lock:
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
        yield


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


def _holder(directory: Path) -> str:
    pid = (directory / "lock").read_text(encoding="ascii").strip()
    return f"pid {pid}" if pid else "just starting"
