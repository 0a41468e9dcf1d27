"""The way of a packet through the node, as the kernel takes it. Pure.

    from elsewhere   ingress, prerouting, route, forward or input, postrouting
    from the node    route, output, route again, postrouting; to itself then prerouting and input by lo

Each turn hands on the cases that are left, so that there is a fate for each in the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..model import Family
from .arrival import arrived
from .cases import Case, Noted
from .facts import Facts, NoRoute, Route, RouteTo
from .fate import Cause, Fate, Outcome
from .packet import Packet
from .question import Inquiry
from .traverse import Hooks
from .way import Hops, Way


def walk(inquiry: Inquiry, facts: Facts, hooks: Hooks) -> list[Fate]:
    """Return how the packet ends, in each of the cases that cannot be told apart. Raises ``Ask``."""
    way, case = Way(facts, hooks), Case(inquiry.packet)
    return list(_from_node(way, case) if inquiry.origin == "node" else _from_elsewhere(way, case))


def _from_elsewhere(way: Way, case: Case) -> Iterator[Fate]:
    device = case.packet.in_device or ""
    if _goes_past(way, case.packet):
        note = Noted(f"bridge {device}", "goes by the bridge, past the node and its rules")
        yield from arrived(way, case.came_by(note), device, asked=False)
        return
    begun, fates = way.through(case, "ingress", translates=False)
    yield from fates
    for each in begun:
        routed, fates = way.through(each, "prerouting")
        yield from fates
        for after in routed:
            yield from _routed(way, after)


def _goes_past(way: Way, packet: Packet) -> bool:
    """Whether a bridge that both ends are at sends it on without any table of iptables being asked."""
    source, destination = packet.source.address, packet.destination.address
    if packet.in_device not in way.facts.bridges or way.facts.is_own(destination):
        return False
    its = [network.network for name, network in way.facts.addresses if name == packet.in_device]
    if not any(source in network and destination in network for network in its):
        return False
    return not way.facts.bridging(packet.in_device, destination).filtered


def _routed(way: Way, case: Case) -> Iterator[Fate]:
    packet = case.packet
    there = RouteTo(packet.destination.address, packet.source.address, packet.in_device, packet.mark or 0)
    route = way.facts.route(there)
    if isinstance(route, NoRoute):
        yield way.not_routed(case, route)
    elif route.kind == "local":
        yield from _to_node(way, case.came_by(Noted("route", "to the node itself")))
    elif route.kind != "unicast":
        yield Fate(Outcome.FAILS, Cause.NO_ROUTE, case, words={"error": route.kind})
    elif packet.family is Family.IPV6 and not way.forwards_ipv6(packet.in_device or ""):
        yield Fate(Outcome.FAILS, Cause.FORWARDING, case, words={"setting": "net.ipv6.conf.all.forwarding"})
    else:
        taken = ""
        if packet.family is Family.IPV4 and packet.in_device is not None:
            taken = f"; its source is taken from {packet.in_device} (rp_filter {way.rp_filter(packet.in_device)})"
        cases, fates = way.through(case.came_by(Noted("route", _by(route) + taken)), "forward", out=route.device)
        yield from fates
        for after in cases:
            yield from _leaves(way, after, route)


def _from_node(way: Way, case: Case) -> Iterator[Fate]:
    packet = case.packet
    first = way.facts.route(RouteTo(packet.destination.address, packet.source.address))
    if isinstance(first, NoRoute):
        yield way.not_routed(case, first)
        return
    cases, fates = way.through(case, "output", out=_out(first))
    yield from fates
    for after in cases:
        sent, route = after.packet, first
        if sent.destination != packet.destination or sent.mark != packet.mark:
            changed = way.facts.route(RouteTo(sent.destination.address, sent.source.address, None, sent.mark or 0))
            if isinstance(changed, NoRoute):
                yield way.not_routed(after, changed)
                continue
            route = changed
        if route.kind == "local":
            yield from _to_itself(way, after.came_by(Noted("route", "to the node itself, by lo")))
        elif route.kind != "unicast":
            yield Fate(Outcome.FAILS, Cause.NO_ROUTE, after, words={"error": route.kind})
        else:
            yield from _leaves(way, after.came_by(Noted("route", _by(route))), route)


def _to_itself(way: Way, case: Case) -> Iterator[Fate]:
    cases, fates = way.through(case, "postrouting", out="lo")
    yield from fates
    for after in cases:
        # Connection tracking knows the flow by then: nothing translates it once more.
        looped = replace(after, packet=replace(after.packet, in_device="lo", out_device=None))
        come, fates = way.through(looped, "prerouting", translates=False)
        yield from fates
        for each in come:
            yield from _to_node(way, each)


def _leaves(way: Way, case: Case, route: Route) -> Iterator[Fate]:
    cases, fates = way.through(case, "postrouting", out=route.device)
    yield from fates
    for after in cases:
        if route.gateway is not None:
            words = {"gateway": str(route.gateway), "device": route.device}
            yield Fate(Outcome.UNKNOWN, Cause.BEYOND, after, words=words)
        else:
            yield from arrived(way, after, route.device)


def _to_node(way: Way, case: Case) -> Iterator[Fate]:
    cases, fates = way.through(case, "input")
    yield from fates
    for after in cases:
        socket = way.socket(after.packet)
        if (after.packet.protocol, after.packet.destination.port) in way.facts.ipvs:
            yield Fate(Outcome.UNKNOWN, Cause.IPVS, after)  # it comes before any socket
            continue
        if socket is None:
            yield Fate(Outcome.FAILS, Cause.NOBODY, after)
            continue
        after = after.came_by(Noted("the node itself", f"listens on {socket}", way.facts.holder(socket)))
        if after.packet.in_device == "lo":
            loop: Hops = (("output", None, "lo"), ("postrouting", None, "lo"), ("prerouting", "lo", None))
            loop += (("input", "lo", None),)
            cases, fates = way.follow(after, after.packet.answer(None), loop, loop)
        else:
            cases, fates = _node_answers(way, after)
        yield from (replace(fate, socket=socket) for fate in fates)
        yield from (Fate(Outcome.WORKS, Cause.PROGRAM, each, socket=socket) for each in cases)


def _node_answers(way: Way, case: Case) -> tuple[list[Case], list[Fate]]:
    answer, device = case.packet.answer(None), case.packet.in_device
    route = way.facts.route(RouteTo(answer.destination.address, answer.source.address))
    if isinstance(route, NoRoute):
        return [], [Fate(Outcome.FAILS, Cause.NO_WAY_BACK, case, answer=True)]
    back: Hops = (("output", None, route.device), ("postrouting", None, route.device))
    return way.follow(case, answer, back, (("prerouting", device, None), ("input", device, None)))


def _by(route: Route) -> str:
    return f"by {route.device}" + (f" to the gateway {route.gateway}" if route.gateway is not None else "")


def _out(route: Route) -> str:
    return "lo" if route.kind == "local" else route.device
