"""The flows that changes of the rules make stale: which they are, and their removal beside all else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator

from . import conntrack
from .conntrack import Closed, ConntrackError, Opened
from .model import Address, Publication
from .owners import Owner
from .tally import Tally
from .tasks import end

#: How many mappings are remembered whose flows could not be looked at, to be tried again.
MOST_STALE = 1000
#: A look takes the kernel 10 ms, and ten times that where there are many flows. The next one begins when so many times
#: as long has passed, but no more than so many seconds: what comes meanwhile is looked for with one look.
REST, LONGEST_REST = 4, 1.0


class StaleFlows:
    """What was opened and closed, and is still to be looked for among the flows.

    ``complain`` is told why flows could not be looked at, and nothing when they could; ``tally`` has how often.
    """

    def __init__(self, complain: Callable[[str], None], tally: Tally) -> None:
        self._complain = complain
        self._tally = tally
        self._touched: list[Opened | Closed] = []
        self._stale: list[Opened | Closed] = []  # of what was touched: whose rules are in the kernel
        self._dropping: asyncio.Task[None] | None = None
        self._rests_until = float("-inf")

    def touch(self, those: Iterable[Opened | Closed]) -> None:
        """Have flows looked for with the next ``drop``, when the rules are in the kernel."""
        self._touched += those

    def succeed(self, before: StaleFlows) -> None:
        """Go on with what another one, which is closed, has left to do."""
        self._stale = [*before._stale, *before._touched]

    def drop(self, node: Callable[[], frozenset[Address]]) -> asyncio.Task[None]:
        """Begin to remove the flows that were made stale; the task ends when that is done.

        ``node`` returns the node's addresses. Where it fails it complains, and the next call tries again.
        """
        touched, self._touched = self._touched, []
        self._stale = _superseded(self._stale, touched) + touched
        if self._dropping is not None and self._dropping.done():
            self._dropping.result()
        if self._dropping is None or self._dropping.done():
            self._dropping = asyncio.create_task(self._drop(node))
        return self._dropping

    async def close(self) -> None:
        """Break off what is being removed."""
        if self._dropping is not None:
            await end(self._dropping)

    async def finish(self, node: Callable[[], frozenset[Address]]) -> None:
        """Remove what is left without a rest, and for no longer than one: nobody comes after this one."""
        await self.close()
        self._rests_until = float("-inf")
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._drop(node), LONGEST_REST)

    async def _drop(self, node: Callable[[], frozenset[Address]]) -> None:
        time = asyncio.get_running_loop().time
        while self._stale:
            if (rest := self._rests_until - time()) > 0:
                await asyncio.sleep(rest)
            stale, self._stale = self._stale, []
            began = time()
            try:
                self._tally.flows_deleted += await conntrack.drop_stale(stale, node())
            except ConntrackError as error:
                self._tally.conntrack_errors += 1
                self._complain(str(error))
                self._stale = (_superseded(stale, self._stale) + self._stale)[-MOST_STALE:]
                return
            except asyncio.CancelledError:
                self._stale = stale + self._stale  # for who goes on from here
                raise
            finally:
                self._rests_until = time() + min(REST * (time() - began), LONGEST_REST)
            self._complain("")


def opened(publications: Iterable[Publication]) -> list[Opened | Closed]:
    """Return what was opened by publishing these."""
    return [Opened(p.bound, attachment) for p in publications if p.bound for attachment in p.attachments]


def closed(before: Publication, after: Publication | None) -> list[Opened | Closed]:
    """Return what is no longer served; what is served on as it was keeps its flows."""
    kept = after.attachments if after is not None and after.bound == before.bound else ()
    return [Closed(before.bound, each) for each in before.attachments if before.bound and each not in kept]


def vacated(owners: Iterable[str], active: Iterable[Publication]) -> Iterator[Closed]:
    """Return the mappings that an earlier run's rules were of, but for those whose host ports are served now."""
    bound = (publication.bound for publication in active if publication.bound is not None)
    served = {(mapping.protocol, port) for mapping in bound for port in mapping.host_ports or ()}
    for each in owners:
        its = Owner.parse(each)
        if its is not None and not any((its.bound.protocol, port) in served for port in its.bound.host_ports or ()):
            yield Closed(its.bound, None)


def narrowed(publications: Iterable[Publication]) -> Iterator[Closed]:
    """Return the mappings that lost a rule of theirs and are served still: who used it may be let in no more."""
    for publication in publications:
        for attachment in publication.attachments:
            assert publication.bound is not None
            yield Closed(publication.bound, attachment, connections=False)


def _superseded(earlier: Iterable[Opened | Closed], later: Iterable[Opened | Closed]) -> list[Opened | Closed]:
    """Return what is still to be looked at of ``earlier``: flows of what was touched again are judged by that alone."""
    again = {(one.mapping, family) for one in later for family in one.families}
    return [one for one in earlier if not any((one.mapping, family) in again for family in one.families)]
