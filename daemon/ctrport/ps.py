"""What ``ctrport ps`` shows: which publications, in what words, and whether all is as it was declared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from fnmatch import fnmatchcase

from .model import State
from .status import PublicationStatus, Status, Undeclared

#: What the kernel holds and nothing declares is shown as if it were in a state of this name.
UNDECLARED = "undeclared"
STATES = (*(state.value for state in State), UNDECLARED)

#: Seconds without a turn of its loop after which a daemon is taken to hang: it has one every 10, but for a program
#: that it waits for.
HANGS = 60.0

_NOT_DECLARED = "its rules are in the kernel, and nothing declares it"
_MEND = "`systemctl start ctrport` or `ctrport clean` removes them"

#: The states that are not to be, the worst first.
_BY_WEIGHT = (State.CONFLICT, State.REFUSED, State.UNSUPPORTED, State.WAITING)


@dataclass(frozen=True)
class Filter:
    """What is to be seen: where several of one kind are given one has to match, and of each kind that is given one.

    ``namespaces`` are of containerd. ``names`` are of containers, of pods as ``pod:NAMESPACE/NAME``. Both are globs.
    """

    states: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.states or self.namespaces or self.names)

    def passes(self, state: str, namespace: str, container: str, name: str) -> bool:
        """Whether something of this container, which goes by ``name``, is to be seen."""
        return (
            (not self.states or state in self.states)
            and (not self.namespaces or any(fnmatchcase(namespace, glob) for glob in self.namespaces))
            and (not self.names or any(fnmatchcase(each, glob) for glob in self.names for each in (container, name)))
        )

    def of(self, current: Status) -> Status:
        """Return what is to be seen of a status."""
        return replace(
            current,
            publications=[
                its
                for its in current.publications
                if self.passes(its.state, its.namespace, "" if its.pod else its.container, its.name)
            ],
            undeclared=[
                its for its in current.undeclared if self.passes(UNDECLARED, its.namespace, its.container, its.name)
            ],
        )


HEAD = ("CONTAINER", "MAPPING", "ADDRESS", "STATE", "SINCE", "CONNECTIONS")
WIDE = ("DEVICE", "FROM", "PID", "SANDBOX", "SOURCE")
LAST = "REASON"


def rows(current: Status, wide: bool) -> list[tuple[str, ...]]:
    """Return the cells of what is shown, those of the head first."""
    return [*rows_of(current.publications, wide), *_undeclared(current, wide)]


def rows_of(publications: Iterable[PublicationStatus], wide: bool = False) -> list[tuple[str, ...]]:
    """Return the cells of publications, those of the head first."""
    when = _moment if wide else _age
    found = [(*HEAD, *(WIDE if wide else ()), LAST)]
    for its in publications:
        first = (its.name, its.bound or its.mapping, ",".join(its.addresses) or "-", its.state, when(its.since))
        found.append((*first, _count(its.connections), *(_wide(its) if wide else ()), its.reason))
    return found


def _undeclared(current: Status, wide: bool) -> list[tuple[str, ...]]:
    found = []
    reason = _NOT_DECLARED if current.running else f"{_NOT_DECLARED}: {_MEND}"
    for each in current.undeclared:
        first = (each.name, each.mapping, "-", UNDECLARED, "-")
        found.append((*first, _count(each.connections), *(("-",) * len(WIDE) if wide else ()), reason))
    return found


def _wide(its: PublicationStatus) -> tuple[str, ...]:
    devices = dict.fromkeys(each.device for each in its.attachments)
    sources = ",".join(its.sources) + (f" by {its.interface}" if its.interface else "")
    return (
        ",".join(devices) or "-",
        sources.strip() or ("anywhere" if its.owner else "-"),
        str(its.process or "-"),
        f"{its.namespace}/{its.container}" if its.pod else "-",
        its.source or "-",
    )


def _count(connections: int | None) -> str:
    return "-" if connections is None else str(connections)


def _moment(since: str) -> str:
    return since or "-"


def _age(since: str) -> str:
    """Return how long ago that was, in one unit; by a clock that may have been set meanwhile."""
    try:
        seconds = max(0, int((datetime.now(timezone.utc) - datetime.fromisoformat(since)).total_seconds()))
    except (ValueError, TypeError):
        return "-"
    for unit, size, most in (("s", 1, 120), ("m", 60, 120), ("h", 3600, 48)):
        if seconds < size * most:
            return f"{seconds // size}{unit} ago"
    return f"{seconds // 86400}d ago"


def verdict(
    current: Status, absent: str = "", silent: float = 0.0, trouble: str = "", filtered: bool = False
) -> tuple[bool, str]:
    """Return whether all that is declared is active, and no more than that is installed; and one line that says so.

    Who waits in line is as it should be: of those that match one entry, one is to be active. The worst is said first.
    ``absent`` is why the daemon said nothing, ``silent`` for how long it has not come round, ``trouble`` why the kernel
    could not be asked though it should have been. Where it was ``filtered``, that nothing is left is not right.
    """
    wrong = [absent] if absent else [*_of_the_daemon(current, silent)]
    wrong += [f"the kernel could not be asked: {trouble}"] if trouble else []
    total = len(current.publications)
    standby = sum(its.place > 0 for its in current.publications)
    bad = [its for its in current.publications if its.state != State.ACTIVE and not its.place]
    if current.undeclared:
        wrong.append(_some(current.undeclared, lambda its: f"{its.name} {its.mapping}", "in the kernel and undeclared"))
    if bad:
        worst = min(bad, key=lambda its: (its.installed is not False, _weight(its.state)))
        words = f"{worst.state} {worst.name} {worst.mapping}: {worst.reason}"
        wrong.append(f"{len(bad)} of {total} {_publications(total)} not active, the worst: {words}")
    if filtered and not total and not current.undeclared:
        wrong.append("nothing is declared that matches")
    if wrong:
        return False, f"not ok: {'; '.join(wrong)}"
    unasked = f" (the kernel: {current.kernel})" if current.kernel.startswith("not asked") else ""
    waits = f", {standby} in line" if standby else ""
    return True, f"ok: {total - standby} of {total} {_publications(total)} active{waits}{unasked}"


def _of_the_daemon(current: Status, silent: float) -> Iterable[str]:
    if silent > HANGS:
        yield f"the daemon hangs, for {silent:.0f} s"
    if not current.containerd.startswith("connected"):
        yield f"containerd: {current.containerd}"
    if current.firewall != "in line":
        yield f"the kernel is not in line: {current.firewall}"
    if current.config:
        yield f"an older configuration is in use: {current.config}"


def _some(found: Sequence[Undeclared], name: Callable[[Undeclared], str], what: str) -> str:
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{what}: {name(found[0])}{more}"


def _weight(state: str) -> int:
    return next((weight for weight, its in enumerate(_BY_WEIGHT) if its == state), len(_BY_WEIGHT))


def _publications(count: int) -> str:
    return "publication is" if count == 1 else "publications are"
