"""A packet as rules see it, and the flow that connection tracking makes of it.

Pure. It is the first packet of a flow, or the first answer to it. What is not known of a packet before it is sent is
told as such: of the port that a client will choose, between which it is; of a mark that nobody can work out, nothing.
So a rule that is asked whether it matches can answer that this cannot be told.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ..model import Address, Family, PortRange, Protocol

#: The ports of programs that ask for none in particular, as far as any can be told.
CLIENT_PORTS = PortRange(1024, 65535)
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
#: What a packet has for a field: a number as far as it is known, or a name. None: nothing is known of it.
Reading = Span | str | None


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
    source was translated, to ``mask``; where that is None, or a ``mark`` is, it is not known. ``answered`` is whether
    the packet at hand is the answer.
    """

    source: Place
    destination: Place
    state: str = "invalid"
    translated: Place | None = None
    masked: bool = False
    mask: Address | None = None
    mark: int | None = 0
    answered: bool = False

    @property
    def status(self) -> frozenset[str]:
        """What was done to it, in nft's words."""
        done = {"dnat": self.translated is not None, "snat": self.masked}
        done |= {"seen-reply": self.answered, "confirmed": self.answered}
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
        if self.flow.state == "untracked":
            return self
        return replace(self, flow=replace(self.flow, state="established" if self.flow.answered else "new"))

    def untracked(self) -> Packet:
        """Return it as one that connection tracking is told to leave alone."""
        return replace(self, flow=replace(self.flow, state="untracked"))

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
        flow = replace(self.flow, answered=True, state="invalid")
        return Packet(self.protocol, self.destination, self.source, flow, in_device)

    def led_back(self) -> Packet:
        """Return an answer as it is when its destination is the client again, whatever the client was made."""
        return replace(self, destination=self.flow.source)

    @cached_property
    def readings(self) -> Mapping[Field, Reading]:
        """What it has for each field. A name that it has none of is empty."""
        flow = self.flow
        sender = flow.translated or flow.destination
        receiver = None if flow.masked and flow.mask is None else flow.mask or flow.source.address
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
            Field.TCP_FLAGS: _exactly(_SYN_ACK if flow.answered else _SYN),
            Field.MARK: _exactly(self.mark),
            Field.CT_MARK: _exactly(flow.mark),
            Field.STATE: flow.state,
            Field.DIRECTION: "reply" if flow.answered else "original",
            Field.ORIGINAL_SOURCE: _exactly(flow.source.address),
            Field.ORIGINAL_DESTINATION: _exactly(flow.destination.address),
            Field.ORIGINAL_SOURCE_PORT: _between(flow.source),
            Field.ORIGINAL_DESTINATION_PORT: _between(flow.destination),
            Field.REPLY_SOURCE: _exactly(sender.address),
            Field.REPLY_DESTINATION: _exactly(receiver),
            Field.REPLY_SOURCE_PORT: _between(sender),
            Field.REPLY_DESTINATION_PORT: None if flow.masked else _between(flow.source),
        }


_SYN, _SYN_ACK = 0x02, 0x12


def _exactly(value: Address | int | None) -> Span | None:
    return None if value is None else (int(value), int(value))


def _between(place: Place) -> Span:
    return place.ports.first, place.ports.last
