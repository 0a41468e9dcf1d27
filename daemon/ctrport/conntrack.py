"""Flows that outlive their mapping: connection tracking keeps sending them where they went.

A flow is looked up in the rules only once, at its first packet. So a UDP client that went on sending while there was no
rule never meets the rule, and one whose container moved keeps sending into the void. After rules came or went, the
flows that they would have decided otherwise are removed; the next packet of each is looked up anew.

Reads and removes flows with the program ``conntrack``, which kubeadm wants on every node too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from .model import Address, Attachment, Family, Mapping, PortRange, Protocol
from .programs import ProgramError, run

#: Seconds that listing or removing flows may take before it is given up.
TIMEOUT = 10.0


class ConntrackError(Exception):
    """Flows could not be listed or removed; the message is one sentence for people."""


@dataclass(frozen=True)
class Flow:
    """One tracked flow: where its first packet went, and where its answers come from."""

    protocol: Protocol
    destination: Address
    port: int
    reply_source: Address
    reply_port: int

    @property
    def translated(self) -> bool:
        """Whether the flow's destination was translated."""
        return self.reply_source != self.destination


@dataclass(frozen=True)
class Opened:
    """A mapping whose rules were put in: flows to its host ports belong to ``attachment`` from now on."""

    mapping: Mapping
    attachment: Attachment

    @property
    def families(self) -> tuple[Family, ...]:
        """Of which families its flows are."""
        return (Family.of(self.attachment.address),)

    def is_stale(self, flow: Flow, node: Collection[Address]) -> bool:
        """Whether ``flow`` was decided without the rule.

        A TCP connection to a program on the host itself is left alone: it was there first, and is not of the mapping.
        """
        if not _to_host_port(flow, self, node) or _leads_to(flow, self.mapping, self.attachment):
            return False
        return flow.translated or flow.protocol is not Protocol.TCP


@dataclass(frozen=True)
class Closed:
    """A mapping whose rules were taken away: no flow through it may go on.

    ``attachment`` is None where the rules were an earlier run's, and where they led is not known. Where other rules
    came in their place, for others than before perhaps, TCP ``connections`` are left alone.
    """

    mapping: Mapping
    attachment: Attachment | None
    connections: bool = True

    @property
    def families(self) -> tuple[Family, ...]:
        """Of which families its flows are; where that is not known, of which they can be."""
        return self.mapping.families if self.attachment is None else (Family.of(self.attachment.address),)

    def is_stale(self, flow: Flow, node: Collection[Address]) -> bool:
        """Whether ``flow`` went through the mapping."""
        if not _to_host_port(flow, self, node) or (flow.protocol is Protocol.TCP and not self.connections):
            return False
        return flow.translated if self.attachment is None else _leads_to(flow, self.mapping, self.attachment)


def _leads_to(flow: Flow, mapping: Mapping, attachment: Attachment) -> bool:
    """Whether a flow to a host port of the mapping goes where the mapping sends it."""
    assert mapping.host_ports is not None
    offset = mapping.container_ports.first - mapping.host_ports.first
    return flow.reply_source == attachment.address and flow.reply_port == flow.port + offset


def _to_host_port(flow: Flow, touched: Opened | Closed, node: Collection[Address]) -> bool:
    """Whether a flow was sent to a host port of the mapping: at the node, not just through it to another host."""
    mapping, ports = touched.mapping, touched.mapping.host_ports
    if flow.protocol is not mapping.protocol or ports is None or not ports.first <= flow.port <= ports.last:
        return False
    if Family.of(flow.destination) not in touched.families:
        return False
    if not mapping.any_host_ip:
        return flow.destination == mapping.host_ip
    if flow.destination.is_loopback:
        return flow.destination.version == 4  # no rule is about ::1
    return flow.destination in node


def tracked() -> frozenset[Protocol]:
    """Return the protocols whose connections this kernel tracks: without, nothing of them can be translated.

    A kernel that tracks nothing yet, as no rule asked for it, is taken to track all.
    """
    if not _SETTINGS.exists() or (_SETTINGS / "nf_conntrack_sctp_timeout_closed").exists():
        return frozenset(Protocol)
    return frozenset({Protocol.TCP, Protocol.UDP})


_SETTINGS = Path("/proc/sys/net/netfilter")


async def to_port(protocol: Protocol, family: Family, port: int) -> list[Flow]:
    """Return the flows that were sent to a port of any address. Raises ``ConntrackError``."""
    kind = ("-f", f"ipv{family.value}", "-p", protocol.value)
    return list(parse(await _run("-L", *kind, "--orig-port-dst", str(port))))


async def drop_stale(touched: Sequence[Opened | Closed], node: Collection[Address]) -> int:
    """Remove the flows that ``touched`` mappings made stale, and return how many kinds of flow that were.

    ``node`` are the node's own addresses. Raises ``ConntrackError``, but does in the other family what can be done;
    what was removed stays so.
    """
    removed = 0
    failed: ConntrackError | None = None
    for family in Family:
        try:
            removed += await _drop_stale([one for one in touched if family in one.families], node, family)
        except ConntrackError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return removed


async def _drop_stale(touched: Sequence[Opened | Closed], node: Collection[Address], family: Family) -> int:
    removed = 0
    for protocol in sorted({one.mapping.protocol for one in touched}):
        ours = [one for one in touched if one.mapping.protocol is protocol]
        # Said each time: what conntrack takes where it is not said differs between its versions.
        kind = ("-f", f"ipv{family.value}", "-p", protocol.value)
        flows = parse(await _run("-L", *kind, *_narrowed(ours)))
        stale = {flow for flow in flows if any(one.is_stale(flow, node) for one in ours)}
        for key in sorted({_key(flow) for flow in stale}):
            await _run("-D", *kind, *key)
            removed += 1
    return removed


def _narrowed(touched: Sequence[Opened | Closed]) -> list[str]:
    """Return the filter that lists no more than needed, where conntrack has one for it."""
    ports = {one.mapping.host_ports for one in touched}
    match list(ports):
        case [PortRange(first, last)] if first == last:
            return ["--orig-port-dst", str(first)]
    return []


def _key(flow: Flow) -> tuple[str, ...]:
    """Return what names all flows like this one: the port alone would cut other people's, such as a sibling's DNS."""
    return (
        *("--orig-port-dst", str(flow.port), "--orig-dst", str(flow.destination)),
        *("--reply-src", str(flow.reply_source), "--reply-port-src", str(flow.reply_port)),
    )


_FLOW = re.compile(
    r"^(?P<protocol>\w+) .*?src=\S+ dst=(?P<destination>\S+) sport=\d+ dport=(?P<port>\d+) "
    r".*?src=(?P<reply_source>\S+) dst=\S+ sport=(?P<reply_port>\d+) dport=\d+",
    re.MULTILINE,
)


def parse(text: str) -> Iterator[Flow]:
    """Read what ``conntrack -L`` prints."""
    for found in _FLOW.finditer(text):
        yield Flow(
            Protocol(found["protocol"]),
            ip_address(found["destination"]),
            int(found["port"]),
            ip_address(found["reply_source"]),
            int(found["reply_port"]),
        )


async def _run(*argv: str) -> str:
    try:
        ended = await run("conntrack", *argv, timeout=TIMEOUT)
    except ProgramError as error:
        raise ConntrackError(f"{error}: UDP flows may go on where their mapping no longer leads") from error
    # Status 1 with "0 flow entries" is its way to say that none matched: another may have removed them first.
    if ended.status != 0 and "0 flow entries" not in ended.err:
        raise ConntrackError(f"conntrack {argv[0]} failed: {' '.join(ended.err.split())}")
    return ended.out
