"""What runs on the node and where it is: containerd and the kernel asked, publications told.

It only looks. Whoever asks for it decides what follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from . import endpoints, nftports, nodeports
from .config import DOCKERD_NAMESPACE, Config
from .containerd import Containerd, Refused
from .endpoints import Endpoints, Gone
from .events import warn_once
from .expected import Expected, running_as
from .firewall import Firewall, FirewallError
from .listed import Listed
from .model import Candidate, Container, ContainerKey, Endpoint, Family, Holder, NodeFacts, Obstacle, State
from .node import look
from .pods import Pods, Running
from .publish import Publications, chosen
from .taskevents import TaskEvent

T = TypeVar("T")

log = logging.getLogger(__name__)

#: How many containers are looked at side by side.
ABREAST = 16
#: Turns of the event loop until what was to be asked of containerd is on its way.
STEPS_TO_ASK = 4
#: For how many turns ``what_may_heal`` looks for the other family of a container after it was found: a minute, by its
#: tick. Later ``everything`` does.
LOOKS_FOR_MORE = 6
#: And at how many of them at a time, as there may be a thousand, and a look takes some 50 us.
MORE_AT_A_TIME = 16


class Survey:
    """Keeps ``publications`` told of the containers that run, and ``facts`` of the node."""

    def __init__(
        self, config: Config, containerd: Containerd, finder: Endpoints, firewalls: Mapping[Family, Firewall]
    ) -> None:
        self._firewalls = dict(firewalls)
        self._config = config
        self._containerd = containerd
        self._endpoints = finder
        self._expected = Expected(containerd, finder, self._matters, lambda: self.on_foreseen())
        #: Called when there is something to ``foresee``, whatever events say.
        self.on_foreseen: Callable[[], None] = lambda: None
        self._pods = Pods()
        self._early: set[ContainerKey] = set()  # found before they had started: to be looked for again
        self._waiting: set[ContainerKey] = set()  # those without an endpoint that may get one
        self._young: dict[ContainerKey, int] = {}  # found lately: until which turn the other family is looked for
        self._turn = 0  # of ``what_may_heal``
        self._ahead: dict[tuple[int, int], Endpoint | Obstacle] = {}  # by a process and when it started
        self._node = look(config.networks)
        self._told: dict[str, str] = {}  # what was said of networks that are not run
        self._holders: dict[str, list[Holder]] = {}  # by where they were seen
        self.facts = self._node.facts
        self.publications = _publications(config, self.facts, firewalls)

    @property
    def config(self) -> Config:
        """The configuration that it looks by."""
        return self._config

    async def use(self, config: Config, firewalls: Mapping[Family, Firewall]) -> None:
        """Look by another configuration from now on; the publications begin anew, with the host ports they had.

        Raises ``ContainerdError`` where containers of other namespaces are looked for.
        """
        before, known = self.publications, self._config
        self._expected.forget_all()
        self._config, self._firewalls = config, dict(firewalls)
        self._holders.clear()
        self.publications = _publications(config, self.facts, firewalls)
        self.publications.recover(chosen(before))
        self._judge(self._pods.running)
        looks, looked = (
            (its.containerd.namespaces, its.watches(DOCKERD_NAMESPACE), its.reads_annotations)
            for its in (config, known)
        )
        if looks != looked:
            await self.everything()
        else:
            await self.node()

    async def node(self, *, others: bool = True) -> None:
        """Look at the node itself; with ``others`` also at who else holds host ports in the kernel's tables."""
        before, self._node = self._node, look(self._config.networks, self._node)
        if self._node is before and not others:
            return  # all is as it was: the same facts as before, so that nobody has to compare them
        for name, reason in self._node.amiss.items():
            if self._told.get(name) != reason:
                log.warning("network %s: %s", name, reason)
        self._told = self._node.amiss
        for family, firewall in self._firewalls.items() if others else ():
            await self._ask(f"the tables of {family}", firewall.holders())
            await self._ask(f"kube-proxy's table of {family}", nodeports.holders(family))
            self._see(f"other tables of {family}", family)
        holders = tuple(holder for found in self._holders.values() for holder in found)
        self.facts = replace(self._node.facts, holders=holders)
        self.publications.learn(self.facts)

    async def _ask(self, where: str, asked: Awaitable[list[Holder]]) -> None:
        """Take in who else holds host ports, as far as it is seen in one place."""
        try:
            self._holders[where] = await asked
        except (FirewallError, nodeports.Unknown) as error:
            log.debug("who holds host ports in %s cannot be seen, what was known of it stands: %s", where, error)

    def _see(self, where: str, family: Family) -> None:
        """Take in who holds host ports in tables of portmap's and dockerd's own."""
        try:
            self._holders[where] = nftports.holders(family)
        except nftports.Unknown as error:
            log.debug("who holds host ports in %s cannot be seen, what was known of it stands: %s", where, error)

    async def everything(self) -> None:
        """Look at the node and at every container there is. Raises ``ContainerdError``, and ``OSError`` as ``look``."""
        self._expected.forget_all()
        await self.node()
        namespaces = [name for name in await self._containerd.namespaces() if self._config.watches(name)]
        annotations = self._config.reads_annotations
        found = [
            listed for name in namespaces for listed in await self._containerd.containers(name, annotations=annotations)
        ]
        # What is published is among it also where an earlier look broke off, which may have forgotten it already.
        known = [*self._pods.running, *(candidate.container.key for candidate in self.publications.candidates)]
        self._take_in(dict.fromkeys(known) | {listed.key: listed for listed in found})
        published = [candidate.container.key for candidate in self.publications.candidates]
        for key in published:
            if self._young.get(key, 0) <= self._turn:
                self._complete(key)

    def expect(self, event: TaskEvent) -> None:
        """Take in what an event says of a container that is to start."""
        self._expected.take(event, annotations=self._config.reads_annotations)

    def network_changed(self, nsid: int | None) -> None:
        """Look where those are that are to start in the network namespace with this id in ours; None is ours."""
        self._expected.network_changed(nsid)

    @property
    def foreseen_since(self) -> float | None:
        """Since when there is something to ``foresee``, whatever events say; None where there is nothing."""
        return min(self._expected.ready.values(), default=None)

    @property
    def start_is_near(self) -> bool:
        """Whether a container was made that may start any moment."""
        return self._expected.soon()

    def foresee(self, seen: Mapping[ContainerKey, int | None]) -> set[ContainerKey]:
        """Take in what the kernel itself bears out of what events said, ahead of containerd's word; return of whom.

        That a process is in the cgroup that containerd has stored for a container that was made: then it has started.
        And that a process which ran is gone. ``look`` has to follow. Raises ``OSError`` as that does.

        Among them are those that are yet to start and have their network: containerd is asked when they have.
        """
        touched: set[ContainerKey] = set()
        foreseen: set[ContainerKey] = set()
        self._ahead.clear()
        ready, self._expected.ready = self._expected.ready, {}
        for key in ready.keys() - seen.keys():
            near = self._expected.about_to_start(key)
            if near is not None:
                touched |= self._foreseen(key, *near)
                foreseen.add(key)
        for key, pid in seen.items():
            found, process = self._expected.started(key, pid) if pid is not None else None, self._pods.process(key)
            if found is not None:
                touched |= self._foreseen(key, *found)
                foreseen.add(key)
            elif pid is None and process is not None and not _lives(*process):
                touched |= self._pods.forget(key)
                foreseen.add(key)
        self._judge(touched)
        return foreseen

    def _foreseen(self, key: ContainerKey, running: Running, endpoint: Endpoint | None) -> set[ContainerKey]:
        if endpoint is not None:
            self._ahead[running.pid, running.started] = endpoint
            self._early.add(key)
        return self._pods.see(running)

    async def look(self, seen: Mapping[ContainerKey, int | None], *, foreseen: Collection[ContainerKey] = ()) -> None:
        """Look at these containers, each with the process it is said to have. Raises ``ContainerdError``.

        And ``OSError`` where this process may not so much as open a file: then it has to look at ``everything`` again.
        What such a process shows is looked up while containerd answers, and counts if that is the process indeed; of
        what was ``foreseen`` it is known already.
        """
        keys, annotations = list(seen), self._config.reads_annotations
        asked = asyncio.ensure_future(
            _abreast(
                self._containerd.container(key, annotations=annotations, stored=self._expected.stored(key))
                for key in keys
            )
        )
        for _ in range(STEPS_TO_ASK):
            await asyncio.sleep(0)
        try:
            self._look_ahead(pid for key, pid in seen.items() if pid is not None and key not in foreseen)
            answers = await asked
        finally:
            asked.cancel()
        found: dict[ContainerKey, Listed | None] = {}
        for key, answer in zip(keys, answers, strict=True):
            if isinstance(answer, Refused):
                warn_once(log, f"container {key} cannot be looked at, what was known of it stands: {answer}")
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found[key] = answer
                if answer is not None and not answer.starts:
                    self._expected.forget(key)
        self._take_in(found)
        self._ahead.clear()

    @property
    def revisions(self) -> Mapping[ContainerKey, str]:
        """Of each that runs and that the operator's word is kept with: which revision of that it was seen with."""
        return self._pods.revisions

    @property
    def amiss(self) -> dict[str, str]:
        """Why a bridge is not run as the network that it is declared to be, by its name."""
        return self._node.amiss

    @property
    def warnings(self) -> tuple[str, ...]:
        """What on the node keeps published ports from working, in a sentence each."""
        return self._node.warnings

    def container_of(self, cgroup: str) -> str | None:
        """Return the container whose process has this in its /proc/PID/cgroup, among those that run."""
        return container_of(cgroup, self._pods.running)

    def what_may_heal(self) -> None:
        """Look at what has no endpoint yet, or one in one family since lately, and may get it without any event."""
        self._judge(list(self._waiting))
        self._turn += 1
        for key, until in list(itertools.islice(self._young.items(), MORE_AT_A_TIME)):
            del self._young[key]
            if self._turn <= until and self._complete(key) and self._turn < until:
                self._young[key] = until  # behind those that wait for a look

    def _take_in(self, found: Mapping[ContainerKey, Listed | None]) -> None:
        """Find out what is to be known of these containers; None are those that do not run."""
        touched: set[ContainerKey] = set()
        for key, listed in found.items():
            if listed is not None and listed.pid is None:
                continue  # whether it runs is not known: what was known stands
            if listed is not None and listed.starts:
                self._early.add(key)
            running = None if listed is None else _running(listed)
            if running is not None and running == self._pods.seen(key) and self._is_settled(key):
                continue  # as it was: of a thousand that are listed again, most are
            touched |= self._pods.forget(key) if running is None else self._pods.see(running)
        self._judge(touched)
        # Those that are yet to start stay: where they are may be another place by then.
        self._early -= {key for key, listed in found.items() if listed is None or (listed.pid and not listed.starts)}

    def _is_settled(self, key: ContainerKey) -> bool:
        """Whether where a container is reached is known, and there is no cause to doubt it."""
        known = self.publications.candidate(key)
        return known is not None and isinstance(known.endpoint, Endpoint) and key not in self._early

    def _judge(self, keys: Iterable[ContainerKey]) -> None:
        """Tell the publications what is now known of what is published under ``keys``."""
        for key in keys:
            container = self._pods.get(key)
            wanted = container is not None and self.publications.wants(container)
            candidate = self._candidate(container) if container and wanted else None
            running = self._pods.seen(key)
            if candidate is not None and isinstance(candidate.endpoint, Obstacle) and running and running.starts:
                candidate = None  # what there is to say of it is to be said when it has started
            self.publications.update(key, candidate)
            if candidate is None:
                self._young.pop(key, None)
            if candidate is not None and _may_heal(candidate):
                self._waiting.add(key)
            else:
                self._waiting.discard(key)

    def _matters(self, running: Running) -> bool:
        """Whether anything of a container would be published if this were all that there is of it."""
        alone = Pods()
        alone.see(running)
        container = alone.get(running.key)
        return container is not None and self.publications.wants(container)

    def _candidate(self, container: Container) -> Candidate | None:
        try:
            endpoint = self._endpoint(container)
            if endpoints.started(container.pid) != container.started:
                raise Gone(f"process {container.pid} is another by now")
        except Gone as gone:
            log.debug("container %s ended while it was being looked at: %s", container.key, gone)
            return None
        return Candidate(container, endpoint)

    def _endpoint(self, container: Container) -> Endpoint | Obstacle:
        known = self.publications.candidate(container.key)
        if known is not None and isinstance(known.endpoint, Endpoint):
            process = (known.container.pid, known.container.started)
            if process == (container.pid, container.started) and container.key not in self._early:
                return known.endpoint  # the same process: its address does not change
        self._young[container.key] = self._turn + LOOKS_FOR_MORE
        return self._ahead.pop((container.pid, container.started), None) or self._endpoints.find(container.pid)

    def _complete(self, key: ContainerKey) -> bool:
        """Look for the other family of one that is to be served in both and was found in one; return whether it was.

        A container may get an address by router advertisement when it runs already. What is known of it stands.
        """
        known = self.publications.candidate(key)
        if known is None or not isinstance(known.endpoint, Endpoint):
            return False
        wanted = self.publications.families(key) & set(self._firewalls) & self.facts.forwarding
        missing = wanted - known.endpoint.families
        if not missing:
            return False
        container = known.container
        with contextlib.suppress(Gone):
            if not any(self._endpoints.has_address(container.pid, family) for family in missing):
                return True
            found = self._endpoints.find(container.pid)
            if isinstance(found, Endpoint) and endpoints.started(container.pid) == container.started:
                self.publications.update(key, replace(known, endpoint=known.endpoint.completed_by(found)))
        return True

    def _look_ahead(self, pids: Iterable[int]) -> None:
        self._ahead.clear()
        for pid in pids:
            with contextlib.suppress(Gone):
                self._ahead[pid, endpoints.started(pid)] = self._endpoints.find(pid)


def _publications(config: Config, facts: NodeFacts, families: Iterable[Family]) -> Publications:
    return Publications(
        *(config.publish, facts),
        families=tuple(families),
        localhost=config.firewall.localhost,
        permissions=config.containers_may_publish,
    )


def _running(listed: Listed) -> Running | None:
    """Return a container as its process shows it, None where the process is gone."""
    assert listed.pid is not None
    try:
        return running_as(listed, endpoints.started(listed.pid))
    except Gone as gone:
        log.debug("container %s ended while it was being looked at: %s", listed.key, gone)
        return None


def _lives(pid: int, started: int) -> bool:
    """Whether a process is there yet, with its network: that of a process which has ended is gone."""
    try:
        endpoints.netns(pid)
        return endpoints.started(pid) == started
    except Gone:
        return False


async def _abreast(looks: Iterable[Coroutine[None, None, T]]) -> list[T | BaseException]:
    """Run them side by side, so many at a time; return what each returned or raised."""
    slots = asyncio.Semaphore(ABREAST)

    async def one(look: Coroutine[None, None, T]) -> T:
        async with slots:
            return await look

    return await asyncio.gather(*map(one, looks), return_exceptions=True)


def container_of(cgroup: str, running: Iterable[ContainerKey]) -> str | None:
    """Return which of those that run has a process with this in its /proc/PID/cgroup."""
    parts = {part.removesuffix(".scope") for line in cgroup.splitlines() for part in line.split("/")[1:]}
    # A cgroup may be called PREFIX-ID, and either may have hyphens: the longest id is the one. ctr puts it below
    # one with the name of the namespace.
    found = [k for k in running if any(part == k.id or part.endswith(f"-{k.id}") for part in parts)]
    key = max(found, key=lambda key: (len(key.id), key.namespace in parts), default=None)
    return None if key is None else str(key)


def _may_heal(candidate: Candidate) -> bool:
    return isinstance(candidate.endpoint, Obstacle) and candidate.endpoint.state is State.WAITING
