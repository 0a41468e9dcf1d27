"""What happened, told once: since when each publication is as it is, and an event for each change."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timezone

from .events import Event
from .firewall.drift import Drift
from .model import Publication, State
from .owners import owner_of
from .publish import Change
from .status import PublicationStatus, shown
from .suspicion import Grounds
from .tally import Tally

log = logging.getLogger(__name__)

#: In so many seconds: how often the same drift is told of, and how often drift is told of at all.
TELL_WITHIN, TELL_SAME, TELL_MOST = 60.0, 3, 20


class Chronicle:
    """Keeps since when each publication is as it is, and what was repaired.

    ``repairs`` counts what others had done to rules of ours, ``last_repair`` says what the last of it was. ``tally``
    has how long things took.
    """

    def __init__(self, tally: Tally | None = None) -> None:
        self._tally = Tally() if tally is None else tally
        self.repairs = 0
        self.last_repair = ""
        self._told: list[tuple[tuple[str, ...], float]] = []  # what was done, by whom, and when it was told
        self._since: dict[tuple[str, str, str], datetime] = {}
        self._untold: dict[tuple[str, str, str], tuple[Change, float | None]] = {}
        # By the id of the publication, as to look for it by value takes as long as to show it anew.
        self._shown: dict[int, tuple[Publication, PublicationStatus]] = {}
        self._shown_with = ""  # the problem that they were shown with

    def take(self, changes: Iterable[Change], since: float | None) -> None:
        """Take in what changed; ``since`` is when the event came that led to it."""
        for change in changes:
            publication = change.after or change.before
            assert publication is not None
            untold = self._untold.pop(_name(publication), None)
            if untold is not None:
                change, since = Change(untold[0].before, change.after), untold[1]
            if change.before is not None or change.after is not None:
                self._untold[_name(publication)] = (change, since)

    def tell(self, remark: Callable[[Publication], str], *, in_line: bool) -> None:
        """Tell what was taken in, with what else there is to say of it.

        Not that something is published, or not any more, before the kernel is ``in_line`` with that.
        """
        untold, self._untold = self._untold, {}
        for key, (change, since) in untold.items():
            if in_line or (change.after is not None and change.after.state is not State.ACTIVE):
                self._note(change, "" if change.after is None else remark(change.after), since)
            else:
                self._untold[key] = (change, since)

    def _note(self, change: Change, remark: str, since: float | None) -> None:
        publication = change.after or change.before
        assert publication is not None
        key = _name(publication)
        self._shown.pop(id(change.after), None)
        if change.after is None:
            self._since.pop(key, None)
            if publication.state is State.ACTIVE:
                log.info(Event("withdrawn", **_subject(publication), mapping=str(publication.bound)))
            return
        if change.before is None or change.before.state is not change.after.state:
            self._since[key] = datetime.now(timezone.utc)
        elif change.before.place and change.after.place:
            return  # each step of each that stands in a line would be told
        if publication.state is State.ACTIVE:
            before = change.before
            fell_free = before is not None and (before.state is State.CONFLICT or before.place > 0)
            took = None if since is None else time.monotonic() - since
            if took is not None:
                self._tally.opened.observe(took)
            event = Event(
                "taken-over" if fell_free else "published",
                **_subject(publication),
                mapping=str(publication.bound),
                address=",".join(str(attachment.address) for attachment in publication.attachments),
                was=before.reason if before is not None and fell_free else "",
                remark=remark,
                after="" if took is None else f"{took * 1000:.1f}ms",
            )
            log.info(event)
        else:
            event = Event(
                str(publication.state),
                **_subject(publication),
                mapping=str(publication.asked),
                source=publication.source,
                reason=publication.reason,
            )
            expected = publication.container is None or publication.place
            log.log(logging.INFO if expected else logging.WARNING, event)

    def compared(self, told: Sequence[Publication], changes: Sequence[Change]) -> list[Change]:
        """Return how what begins anew differs from what was told before; the rest has been so since when it was."""
        left = {_wherever(publication): publication for publication in told}
        since, self._since = self._since, {}
        self.look_anew()
        news = []
        for after in (change.after for change in changes if change.after is not None):
            before = left.pop(_wherever(after), None)
            if before is not None and _name(before) in since:
                self._since[_name(after)] = since[_name(before)]
            if before is None or _said(before) != _said(after):
                news.append(Change(before, after))
        return news + [Change(before, None) for before in left.values()]

    def shown(self, publication: Publication, remark: str, problem: str, process: int = 0) -> PublicationStatus:
        """Return a publication as it is shown; with a ``problem`` nothing is sure to be in the kernel."""
        since = self._since.get(_name(publication))
        its = publication
        if publication.state is State.ACTIVE:
            if problem:
                its = replace(publication, state=State.WAITING, reason=problem, bound=None)
            else:
                its = replace(publication, reason=remark)
        owner = owner_of(publication) if publication.bound is not None else ""
        return PublicationStatus.of(its, shown(since) if since else "", process, owner)

    def all_shown(
        self,
        publications: Iterable[Publication],
        remark: Callable[[Publication], str],
        problem: str,
        process: Callable[[Publication], int] = lambda _: 0,
    ) -> list[PublicationStatus]:
        """Return publications as they are shown. Those of which nothing was told since the last time are as they were.

        For there may be thousands, and one that has changed.
        """
        if problem != self._shown_with:
            self.look_anew()
        self._shown_with = problem
        known, found = self._shown, list[PublicationStatus]()
        for publication in publications:
            its = known.get(id(publication))
            if its is None:
                shown = self.shown(publication, remark(publication), problem, process(publication))
                its = known[id(publication)] = (publication, shown)
            found.append(its[1])
        if len(known) > 2 * len(found):  # most of them are over
            self.look_anew()
        return found

    def look_anew(self) -> None:
        """Show every publication anew the next time: what there is to say of them may have changed."""
        self._shown.clear()

    def repaired(self, drift: Drift, grounds: Grounds, looked_at: float) -> None:
        """Take in what others had done to ours, and tell it; not each time, where they do it again and again.

        ``looked_at`` is when all was right for the last time. Which process it was makes no difference: a script that
        deletes a rule in a loop is another one each time.
        """
        now = time.monotonic()
        event = Event("drift", what=str(drift), within=f"{now - looked_at:.0f}s")
        said, gone, lasted, writers = "", f"at most {now - looked_at:.0f} s", now - looked_at, set[str]()
        if drift.in_tables and grounds.since is not None and grounds.writers:
            lasted = now - grounds.since
            writers = {writer.partition(" (pid ")[0] for writer in grounds.writers}
            by = " or ".join(grounds.writers)
            event = Event("drift", what=str(drift), by=by, after=f"{lasted * 1000:.0f}ms")
            said, gone = f", by {by}", f"{lasted * 1000:.0f} ms"
        what = (str(drift), *sorted(writers))
        self.repairs += 1
        self._tally.drift_lasted.observe(lasted)
        self._tally.drift.update(
            missing=len(drift.gone),
            misplaced=len(drift.astray),
            surplus=drift.surplus,
            route_localnet=len(drift.switches),
        )
        self.last_repair = f"{drift}{said}; repaired after {gone}"
        self._told = [(told, at) for told, at in self._told if now < at + TELL_WITHIN]
        if sum(told == what for told, _ in self._told) < TELL_SAME and len(self._told) < TELL_MOST:
            self._told.append((what, now))
            log.warning(event)


def _name(publication: Publication) -> tuple[str, str, str]:
    return (str(publication.container or ""), str(publication.asked), publication.source)


def _wherever(publication: Publication) -> tuple[str, str, str]:
    """Return what a publication goes by where lines of the configuration may have moved."""
    whose = publication.source if publication.container is None else str(publication.container)
    return (whose, str(publication.asked), str(publication.access))


def _said(publication: Publication) -> tuple[object, ...]:
    addresses = [attachment.address for attachment in publication.attachments]
    return (publication.state, publication.reason, publication.bound, addresses)


def _subject(publication: Publication) -> dict[str, str]:
    if publication.pod is not None:
        return {"pod": publication.pod, "sandbox": str(publication.container)}
    return {"container": str(publication.container or "none")}
