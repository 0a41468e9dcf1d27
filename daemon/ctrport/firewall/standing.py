"""What stands in our own table as long as that is there: its chains with their rules, for nft to load.

Pure. The same text whenever the layout is the same. Each rule bears a comment with a digest of itself, so that it is
recognised in the kernel without being understood; what is looked up in it, and changes, are the ``sets``.

Names of hooks and priorities: docs/operating.md shows the table to people, and says what each chain is for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from ..model import Family, Protocol
from ..rules import ACCEPTED_MARK, LINK_LOCAL6, LOCALHOST4, LOCALHOST6, Gate, Layout
from .sets import Set, gate_maps, sets, table

# Where the kernel calls our chains (linux/netfilter.h, linux/netfilter_ipv4.h). Of nat the first who translates a
# flow decides: ours come behind iptables' (-100), where NodePorts are, and on the way out before them (100), as CNI's
# ipMasq accepts what stays in a subnet. The two of FORWARD stand around iptables' own, at 0.
_PREROUTING, _FORWARD, _OUTPUT, _POSTROUTING = ("prerouting", 0), ("forward", 2), ("output", 3), ("postrouting", 4)
_RAW, _TRANSLATE, _LEAVE, _BEFORE_FILTER, _BEHIND_FILTER = -300, -90, 90, -1, 1


#: Chains that are there under some layouts and not under others.
SOMETIMES = ("localhost-guard",)


@dataclass(frozen=True)
class Hook:
    """Where the kernel calls a chain: ``number`` is its own for the hook ``name``. What nobody drops goes on."""

    type: str
    name: str
    number: int
    priority: int

    def __str__(self) -> str:
        return f"type {self.type} hook {self.name} priority {self.priority} ; policy accept ;"


@dataclass(frozen=True)
class Chain:
    """A chain of our table, with its rules in the words of nft; one without a hook is jumped to."""

    name: str
    hook: Hook | None
    rules: tuple[str, ...]

    @property
    def tags(self) -> tuple[str, ...]:
        """The comments of its rules."""
        return tuple(
            f"ctrport {hashlib.sha256(f'{self.name} {rule}'.encode()).hexdigest()[:12]}" for rule in self.rules
        )

    def made(self, family: Family) -> str:
        """Return what makes it, or leaves one that is there as it is, but for its policy."""
        hook = f" {{ {self.hook} }}" if self.hook is not None else ""
        return f"add chain {table(family)} {self.name}{hook}"

    def filled(self, family: Family) -> tuple[str, ...]:
        """Return what puts its rules into it."""
        pairs = zip(self.rules, self.tags, strict=True)
        return tuple(f'add rule {table(family)} {self.name} {rule} comment "{its}"' for rule, its in pairs)


@dataclass(frozen=True)
class Standing:
    """All that stands in the table of one family."""

    family: Family
    sets: tuple[Set, ...]
    chains: tuple[Chain, ...]

    @property
    def script(self) -> tuple[str, ...]:
        """What makes all of it, where there is nothing yet."""
        made = (chain.made(self.family) for chain in self.chains)
        filled = (line for chain in self.chains for line in chain.filled(self.family))
        return (f"add table {table(self.family)}", *(one.words(self.family) for one in self.sets), *made, *filled)


def standing(layout: Layout, family: Family) -> Standing:
    """Return what is to stand in the table of one family."""
    # Those that are jumped to come first.
    return Standing(family, sets(layout, family), tuple(_chains(layout, family)))


def _chains(layout: Layout, family: Family) -> Iterator[Chain]:
    ip = "ip" if family is Family.IPV4 else "ip6"
    if family is Family.IPV4 and layout.localhost:
        guard = (f'iifname != "lo" ip {way} {LOCALHOST4} counter drop' for way in ("daddr", "saddr"))
        yield Chain(SOMETIMES[0], Hook("filter", *_PREROUTING, _RAW), tuple(guard))
    yield Chain("to-containers", None, tuple(_to_containers(layout, family, ip)))
    # Without localhost a node's own packets to 127.0.0.1 must not be translated: they could not come back.
    elsewhere = f"{ip} daddr != {LOCALHOST4 if family is Family.IPV4 else LOCALHOST6} "
    outbound = "" if family is Family.IPV4 and layout.localhost else elsewhere
    for hook, where in ((_PREROUTING, elsewhere), (_OUTPUT, outbound)):
        rules = (f"fib daddr type local {where}jump to-containers",)
        yield Chain(hook[0], Hook("nat", *hook, _TRANSLATE), rules)
    yield Chain("hairpin", None, tuple(_published(ip, "masquerade")))
    yield Chain("postrouting", Hook("nat", *_POSTROUTING, _LEAVE), tuple(_postrouting(layout, family, ip)))
    mark, others = f"{ACCEPTED_MARK:#x}", f"{0xFFFFFFFF ^ ACCEPTED_MARK:#x}"
    unmark = f"meta mark & {mark} == {mark} meta mark set meta mark & {others}"
    yield Chain("accepted", None, (f"meta mark set meta mark | {mark} accept",))
    yield Chain("published-flows", None, tuple(_published(ip, "counter goto accepted")))
    forward = (unmark, *_forward(layout, ip))  # no packet comes with our mark on it
    yield Chain("forward", Hook("filter", *_FORWARD, _BEFORE_FILTER), forward)
    yield Chain("forwarded", Hook("filter", *_FORWARD, _BEHIND_FILTER), (unmark,))


def _to_containers(layout: Layout, family: Family, ip: str) -> Iterator[str]:
    """Return what sends packets to the node's addresses on to containers. No two of its maps have the same port."""
    number = "meta l4proto . th dport"
    both = f"dnat {ip} addr . port to"
    yield f"{ip} daddr @services return"
    if family is Family.IPV6:
        yield f"ip6 saddr {LINK_LOCAL6} return"  # what comes from a link-local address cannot be sent on
    yield f"{both} {ip} daddr . {number} map @host-ports-at"
    yield f"{both} {number} map @host-ports"
    # In a rule with intervals nft wants to be told that there are ports.
    yield f"meta l4proto {{ tcp, udp, sctp }} dnat {ip} to {ip} daddr . {number} map @host-ranges-at"
    for protocol in Protocol:
        yield f"dnat {ip} to {protocol} dport map @host-ranges-{protocol}"
    for gate in layout.gates:
        if gate.version == family.value:
            at, anywhere = gate_maps(gate)
            before = _from(gate, family, ip)
            yield f"{both} {before}{ip} daddr . {number} map @{at.name}"
            yield f"{both} {before}{number} map @{anywhere.name}"


def _from(gate: Gate, family: Family, ip: str) -> str:
    """Return what of a packet says whether it may pass: a source by the bits of its network, an interface."""
    # In front, where nft lists it in words that it would read the same way.
    source = ""
    if gate.length:
        size = 32 if family is Family.IPV4 else 128
        mask = _address(((1 << gate.length) - 1) << (size - gate.length), family)
        source = f"{ip} saddr . " if gate.length == size else f"{ip} saddr & {mask} . "
    return source + ("iifname . " if gate.interface else "")


def _address(number: int, family: Family) -> str:
    return str(type(family.unspecified)(number))


def _published(ip: str, verdict: str) -> Iterator[str]:
    """Return what knows flows that our translation sent to a container, one after the other by protocol.

    nft asks for the port that a flow had before only where it knows whose port that is.
    """
    for protocol in Protocol:
        asked = f"{protocol} dport . ct original proto-dst"
        to, at = f"{ip} daddr . meta l4proto", f"ct original {ip} daddr"
        yield f"{to} . {asked} @published {verdict}"
        yield f"{at} . {to} . {asked} @published-at {verdict}"
        ranges = f"{to} @range-hosts meta l4proto {protocol}"
        yield f"{ranges} ct original proto-dst @published-ranges-{protocol} {verdict}"
        yield f"{ranges} {at} . meta l4proto . ct original proto-dst @published-ranges-at {verdict}"


def _postrouting(layout: Layout, family: Family, ip: str) -> Iterator[str]:
    ours = f"ct status dnat ct original {ip} daddr @node-addresses"
    if family is Family.IPV4 and layout.localhost:
        yield f"ip saddr {LOCALHOST4} oifname @localnet-devices masquerade"
    if layout.masquerade_all:
        yield f"{ours} jump hairpin"
    else:
        for same in ("links", "selves"):
            yield f"{ours} {ip} saddr . {ip} daddr @{same} jump hairpin"
    if layout.networks:
        yield f"{ip} saddr . oifname @subnet-bridges return"
        yield f"{ip} saddr @subnets masquerade"


def _forward(layout: Layout, ip: str) -> Iterator[str]:
    for way in ("oifname", "iifname"):
        yield f"ct status dnat ct state established,related {way} @link-devices goto accepted"
    yield f"ct status dnat ct original {ip} daddr @node-addresses jump published-flows"
    if layout.networks:
        yield "iifname . oifname @bridge-pairs goto accepted"
        yield "iifname @bridges oifname @bridges counter drop"  # from one network into another
        yield "oifname @bridges ct state established,related goto accepted"
        yield "iifname @bridges goto accepted"
        yield "oifname @bridges counter drop"  # what is not published
