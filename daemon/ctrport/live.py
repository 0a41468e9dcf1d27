"""Ports given to containers while they run: `ctrport publish` and `ctrport unpublish`.

The operator's word is kept by containerd, with the container. The daemon follows it there like anything else, and says
in its status which revision of it is carried out; a command waits for that one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import amend, ports, status
from .amend import Elsewhere
from .config import Config
from .containerd import Containerd, ContainerdError, NotFound
from .listed import Listed
from .model import Container, ContainerKey, Live, Mapping, Role, State
from .named import Named, NoSuch, find
from .pods import Pods, Running
from .publish import LIVE_SOURCE
from .status import PublicationStatus, Status

#: Seconds that the daemon has to carry a change out, and those between two looks at what it says.
WITHIN, PAUSE = 10.0, 0.02
#: Seconds between two looks at whether the container and its ports are what they were.
CHECK = 0.5
#: Seconds to wait for another command that changes the ports of a container.
TURN = 10.0

DOWN = "the daemon is down: nothing is published or withdrawn until it runs (systemctl start ctrport)"


class NotDone(Exception):
    """A command that changed nothing, and one sentence that says why."""


@dataclass(frozen=True)
class Outcome:
    """What has become of the ports that a command named.

    ``container`` is how a command may name it. ``publications`` are what the daemon now says of these ports, and
    ``withdrawn`` those that are closed. ``problems`` are why the rest is not as it was to be, in a sentence each.
    """

    container: str
    publications: list[PublicationStatus] = field(default_factory=list)
    withdrawn: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Return it as one JSON object; keys and their meaning are API."""
        return json.dumps(asdict(self), indent=2)


@dataclass(frozen=True)
class _Target:
    """A container that was named: what it is called, and what is declared for it in other ways."""

    name: str
    key: ContainerKey
    runs: bool
    others: list[Elsewhere]


async def publish(config: Config, directory: Path, name: str, specs: Sequence[str]) -> Outcome:
    """Give a container ports, and wait until the daemon whose run directory this is has decided what becomes of them.

    Raises ``NotDone``, ``NoSuch`` or ``amend.Unusable`` where nothing was changed, and ``ContainerdError``.
    """
    new = amend.given(specs)
    async with Containerd(config.containerd.address) as containerd:
        target = await _find(containerd, config, name)
        if not target.runs:
            raise NotDone(f"{target.name} has no running task: nothing of it can be published, and nothing is changed")
        async with _alone(config.containerd.address):
            live = await _kept(containerd, target)
            revision = await _keep(containerd, target, amend.added(target.name, live, new, target.others))
        try:
            current = await _carried_out(containerd, target, revision, directory, present=new)
        except _NotSeen as error:
            its = " and ".join(map(str, new))
            problem = f"{its} is declared for {target.name}, but {error}; {_undo(target, *map(str, new))}"
            return Outcome(target.name, problems=[problem])
    shown = _of(current, target.key, new)
    return Outcome(target.name, shown, problems=_not_published(target, new, shown))


def _not_published(target: _Target, new: Iterable[Mapping], shown: Sequence[PublicationStatus]) -> list[str]:
    reasons = dict.fromkeys(map(str, new), "it ended meanwhile")
    reasons |= {one.mapping: "" if one.state == State.ACTIVE else one.reason for one in shown}
    return [
        f"{mapping} of {target.name} is not published: {reason}. It stays declared, and is published as soon as it can "
        f"be; {_undo(target, mapping)}"
        for mapping, reason in reasons.items()
        if reason
    ]


def _undo(target: _Target, *mappings: str) -> str:
    return f"to take it back: ctrport unpublish {target.name} {' '.join(mappings)}"


async def unpublish(config: Config, directory: Path, name: str, specs: Sequence[str]) -> Outcome:
    """Take ports back that `publish` gave a container, all of them where none is named, and wait until they are closed.

    Raises what ``publish`` does, as it does.
    """
    async with Containerd(config.containerd.address) as containerd:
        target = await _find(containerd, config, name)
        async with _alone(config.containerd.address):
            live = await _kept(containerd, target)
            if specs:
                old = amend.taken(target.name, live, specs, _bound(directory, target.key), target.others)
            else:
                old = live.mappings if live is not None else ()
            if live is None or not (old or live.unread):
                return Outcome(target.name)
            revision = await _keep(containerd, target, [mapping for mapping in live.mappings if mapping not in old])
        gone = [*map(str, old), *(str(unread) for unread, _ in live.unread)]
        if not target.runs:
            return Outcome(target.name, withdrawn=gone)
        try:
            current = await _carried_out(containerd, target, revision, directory, absent=old)
        except _Ended:
            return Outcome(target.name, withdrawn=gone)
        except _NotSeen as error:
            problem = f"{' and '.join(gone)} is no longer declared for {target.name}, but {error}"
            return Outcome(target.name, problems=[problem])
    left = [one for one in _of(current, target.key, old) if one.state != State.REFUSED]
    problems = [f"{one.mapping} of {target.name} is declared elsewhere ({one.source}), and stays" for one in left]
    kept = {one.mapping for one in left}
    return Outcome(target.name, left, [mapping for mapping in gone if mapping not in kept], problems)


# Which container.


async def _find(containerd: Containerd, config: Config, name: str) -> _Target:
    found: list[Listed] = []
    for namespace in await containerd.namespaces():
        found += await containerd.containers(namespace, annotations=config.reads_annotations, ended=True)
    everyone = [Named(one.key, one.labels, one.runs and not one.starts, one.role) for one in found]
    watched = [named for named in everyone if config.watches(named.key.namespace)]
    try:
        named = find(name, watched)
    except NoSuch:
        with contextlib.suppress(NoSuch):
            namespace = find(name, everyone).key.namespace
            if not config.watches(namespace):
                raise NotDone(f"nothing of the namespace {namespace} is published (containerd.namespaces)") from None
        raise
    if named.role is Role.MEMBER:
        raise NotDone(f"{named.key} is part of the pod {named.pod.shown}, which is published as one: name the pod")
    container = _as_published(named.key, found) if named.runs else None
    others = [] if container is None else amend.elsewhere(container, config.publish, config.containers_may_publish)
    return _Target(str(named), named.key, named.runs, others)


def _as_published(key: ContainerKey, found: Iterable[Listed]) -> Container | None:
    """Return a container as entries match it, a pod with its containers."""
    pods = Pods()
    for listed in found:
        if listed.runs:
            # Containers of a pod are told by its uid: that they share a network namespace, too, is the daemon's to see.
            its = (listed.labels, listed.annotation, listed.live, listed.role)
            pods.see(Running(listed.key, listed.pid or 0, 0, (0, 0), *its))
    return pods.get(key)


# What is kept with it.


@contextlib.asynccontextmanager
async def _alone(address: str) -> AsyncIterator[None]:
    """Be the only command that changes ports in this containerd: it has no condition for a write.

    By a lock on the directory of its socket, which is the same one whatever the run directory, and in a pod, too. Who
    writes our extension by other means is not kept out.
    """
    path = os.path.dirname(address)
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise NotDone(f"{path} cannot be locked: {error.strerror}; nothing is changed") from error
    try:
        end = time.monotonic() + TURN
        while True:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise NotDone(f"another command has been changing ports for {TURN:g} s: try again") from None
            await asyncio.sleep(PAUSE)
        yield
    finally:
        os.close(directory)


async def _kept(containerd: Containerd, target: _Target) -> Live | None:
    try:
        return await containerd.live(target.key)
    except NotFound:
        raise NotDone(f"{target.name} was deleted meanwhile") from None


async def _keep(containerd: Containerd, target: _Target, mappings: Sequence[Mapping]) -> str:
    """Keep these with the container, under a revision that is returned: another one each time, whatever was there."""
    revision = secrets.token_hex(8)
    try:
        await containerd.keep_live(target.key, mappings, revision)
    except NotFound:
        raise NotDone(f"{target.name} was deleted meanwhile") from None
    except ValueError as error:
        raise amend.Unusable(f"{target.name} cannot be given that much: {error}") from None
    return revision


# What the daemon makes of it.


class _NotSeen(Exception):
    """What is kept was not carried out: the middle of a sentence that says why."""


class _Ended(_NotSeen):
    """The container ended meanwhile."""


async def _carried_out(
    containerd: Containerd,
    target: _Target,
    revision: str,
    directory: Path,
    *,
    present: Collection[Mapping] = (),
    absent: Collection[Mapping] = (),
) -> Status:
    """Return what the daemon says once it has carried a revision out, or a later one with and without these.

    Raises ``_NotSeen``.
    """
    end, check = time.monotonic() + WITHIN, 0.0
    seen: tuple[int, ...] | None = None
    while True:
        if (stamp := status.stamp(directory)) != seen:
            seen, current = stamp, status.read(directory)
            if current is not None and current.running and current.revisions.get(str(target.key)) == revision:
                return current
        now = time.monotonic()
        if now >= end:
            raise _NotSeen(f"the daemon has not carried that out within {WITHIN:g} s{_why(status.read(directory))}")
        if now >= check:
            check = now + CHECK
            if not status.is_running(directory):
                raise _NotSeen(DOWN)
            with contextlib.suppress(ContainerdError):  # a containerd that goes away is the daemon's to wait for
                listed = await containerd.container(target.key)
                if listed is None:
                    raise _Ended("it ended meanwhile")
                if (kept := _still(listed.live, present, absent)) != revision:
                    revision, seen = kept, None
        await asyncio.sleep(PAUSE)


def _still(live: Live | None, present: Collection[Mapping], absent: Collection[Mapping]) -> str:
    """Return the revision that is kept by now. Raises ``_NotSeen`` where another command has changed these, too."""
    has = live.mappings if live is not None else ()
    if not {*present} <= {*has} or not {*absent}.isdisjoint(has):
        raise _NotSeen("another command has changed that meanwhile")
    return live.revision if live is not None else ""


def _why(current: Status | None) -> str:
    if current is None:
        return ""
    said = current.firewall if current.containerd.startswith("connected") else current.containerd
    return "" if said == "in line" else f" ({said})"


def _of(current: Status, key: ContainerKey, mappings: Iterable[Mapping]) -> list[PublicationStatus]:
    named = {*map(str, mappings)}
    its = (one for one in current.publications if (one.namespace, one.container) == (key.namespace, key.id))
    return [one for one in its if one.mapping in named]


def _bound(directory: Path, key: ContainerKey) -> dict[Mapping, Mapping]:
    """Return the host ports that were chosen for a container, as far as the daemon's last word has them."""
    current = status.read(directory)
    its = [] if current is None else current.publications
    return {
        ports.parse(one.mapping): ports.parse(one.bound)
        for one in its
        if (one.namespace, one.container, one.source) == (key.namespace, key.id, LIVE_SOURCE) and one.bound
    }
