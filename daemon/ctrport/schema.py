"""The schema of the configuration: every key, its default, what it takes and what it is for.

Pydantic reads it off the dataclasses, so that types, defaults and checks stand in one place. The text below each field
is what docs/configuration.md says of it (`bin/generate-reference`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, StringConstraints, TypeAdapter
from pydantic import Field as Constraint

from . import ports
from .listen import Listen
from .listen import parse as parse_listen
from .model import DEVICE_NAME, PortRange, is_identifier

#: What ``firewall.reserve_limit`` may be at most: every port of three protocols.
MOST_RESERVED = 3 * 65535

#: What ``firewall.poll_interval`` may be at most, in seconds: everything is looked at each minute, whatever it is.
LONGEST_POLL = 60

#: Among host ports: any that is free, where a container names none.
FREE = "free"

# A backend that is added gets its word here; the check and the sentence follow.
Backend = Literal["auto", "iptables-nft", "iptables-legacy", "nftables"]
Position = Literal["auto", "first", "last"]
OnStop = Literal["keep", "remove"]
Masquerade = Literal["hairpin", "all"]


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
        port_range(text)
    return text


def port_range(text: str) -> PortRange:
    """Return the ports that ``text`` names. Raises ``ValueError``."""
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


# The keys.


class _Closed:
    """No key but those named."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Containerd(_Closed):
    """Where containerd is reached, and which of its namespaces are looked at; no namespace named is all of them."""

    address: Annotated[str, AfterValidator(_address)] = "/run/containerd/containerd.sock"
    """The socket of containerd's API. k3s: /run/k3s/containerd/containerd.sock. `unix:///run/...` is taken too.
    Another one takes a restart of the daemon."""
    namespaces: tuple[Annotated[str, AfterValidator(_identifier)], ...] = ()
    """The containerd namespaces to look at; Kubernetes keeps its containers in k8s.io. `[]` is all of them but
    dockerd's own, moby: that one only where it is named here or by a `match`."""


@dataclass(frozen=True)
class Firewall(_Closed):
    """How the rules get into the kernel, under which name, and where."""

    backend: Backend = "auto"
    """How rules get into the kernel. `auto`: as this node's kubelet does it, and iptables-nft where there is none;
    the log says which, and why. `nftables` is by choice alone. After a change the rules move, and no published port
    is dark."""
    chain: Annotated[str, AfterValidator(_chain)] = "DOCKER"
    """The chain that holds the rules; the others of ctrport are named after it. Another name where dockerd runs on
    the same node, as dockerd owns every chain named DOCKER-something. Of no use with nftables."""
    position: Position = "auto"
    """Where the jump to that chain stands in FORWARD. `auto`: after those of kube-proxy and network policy agents,
    so that a NetworkPolicy is asked first; on top where there are none. `first`: on top. `last`: at the end."""
    localhost: Annotated[bool, BeforeValidator(_boolean)] = True
    """Whether the node itself reaches published ports at 127.0.0.1 too. It sets `route_localnet` on the containers'
    devices, and has rules that keep the network out of 127.0.0.0/8."""
    masquerade: Masquerade = "hairpin"
    """Whose packets get the node's address as their source on their way to a container. `hairpin`: those of
    containers on its own link, which could not be answered otherwise. `all`: everyone's, so that clients are no
    longer told apart; for containers whose default route is another host."""
    reserve_limit: Annotated[int, BeforeValidator(_count)] = 4096
    """Host ports are held by sockets of the daemon, so that no other program can take them, up to this many in all.
    One more is published all the same, if nobody has it. `0`: none is held, nor looked at."""
    poll_interval: Annotated[int, BeforeValidator(_seconds)] = 10
    """Seconds between two looks at legacy tables, which do not tell when others change them. Of nft tables each
    change is announced."""
    on_stop: OnStop = "keep"
    """What becomes of the rules when the daemon stops. `keep`: ports stay published, over a restart or an upgrade
    too. `remove`: every rule of ctrport goes."""


@dataclass(frozen=True)
class Metrics(_Closed):
    """Where the metrics are served; None is nowhere."""

    listen: Annotated[Listen | None, BeforeValidator(_listen)] = None
    """Where [metrics](metrics.md) for Prometheus are served over HTTP, at /metrics. `none` is nowhere. Whoever
    reaches that address reads them."""


@dataclass(frozen=True)
class Network(_Closed):
    """A bridge that is run the Docker way."""

    bridge: Annotated[str, AfterValidator(_interface)]
    """The bridge whose containers get out, masqueraded, and reach one another, and of which elsewhere only
    published ports are reached, whatever the policy of FORWARD. Name none that a network plugin with policies of
    its own looks after."""


_Labels = dict[Annotated[str, StringConstraints(min_length=1)], str]


@dataclass(frozen=True)
class PodMatch(_Closed):
    """Which pods are meant: every condition that is given must hold."""

    namespace: Annotated[str, AfterValidator(_glob)] | None = None
    """The Kubernetes namespace of the pod."""
    name: Annotated[str, AfterValidator(_glob)] | None = None
    """The name of the pod."""
    labels: _Labels = field(default_factory=dict)
    """Labels of the pod, as they were when it was started; each must be equal."""


def _not_any_pod(match: PodMatch) -> PodMatch:
    if match == PodMatch():
        raise ValueError(" without a condition, which would match every pod")
    return match


@dataclass(frozen=True)
class Match(_Closed):
    """Which containers are meant: every condition that is given must hold."""

    pod: Annotated[PodMatch, AfterValidator(_not_any_pod)] | None = None
    """The pod that is published as one, from the start of its sandbox to the end of that. With `container` or
    `labels` beside it: while a container runs in it that matches these, too."""
    namespace: Annotated[str, AfterValidator(_glob)] | None = None
    """The containerd namespace."""
    container: Annotated[str, AfterValidator(_glob)] | None = None
    """The id of the container, or its name in a pod."""
    labels: _Labels = field(default_factory=dict)
    """Labels of the container, in containerd; each must be equal."""


def _not_empty(match: Match) -> Match:
    if match == Match():
        raise ValueError(" without a condition, which would match every container")
    return match


@dataclass(frozen=True)
class Entry(_Closed):
    """One entry of ``publish``."""

    match: Annotated[Match, AfterValidator(_not_empty)]
    """Which containers, or pods, this is for."""
    # Text still: a mapping is checked beside those before it, whatever else is wrong in the entry.
    ports: Annotated[tuple[str, ...], Constraint(min_length=1)]
    """What is published of each of them, as for `docker run -p`. Without a host address on IPv4 and IPv6, as the
    container has them; tcp where it does not say udp or sctp; without a host port on a free one."""
    sources: Annotated[tuple[Annotated[str, AfterValidator(_source)], ...], Constraint(min_length=1)] | None = None
    """The networks and addresses that may reach these ports; everybody, if left out. Nobody else gets as far as the
    container, whatever FORWARD lets through. The node itself where 127.0.0.0/8, or its own address, is among
    them."""
    interface: Annotated[str, AfterValidator(_interface)] | None = None
    """The device of the node that clients have to come in by; any, if left out. The node itself comes in by
    none."""


@dataclass(frozen=True)
class MayPublish(_Closed):
    """One rule of ``containers_may_publish``."""

    kinds: Annotated[tuple[Literal["label", "annotation"], ...], Constraint(min_length=1)]
    """How a container declares what this allows: by a label or an annotation `ctrport/ports`."""
    host_ports: Annotated[tuple[Annotated[str, AfterValidator(_host_ports)], ...], Constraint(min_length=1)]
    """The host ports that it allows. `free` allows mappings without a host port."""
    namespace: Annotated[str, AfterValidator(_glob)] | None = None
    """The containerd namespace that this is for; all, if left out."""
    pod_namespace: Annotated[str, AfterValidator(_glob)] | None = None
    """The Kubernetes namespace that this is for, of pods alone; containers of every kind, if left out."""
    host_ips: Annotated[tuple[Annotated[str, AfterValidator(_source)], ...], Constraint(min_length=1)] | None = None
    """The host addresses that it allows, of which a mapping then has to name one. If left out: every address, and
    none in particular."""
    protocols: Annotated[tuple[Literal["tcp", "udp", "sctp"], ...], Constraint(min_length=1)] = ("tcp", "udp", "sctp")
    """The protocols that it allows."""
    at_most: Annotated[int, BeforeValidator(_count)] = 10
    """How many host ports a container may have by this rule."""


@dataclass(frozen=True)
class File(_Closed):
    """A whole file."""

    containerd: Containerd = Containerd()
    """Where containerd is, and what of it is looked at."""
    firewall: Firewall = Firewall()
    """How the rules get into the kernel, under which name, and where."""
    metrics: Metrics = Metrics()
    """What is measured, for Prometheus."""
    networks: tuple[Network, ...] = ()
    """Bridges to run the Docker way: masqueraded, apart from one another, reached by published ports alone."""
    publish: tuple[Entry, ...] = ()
    """What is published. Files of `conf.d` add entries to it."""
    containers_may_publish: tuple[MayPublish, ...] = ()
    """What containers may publish by themselves. Nothing, until a rule allows it: a label may come from the image,
    an annotation from whoever may create pods."""


SCHEMA = TypeAdapter(File)

#: What is expected at each place of the schema; also the one list of the keys there are.
EXPECTED = {
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
