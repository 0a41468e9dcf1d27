"""A packet as rules see it, and the flow that connection tracking makes of it.

Pure. It is the first packet of a flow, the answer to that, or what comes behind. What is not known of it before it is
sent is told as such: of the port that a client will choose, between which it is; of a mark that nobody can work out,
nothing. So a rule that is asked whether it matches can answer that this cannot be told.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ..model import Address, Family, PortRange, Protocol

#: The ports of programs that ask for none in particular: what Linux gives them (net.ipv4.ip_local_port_range).
CLIENT_PORTS = PortRange(32768, 60999)
#: What IP calls the protocols (/etc/protocols).
NUMBERS = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}


class Field(enum.Enum):
    """What rules compare, in words like nft's."""

    FAMILY = "meta nfproto"
    PROTOCOL = "meta l4proto"
    SOURCE = "saddr"
    DESTINATION = "daddr"
    SOURCE_PORT = "sport"
    DESTINATION_PORT = "dport"
    IN_DEVICE = "iifname"
    OUT_DEVICE = "oifname"
    PACKET_TYPE = "pkttype"
    TCP_FLAGS = "tcp flags"
    MARK = "mark"
    CT_MARK = "ct mark"
    STATE = "ct state"
    DIRECTION = "ct direction"
    ORIGINAL_SOURCE = "ct original saddr"
    ORIGINAL_DESTINATION = "ct original daddr"
    ORIGINAL_SOURCE_PORT = "ct original proto-src"
    ORIGINAL_DESTINATION_PORT = "ct original proto-dst"
    REPLY_SOURCE = "ct reply saddr"
    REPLY_DESTINATION = "ct reply daddr"
    REPLY_SOURCE_PORT = "ct reply proto-src"
    REPLY_DESTINATION_PORT = "ct reply proto-dst"


#: Where a number is: between these two, both included.
Span = tuple[int, int]


class Absent:
    """What a packet has for a field that it has not: of connection tracking before that has looked for its flow.

    A comparison with it does not hold, whichever it is.
    """


ABSENT = Absent()
#: What a packet has for a field: a number as far as it is known, or a name. None: nothing is known of it.
Reading = Span | str | Absent | None


class Turn(enum.Enum):
    """Which packet of its flow it is: the first, the answer to it, or the next of who sent the first."""

    FIRST = "first"
    ANSWER = "answer"
    LATER = "later"


@dataclass(frozen=True)
class Place:
    """Where packets go to or come from. Of ``ports`` one is meant, which is not known where there are several."""

    address: Address
    ports: PortRange

    @property
    def port(self) -> int | None:
        """The port, None where it is not known."""
        return self.ports.first if len(self.ports) == 1 else None

    def __str__(self) -> str:
        address = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{address}:{self.ports}"


@dataclass(frozen=True)
class Flow:
    """What connection tracking knows: where the first packet came from and went to, and what was translated since.

    ``state`` is nft's word for it, and ``invalid`` as long as the flow was not looked up. ``masked`` is whether its
    source was translated, to ``mask``; where that is None, or a ``mark`` is, it is not known. ``turn`` is that of the
    packet at hand; ``answered`` is whether an answer was tracked before it.
    """

    source: Place
    destination: Place
    state: str = "invalid"
    translated: Place | None = None
    masked: bool = False
    mask: Address | None = None
    mark: int | None = 0
    turn: Turn = Turn.FIRST
    answered: bool = False

    @property
    def tracked(self) -> bool:
        """Whether connection tracking has looked for it, and was not told to leave it alone."""
        return self.state not in ("invalid", "untracked")

    @property
    def is_translated(self) -> bool:
        """Whether something of it was."""
        return self.translated is not None or self.masked

    @property
    def status(self) -> frozenset[str]:
        """What was done to it, in nft's words."""
        done = {"dnat": self.translated is not None, "snat": self.masked}
        done |= {"seen-reply": self.answered or self.turn is Turn.ANSWER, "confirmed": self.turn is not Turn.FIRST}
        return frozenset(word for word, so in done.items() if so)


@dataclass(frozen=True)
class Packet:
    """One packet on its way. ``in_device`` and ``out_device`` are None where it has none, or none yet."""

    protocol: Protocol
    source: Place
    destination: Place
    flow: Flow
    in_device: str | None = None
    out_device: str | None = None
    mark: int | None = 0

    @classmethod
    def first(cls, protocol: Protocol, source: Address, destination: Address, port: int) -> Packet:
        """Return the first packet from a client to a port."""
        client, server = Place(source, CLIENT_PORTS), Place(destination, PortRange(port, port))
        return cls(protocol, client, server, Flow(client, server))

    @property
    def family(self) -> Family:
        """The family of its addresses."""
        return Family.of(self.destination.address)

    def looked_up(self) -> Packet:
        """Return it when connection tracking has looked for its flow."""
        if self.flow.state != "invalid":
            return self
        known = self.flow.answered or self.flow.turn is Turn.ANSWER
        return replace(self, flow=replace(self.flow, state="established" if known else "new"))

    def untracked(self) -> Packet:
        """Return it as one that connection tracking is told to leave alone, which comes too late for one it knows."""
        return self if self.flow.tracked else replace(self, flow=replace(self.flow, state="untracked"))

    def sent_to(self, place: Place) -> Packet:
        """Return it with its destination translated."""
        return replace(self, destination=place, flow=replace(self.flow, translated=place))

    def from_behind(self, mask: Address | None) -> Packet:
        """Return it with its source translated, to an address that may not be known: then it keeps its own here."""
        source = self.source if mask is None else Place(mask, CLIENT_PORTS)
        return replace(self, source=source, flow=replace(self.flow, masked=True, mask=mask))

    def answer(self, in_device: str | None) -> Packet:
        """Return what answers it, coming in by ``in_device``, or sent by the node itself where that is None.

        It goes to where the first packet seemed to come from, until that is undone.
        """
        flow = replace(self.flow, turn=Turn.ANSWER, state="invalid")
        return Packet(self.protocol, self.destination, self.source, flow, in_device)

    def later(self) -> Packet:
        """Return the next packet of who sent this one, as it is sent."""
        flow = replace(self.flow, turn=Turn.LATER, state="invalid")
        return Packet(self.protocol, flow.source, flow.destination, flow, self.in_device)

    def behind(self, other: Packet) -> Packet:
        """Return it with what another packet has made of its flow."""
        flow = other.flow
        answered = flow.answered or (flow.turn is Turn.ANSWER and flow.tracked)
        return replace(self, flow=replace(self.flow, mark=flow.mark, answered=answered))

    def rewritten(self, *, source: bool) -> Packet:
        """Return it as its flow has it translated: at some hooks its ``source`` is, at the others its destination."""
        flow = self.flow
        if not flow.tracked or flow.turn is Turn.FIRST:
            return self
        if flow.turn is Turn.ANSWER and source and flow.translated is not None:
            return replace(self, source=flow.destination)
        if flow.turn is Turn.ANSWER and not source and flow.masked:
            return replace(self, destination=flow.source)
        if flow.turn is Turn.LATER and source and flow.mask is not None:
            return replace(self, source=Place(flow.mask, CLIENT_PORTS))
        if flow.turn is Turn.LATER and not source and flow.translated is not None:
            return replace(self, destination=flow.translated)
        return self

    @cached_property
    def readings(self) -> Mapping[Field, Reading]:
        """What it has for each field. A name that it has none of is empty."""
        flow = self.flow
        sender = flow.translated or flow.destination
        receiver = None if flow.masked and flow.mask is None else flow.mask or flow.source.address
        tracked: dict[Field, Reading] = {
            Field.CT_MARK: _exactly(flow.mark),
            Field.DIRECTION: "reply" if flow.turn is Turn.ANSWER else "original",
            Field.ORIGINAL_SOURCE: _exactly(flow.source.address),
            Field.ORIGINAL_DESTINATION: _exactly(flow.destination.address),
            Field.ORIGINAL_SOURCE_PORT: _between(flow.source),
            Field.ORIGINAL_DESTINATION_PORT: _between(flow.destination),
            Field.REPLY_SOURCE: _exactly(sender.address),
            Field.REPLY_DESTINATION: _exactly(receiver),
            Field.REPLY_SOURCE_PORT: _between(sender),
            Field.REPLY_DESTINATION_PORT: None if flow.masked else _between(flow.source),
        }
        return {
            Field.FAMILY: _exactly(self.family.value),
            Field.PROTOCOL: _exactly(NUMBERS[self.protocol]),
            Field.SOURCE: _exactly(self.source.address),
            Field.DESTINATION: _exactly(self.destination.address),
            Field.SOURCE_PORT: _between(self.source),
            Field.DESTINATION_PORT: _between(self.destination),
            Field.IN_DEVICE: self.in_device or "",
            Field.OUT_DEVICE: self.out_device or "",
            Field.PACKET_TYPE: "unicast",
            Field.TCP_FLAGS: _exactly(_ACK if flow.answered else _TCP_FLAGS[flow.turn]),
            Field.MARK: _exactly(self.mark),
            Field.STATE: flow.state,
            **(tracked if flow.tracked else dict.fromkeys(tracked, ABSENT)),
        }


_SYN, _ACK = 0x02, 0x10
_TCP_FLAGS = {Turn.FIRST: _SYN, Turn.ANSWER: _SYN | _ACK, Turn.LATER: _ACK}


def _exactly(value: Address | int | None) -> Span | None:
    return None if value is None else (int(value), int(value))


def _between(place: Place) -> Span:
    return place.ports.first, place.ports.last
