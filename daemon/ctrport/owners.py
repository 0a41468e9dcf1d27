"""Whose a rule is, in the words of its comment: what a restart recovers its knowledge from.

Pure. The words are API: a release reads what an earlier one wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import ports
from .model import DEVICE_NAME, ContainerKey, Mapping, Publication, is_identifier
from .ports import PortSpecError


@dataclass(frozen=True)
class Owner:
    """The words that name a publication in the comment of its rules, so that they can be told without a record of them.

    ``container mapping``, where the host ports are those it has; where they were chosen, then ``of`` and out of what.
    """

    container: ContainerKey
    mapping: Mapping
    bound: Mapping

    @classmethod
    def of(cls, publication: Publication) -> Owner:
        """Return the owner of the rules of an active publication."""
        assert publication.container is not None
        assert publication.bound is not None
        return cls(publication.container, publication.mapping, publication.bound)

    def __str__(self) -> str:
        chosen = f" of {self.mapping.host_ports or 'any'}" if self.mapping.dynamic else ""
        return f"{self.container} {self.bound}{chosen}"

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """Return the owner that ``text`` is, or None where it is anything that ``str`` would not have written."""
        name, _, rest = text.partition(" ")
        namespace, _, id = name.partition("/")
        its, _, pool = rest.partition(" of ")
        if not (is_identifier(namespace) and is_identifier(id)):
            return None
        try:
            bound = ports.parse(its)
            if bound.dynamic:
                return None
            if pool in ("", "any"):
                mapping = replace(bound, host_ports=None) if pool else bound
            else:
                mapping = replace(bound, host_ports=ports.parse(pool).container_ports)
        except PortSpecError:
            return None
        among, has = mapping.host_ports, bound.host_ports
        if among is not None and has is not None and not among.first <= has.first <= has.last <= among.last:
            return None
        found = cls(ContainerKey(namespace, id), mapping, bound)
        return found if str(found) == text else None


def owner_of(publication: Publication) -> str:
    """Return the words that name a publication in the comment of its rules."""
    # Kept with it: it goes by them from the reservation of its ports to its rules and what is told of it.
    if publication.owner is None:
        object.__setattr__(publication, "owner", str(Owner.of(publication)))
    assert publication.owner is not None
    return publication.owner


@dataclass(frozen=True)
class LocalnetRecord:
    """Who switched ``route_localnet`` on for ``device``: ctrport itself (``ours``), or somebody before it.

    It is kept in the comment of the rule that needs it, so that it is put back by whoever removes that rule last.
    """

    device: str
    ours: bool

    @property
    def owner(self) -> str:
        """The record as the owner of a rule."""
        return f"device {self.device} route_localnet={'set' if self.ours else 'found'}"

    @classmethod
    def parse(cls, owner: str) -> LocalnetRecord | None:
        """Return the record that ``owner`` is, or None where it is something else."""
        match owner.split(" "):
            case ["device", device, ("route_localnet=set" | "route_localnet=found") as how] if DEVICE_NAME.fullmatch(
                device  # it becomes part of a path
            ):
                return cls(device, how.endswith("=set"))
        return None
