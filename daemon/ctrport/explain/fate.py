"""How a packet can end: what became of it, because of what, and what there is to say of that. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from .cases import At, Case
from .facts import Inhabitant, Socket


class Outcome(str, enum.Enum):
    """What became of it: somebody answers, and the answer comes back; or not; or nobody can tell."""

    WORKS = "works"
    FAILS = "fails"
    UNKNOWN = "unknown"


class Cause(str, enum.Enum):
    """Because of what. The values are API."""

    # It works: a container, or a program of the node itself, answers.
    CONTAINER = "container-answers"
    PROGRAM = "program-of-the-node-answers"

    # Nobody can tell.
    UNTOLD = "rule-not-understood"
    BEYOND = "leaves-the-node"
    STRANGER = "nobody-known"
    IPVS = "ipvs"
    UNSEEN = "not-all-can-be-seen"
    TABLE_FULL = "table-of-flows-full"

    # On the way there.
    DROPPED = "dropped"
    REJECTED = "rejected"
    ISOLATED = "isolated"
    NO_ROUTE = "no-route"
    FORWARDING = "forwarding-off"
    RP_FILTER = "rp-filter"
    ROUTE_LOCALNET = "route-localnet-off"
    HAIRPIN = "hairpin-off"

    # At the node itself.
    NOBODY = "nobody-listens"
    NOT_INSTALLED = "not-in-the-kernel"
    UNTRACKED = "not-tracked"
    NOT_ACTIVE = "not-active"
    SOURCES = "not-among-sources"
    INTERFACE = "another-interface"
    HOST_ADDRESS = "another-host-address"
    ANOTHER_FAMILY = "another-address-family"
    PROTOCOL = "another-protocol"
    LOOPBACK6 = "ipv6-loopback"
    LOCALHOST = "localhost-off"
    TAKEN = "taken-by-another"

    # In the container.
    GONE = "container-gone"
    PAUSED = "container-paused"
    NOT_LISTENING = "container-does-not-listen"
    LOOPBACK_ONLY = "container-listens-on-loopback"
    SOCKETS_UNSEEN = "sockets-not-seen"

    # On the way back.
    OWN_ADDRESS = "source-is-the-container"
    NO_WAY_BACK = "no-way-back"
    PAST_NODE = "answers-past-the-node"
    ANSWER_DROPPED = "answer-dropped"
    LATER_DROPPED = "next-packet-dropped"


@dataclass(frozen=True)
class Fate:
    """How one case ended. ``at`` is the rule or policy that decided; ``who`` the container it came to.

    ``socket`` is who would answer at the node itself, None where nobody does; ``words`` are what the cause needs more,
    by names that ``sentences`` knows. ``answer`` is whether it befell the answer.
    """

    outcome: Outcome
    cause: Cause
    case: Case
    at: At | None = None
    who: Inhabitant | None = None
    socket: Socket | None = None
    answer: bool = False
    words: dict[str, str] = field(default_factory=dict)
