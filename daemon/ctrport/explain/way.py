"""What a packet meets at one place of the node: the chains of a hook, a route or none, a socket. Pure."""

from __future__ import annotations

import errno
from dataclasses import replace

from ..model import Address, Family, Protocol
from .cases import Case, Verdict, did
from .facts import Facts, NoRoute, Route, RouteTo, Socket
from .fate import Cause, Fate, Outcome
from .packet import Packet, Turn
from .traverse import Hooks

#: Hooks in a row, each with the devices that a packet comes in and goes out by there.
Hops = tuple[tuple[str, str | None, str | None], ...]


class Way:
    """The node, as far as packets go through it."""

    def __init__(self, facts: Facts, hooks: Hooks) -> None:
        self.facts = facts
        self._hooks = hooks

    def through(
        self, case: Case, hook: str, *, out: str | None = None, translates: bool = True
    ) -> tuple[list[Case], list[Fate]]:
        """Send a case through a hook: what comes out, and what ended there; ``out`` is the device it goes on by."""
        if out is not None:
            case = replace(case, packet=replace(case.packet, out_device=out))
        cases: list[Case] = []
        fates: list[Fate] = []
        for after, verdict in self._hooks.run(case, hook, self.facts, translates=translates):
            if verdict is None:
                cases.append(after)
            else:
                fates.append(_stopped(after, verdict))
        return cases, fates

    def follow(self, case: Case, answer: Packet, back: Hops, later: Hops) -> tuple[list[Case], list[Fate]]:
        """Send the answer to a packet ``back``, and the next one behind that packet; return how the case stands then.

        Twice, as each may leave a mark on the flow that the next one meets. What the chains do to them is told only
        where one of them ends.
        """
        if case.packet.flow.state == "untracked":
            # What is made of the next ones, that are answers to nothing, is anybody's guess.
            return [], [Fate(Outcome.UNKNOWN, Cause.UNTRACKED, case, did(case, "untrack"))]
        cases, fates = [case], list[Fate]()
        for packet, hops in 2 * ((answer, back), (case.packet.later(), later)):
            following: list[Case] = []
            for each in cases:
                after, ended = self._along(packet.behind(each.packet), hops)
                fates += [replace(fate, case=fate.case.after(each), answer=True) for fate in ended]
                following += [replace(one, trail=()).after(each) for one in after]
            cases = following
        return [replace(each, packet=case.packet) for each in cases], fates

    def _along(self, packet: Packet, hops: Hops) -> tuple[list[Case], list[Fate]]:
        """Send a packet that is not the first through hooks, one after the other."""
        cases, fates = [Case(packet)], list[Fate]()
        for hook, in_device, out_device in hops:
            going_on: list[Case] = []
            for case in cases:
                there = replace(case.packet, in_device=in_device, out_device=out_device)
                after, ended = self.through(replace(case, packet=there), hook, translates=False)
                going_on += after
                fates += ended
            cases = going_on
        # What connection tracking is told to leave alone, it does not translate back.
        lost = [case for case in cases if case.packet.flow.state == "untracked" and case.packet.flow.is_translated]
        fates += [Fate(Outcome.FAILS, Cause.UNTRACKED, case, did(case, "untrack")) for case in lost]
        return [case for case in cases if case not in lost], fates

    def forwards_ipv6(self, device: str) -> bool:
        """Whether it sends on what comes in by a device: of IPv6 its routes do not tell."""
        settings = ("net/ipv6/conf/all/forwarding", f"net/ipv6/conf/{device}/force_forwarding")
        return any(self.facts.number(setting) for setting in settings)

    def rp_filter(self, device: str) -> int:
        """Return how IPv4 checks whether the way back leads by the device: 0 not at all, 1 strictly, 2 loosely."""
        return max(self.facts.number(f"net/ipv4/conf/{each}/rp_filter") for each in ("all", device))

    def not_routed(self, case: Case, refused: NoRoute) -> Fate:
        """Return why the kernel sends it nowhere: it checks many things, and says little more than that one failed."""
        packet = case.packet
        device = packet.in_device
        cause, words = Cause.NO_ROUTE, {"error": errno.errorcode.get(refused.error, str(refused.error))}
        if packet.family is Family.IPV4 and refused.error in (errno.EINVAL, errno.EXDEV):
            cause, words = self._refused(packet, words)
        elif packet.family is Family.IPV4 and refused.error == errno.EHOSTUNREACH and self._keeps(device):
            everywhere = not self.facts.number("net/ipv4/ip_forward")
            setting = "net.ipv4.ip_forward" if everywhere else f"net.ipv4.conf.{device}.forwarding"
            cause, words = Cause.FORWARDING, {"setting": setting}
        return Fate(Outcome.FAILS, cause, case, words=words)

    def _keeps(self, device: str | None) -> bool:
        """Whether IPv4 sends nothing on that comes in by a device."""
        return device is not None and not self.facts.number(f"net/ipv4/conf/{device}/forwarding")

    def _refused(self, packet: Packet, words: dict[str, str]) -> tuple[Cause, dict[str, str]]:
        """Return what IPv4 has against where a packet comes from, or goes to."""
        device, source, destination = packet.in_device, packet.source.address, packet.destination.address
        if source.is_loopback or destination.is_loopback:
            by = device or self.facts.device_to(destination if source.is_loopback else source) or ""
            if not any(self.facts.number(f"net/ipv4/conf/{each}/route_localnet") for each in ("all", by)):
                return Cause.ROUTE_LOCALNET, {"device": by}
        if device is None:
            return Cause.NO_ROUTE, words
        mode, back = self.rp_filter(device), self.facts.route(RouteTo(source))
        by = back.device if isinstance(back, Route) and back.kind == "unicast" else ""
        if mode and (not by or (mode == 1 and by != device)):
            return Cause.RP_FILTER, {"device": device, "back": by, "mode": str(mode)}
        return Cause.NO_ROUTE, words

    def socket(self, packet: Packet) -> Socket | None:
        """Return who answers at the node itself; ctrport's own sockets answer nobody."""
        if packet.protocol is Protocol.SCTP or packet.destination.port is None:
            return None
        found = self.facts.sockets(packet.protocol, packet.destination.port)
        served = [its for its in found if serves(its, packet.destination.address)]
        served = [its for its in served if not self.facts.keeps(packet.protocol, its)]
        return min(served, key=lambda its: its.address.is_unspecified, default=None)


def serves(socket: Socket, address: Address) -> bool:
    """Whether a socket takes what is sent to an address of the host that it is on.

    One at :: takes IPv4 as well, unless its program does not want that (IPV6_V6ONLY), which is not seen. Then it has
    another socket for IPv4, or means it.
    """
    its = socket.address
    if its.is_unspecified:
        return its.version == 6 or address.version == 4
    return address in (its, its.ipv4_mapped if its.version == 6 else None)


def _stopped(case: Case, verdict: Verdict) -> Fate:
    if verdict.kind == "untold":
        return Fate(Outcome.UNKNOWN, Cause.UNTOLD, case, verdict.at)
    first = Cause.DROPPED if verdict.kind == "drop" else Cause.REJECTED
    causes = {Turn.FIRST: first, Turn.ANSWER: Cause.ANSWER_DROPPED, Turn.LATER: Cause.LATER_DROPPED}
    return Fate(Outcome.FAILS, causes[case.packet.flow.turn], case, verdict.at)
