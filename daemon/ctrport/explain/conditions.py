"""What a rule asks of a packet. Each condition holds, or not, or cannot be told, which is None and never a guess."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..model import Address
from .packet import ABSENT, Field, Packet, Reading, Turn
from .values import Elements, Pattern, compare


class Surroundings(Protocol):
    """What of the node conditions ask for beside the packet."""

    def type_of(self, address: Address, device: str | None = None) -> str:
        """Return what kind of address it is to the node, in nft's words; ``local`` on that device alone, if given."""
        ...

    def device_to(self, address: Address) -> str | None:
        """Return the device of the route to it, None where there is no route."""
        ...


class Condition(Protocol):
    """Something that a rule asks."""

    def holds(self, packet: Packet, around: Surroundings) -> bool | None:
        """Whether it is so; None where that cannot be told."""
        ...


@dataclass(frozen=True)
class Is:
    """A field is one of these; with ``mask``, what of it is left under that."""

    field: Field
    patterns: tuple[Pattern, ...]
    negated: bool = False
    mask: int | None = None

    def holds(self, packet: Packet, around: Surroundings) -> bool | None:
        """See ``Condition``."""
        reading = packet.readings[self.field]
        if reading is ABSENT:
            return False
        if self.mask is not None:
            reading = masked(reading, self.mask)
        found: bool | None = False
        for pattern in self.patterns:
            its = compare(pattern, reading)
            if its:
                return not self.negated
            if its is None:
                found = None
        return None if found is None else self.negated


def masked(reading: Reading, mask: int) -> Reading:
    """Return what a mask leaves of a number, where it is known."""
    if not isinstance(reading, tuple) or reading[0] != reading[1]:
        return None
    return (reading[0] & mask, reading[0] & mask)


@dataclass(frozen=True)
class Among:
    """Fields, together, are an element of a set."""

    fields: tuple[Field, ...]
    elements: Elements[bool]
    negated: bool = False

    def holds(self, packet: Packet, around: Surroundings) -> bool | None:
        """See ``Condition``."""
        readings = [packet.readings[field] for field in self.fields]
        if ABSENT in readings:
            return False
        found = self.elements.find(readings)
        return (bool(found.values[0]) is not self.negated) if found.sure else None


@dataclass(frozen=True)
class AnyPort:
    """The source or the destination port is one of these: iptables' ``--ports``."""

    ports: tuple[Pattern, ...]
    negated: bool = False

    def holds(self, packet: Packet, around: Surroundings) -> bool | None:
        """See ``Condition``."""
        both = [Is(field, self.ports).holds(packet, around) for field in (Field.SOURCE_PORT, Field.DESTINATION_PORT)]
        if True in both:
            return not self.negated
        return None if None in both else self.negated


@dataclass(frozen=True)
class StateOf:
    """The flow is in one of these states, or one of these was done to it: iptables' ``--ctstate`` mixes both."""

    words: frozenset[str]
    negated: bool = False

    def holds(self, packet: Packet, around: Surroundings) -> bool | None:
        """See ``Condition``."""
        flow = packet.flow
        done = flow.tracked and not self.words.isdisjoint(flow.status)
        return (flow.state in self.words or done) is not self.negated


@dataclass(frozen=True)
class StatusOf:
    """One of these was done to the flow. What is not tracked has no status, not even another."""

    words: frozenset[str]
    negated: bool = False

    def holds(self, packet: Packet, around: Surroundings) -> bool | None:
        """See ``Condition``."""
        if not packet.flow.tracked:
            return False
        if "assured" in self.words and packet.flow.turn is not Turn.FIRST:
            return None  # it depends on the protocol, and on how much was answered
        return self.words.isdisjoint(packet.flow.status) is self.negated


@dataclass(frozen=True)
class TypeIs:
    """It comes from, or goes to, one of these kinds of address; ``here``: to the device that it came in by."""

    source: bool
    types: frozenset[str]
    here: bool = False
    negated: bool = False

    def holds(self, packet: Packet, around: Surroundings) -> bool | None:
        """See ``Condition``."""
        place = packet.source if self.source else packet.destination
        its = around.type_of(place.address, packet.in_device if self.here else None)
        return (its in self.types) is not self.negated


@dataclass(frozen=True)
class WayBack:
    """There is a route back to the source; ``strict``: by the device that it came in by. By lo there is always."""

    strict: bool = True
    negated: bool = False

    def holds(self, packet: Packet, around: Surroundings) -> bool | None:
        """See ``Condition``."""
        if packet.in_device == "lo":
            return not self.negated
        device = around.device_to(packet.source.address)
        there = device is not None and (not self.strict or device == packet.in_device)
        return there is not self.negated


@dataclass(frozen=True)
class Bridged:
    """A bridge sends it on, and not the node: it can be so only where it leaves by the device that it came in by."""

    negated: bool = False

    def holds(self, packet: Packet, around: Surroundings) -> bool | None:
        """See ``Condition``."""
        return None if packet.in_device == packet.out_device else self.negated


@dataclass(frozen=True)
class Sender:
    """It is sent by certain users or programs of the node; what came in from elsewhere is by none."""

    negated: bool = False

    def holds(self, packet: Packet, around: Surroundings) -> bool | None:
        """See ``Condition``."""
        return None if packet.in_device is None else self.negated


@dataclass(frozen=True)
class Doubt:
    """Something that nobody can tell here. ``words`` are the rule's own, not made safe to print."""

    words: str

    def holds(self, packet: Packet, around: Surroundings) -> bool | None:
        """See ``Condition``."""
        return None


@dataclass(frozen=True)
class Never:
    """Something that is not so of any packet that is looked at here, such as to be of ICMP."""

    negated: bool = False

    def holds(self, packet: Packet, around: Surroundings) -> bool | None:
        """See ``Condition``."""
        return self.negated
