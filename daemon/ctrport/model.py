"""The values that pass from room to room, frozen and free of I/O.

The words are those of the field, one meaning each: *container* (a containerd container with a running task, in a
containerd *namespace*), *endpoint* (where it is reached), *mapping* (one parsed ``-p``), *declaration* (a selector
and the mappings it asks for), *publication* (one mapping of one container, with its state).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

#: containerd's own pattern for namespaces and container ids, at most 76 characters (containerd, pkg/identifiers).
IDENTIFIER = re.compile(r"[A-Za-z0-9]+(?:[._-](?:[A-Za-z0-9]+))*")
IDENTIFIER_MAX = 76

#: What the kernel takes as the name of a network device: at most 15 bytes, no "/" and no white space (dev_valid_name);
#: narrowed here to what is safe as rule text.
DEVICE_NAME = re.compile(r"[A-Za-z0-9_.:@-]{1,15}")


_SHOWN_POD = re.compile(r"[A-Za-z0-9._-]{1,253}/[A-Za-z0-9._-]{1,253}")


def is_identifier(text: str) -> bool:
    """Whether containerd would take ``text`` as the name of a namespace or container."""
    return len(text) <= IDENTIFIER_MAX and IDENTIFIER.fullmatch(text) is not None


class Family(enum.Enum):
    """An address family; its value is the IP version."""

    IPV4 = 4
    IPV6 = 6

    @classmethod
    def of(cls, address: Address | Network) -> Family:
        """Return the family an address or network belongs to."""
        return cls(address.version)

    @property
    def unspecified(self) -> Address:
        """0.0.0.0 or ::, which stands for every address of the family."""
        return IPv4Address(0) if self is Family.IPV4 else IPv6Address(0)


class Protocol(str, enum.Enum):
    """A transport protocol that has ports, by the name that ``-p`` and iptables use."""

    TCP = "tcp"
    UDP = "udp"
    SCTP = "sctp"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, order=True)
class PortRange:
    """Ports ``first`` to ``last``, both included, each from 1 to 65535."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last <= 65535:
            raise ValueError(f"not a range of ports: {self.first}-{self.last}")

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last + 1))

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    def overlaps(self, other: PortRange) -> bool:
        """Whether some port is in both."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Mapping:
    """One parsed ``-p``: ``[host_ip:][host_ports:]container_ports[/protocol]``.

    ``host_ip`` None means every address of the node, in each family that the container has.
    ``host_ports`` None asks for free ports. Where both ranges are given they are equally long, but for a pool: several
    host ports for one container port, of which one free port is taken.
    """

    host_ip: Address | None
    host_ports: PortRange | None
    container_ports: PortRange
    protocol: Protocol

    def __str__(self) -> str:
        host_ip = ""
        if self.host_ip is not None:
            host_ip = f"[{self.host_ip}]:" if self.host_ip.version == 6 else f"{self.host_ip}:"
        host_ports = f"{self.host_ports}:" if self.host_ports is not None else (":" if host_ip else "")
        return f"{host_ip}{host_ports}{self.container_ports}/{self.protocol}"

    @property
    def any_host_ip(self) -> bool:
        """Whether it is bound to no address in particular: without a host IP, or on 0.0.0.0 or [::]."""
        return self.host_ip is None or self.host_ip.is_unspecified

    @property
    def dynamic(self) -> bool:
        """Whether its host ports are to be chosen: among all that are free, or out of a pool."""
        return self.host_ports is None or len(self.host_ports) != len(self.container_ports)

    @property
    def families(self) -> tuple[Family, ...]:
        """The families it can serve: both, unless its host IP is of one."""
        return (Family.IPV4, Family.IPV6) if self.host_ip is None else (Family.of(self.host_ip),)

    def overlaps(self, other: Mapping) -> bool:
        """Whether both want the same host port, as the kernel's bind(2) would judge it.

        A wildcard address overlaps with every address of its family, and no host IP with both families. A mapping whose
        host ports are to be chosen wants none in particular.
        """
        if self.protocol is not other.protocol or self.dynamic or other.dynamic:
            return False
        assert self.host_ports is not None
        assert other.host_ports is not None
        if not self.host_ports.overlaps(other.host_ports):
            return False
        if not set(self.families) & set(other.families):
            return False
        return self.any_host_ip or other.any_host_ip or self.host_ip == other.host_ip


@dataclass(frozen=True)
class Unread:
    """What a container asks for and nobody can read as a mapping. ``text`` is safe to print, and short."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, order=True)
class ContainerKey:
    """What names a container on a node: its containerd namespace and its id in there."""

    namespace: str
    id: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.id}"


class Role(enum.Enum):
    """What a container of a pod is: its sandbox, which holds the network, or one of those that live in there."""

    SANDBOX = "sandbox"
    MEMBER = "container"


@dataclass(frozen=True)
class Pod:
    """A CRI sandbox by the names that Kubernetes has for it: whatever a stranger chose, so not for rules."""

    namespace: str
    name: str
    labels: MappingABC[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def shown(self) -> str:
        """The same so that it can be printed: whoever makes a sandbox by hand may call it anything."""
        return str(self) if _SHOWN_POD.fullmatch(str(self)) else f"{str(self)!a:.80}"


@dataclass(frozen=True)
class Live:
    """What ``ctrport publish`` has a container publish: the operator's word, which containerd keeps with the container.

    ``revision`` is another one after each write. ``unread`` is what of it nobody can read, each with why.
    """

    mappings: tuple[Mapping, ...]
    revision: str = ""
    unread: tuple[tuple[Unread, str], ...] = ()


@dataclass(frozen=True)
class Member:
    """One container of those that share a network namespace. ``name`` is what the pod calls it, if it is in one."""

    id: str
    name: str | None
    labels: MappingABC[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Container:
    """What is published as one: a container with a running or paused task, or a pod with all of its containers.

    ``key``, ``pid`` and ``started`` are the container's, or those of the pod's sandbox. ``pid`` is its init process as
    the daemon's own PID namespace counts it. ``started`` is when that process began, in clock ticks since boot (field
    22 of /proc/PID/stat, proc(5)): who is first gets a contested port. ``members`` are the containers themselves.
    ``annotation`` is the ports that an annotation of the container or pod asks for, as it came from a stranger;
    ``live`` is what the operator has it publish since.
    """

    key: ContainerKey
    pid: int
    started: int
    members: tuple[Member, ...]
    pod: Pod | None = None
    annotation: str | None = None
    live: Live | None = None


@dataclass(frozen=True)
class Attachment:
    """Where the host reaches a container in one family.

    ``device`` is the host's: the container's own veth, or the bridge that veth is a port of. ``subnet`` is what shares
    the link with the container: the device's on-link prefix, else the container's own address. ``port`` is the veth as
    a port of ``device``, where that is a bridge.
    """

    address: Address
    device: str
    subnet: Network
    port: str | None = None

    def __post_init__(self) -> None:
        for name in (self.device, self.port):
            if name is not None and DEVICE_NAME.fullmatch(name) is None:
                raise ValueError(f"not a device name that can be part of a rule: {name!r}")


@dataclass(frozen=True)
class Endpoint:
    """Where a container is reached: at most one attachment a family, at least one in all."""

    attachments: tuple[Attachment, ...]

    def at(self, family: Family) -> Attachment | None:
        """Return the attachment of that family, or None where the container has none."""
        return next((a for a in self.attachments if Family.of(a.address) is family), None)

    @property
    def families(self) -> frozenset[Family]:
        """The families that the container has an attachment of."""
        return frozenset(Family.of(a.address) for a in self.attachments)

    def completed_by(self, other: Endpoint) -> Endpoint:
        """Return this with the attachments of ``other`` that are of a family it has none of; IPv4 comes first."""
        more = (a for a in other.attachments if Family.of(a.address) not in self.families)
        return Endpoint(tuple(sorted((*self.attachments, *more), key=lambda a: a.address.version)))


class State(str, enum.Enum):
    """What became of a publication.

    ACTIVE: the kernel has its rules. WAITING: something it needs is not there yet, or another container serves what was
    declared for both. CONFLICT: another holds the host port. REFUSED: not allowed. UNSUPPORTED: cannot be done, here or
    at all.
    """

    ACTIVE = "active"
    WAITING = "waiting"
    CONFLICT = "conflict"
    REFUSED = "refused"
    UNSUPPORTED = "unsupported"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Obstacle:
    """Why a container has no endpoint: the state this puts its publications in, and one sentence for people."""

    state: State
    reason: str


@dataclass(frozen=True)
class Candidate:
    """A container, and where it is reached or why it is not."""

    container: Container
    endpoint: Endpoint | Obstacle


@dataclass(frozen=True)
class PodSelector:
    """Which pods a declaration is for. Every condition given must hold; globs as in ``Selector``."""

    namespace: str | None = None
    name: str | None = None
    labels: tuple[tuple[str, str], ...] = ()

    def matches(self, pod: Pod) -> bool:
        """Whether ``pod`` is one of those meant."""
        return (
            (self.namespace is None or fnmatchcase(pod.namespace, self.namespace))
            and (self.name is None or fnmatchcase(pod.name, self.name))
            and all(pod.labels.get(key) == value for key, value in self.labels)
        )

    def __str__(self) -> str:
        parts = [f"namespace={self.namespace}"] if self.namespace is not None else []
        parts += [f"name={self.name}"] if self.name is not None else []
        parts += [f"label {key}={value}" for key, value in self.labels]
        return f"pod ({', '.join(parts)})"


@dataclass(frozen=True)
class Selector:
    """Which containers a declaration is for. Every condition given must hold; None or empty is no condition.

    ``namespace`` (of containerd) and ``container`` are shell globs over the whole name, case-sensitive; a container
    goes by its id and, in a pod, by its name there too. ``labels`` are the container's own, and must be equal. ``pod``
    is for pods alone.
    """

    namespace: str | None = None
    container: str | None = None
    labels: tuple[tuple[str, str], ...] = ()
    pod: PodSelector | None = None

    def matches(self, container: Container) -> bool:
        """Whether ``container``, or for a pod one of its containers, is one of those meant."""
        if self.namespace is not None and not fnmatchcase(container.key.namespace, self.namespace):
            return False
        if self.pod is not None and (container.pod is None or not self.pod.matches(container.pod)):
            return False
        if self.pod is not None and self.container is None and not self.labels:
            return True  # the pod as such, whatever runs in it
        return any(map(self._matches_member, container.members))

    def _matches_member(self, member: Member) -> bool:
        if self.container is not None:
            names = (member.id,) if member.name is None else (member.id, member.name)
            if not any(fnmatchcase(name, self.container) for name in names):
                return False
        return all(member.labels.get(key) == value for key, value in self.labels)

    def __str__(self) -> str:
        parts = [f"namespace={self.namespace}"] if self.namespace is not None else []
        parts += [str(self.pod)] if self.pod is not None else []
        parts += [f"container={self.container}"] if self.container is not None else []
        parts += [f"label {key}={value}" for key, value in self.labels]
        return ", ".join(parts)


@dataclass(frozen=True)
class Access:
    """Who may reach a mapping: whoever comes from one of ``sources``, and in by the device ``interface``.

    No source named is all of them; None is any interface, and the node itself.
    """

    sources: tuple[Network, ...] = ()
    interface: str | None = None

    def __post_init__(self) -> None:
        if self.interface is not None and DEVICE_NAME.fullmatch(self.interface) is None:
            raise ValueError(f"not a device name that can be part of a rule: {self.interface!r}")

    def sources_of(self, family: Family) -> tuple[Network, ...] | None:
        """Return the sources of one family that are let in; empty is all of them, None is nobody."""
        if not self.sources:
            return ()
        its = tuple(source for source in self.sources if Family.of(source) is family)
        return (() if any(source.prefixlen == 0 for source in its) else its) if its else None


@dataclass(frozen=True)
class Declaration:
    """A selector, the mappings it asks for, and who may reach them. ``source`` says where it was written: file:line."""

    selector: Selector
    mappings: tuple[Mapping, ...]
    source: str
    access: Access = Access()


@dataclass(frozen=True)
class Publication:
    """One mapping of one container, with its state.

    ``asked`` is the mapping as declared, or what cannot be read as one, which is always REFUSED. ``source`` says where.
    ``container`` is None where a declaration matches no container; for a pod it is the sandbox, and ``pod`` the pod's
    name as ``namespace/name``, made safe to print. ``attachments`` are those that the mapping serves, one a family;
    ``bound`` is the mapping with the host ports that it has. Both are empty unless the state is ACTIVE, and ``reason``,
    one sentence, is empty when it is. ``place`` counts those that wait while another container serves the same
    declaration, from 1 for the next in line; of all others it is 0.
    """

    asked: Mapping | Unread
    source: str
    container: ContainerKey | None
    state: State
    reason: str = ""
    attachments: tuple[Attachment, ...] = ()
    pod: str | None = None
    bound: Mapping | None = None
    access: Access = Access()
    place: int = 0
    # No part of its value, but worked out of that once: see ``owners.owner_of``.
    owner: str | None = field(default=None, init=False, compare=False, repr=False)

    @property
    def mapping(self) -> Mapping:
        """The mapping that is asked for. To be read where the state is not REFUSED."""
        assert isinstance(self.asked, Mapping)
        return self.asked


@dataclass(frozen=True)
class Holder:
    """Somebody else who already answers on host ports of this node. ``name`` says who, in words safe to print."""

    name: str
    mapping: Mapping


@dataclass(frozen=True)
class Count:
    """What the kernel counted."""

    packets: int = 0
    bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.packets + other.packets, self.bytes + other.bytes)


@dataclass(frozen=True)
class BridgeNetwork:
    """A network: a bridge that ctrport runs the Docker way, with the subnets behind it as far as it has them yet."""

    bridge: str
    subnets: tuple[Network, ...]

    def __post_init__(self) -> None:
        if DEVICE_NAME.fullmatch(self.bridge) is None:
            raise ValueError(f"not a device name that can be part of a rule: {self.bridge!r}")


@dataclass(frozen=True)
class NodeFacts:
    """What of the node itself decides over publications.

    ``forwarding`` holds the families in which the node forwards packets; ``addresses`` are the node's own; ``holders``
    are those whose host ports are not to be had; ``free_ports`` are those to choose from where a mapping names none;
    ``protocols`` are those that the kernel tracks connections of; ``networks`` are those that are run the Docker way;
    ``services`` are addresses that IPVS gave the node, which are nobody's to publish on.
    """

    forwarding: frozenset[Family]
    addresses: frozenset[Address]
    holders: tuple[Holder, ...] = ()
    free_ports: tuple[PortRange, ...] = ()
    protocols: frozenset[Protocol] = frozenset(Protocol)
    networks: tuple[BridgeNetwork, ...] = ()
    services: frozenset[Address] = frozenset()
