"""What a packet meets at one place of the node: the chains of a hook, a route or none, a socket. Pure."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import replace

from ..model import Address, Family, Protocol
from .cases import Case, Verdict
from .facts import Facts, NoRoute, Route, RouteTo, Socket
from .fate import Cause, Fate, Outcome
from .packet import Packet
from .traverse import Hooks


class Way:
    """The node, as far as packets go through it."""

    def __init__(self, facts: Facts, hooks: Hooks) -> None:
        self.facts = facts
        self._hooks = hooks

    def through(
        self, case: Case, hook: str, *, out: str | None = None, translates: bool = True, answer: bool = False
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
                fates.append(_stopped(after, verdict, answer))
        return cases, fates

    def back(self, answer: Packet, hooks: Iterable[tuple[str, str | None]]) -> tuple[list[Case], list[Fate]]:
        """Send an answer through hooks, one after the other, each with the device that it goes out by."""
        cases, fates = [Case(answer)], list[Fate]()
        for hook, out in hooks:
            going_on: list[Case] = []
            for case in cases:
                after, ended = self.through(case, hook, out=out, translates=False, answer=True)
                going_on += after
                fates += ended
            cases = going_on
        return cases, fates

    def forwards_ipv6(self, device: str) -> bool:
        """Whether it sends on what comes in by a device: of IPv6 its routes do not tell."""
        settings = ("net/ipv6/conf/all/forwarding", f"net/ipv6/conf/{device}/force_forwarding")
        return any(self.facts.number(setting) for setting in settings)

    def rp_filter(self, device: str) -> int:
        """Return how IPv4 checks whether the way back leads by the device: 0 not at all, 1 strictly, 2 loosely."""
        return max(self.facts.number(f"net/ipv4/conf/{each}/rp_filter") for each in ("all", device))

    def not_routed(self, case: Case, refused: NoRoute, *, answer: bool = False) -> Fate:
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
        return Fate(Outcome.FAILS, cause, case, answer=answer, words=words)

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
        if self.facts.is_own(source):
            return Cause.MARTIAN, {"device": device}
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


def _stopped(case: Case, verdict: Verdict, answer: bool) -> Fate:
    if verdict.kind == "untold":
        return Fate(Outcome.UNKNOWN, Cause.UNTOLD, case, verdict.at, answer=answer)
    if answer:
        return Fate(Outcome.FAILS, Cause.ANSWER_DROPPED, case, verdict.at, answer=True)
    return Fate(Outcome.FAILS, Cause.DROPPED if verdict.kind == "drop" else Cause.REJECTED, case, verdict.at)
