"""Which container a name on the command line means. Pure.

An id is containerd's to check, and a namespace has each once. The other names are labels, which whoever starts a
container chooses: what a namespace and an id name is that container, whatever another is labelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from .model import ContainerKey, Pod, Role, is_identifier
from .pods import POD_NAME, POD_NAMESPACE
from .ports import quoted

#: Put on by nerdctl: the name that its user gave.
NERDCTL_NAME = "nerdctl/name"
#: What the name of a pod begins with: ``pod:NAMESPACE/NAME``.
POD = "pod:"
#: How many candidates are named at most.
MOST_NAMED = 5


class NoSuch(ValueError):
    """A name that means no container, or more than one: one sentence with those that it may mean."""


@dataclass(frozen=True)
class Named:
    """A container by all that it can be called, whether it has a task that runs, and what it is to a pod."""

    key: ContainerKey
    labels: Mapping[str, str]
    runs: bool
    role: Role | None = None

    @property
    def pod(self) -> Pod:
        """Whose it is, where it is part of a pod."""
        return Pod(self.labels.get(POD_NAMESPACE, ""), self.labels.get(POD_NAME, ""))

    @property
    def name(self) -> str | None:
        """What nerdctl calls it; None where it does not, or not by what could be a name."""
        name = self.labels.get(NERDCTL_NAME, "")
        return name if is_identifier(name) else None

    def __str__(self) -> str:
        """The name that `ctrport ps` has for it, as far as a shell takes that."""
        shown = self.pod.shown
        return f"{POD}{shown}" if self.role is Role.SANDBOX and shown == str(self.pod) else str(self.key)


def find(name: str, containers: Sequence[Named]) -> Named:
    """Return the container that ``name`` means: by its id, by what nerdctl calls it, or by the beginning of its id.

    With ``namespace/`` before it, in that namespace of containerd; ``pod:namespace/name`` means the sandbox of a pod.
    Raises `NoSuch`.
    """
    if name.startswith(POD):
        return _only(name, _pods(name.removeprefix(POD), containers), containers)
    namespace, _, id = name.rpartition("/")
    among = [one for one in containers if not namespace or one.key.namespace == namespace]
    exact = [one for one in among if one.key.id == id]
    if namespace and exact:
        return exact[0]
    exact += [one for one in among if one.name == id and one not in exact]
    return _only(name, exact or [one for one in among if id and one.key.id.startswith(id)], containers)


def _pods(name: str, containers: Iterable[Named]) -> list[Named]:
    its = [one for one in containers if one.role is Role.SANDBOX and str(one.pod) == name]
    # A pod whose sandbox ended has another by now, and the old one is kept for a while.
    return [one for one in its if one.runs] or its


def _only(name: str, found: Sequence[Named], containers: Iterable[Named]) -> Named:
    if len(found) == 1:
        return found[0]
    if found:
        candidates = [_told_apart(one) for one in sorted(found, key=lambda one: one.key)]
        raise NoSuch(f"{quoted(name)} may be {_listed(candidates, 'or')}: expected the whole of one, NAMESPACE/ID")
    running = sorted({called: None for one in containers if one.runs for called in _names(one)})
    near = get_close_matches(name, running, n=3)
    if near:
        raise NoSuch(f"no container is called {quoted(name)}; did you mean {_listed(near, 'or')}?")
    shown = sorted({str(one) for one in containers if one.runs and one.role is not Role.MEMBER})
    there = f"those that run are {_listed(shown, 'and')}" if shown else "none runs"
    raise NoSuch(f"no container is called {quoted(name)}; {there}")


def _told_apart(one: Named) -> str:
    """Return what names this one alone, with what else it goes by."""
    also = str(one) if str(one) != str(one.key) else one.name if one.name != one.key.id else None
    return f"{one.key} ({also})" if also else str(one.key)


def _names(one: Named) -> Iterator[str]:
    if one.role is not Role.MEMBER:
        yield from filter(None, dict.fromkeys([str(one), str(one.key), one.key.id, one.name]))


def _listed(names: Sequence[str], word: str) -> str:
    if len(names) > MOST_NAMED:
        names = [*names[:MOST_NAMED], f"{len(names) - MOST_NAMED} more"]
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
