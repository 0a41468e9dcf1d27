"""What runs on the node and where it is: containerd and the kernel asked, publications told.

It only looks. Whoever asks for it decides what follows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable

from . import endpoints
from .config import Config
from .containerd import Containerd, Listed, Refused
from .endpoints import Endpoints, Gone
from .model import Candidate, Container, ContainerKey, Endpoint, Obstacle, State
from .publish import Publications

log = logging.getLogger(__name__)

#: How many containers are looked at side by side.
ABREAST = 16


class Survey:
    """Keeps ``publications`` told of the containers that run, and ``facts`` of the node."""

    def __init__(self, config: Config, containerd: Containerd, finder: Endpoints) -> None:
        self._config = config
        self._containerd = containerd
        self._endpoints = finder
        self.facts = endpoints.node_facts()
        self.publications = Publications(config.publish, self.facts, localhost=config.firewall.localhost)

    def node(self) -> None:
        """Look at the node itself."""
        self.facts = endpoints.node_facts()
        self.publications.learn(self.facts)

    async def everything(self) -> None:
        """Look at every container there is, and forget those that are no more. Raises ``ContainerdError``."""
        namespaces = [name for name in await self._containerd.namespaces() if self._config.watches(name)]
        found = [listed for name in namespaces for listed in await self._containerd.containers(name)]
        keys = {listed.key for listed in found}
        for candidate in list(self.publications.candidates):
            if candidate.container.key not in keys:
                self.publications.update(candidate.container.key, None)
        await _abreast(self._take_in(listed) for listed in found)

    async def look(self, keys: Iterable[ContainerKey]) -> None:
        """Look at these containers. Raises ``ContainerdError``."""
        await _abreast(self._look_at(key) for key in keys)

    async def what_may_heal(self) -> None:
        """Look at the containers whose endpoint may come without any event. Raises ``ContainerdError``."""
        await self.look([c.container.key for c in self.publications.candidates if _may_heal(c)])

    async def _look_at(self, key: ContainerKey) -> None:
        try:
            listed = await self._containerd.container(key)
        except Refused as error:
            log.warning("container %s cannot be looked at, what was known of it stands: %s", key, error)
            return
        if listed is None:
            self.publications.update(key, None)
        else:
            await self._take_in(listed)

    async def _take_in(self, listed: Listed) -> None:
        """Find out what is to be known of a container that runs."""
        if listed.pid is None:
            return  # whether it runs is not known: what was known stands
        try:
            container = Container(listed.key, listed.pid, endpoints.started(listed.pid), listed.labels)
            if not self.publications.wants(container):
                self.publications.update(listed.key, None)
                return
            endpoint = await self._endpoint(container)
            if endpoints.started(listed.pid) != container.started:
                raise Gone(f"process {listed.pid} is another by now")
        except Gone as gone:
            log.debug("container %s ended while it was being looked at: %s", listed.key, gone)
            self.publications.update(listed.key, None)
            return
        self.publications.update(listed.key, Candidate(container, endpoint))

    async def _endpoint(self, container: Container) -> Endpoint | Obstacle:
        known = self.publications.candidate(container.key)
        if known is not None and known.container == container and isinstance(known.endpoint, Endpoint):
            return known.endpoint  # the same process: its address does not change
        return await self._endpoints.find(container.pid)


async def _abreast(looks: Iterable[Coroutine[None, None, None]]) -> None:
    """Run them side by side, and raise the first error once all have ended."""
    slots = asyncio.Semaphore(ABREAST)

    async def one(look: Coroutine[None, None, None]) -> None:
        async with slots:
            await look

    for result in await asyncio.gather(*map(one, looks), return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _may_heal(candidate: Candidate) -> bool:
    return isinstance(candidate.endpoint, Obstacle) and candidate.endpoint.state is State.WAITING
