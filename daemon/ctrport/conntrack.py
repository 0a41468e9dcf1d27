"""Flows that outlive their mapping: connection tracking keeps sending them where they went.

A flow is looked up in the rules only once, at its first packet. So a UDP client that went on sending while there was no
rule never meets the rule, and one whose container moved keeps sending into the void. After rules came or went, the
flows that they would have decided otherwise are removed; the next packet of each is looked up anew.

A look at the flows takes long where there are many, so it has a thread. Most of it is the kernel's time.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .ctnetlink import Flow, Flows, GivenUp, Patience, Ports
from .model import Address, Attachment, Family, Mapping, PortRange, Protocol
from .nlmsg import Interrupted

T = TypeVar("T")

#: Seconds that a look at the flows of one family, and the removal of some, may take before it is given up.
TIMEOUT = 10.0
#: How often flows are listed again that changed all the while.
TRIES = 5


class ConntrackError(Exception):
    """Flows could not be listed or removed; the message is one sentence for people."""


@dataclass(frozen=True)
class Opened:
    """A mapping whose rules were put in: flows to its host ports belong to ``attachment`` from now on."""

    mapping: Mapping
    attachment: Attachment

    @property
    def families(self) -> tuple[Family, ...]:
        """Of which families its flows are."""
        return (Family.of(self.attachment.address),)

    def serves(self, flow: Flow, node: Collection[Address]) -> bool:
        """Whether ``flow`` is as the rule has it."""
        return _to_host_port(flow, self, node) and _leads_to(flow, self.mapping, self.attachment)

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


def _is_about(touched: Opened | Closed, protocol: Protocol, port: int) -> bool:
    """Whether it is a host port of the mapping."""
    ports = touched.mapping.host_ports
    return protocol is touched.mapping.protocol and ports is not None and ports.first <= port <= ports.last


def _to_host_port(flow: Flow, touched: Opened | Closed, node: Collection[Address]) -> bool:
    """Whether a flow was sent to a host port of the mapping: at the node, not just through it to another host."""
    mapping = touched.mapping
    if not _is_about(touched, flow.protocol, flow.port):
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
    ports = {protocol: [PortRange(port, port)]}
    return await _beside(family, lambda patience: _listed(family, ports, patience))


async def drop_stale(touched: Sequence[Opened | Closed], node: Collection[Address]) -> int:
    """Remove the flows that ``touched`` mappings made stale, and return how many that were.

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
    ports = _ports(touched)
    if not ports:
        return 0

    def drop(patience: Patience) -> int:
        return _remove(_stale(touched, _listed(family, ports, patience), node, patience), patience)

    return await _beside(family, drop)


def _stale(
    touched: Sequence[Opened | Closed], flows: Sequence[Flow], node: Collection[Address], patience: Patience
) -> list[Flow]:
    """Return which flows are stale. Thousands may have been touched, so each flow meets those of its port alone."""
    of_port: dict[tuple[Protocol, int], list[Opened | Closed]] = {}
    stale = []
    for flow in flows:
        patience.check()
        where = flow.protocol, flow.port
        if where not in of_port:
            of_port[where] = [one for one in touched if _is_about(one, *where)]
        # The last word counts: what a mapping that came serves as it is, was not cut by the end of one before.
        for one in reversed(of_port[where]):
            if one.is_stale(flow, node):
                stale.append(flow)
                break
            if isinstance(one, Opened) and one.serves(flow, node):
                break
    return stale


def _ports(touched: Sequence[Opened | Closed]) -> Ports:
    """Return the host ports whose flows are to be looked at."""
    ports: dict[Protocol, list[PortRange]] = {}
    for one in touched:
        if one.mapping.host_ports is not None:
            ports.setdefault(one.mapping.protocol, []).append(one.mapping.host_ports)
    return ports


async def _beside(family: Family, work: Callable[[Patience], T]) -> T:
    """Have it done in a thread, which ends soon after this is cancelled. Raises ``ConntrackError``."""
    patience = Patience(TIMEOUT)
    try:
        return await asyncio.to_thread(work, patience)
    except GivenUp as error:
        raise _failed(family, f"it took longer than {TIMEOUT:.0f} s") from error
    except Interrupted as error:
        raise _failed(family, "they changed all the while") from error
    except OSError as error:
        raise _failed(family, _WHY.get(error.errno or 0) or error.strerror or "the kernel does not answer") from error
    finally:
        patience.end()


def _failed(family: Family, why: str) -> ConntrackError:
    return ConntrackError(
        f"flows of IPv{family.value} could not be looked at: {why}: "
        "UDP flows may go on where their mapping no longer leads"
    )


_NO_CTNETLINK = "this kernel has no ctnetlink (module nf_conntrack_netlink)"
_WHY = {
    errno.EPERM: "it takes CAP_NET_ADMIN",
    # Of nfnetlink a part that is not there and cannot be loaded, and no nfnetlink at all.
    errno.EINVAL: _NO_CTNETLINK,
    errno.EPROTONOSUPPORT: _NO_CTNETLINK,
}
#: What is over by itself: the kernel had no memory at hand, or something came between.
_PASSING = (errno.ENOBUFS, errno.EINTR, errno.EAGAIN)


def _listed(family: Family, ports: Ports, patience: Patience) -> list[Flow]:
    for left in reversed(range(TRIES)):
        try:
            # A socket of its own for each list: what was not read of one ends with it.
            with contextlib.closing(Flows()) as flows:
                return list(flows.to(family, ports, patience))
        except Interrupted:
            if not left:
                raise
        except OSError as error:
            if not left or error.errno not in _PASSING:
                raise
    raise AssertionError  # pragma: no cover - the last turn returned or raised


def _remove(stale: Sequence[Flow], patience: Patience) -> int:
    """Remove flows, also the others where one cannot be removed; return how many were there still."""
    if not stale:
        return 0
    removed, kept = 0, 0
    why = ""
    with contextlib.closing(Flows()) as flows:
        for one in stale:
            patience.check()
            try:
                removed += flows.remove(one)
            except OSError as error:
                kept, why = kept + 1, why or error.strerror or "the kernel does not answer"
    if kept:
        raise ConntrackError(f"{kept} of {len(stale)} flows that lead astray could not be removed: {why}")
    return removed
