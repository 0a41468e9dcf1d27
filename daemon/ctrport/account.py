"""What the daemon has to say of itself: for people in the status, and for Prometheus in numbers.

The loop writes down here how it fares; who is asked reads it, together with what is published.
"""

from __future__ import annotations

import os
import time
from datetime import datetime, timezone

from . import __version__
from .chronicle import Chronicle
from .dataplane import Dataplane
from .model import ContainerKey, Publication, State
from .status import NOT_READ, Status, layout, networks, shown
from .survey import Survey
from .tally import Reading, Tally

NOT_CONNECTED = "not connected"


class Account:
    """How the daemon fares.

    ``containerd`` is whether that answers, in words. ``problem`` says why the kernel is not in line, ``stale`` why the
    configuration in use is not that of the files, and ``blind`` why nothing can be looked at; each is empty where all
    is well. ``looked_at`` is when the kernel was last seen to hold what it should, by the monotonic clock, and 0 before
    the first time; ``reloaded_at`` when the configuration in use was taken up, in seconds since the epoch. ``events``
    are how many came, and ``revisions`` those of what the operator gave containers, as they were last shown.
    """

    def __init__(self, survey: Survey, chronicle: Chronicle, tally: Tally) -> None:
        self._survey = survey
        self._chronicle = chronicle
        self._tally = tally
        self.containerd = NOT_CONNECTED
        self.problem = self.stale = self.blind = ""
        self.looked_at = 0.0
        self.reloaded_at = time.time()
        self.events = 0
        self.revisions: dict[ContainerKey, str] = {}

    def summary(self) -> str:
        """Return it in some words, for systemd."""
        if self.problem:
            return f"not in line: {self.problem}"
        publications = self._survey.publications
        stale = f"; an older configuration is in use: {self.stale}" if self.stale else ""
        return f"{publications.count(State.ACTIVE)} of {len(publications)} publications active{stale}"

    def counted(self) -> dict[str, int]:
        """Return how much there is, as it is logged."""
        publications = self._survey.publications
        return {"publications": len(publications), "active": publications.count(State.ACTIVE)}

    def status(self, dataplane: Dataplane, *, running: bool) -> Status:
        """Return what there is to say now."""
        return Status(
            version=__version__,
            running=running,
            pid=os.getpid(),
            updated=shown(datetime.now(timezone.utc)),
            config=self.stale,
            containerd=self.containerd,
            firewall=self.problem or ("in line" if self._in_line else NOT_READ),
            events=self.events,
            transactions=dataplane.transactions,
            repairs=self._chronicle.repairs,
            last_repair=self._chronicle.last_repair,
            publications=self._chronicle.all_shown(
                self._survey.publications, dataplane.remark, self.problem, self._process
            ),
            networks=networks(self._survey.facts, self._survey.amiss),
            warnings=self._warnings(dataplane),
            revisions={str(key): revision for key, revision in self.revisions.items()},
            backend=next(iter(dataplane.firewalls.values())).name,
            families=[family.value for family in dataplane.firewalls],
            layout=layout(dataplane.layout),
            addresses=sorted(map(str, self._survey.facts.addresses)),
            services=sorted(map(str, self._survey.facts.services)),
        )

    def _process(self, publication: Publication) -> int:
        key = publication.container
        candidate = self._survey.publications.candidate(key) if key is not None else None
        return candidate.container.pid if candidate is not None else 0

    def reading(self, dataplane: Dataplane) -> Reading:
        """Return in numbers what there is to say now, at a cost of microseconds: no publication is looked at."""
        publications = self._survey.publications
        states = {state: publications.count(state) for state in State}
        if self.problem:  # as status() has it
            states |= {State.ACTIVE: 0, State.WAITING: states[State.ACTIVE] + states[State.WAITING]}
        held, limit = dataplane.held_ports
        return Reading(
            version=__version__,
            backend=next((firewall.name for firewall in dataplane.firewalls.values()), "none"),
            counted=self._tally.copy(),
            states=states,
            unmatched=publications.unmatched,
            standby=publications.standby,
            starved=publications.starved,
            unreserved=dataplane.unreserved,
            held_ports=held,
            held_ports_limit=limit,
            in_line=self._in_line,
            connected=self.containerd.startswith("connected"),
            config_in_use_is_current=not self.stale,
            reloaded_at=self.reloaded_at,
            transactions=dataplane.transactions,
            repairs=self._chronicle.repairs,
            warnings=len(self._warnings(dataplane)),
        )

    @property
    def _in_line(self) -> bool:
        # Not the dataplane's word: in the middle of each look that is no, and nobody would be told of the end of it.
        return not self.problem and self.looked_at > 0

    def _warnings(self, dataplane: Dataplane) -> list[str]:
        complaints = filter(None, [self.blind, dataplane.complaint])
        return [*complaints, *self._survey.warnings, *dataplane.warnings]
