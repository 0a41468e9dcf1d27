"""Small worlds for the tests of the core: so few names, ports and addresses that everything meets everything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from hypothesis import strategies as st

from ctrport import ports
from ctrport.declared import NAME, Kind, Permission
from ctrport.model import (
    Access,
    Address,
    Attachment,
    Candidate,
    Container,
    ContainerKey,
    Declaration,
    Endpoint,
    Family,
    Live,
    Mapping,
    Member,
    NodeFacts,
    Obstacle,
    PortRange,
    Protocol,
    Publication,
    Selector,
    State,
)
from ctrport.publish import Publications

NODE4 = IPv4Address("192.0.2.1")
NODE6 = IPv6Address("2001:db8::1")
NODE: tuple[Address, ...] = (NODE4, NODE6)
FACTS = NodeFacts(frozenset(Family), frozenset(NODE))
NO_ADDRESS = Obstacle(State.WAITING, "it has only a loopback address")

ANYONE = Access()
NAMES = ("api", "db", "web")
ADDRESSES = ("172.17.0.2", "172.17.0.3", "10.244.1.7", "fd00::2", "fd00::3")


def attachment(address: str = "172.17.0.2", device: str = "docker0") -> Attachment:
    """An address on a network of the usual size."""
    where = ip_address(address)
    return Attachment(where, device, ip_network((where, 16 if where.version == 4 else 64), strict=False))


def endpoint(*addresses: str, device: str = "docker0") -> Endpoint:
    return Endpoint(tuple(attachment(address, device) for address in addresses))


def key(name: str) -> ContainerKey:
    return ContainerKey("default", name)


def candidate(
    name: str, *addresses: str, started: int = 1, obstacle: Obstacle | None = None, labels: dict[str, str] | None = None
) -> Candidate:
    container = Container(key(name), 100, started, (Member(name, None, labels or {}),))
    return Candidate(container, obstacle or endpoint(*addresses or ("172.17.0.2",)))


def declaration(container: str, *mappings: str, line: int = 1) -> Declaration:
    return Declaration(Selector(container=container), tuple(map(ports.parse, mappings)), f"config.yaml:{line}")


def active(
    mapping: str,
    *addresses: str,
    name: str = "web",
    device: str = "docker0",
    on: str | None = None,
    access: Access = ANYONE,
) -> Publication:
    """A publication that is active at those addresses, ``on`` host ports that were chosen where it names none."""
    attachments = endpoint(*addresses or ("172.17.0.2",), device=device).attachments
    its = ports.parse(mapping)
    bound = its if on is None else replace(its, host_ports=ports.parse(on).container_ports)
    return Publication(
        *(its, "config.yaml:1", key(name), State.ACTIVE, ""),
        attachments=attachments,
        bound=bound,
        access=access,
    )


@st.composite
def mappings(draw: st.DrawFn, host_ips: tuple[Address | None, ...], *, free: bool = False) -> Mapping:
    """Mappings on a handful of host ports. ``free`` has some that ask for any port."""
    length = draw(st.sampled_from([1, 1, 2, 3]))
    host = draw(st.sampled_from([8000, 8000, 8001, 8003]))
    container = draw(st.sampled_from([host, 80, 81]))
    host_ports = PortRange(host, host + length - 1)
    return Mapping(
        draw(st.sampled_from(host_ips)),
        draw(st.sampled_from([None, host_ports, host_ports, host_ports])) if free else host_ports,
        PortRange(container, container + length - 1),
        draw(st.sampled_from([Protocol.TCP, Protocol.TCP, Protocol.UDP])),
    )


ANY_HOST_IP: tuple[Address | None, ...] = (
    *(None, None, None, None, None, NODE4, NODE4, NODE6, IPv4Address("192.0.2.99")),
    *map(ip_address, ("0.0.0.0", "::", "127.0.0.1", "::1")),
)

selectors = st.builds(
    Selector,
    namespace=st.sampled_from([None, "default"]),
    container=st.sampled_from(["*", "*", "*", "?b", *NAMES, "ghost"]),
    labels=st.sampled_from([(), (), (("tier", "front"),)]),
)


@st.composite
def declaration_lists(draw: st.DrawFn) -> list[Declaration]:
    """What a configuration file may say, each entry on a line of its own."""
    wanted = st.lists(mappings(ANY_HOST_IP, free=True), min_size=1, max_size=3).map(tuple)
    entries = draw(st.lists(st.tuples(selectors, wanted), max_size=4))
    return [Declaration(selector, ports, f"config.yaml:{line}") for line, (selector, ports) in enumerate(entries)]


endpoints = st.sampled_from(
    [
        NO_ADDRESS,
        endpoint("172.17.0.2"),
        endpoint("172.17.0.2"),
        endpoint("172.17.0.3"),
        endpoint("fd00::2"),
        endpoint("172.17.0.2", "fd00::2"),
    ]
)
candidates = st.builds(
    Candidate,
    st.builds(
        lambda name, started, labels: Container(key(name), 100, started, (Member(name, None, labels),)),
        st.sampled_from(NAMES),
        st.integers(1, 3),
        st.sampled_from([dict[str, str](), {"tier": "front"}]),
    ),
    endpoints,
)
facts = st.builds(
    NodeFacts,
    st.frozensets(st.sampled_from(Family)),
    st.frozensets(st.sampled_from([NODE4, NODE6])),
)

#: A rule by which containers may publish by themselves whatever they ask for.
ANYTHING = Permission("config.yaml:9", frozenset(Kind), (PortRange(1, 65535),), any_free=True)
#: A few host ports to choose from, which some ask for by number.
FEW = replace(FACTS, free_ports=(PortRange(8000, 8002),))
_wishes = st.lists(st.sampled_from(("80", "8000:80", "80-81", "8001:80", "8000-8002:80")), max_size=2, unique=True)


def wishing(name: str, started: int, own: Sequence[str] = (), given: Sequence[str] = ()) -> Candidate:
    """A container that declares mappings of its ``own``, with some that the operator has ``given`` it."""
    its = candidate(name, started=started, labels={NAME: ",".join(own)} if own else {})
    live = Live(tuple(map(ports.parse, given)), "1") if given else None
    return replace(its, container=replace(its.container, live=live))


_names = st.sampled_from(NAMES)
wishful = (
    st.builds(wishing, _names, st.integers(1, 3), own=_wishes)
    | st.builds(wishing, _names, st.integers(1, 3), given=_wishes)
    | st.builds(wishing, _names, st.integers(1, 3), own=_wishes, given=_wishes)
)
wish_lists = _wishes.map(lambda wanted: [declaration("web", *wanted)] if wanted else [])


@st.composite
def publication_lists(draw: st.DrawFn, *, max_size: int = 6) -> list[Publication]:
    """Publications that are active, each container with one address a family and one device."""
    where = {
        name: draw(
            st.builds(
                lambda addresses, device: endpoint(*addresses, device=device),
                st.sampled_from([("172.17.0.2",), ("172.17.0.3",), ("fd00::2",), ("10.244.1.7", "fd00::3")]),
                st.sampled_from(["docker0", "cali12ab"]),
            )
        )
        for name in NAMES
    }
    host_ips = (None, None, NODE4, IPv4Address("127.0.0.1"))
    wanted = draw(
        st.lists(st.tuples(st.sampled_from(NAMES), mappings(host_ips)), max_size=max_size, unique=True),
    )
    made = []
    for name, mapping in wanted:
        served = tuple(a for a in where[name].attachments if Family.of(a.address) in mapping.families)
        if served:
            made.append(
                Publication(mapping, "config.yaml:1", key(name), State.ACTIVE, attachments=served, bound=mapping)
            )
    return made


def fresh(
    declarations: Sequence[Declaration], candidates: Iterable[Candidate], facts: NodeFacts, localhost: bool = True
) -> Publications:
    """Publications as they are settled once all of that is known."""
    publications = Publications(declarations, facts, families=tuple(Family), localhost=localhost)
    for each in candidates:
        publications.update(each.container.key, each)
    publications.settle()
    return publications
