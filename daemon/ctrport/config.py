"""The configuration file: YAML text in, `Config` out, or every problem of the file at once.

It owns what pydantic cannot judge and the sentences that say what is wrong; schema.py owns the keys. Reading the file
is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from ipaddress import ip_network
from typing import Any

from pydantic import ValidationError

from . import ports
from .claims import Claims
from .declared import Kind, Permission
from .document import NOTHING, REPORTED, Absent, Document, Location
from .model import Access, Declaration, Mapping, PodSelector, Protocol, Selector
from .ports import PortSpecError, quoted
from .schema import EXPECTED, FREE, SCHEMA, Containerd, File, Firewall, Match, MayPublish, Metrics, port_range

#: The directory beside the configuration whose ``*.yaml`` files add ``publish`` entries.
PARTS = "conf.d"

#: The containerd namespace that dockerd keeps its containers in, and publishes itself.
DOCKERD_NAMESPACE = "moby"


@dataclass(frozen=True, order=True)
class Problem:
    """One thing wrong in the file, and where: line and column count from 1."""

    line: int
    column: int
    message: str
    file: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


class ConfigError(ValueError):
    """A configuration that cannot be used. ``problems`` is all that is wrong, in the order of the files."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        problems = list(problems)
        files = list(dict.fromkeys(problem.file for problem in problems))
        # As a set: an alias brings what is wrong at its anchor up again.
        self.problems = tuple(sorted(set(problems), key=lambda problem: (files.index(problem.file), problem)))
        super().__init__("\n".join(map(str, self.problems)))


@dataclass(frozen=True)
class Config:
    """What the operator wants: the whole of a file that has no problem, defaults filled in."""

    containerd: Containerd = field(default_factory=Containerd)
    firewall: Firewall = field(default_factory=Firewall)
    publish: tuple[Declaration, ...] = ()
    networks: tuple[str, ...] = ()
    containers_may_publish: tuple[Permission, ...] = ()
    metrics: Metrics = field(default_factory=Metrics)

    @property
    def reads_annotations(self) -> bool:
        """Whether annotations are looked for at all: only where a rule allows some."""
        return any(Kind.ANNOTATION in permission.kinds for permission in self.containers_may_publish)

    def watches(self, namespace: str) -> bool:
        """Whether the containers of this containerd namespace are looked at.

        Without a list that is every namespace but dockerd's own, which dockerd publishes itself, unless a declaration
        names that one literally.
        """
        if self.containerd.namespaces:
            return namespace in self.containerd.namespaces
        return namespace != DOCKERD_NAMESPACE or any(
            declaration.selector.namespace == DOCKERD_NAMESPACE for declaration in self.publish
        )


def parse(text: str, name: str, parts: Iterable[tuple[str, str]] = ()) -> Config:
    """Return the configuration that ``text`` holds; ``name`` is the file's, for messages and sources.

    ``parts`` are further files, each a name and a text, whose ``publish`` entries come after those of the first.
    Raises `ConfigError` with every problem there is in any of them. Past an error in the YAML itself nothing can be
    known, so there it is the last. An empty file is a configuration: all defaults, nothing published.
    """
    problems: list[Problem] = []
    file, declarations, permissions = _read(text, name, problems)
    for part_name, part in parts:
        declarations += _read(part, part_name, problems, part=True)[1]
    if problems:
        raise ConfigError(problems)
    return Config(
        *(file.containerd, file.firewall, tuple(declarations), tuple(each.bridge for each in file.networks)),
        containers_may_publish=tuple(permissions),
        metrics=file.metrics,
    )


def _read(
    text: str, name: str, problems: list[Problem], *, part: bool = False
) -> tuple[File, list[Declaration], list[Permission]]:
    """Read one file, and add what is wrong with it to ``problems``."""
    document = Document(text)
    file = File()
    if not isinstance(document.content, Absent):
        try:
            file = SCHEMA.validate_python(document.content)
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                _report(document, fault["type"], fault["loc"], fault["input"], fault.get("ctx", {}))
    if part and isinstance(document.content, dict):
        for key in sorted(
            document.content.keys() & {"containerd", "firewall", "metrics", "networks", "containers_may_publish"}
        ):
            position = document.position((key,), key=True)
            document.fault(position, f"`{key}` is set in the main file alone; expected nothing but publish here")
    seen: dict[str, int] = {}
    for index, network in enumerate(file.networks):
        line, column = document.position(("networks", index, "bridge"))
        if network.bridge in seen:
            again = f"the bridge {network.bridge} is named on line {seen[network.bridge]} already; expected each once"
            document.fault((line, column), again)
        seen.setdefault(network.bridge, line)
    mappings = _publish(document)
    problems += (Problem(line, column, message, name) for line, column, message in document.faults)
    if document.faults:
        return file, [], []
    declarations = []
    for index, entry in enumerate(file.publish):
        line, _ = document.position(("publish", index))
        selector, source = _selector(entry.match), f"{name}:{line}"
        access = Access(tuple(ip_network(each) for each in entry.sources or ()), entry.interface)
        declarations.append(Declaration(selector, tuple(mappings[index]), source, access))
    permissions = []
    for index, rule in enumerate(file.containers_may_publish):
        line, _ = document.position(("containers_may_publish", index))
        permissions.append(_permission(rule, f"{name}:{line}"))
    return file, declarations, permissions


def _permission(rule: MayPublish, source: str) -> Permission:
    return Permission(
        source,
        frozenset(map(Kind, rule.kinds)),
        tuple(port_range(each) for each in rule.host_ports if each != FREE),
        FREE in rule.host_ports,
        rule.namespace,
        rule.pod_namespace,
        tuple(ip_network(each) for each in rule.host_ips or ()),
        frozenset(map(Protocol, rule.protocols)),
        rule.at_most,
    )


def _selector(match: Match) -> Selector:
    pod = None
    if match.pod is not None:
        pod = PodSelector(match.pod.namespace, match.pod.name, tuple(sorted(match.pod.labels.items())))
    return Selector(match.namespace, match.container, tuple(sorted(match.labels.items())), pod)


# The mappings of an entry.


def _publish(document: Document) -> list[list[Mapping]]:
    """Return the mappings of each entry, and report those that cannot be used.

    It looks at the content as it came, since in an entry that is wrong elsewhere the ports are to be checked too.
    """
    content = document.content
    entries = content.get("publish") if isinstance(content, dict) else None
    mappings = []
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        specs = entry.get("ports") if isinstance(entry, dict) else None
        mappings.append(_mappings(document, index, specs if isinstance(specs, list) else []))
    return mappings


def _mappings(document: Document, entry: int, specs: list[object]) -> list[Mapping]:
    mappings = []
    claims = Claims()
    for index, spec in enumerate(specs):
        if not isinstance(spec, str):
            continue
        position = document.position(("publish", entry, "ports", index))
        try:
            mapping = ports.parse(spec)
        except PortSpecError as error:
            document.fault(position, str(error))
            continue
        first = claims.claim(mapping, f"{quoted(spec)} on line {position[0]}")
        if first is not None:
            document.fault(position, f"{quoted(spec)} claims a host port that {first} has; expected each once")
        mappings.append(mapping)
    return mappings


# From pydantic's errors to sentences.


def _report(document: Document, kind: str, location: Location, value: object, context: dict[str, Any]) -> None:
    """Add what pydantic found wrong at ``location`` to the faults of the document, in our words."""
    place, shown = _place(location)
    if kind == "unexpected_keyword_argument":
        parent, shown = _place(location[:-1])
        document.fault(document.position(location, key=True), _unknown(parent, shown, str(location[-1])))
    elif value is REPORTED or (kind == "too_short" and value):
        # As to the second: pydantic counts only the items that are good, and reports each of the others for itself.
        return
    elif kind == "missing":
        document.fault(document.position(location[:-1]), f"{shown} is missing; expected {EXPECTED[place]}")
    elif kind == "string_too_short":
        document.fault(
            document.position(location[:-1], key=True), "a label has no name; expected one, such as app in {app: web}"
        )
    elif value is NOTHING:
        document.fault(document.position(location, key=True), f"{shown} is empty; expected {EXPECTED[place]}")
    else:
        fault = f"{shown} is {_given(value)}{context.get('error', '')}; expected {EXPECTED[place]}"
        document.fault(document.position(location), fault)


def _place(location: Location) -> tuple[str, str]:
    """Return the place in the schema, a key of `EXPECTED`, and what to call it."""
    place = ""
    for step in location:
        if isinstance(step, int):
            place += "[]"
        elif place in ("publish[].match.labels", "publish[].match.pod.labels"):
            return f"{place}{{}}", f"the label {quoted(step)}"
        else:
            place += f".{step}" if place else step
    if place == "":
        return place, "the file"
    return place, f"an entry of `{place[:-2]}`" if place.endswith("[]") else f"`{place}`"


def _unknown(place: str, shown: str, key: str) -> str:
    children = (known.rpartition(".") for known in EXPECTED if known and known[-1] not in "]}")
    keys = [child for parent, _, child in children if parent == place]
    near = get_close_matches(key, keys, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    expected = " or ".join(filter(None, (", ".join(keys[:-1]), keys[-1])))
    return f"{shown} has no key {quoted(key)}; expected {expected}{hint}"


def _given(value: object) -> str:
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "a mapping"
