"""Hypothesis strategies for the values of `ctrport.model`: any that the model and the `-p` grammar can hold."""

from __future__ import annotations

from ipaddress import IPv6Address

from hypothesis import strategies as st

from ctrport.model import (
    IDENTIFIER_MAX,
    Address,
    Container,
    ContainerKey,
    Declaration,
    Mapping,
    Member,
    PortRange,
    Protocol,
    Selector,
    is_identifier,
)


def _is_plain(address: Address) -> bool:
    """An IPv4-mapped address is one in the model, but none in the grammar."""
    return not (isinstance(address, IPv6Address) and address.ipv4_mapped is not None)


ports = st.integers(1, 65535) | st.sampled_from([1, 80, 65535])
protocols = st.sampled_from(Protocol)
ipv4_addresses = st.ip_addresses(v=4)
host_addresses = (ipv4_addresses | st.ip_addresses(v=6)).filter(_is_plain)


@st.composite
def port_ranges(draw: st.DrawFn, length: int | None = None) -> PortRange:
    """Ranges of ``length`` ports, or of any number of them."""
    if length is None:
        first, last = sorted((draw(ports), draw(ports)))
        return PortRange(first, last)
    first = draw(st.integers(1, 65536 - length))
    return PortRange(first, first + length - 1)


@st.composite
def mappings(draw: st.DrawFn) -> Mapping:
    """Every mapping that some text stands for, pools and free host ports among them."""
    container_ports = draw(port_ranges() | port_ranges(1))
    host_ports = draw(st.none() | port_ranges(len(container_ports)))
    if len(container_ports) == 1:
        host_ports = draw(st.just(host_ports) | port_ranges())
    return Mapping(draw(st.none() | host_addresses), host_ports, container_ports, draw(protocols))


@st.composite
def supported_mappings(draw: st.DrawFn) -> Mapping:
    """Mappings that a configuration file of this version may ask for."""
    length = draw(st.integers(1, 20))
    return Mapping(
        draw(st.none() | ipv4_addresses),
        draw(port_ranges(length)),
        draw(port_ranges(length)),
        draw(st.sampled_from([Protocol.TCP, Protocol.UDP])),
    )


identifiers = st.from_regex(r"[A-Za-z0-9]{1,9}([._-][A-Za-z0-9]{1,9}){0,3}", fullmatch=True).filter(is_identifier)
long_identifiers = st.text("abc019", min_size=IDENTIFIER_MAX, max_size=IDENTIFIER_MAX)
# What a YAML file can hold between double quotes without an escape, and what a label of containerd may be.
label_texts = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20)
labels = st.dictionaries(label_texts.filter(bool), label_texts, max_size=3)

container_keys = st.builds(ContainerKey, identifiers, identifiers | long_identifiers)


def _by_itself(key: ContainerKey, pid: int, started: int, labels: dict[str, str]) -> Container:
    return Container(key, pid, started, (Member(key.id, None, labels),))


containers = st.builds(_by_itself, container_keys, st.integers(1, 2**22), st.integers(0, 2**48), labels)

globs = identifiers | st.sampled_from(["*", "web-*", "web-?", "[a-c]*", "[!a]*", "[]]", "*.service"])


@st.composite
def selectors(draw: st.DrawFn) -> Selector:
    """Selectors with a condition or more, their labels in order, as a configuration file gives them."""
    namespace, container, chosen = draw(
        st.tuples(st.none() | globs, st.none() | globs, labels).filter(lambda conditions: any(conditions))
    )
    return Selector(namespace, container, tuple(sorted(chosen.items())))


@st.composite
def declarations(draw: st.DrawFn) -> Declaration:
    """Declarations of supported mappings, no two of which claim the same host port."""
    chosen: list[Mapping] = []
    for mapping in draw(st.lists(supported_mappings(), min_size=1, max_size=4)):
        if not any(mapping.overlaps(other) for other in chosen):
            chosen.append(mapping)
    return Declaration(draw(selectors()), tuple(chosen), f"config.yaml:{draw(st.integers(1, 99))}")
