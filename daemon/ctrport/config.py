"""The configuration file: YAML text in, `Config` out, or every problem of the file at once.

It owns the schema, its defaults and the sentences that say what is wrong. Reading the file is the caller's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from ipaddress import ip_network
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, StringConstraints, TypeAdapter, ValidationError
from pydantic import Field as Constraint

from . import ports
from .claims import Claims
from .declared import Kind, Permission
from .document import NOTHING, REPORTED, Absent, Document, Location
from .listen import Listen
from .listen import parse as parse_listen
from .model import DEVICE_NAME, Access, Declaration, Mapping, PodSelector, PortRange, Protocol, Selector, is_identifier
from .ports import PortSpecError, quoted

#: The directory beside the configuration whose ``*.yaml`` files add ``publish`` entries.
PARTS = "conf.d"

#: What ``firewall.reserve_limit`` may be at most: every port of three protocols.
MOST_RESERVED = 3 * 65535

#: What ``firewall.poll_interval`` may be at most, in seconds: everything is looked at each minute, whatever it is.
LONGEST_POLL = 60

#: Among host ports: any that is free, where a container names none.
FREE = "free"

#: The containerd namespace that dockerd keeps its containers in, and publishes itself.
DOCKERD_NAMESPACE = "moby"

# A backend that is added gets its word here; the check and the sentence follow.
Backend = Literal["auto", "iptables-nft", "iptables-legacy", "nftables"]
Position = Literal["auto", "first", "last"]
OnStop = Literal["keep", "remove"]
Masquerade = Literal["hairpin", "all"]


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


# Checks of single values. What they raise is the middle of a sentence: "`KEY` is 'VALUE'{text}; expected ...".


def _address(text: str) -> str:
    path = text.removeprefix("unix://")
    if not path.startswith("/") or path.endswith("/") or not path.isprintable():
        raise ValueError
    if len(path.encode()) > 107:
        raise ValueError(", which is longer than the 107 bytes that the path of a socket can have")
    return path


def _identifier(text: str) -> str:
    if not is_identifier(text):
        raise ValueError
    return text


#: Words that iptables takes as something else where a chain can stand: its chains, verdicts and targets.
_IPTABLES_WORDS = (
    "INPUT OUTPUT FORWARD PREROUTING POSTROUTING ACCEPT DROP RETURN QUEUE "
    "AUDIT BALANCE CHECKSUM CLASSIFY CLUSTERIP CONNMARK CT DNAT DNPT DSCP ECN HL HMARK IDLETIMER LED LOG MARK "
    "MASQUERADE MIRROR NETMAP NFLOG NFQUEUE NOTRACK RATEEST REDIRECT REJECT SAME SECMARK SET SNAT SNPT SYNPROXY "
    "TARPIT TCPMSS TEE TOS TPROXY TRACE TTL ULOG"
)

#: Whose chains ours would be with such a prefix: KUBE-FORWARD and KUBE-POSTROUTING, CNI-FORWARD, cali-FORWARD exist.
_FOREIGN_PREFIXES = {"KUBE": "kube-proxy", "CNI": "the CNI plugins", "cali": "Calico", "WEAVE": "Weave Net"}


def _chain(text: str) -> str:
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,9}", text) is None:
        raise ValueError
    if text in _IPTABLES_WORDS.split():
        raise ValueError(", a word that iptables has a meaning for")
    owner = _FOREIGN_PREFIXES.get(text.partition("-")[0])
    if owner is not None:
        raise ValueError(f", and chains of such names belong to {owner}")
    return text


def _boolean(value: object) -> bool:
    if not isinstance(value, str) or value not in {"true", "True", "TRUE", "false", "False", "FALSE"}:
        raise ValueError
    return value.lower() == "true"


def _count(text: object) -> int:
    if not isinstance(text, str) or re.fullmatch(r"0|[1-9][0-9]{0,5}", text) is None or int(text) > MOST_RESERVED:
        raise ValueError
    return int(text)


def _seconds(text: object) -> int:
    if not isinstance(text, str) or re.fullmatch(r"[1-9][0-9]{0,3}", text) is None or int(text) > LONGEST_POLL:
        raise ValueError
    return int(text)


def _source(text: str) -> str:
    if "%" in text:
        raise ValueError(", with a zone, which no rule can hold")
    try:
        return str(ip_network(text))
    except ValueError:
        pass
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise ValueError from None
    raise ValueError(f", which is a host in {network}")


def _interface(text: str) -> str:
    if DEVICE_NAME.fullmatch(text) is None or text in (".", ".."):
        raise ValueError
    return text


def _host_ports(text: str) -> str:
    if text != FREE:
        _port_range(text)
    return text


def _port_range(text: str) -> PortRange:
    if re.fullmatch(r"[1-9][0-9]{0,4}(?:-[1-9][0-9]{0,4})?", text) is None:
        raise ValueError
    first, _, last = text.partition("-")
    try:
        return PortRange(int(first), int(last or first))
    except ValueError:
        raise ValueError from None


def _glob(text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9._*?\[\]!-]+", text) is None:
        raise ValueError
    if not set(text) & set("*?[") and not is_identifier(text):
        raise ValueError(", which containerd takes for no name")
    if re.fullmatch(r"(?:[^\[]|\[(?:!.|[^!])[^\]]*\])*", text) is None:
        raise ValueError(", with a '[' that is not closed")
    # fnmatch of some Python 3.10 raises re.error on [b-a], later ones match nothing.
    for brackets in re.findall(r"\[!?(.[^\]]*)\]", text):
        if any(first > last for first, last in re.findall(r"(.)-(.)", brackets)):
            raise ValueError(", with a range that runs backwards")
    return text


def _listen(text: object) -> Listen | None:
    if not isinstance(text, str):
        raise ValueError
    return parse_listen(text)


# The schema. Pydantic reads it off these dataclasses, so that types, defaults and checks stand in one place.


class _Closed:
    """No key but those named."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Containerd(_Closed):
    """Where containerd is reached, and which of its namespaces are looked at; no namespace named is all of them."""

    address: Annotated[str, AfterValidator(_address)] = "/run/containerd/containerd.sock"
    namespaces: tuple[Annotated[str, AfterValidator(_identifier)], ...] = ()


@dataclass(frozen=True)
class Firewall(_Closed):
    """How the rules get into the kernel, under which name, and where."""

    backend: Backend = "auto"
    chain: Annotated[str, AfterValidator(_chain)] = "DOCKER"
    position: Position = "auto"
    localhost: Annotated[bool, BeforeValidator(_boolean)] = True
    masquerade: Masquerade = "hairpin"
    reserve_limit: Annotated[int, BeforeValidator(_count)] = 4096
    poll_interval: Annotated[int, BeforeValidator(_seconds)] = 10
    on_stop: OnStop = "keep"


@dataclass(frozen=True)
class Metrics(_Closed):
    """Where the metrics are served; None is nowhere."""

    listen: Annotated[Listen | None, BeforeValidator(_listen)] = None


@dataclass(frozen=True)
class _Network(_Closed):
    bridge: Annotated[str, AfterValidator(_interface)]


_Labels = dict[Annotated[str, StringConstraints(min_length=1)], str]


@dataclass(frozen=True)
class _PodMatch(_Closed):
    namespace: Annotated[str, AfterValidator(_glob)] | None = None
    name: Annotated[str, AfterValidator(_glob)] | None = None
    labels: _Labels = field(default_factory=dict)


def _not_any_pod(match: _PodMatch) -> _PodMatch:
    if match == _PodMatch():
        raise ValueError(" without a condition, which would match every pod")
    return match


@dataclass(frozen=True)
class _Match(_Closed):
    pod: Annotated[_PodMatch, AfterValidator(_not_any_pod)] | None = None
    namespace: Annotated[str, AfterValidator(_glob)] | None = None
    container: Annotated[str, AfterValidator(_glob)] | None = None
    labels: _Labels = field(default_factory=dict)


def _not_empty(match: _Match) -> _Match:
    if match == _Match():
        raise ValueError(" without a condition, which would match every container")
    return match


@dataclass(frozen=True)
class _Entry(_Closed):
    match: Annotated[_Match, AfterValidator(_not_empty)]
    # Text still: a mapping is checked beside those before it, whatever else is wrong in the entry.
    ports: Annotated[tuple[str, ...], Constraint(min_length=1)]
    sources: Annotated[tuple[Annotated[str, AfterValidator(_source)], ...], Constraint(min_length=1)] | None = None
    interface: Annotated[str, AfterValidator(_interface)] | None = None


@dataclass(frozen=True)
class _Permission(_Closed):
    kinds: Annotated[tuple[Literal["label", "annotation"], ...], Constraint(min_length=1)]
    host_ports: Annotated[tuple[Annotated[str, AfterValidator(_host_ports)], ...], Constraint(min_length=1)]
    namespace: Annotated[str, AfterValidator(_glob)] | None = None
    pod_namespace: Annotated[str, AfterValidator(_glob)] | None = None
    host_ips: Annotated[tuple[Annotated[str, AfterValidator(_source)], ...], Constraint(min_length=1)] | None = None
    protocols: Annotated[tuple[Literal["tcp", "udp", "sctp"], ...], Constraint(min_length=1)] = ("tcp", "udp", "sctp")
    at_most: Annotated[int, BeforeValidator(_count)] = 10


@dataclass(frozen=True)
class _File(_Closed):
    containerd: Containerd = Containerd()
    firewall: Firewall = Firewall()
    metrics: Metrics = Metrics()
    networks: tuple[_Network, ...] = ()
    publish: tuple[_Entry, ...] = ()
    containers_may_publish: tuple[_Permission, ...] = ()


_SCHEMA = TypeAdapter(_File)

#: What is expected at each place of the schema; also the one list of the keys there are.
_EXPECTED = {
    "": (
        "a mapping with the keys containerd, firewall, metrics, networks, publish and containers_may_publish, "
        "each of which may be left out"
    ),
    "containerd": "a mapping with address and namespaces, or the key left out",
    "containerd.address": "the absolute path of a unix socket, such as /run/containerd/containerd.sock",
    "containerd.namespaces": "a list of containerd namespaces, such as [default, k8s.io], or [] for all",
    "containerd.namespaces[]": "the name of a containerd namespace, such as k8s.io",
    "firewall": (
        "a mapping with backend, chain, position, localhost, masquerade, reserve_limit, poll_interval and on_stop, "
        "or the key left out"
    ),
    "firewall.backend": "auto, iptables-nft, iptables-legacy or nftables",
    "firewall.chain": "1 to 10 letters, digits, '_' and '-', beginning with a letter, such as DOCKER",
    "firewall.position": "auto, first or last",
    "firewall.localhost": "true or false",
    "firewall.masquerade": "hairpin or all",
    "firewall.reserve_limit": f"a number of ports from 0 to {MOST_RESERVED}, in plain digits",
    "firewall.poll_interval": f"a number of seconds from 1 to {LONGEST_POLL}, in plain digits",
    "firewall.on_stop": "keep or remove",
    "metrics": "a mapping with listen, or the key left out",
    "metrics.listen": "none, or an address and a port, such as 127.0.0.1:9477 or [::1]:9477",
    "networks": "a list of bridges to run the Docker way, such as [{bridge: docker0}], or [] for none",
    "networks[]": "a mapping with bridge",
    "networks[].bridge": "the name of a bridge, such as docker0",
    "publish": "a list of entries, each with match and ports, or [] for none",
    "publish[]": "a mapping with match and ports, and perhaps sources and interface",
    "publish[].match": "a mapping with pod, namespace, container or labels, to say which containers are meant",
    "publish[].match.pod": "a mapping with namespace, name or labels of a pod, as Kubernetes knows it",
    "publish[].match.pod.namespace": "the name of a Kubernetes namespace, in which * ? and [...] match as in a shell",
    "publish[].match.pod.name": "the name of a pod, in which * ? and [...] match as in a shell",
    "publish[].match.pod.labels": "a mapping from label to value, such as {app: web}",
    "publish[].match.pod.labels{}": 'text, or "" for an empty value',
    "publish[].match.namespace": "the name of a containerd namespace, in which * ? and [...] match as in a shell",
    "publish[].match.container": "the id of a container or its name in a pod; * ? and [...] match as in a shell",
    "publish[].match.labels": "a mapping from label to value, such as {app: web}",
    "publish[].match.labels{}": 'text, or "" for an empty value',
    "publish[].ports": 'a list of port mappings, such as ["8080:80"]',
    "publish[].ports[]": f"a port mapping, {ports.GRAMMAR}",
    "publish[].sources": "a list of the networks that may reach the ports, such as [192.0.2.0/24, 2001:db8::/32]",
    "publish[].sources[]": "an address or a network, such as 192.0.2.0/24",
    "publish[].interface": "the name of one of the node's devices, such as eth0",
    "containers_may_publish": "a list of rules, each with kinds and host_ports, or [] for none",
    "containers_may_publish[]": (
        "a mapping with kinds and host_ports, and perhaps namespace, pod_namespace, host_ips, protocols and at_most"
    ),
    "containers_may_publish[].kinds": "a list of label and annotation, such as [label]",
    "containers_may_publish[].kinds[]": "label or annotation",
    "containers_may_publish[].host_ports": 'a list of ports, such as ["8000-8999"], in which free is any free one',
    "containers_may_publish[].host_ports[]": "a port or a range from 1 to 65535, such as 8000-8999, or free",
    "containers_may_publish[].namespace": "the name of a containerd namespace; * ? and [...] match as in a shell",
    "containers_may_publish[].pod_namespace": "the name of a Kubernetes namespace; * ? and [...] match as in a shell",
    "containers_may_publish[].host_ips": "a list of addresses and networks, such as [192.0.2.7, 2001:db8::/64]",
    "containers_may_publish[].host_ips[]": "an address or a network, such as 192.0.2.7",
    "containers_may_publish[].protocols": "a list of protocols, such as [tcp, udp]",
    "containers_may_publish[].protocols[]": "tcp, udp or sctp",
    "containers_may_publish[].at_most": f"a number of ports from 0 to {MOST_RESERVED}, in plain digits",
}


@dataclass(frozen=True)
class Config:
    """What the operator wants: the whole of a file that has no problem, defaults filled in."""

    containerd: Containerd = Containerd()
    firewall: Firewall = Firewall()
    publish: tuple[Declaration, ...] = ()
    networks: tuple[str, ...] = ()
    containers_may_publish: tuple[Permission, ...] = ()
    metrics: Metrics = Metrics()

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
) -> tuple[_File, list[Declaration], list[Permission]]:
    """Read one file, and add what is wrong with it to ``problems``."""
    document = Document(text)
    file = _File()
    if not isinstance(document.content, Absent):
        try:
            file = _SCHEMA.validate_python(document.content)
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


def _permission(rule: _Permission, source: str) -> Permission:
    return Permission(
        source,
        frozenset(map(Kind, rule.kinds)),
        tuple(_port_range(each) for each in rule.host_ports if each != FREE),
        FREE in rule.host_ports,
        rule.namespace,
        rule.pod_namespace,
        tuple(ip_network(each) for each in rule.host_ips or ()),
        frozenset(map(Protocol, rule.protocols)),
        rule.at_most,
    )


def _selector(match: _Match) -> Selector:
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
        document.fault(document.position(location[:-1]), f"{shown} is missing; expected {_EXPECTED[place]}")
    elif kind == "string_too_short":
        document.fault(
            document.position(location[:-1], key=True), "a label has no name; expected one, such as app in {app: web}"
        )
    elif value is NOTHING:
        document.fault(document.position(location, key=True), f"{shown} is empty; expected {_EXPECTED[place]}")
    else:
        fault = f"{shown} is {_given(value)}{context.get('error', '')}; expected {_EXPECTED[place]}"
        document.fault(document.position(location), fault)


def _place(location: Location) -> tuple[str, str]:
    """Return the place in the schema, a key of `_EXPECTED`, and what to call it."""
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
    children = (known.rpartition(".") for known in _EXPECTED if known and known[-1] not in "]}")
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
