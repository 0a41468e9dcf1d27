"""The end of the way: the container, what listens in it, and the way of its answer back. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..model import Address, Protocol
from .cases import Case, Noted
from .facts import Inhabitant, Next, NoRoute, RouteTo, Socket
from .fate import Cause, Fate, Outcome
from .packet import Packet
from .way import Hops, Way, serves

#: How many of the ports that a container listens on are named.
_MOST = 5


def arrived(way: Way, case: Case, device: str, *, asked: bool = True) -> Iterator[Fate]:
    """Return how a packet ends that leaves the node by ``device`` for an address on that link.

    ``asked`` is whether the node's rules were asked about it, and will be about the answer.
    """
    bridged = not asked
    address = case.packet.destination.address
    who = way.facts.inhabitant(address)
    if who is None:
        yield Fate(Outcome.UNKNOWN, Cause.STRANGER, case, words={"address": str(address), "device": device})
        return
    if case.packet.in_device == device and not bridged:
        bridging = way.facts.bridging(device, address)
        bridged = bridging.bridge and bridging.filtered
        itself = case.packet.flow.source.address == address
        if bridged and itself and bridging.hairpin is False:
            yield Fate(Outcome.FAILS, Cause.HAIRPIN, case, who=who, words={"port": bridging.port or ""})
            return
    if who.paused:
        yield Fate(Outcome.FAILS, Cause.PAUSED, case, who=who)
        return
    if case.packet.protocol is Protocol.SCTP:
        yield Fate(Outcome.UNKNOWN, Cause.SOCKETS_UNSEEN, case, who=who)
        return
    socket = _listening(case, who)
    if isinstance(socket, Fate):
        yield socket
        return
    case = case.came_by(Noted(f"container {who.name}", f"listens on {socket}", way.facts.holder(socket)))
    source = case.packet.source.address
    if source == address or source.is_loopback:
        yield Fate(Outcome.FAILS, Cause.OWN_ADDRESS, case, who=who)
    elif not bridged:
        yield from _answered(way, case, who, device)
    elif not asked:
        yield Fate(Outcome.WORKS, Cause.CONTAINER, case, who=who)
    else:
        back = (("prerouting", device, None), ("forward", device, device), ("postrouting", device, device))
        yield from _ended(way, case, who, case.packet.answer(device), back, back)


def _listening(case: Case, who: Inhabitant) -> Socket | Fate:
    """Return the socket that takes it, or how it ends where there is none."""
    packet = case.packet
    sockets = [its for protocol, its in who.sockets if protocol is packet.protocol]
    at_port = [its for its in sockets if packet.destination.ports.first <= its.port <= packet.destination.ports.last]
    for its in sorted(at_port, key=lambda its: its.address.is_unspecified):
        if serves(its, packet.destination.address):
            return its
    if at_port:
        words = {"at": ", ".join(sorted({str(its.address) for its in at_port}))}
        return Fate(Outcome.FAILS, Cause.LOOPBACK_ONLY, case, who=who, words=words)
    ports = sorted({its.port for its in sockets if serves(its, packet.destination.address)})
    named = ", ".join(map(str, ports[:_MOST])) + (", ..." if len(ports) > _MOST else "")
    return Fate(Outcome.FAILS, Cause.NOT_LISTENING, case, who=who, words={"ports": named})


def _answered(way: Way, case: Case, who: Inhabitant, device: str) -> Iterator[Fate]:
    """Return whether the answer finds its way back, through the node and to whoever asked."""
    packet = case.packet
    receiver = packet.source.address
    if packet.flow.masked and packet.flow.mask is None:
        receiver = way.facts.address_of(device, packet.family) or receiver
    onward = _route(who, receiver)
    if onward is None:
        yield _astray(case, Cause.NO_WAY_BACK, who, receiver)
        return
    comes_by = device
    if onward.gateway is None:
        to_node = way.facts.is_own(receiver) or packet.flow.translated is None
        if not to_node:
            yield _astray(case, Cause.PAST_NODE, who, receiver)
            return
    elif device in way.facts.bridges:
        # Behind a routed veth there is nobody but the node, whatever the gateway is called.
        if not way.facts.is_own(onward.gateway):
            yield replace(_astray(case, Cause.NO_WAY_BACK, who, receiver), words={"gateway": str(onward.gateway)})
            return
        comes_by = _device_of(way, onward.gateway) or device
    yield from _home(way, case, who, comes_by)


def _home(way: Way, case: Case, who: Inhabitant, device: str) -> Iterator[Fate]:
    """Send the answer through the node, which it comes to by ``device``."""
    packet = case.packet
    answer, client = packet.answer(device), packet.flow.source.address
    route = way.facts.route(RouteTo(client, answer.source.address, device))
    if isinstance(route, NoRoute):
        refused = way.not_routed(replace(case, packet=replace(answer, destination=packet.flow.source)), route)
        yield replace(refused, case=case, who=who, answer=True)
        return
    local, out = route.kind == "local", route.device
    back: Hops = (("input", device, None),) if local else (("forward", device, out), ("postrouting", device, out))
    later: Hops = (("prerouting", packet.in_device, None), ("forward", packet.in_device, packet.out_device))
    if packet.in_device is None:
        # Until it is translated it is one to the node itself.
        own = way.facts.is_own(packet.flow.destination.address)
        later = (("output", None, "lo" if own else packet.out_device),)
    later += (("postrouting", packet.in_device, packet.out_device),)
    note = Noted("answer", f"back to {client} {'to the node itself' if local else f'by {out}'}")
    for fate in _ended(way, case, who, answer, (("prerouting", device, None), *back), later):
        yield replace(fate, case=fate.case.came_by(note)) if fate.outcome is Outcome.WORKS else fate


def _ended(way: Way, case: Case, who: Inhabitant, answer: Packet, back: Hops, later: Hops) -> Iterator[Fate]:
    cases, fates = way.follow(case, answer, back, later)
    yield from (replace(fate, who=who) for fate in fates)
    yield from (Fate(Outcome.WORKS, Cause.CONTAINER, each, who=who) for each in cases)


def _astray(case: Case, cause: Cause, who: Inhabitant, receiver: Address) -> Fate:
    return Fate(Outcome.FAILS, cause, case, who=who, answer=True, words={"receiver": str(receiver)})


def _route(who: Inhabitant, receiver: Address) -> Next | None:
    """Return the container's own route to who asked."""
    fitting = [route for route in who.routes if receiver in route.network]
    return max(fitting, key=lambda route: route.network.prefixlen, default=None)


def _device_of(way: Way, address: Address) -> str | None:
    return next((name for name, its in way.facts.addresses if its.ip == address), None)
