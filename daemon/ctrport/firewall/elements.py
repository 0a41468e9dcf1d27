"""Which elements of our own table stand for a rule.

Pure, and total: every rule that ``rules`` and ``networks`` make has its elements, or is part of what stands there as
long as the table does (``standing``). Rules that are about the same have the same element, which is there as long as
one of them is.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from ..model import Address, Network, Protocol
from ..rules import ACCEPT, DROP, LOCALHOST4, MASQUERADE, RETURN, Dnat, Gate, Jump, Match, Place, Rule, Table
from .sets import COMMENT, Element, device, gate_maps, packed, port, protocol

#: The comments of elements that containers share.
_OF_LINK, _OF_RANGES = "ctrport link", "ctrport ranges"


# To see whether the kernel holds what it should takes a quarter of the time with it. As the tags of rules they are kept
# for as long as somebody has the rule.
_elements: WeakKeyDictionary[Rule, tuple[Element, ...]] = WeakKeyDictionary()


def elements(rule: Rule) -> tuple[Element, ...]:
    """Return the elements that stand for ``rule``; none where it is part of what stands.

    Raises ``ValueError`` for what is no rule of ours.
    """
    its = _elements.get(rule)
    if its is None:
        its = _elements[rule] = _made(rule)
    return its


def _made(rule: Rule) -> tuple[Element, ...]:
    match, target, nat = rule.match, rule.target, rule.table is Table.NAT
    if isinstance(target, Dnat):
        return _translation(rule, match, target)
    if match.original_ports is not None:
        return (*_same_link(match), *_published(rule)) if nat and target == MASQUERADE else _published(rule)
    if match.original_destination is not None:
        return (_one("node-addresses", rule, match.original_destination.packed),)
    if nat and target == RETURN and match.destination is not None:
        return (_one("services", rule, match.destination.network_address.packed),)
    if nat and target == MASQUERADE:
        return _leaving(rule, match)
    if match.established and match.translated:
        return (_one("link-devices", rule, device(_device(match))),)
    if rule.table is Table.FILTER and (match.in_device or match.out_device):
        return _bridge(rule, match)
    if target is None or rule.place is not Place.OWN or match == Match():
        return ()
    raise ValueError(f"not a rule of ours: {rule}")


def comment(owner: str) -> str:
    """Return the comment of what is ``owner``'s."""
    its = f"ctrport {owner}"
    if COMMENT.fullmatch(its) is None:
        raise ValueError(f"not an owner that can be part of a rule: {owner!r}")
    return its


def _one(name: str, rule: Rule, *fields: bytes, data: bytes = b"") -> Element:
    return Element(name, packed(*fields), b"", data, comment(rule.owner))


def _translation(rule: Rule, match: Match, target: Dnat) -> tuple[Element, ...]:
    """Return where packets to each host port go."""
    assert match.protocol is not None
    assert match.ports is not None
    its, to = protocol(match.protocol), target.address.packed
    at = () if match.destination is None else (match.destination.network_address.packed,)
    gate = _gate(match)
    if target.port is None and gate is None:
        first, last = port(match.ports.first), port(match.ports.last)
        if at:
            key, end = packed(*at, its, first), packed(*at, its, last)
            return (Element("host-ranges-at", key, end, to, comment(rule.owner)),)
        return (Element(f"host-ranges-{match.protocol}", first, last, to, comment(rule.owner)),)
    if gate is None:
        name, before = "host-ports-at" if at else "host-ports", at
    else:
        source = () if match.source is None else (match.source.network_address.packed,)
        through = () if match.in_device is None else (device(match.in_device),)
        name, before = gate_maps(gate)[not at].name, (*source, *through, *at)
    ports = ((number, target.port or number) for number in match.ports)
    said = comment(rule.owner)
    return tuple(
        Element(name, packed(*before, its, port(number)), b"", packed(to, port(goes)), said) for number, goes in ports
    )


def _gate(match: Match) -> Gate | None:
    """Return the way in which a mapping is not for everybody; None where it is."""
    if match.source is not None:
        return Gate(match.source.version, match.source.prefixlen, match.in_device is not None)
    return None if match.in_device is None else Gate(4, 0, True)  # whichever family: the maps go by the same name


def _published(rule: Rule) -> tuple[Element, ...]:
    """Return what knows the packets that the translation of a mapping sent to the container."""
    match = rule.match
    assert match.protocol is not None
    assert match.ports is not None
    assert match.original_ports is not None
    assert match.destination is not None
    to, its, said = match.destination.network_address.packed, protocol(match.protocol), comment(rule.owner)
    at = () if match.original_destination is None else (match.original_destination.packed,)
    if match.ports == match.original_ports and len(match.ports) > 1:
        hosts = Element("range-hosts", packed(to, its), b"", b"", _OF_RANGES)
        return (_range(match.protocol, at, match.ports.first, match.ports.last, said), hosts)
    name = "published-at" if at else "published"
    pairs = zip(match.ports, match.original_ports, strict=True)
    return tuple(
        Element(name, packed(*at, to, its, port(number), port(asked)), b"", b"", said) for number, asked in pairs
    )


def _range(its: Protocol, at: tuple[bytes, ...], first: int, last: int, said: str) -> Element:
    if not at:
        return Element(f"published-ranges-{its}", port(first), port(last), b"", said)
    key, end = packed(*at, protocol(its), port(first)), packed(*at, protocol(its), port(last))
    return Element("published-ranges-at", key, end, b"", said)


def _same_link(match: Match) -> tuple[Element, ...]:
    """Return what knows that a packet comes from where the container's answer would not come back from."""
    source = match.source
    if source is None:
        return ()  # whoever asks is masqueraded, which what stands knows
    if source.prefixlen == source.max_prefixlen:
        itself = source.network_address.packed
        return (Element("selves", packed(itself, itself), b"", b"", _OF_LINK),)
    first, last = _ends(source)
    return (Element("links", packed(first.packed, first.packed), packed(last.packed, last.packed), b"", _OF_LINK),)


def _leaving(rule: Rule, match: Match) -> tuple[Element, ...]:
    if match.source == LOCALHOST4 and match.out_device is not None:
        return (_one("localnet-devices", rule, device(match.out_device)),)
    if match.source is None or match.not_out_device is None:
        raise ValueError(f"not a rule of ours: {rule}")
    first, last = _ends(match.source)
    bridge, said = device(match.not_out_device), comment(rule.owner)
    return (
        Element("subnets", first.packed, last.packed, b"", said),
        Element("subnet-bridges", packed(first.packed, bridge), packed(last.packed, bridge), b"", said),
    )


def _bridge(rule: Rule, match: Match) -> tuple[Element, ...]:
    its = device(_device(match))
    if match.in_device is not None and match.out_device is not None:
        return (_one("bridge-pairs", rule, its, device(match.out_device)),)
    if rule.target not in (ACCEPT, DROP) and not isinstance(rule.target, Jump):
        raise ValueError(f"not a rule of ours: {rule}")
    return (_one("bridges", rule, its),)


def _device(match: Match) -> str:
    its = match.in_device or match.out_device
    assert its is not None
    return its


def _ends(network: Network) -> tuple[Address, Address]:
    return network.network_address, network.broadcast_address
