"""What the kernel should hold: publications -> chains and rules, whatever program writes them there.

Pure. A rule is data with typed fields, never text; each backend renders it in its own language. ``skeleton`` is what is
there as long as ctrport is, ``rules_for`` what one publication adds. Rules that several publications need (those of a
device, the guard of 127.0.0.0/8) are equal values: ``Ruleset`` counts who asks for each and says when the first comes
and the last leaves.

Chain names are API: an operator's scripts and the next release know them. Changing one needs a clean-up of the old.
"""

from __future__ import annotations

import enum
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network

from .model import (
    Access,
    Address,
    Attachment,
    Family,
    Network,
    PortRange,
    Protocol,
    Publication,
)
from .owners import LocalnetRecord, owner_of

USER_CHAIN = "DOCKER-USER"  # the operator's, under dockerd's name for it whatever ours are called

LOCALHOST4 = IPv4Network("127.0.0.0/8")
LOCALHOST6 = IPv6Network("::1/128")
LINK_LOCAL6 = IPv6Network("fe80::/10")

#: The bit of a packet's mark that says, for as long as iptables' FORWARD is asked, that our own table has let it
#: through. Of others: Cilium has 0xf00, netavark 0x1000, CNI's portmap 0x2000, kube-proxy 0x4000 and 0x8000, Calico and
#: tailscale what is above these, and who counts marks himself begins at 1.
ACCEPTED_MARK = 0x40


class Table(str, enum.Enum):
    """The iptables tables that hold rules of ours."""

    RAW = "raw"
    NAT = "nat"
    FILTER = "filter"

    def __str__(self) -> str:
        return self.value


class Place(enum.Enum):
    """Where a rule stands in its chain.

    OWN: in a chain of ours, ordered by rank. The others are for the few rules we put into kernel chains. FIRST: before
    all others. EARLY: before all but known neighbours' jumps, who want the top too. LAST: behind those jumps. POLICY:
    first, but last where kube-proxy or a policy agent has a jump of its own, so that it is asked first.
    """

    OWN = "own"
    FIRST = "first"
    EARLY = "early"
    LAST = "last"
    POLICY = "policy"


@dataclass(frozen=True)
class Verdict:
    """A target without parameters: ACCEPT, DROP, RETURN or MASQUERADE."""

    name: str


@dataclass(frozen=True)
class Jump:
    """Go on in another chain of the same table."""

    chain: str


@dataclass(frozen=True)
class Dnat:
    """Send the packet to ``address``; ``port`` None keeps the port it came to."""

    address: Address
    port: int | None


Target = Verdict | Jump | Dnat | None  # None: the rule only marks the chain as ours

ACCEPT, DROP, MASQUERADE, RETURN = Verdict("ACCEPT"), Verdict("DROP"), Verdict("MASQUERADE"), Verdict("RETURN")


@dataclass(frozen=True)
class Match:
    """What a packet must be like: every field that is given must hold. ``not_`` fields must not."""

    source: Network | None = None
    not_source: Network | None = None
    destination: Network | None = None
    not_destination: Network | None = None
    in_device: str | None = None
    not_in_device: str | None = None
    out_device: str | None = None
    not_out_device: str | None = None
    protocol: Protocol | None = None
    ports: PortRange | None = None  # the destination ports as the packet has them now
    to_local: bool = False  # the destination is an address of the node
    established: bool = False  # the flow's state is RELATED or ESTABLISHED
    translated: bool = False  # the flow's destination was translated (DNAT), by us or by another
    original_ports: PortRange | None = None  # the destination ports before translation
    original_destination: Address | None = None
    mark: int | None = None  # the bits of the packet's mark that are set, whatever the others are


@dataclass(frozen=True)
class Rule:
    """One rule. ``owner`` says whose it is, in words that end up in its comment.

    ``rank`` orders a chain of ours: lower ranks first; rules of one rank never match the same packet, or do not mind
    who is first.
    """

    family: Family
    table: Table
    chain: str
    match: Match
    target: Target
    owner: str
    rank: int = 0
    place: Place = Place.OWN
    # No part of its value, but worked out of that once: a rule is looked up and written again and again.
    tag: str | None = field(default=None, init=False, compare=False, repr=False)  # see ``firewall.text.tag``
    _hash: int | None = field(default=None, init=False, compare=False, repr=False)

    def __hash__(self) -> int:
        if self._hash is None:
            its = (self.family, self.table, self.chain, self.match, self.target, self.owner, self.rank, self.place)
            object.__setattr__(self, "_hash", hash(its))
        assert self._hash is not None
        return self._hash


@dataclass(frozen=True, order=True)
class Gate:
    """In which way a mapping is not for everybody: by sources with a prefix of that length, by the interface, or both.

    ``version`` is that of the addresses; of length 0 is every source.
    """

    version: int
    length: int
    interface: bool


def gates(accesses: Iterable[Access]) -> tuple[Gate, ...]:
    """Return every way in which these are not for everybody, in order."""
    found = set()
    for access, family in itertools.product(accesses, Family):
        sources = access.sources_of(family)
        if sources or (sources is not None and access.interface is not None):
            lengths = {source.prefixlen for source in sources} or {0}
            found |= {Gate(family.value, length, access.interface is not None) for length in lengths}
    return tuple(sorted(found))


@dataclass(frozen=True)
class Layout:
    """What of the config shapes the rules: the chain everything is named after, and what it is to do.

    ``gates`` are those of all mappings that may be asked for.
    """

    chain: str = "DOCKER"
    position: Place = Place.POLICY
    localhost: bool = True
    masquerade_all: bool = False  # who comes from anywhere, not from the container's own link alone
    networks: bool = False  # whether some bridge is run the Docker way
    gates: tuple[Gate, ...] = ()

    @property
    def forward(self) -> str:
        """The name of the chain that FORWARD jumps to."""
        return f"{self.chain}-FORWARD"

    @property
    def postrouting(self) -> str:
        """The name of the chain that POSTROUTING jumps to."""
        return f"{self.chain}-POSTROUTING"

    @property
    def hairpin(self) -> str:
        """The name of the chain for flows that were sent to an address of the node's, on their way out of it."""
        return f"{self.chain}-HAIRPIN"

    @property
    def isolation_stages(self) -> tuple[str, str]:
        """The names of the chains that keep networks apart: who leaves one, and would enter another."""
        return f"{self.chain}-ISOLATION-STAGE-1", f"{self.chain}-ISOLATION-STAGE-2"

    @property
    def own_chains(self) -> tuple[tuple[Table, str], ...]:
        """Every chain that is ours alone, by table."""
        return (
            (Table.NAT, self.chain),
            (Table.NAT, self.postrouting),
            (Table.NAT, self.hairpin),
            (Table.FILTER, self.chain),
            (Table.FILTER, self.forward),
            *((Table.FILTER, stage) for stage in self.isolation_stages if self.networks),
        )

    @property
    def kernel_chains(self) -> tuple[tuple[Table, str], ...]:
        """The kernel's chains that hold a rule of ours."""
        return (
            (Table.RAW, "PREROUTING"),
            (Table.NAT, "PREROUTING"),
            (Table.NAT, "OUTPUT"),
            (Table.NAT, "POSTROUTING"),
            (Table.FILTER, "FORWARD"),
        )


def skeleton(layout: Layout, family: Family) -> tuple[Rule, ...]:
    """Return the rules that stand as long as ctrport does: our chains' marks, and the jumps to them.

    A marked chain is known as ours even when it is otherwise empty.
    """
    nat, chain, forward = Table.NAT, layout.chain, layout.forward
    marks = [Rule(family, table, name, Match(), None, "chain", rank=_MARK) for table, name in layout.own_chains]
    # Without localhost a node's own packets to 127.0.0.1 must not be translated: they could not come back.
    # Under IPv6 they never can: ::1 is not routed (and a client that is refused there goes on to 127.0.0.1).
    inbound = Match(to_local=True, not_destination=LOCALHOST4 if family is Family.IPV4 else LOCALHOST6)
    outbound = Match(to_local=True) if family is Family.IPV4 and layout.localhost else inbound
    jumps = [
        Rule(family, nat, "PREROUTING", inbound, Jump(chain), "jump", place=Place.LAST),
        Rule(family, nat, "OUTPUT", outbound, Jump(chain), "jump", place=Place.LAST),
        # Before CNI's: its ipMasq accepts what stays in the subnet, so a hairpin flow would keep its source.
        Rule(family, nat, "POSTROUTING", Match(), Jump(layout.postrouting), "jump", place=Place.EARLY),
        Rule(family, Table.FILTER, "FORWARD", Match(), Jump(USER_CHAIN), "jump", place=Place.FIRST),
        Rule(family, Table.FILTER, "FORWARD", Match(), Jump(forward), "jump", place=layout.position),
    ]
    return (*marks, *jumps)


def accepted(layout: Layout, family: Family) -> Rule:
    """Return the rule by which a FORWARD of iptables that drops lets through what our own table of nftables accepted.

    A packet that is dropped in any table is dropped, whatever another has said of it.
    """
    match = Match(mark=ACCEPTED_MARK)
    return Rule(family, Table.FILTER, "FORWARD", match, ACCEPT, ACCEPTED_OWNER, place=layout.position)


#: The owner of that rule.
ACCEPTED_OWNER = "nftables"


def rules_at(address: Address, layout: Layout) -> tuple[Rule, ...]:
    """Return the rules for one address of the node's: flows that were sent to it, and were translated, may be ours.

    Others translate too. The destination port alone would not do: a Service often has the number of a port that is
    published for the same pod, and its flows must neither be let in by us nor lose their source.
    """
    if address.is_loopback:
        return ()  # such flows are not forwarded, and have a source rule of their own
    family, owner = Family.of(address), f"node {address}"
    match = Match(translated=True, original_destination=address)
    return (
        Rule(family, Table.FILTER, layout.forward, match, Jump(layout.chain), owner, rank=_NEW_FLOWS),
        Rule(family, Table.NAT, layout.postrouting, match, Jump(layout.hairpin), owner, rank=_NEW_FLOWS),
    )


#: Ranks. In DOCKER (nat): host addresses before wildcards. In DOCKER-FORWARD: flows that are known before new ones.
_MARK, _HOST_ADDRESS, _ANY_ADDRESS = 0, 10, 20
_KNOWN_FLOWS, _NEW_FLOWS = 10, 20


def needs_localnet(publication: Publication, layout: Layout) -> str | None:
    """Return the device that needs route_localnet for this publication to be reached at 127.0.0.1, if one does."""
    mapping, access = publication.mapping, publication.access
    if not layout.localhost or not (mapping.any_host_ip or (mapping.host_ip and mapping.host_ip.is_loopback)):
        return None
    sources = access.sources_of(Family.IPV4)
    if access.interface is not None or sources is None:
        return None
    if sources and not any(source.overlaps(LOCALHOST4) for source in sources if isinstance(source, IPv4Network)):
        return None
    return next((a.device for a in publication.attachments if a.address.version == 4), None)


def rules_for(publication: Publication, layout: Layout, *, localnet_ours: bool = True) -> tuple[Rule, ...]:
    """Return the rules of one publication; none unless it is active.

    ``localnet_ours`` is what ``LocalnetRecord`` is to say of the device, where it needs one.
    """
    rules: list[Rule] = []
    for attachment in publication.attachments:
        rules += _nat(publication, attachment, layout)
        rules += _filter(publication, attachment, layout)
    device = needs_localnet(publication, layout)
    if device is not None:
        rules += _localhost(LocalnetRecord(device, localnet_ours), layout.postrouting)
    return tuple(rules)


def _host_ip(publication: Publication) -> Address | None:
    return None if publication.mapping.any_host_ip else publication.mapping.host_ip


# What follows is done between a container's start and its port being open, for each port of a range: so no value is
# made where one is at hand, nor out of another by replace(), which takes ten times as long as to make one.


def _nat(publication: Publication, attachment: Attachment, layout: Layout) -> Iterator[Rule]:
    mapping, host_ip, owner = publication.bound, _host_ip(publication), owner_of(publication)
    assert mapping is not None  # an active publication has it
    assert mapping.host_ports is not None
    family, address = Family.of(attachment.address), attachment.address
    destination = None if host_ip is None else ip_network(host_ip)
    rank = _ANY_ADDRESS if host_ip is None else _HOST_ADDRESS

    def rule(source: Network | None, ports: PortRange, port: int | None) -> Rule:
        match = Match(
            source=source,
            # What comes from a link-local address cannot be sent on; iptables takes one source, and one that is named
            # says enough.
            not_source=LINK_LOCAL6 if family is Family.IPV6 and source is None else None,
            destination=destination,
            in_device=publication.access.interface,
            protocol=mapping.protocol,
            ports=ports,
        )
        return Rule(family, Table.NAT, layout.chain, match, Dnat(address, port), owner, rank)

    for source in publication.access.sources_of(family) or (None,):
        if len(mapping.host_ports) == 1:
            yield rule(source, mapping.host_ports, mapping.container_ports.first)
        elif mapping.host_ports == mapping.container_ports:
            yield rule(source, mapping.host_ports, None)
        else:
            # A rule a port: of a shifted range (a-b/base) the kernel takes the neighbour's port when a tuple clashes.
            for host_port, port in zip(mapping.host_ports, mapping.container_ports, strict=True):
                yield rule(source, PortRange(host_port, host_port), port)
    if host_ip is None or not host_ip.is_loopback:
        hairpin = _translated_to(publication, attachment, source=None if layout.masquerade_all else attachment.subnet)
        yield Rule(family, Table.NAT, layout.hairpin, hairpin, MASQUERADE, owner, rank=10)


def _filter(publication: Publication, attachment: Attachment, layout: Layout) -> Iterator[Rule]:
    host_ip = _host_ip(publication)
    if host_ip is not None and host_ip.is_loopback:
        return  # reached from the host alone, whose packets are not forwarded
    family = Family.of(attachment.address)
    yield from _known_flows(family, attachment.device, layout.forward)
    match = _translated_to(publication, attachment)
    yield Rule(family, Table.FILTER, layout.chain, match, ACCEPT, owner_of(publication), rank=10)


@lru_cache(maxsize=64)
def _known_flows(family: Family, device: str, chain: str) -> tuple[Rule, ...]:
    """Return the rules for the flows through a device that were let in already: all behind it have them."""
    matches = (
        Match(out_device=device, established=True, translated=True),
        Match(in_device=device, established=True, translated=True),
    )
    owner = f"device {device}"
    return tuple(Rule(family, Table.FILTER, chain, match, ACCEPT, owner, rank=_KNOWN_FLOWS) for match in matches)


def _translated_to(publication: Publication, attachment: Attachment, source: Network | None = None) -> Match:
    """Match the flows that the publication's own DNAT sent to the container, and nobody else's.

    In chains that only see flows to the node's own addresses: there a host port is ours or, kube-proxy's NodePort
    perhaps, another's; so the original port decides.
    """
    assert publication.bound is not None
    return Match(
        source=source,
        destination=ip_network(attachment.address),
        protocol=publication.bound.protocol,
        ports=publication.bound.container_ports,
        translated=True,
        original_ports=publication.bound.host_ports,
        original_destination=_host_ip(publication),
    )


@lru_cache(maxsize=64)
def _localhost(record: LocalnetRecord, postrouting: str) -> tuple[Rule, ...]:
    """What 127.0.0.1 needs under IPv4: a source the container can answer to, and a guard.

    route_localnet lets the device's side route 127.0.0.0/8 to us; the guard drops what does (CVE-2020-8558).
    """
    v4, owner = Family.IPV4, "localhost guard"
    guarded = (Match(destination=LOCALHOST4, not_in_device="lo"), Match(source=LOCALHOST4, not_in_device="lo"))
    guards = (Rule(v4, Table.RAW, "PREROUTING", match, DROP, owner, place=Place.EARLY) for match in guarded)
    match = Match(source=LOCALHOST4, out_device=record.device)
    return (*guards, Rule(v4, Table.NAT, postrouting, match, MASQUERADE, record.owner, rank=10))


@dataclass(frozen=True)
class Difference:
    """Rules that came and rules that went."""

    added: tuple[Rule, ...]
    removed: tuple[Rule, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed)


class Ruleset:
    """The rules that the kernel should hold, each as long as somebody asks for it."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self._asked = Counter(rules)

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._asked)

    def __len__(self) -> int:
        return len(self._asked)

    def __contains__(self, rule: object) -> bool:
        return rule in self._asked

    def replace(self, old: Iterable[Rule], new: Iterable[Rule]) -> Difference:
        """Stop asking for ``old``, ask for ``new``, and return what this changed."""
        touched: dict[Rule, int] = {}
        for rules, by in ((new, 1), (old, -1)):
            for rule in rules:
                touched[rule] = touched.get(rule, 0) + by
        added, removed = [], []
        for rule, by in touched.items():
            had = self._asked[rule]
            if had + by < 0:
                raise ValueError(f"nobody asked for this rule: {rule}")
            if had + by == 0:
                del self._asked[rule]
                removed += [rule] if had else []
            else:
                self._asked[rule] = had + by
                added += [] if had else [rule]
        return Difference(tuple(added), tuple(removed))
