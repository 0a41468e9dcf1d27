"""What containers declare by themselves, and which of it the operator lets them have.

Pure. A label comes from whoever starts a container, and from the image where its tool takes labels over; an annotation
from whoever may create pods. So both are strangers' text: nothing of it counts without a rule that allows it, and what
is wrong with it is said of that one container alone.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from . import ports
from .model import Container, Mapping, Network, PortRange, Protocol, Unread
from .ports import PortSpecError, quoted

#: The label, and the annotation, that holds mappings with commas between them.
NAME = "ctrport/ports"
#: A value that asks for nothing, for a label that is to stand before an annotation.
NONE = "none"
#: Put on by nerdctl, as JSON: the ports that it has CNI's portmap plugin publish.
NERDCTL_PORTS = "nerdctl/ports"

#: What one value may be at most: so many characters, so many mappings.
LONGEST, MOST = 4096, 64

NO_RULE = "no rule of containers_may_publish allows it"
BY_NERDCTL = f"nerdctl publishes ports of this container already, as its label {NERDCTL_PORTS} says"


class Kind(str, enum.Enum):
    """How a container declares."""

    LABEL = "label"
    ANNOTATION = "annotation"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Permission:
    """One rule of what containers may publish by themselves. ``source`` says where it was written: file:line.

    ``namespace`` (of containerd) and ``pod_namespace`` (of Kubernetes, for pods alone) are globs; None is any.
    ``host_ports`` may be asked for by number, ``any_free`` is whether those may be that are chosen among all. No
    ``host_ips`` is every address, and that of no address in particular. ``at_most`` counts host ports a container.
    """

    source: str
    kinds: frozenset[Kind]
    host_ports: tuple[PortRange, ...]
    any_free: bool = False
    namespace: str | None = None
    pod_namespace: str | None = None
    host_ips: tuple[Network, ...] = ()
    protocols: frozenset[Protocol] = frozenset(Protocol)
    at_most: int = 10

    def is_for(self, container: Container, kind: Kind) -> bool:
        """Whether it says anything about this container's declarations of that kind."""
        if kind not in self.kinds:
            return False
        if self.namespace is not None and not fnmatchcase(container.key.namespace, self.namespace):
            return False
        if self.pod_namespace is None:
            return True
        return container.pod is not None and fnmatchcase(container.pod.namespace, self.pod_namespace)

    def objection(self, mapping: Mapping, had: int) -> str:
        """Return why it does not allow a mapping of a container that it gave ``had`` ports; empty where it does."""
        if mapping.protocol not in self.protocols:
            return self._only(", ".join(sorted(self.protocols)), str(mapping.protocol))
        if mapping.host_ports is None and not self.any_free:
            return self._only(f"the host ports {self._host_ports}", "any that is free")
        if mapping.host_ports is not None and not any(
            ports.first <= mapping.host_ports.first and mapping.host_ports.last <= ports.last
            for ports in self.host_ports
        ):
            return self._only(f"the host ports {self._host_ports}", str(mapping.host_ports))
        if self.host_ips and not any(mapping.host_ip in network for network in self.host_ips if mapping.host_ip):
            which = ", ".join(map(str, self.host_ips))
            return self._only(f"the host addresses {which}", str(mapping.host_ip or "every address"))
        if had + len(mapping.container_ports) > self.at_most:
            return self._only(f"{self.at_most} in all", f"{had + len(mapping.container_ports)}")
        return ""

    @property
    def _host_ports(self) -> str:
        return ", ".join([*map(str, self.host_ports), *(["free"] if self.any_free else [])])

    def _only(self, allowed: str, asked: str) -> str:
        return f"the rule of containers_may_publish at {self.source} allows {allowed}, not {asked}"


@dataclass(frozen=True)
class Wish:
    """One mapping that a container declares by itself. ``refusal`` is why it may not have it; empty where it may."""

    asked: Mapping | Unread
    source: str
    refusal: str


def declares(container: Container) -> bool:
    """Whether a container declares anything by itself, allowed or not."""
    return any(True for _ in _values(container))


def wishes(container: Container, permissions: Sequence[Permission]) -> list[Wish]:
    """Return what a container declares by itself, each mapping once, judged by these rules."""
    found: dict[Mapping | Unread, Wish] = {}
    given = dict.fromkeys(permissions, 0)
    for kind, value in _values(container):
        source = f"{kind} {NAME}"
        its = [permission for permission in given if permission.is_for(container, kind)]
        for asked, fault in _read(value):
            if asked not in found:
                refusal = _judge(container, asked, its, given) if isinstance(asked, Mapping) else fault
                found[asked] = Wish(asked, source, refusal)
    return list(found.values())


def _judge(
    container: Container, mapping: Mapping, permissions: Sequence[Permission], given: dict[Permission, int]
) -> str:
    if _is_nerdctls(container):
        return BY_NERDCTL
    refusal = ""
    for permission in permissions:
        objection = permission.objection(mapping, given[permission])
        if not objection:
            given[permission] += len(mapping.container_ports)
            return ""
        refusal = refusal or objection
    return refusal or NO_RULE


def _values(container: Container) -> Iterator[tuple[Kind, str]]:
    # The labels of a pod's containers are their images', and those of its sandbox cannot hold a mapping.
    label = container.members[0].labels.get(NAME) if container.pod is None else None
    # ctr writes the labels it starts a container with into its annotations too, where they never change.
    kind, value = (Kind.LABEL, label) if label is not None else (Kind.ANNOTATION, container.annotation)
    if value is not None and value.strip() not in ("", NONE):
        yield kind, value


def _read(value: str) -> Iterator[tuple[Mapping | Unread, str]]:
    """Return the mappings of a value; with what cannot be read, why."""
    if len(value) > LONGEST:
        yield Unread(quoted(value)), f"it has {len(value)} characters; expected at most {LONGEST}"
        return
    specs = value.split(",")
    if len(specs) > MOST:
        yield Unread(quoted(value)), f"it has {len(specs)} mappings; expected at most {MOST}"
        return
    for spec in map(str.strip, specs):
        try:
            yield ports.parse(spec), ""
        except PortSpecError as error:
            yield Unread(quoted(spec)), str(error)


def _is_nerdctls(container: Container) -> bool:
    return any(member.labels.get(NERDCTL_PORTS, "").strip() not in ("", "null", "[]") for member in container.members)
