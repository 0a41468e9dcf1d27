"""What `ctrport publish` and `ctrport unpublish` make of the ports of a container. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass
from itertools import combinations

from . import ports
from .declared import Permission, wishes
from .model import Access, Container, Declaration, Live, Mapping
from .ports import PortSpecError, quoted


class Unusable(ValueError):
    """Ports that cannot be given to a container, or taken from it, as asked: one sentence."""


@dataclass(frozen=True)
class Elsewhere:
    """A mapping that is declared for the same container in another way. ``own`` is whether it does so by itself."""

    mapping: Mapping
    access: Access
    source: str
    own: bool


def elsewhere(
    container: Container, declarations: Iterable[Declaration], permissions: Sequence[Permission]
) -> list[Elsewhere]:
    """Return what the files declare for a container, and what it declares by itself, allowed or not."""
    found = [
        Elsewhere(mapping, declaration.access, declaration.source, own=False)
        for declaration in declarations
        if declaration.selector.matches(container)
        for mapping in declaration.mappings
    ]
    its = ((wish.asked, wish.source) for wish in wishes(container, permissions))
    return found + [Elsewhere(asked, Access(), source, own=True) for asked, source in its if isinstance(asked, Mapping)]


def given(specs: Iterable[str]) -> tuple[Mapping, ...]:
    """Return the mappings that were written on the command line, each once. Raises `Unusable`."""
    try:
        mappings = tuple(dict.fromkeys(map(ports.parse, specs)))
    except PortSpecError as error:
        raise Unusable(str(error)) from None
    for one, other in combinations(mappings, 2):
        if one.overlaps(other):
            raise Unusable(f"{one} and {other} claim the same host port; expected each once")
    return mappings


def added(name: str, live: Live | None, new: Sequence[Mapping], others: Iterable[Elsewhere]) -> tuple[Mapping, ...]:
    """Return all mappings that a container is to have with these. Raises `Unusable`.

    What it declares by itself keeps none of them out: the operator's word comes first.
    """
    has = _readable(name, live)
    for mapping in new:
        for other in has:
            if mapping != other and mapping.overlaps(other):
                raise Unusable(
                    f"{mapping} claims a host port that {name} was given as {other} already; "
                    f"to take that back: ctrport unpublish {name} {other}"
                )
        for one in others:
            same = mapping == one.mapping and one.access == Access()
            if not one.own and not same and mapping.overlaps(one.mapping):
                raise Unusable(f"{mapping} claims a host port that {one.source} declares for {name}, as {one.mapping}")
    return tuple(dict.fromkeys([*has, *new]))


def taken(
    name: str,
    live: Live | None,
    specs: Sequence[str],
    bound: MappingABC[Mapping, Mapping],
    others: Sequence[Elsewhere],
) -> tuple[Mapping, ...]:
    """Return the mappings of a container that these mean: a mapping, or a host port with or without a protocol.

    ``bound`` has the mappings with the host ports that were chosen for them, by those that leave them open. Raises
    `Unusable` where one means none of what the operator gave, or several.
    """
    has = _readable(name, live)
    found = []
    for spec in specs:
        meant = _meant(spec, has, bound)
        if len(meant) > 1:
            raise Unusable(f"{quoted(spec)} may be {' or '.join(map(str, meant))}; expected the whole of one")
        if not meant:
            raise Unusable(_not_given(name, spec, has, others))
        found += meant
    return tuple(dict.fromkeys(found))


def _readable(name: str, live: Live | None) -> tuple[Mapping, ...]:
    if live is None:
        return ()
    if live.unread:
        raise Unusable(
            f"what {name} was given cannot be read, and so not be changed: {live.unread[0][1]}; "
            f"to take all of it back: ctrport unpublish {name}"
        )
    return live.mappings


def _meant(spec: str, has: Iterable[Mapping], bound: MappingABC[Mapping, Mapping]) -> list[Mapping]:
    try:
        asked = ports.parse(spec)
    except PortSpecError as error:
        raise Unusable(str(error)) from None
    exact = [mapping for mapping in has if spec == str(mapping)]
    if exact:
        return exact
    return [mapping for mapping in has if any(_is_meant(asked, its) for its in (mapping, bound.get(mapping, mapping)))]


def _is_meant(asked: Mapping, mapping: Mapping) -> bool:
    if asked.host_ip is None and asked.host_ports is None and not mapping.dynamic:
        return (asked.container_ports, asked.protocol) == (mapping.host_ports, mapping.protocol)
    return asked == mapping


def _not_given(name: str, spec: str, has: Sequence[Mapping], others: Sequence[Elsewhere]) -> str:
    for one in others:
        if _meant(spec, [one.mapping], {}):
            return f"{one.mapping} of {name} is declared elsewhere ({one.source}), and stays: it is changed there"
    gave = ", ".join(map(str, has)) or "nothing"
    return f"{quoted(spec)} is nothing that `ctrport publish` gave {name}, which is {gave}"
